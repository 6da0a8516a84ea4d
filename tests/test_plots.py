"""Pictures that say what they should: read back, measured, never compared with stored ones."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from util import plots

CAPTION = "a brown dog runs through the snow with a red ball in its mouth"
ROWS = [
    {
        "epoch": epoch,
        "train_loss": 5 - epoch / 4,
        "val_loss": 5.2 - epoch / 5,
        "CIDEr": 0.6 - (epoch - 7) ** 2 / 100,
        "BLEU-4": epoch / 50,
        "lr": 1e-4,
    }
    for epoch in range(1, 11)
]


def photo(width, height=None):
    """A picture of one colour, so that all else is ink or paper."""
    return Image.new("RGB", (width, height or width * 3 // 4), (200, 30, 30))


def band(image, caption, height=None):
    """The caption's band under a picture, as brightness."""
    page = plots.annotate(image, caption)
    return np.asarray(page.convert("L"))[height or image.height :]


def ink_rows(strip):
    """The heights of the runs of rows with dark pixels: one for each line of text."""
    inked = np.flatnonzero(np.diff(np.pad((strip < 100).any(axis=1), 1).astype(int)))
    return np.diff(inked.reshape(-1, 2), axis=1).ravel()


def panels(monkeypatch, tmp_path, rows, **how):
    """The three panels of a learning curve, as matplotlib holds them."""
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    plots.learning_curve(tmp_path / "curve.png", rows, **how)
    seen[0].draw_without_rendering()
    return seen[0].axes


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


# --- the learning curve


def test_a_learning_curve_is_a_picture_with_both_losses_and_scores(tmp_path):
    path = tmp_path / "run" / "curve.png"
    plots.learning_curve(path, ROWS, test_loss=2.5)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1210
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_the_lines_of_a_learning_curve_are_its_rows(monkeypatch, tmp_path):
    losses, scores, _ = panels(monkeypatch, tmp_path, ROWS, test_loss=2.5)
    for axes, label, key in (
        (losses, "training", "train_loss"),
        (losses, "validation", "val_loss"),
        (scores, "CIDEr", "CIDEr"),
        (scores, "BLEU-4", "BLEU-4"),
    ):
        assert lines_of(axes)[label] == [[row["epoch"], row[key]] for row in ROWS]
    assert [y for _, y in lines_of(losses)["test 2.500"]] == [2.5, 2.5]


def test_the_best_epoch_is_marked_at_the_highest_cider(monkeypatch, tmp_path):
    _, scores, _ = panels(monkeypatch, tmp_path, ROWS)
    assert lines_of(scores)["best: epoch 7 (CIDEr 0.600)"] == [[7, 0.6]]
    assert scores.get_ylim()[1] > 0.6


def test_without_cider_the_best_epoch_is_that_of_bleu(monkeypatch, tmp_path):
    _, scores, _ = panels(monkeypatch, tmp_path, [{**row, "CIDEr": ""} for row in ROWS])
    assert lines_of(scores)["best: epoch 10 (BLEU-4 0.200)"] == [[10, 0.2]]


def test_the_learning_rate_and_the_reward_are_drawn_and_their_stage_shaded(monkeypatch, tmp_path):
    rows = [{**row, "reward": ""} for row in ROWS]
    rows += [{"epoch": 11, "CIDEr": 0.7, "reward": 0.8, "lr": 1e-5, "train_loss": ""}]
    losses, scores, rate = panels(monkeypatch, tmp_path, rows)
    assert lines_of(scores)["reward (training)"] == [[11, 0.8]]
    assert [y for _, y in lines_of(rate)["_lr"]] == [row["lr"] for row in rows]
    for axes in (losses, scores, rate):
        (span,) = axes.patches
        assert span.get_extents().transformed(axes.transData.inverted()).x0 == pytest.approx(10.5)
    assert not panels(monkeypatch, tmp_path, ROWS)[0].patches


