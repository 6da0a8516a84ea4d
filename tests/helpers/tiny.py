"""A tiny model, pictures and datasets for it, and scripts run as their command line runs them."""

import csv
import io
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import decoding
from config import TrainConfig
from dataset import Batch
from decoder import DecoderConfig
from encoder import Encoder
from model import CaptionModel
from trainer import Trainer
from util import files, program
from vocabulary import Vocabulary

METHODS = tuple(decoding.METHODS)
WORDS = ["a", "red", "blue", "circle", "square", "café", "dog", "on"]
SCRIPTS = (
    "download_data", "features", "train", "evaluate", "compare", "inference", "export", "app",
)  # fmt: skip


def tiny_model(
    seed: int = 13, decoder: str = "transformer", words=WORDS, img_size: int = 64
) -> CaptionModel:
    """An untrained model with weights so large that its captions differ from picture to picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = DecoderConfig(decoder, d_model=16, n_head=2, n_decode=1, fc_dim=32, seq_len=8)
        model = CaptionModel(Encoder("tiny", "all"), sizes, Vocabulary(words), img_size)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.mul_(3 if name.startswith("encoder") else 8)
    return model


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth picture of its own colours, with no symmetry."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BILINEAR)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def run_script(script, *argv, capsys):
    """Return exit code, stdout and stderr of a script's `main` as its command line runs it."""
    code = 0
    try:
        program.run(lambda: script.main([str(word) for word in argv]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def as_flickr8k(drawn: Path, folder: Path, lists: tuple[str, ...]) -> Path:
    """Lay the drawn pictures out as official Flickr8k, with only some of its split lists."""
    (folder / "Flickr8k_text").mkdir(parents=True)
    (folder / "Flicker8k_Dataset").symlink_to(drawn / "images")
    images = files.read_json(drawn / "captions.json")["images"]
    lines = [
        f"{image['filename']}#{number}\t{sentence['raw']} ."
        for image in images
        for number, sentence in enumerate(image["sentences"])
    ]
    (folder / "Flickr8k_text/Flickr8k.token.txt").write_text("\n".join(lines))
    for name in lists:
        split = {"dev": "val"}.get(name, name)
        names = [image["filename"] for image in images if image["split"] == split]
        (folder / f"Flickr8k_text/Flickr_8k.{name}Images.txt").write_text("\n".join(names))
    return folder


# --- runs of train.py


def tiny_trainer(decoder="transformer", device="cpu", **changes) -> Trainer:
    sizes = DecoderConfig(
        decoder, d_model=8, n_head=2, n_decode=1, fc_dim=8, dropout=0.0, seq_len=4
    )
    torch.manual_seed(0)
    model = CaptionModel(Encoder("tiny", "all"), sizes, Vocabulary(["a", "b"]), 64)
    return Trainer(model.to(device), TrainConfig(**changes), steps_per_epoch=100)


BATCH = Batch(
    ["one", "two"],
    torch.rand(2, 3, 64, 64),
    torch.tensor([[1, 4, 5, 2], [1, 5, 2, 0]]),
    torch.arange(2),
)


def take_step(trainer, *batches) -> None:
    """Train one step on these micro-batches."""
    import train

    with trainer.training_mode():
        train.train_epoch(trainer, [batches])


ROOT = Path(__file__).parents[2]
SMALL = ["--dataset", "shapes", "--batch-size", "4", "--epochs", "2", "--d-model", "16",
         "--n-head", "2", "--n-decode", "1", "--fc-dim", "32", "--seed", "3"]  # fmt: skip

COLOURS = ["--dataset", "csv", "--cnn-backbone", "tiny", "--cnn-weights", "none", "--img-size",
           "32", "--d-model", "16", "--n-head", "2", "--n-decode", "1", "--fc-dim", "32",
           "--min-count", "1", "--batch-size", "4", "--workers", "0", "--lr", "0.003"]  # fmt: skip


def run_code(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python `code` with `arguments` in the project's folder."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


# torchrun ends a job's processes once it sees that one has died. On a busy machine that may be
# before the others have met the broken connection, which they would tell of.
SLOW_TO_LOOK = ("--monitor-interval", "3")


def torchrun(
    code: str, *arguments: str, processes: int = 2, flags=()
) -> subprocess.CompletedProcess:
    """Run Python `code` with `arguments` in processes that torchrun starts."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags]
    try:
        return subprocess.run(
            [*command, "--nproc-per-node", str(processes), "--", file.name, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        os.unlink(file.name)


def assert_same_run(first: Path, second: Path) -> None:
    """The weights, the average, the optimiser and the model file agree bit for bit."""
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (first, second))
    for part in ("weights", "average"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in ours[part].items():
            assert torch.equal(tensor, theirs[part][name]), (part, name)
    for index, state in ours["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, theirs["optimizer"]["state"][index][name])
    ours, theirs = (load_file(folder / "best.safetensors") for folder in (first, second))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def losses(folder: Path) -> list[tuple[str, str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [(row["train_loss"], row["val_loss"], row["CIDEr"]) for row in csv.DictReader(file)]
