"""Draws docs/how_it_works.png: one picture's way through a trained model, word by word.

    python train.py --dataset shapes --img-size 112 --output runs/shapes-112
    python docs/how_it_works.py runs/shapes-112 docs/how_it_works.png --number 21

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
from util import files, shapes  # noqa: E402
from util.images import read_image  # noqa: E402
from vocabulary import END, START  # noqa: E402

INK, GREY, LINE, PAPER, BAR = "#1b1f24", "#5b6470", "#9aa3ad", "#ffffff", "#0072B2"
WARM = (235, 95, 0)  # where a word looked
WIDE, HIGH, DOTS = 16.0, 7.5, 100  # inches, and dots an inch
CROWD = 12  # words that fit side by side
SHARP = 384  # pixels a side of a drawing as it is shown
LEAST = 0.01  # probabilities below it are not worth a line


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    checkpoint: tyro.conf.Positional[Path]
    """A model file, or the folder of a run; its decoder must have attention."""
    output: tyro.conf.Positional[Path]
    """The picture to write (.png)."""
    photo: Path | None = None
    """Show this picture (default: a drawing of the shapes' test split)."""
    number: int = 0
    """Which drawing of the test split."""


class Way(NamedTuple):
    """What became of a picture: `features` (S, C), the `words` and the end, for each of them where
    it looked (T, side, side) and the most probable words then, (word, probability)."""

    features: np.ndarray
    words: list[str]
    looks: np.ndarray
    likely: list[list[tuple[str, float]]]


@torch.inference_mode()
def follow(model: CaptionModel, image: Image.Image) -> Way:
    """Return the way of a picture through the model."""
    pixels = image_transform(model.img_size, train=False)(image)[None]
    features = model.encoder(pixels)
    memory = model.encode(features)
    longest = model.config.seq_len
    # (1, 1, T), the end token is one
    tokens = decode(model.decoder, memory, DecodingConfig(), longest=longest).tokens
    looks = model.attention_maps(memory, tokens)
    if looks is None:
        raise ValueError("this model has no attention to show")
    read = torch.nn.functional.pad(tokens[0], (1, 0), value=START)
    chances = model.decoder(memory, read, torch.tensor([0])).logits[0].softmax(-1)  # (T, V)
    names = [*model.vocabulary.words]
    names[END] = "end"
    best = chances.topk(5)
    likely = [
        [(names[word], chance) for word, chance in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    words = [*model.vocabulary.decode(tokens[0, 0]).split(), "end"]
    return Way(features[0].numpy(), words, looks[0, 0].numpy(), likely)


def coloured(features: np.ndarray) -> np.ndarray:
    """Return features (S, C) as colours (side, side, 3): their three main directions."""
    centred = features - features.mean(0)
    main = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = np.percentile(main, (2, 98), axis=0)
    side = math.isqrt(len(features))
    return np.clip((main - low) / np.maximum(high - low, 1e-9), 0, 1).reshape(side, side, 3)


class Page:
    """A sheet measured in inches from its top left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDE, HIGH), dpi=DOTS, facecolor=PAPER)
        self.sheet = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDE), ylim=(HIGH, 0))
        self.sheet.set_axis_off()

    def picture(self, x: float, y: float, size: float, image: Any, **style: Any) -> None:
        """Show an image in a square."""
        extent = (x, x + size, y + size, y)
        shown = self.sheet.imshow(image, extent=extent, aspect="auto", zorder=2, **style)
        shown.set_clip_path(self.frame(x, y, size, size))

    def frame(self, x: float, y: float, width: float, height: float, **style: Any) -> Any:
        """Draw a rectangle's outline, or a box where `style` fills it; return it."""
        style = {"facecolor": "none", "edgecolor": LINE, "linewidth": 1, "zorder": 3} | style
        shape = {"boxstyle": "round,pad=0,rounding_size=0.06"}
        return self.sheet.add_patch(FancyBboxPatch((x, y), width, height, **shape, **style))

    def text(self, x: float, y: float, words: str, size: float = 13, **style: Any) -> None:
        """Write words, by default around their middle."""
        style = {"color": INK, "ha": "center", "va": "center", "zorder": 4} | style
        self.sheet.text(x, y, words, fontsize=1.2 * size, **style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw an arrow."""
        look = {"arrowstyle": "-|>", "color": GREY, "lw": 2, "mutation_scale": 18}
        self.sheet.annotate("", end, start, arrowprops=look, zorder=3)

    def grid(self, x: float, y: float, size: float, side: int) -> None:
        """Draw the borders of side x side positions over a square."""
        for step in range(1, side):
            at = size * step / side
            style = {"color": PAPER, "lw": 1, "alpha": 0.9, "zorder": 2.5}
            self.sheet.plot([x + at, x + at], [y, y + size], **style)
            self.sheet.plot([x, x + size], [y + at, y + at], **style)


def draw(way: Way, image: Image.Image, model: CaptionModel) -> Figure:
    """Return the whole picture: the four stations above, the caption word by word below."""
    page, top, size = Page(), 0.95, 2.6
    side, channels = way.looks.shape[1], way.features.shape[1]
    middle = top + size / 2

    heading(page, 0.4, "1  the picture", f"{model.img_size} × {model.img_size} pixels")
    page.picture(0.4, top, size, image)

    page.arrow((3.15, middle), (4.2, middle))
    page.text(3.62, middle - 0.28, "CNN")
    page.text(3.62, middle + 0.28, "encoder.py", 10, color=GREY)

    heading(page, 4.35, f"2  {side} × {side} positions", f"{channels:,} numbers each, made once")
    page.picture(4.35, top, size, coloured(way.features), interpolation="nearest")
    page.grid(4.35, top, size, side)

    page.arrow((7.1, middle), (7.75, middle))
    stack(page, 7.9, top, size, model.config.n_decode)
    page.arrow((11.55, middle), (12.2, middle))

    shown = turning_point(way)
    said = " ".join(way.words[:shown][-4:])
    heading(page, 12.35, "4  the next word", f"after “{'… ' * (shown > 4)}{said}”")
    bars(page, 12.35, top, size, way.likely[shown])

    word_by_word(page, way, image, top + size + 0.75)
    return page.figure


def heading(page: Page, x: float, title: str, below: str) -> None:
    """Write what a station is."""
    page.text(x, 0.36, title, 15, ha="left", weight="bold")
    page.text(x, 0.68, below, 12, ha="left", color=GREY)


def stack(page: Page, x: float, top: float, size: float, layers: int) -> None:
    """Draw the decoder: what happens to a word in each of its layers."""
    heading(page, x, "3  the decoder", f"decoder.py, {layers} layers in a row")
    steps = (
        ("looks at the words so far", "each was worked on once, and kept", "#e8f1fa"),
        ("looks at the picture", "at some positions more than others", "#fdf0dc"),
        ("thinks", "two linear layers", "#e9f5ee"),
    )
    height = (size - 0.3) / 3
    for number, (title, below, colour) in enumerate(steps):
        y = top + number * (height + 0.15)
        page.frame(x, y, 3.5, height, facecolor=colour, zorder=1)
        page.text(x + 1.75, y + height / 2 - 0.14, title, 13, weight="bold")
        page.text(x + 1.75, y + height / 2 + 0.16, below, 11, color=GREY)


def turning_point(way: Way) -> int:
    """Return the word that was chosen from the most: the one with the least probability."""
    return min(range(1, len(way.words)), key=lambda place: way.likely[place][0][1])


def bars(page: Page, x: float, top: float, size: float, likely: list[tuple[str, float]]) -> None:
    """Draw the most probable words as bars."""
    step = size / len(likely)
    for number, (word, chance) in enumerate(likely):
        y = top + step * (number + 0.5)
        page.text(x + 0.95, y, word, 13, ha="right", weight="bold" if not number else "normal")
        width = max(0.02, 1.5 * chance)
        colour = BAR if not number else LINE
        page.frame(x + 1.1, y - 0.14, width, 0.28, facecolor=colour, linewidth=0, zorder=2)
        page.text(x + 1.2 + width, y, f"{chance:.0%}", 12, ha="left", color=GREY)


def word_by_word(page: Page, way: Way, image: Image.Image, top: float) -> None:
    """Draw the picture once for each word, lit where it looked, with the word and its rivals."""
    count = min(len(way.words), CROWD)
    pitch = (WIDE - 0.8) / count
    size = min(pitch - 0.12, 1.9)
    page.text(0.4, top, "5  one word after another", 15, ha="left", weight="bold")
    page.text(4.3, top + 0.01, "each reads those before it; orange is where it looked, "
              "grey are the runners-up", 12, ha="left", color=GREY)  # fmt: skip
    for place in range(count):
        x, y = 0.4 + place * pitch, top + 0.4
        page.picture(x, y, size, warmed(image, way.looks[place], way.looks[:count].max()))
        middle, below = x + size / 2, y + size
        page.text(middle, below + 0.3, way.words[place], fitting(way.words[place]), weight="bold")
        rivals = [
            (word, chance)
            for word, chance in way.likely[place]
            if word != way.words[place] and chance >= LEAST
        ][:2]
        mine = dict(way.likely[place]).get(way.words[place], 0)
        page.text(middle, below + 0.6, f"{mine:.0%}", 12, color=BAR)
        for row, (word, chance) in enumerate(rivals):
            page.text(middle, below + 0.88 + 0.24 * row, f"{word} {chance:.0%}", 10.5, color=GREY)


def warmed(image: Image.Image, look: np.ndarray, most: float) -> Image.Image:
    """Return the picture, pale, and orange where `look` (side, side) is near its largest.

    `most` is the largest of all words: what looks nowhere in particular stays pale.
    """
    mask = Image.fromarray((230 * look / max(look.max(), most / 2)).astype(np.uint8))
    mask = mask.resize(image.size, Image.Resampling.BICUBIC)
    pale = Image.blend(Image.new("RGB", image.size, PAPER), image, 0.5)
    return Image.composite(Image.new("RGB", image.size, WARM), pale, mask)


def fitting(word: str) -> float:
    """Return a font size in which the word is no wider than its picture."""
    return min(16, 120 / max(len(word), 1))


def main(argv: list[str] | None = None) -> None:
    """Draw how a model makes a caption."""
    config = files.parse(Config, argv, program="how_it_works.py", description="Draw a model's way.")
    files.check_writable(config.output)
    model = CaptionModel.load(config.checkpoint).eval()
    if config.photo:
        image = shown = read_image(config.photo)
    else:
        _, image, _ = shapes.example(0, "test", config.number)
        _, shown, _ = shapes.example(0, "test", config.number, side=SHARP)
    figure = draw(follow(model, image), shown.resize((SHARP, SHARP)), model)
    with files.replacing(config.output) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    files.run(main)