def test_each_dataset_has_a_line_whatever_its_name(monkeypatch, tmp_path):
    rows = [{**row, "CIDEr coco": row["CIDEr"] + 0.1, "CIDEr $_x": 0.1} for row in ROWS]
    _, scores, _ = panels(monkeypatch, tmp_path, rows)
    drawn = lines_of(scores)
    assert drawn["CIDEr coco"] == [[row["epoch"], row["CIDEr"] + 0.1] for row in ROWS]
    assert [y for _, y in drawn[r"CIDEr \$_x"]] == [0.1] * len(ROWS)
    assert scores.get_ylim()[1] > 0.7


def test_missing_values_are_left_out_of_a_learning_curve(monkeypatch, tmp_path):
    rows = [dict(ROWS[0], CIDEr=""), dict(ROWS[1], CIDEr=math.nan), ROWS[2], {"epoch": "4"}]
    rows.append({key: str(value) for key, value in ROWS[4].items()})
    losses, scores, _ = panels(monkeypatch, tmp_path, rows)
    assert [x for x, _ in lines_of(losses)["training"]] == [1, 2, 3, 5]
    assert [x for x, _ in lines_of(scores)["CIDEr"]] == [3, 5]


@pytest.mark.parametrize("rows", [[], ROWS[:1], [{"epoch": "1", "train_loss": "4.5"}]])
def test_a_run_that_has_hardly_begun_has_a_learning_curve(rows, tmp_path):
    plots.learning_curve(tmp_path / "curve.png", rows)
    assert Image.open(tmp_path / "curve.png").width == 1210


def test_a_run_without_validation_says_so(monkeypatch, tmp_path):
    rows = [{"epoch": row["epoch"], "train_loss": row["train_loss"]} for row in ROWS]
    losses, scores, _ = panels(monkeypatch, tmp_path, rows)
    assert list(lines_of(losses)) == ["training"]
    assert [text.get_text() for text in scores.texts] == ["no score"]


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_epochs_are_whole_numbers(count, monkeypatch, tmp_path):
    losses, *_ = panels(monkeypatch, tmp_path, ROWS[:count])
    ticks = losses.get_xticks()
    assert len(ticks) and all(tick == int(tick) for tick in ticks)


def test_legends_stand_outside_the_lines(monkeypatch, tmp_path):
    for axes in panels(monkeypatch, tmp_path, ROWS, test_loss=2.5)[:2]:
        legend, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.y0 >= frame.y1
        assert legend.y1 <= axes.figure.bbox.y1


