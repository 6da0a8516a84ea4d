"""Plain arrays and strings → images: the learning curve, captioned images, pages of them.

Captions are set in the DejaVu Sans of matplotlib, which has the Latin, Greek, Cyrillic, Arabic,
Hebrew, Armenian and Georgian scripts. For others an installed font is searched.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from util.files import replacing

INK, GREY, PAPER = (24, 24, 24), (112, 112, 112), (255, 255, 255)
MIN_WIDTH = 320  # pixels: a narrower image has no room for a caption
COLUMNS, PAGE_WIDTH, GAP = 4, 1600, 24
SOFTWARE, MADE_BY = 0x0131, "image-captioning page"  # a page's EXIF tag, and its value
COLUMN_WIDTH = (PAGE_WIDTH - GAP * (COLUMNS + 1)) // COLUMNS
LINE_HEIGHT = 1.3  # times the font size
SMOOTHED = 7  # rows and columns: an attention map of fewer is drawn as cells

# Fonts with scripts that DejaVu Sans lacks, by their file names on common systems.
WIDE_FONTS = re.compile(
    r"noto.*sans.*(cjk|regular)|droidsansfallback|wqy|unifont|arial ?unicode|pingfang|hiragino"
    r"|msyh|msgothic|malgun|nirmala|leelawui",
    re.IGNORECASE,
)


# --- the learning curve


def learning_curve(path: str | Path, rows: list[dict], test_loss: float | None = None) -> None:
    """Write a plot of a run by epoch: losses, scores, and below them the learning rate.

    `rows` are those of metrics.csv: `epoch`, `train_loss`, `val_loss`, `CIDEr`, `BLEU-4`, `reward`,
    `lr`, as numbers or text; missing, empty and NaN values are left out. `test_loss` is a dashed
    line. The best epoch is that of the highest CIDEr, or BLEU-4 where there is no CIDEr; epochs of
    self-critical training, which have a reward, are shaded.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may need a screen

    figure = Figure(figsize=(11, 6.2), dpi=110, layout="constrained")
    panels = figure.subplot_mosaic([["losses", "scores"], ["rate", "rate"]], height_ratios=(4, 1))
    losses, scores, rate = (panels[name] for name in ("losses", "scores", "rate"))
    draw_line(losses, rows, "train_loss", "training", "#0072B2", "o")
    draw_line(losses, rows, "val_loss", "validation", "#D55E00", "s")
    if math.isfinite(level := to_float(test_loss)):
        style = {"color": "#333333", "linestyle": "--", "linewidth": 1.5}
        losses.axhline(level, label=f"test {level:.3f}", **style)
    draw_scores(scores, rows)
    draw_line(rate, rows, "lr", "_lr", "#555555", ".")
    for axes, label in ((losses, "loss"), (scores, "score"), (rate, "learning rate")):
        finish_axes(axes, label, rows)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")


COMPARISON = "Curves of several runs"  # the title in the PNG file


