"""Draw docs/how_it_works.png: how a trained model captions one image, word by word.

    python train.py --dataset shapes --img-size 112 --output runs/shapes-112
    python docs/how_it_works.py runs/shapes-112 docs/how_it_works.png --number 51

B images · S image positions · C backbone channels · T words · V vocabulary
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402
from PIL import Image  # noqa: E402

from decoding import DecodingConfig, decode  # noqa: E402
from encoder import image_transform  # noqa: E402
from model import CaptionModel  # noqa: E402
from util import files, plots, program, shapes  # noqa: E402
from util.files import UserError  # noqa: E402
from util.images import read_image  # noqa: E402
from vocabulary import END, START  # noqa: E402

INK, GREY, LINE, PAPER, BAR = "#1b1f24", "#5b6470", "#9aa3ad", "#ffffff", "#0072B2"
ORANGE = (235, 95, 0)  # of attention maps
WIDTH, HEIGHT, DPI = 16.0, 7.5, 100  # inches, and dots per inch
MAX_WORDS = 12  # that fit side by side
SIDE = 384  # pixels per side of the image in the figure
MIN_PROBABILITY = 0.01  # of an alternative that is shown


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    checkpoint: tyro.conf.Positional[Path]
    """A model file, or the folder of a run; its decoder must have attention."""
    output: tyro.conf.Positional[Path]
    """The figure to write (.png)."""
    photo: Path | None = None
    """Caption this image (default: a drawing of the shapes' test split)."""
    number: int = 0
    """Index of the drawing in the test split."""


class Trace(NamedTuple):
    """The results of the model's stages for one image.

    `features` (S, C); the T `words`, with "end"; their `attention` maps (T, side, side); and for
    each word the five most `probable` ones, with their probabilities.
    """

    features: np.ndarray
    words: list[str]
    attention: np.ndarray
    probable: list[list[tuple[str, float]]]


@torch.inference_mode()
def trace(model: CaptionModel, image: Image.Image) -> Trace:
    """Caption an image and return the results of each stage."""
    pixels = image_transform(model.img_size, train=False)(image)[None]
    features = model.encoder(pixels)
    memory = model.encode(features)
    longest = model.config.seq_len
    tokens = decode(model.decoder, memory, DecodingConfig(), longest=longest).tokens  # (1, 1, T)
    attention = model.attention_maps(memory, tokens)
    if attention is None:
        raise UserError("this model has no attention maps; use a decoder with attention")
    caption = torch.nn.functional.pad(tokens[0], (1, 0), value=START)
    probs = model.decoder(memory, caption, torch.tensor([0])).logits[0].softmax(-1)  # (T, V)
    names = [*model.vocabulary.words]
    names[END] = "end"
    best = probs.topk(5)
    probable = [
        [(names[word], prob) for word, prob in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    words = [*model.vocabulary.decode(tokens[0, 0]).split(), "end"]
    return Trace(features[0].numpy(), words, attention[0, 0].numpy(), probable)


def to_colours(features: np.ndarray) -> np.ndarray:
    """Return features (S, C) as colours (side, side, 3): their first three principal components."""
    centred = features - features.mean(0)
    main = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = np.percentile(main, (2, 98), axis=0)
    side = math.isqrt(len(features))
    return np.clip((main - low) / np.maximum(high - low, 1e-9), 0, 1).reshape(side, side, 3)


class Page:
    """A figure with coordinates in inches from its top left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=PAPER)
        self.sheet = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.sheet.set_axis_off()

    def image(self, x: float, y: float, size: float, image: Any, **style: Any) -> None:
        """Draw an image in a square."""
        extent = (x, x + size, y + size, y)
        shown = self.sheet.imshow(image, extent=extent, aspect="auto", zorder=2, **style)
        shown.set_clip_path(self.frame(x, y, size, size))

    def frame(self, x: float, y: float, width: float, height: float, **style: Any) -> Any:
        """Draw and return a rectangle, by default only its outline."""
        style = {"facecolor": "none", "edgecolor": LINE, "linewidth": 1, "zorder": 3} | style
        shape = {"boxstyle": "round,pad=0,rounding_size=0.06"}
        return self.sheet.add_patch(FancyBboxPatch((x, y), width, height, **shape, **style))

    def text(self, x: float, y: float, words: str, size: float = 13, **style: Any) -> None:
        """Draw text, by default centred at (x, y)."""
        style = {"color": INK, "ha": "center", "va": "center", "zorder": 4} | style
        self.sheet.text(x, y, words, fontsize=1.2 * size, **style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw an arrow."""
        style = {"arrowstyle": "-|>", "color": GREY, "lw": 2, "mutation_scale": 18}
        self.sheet.annotate("", end, start, arrowprops=style, zorder=3)

    def grid(self, x: float, y: float, size: float, side: int) -> None:
        """Draw the borders of side x side positions over a square."""
        for step in range(1, side):
            at = size * step / side
            style = {"color": PAPER, "lw": 1, "alpha": 0.9, "zorder": 2.5}
            self.sheet.plot([x + at, x + at], [y, y + size], **style)
            self.sheet.plot([x, x + size], [y + at, y + at], **style)


def draw(result: Trace, image: Image.Image, model: CaptionModel) -> Figure:
    """Return the figure: the model's stages in the first row, the caption word by word below."""
    page, top, size = Page(), 0.95, 2.6
    side, channels = result.attention.shape[1], result.features.shape[1]
    middle = top + size / 2

    draw_heading(page, 0.4, "1  the image", f"{model.img_size} × {model.img_size} pixels")
    page.image(0.4, top, size, image)

    page.arrow((3.15, middle), (4.2, middle))
    page.text(3.62, middle - 0.28, "CNN")
    page.text(3.62, middle + 0.28, "encoder.py", 10, color=GREY)

    below = f"of {channels:,} channels each"
    draw_heading(page, 4.35, f"2  {side} × {side} positions", below)
    page.image(4.35, top, size, to_colours(result.features), interpolation="nearest")
    page.grid(4.35, top, size, side)

    page.arrow((7.1, middle), (7.75, middle))
    draw_layers(page, 7.9, top, size, model.config.n_decode)
    page.arrow((11.55, middle), (12.2, middle))

    shown = find_least_certain(result)
    prefix = " ".join(result.words[:shown][-4:])
    draw_heading(page, 12.35, "4  the next word", f"after “{'… ' * (shown > 4)}{prefix}”")
    draw_bars(page, 12.35, top, size, result.probable[shown])

    draw_words(page, result, image, top + size + 0.75)
    return page.figure


def draw_heading(page: Page, x: float, title: str, below: str) -> None:
    """Draw the title of a stage, and a line below it."""
    page.text(x, 0.36, title, 15, ha="left", weight="bold")
    page.text(x, 0.68, below, 12, ha="left", color=GREY)


def draw_layers(page: Page, x: float, top: float, size: float, layers: int) -> None:
    """Draw the parts of a decoder layer."""
    draw_heading(page, x, "3  the decoder", f"decoder.py, {layers} layers of these")
    steps = (
        ("self-attention", "to the words so far (cached)", "#e8f1fa"),
        ("attention to the image", "weights over the positions", "#fdf0dc"),
        ("feed-forward", "two linear layers", "#e9f5ee"),
    )
    height = (size - 0.3) / 3
    for number, (title, below, colour) in enumerate(steps):
        y = top + number * (height + 0.15)
        page.frame(x, y, 3.5, height, facecolor=colour, zorder=1)
        page.text(x + 1.75, y + height / 2 - 0.14, title, 13, weight="bold")
        page.text(x + 1.75, y + height / 2 + 0.16, below, 11, color=GREY)


def find_least_certain(result: Trace) -> int:
    """Return the position at which the most probable word has the lowest probability."""
    return min(range(1, len(result.words)), key=lambda position: result.probable[position][0][1])


def draw_bars(
    page: Page, x: float, top: float, size: float, probable: list[tuple[str, float]]
) -> None:
    """Draw the most probable words as bars."""
    step = size / len(probable)
    for number, (word, prob) in enumerate(probable):
        y = top + step * (number + 0.5)
        page.text(x + 0.95, y, word, 13, ha="right", weight="bold" if not number else "normal")
        width = max(0.02, 1.5 * prob)
        colour = BAR if not number else LINE
        page.frame(x + 1.1, y - 0.14, width, 0.28, facecolor=colour, linewidth=0, zorder=2)
        page.text(x + 1.2 + width, y, f"{prob:.0%}", 12, ha="left", color=GREY)


def draw_words(page: Page, result: Trace, image: Image.Image, top: float) -> None:
    """Draw for each word its attention map over the image, the word and its alternatives."""
    count = min(len(result.words), MAX_WORDS)
    pitch = (WIDTH - 0.8) / count
    size = min(pitch - 0.12, 1.9)
    page.text(0.4, top, "5  one word after another", 15, ha="left", weight="bold")
    page.text(4.3, top + 0.01, "orange: the attention map of each word; grey: its alternatives",
              12, ha="left", color=GREY)  # fmt: skip
    highest = result.attention[:count].max()
    for position, (chosen, probable) in enumerate(zip(result.words, result.probable, strict=True)):
        if position == count:
            break
        x, y = 0.4 + position * pitch, top + 0.4
        page.image(x, y, size, highlight(image, result.attention[position], highest))
        middle, below = x + size / 2, y + size
        font_size = min(16, 120 / max(len(chosen), 1))  # no wider than the image
        page.text(middle, below + 0.3, chosen, font_size, weight="bold")
        page.text(middle, below + 0.6, f"{dict(probable).get(chosen, 0):.0%}", 12, color=BAR)
        others = [(w, p) for w, p in probable if w != chosen and p >= MIN_PROBABILITY][:2]
        for row, (word, prob) in enumerate(others):
            page.text(middle, below + 0.88 + 0.24 * row, f"{word} {prob:.0%}", 10.5, color=GREY)


def highlight(image: Image.Image, attention: np.ndarray, highest: float) -> Image.Image:
    """Return the image, pale, and orange where `attention` (side, side) is largest.

    `highest` is the largest value of all words: a map without a clear maximum stays pale.
    """
    scale = max(attention.max(), highest / 2)
    mask = Image.fromarray((230 * attention / scale).astype(np.uint8))
    mask = mask.resize(image.size, plots.pick_filter(*attention.shape))
    pale = Image.blend(Image.new("RGB", image.size, PAPER), image, 0.5)
    return Image.composite(Image.new("RGB", image.size, ORANGE), pale, mask)


def main(argv: list[str] | None = None) -> None:
    """Draw how a model makes a caption."""
    config = program.parse(Config, argv, program="how_it_works.py", description="Draw a figure.")
    files.check_writable(config.output)
    model = CaptionModel.load(config.checkpoint).eval()
    if config.photo:
        image = shown = read_image(config.photo)
    else:
        _, image, _ = shapes.example(0, "test", config.number)
        _, shown, _ = shapes.example(0, "test", config.number, side=SIDE)
    figure = draw(trace(model, image), shown.resize((SIDE, SIDE)), model)
    with files.replacing(config.output) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    program.run(main)