def test_drawing_a_curve_keeps_no_figure(tmp_path):
    code = (
        "import sys; from util import plots; plots.learning_curve(sys.argv[1], []);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "curve.png")]
    subprocess.run(command, cwd=Path(plots.__file__).parents[1], check=True)


def test_importing_plots_is_cheap():
    code = "import sys, util.plots; assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(plots.__file__).parents[1], check=True)


# --- captioned photographs


@pytest.mark.parametrize("width", [320, 500, 3000])
def test_the_photograph_stands_unchanged_above_its_caption(width):
    image = photo(width)
    page = plots.annotate(image, CAPTION)
    assert page.width == width
    assert page.crop((0, 0, *image.size)).tobytes() == image.tobytes()
    assert (band(image, CAPTION)[0] == 255).all()


@pytest.mark.parametrize("width", [64, 320, 500, 3000, 6000])
def test_captions_are_legible_at_every_size(width):
    shown = max(width, 320)
    strip = band(photo(width), CAPTION, height=shown * 3 // 4)
    heights = ink_rows(strip)
    assert len(heights) in (2, 3)
    assert all(max(10, shown / 40) <= height <= shown / 15 for height in heights)


def test_a_small_photograph_is_enlarged():
    page = plots.annotate(photo(64), CAPTION)
    assert page.width == 320
    assert np.abs(np.asarray(page)[:240].astype(int) - [200, 30, 30]).max() == 0


def test_a_sliver_is_not_enlarged_without_end():
    page = plots.annotate(photo(2, 1000), CAPTION)
    assert page.width == 320
    assert page.height < 1500
    assert plots.annotate(photo(1000, 2), CAPTION).width == 1000


def test_a_longer_caption_makes_a_taller_band():
    bands = [band(photo(500), CAPTION * times) for times in (1, 2, 4)]
    assert len(bands[0]) < len(bands[1]) < len(bands[2])
    assert all((strip[-1] == 255).all() for strip in bands)


@pytest.mark.parametrize("caption", ["", "   ", "\n"])
def test_without_a_caption_there_is_no_band(caption):
    assert plots.annotate(photo(400), caption).size == (400, 300)


def test_nothing_is_written_over_the_edges():
    for caption in (CAPTION * 3, "W" * 300, "Donaudampfschifffahrtsgesellschaft " * 4):
        strip = band(photo(400), caption)
        assert (strip[:, :4] == 255).all() and (strip[:, -4:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_a_picture_of_any_mode_can_be_annotated(mode):
    assert plots.annotate(photo(400).convert(mode), CAPTION).mode == "RGB"


@pytest.mark.parametrize(
    "caption", ["δύο σκυλιά", "два пса", "كلبان يلعبان", "שני כלבים", "été ×½"]
)
def test_other_scripts_are_shown(caption):
    font = plots.pick_font(caption, 20)
    assert Path(font.path).name == "DejaVuSans.ttf"
    assert band(photo(400), caption).min() < 100


def test_a_script_that_no_font_has_is_shown_as_boxes(monkeypatch):
    monkeypatch.setattr(plots, "find_wide_fonts", list)
    assert band(photo(400), "二匹の犬").min() < 100


def test_an_installed_font_is_taken_where_it_shows_more(monkeypatch):
    stix = Path(plots.find_dejavu()).with_name("STIXGeneral.ttf")
    only_stix = chr(min(plots.read_charmap(str(stix)) - plots.read_charmap(plots.find_dejavu())))
    monkeypatch.setattr(plots, "find_wide_fonts", lambda: ["missing.ttf", str(stix)])
    assert Path(plots.pick_font(f"a dog {only_stix}", 20).path) == stix
    assert plots.pick_font("a dog", 20).path == plots.find_dejavu()


# --- wrapping


@pytest.fixture(scope="module")
def font():
    return ImageFont.truetype(plots.find_dejavu(), 20)


@pytest.mark.parametrize("width", [60, 150, 400, 5000])
def test_wrapped_lines_fit_and_hold_every_letter(width, font):
    text = f"{CAPTION} {'incomprehensibilities' * 3} {CAPTION}"
    for wrapped in (plots.wrap, plots.balance_lines):
        lines = wrapped(text, font, width)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_words_that_fit_are_not_broken(font):
    for width in (160, 300, 700):
        assert " ".join(plots.balance_lines(CAPTION, font, width)) == CAPTION


def test_balancing_adds_no_line_and_leaves_no_lone_word(font):
    text = "a man lies on a bench while his dog sits by him"
    width = font.getlength(text) - 1
    assert plots.wrap(text, font, width)[1:] == ["him"]
    first, second = plots.balance_lines(text, font, width)
    assert font.getlength(second) > font.getlength(first) / 2


def test_a_combining_mark_stays_with_its_letter(font):
    pieces = plots.break_word("e\u0301" * 60, font, 100)
    assert len(pieces) > 3
    assert all(piece.startswith("e") and piece.endswith("\u0301") for piece in pieces)


# --- the page


def page_of(tmp_path, count, **how):
    path = tmp_path / "page.png"
    items = [(photo(64 * (1 + i % 3), 64), CAPTION, ["two dogs play", "x"]) for i in range(count)]
    plots.caption_page(path, items, **how)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_page_is_a_grid_of_four_columns(tmp_path):
    one, four, five = (page_of(tmp_path, count) for count in (1, 4, 5))
    assert one.shape == four.shape
    assert one.shape[1] == 1600
    assert len(four) < len(five) <= 2 * len(four)
    red = (abs(four - [200, 30, 30]).sum(axis=2) < 30).any(axis=0)
    assert (np.diff(red.astype(int)) == 1).sum() == 4


def test_a_page_shows_the_caption_dark_and_the_reference_grey(tmp_path):
    image, alone = photo(400, 300), tmp_path / "alone.png"
    plots.caption_page(tmp_path / "page.png", [(image, "a dog", ["two dogs play"])])
    plots.caption_page(alone, [(image, "a dog", [])])
    colours = [
        {colour for _, colour in Image.open(path).getcolors(1 << 24)}
        for path in (tmp_path / "page.png", alone)
    ]
    assert plots.INK in colours[0] & colours[1]
    assert plots.GREY in colours[0]
    assert plots.GREY not in colours[1]


def test_a_title_stands_above_the_pictures(tmp_path):
    plain, titled = page_of(tmp_path, 2), page_of(tmp_path, 2, title="epoch 3")
    extra = len(titled) - len(plain)
    assert extra > 30
    assert np.array_equal(titled[extra:], plain)
    assert titled[:extra].min() < 100


@pytest.mark.parametrize("count", [0, 50])
def test_a_page_holds_none_or_fifty(count, tmp_path):
    assert page_of(tmp_path, count).shape[1] == 1600


# --- writing


@pytest.mark.parametrize("writer", ["learning_curve", "caption_page"])
def test_a_failing_write_leaves_the_old_picture(writer, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    def disk_full(_, file, **__):
        Path(file).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", disk_full)
    monkeypatch.setattr(Image.Image, "save", disk_full)
    path = tmp_path / "picture.png"
    path.write_bytes(b"the old picture")
    with pytest.raises(OSError, match="No space left"):
        getattr(plots, writer)(path, [])
    assert path.read_bytes() == b"the old picture"
    assert list(tmp_path.iterdir()) == [path]


def test_a_word_lights_what_it_looked_at():
    white = Image.new("RGB", (90, 60), "white")
    look = np.zeros((2, 3))
    look[0, 2] = 0.4
    pixels = np.asarray(plots.highlight(white, look))[..., 0]
    assert pixels[5, 85] > 250 and pixels[50, 5] < 80
    even = np.asarray(plots.highlight(white, np.full((2, 3), 0.2)))
    assert even.max() - even.min() <= 1


def test_few_positions_are_drawn_as_cells_and_many_are_blended():
    """A column of the picture has as many shades as the map has rows, or more where it blends."""
    image = Image.new("RGB", (280, 280), "white")
    for side, shades in ((1, 1), (4, 4), (6, 6), (7, None), (10, None)):
        weights = np.arange(side)[:, None] * np.ones(side)
        column = np.asarray(plots.highlight(image, weights))[:, 0, 0]
        if shades:
            assert len(set(column.tolist())) == shades, side
        else:
            assert len(set(column.tolist())) > 4 * side
    tall = np.asarray(plots.highlight(image, np.arange(8)[:, None] * np.ones((8, 3))))[:, 0, 0]
    assert len(set(tall.tolist())) == 8


def test_the_cells_of_an_attention_page_have_sharp_edges(tmp_path):
    """A small image is enlarged before it is darkened, not together with the cells."""
    weights = np.zeros((1, 2, 2))
    weights[0, 0, 0] = 1
    plots.attention_page(tmp_path / "page.png", Image.new("RGB", (8, 8), "white"), ["a"], weights)
    page = np.asarray(Image.open(tmp_path / "page.png"))[..., 0]
    left = 2 * plots.GAP + plots.COLUMN_WIDTH  # the second picture
    row = page[plots.GAP + 20, left : left + plots.COLUMN_WIDTH]
    assert set(row.tolist()) == {255, 63}


@pytest.mark.parametrize("size", [(400, 300), (30, 900), (900, 30)])
def test_an_attention_page_has_a_picture_a_word(size, tmp_path):
    words = ["a", "very", "long", "caption", "of", "exactly", "nine", "words", "here"]
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    plots.attention_page(tmp_path / "page.png", image, words, rng.random((9, 7, 7)))
    page = np.asarray(Image.open(tmp_path / "page.png"))
    assert page.shape[1] == 1600 and page.shape[0] > 100
    with pytest.raises(ValueError):
        plots.attention_page(tmp_path / "page.png", image, words, rng.random((8, 7, 7)))
