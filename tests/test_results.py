"""Files of captions are read back as they were written, and kept where they are somebody else's."""

import csv
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from readers import read_table
from util import program, results
from util.files import UserError
from util.results import Caption, Result

# What a spreadsheet runs, or would if the apostrophe in front were not there.
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", " =1", "'=1", "''+1", "＝1", "'\t=x"]
PLAIN = ["a dog", "", "'a' dog", "a=b", "'", "\u3042", 'a "b", c', "é; <b>"]
ROW = Result("a.png", [Caption("a dog", -1.5)])
SETTINGS = {"checkpoint": "runs/a", "n": 1, "model": ["12"], "method": "beam", "beam_size": 5}


def write(path, form, rows, n=1):
    with results.open_results(path, form, n) as put:
        for row in rows:
            put(row)


def read(path, form, n=1):
    return [row for row, _ in results.read_rows(path, form, n) if row is not None]


# --- cells


@given(st.one_of(st.text(), st.builds(str.__add__, st.text("'=+-@ \t\r\n"), st.text())))
def test_a_cell_is_read_back_as_it_was(text):
    cell = results.escape_cell(text)
    assert results.unescape_cell(cell) == text
    assert cell.strip()[:1] not in set("=+-@＝＋－＠") and cell[:1] not in set("\t\r\n")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_neutralised_in_every_column_of_text(text, tmp_path):
    path, rows = tmp_path / "a.csv", [Result(text, [Caption(text, -2.0)]), Result("b", (), text)]
    write(path, "csv", rows)
    with path.open(newline="", encoding="utf-8") as file:
        _, first, second = csv.reader(file)
    assert (first[0][0], first[1][0]) == ("'", "'")
    assert second[3] == results.escape_cell(program.one_line(text))
    assert float(first[2]) < 0  # a number is not text
    back = read(path, "csv")
    assert (back[0].image, back[0].captions[0].text) == (text, text)
    assert back[1].error == program.one_line(text)


def test_the_dataset_reader_undoes_what_the_spreadsheet_needs(tmp_path):
    path, names = tmp_path / "captions.csv", ["-a.png", "@b.png", "'=c.png", "d.png"]
    write(path, "csv", [Result(name, [Caption("- a dog", -2.0)]) for name in names])
    table = read_table(path)
    assert table["file"].tolist() == names and set(table["caption"]) == {"- a dog"}
    path.write_text("image,caption\n'-a.png,'=b\n")  # a table of somebody's own means what it says
    assert read_table(path)[["file", "caption"]].to_numpy().tolist() == [["'-a.png", "'=b"]]


# --- lines


@pytest.mark.parametrize("form", results.FORMATS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_line_is_read_back_as_it_was_written(form, n, tmp_path):
    path, texts = tmp_path / "a", FORMULAS + PLAIN
    rows = [
        Result(f"{text}.png", [Caption(text, -1.0), Caption("two", -4.0), Caption("c", -2.0)][:n])
        for text in texts
    ]
    rows += [Result("bad.png", (), 'it\'s <no> image, "really"'), Result("-bad.png", (), "=x")]
    write(path, form, rows, n)
    back = read(path, form, n)
    assert [row.image for row in back] == [row.image for row in rows]
    assert [row.error for row in back] == [row.error for row in rows]
    for row, expected in zip(back, rows, strict=True):
        found = [each.text for each in row.captions]
        assert found == [each.text for each in expected.captions]
        scores = [each.score for each in row.captions]
        if form == "html":
            assert not row.has_scores or not row.captions
        else:
            assert scores == pytest.approx([each.score for each in expected.captions], abs=1e-4)


@pytest.mark.parametrize("form", results.FORMATS)
def test_a_line_break_in_a_word_keeps_a_row_one_line(form, tmp_path):
    write(tmp_path / "a", form, [Result("a.png", [Caption("a\r\ndog\nruns", -1.0)]), ROW])
    assert [row.image for row in read(tmp_path / "a", form)] == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("form", "line"),
    [("csv", "a.png,a dog,-0.5"), ("csv", "a.png,a, dog,-0.5,"), ("csv", "a.png,a dog,high,"),
     ("jsonl", '{"image": "a.png"}'), ("jsonl", '{"image": 3, "captions": [], "error": null}'),
     ("jsonl", '{"image": "a.png", "captions": [{"text": "a"}]}'), ("jsonl", "[]"),
     ("html", '<figure data-image="a.png"><p>x</p>'), ("html", '<figure data-image="a"></figure>')],
)  # fmt: skip
def test_another_line_is_refused_with_its_number_and_the_file_kept(form, line, tmp_path):
    path = tmp_path / "a"
    write(path, form, [ROW])
    for end in ("\n", "\nhalf"):
        content = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*content, f"{line}{end}"]))
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"line {len(content) + 1} of .* is no result"):
            results.merge_parts(path, form, 1, [])
        assert path.read_bytes() == before
        path.write_text("".join(content))


# --- the last line


