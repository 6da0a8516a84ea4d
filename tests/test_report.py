"""The page of best and worst captions needs no other file, and ranks as the scorer does."""

import base64
import html
import io
import re

import pytest
from helpers.tiny import picture
from PIL import Image

import metrics
import report
from readers import Record
from report import write_report
from util.tokenizer import tokenize


@pytest.fixture
def records(tmp_path):
    made = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        picture(number, (900, 300)).save(path)
        lines = (f"a dog number{number} runs", "<b>it</b> runs & runs")
        made.append(Record(path.name, path, lines))
    return made


def captions_of(records):
    """The more of its reference, the better."""
    return {
        record.image_id: " ".join(record.captions[0].split()[: place % 5])
        for place, record in enumerate(records)
    }


def page(records, captions, tmp_path, monkeypatch, shown=3):
    monkeypatch.setattr(report, "SHOWN", shown)
    write_report(tmp_path / "new/page.html", records, captions, {"CIDEr": 0.5, "split": "val"})
    return (tmp_path / "new/page.html").read_text(encoding="utf-8")


def test_the_best_come_first_and_the_worst_from_the_end(records, tmp_path, monkeypatch):
    captions = captions_of(records)
    text = page(records, captions, tmp_path, monkeypatch)
    best, worst = (
        [float(value) for value in re.findall(r"CIDEr (\d+\.\d+) ·", part)]
        for part in text.split("<h2>")[1:]
    )
    references = [[tokenize(line) for line in record.captions] for record in records]
    scores = metrics.CiderD(references).scores(
        [tokenize(captions[record.image_id]) for record in records], range(10)
    )
    ranked = sorted(scores, reverse=True)
    assert best == pytest.approx(ranked[:3], abs=0.006)
    assert worst == pytest.approx(ranked[:-4:-1], abs=0.006)


def test_no_picture_is_shown_twice_where_there_are_few(records, tmp_path, monkeypatch):
    text = page(records[:5], captions_of(records), tmp_path, monkeypatch, shown=24)
    names = re.findall(r"· (\d\.png)", text)
    assert sorted(names) == [f"{number}.png" for number in range(5)]


def test_the_page_holds_its_pictures_and_asks_for_nothing(records, tmp_path, monkeypatch):
    text = page(records, captions_of(records), tmp_path, monkeypatch)
    sources = re.findall(r'src="([^"]+)"', text)
    assert len(sources) == 6 and "http" not in text and "url(" not in text
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(content)).size == (480, 160)


def test_text_is_shown_as_it_was_written(records, tmp_path, monkeypatch):
    captions = dict.fromkeys(captions_of(records), '<script>"x"')
    text = page(records, captions, tmp_path, monkeypatch)
    assert "<script>" not in text and html.escape("<b>it</b> runs & runs") in text
    assert "0.500" in text and "<th scope=col>CIDEr" in text
