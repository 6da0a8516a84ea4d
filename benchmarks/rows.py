"""The rows of the benchmark's table: training, decoding, images, scores.

B images · S image positions · C backbone channels · M captions in a batch · K beams

Each compares this project with the usual way, and checks that both have the same results.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import usual_way
from machine import Machine, check_equal, rate_row, time_row
from synthetic import batch, captions, features, trained_decoder, vocabulary, write_jpegs
from torch import Tensor, nn

import metrics
import train
from config import TrainConfig
from decoder import DecoderConfig
from decoding import beam_search, greedy
from encoder import Encoder, multiplies_bfloat16
from features import encode_images
from inference import Captioner
from losses import cross_entropy
from model import CaptionModel
from readers import Record
from train import train_epoch
from trainer import Trainer
from util.files import UserError
from util.images import read_image
from vocabulary import END

ROOT = Path(__file__).resolve().parent.parent
BEAM = {"beam_size": 5, "max_words": 30}
PENALTY = 0.7
DOCUMENTS = 6000  # images from which document frequencies of n-grams are counted


# ---- training --------------------------------------------------------------------------------


def build_steps(machine: Machine) -> tuple[Callable, Callable, Callable, int]:
    """Return the usual step with the CNN, the usual one with cached features, ours, and M.

    First, the three losses are compared, without dropout and in full precision.
    """
    config = train.configure(["--cnn-weights", "none"])
    words, size, device = vocabulary(), 32, machine.device
    torch.manual_seed(0)
    encoder = Encoder("resnet50").to(device, memory_format=torch.channels_last).eval()
    model = CaptionModel(encoder, config.decoder, words, 224).to(device)
    pixels = torch.rand(size, 3, 224, 224, device=device)
    one = batch(size, words=words)
    if device.type == "cuda":  # as the loader does
        one = one._replace(inputs=one.inputs.pin_memory())
    tokens, owner = one.tokens.to(device), one.owner.to(device)
    # By default cuDNN rounds the inputs of convolutions to 10 bits (TF32).
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        inputs = encoder(pixels)
    usual = usual_way.UsualTransformer(model.decoder, config.decoder.dropout).to(device)
    padded_tokens = usual_way.pad(tokens, usual_way.PADDED_TO)

    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        loss = cross_entropy(model.eval()(inputs, tokens, owner).logits, tokens)
        for usual_tokens, usual_features in (
            (tokens, inputs[owner]),
            (padded_tokens, encoder(pixels[owner])),
        ):
            usual_loss = usual.eval().loss(usual_features, usual_tokens)
            difference = abs(float(loss.nll / loss.words) - float(usual_loss))
            check_equal("the losses of a training batch", difference < 1e-4)

    usual.train()
    optimizer = torch.optim.AdamW(usual.parameters(), lr=1e-4)
    trainer = Trainer(model, TrainConfig(), steps_per_epoch=100)

    def usual_step(features: Tensor, tokens: Tensor) -> None:
        optimizer.zero_grad()
        usual.loss(features, tokens).backward()
        nn.utils.clip_grad_norm_(usual.parameters(), 1.0)
        optimizer.step()

    def with_cnn() -> None:
        with torch.no_grad():
            repeated = encoder(pixels[owner])  # once per caption
        usual_step(repeated, padded_tokens)

    def with_cache() -> None:
        usual_step(inputs[owner], tokens)

    def ours() -> None:
        train_epoch(trainer, [[one]])

    return with_cnn, with_cache, ours, len(tokens)


def training_rows(machine: Machine) -> list[dict[str, Any]]:
    """Return captions per second of training, compared with and without cached features."""
    with_cnn, with_cache, ours, count = build_steps(machine)
    few = Machine(machine.device, max(1, machine.repeats // 2))
    slow, fast = few.time(with_cnn, ours)
    cached, again = machine.time(with_cache, ours)
    return [
        rate_row("training step, frozen ResNet-50", "captions/s", count / slow, count / fast, 15),
        rate_row("training step, cached features", "captions/s", count / cached, count / again, 2),
    ]


# ---- decoding --------------------------------------------------------------------------------


def to_lists(tokens: Tensor) -> list[list[int]]:
    """Return the tokens of captions (B, T) as lists that end with the end token."""
    rows = tokens.tolist()
    return [line[: line.index(END) + 1] for line in rows]


def check_captions(what: str, ours: list, usual: list, machine: Machine) -> None:
    """Raise RuntimeError if the captions of the two sides differ.

    On a GPU two of a hundred may: its libraries sum up in another order for each shape, and words
    that are nearly equally probable change places.
    """
    same = sum(one == two for one, two in zip(ours, usual, strict=True))
    least = 1.0 if machine.device.type == "cpu" else 0.98
    check_equal(what, same >= least * len(ours))


def beam_row(machine: Machine, kind: str, target: float) -> dict[str, Any]:
    """Return images per second of beam search; the usual way is timed on a twentieth of them."""
    count, few = 1000, 50
    config = DecoderConfig() if kind == "transformer" else attention_config()
    decoder = trained_decoder(config, device=machine.device)
    inputs = features(count).to(machine.device)
    search = {"beam_size": 5, "max_words": config.seq_len, "penalty": PENALTY}
    model = (
        usual_way.UsualTransformer(decoder).to(machine.device).eval()
        if kind == "transformer"
        else decoder
    )
    found: dict[str, list] = {}

    @torch.inference_mode()
    def usual() -> None:
        one = usual_way.transformer_beam if kind == "transformer" else usual_way.attention_beam
        found["usual"] = [one(model, each.float(), **search) for each in inputs[:few]]

    @torch.inference_mode()
    def ours() -> None:
        found["ours"] = []
        for part in inputs.split(64):
            memory = decoder.encode(part.float())
            decoded = beam_search(decoder, memory, **BEAM, length_penalty=PENALTY)
            found["ours"] += to_lists(decoded.tokens[:, 0])

    slow, fast = machine.time(usual, ours)
    check_captions(
        f"captions of beam search, {kind},", found["ours"][:few], found["usual"], machine
    )
    return rate_row(f"beam 5, {kind}", "images/s", few / slow, count / fast, target)


def attention_config() -> DecoderConfig:
    """Return the sizes of the preset show-attend-tell."""
    return train.configure(["--preset", "show-attend-tell"]).decoder


def greedy_row(machine: Machine) -> dict[str, Any]:
    """Return images per second of greedy decoding, in batches on both sides."""
    count = 1000
    decoder = trained_decoder(DecoderConfig(), device=machine.device)
    usual_model = usual_way.UsualTransformer(decoder).to(machine.device).eval()
    parts = features(count).to(machine.device).split(64)
    found: dict[str, list] = {}

    @torch.inference_mode()
    def usual() -> None:
        lines = [usual_way.greedy(usual_model, part.float(), BEAM["max_words"]) for part in parts]
        found["usual"] = [line for part in lines for line in to_lists(part)]

    @torch.inference_mode()
    def ours() -> None:
        found["ours"] = []
        for part in parts:
            decoded = greedy(decoder, decoder.encode(part.float()), max_words=BEAM["max_words"])
            found["ours"] += to_lists(decoded.tokens[:, 0])

    slow, fast = machine.time(usual, ours)
    check_captions("greedy captions", found["ours"], found["usual"], machine)
    return rate_row("greedy, transformer", "images/s", count / slow, count / fast, 5)


# ---- images ----------------------------------------------------------------------------------


def extraction_row(machine: Machine, folder: Path) -> dict[str, Any]:
    """Return images per second from files to features, with a random ResNet-50."""
    paths = write_jpegs(folder / "images", 96)
    records = [Record(path.name, path, ()) for path in paths]
    torch.manual_seed(0)
    encoder = Encoder("resnet50").eval()
    trunk = Encoder("resnet50").cnn
    trunk.load_state_dict(encoder.cnn.state_dict())
    trunk.to(machine.device).eval()
    found: dict[str, Tensor] = {}
    fast = multiplies_bfloat16(machine.device)

    def usual() -> None:
        found["usual"] = usual_way.extract(trunk, paths)

    def ours() -> None:
        parts = encode_images(records, encoder, 224, machine.device, 32, 2, fast)
        found["ours"] = torch.cat([part.features[:, 0].cpu() for part in parts]).float()

    slow, quick = machine.time(usual, ours)
    cosine = nn.functional.cosine_similarity(found["usual"], found["ours"], dim=-1)
    check_equal("features", float(cosine.min()) > 0.99)
    return rate_row(
        "ResNet-50 features from files", "images/s", len(paths) / slow, len(paths) / quick, 1.5
    )


def save_model(machine: Machine, folder: Path) -> Path:
    """Write a model whose captions have the usual length; return its path."""
    torch.manual_seed(0)
    model = CaptionModel(Encoder("resnet50"), DecoderConfig(), vocabulary(), 224)
    decoder = trained_decoder(DecoderConfig(), device=machine.device)
    model.decoder.load_state_dict(decoder.state_dict())
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors"


def latency_rows(machine: Machine, folder: Path) -> list[dict[str, Any]]:
    """Return the time of one caption as a multiple of the encoder's forward pass alone."""
    (path,) = write_jpegs(folder / "one", 1)
    captioner = Captioner.load(save_model(machine, folder), machine.device)
    pixels = captioner.transforms[0](read_image(path))[None].to(machine.device)
    encoder = captioner.model.encoder

    @torch.inference_mode()
    def forward() -> None:
        encoder(pixels)

    def one(method: str) -> Callable[[], str]:
        return lambda: captioner.caption(path, method=method)

    print(f"  a caption of {len(one('beam')().split())} words", file=sys.stderr)
    many = Machine(machine.device, 8 * machine.repeats)
    alone, quick, best = many.time(forward, one("greedy"), one("beam"))
    return [
        time_row("one caption, greedy, against the CNN alone", alone, quick, 1.25),
        time_row("one caption, beam 5, against the CNN alone", alone, best, 1.6),
    ]


