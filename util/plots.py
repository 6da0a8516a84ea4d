"""Plain arrays and strings → pictures: the learning curve, captioned photographs, a page of them.

Captions are set in the DejaVu Sans that matplotlib brings, which shows the Latin, Greek, Cyrillic,
Arabic, Hebrew, Armenian and Georgian scripts. For others an installed font is looked for.
"""

import functools
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from util.files import replacing

INK, GREY, PAPER = (24, 24, 24), (112, 112, 112), (255, 255, 255)
LEAST_WIDTH = 320  # pixels: below it a caption has no room
COLUMNS, PAGE_WIDTH, GAP = 4, 1600, 24
LINE_HEIGHT = 1.3  # times the font size

# Fonts made for scripts that DejaVu Sans lacks, as the file names of the usual systems.
WIDE_FONTS = re.compile(
    r"noto.*sans.*(cjk|regular)|droidsansfallback|wqy|unifont|arial ?unicode|pingfang|hiragino"
    r"|msyh|msgothic|malgun|nirmala|leelawui",
    re.IGNORECASE,
)


# --- the learning curve


def learning_curve(path: str | Path, rows: list[dict], test_loss: float | None = None) -> None:
    """Write a picture of a run by epoch: losses, scores, and below them the learning rate.

    `rows` are those of metrics.csv: `epoch`, `train_loss`, `val_loss`, `CIDEr`, `BLEU-4`, `reward`,
    `lr`, as numbers or text; what is missing, empty or NaN is left out. `test_loss` is a dashed
    line. The best epoch is that of the highest CIDEr, or BLEU-4 where there is no CIDEr; epochs of
    self-critical training, which have a reward, are shaded.
    """
    from matplotlib.figure import Figure  # never pyplot: it keeps figures and may want a screen

    figure = Figure(figsize=(11, 6.2), dpi=110, layout="constrained")
    panels = figure.subplot_mosaic([["losses", "scores"], ["rate", "rate"]], height_ratios=(4, 1))
    losses, scores, rate = (panels[name] for name in ("losses", "scores", "rate"))
    draw_losses(losses, rows, test_loss)
    draw_scores(scores, rows)
    draw_line(rate, rows, "lr", "_lr", "#555555", ".")
    epochs = [number(row.get("epoch")) for row in rows]
    for axes, label in ((losses, "loss"), (scores, "score"), (rate, "learning rate")):
        shade(axes, rows)
        finish_axes(axes, label, epochs)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")


def draw_losses(axes: Any, rows: list[dict], test_loss: float | None) -> None:
    """Draw training and validation loss by epoch, and the test loss as a level."""
    draw_line(axes, rows, "train_loss", "training", "#0072B2", "o")
    draw_line(axes, rows, "val_loss", "validation", "#D55E00", "s")
    if math.isfinite(level := number(test_loss)):
        label = f"test {level:.3f}"
        axes.axhline(level, color="#333333", linestyle="--", linewidth=1.5, label=label)


