"""What is compared: training, decoding, pictures, scores; each ours beside the usual way.

B images · S image positions · C backbone channels · M captions in a batch · K beams

Where both sides make the same thing, it is checked that they do.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import usual_way
from machine import Machine, agree, multiple, row
from synthetic import batch, captions, features, photographs, trained_decoder, vocabulary
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
from util.images import read_image
from vocabulary import END

ROOT = Path(__file__).resolve().parent.parent
BEAM = {"beam_size": 5, "max_words": 30}
PENALTY = 0.7
DOCUMENTS = 6000  # images whose captions tell how rare an n-gram is


# --- training


def steppers(machine: Machine) -> tuple[Callable, Callable, Callable, int]:
    """Return a step the usual way with the CNN, one with cached features, ours, and captions each.

    Before that, the three losses are compared, without dropout and in full precision.
    """
    config = train.configure(["--cnn-weights", "none"])
    words, size, device = vocabulary(), 32, machine.device
    torch.manual_seed(0)
    encoder = Encoder("resnet50").to(device, memory_format=torch.channels_last).eval()
    model = CaptionModel(encoder, config.decoder, words, 224).to(device)
    pixels = torch.rand(size, 3, 224, 224, device=device)
    one = batch(size, words=words)
    tokens, owner = one.tokens.to(device), one.owner.to(device)
    with torch.no_grad():
        seen = encoder(pixels)
    usual = usual_way.UsualTransformer(model.decoder, config.decoder.dropout).to(device)
    long = usual_way.padded(tokens, usual_way.PADDED_TO)

    with torch.no_grad():
        loss = cross_entropy(model.eval()(seen, tokens, owner).logits, tokens)
        for padded, given in ((tokens, seen[owner]), (long, encoder(pixels[owner]))):
            gap = abs(float(loss.nll / loss.words) - float(usual.eval().loss(given, padded)))
            agree("the loss of a training batch", gap < 1e-4)

    usual.train()
    optimizer = torch.optim.AdamW(usual.parameters(), lr=1e-4)
    trainer = Trainer(model, TrainConfig(), steps_per_epoch=100)

    def learn(given: Tensor, captions: Tensor) -> None:
        optimizer.zero_grad()
        usual.loss(given, captions).backward()
        nn.utils.clip_grad_norm_(usual.parameters(), 1.0)
        optimizer.step()

    def with_cnn() -> None:
        with torch.no_grad():
            given = encoder(pixels[owner])  # once for every caption
        learn(given, long)

    def with_cache() -> None:
        learn(seen[owner], tokens)

    def ours() -> None:
        train_epoch(trainer, [[one]])

    return with_cnn, with_cache, ours, len(tokens)


def training_rows(machine: Machine) -> list[dict[str, Any]]:
    """Return captions a second in training, against the CNN each time and against a cache."""
    with_cnn, with_cache, ours, count = steppers(machine)
    few = Machine(machine.device, max(1, machine.repeats // 2))
    slow, fast = few.seconds(with_cnn, ours)
    cached, again = machine.seconds(with_cache, ours)
    return [
        row("training step, frozen ResNet-50", "captions/s", count / slow, count / fast, 15),
        row("training step, cached features", "captions/s", count / cached, count / again, 2),
    ]


# --- decoding


def said(tokens: Tensor) -> list[list[int]]:
    """Return the words of captions (B, T), each with its end."""
    rows = tokens.tolist()
    return [line[: line.index(END) + 1] for line in rows]


def beam_row(machine: Machine, kind: str, target: float) -> dict[str, Any]:
    """Return images a second of beam search; the usual way is timed on a twentieth of them."""
    count, few = 1000, 50
    config = DecoderConfig() if kind == "transformer" else attention_config()
    decoder = trained_decoder(config).to(machine.device)
    seen = features(count).to(machine.device)
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
        found["usual"] = [one(model, each.float(), **search) for each in seen[:few]]

    @torch.inference_mode()
    def ours() -> None:
        found["ours"] = []
        for part in seen.split(64):
            memory = decoder.encode(part.float())
            decoded = beam_search(decoder, memory, **BEAM, length_penalty=PENALTY)
            found["ours"] += said(decoded.tokens[:, 0])

    slow, fast = machine.seconds(usual, ours)
    agree(f"captions by beam search, {kind}", found["ours"][:few] == found["usual"])
    return row(f"beam 5, {kind}", "images/s", few / slow, count / fast, target)


def attention_config() -> DecoderConfig:
    """Return the sizes of the preset show-attend-tell."""
    return train.configure(["--preset", "show-attend-tell"]).decoder


def greedy_row(machine: Machine) -> dict[str, Any]:
    """Return images a second of the greedy method, in batches on both sides."""
    count = 1000
    decoder = trained_decoder(DecoderConfig()).to(machine.device)
    usual_model = usual_way.UsualTransformer(decoder).to(machine.device).eval()
    parts = features(count).to(machine.device).split(64)
    found: dict[str, list] = {}

    @torch.inference_mode()
    def usual() -> None:
        lines = [usual_way.greedy(usual_model, part.float(), BEAM["max_words"]) for part in parts]
        found["usual"] = [line for part in lines for line in said(part)]

    @torch.inference_mode()
    def ours() -> None:
        found["ours"] = []
        for part in parts:
            decoded = greedy(decoder, decoder.encode(part.float()), max_words=BEAM["max_words"])
            found["ours"] += said(decoded.tokens[:, 0])

    slow, fast = machine.seconds(usual, ours)
    agree("greedy captions", found["ours"] == found["usual"])
    return row("greedy, transformer", "images/s", count / slow, count / fast, 5)


# --- pictures


def extraction_row(machine: Machine, folder: Path) -> dict[str, Any]:
    """Return images a second from files to features, by a ResNet-50 with random weights."""
    paths = photographs(folder / "photographs", 96)
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

    slow, quick = machine.seconds(usual, ours)
    likeness = nn.functional.cosine_similarity(found["usual"], found["ours"], dim=-1)
    agree("features", float(likeness.min()) > 0.99)
    return row(
        "ResNet-50 features from files", "images/s", len(paths) / slow, len(paths) / quick, 1.5
    )


def saved_model(folder: Path) -> Path:
    """Write a ResNet-50 with a transformer that writes captions of the usual length."""
    torch.manual_seed(0)
    model = CaptionModel(Encoder("resnet50"), DecoderConfig(), vocabulary(), 224)
    model.decoder.load_state_dict(trained_decoder(DecoderConfig()).state_dict())
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors"


def latency_rows(machine: Machine, folder: Path) -> list[dict[str, Any]]:
    """Return the time of one caption as a multiple of the encoder's forward alone."""
    (photo,) = photographs(folder / "one", 1)
    captioner = Captioner.load(saved_model(folder), machine.device)
    pixels = captioner.transforms[0](read_image(photo))[None].to(machine.device)
    encoder = captioner.model.encoder

    @torch.inference_mode()
    def forward() -> None:
        encoder(pixels)

    def one(method: str) -> Callable[[], str]:
        return lambda: captioner.caption(photo, method=method)

    print(f"  a caption of {len(one('beam')().split())} words", file=sys.stderr)
    many = Machine(machine.device, 8 * machine.repeats)
    alone, quick, best = many.seconds(forward, one("greedy"), one("beam"))
    return [
        multiple("one caption, greedy, against the CNN alone", alone, quick, 1.25),
        multiple("one caption, beam 5, against the CNN alone", alone, best, 1.6),
    ]


