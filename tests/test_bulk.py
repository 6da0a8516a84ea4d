"""Captions of whole folders: a file that grows, is continued, and keeps its errors in a column."""

import csv
import html
import json
import math
import re
import time

import pytest
from helpers.tiny import picture, run_script, tiny_model
from PIL import Image

import app
import inference
from inference import Captioner
from util.images import read_ahead


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures in two folders, one of them broken."""
    for number in range(12):
        path = tmp_path / "photos" / ("deep" if number % 3 == 0 else "") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (tmp_path / "photos/05.png").write_bytes(b"broken")
    return tmp_path / "photos"


@pytest.fixture
def script(run, capsys):
    return lambda *argv: run_script(
        inference, *argv, "--checkpoint", run, "--device", "cpu", capsys=capsys
    )


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_score_is_the_mean_over_the_words_and_the_end(captioner, script, photos, tmp_path):
    """One definition for CSV, JSON lines, --json, the web page and the Python interface."""
    caption = captioner.candidates(photos / "01.png")[0]
    expected = caption.log_prob / (len(caption.text.split()) + 1)
    flags = [photos / "01.png", "--output"]
    script(*flags, tmp_path / "a.csv")
    script(*flags, tmp_path / "a.jsonl", "--json", tmp_path / "a.json")
    rows = [json.loads((tmp_path / name).read_text()) for name in ("a.jsonl", "a.json")]
    (page,) = captioner.explain(photos / "01.png")
    scores = [
        caption.score,
        page.score,
        math.log(app.to_json(page)["probability"]),
        float(table(tmp_path / "a.csv")[0]["score"]),
        rows[0]["captions"][0]["score"],
        rows[1][0]["captions"][0]["score"],
    ]
    assert scores == pytest.approx([expected] * 6, abs=2e-4)


def test_each_picture_has_a_row_with_captions_scores_or_the_error(
    photos, captioner, script, tmp_path
):
    out = tmp_path / "new/captions.csv"
    code, said, err = script(photos, "--output", out, "--n", 2, "--batch-size", 5)
    assert (code, said) == (2, "") and "1 of 12 images could not be captioned" in err
    rows = table(out)
    assert [row["image"] for row in rows] == sorted(str(p) for p in photos.rglob("*.png"))
    for row in rows:
        if row["image"].endswith("05.png"):
            assert "05.png" in row["error"] and not row["caption"] and not row["caption_2"]
            continue
        best, second = captioner.candidates(row["image"], n=2)
        assert (row["caption"], row["caption_2"], row["error"]) == (best.text, second.text, "")
        words = len(best.text.split()) + 1
        assert float(row["score"]) == pytest.approx(best.log_prob / words, abs=2e-4)
        assert math.exp(float(row["score_2"])) <= 1


@pytest.mark.parametrize("form", ["csv", "jsonl", "html"])
@pytest.mark.parametrize("cut", [0, 30])
def test_a_stopped_file_is_continued_where_it_stopped(
    form, cut, photos, script, tmp_path, monkeypatch
):
    (photos / "05.png").unlink()
    whole, parted = tmp_path / f"whole.{form}", tmp_path / f"parted.{form}"
    assert script(photos, "--output", whole)[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:6])
    parted.write_bytes(kept + lines[6][:cut])  # a kill may leave half a line
    asked = []
    many = Captioner.caption_many

    def counted(self, images, **settings):
        asked.extend(images)
        return many(self, images, **settings)

    monkeypatch.setattr(Captioner, "caption_many", counted)
    assert script(photos, "--output", parted)[0] == 0
    assert parted.read_bytes() == whole.read_bytes()
    assert len(asked) == 11 - (6 if form == "jsonl" else 5)
    assert script(photos, "--output", parted)[0] == 0
    assert parted.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("form", ["csv", "jsonl", "html"])
@pytest.mark.parametrize("cut", [5, 40])
def test_a_file_killed_in_its_first_line_is_continued(form, cut, photos, script, tmp_path):
    (photos / "05.png").unlink()
    whole, parted = tmp_path / f"whole.{form}", tmp_path / f"parted.{form}"
    script(photos, "--output", whole)
    first = whole.read_bytes().splitlines()[0]
    parted.write_bytes(first[: min(cut, len(first) - 1)])
    assert script(photos, "--output", parted)[0] == 0
    assert parted.read_bytes() == whole.read_bytes()


def test_existing_rows_are_kept_and_sorted_among_the_new_ones(photos, script, tmp_path):
    out = tmp_path / "captions.jsonl"
    caption = {"text": "mine", "log_prob": -1.0, "score": -0.5}
    mine = [
        {"image": name, "captions": [caption], "error": None}
        for name in (str(photos / "01.png"), "x")
    ]
    out.write_text("".join(f"{json.dumps(row)}\n" for row in mine))
    script(photos, "--output", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0] == mine[1] and mine[0] in rows  # an image that is not among these comes first
    assert [row["image"] for row in rows[1:]] == sorted(str(p) for p in photos.rglob("*.png"))


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [("my,own,table\n1,2,3\n", "a.csv", "begins with 'my,own,table'"),
     ("image,caption,score,caption_2,score_2,error\n", "a.csv", "another --n"),
     ("hello\n", "a.jsonl", "line 1 of .* is no result"), ("hello", "a.csv", "another file"),
     ("hello", "a.jsonl", "another file"),
     ("{}\n", "a.jsonl", "line 1 of .* is no result"), ("<p>\n", "a.html", "begins with '<p>'")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_and_kept(content, name, said, photos, script, tmp_path):
    (tmp_path / name).write_text(content)
    code, _, err = script(photos, "--output", tmp_path / name)
    assert code == 2 and re.search(said, err) and err.count("\n") == 1
    assert (tmp_path / name).read_text() == content


def test_a_gallery_shows_each_picture_with_its_caption(photos, captioner, script, tmp_path):
    (photos / "01.png").rename(photos / 'a "b" & <c>.png')
    out = tmp_path / "pages/gallery.html"
    script(photos, "--output", out)
    page = out.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 11
    from urllib.parse import unquote

    for source in sources:
        path = (out.parent / unquote(html.unescape(source))).resolve()
        assert path.is_file()
        assert f'alt="{captioner.caption(path)}"' in page
    assert "<c>" not in page and "05.png" in page


def test_captions_can_be_printed_as_rows(photos, script):
    code, out, _ = script(photos / "01.png", photos / "02.png", "--format", "jsonl")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [str(photos / "01.png"), str(photos / "02.png")]
    code, out, _ = script(photos / "01.png", "--format", "csv")
    assert code == 0 and out.splitlines()[0] == "image,caption,score,error"


def test_sidecars_lie_beside_their_pictures(photos, captioner, script):
    (photos / "05.png").unlink()
    assert script(photos, "--write-sidecar")[0] == 0
    texts = sorted(photos.rglob("*.txt"))
    assert len(texts) == 11
    for path in texts:
        assert (
            path.read_text(encoding="utf-8") == captioner.caption(path.with_suffix(".png")) + "\n"
        )


def test_two_pictures_with_one_sidecar_are_refused(photos, script):
    picture(1).save(photos / "01.jpg")
    code, _, err = script(photos, "--write-sidecar")
    assert code == 2 and "would both have" in err and not list(photos.rglob("*.txt"))


def test_folders_below_are_taken_unless_told_not_to(photos, script):
    (photos / "05.png").unlink()
    counts = [
        len(script(photos, flag)[1].splitlines()) for flag in ("--recursive", "--no-recursive")
    ]
    assert counts == [11, 7]


@pytest.mark.parametrize("workers", [0, 3])
def test_captions_are_the_same_however_many_threads_read(workers, photos, captioner):
    paths = sorted(photos.rglob("*.png"))
    found = list(
        captioner.caption_many(paths, workers=workers, batch_size=2, return_exceptions=True)
    )
    kinds = [type(each) for each in found]
    assert kinds.count(list) == 11 and isinstance(found[paths.index(photos / "05.png")], Exception)
    for path, each in zip(paths, found, strict=True):
        if isinstance(each, list):
            assert each[0].text == captioner.caption(path)


def test_threads_read_no_further_ahead_than_asked():
    asked = []

    def items():
        for number in range(100):
            asked.append(number)
            yield number

    def slow(number):
        time.sleep(0.001)
        return 2 * number

    found = read_ahead(slow, items(), 3, 8)
    assert [next(found), next(found)] == [0, 2] and len(asked) <= 10
    assert list(found) == [2 * number for number in range(2, 100)]


def test_the_error_of_a_picture_holds_none_of_its_pixels(photos, captioner, script, tmp_path):
    whole = (photos / "01.png").read_bytes()
    (photos / "05.png").write_bytes(whole[: len(whole) // 2])
    (error,) = captioner.caption_many([photos / "05.png"], return_exceptions=True)
    assert "05.png" in str(error) and error.__traceback__ is None
    assert error.__cause__ is None and error.__context__ is None


def test_a_line_break_in_a_name_costs_only_that_picture(photos, script, tmp_path):
    (photos / "05.png").unlink()
    picture(1).save(photos / "a\nb.png")
    code, _, err = script(photos, "--output", tmp_path / "a.csv")
    assert code == 2 and "left out: the file name" in err and "has a line break" in err
    assert len(table(tmp_path / "a.csv")) == 11


def test_a_form_that_no_name_tells_is_asked_for(photos, script, tmp_path):
    code, _, err = script(photos, "--output", tmp_path / "captions.txt")
    assert code == 2 and "--format {csv,jsonl,html}" in err
    assert script(photos / "01.png", "--output", tmp_path / "c.txt", "--format", "csv")[0] == 0
    assert table(tmp_path / "c.txt")[0]["image"] == str(photos / "01.png")


# --- what a word looked at


def test_a_page_shows_where_each_word_looked(photos, script, tmp_path):
    page = tmp_path / "new/attention.png"
    code, said, _ = script(photos / "01.png", "--attention", page)
    assert code == 0 and said.count("\n") == 1
    assert Image.open(page).width == 1600


def test_attention_is_of_one_picture_and_of_a_model_that_has_it(photos, script, tmp_path, capsys):
    code, _, err = script(photos, "--attention", tmp_path / "a.png")
    assert code == 2 and "--attention is of a single image, but 12 were given" in err
    tiny_model(decoder="lstm").save(tmp_path / "lstm.safetensors")
    code, _, err = run_script(
        inference, photos / "01.png", "--checkpoint", tmp_path / "lstm.safetensors",
        "--attention", tmp_path / "a.png", capsys=capsys,
    )  # fmt: skip
    assert code == 2 and "no attention to show" in err and not (tmp_path / "a.png").exists()