def start_row(machine: Machine, folder: Path) -> dict[str, Any]:
    """Return the time of `python inference.py IMAGE` compared with importing torch alone."""
    (path,) = write_jpegs(folder / "one", 1)
    model = save_model(machine, folder)

    def run(*arguments: str) -> Callable[[], Any]:
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT
        )

    base, ours = machine.time(
        run("-c", "import torch, torchvision"),
        run("inference.py", str(path), "--checkpoint", str(model)),
    )
    return time_row("cold start, against importing torch and torchvision", base, ours, 1.6)


# ---- scores ----------------------------------------------------------------------------------


def make_captions(images: int) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and one candidate per image, in the form of pycocoevalcap."""
    references = dict(enumerate(captions(images)))
    candidates = {number: lines[:1] for number, lines in enumerate(captions(images, seed=1))}
    return references, candidates


def reference_scorers() -> tuple[Any, ...]:
    """Return Bleu, Rouge, Cider and CiderScorer; UserError if pycocoevalcap is not installed."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError(
            f"the reference scorer is not installed ({error}); pip install -r requirements-dev.txt"
        ) from error
    return Bleu, Rouge, Cider, CiderScorer


def scoring_row(machine: Machine) -> dict[str, Any]:
    """Return images per second of BLEU, ROUGE-L and CIDEr-D: 1,000 captions, 5 references each."""
    bleu, rouge, cider, _ = reference_scorers()
    references, candidates = make_captions(1000)
    reference_words = [[line.split() for line in lines] for lines in references.values()]
    candidate_words = [line.split() for (line,) in candidates.values()]
    found: dict[str, list[float]] = {}

    def usual() -> None:
        bleus = bleu(4).compute_score(references, candidates, verbose=0)[0]
        others = (side.compute_score(references, candidates)[0] for side in (rouge(), cider()))
        found["usual"] = [*bleus, *map(float, others)]

    def ours() -> None:
        words = reference_words, candidate_words
        found["ours"] = [*metrics.bleu(*words), metrics.rouge_l(*words), metrics.cider_d(*words)]

    slow, fast = machine.time(usual, ours)
    pairs = zip(found["usual"], found["ours"], strict=True)
    check_equal("scores", all(abs(one - two) < 1e-6 for one, two in pairs))
    return rate_row("BLEU, ROUGE-L, CIDEr-D of 1,000 x 5", "images/s", 1000 / slow, 1000 / fast, 3)


