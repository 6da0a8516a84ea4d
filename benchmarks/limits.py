"""Compare a benchmark with the machine's limit: `python benchmarks/limits.py --bench bench.json`.

For each row that is mostly matrix products: the multiply-adds it needs, and how fast one plain
product of its main layer's size runs on this machine, by itself and in the same precision.

B images · S image positions · C backbone channels · D model width · V vocabulary · L layers
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from synthetic import CHANNELS, MEAN_LENGTH, PER_IMAGE, POSITIONS, WORDS  # noqa: E402

import train  # noqa: E402
from decoder import DecoderConfig  # noqa: E402
from encoder import multiplies_bfloat16  # noqa: E402
from util import files, program  # noqa: E402
from util.files import UserError  # noqa: E402

RESNET50 = 4.09e9  # multiply-adds per image of 224 x 224 (torchvision's number)
STEPS = MEAN_LENGTH + 1  # words of a caption, end token included
BACKWARD = 3  # forward and backward pass together cost three times the forward pass


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    bench: Path
    """The file that `bench.py --json` wrote on this machine."""


def transformer_image(config: DecoderConfig) -> float:
    """Return multiply-adds per image: its projection, and keys and values of each layer."""
    width = config.d_model
    return POSITIONS * width * (CHANNELS + config.n_decode * 2 * width)


def transformer_word(config: DecoderConfig) -> float:
    """Return multiply-adds per word: the layers' matrices and the output layer."""
    width = config.d_model
    layer = 6 * width * width + 2 * width * config.fc_dim
    return config.n_decode * layer + WORDS * width


def attention_image(config: DecoderConfig) -> float:
    """Return multiply-adds per image of the attention LSTM: its projection and its keys."""
    return POSITIONS * config.d_model * (CHANNELS + config.d_model)


def attention_word(config: DecoderConfig) -> float:
    """Return multiply-adds per word: attention over S positions, the LSTM, the output layers."""
    width, hidden = config.d_model, config.fc_dim
    attention = 2 * hidden * width + 2 * POSITIONS * width
    return attention + 4 * hidden * (2 * width + hidden) + 2 * width * width + WORDS * width


def time_product(rows: int, inside: int, columns: int, dtype: torch.dtype) -> float:
    """Return multiply-adds per second of one linear layer alone, the best of twenty runs."""
    x, weights = torch.randn(rows, inside, dtype=dtype), torch.randn(columns, inside, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        F.linear(x, weights)
        best = min(best, time.perf_counter() - start)
    return rows * inside * columns / best


def compute_limits() -> dict[str, tuple[float, float, str]]:
    """Return for each row: multiply-adds per unit, per second, and of which product."""
    fastest = torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32
    plain = train.configure([]).decoder
    attention = train.configure(["--preset", "show-attend-tell"]).decoder
    caption = transformer_image(plain) / PER_IMAGE + STEPS * transformer_word(plain)
    words = 32 * PER_IMAGE * 12

    def product(rows: int, inside: int, columns: int, dtype: torch.dtype) -> tuple[float, str]:
        name = f"{rows} × {inside} × {columns}, {str(dtype).removeprefix('torch.')}"
        return time_product(rows, inside, columns, dtype), name

    decoding: Callable = lambda rows, config: product(  # noqa: E731
        rows, config.d_model, config.fc_dim, torch.float32
    )
    return {
        "training step, cached features": (
            BACKWARD * caption,
            *product(words, plain.d_model, plain.fc_dim, fastest),
        ),
        "beam 5, transformer": (
            transformer_image(plain) + 5 * STEPS * transformer_word(plain),
            *decoding(320, plain),
        ),
        "beam 5, attention LSTM": (
            attention_image(attention) + 5 * STEPS * attention_word(attention),
            *decoding(320, attention),
        ),
        "greedy, transformer": (
            transformer_image(plain) + STEPS * transformer_word(plain),
            *decoding(64, plain),
        ),
        "ResNet-50 features from files": (RESNET50, *product(2048, 1024, 1024, fastest)),
    }


def main(argv: list[str] | None = None) -> None:
    """Print the limit of each row and the share of it that was reached."""
    config = program.parse(
        Config,
        argv,
        program="limits.py",
        description="Compare a benchmark with the machine's limit.",
    )
    try:
        measured = {row["name"]: row for row in files.read_json(config.bench)["rows"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{config.bench} is not a file of bench.py --json") from error
    print("| row | Mmult-adds per unit | plain product | G per second | limit | ours | share |")
    print("|" + "---|" * 7)
    for name, (needed, speed, product) in compute_limits().items():
        if name in measured:
            ours, limit = measured[name]["ours"], speed / needed
            print(
                f"| {name} | {needed / 1e6:,.0f} | {product} | {speed / 1e9:,.0f} | "
                f"{limit:,.0f} {measured[name]['unit']} | {ours:,.0f} | {ours / limit:.0%} |"
            )


if __name__ == "__main__":
    program.run(main)