def draw_scores(axes: Any, rows: list[dict]) -> None:
    """Draw validation CIDEr and BLEU-4 by epoch, the reward, and mark the best epoch."""
    cider = draw_line(axes, rows, "CIDEr", "CIDEr", "#009E73", "o")
    bleu = draw_line(axes, rows, "BLEU-4", "BLEU-4", "#AA4499", "s")
    reward = draw_line(axes, rows, "reward", "reward (training)", "#0072B2", "^")
    if points := cider or bleu:
        epoch, score = max(points, key=lambda point: point[1])
        label = f"best: epoch {epoch:g} ({'CIDEr' if cider else 'BLEU-4'} {score:.3f})"
        axes.axvline(epoch, color="#333333", linestyle=":", linewidth=1.5, zorder=1)
        style = {"markersize": 15, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot([epoch], [score], "*", color="#E69F00", label=label, **style)
        highest = max(score for _, score in cider + bleu + reward)
        axes.set_ylim(0, max(highest * 1.08, 0.01))


def shade(axes: Any, rows: list[dict]) -> None:
    """Shade the epochs of self-critical training."""
    epochs = [number(row["epoch"]) for row in rows if math.isfinite(number(row.get("reward")))]
    if epochs:
        axes.axvspan(min(epochs) - 0.5, max(epochs) + 0.5, color="#0072B2", alpha=0.08, lw=0)


def draw_line(
    axes: Any, rows: list[dict], key: str, label: str, colour: str, marker: str
) -> list[tuple[float, float]]:
    """Draw one column by epoch and return its points; absent values are skipped, not gaps."""
    points = [(number(row.get("epoch")), number(row.get(key))) for row in rows]
    points = [point for point in points if all(map(math.isfinite, point))]
    if points:
        size = 5 if len(points) <= 40 else 0
        axes.plot(*zip(*points, strict=True), marker, ls="-", ms=size, color=colour, label=label)
    return points


def finish_axes(axes: Any, label: str, epochs: list[float]) -> None:
    """Label the axes, with whole epochs below and the legend above, where it hides nothing."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch", fontsize=12)
    axes.set_ylabel(label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if known := [epoch for epoch in epochs if math.isfinite(epoch)]:
        margin = max(0.5, (max(known) - min(known)) * 0.04)
        axes.set_xlim(min(known) - margin, max(known) + margin)
    if axes.get_legend_handles_labels()[1]:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
        axes.legend(**above, frameon=False, fontsize=11, columnspacing=1.2, handlelength=1.6)
    elif not axes.lines:
        axes.text(0.5, 0.5, f"no {label}", transform=axes.transAxes, ha="center", fontsize=12)
        axes.set(xticks=[], yticks=[])


def number(value: Any) -> float:
    """Return a cell of metrics.csv as a float, NaN where it is missing or empty."""
    return math.nan if value is None or value == "" else float(value)


# --- captioned photographs


def annotate(image: Image.Image, caption: str) -> Image.Image:
    """Return the photograph in RGB with its caption below it on a white band.

    A picture narrower than 320 pixels is enlarged, or where that would make it very high, set on
    white; the font grows with the width. Long words are broken. Characters that neither DejaVu Sans
    nor a font found on this system has are shown as empty boxes.
    """
    picture = enlarged(image.convert("RGB"))
    width = max(picture.width, LEAST_WIDTH)
    return stacked([picture, text_strip(caption, width, max(16, round(width / 25)), INK)])


def caption_page(
    path: str | Path, items: list[tuple[Image.Image, str, list[str]]], title: str = ""
) -> None:
    """Write a PNG page, 1600 pixels wide, of pictures with their captions in four columns.

    An item is a picture, the caption made for it, and its reference captions, of which the first is
    shown in grey.
    """
    cells = [captioned_cell(*item) for item in items]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heading = text_strip(title, PAGE_WIDTH, 32, INK)
    page = stacked([heading, *map(side_by_side, rows), Image.new("RGB", (PAGE_WIDTH, GAP), PAPER)])
    with replacing(path) as temporary:
        page.save(temporary, format="PNG")


def attention_page(path: str | Path, image: Image.Image, words: list[str], attention: Any) -> None:
    """Write a PNG page of a picture once for each word, lit where the word looked.

    `attention` (words, rows, columns), of any scale: each word's largest is lit, its least is dark.
    """
    image = image.convert("RGB")
    size = fitted(image.size)
    whole = stacked([image.resize(size, Image.Resampling.BICUBIC), space(size[0], " ".join(words))])
    cells = [whole] + [
        stacked([lit(image, look).resize(size, Image.Resampling.BICUBIC), space(size[0], word)])
        for word, look in zip(words, attention, strict=True)
    ]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    page = stacked([*map(side_by_side, rows), Image.new("RGB", (PAGE_WIDTH, GAP), PAPER)])
    with replacing(path) as temporary:
        page.save(temporary, format="PNG")


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a picture in a page's column, at most twice as high as it is wide."""
    width = (PAGE_WIDTH - GAP * (COLUMNS + 1)) // COLUMNS
    return width, min(2 * width, max(1, round(width * size[1] / size[0])))


def space(width: int, text: str) -> Image.Image:
    """Return a word or a caption to stand below a picture."""
    return text_strip(text, width, 20, INK)


def lit(image: Image.Image, look: Any) -> Image.Image:
    """Return the picture, dark but for where `look` (rows, columns) is large."""
    import numpy as np  # not at the top: whoever draws nothing should not wait for it

    look = np.asarray(look, np.float32) - np.min(look)
    look = look / max(float(look.max()), 1e-12)
    mask = Image.fromarray((255 * look).astype(np.uint8)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    dark = Image.blend(image, Image.new("RGB", image.size), 0.75)
    return Image.composite(image, dark, mask)


def captioned_cell(image: Image.Image, caption: str, references: list[str]) -> Image.Image:
    """Return one picture of a page with its caption and first reference below it."""
    width = (PAGE_WIDTH - GAP * (COLUMNS + 1)) // COLUMNS
    box = (width, width * 3 // 4)
    picture = ImageOps.pad(image.convert("RGB"), box, color=PAPER)
    reference = text_strip(references[0] if references else "", width, 18, GREY)
    return stacked([picture, text_strip(caption, width, 20, INK), reference])


def enlarged(picture: Image.Image) -> Image.Image:
    """Return a narrow picture at the least width, or as near to it as four times that height."""
    scale = min(LEAST_WIDTH / picture.width, 4 * LEAST_WIDTH / picture.height)
    if scale <= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def stacked(parts: list[Image.Image]) -> Image.Image:
    """Return the parts one below the other, each in the middle of the widest."""
    width = max(part.width for part in parts)
    page = Image.new("RGB", (width, sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        page.paste(part, ((width - part.width) // 2, top))
        top += part.height
    return page


def side_by_side(parts: list[Image.Image]) -> Image.Image:
    """Return a row of a page: the parts, of one width, with gaps around and above them."""
    row = Image.new("RGB", (PAGE_WIDTH, GAP + max(part.height for part in parts)), PAPER)
    for column, part in enumerate(parts):
        row.paste(part, (GAP + column * (part.width + GAP), GAP))
    return row


# --- text


def text_strip(text: str, width: int, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Return a strip with the text wrapped and centred in it, of no height where it is empty."""
    font, margin = font_for(text, size), size // 2
    lines = balanced(text, font, width - 2 * margin)
    step = size * LINE_HEIGHT
    height = round(len(lines) * step) + margin if lines else 0
    strip = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, line in enumerate(lines):
        middle = (width / 2, margin / 2 + (index + 0.5) * step)
        draw.text(middle, line, fill=colour, font=font, anchor="mm")
    return strip


def balanced(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the text wrapped in as few lines as `width` allows, of about one length."""
    lines = wrap(text, font, width)
    longest = max(map(font.getlength, text.split()), default=0)
    for percent in range(95, 45, -5):
        narrower = wrap(text, font, max(longest, width * percent / 100))
        if len(narrower) > len(lines) or longest > width:
            break
        lines = narrower
    return lines


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the lines that `text` fills at `width` pixels; longer words are broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += broken(word, font, width)
    return [line for line in lines if line]


def broken(word: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the pieces of a word that fit, one where it does so whole."""
    pieces = [""]
    for letter in word:
        whole = not pieces[-1] or unicodedata.combining(letter)  # a mark stays with its letter
        if not whole and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, or an installed font where that shows more of the text's characters."""
    wanted = {ord(letter) for letter in text if not letter.isspace()}
    best = dejavu()
    if wanted - characters(best):
        best = max([best, *wide_fonts()], key=lambda path: len(wanted & characters(path)))
    return ImageFont.truetype(best, size)


@functools.cache
def dejavu() -> str:
    """Return the path of the DejaVu Sans that matplotlib brings."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.cache
def wide_fonts() -> list[str]:
    """Return the paths of the installed fonts that may have what DejaVu Sans lacks."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(path for path in findSystemFonts() if WIDE_FONTS.search(Path(path).name))


@functools.cache
def characters(path: str) -> frozenset[int]:
    """Return the code points that a font has shapes for, none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