class Documents(list):
    """References of some captions, with the length of all documents, which the scorer reads."""

    def __len__(self) -> int:
        return DOCUMENTS


def reward_row(machine: Machine) -> dict[str, Any]:
    """Return captions per second whose CIDEr-D is computed; document frequencies are given."""
    *_, scorer_class = reference_scorers()
    documents = [[line.split() for line in lines] for lines in captions(DOCUMENTS)]
    references, _ = make_captions(64)
    owner = [number for number in range(64) for _ in range(5)]
    sampled = [line for lines in captions(64, seed=2) for line in lines]
    corpus = scorer_class(n=4, sigma=6.0)
    for lines in documents:
        corpus += (None, [" ".join(line) for line in lines])
    corpus.compute_doc_freq()
    prepared = metrics.CiderD(documents)  # `references` are the first 64 of them
    found: dict[str, Any] = {}

    def usual() -> None:
        scorer = scorer_class(n=4, sigma=6.0)
        for image, line in zip(owner, sampled, strict=True):
            scorer += (line, references[image])
        scorer.document_frequency = corpus.document_frequency
        scorer.crefs = Documents(scorer.crefs)
        found["usual"] = scorer.compute_cider()

    def ours() -> None:
        found["ours"] = prepared.scores([line.split() for line in sampled], owner)

    slow, fast = machine.time(usual, ours)
    pairs = zip(found["usual"], found["ours"], strict=True)
    check_equal("rewards", all(abs(float(one) - float(two)) < 1e-6 for one, two in pairs))
    return rate_row("CIDEr-D reward of 320 samples", "captions/s", 320 / slow, 320 / fast, 10)