@pytest.mark.parametrize("form", results.FORMATS)
def test_a_last_row_without_its_line_break_is_kept(form, tmp_path):
    path = tmp_path / "a"
    write(path, form, [ROW, Result("b.png", [Caption("hand made", -1.0)])])
    whole = path.read_text()
    path.write_text(whole.rstrip("\n"))
    assert list(results.merge_parts(path, form, 1, ["a.png", "b.png"])) == ["a.png", "b.png"]
    assert path.read_text() == whole


def test_a_caption_added_by_hand_needs_no_score(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,caption,score,error\na.png,my own words,,")
    (line,) = results.merge_parts(path, "csv", 1, []).values()
    row = results.parse_line("csv", line, 1)
    assert row.captions[0].text == "my own words" and math.isnan(row.captions[0].score)
    assert path.read_text().endswith("a.png,my own words,,\n")


def test_half_a_row_is_left_out_with_a_line_that_shows_it(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_text("image,caption,score,error\na.png,a dog,-0.5,\nb.png,a c")
    assert list(results.merge_parts(path, "csv", 1, [])) == ["a.png"]
    assert path.read_text() == "image,caption,score,error\na.png,a dog,-0.5,\n"
    assert "half a row, which is left out: b.png,a c" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "name,price\nx,1\ny,2"), ("a.csv", "image,caption\nx.png,mine"),
     ("a.jsonl", '{"image": "x.png", "label": 3}\n{"image": "y.png", "label": 4}'),
     ("a.jsonl", '{"name": 1}\n{"na'), ("a.html", "<!doctype html>\n<p>mine"), ("a.csv", "x")],
)  # fmt: skip
def test_somebody_elses_file_is_refused_with_nothing_changed(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="name another --output"):
        results.merge_parts(tmp_path / name, name[2:], 1, [])
    assert (tmp_path / name).read_text() == content and os.listdir(tmp_path) == [name]


def test_a_foreign_part_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,caption,score,error\na.png,a dog,-0.5,\nb.png,a c")
    results.part_file(path, 0).write_text("mine\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match="part-0 begins with"):
        results.merge_parts(path, "csv", 1, [])
    assert path.read_bytes() == before


# --- several rows of an image


def test_captions_come_before_errors_and_the_first_without_one_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    one, two = ([Caption(text, -1.0)] for text in ("one", "two"))
    rows = [Result("a", (), "old"), Result("a", one), Result("a", two), Result("a", (), "x"),
            Result("b", (), "old"), Result("b", (), "new"),
            Result("c", one, "no copy"), Result("c", (), "gone"), Result("c", two, "still none"),
            Result("d", one, "no copy"), Result("d", one)]  # fmt: skip
    write(path, "jsonl", rows)
    merged = results.merge_parts(path, "jsonl", 1, ["d", "c", "b", "a"])
    found = [results.parse_line("jsonl", line, 1) for line in merged.values()]
    shown = {row.image: ([each.text for each in row.captions], row.error) for row in found}
    assert shown == {"a": (["one"], ""), "b": ([], "new"), "c": (["two"], "still none"),
                     "d": (["one"], "")}  # fmt: skip
    assert [json.loads(line)["image"] for line in path.read_text().splitlines()] == [*"dcba"]


# --- formats and settings


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.png", "csv"), ("a.JPG", "html"), ("a.html", "csv"), ("a.csv", "jsonl"), ("a.HEIC", "csv")],
)
def test_a_name_of_another_form_is_refused(name, form, tmp_path):
    with pytest.raises(UserError, match="must not end in"):
        results.pick_format(tmp_path / name, form)


def test_settings_are_kept_and_compared(tmp_path, caplog):
    path, other = tmp_path / "a.csv", {**SETTINGS, "model": ["34"], "checkpoint": "runs/b"}
    assert results.check_settings(path, SETTINGS, False) == []
    assert "does not say which model" in caplog.text
    results.write_settings(path, [])
    assert not results.settings_file(path).exists()
    results.write_settings(path, [SETTINGS])
    moved = {**SETTINGS, "checkpoint": "elsewhere", "new": 1}
    assert results.check_settings(path, moved, False) == [SETTINGS]
    with pytest.raises(UserError, match="by another model, runs/a, not runs/b; name another"):
        results.check_settings(path, other, False)
    with pytest.raises(UserError, match="made with --beam-size 5, not 3; .* or add --mix"):
        results.check_settings(path, {**SETTINGS, "beam_size": 3}, False)
    assert results.check_settings(path, other, True) == [SETTINGS, other]
    results.write_settings(path, [SETTINGS, other])
    with pytest.raises(UserError, match="another model"):
        results.check_settings(path, SETTINGS, False)
    assert results.check_settings(path, SETTINGS, True) == [SETTINGS, other]


@pytest.mark.parametrize("content", ["{}", "[1]", '["a"]', "x"])
def test_damaged_settings_are_named(content, tmp_path):
    results.settings_file(tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=r"a\.csv\.settings\.json is "):
        results.check_settings(tmp_path / "a.csv", SETTINGS, False)