def start_row(machine: Machine, folder: Path) -> dict[str, Any]:
    """Return the time of `python inference.py PHOTO` against importing torch and torchvision."""
    (photo,) = photographs(folder / "one", 1)
    model = saved_model(folder)

    def run(*arguments: str) -> Callable[[], Any]:
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT
        )

    base, ours = machine.seconds(
        run("-c", "import torch, torchvision"),
        run("inference.py", str(photo), "--checkpoint", str(model)),
    )
    return multiple("cold start, against importing torch and torchvision", base, ours, 1.6)


# --- scores


def tokenised(images: int) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and one candidate an image, as pycocoevalcap takes them."""
    references = dict(enumerate(captions(images)))
    candidates = {number: lines[:1] for number, lines in enumerate(captions(images, seed=1))}
    return references, candidates


def reference_scorers() -> tuple[Any, ...]:
    """Return pycocoevalcap's Bleu, Rouge, Cider and CiderScorer; ValueError where it is absent."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ValueError(
            f"the reference scorer is not there ({error}); pip install -r requirements-dev.txt"
        ) from error
    return Bleu, Rouge, Cider, CiderScorer


def scoring_row(machine: Machine) -> dict[str, Any]:
    """Return images a second of BLEU, ROUGE-L and CIDEr-D of 1,000 captions, 5 references each."""
    bleu, rouge, cider, _ = reference_scorers()
    references, candidates = tokenised(1000)
    split = [[line.split() for line in lines] for lines in references.values()]
    given = [line.split() for (line,) in candidates.values()]
    found: dict[str, list[float]] = {}

    def usual() -> None:
        bleus = bleu(4).compute_score(references, candidates, verbose=0)[0]
        others = (side.compute_score(references, candidates)[0] for side in (rouge(), cider()))
        found["usual"] = [*bleus, *map(float, others)]

    def ours() -> None:
        others = (metrics.rouge_l(split, given), metrics.cider_d(split, given))
        found["ours"] = [*metrics.bleu(split, given), *others]

    slow, fast = machine.seconds(usual, ours)
    pairs = zip(found["usual"], found["ours"], strict=True)
    agree("scores", all(abs(one - two) < 1e-6 for one, two in pairs))
    return row("BLEU, ROUGE-L, CIDEr-D of 1,000 x 5", "images/s", 1000 / slow, 1000 / fast, 3)


class Documents(list):
    """References of some captions; the scorer takes their number for that of all documents."""

    def __len__(self) -> int:
        return DOCUMENTS


def reward_row(machine: Machine) -> dict[str, Any]:
    """Return sampled captions a second that are given their CIDEr-D, rarity counted before."""
    *_, scorer_class = reference_scorers()
    documents = [[line.split() for line in lines] for lines in captions(DOCUMENTS)]
    references, _ = tokenised(64)
    owner = [number for number in range(64) for _ in range(5)]
    drawn = [line for lines in captions(64, seed=2) for line in lines]
    corpus = scorer_class(n=4, sigma=6.0)
    for lines in documents:
        corpus += (None, [" ".join(line) for line in lines])
    corpus.compute_doc_freq()
    prepared = metrics.CiderD(documents)  # of which `references` are the first 64
    found: dict[str, Any] = {}

    def usual() -> None:
        scorer = scorer_class(n=4, sigma=6.0)
        for image, line in zip(owner, drawn, strict=True):
            scorer += (line, references[image])
        scorer.document_frequency = corpus.document_frequency
        scorer.crefs = Documents(scorer.crefs)
        found["usual"] = scorer.compute_cider()

    def ours() -> None:
        found["ours"] = prepared.scores([line.split() for line in drawn], owner)

    slow, fast = machine.seconds(usual, ours)
    pairs = zip(found["usual"], found["ours"], strict=True)
    agree("rewards", all(abs(float(one) - float(two)) < 1e-6 for one, two in pairs))
    return row("CIDEr-D reward of 320 samples", "captions/s", 320 / slow, 320 / fast, 10)
