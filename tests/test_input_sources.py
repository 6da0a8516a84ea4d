"""The script's images that are no files: addresses, data: URIs, standard input, patterns."""

import base64
import io
import json
import sys

import pytest
from helpers.tiny import picture, run_script

import inference
from util import bulk, image_sources
from util.results import read_rows


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of three images, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        picture(number).save(f"{number}.png")
    return tmp_path


@pytest.fixture
def script(run, capsys):
    return lambda *argv: run_script(inference, *argv, "--checkpoint", run, capsys=capsys)


def pipe(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_all_ways_have_the_captions_of_the_files(photos, script, captioner, monkeypatch):
    contents = [(photos / f"{number}.png").read_bytes() for number in range(3)]
    expected = [captioner.caption(content) for content in contents]
    monkeypatch.setattr(image_sources, "fetch", lambda *_, **__: contents[0])
    uri = "data:image/png;base64," + base64.b64encode(contents[1]).decode()
    url = "https://me:secret@host/a//b.png?x=1"
    pipe(monkeypatch, contents[2])
    flags = ("--output", "out.csv", "--json", "out.json")
    assert script(url, uri, "-", *flags)[0] == 0
    entries = json.loads((photos / "out.json").read_text())
    assert [each["captions"][0]["text"] for each in entries] == expected
    names = [each["image"] for each in entries]
    assert names[0] == "https://host/a//b.png?x=1"
    assert names[1].startswith("data:image/png (sha256 ")
    assert names[2].startswith("- (sha256 ")
    for place, text in zip((url, uri), expected[:2], strict=True):
        assert script(place) == (0, f"{text}\n", "")
    # Another image from standard input is another row.
    pipe(monkeypatch, contents[0])
    assert "of 0 of 1 images" in script("-", "--output", "out.csv")[2]
    pipe(monkeypatch, contents[0])
    assert "of 1 of 1 images" in script("-", "--output", "out.csv")[2]
    assert len([row for row, _ in read_rows(photos / "out.csv", "csv", 1) if row]) == 4


def test_a_gallery_links_to_an_address(photos, script, monkeypatch):
    monkeypatch.setattr(image_sources, "fetch", lambda *_, **__: (photos / "0.png").read_bytes())
    assert script("https://host/a.png?x=1&y", "--output", "out.html")[0] == 0
    assert 'src="https://host/a.png?x=1&amp;y"' in (photos / "out.html").read_text()


def test_attention_reads_standard_input_once(photos, script, monkeypatch):
    pipe(monkeypatch, (photos / "0.png").read_bytes())
    assert script("-", "--attention", "page.png")[0] == 0


@pytest.mark.parametrize("flags", [["--write-sidecar"], ["--annotate", "copies"]])
def test_files_beside_an_image_need_an_image_file(photos, script, flags):
    code, _, err = script("0.png", "https://host/a.png", *flags)
    assert code == 2
    assert f"{flags[0]} is for image files, and https://host/a.png is none" in err
    assert not (photos / "0.txt").exists()


def test_standard_input_that_holds_nothing(script, monkeypatch):
    pipe(monkeypatch, b"")
    assert "standard input is empty" in script("-")[2]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    pipe(monkeypatch, b"text")
    assert "the image from standard input is not an image that can be read" in script("-")[2]


def test_patterns_that_the_shell_left_alone(photos, script):
    code, out, _ = script("*.png")
    assert (code, [line.split("\t")[0] for line in out.splitlines()]) == (
        0, ["0.png", "1.png", "2.png"],
    )  # fmt: skip
    code, out, err = script("[01].png", "*.jpg")
    assert (code, len(out.splitlines())) == (2, 2)
    assert "left out: no file matches *.jpg" in err
    assert script("*.jpg") == (2, "", "error: no file matches *.jpg\n")
    picture(5).save(photos / "[01].png")  # a file that is called so
    assert len(script("[01].png")[1].splitlines()) == 1


def test_a_file_called_like_a_data_uri(photos, script):
    (photos / "0.png").rename(photos / "data:,0.png")
    code, out, _ = script(".")
    assert (code, out.splitlines()[-1].split("\t")[0]) == (0, "data:,0.png")


def test_ctrl_c_says_how_far_it_is(photos, script, run, capsys, monkeypatch):
    original = bulk.write_files

    def stop_at_the_last(image, *args):
        if image == "2.png":
            raise KeyboardInterrupt
        return original(image, *args)

    monkeypatch.setattr(bulk, "write_files", stop_at_the_last)
    flags = [".", "--output", "out.csv", "--checkpoint", str(run)]
    with pytest.raises(KeyboardInterrupt):
        inference.main(flags)
    said = "2 of 3 images are captioned and in out.csv; the same command goes on with the others"
    assert said in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(photos)
    assert "has captions of 2 of 3 images already" in script(".", "--output", "out.csv")[2]
