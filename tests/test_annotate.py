"""`--annotate DIR` writes each picture with its caption, and never over a picture."""

import pytest
from helpers.tiny import picture, run_script
from PIL import Image

import inference
from inference import caption
from util import plots


@pytest.fixture
def photos(tmp_path):
    """Pictures of several formats, two of one name, in folders."""
    for number, name in enumerate(("a.jpg", "deep/a.jpg", "deep/b.gif", "c.PNG", "d.webp")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, (400, 300)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def annotate(run, capsys):
    def call(*places, into):
        return run_script(
            inference, *places, "--checkpoint", run, "--annotate", into, capsys=capsys
        )

    return call


def names(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def test_a_folder_is_written_out_as_it_lies(photos, run, annotate, tmp_path):
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    code, _, err = annotate(photos, into=tmp_path / "new/out")
    assert (code, err) == (0, "")
    assert names(tmp_path / "new/out") == [
        "a.jpg",
        "c.PNG",
        "d.webp",
        "deep/a.jpg",
        "deep/b.gif.png",
    ]
    assert before == {path: path.read_bytes() for path in photos.rglob("*.*")}
    text = caption(photos / "c.PNG", checkpoint=run)
    expected = plots.annotate(Image.open(photos / "c.PNG"), text)
    with Image.open(tmp_path / "new/out/c.PNG") as made:
        assert made.tobytes() == expected.tobytes() and made.height > 300


def test_files_of_one_name_are_numbered(photos, annotate, tmp_path):
    code, *_ = annotate(photos / "a.jpg", photos / "deep/a.jpg", into=tmp_path / "out")
    assert code == 0 and names(tmp_path / "out") == ["a-2.jpg", "a.jpg"]


def test_captioned_pictures_are_not_captioned_again(photos, annotate, monkeypatch):
    monkeypatch.chdir(photos)
    for _ in range(2):
        code, out, _ = annotate(".", into="captioned")
        assert code == 0 and len(out.splitlines()) == 5
    assert len(names(photos / "captioned")) == 5


@pytest.mark.parametrize("into", ["photos", "photos/../photos", "link"])
def test_a_picture_is_never_overwritten(into, photos, annotate, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    code, out, err = annotate(photos, into=tmp_path / into)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "would overwrite" in err and "a file of your own" in err
    assert before == {path: path.read_bytes() for path in photos.rglob("*.*")}


def test_a_strangers_file_is_never_overwritten_and_an_earlier_result_is(photos, annotate, tmp_path):
    out = tmp_path / "out"
    assert annotate(photos, into=out)[0] == 0
    assert annotate(photos, into=out)[0] == 0
    assert len(names(out)) == 5
    picture(9).save(out / "a.jpg")
    before = (out / "a.jpg").read_bytes()
    code, _, err = annotate(photos / "a.jpg", into=out)
    assert code == 2 and "would overwrite" in err and (out / "a.jpg").read_bytes() == before


def test_a_picture_in_the_folder_that_is_written_to_can_be_named(photos, annotate):
    code, *_ = annotate(photos / "deep", into=photos)
    assert code == 2  # a.jpg is there already
    code, *_ = annotate(photos / "deep/b.gif", into=photos)
    assert code == 0 and (photos / "b.gif.png").exists()


def test_the_folder_may_be_spelled_in_another_way(photos, annotate, monkeypatch):
    monkeypatch.chdir(photos)
    for into in ("captioned", photos / "captioned", "../photos/captioned"):
        code, out, _ = annotate(".", into=into)
        assert code == 0 and len(out.splitlines()) == 5


def test_the_caption_is_in_the_pictures_description(photos, annotate, run, tmp_path):
    annotate(photos, into=tmp_path / "out")
    for name in ("a.jpg", "c.PNG", "d.webp"):
        with Image.open(tmp_path / "out" / name) as made:
            found = made.getexif()[0x010E].encode("latin-1").decode()  # read as Latin-1
            assert found == caption(photos / name, checkpoint=run)


def test_a_picture_that_cannot_be_written_costs_only_itself(photos, run, tmp_path, capsys):
    picture(3, (20, 16380)).save(photos / "b.png")
    (photos / "b.png").rename(photos / "b.webp")  # WebP ends at 16,383 pixels
    code, out, err = run_script(
        inference, photos, "--checkpoint", run, "--annotate", tmp_path / "out", "--json",
        tmp_path / "out.json", capsys=capsys,
    )  # fmt: skip
    assert code == 2 and len(out.splitlines()) == 6 and (tmp_path / "out.json").exists()
    assert f"{tmp_path / 'out/b.webp'} can't be written" in err
    assert len(names(tmp_path / "out")) == 5


def test_a_file_in_the_place_of_the_folder_is_named(photos, annotate, tmp_path):
    (tmp_path / "out").write_text("")
    code, out, err = annotate(photos, into=tmp_path / "out")
    assert (code, out) == (2, "") and "cannot write (Not a directory)" in err


def test_a_bad_picture_costs_only_itself(photos, annotate, tmp_path):
    (photos / "bad.jpg").write_text("no picture")
    code, _, err = annotate(photos, into=tmp_path / "out")
    assert code == 2 and "1 of 6 images could not be captioned" in err
    assert len(names(tmp_path / "out")) == 5