def compare_curves(path: str | Path, runs: Mapping[str, list[dict]]) -> None:
    """Write a plot of the validation loss and CIDEr of several runs by epoch, as PNG.

    `runs`: name → rows as of `learning_curve`. A star marks the best epoch of a run.
    """
    from matplotlib.figure import Figure

    height = 4.6 + 0.22 * math.ceil(len(runs) / 2)
    figure = Figure(figsize=(11, height), dpi=110, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    colors = (
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#AA4499",
        "#E69F00",
        "#56B4E9",
        "#555555",
        "#882255",
    )
    styles = itertools.product(("-", "--", ":", "-."), colors)  # another line after seven colours
    for (name, rows), (line, color) in zip(runs.items(), itertools.cycle(styles)):
        label = name.replace("$", r"\$").lstrip("_")  # no formula, and no hidden label
        draw_line(losses, rows, "val_loss", "_loss", color, ".", line)
        points = draw_line(scores, rows, "CIDEr", label, color, ".", line)
        if points:
            best = max(points, key=lambda point: point[1])
            scores.plot(*best, "*", color=color, markersize=14, markeredgecolor="white")
        elif losses.lines:  # a run without captions to compare with has its loss alone
            losses.lines[-1].set_label(label)
    every = [row for rows in runs.values() for row in rows]
    for axes, label in ((losses, "validation loss"), (scores, "CIDEr (validation)")):
        finish_axes(axes, label, [{"epoch": row.get("epoch")} for row in every])
        if legend := axes.get_legend():
            legend.remove()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Title": COMPARISON})


def is_comparison(path: str | Path) -> bool:
    """Return whether a file is a plot of `compare_curves`."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Title") == COMPARISON
    except (OSError, ValueError, SyntaxError):
        return False


def draw_scores(axes: Any, rows: list[dict]) -> None:
    """Draw validation CIDEr and BLEU-4 and the reward by epoch, and mark the best epoch.

    Of a run on several datasets, the CIDEr of each too: the columns "CIDEr NAME".
    """
    cider = draw_line(axes, rows, "CIDEr", "CIDEr", "#009E73", "o")
    bleu = draw_line(axes, rows, "BLEU-4", "BLEU-4", "#AA4499", "s")
    reward = draw_line(axes, rows, "reward", "reward (training)", "#0072B2", "^")
    # Of several datasets, CIDEr is the mean.
    names = [name for name in (rows[0] if rows else ()) if name.startswith("CIDEr ")]
    shades = itertools.cycle(("#66C2A5", "#1B7837", "#A6D854", "#005824"))
    labels = [name.replace("$", r"\$") for name in names]  # no formulas
    each = [
        draw_line(axes, rows, name, label, next(shades), ".")
        for name, label in zip(names, labels, strict=True)
    ]
    if points := cider or bleu:
        epoch, score = max(points, key=lambda point: point[1])
        label = f"best: epoch {epoch:g} ({'CIDEr' if cider else 'BLEU-4'} {score:.3f})"
        axes.axvline(epoch, color="#333333", linestyle=":", linewidth=1.5, zorder=1)
        style = {"markersize": 15, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot([epoch], [score], "*", color="#E69F00", label=label, **style)
        highest = max(score for _, score in itertools.chain(cider, bleu, reward, *each))
        axes.set_ylim(0, max(highest * 1.08, 0.01))


def draw_line(
    axes: Any, rows: list[dict], key: str, label: str, color: str, marker: str, line: str = "-"
) -> list[tuple[float, float]]:
    """Draw one column by epoch and return its points; the line connects over missing values."""
    points = [(to_float(row.get("epoch")), to_float(row.get(key))) for row in rows]
    points = [point for point in points if all(map(math.isfinite, point))]
    if points:
        size = 5 if len(points) <= 40 else 0
        axes.plot(*zip(*points, strict=True), marker, ls=line, ms=size, color=color, label=label)
    return points


def finish_axes(axes: Any, label: str, rows: list[dict]) -> None:
    """Shade self-critical epochs, label the axes, and put the legend above, over no line."""
    from matplotlib.ticker import MaxNLocator

    rewarded = [row for row in rows if math.isfinite(to_float(row.get("reward")))]
    if shaded := [to_float(row["epoch"]) for row in rewarded]:
        axes.axvspan(min(shaded) - 0.5, max(shaded) + 0.5, color="#0072B2", alpha=0.08, lw=0)
    axes.set_xlabel("epoch", fontsize=12)
    axes.set_ylabel(label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    epochs = [to_float(row.get("epoch")) for row in rows]
    if epochs := [epoch for epoch in epochs if math.isfinite(epoch)]:
        margin = max(0.5, (max(epochs) - min(epochs)) * 0.04)
        axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    if axes.get_legend_handles_labels()[1]:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
        axes.legend(**above, frameon=False, fontsize=11, columnspacing=1.2, handlelength=1.6)
    elif not axes.lines:
        axes.text(0.5, 0.5, f"no {label}", transform=axes.transAxes, ha="center", fontsize=12)
        axes.set(xticks=[], yticks=[])


def to_float(value: Any) -> float:
    """Return a cell of metrics.csv as a float, NaN if it is missing or empty."""
    return math.nan if value is None or value == "" else float(value)


# --- captioned images


def annotate(image: Image.Image, caption: str) -> Image.Image:
    """Return the image in RGB with its caption below it on a white band.

    An image narrower than 320 pixels is enlarged, or padded with white if that would make it very
    high; the font grows with the width. Long words are broken. Characters that neither DejaVu Sans
    nor an installed font has are shown as empty boxes.
    """
    image = image.convert("RGB")
    scale = min(MIN_WIDTH / image.width, 4 * MIN_WIDTH / image.height)
    if scale > 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    width = max(image.width, MIN_WIDTH)
    return stack([image, draw_text(caption, width, max(16, round(width / 25)), INK)])


def caption_page(
    path: str | Path, items: list[tuple[Image.Image, str, list[str]]], title: str = ""
) -> None:
    """Write a PNG page, 1600 pixels wide, of images with their captions in four columns.

    An item is an image, its generated caption, and its reference captions, of which the first is
    shown in grey.
    """
    cells = []
    for image, caption, references in items:
        box = (COLUMN_WIDTH, COLUMN_WIDTH * 3 // 4)
        image = ImageOps.pad(image.convert("RGB"), box, color=PAPER)
        reference = references[0] if references else ""
        texts = [
            draw_text(caption, COLUMN_WIDTH, 20, INK),
            draw_text(reference, COLUMN_WIDTH, 18, GREY),
        ]
        cells.append(stack([image, *texts]))
    write_page(path, cells, [draw_text(title, PAGE_WIDTH, 32, INK)])


def attention_page(
    path: str | Path, image: Image.Image, words: list[str], attention: Any, text: str = ""
) -> None:
    """Write a PNG page of an image and its caption, and once per word with its attention map.

    `attention` (words, rows, columns) may have any scale: a map's largest value is bright, its
    smallest is dark. `text`: the caption, where it is not the words with spaces between them.
    """
    height = round(COLUMN_WIDTH * image.height / image.width)
    size = (COLUMN_WIDTH, min(2 * COLUMN_WIDTH, max(1, height)))
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pairs = [(image, text or " ".join(words))]
    for word, weights in zip(words, attention, strict=True):
        pairs.append((highlight(image, weights), word))
    cells = [stack([shown, draw_text(text, COLUMN_WIDTH, 20, INK)]) for shown, text in pairs]
    write_page(path, cells)


def highlight(image: Image.Image, weights: Any) -> Image.Image:
    """Return the image darkened except where `weights` (rows, columns) are large.

    Few weights are drawn as the cells they are: blended, 4 x 4 cells would look as if the model
    had attended to shapes that it can't tell from what is around them.
    """
    import numpy as np  # here, as importing this module should be cheap

    weights = np.asarray(weights, np.float32) - np.min(weights)
    weights = weights / max(float(weights.max()), 1e-12)
    mask = Image.fromarray((255 * weights).astype(np.uint8))
    mask = mask.resize(image.size, pick_filter(*weights.shape))
    dark = Image.blend(image, Image.new("RGB", image.size), 0.75)
    return Image.composite(image, dark, mask)


def pick_filter(rows: int, columns: int) -> Image.Resampling:
    """Return the filter that enlarges an attention map: none between the cells of a small one."""
    few = min(rows, columns) < SMOOTHED
    return Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC


def stack(parts: list[Image.Image]) -> Image.Image:
    """Return the parts below each other, each centered in the width of the widest."""
    width = max(part.width for part in parts)
    page = Image.new("RGB", (width, sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        page.paste(part, ((width - part.width) // 2, top))
        top += part.height
    return page


def write_page(
    path: str | Path, cells: list[Image.Image], heading: list[Image.Image] | None = None
) -> None:
    """Write the cells, of one width, as a PNG page of four columns with gaps, below a heading."""
    rows = []
    for start in range(0, len(cells), COLUMNS):
        row_cells = cells[start : start + COLUMNS]
        height = GAP + max(cell.height for cell in row_cells)
        row = Image.new("RGB", (PAGE_WIDTH, height), PAPER)
        for column, cell in enumerate(row_cells):
            row.paste(cell, (GAP + column * (cell.width + GAP), GAP))
        rows.append(row)
    page = stack([*(heading or []), *rows, Image.new("RGB", (PAGE_WIDTH, GAP), PAPER)])
    exif = Image.Exif()
    exif[SOFTWARE] = MADE_BY
    with replacing(path) as temporary:
        page.save(temporary, format="PNG", exif=exif)


# --- text


def draw_text(text: str, width: int, size: int, color: tuple[int, int, int]) -> Image.Image:
    """Return a strip with the text wrapped and centered, of height 0 if the text is empty."""
    font, margin = pick_font(text, size), size // 2
    lines = balance_lines(text, font, width - 2 * margin)
    step = size * LINE_HEIGHT
    height = round(len(lines) * step) + margin if lines else 0
    strip = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, line in enumerate(lines):
        middle = (width / 2, margin / 2 + (index + 0.5) * step)
        draw.text(middle, line, fill=color, font=font, anchor="mm")
    return strip


def balance_lines(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the text in as few lines as `width` allows, all of about the same length."""
    lines = wrap(text, font, width)
    longest = max(map(font.getlength, text.split()), default=0)
    for percent in range(95, 45, -5):
        narrower = wrap(text, font, max(longest, width * percent / 100))
        if len(narrower) > len(lines) or longest > width:
            break
        lines = narrower
    return lines


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the lines of `text` at `width` pixels; words that are longer are broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += break_word(word, font, width)
    return [line for line in lines if line]


def break_word(word: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the word in pieces that fit in `width` pixels."""
    pieces = [""]
    for letter in word:
        attached = not pieces[-1] or unicodedata.combining(letter)  # a mark stays with its letter
        if not attached and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def pick_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, or the installed font that has most of the text's characters."""
    needed = {ord(letter) for letter in text if not letter.isspace()}
    best = find_dejavu()
    if needed - read_charmap(best):
        fonts = [best, *find_wide_fonts()]
        best = max(fonts, key=lambda path: len(needed & read_charmap(path)))
    return ImageFont.truetype(best, size)


@functools.cache
def find_dejavu() -> str:
    """Return the path of the DejaVu Sans that matplotlib contains."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.cache
def find_wide_fonts() -> list[str]:
    """Return the paths of installed fonts that may have what DejaVu Sans lacks."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(path for path in findSystemFonts() if WIDE_FONTS.search(Path(path).name))


@functools.cache
def read_charmap(path: str) -> frozenset[int]:
    """Return the code points of a font, none if it can't be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
