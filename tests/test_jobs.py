"""What a call has to do is planned before a file is touched; nobody's files are lost."""

import json
import os
import shutil

import pytest
from helpers.tiny import picture, run_script, tiny_model
from PIL import Image

import inference
from inference import Captioner
from util import jobs, results, xmp
from util.files import UserError
from util.jobs import OutputConfig

SETTINGS = {"checkpoint": "runs/a", "n": 1, "model": ["12"], "method": "beam"}


@pytest.fixture
def photos(tmp_path):
    """Four pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def script(run, capsys):
    def call(*argv, checkpoint=run):
        return run_script(
            inference, *argv, "--checkpoint", checkpoint, "--device", "cpu", "--batch-size", 1,
            capsys=capsys,
        )  # fmt: skip

    return call


@pytest.fixture
def asked(monkeypatch):
    """The pictures that are captioned."""
    asked, many = [], Captioner.caption_many

    def counted(self, images, **settings):
        asked.extend(os.path.basename(image) for image in images)
        return many(self, images, **settings)

    monkeypatch.setattr(Captioner, "caption_many", counted)
    return asked


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plan(places, **flags):
    return jobs.plan_job(places, OutputConfig(**flags), SETTINGS)


# --- an output that is an input, or of another form


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json", "a.jpg", "b.jpg"], "a.jpg is to be written, so its name must end in .json"),
        (["--attention", "a.jpg", "b.jpg"], "a.jpg is to be written, so its name must end in .png"),
        (["--attention", "a.txt", "b.jpg"], "must end in .png"),
        (["--attention", "c.png", "b.jpg"], "would overwrite a file of your own"),
        (["--attention", "c.png", "c.png"], "c.png can't be written: this command uses the same"),
        (["--attention", "hard.png", "c.png"], "this command uses the same file as c.png"),
        (["--attention", "link.png", "c.png"], "this command uses the same file as c.png"),
        (["--attention", "../here/c.png", "."], "would overwrite a file of your own"),
        (["--json", "photo.json", "photo.json"], "uses the same file as photo.json"),
        (["--json", "photo.json", "b.jpg"], "photo.json is not a JSON file"),
        (["--json", "mine.json", "b.jpg"], "mine.json would overwrite a file that is no list of"),
        (["--json", "list.json", "b.jpg"], "list.json would overwrite a file that is no list of"),
        (["--output", "a.jpg", "b.jpg"], "--format"),
        (["--output", "a.jpg", "b.jpg", "--format", "csv"], "must not end in .jpg"),
        (["--output", "photo.csv", "photo.csv"], "uses the same file as photo.csv"),
        (["--output", "new.json", "b.jpg", "--format", "jsonl", "--json", "new.json"], "same file"),
        (["--output", "b.txt", "b.jpg", "--format", "csv", "--write-sidecar"], "same file as"),
        (["photo.txt", "--write-sidecar", "--overwrite"], "would replace the image photo.txt"),
        (["b.jpg", "--overwrite"], "--overwrite is about --write-sidecar, which is not given"),
        (["b.jpg", "--prefix", "a "], "--prefix is about --write-sidecar, which is not given, nor"),
        (["b.jpg", "--write-sidecar", "--suffix", "a\nb"], "--suffix 'a\\nb' must be one line"),
        (["b.jpg", "--mix"], "--mix is about --output, which is not given"),
    ],
)  # fmt: skip
def test_a_command_that_would_lose_a_file_is_refused(flags, said, script, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("a.jpg", "b.jpg", "c.png", "photo.json", "photo.csv", "photo.txt"):
        picture(1).save(name, "PNG" if name != "a.jpg" else "JPEG")
    os.link("c.png", "hard.png")
    os.symlink("c.png", "link.png")
    (folder / "mine.json").write_text('{"name": "package"}')
    (folder / "list.json").write_text('[{"image": "a.png", "label": 3}]')
    if "." in flags:
        for path in folder.iterdir():
            if path.name != "c.png":
                path.unlink()
    before = contents(folder)
    code, out, err = script(*flags)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert contents(folder) == before


def test_the_model_is_no_output_either(run, photos, tmp_path, script):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{}")
    for output in ("config.json", "best.safetensors"):
        code, _, err = script(
            photos, "--json", tmp_path / "run" / output, checkpoint=tmp_path / "run"
        )
        assert code == 2 and output in err
    assert (tmp_path / "run/config.json").read_text() == "{}"


def test_a_page_of_attention_maps_may_be_written_again(photos, script, tmp_path):
    for number in (1, 2):
        code, *_ = script(photos / f"{number}.png", "--attention", tmp_path / "page.png")
        assert code == 0 and Image.open(tmp_path / "page.png").width == 1600


# --- text files


def test_texts_that_exist_are_kept_and_counted(photos, script, captioner):
    (photos / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (photos / "1.txt").write_text("my own words\n")
    (photos / "1.txt").chmod(0o444)
    for _ in range(2):
        code, out, err = script(photos, "--write-sidecar", "--no-skip-existing")
        assert code == 0 and len(out.splitlines()) == 4
        assert err == "kept 2 text files that exist; --overwrite replaces them\n"
        assert (photos / "0.txt").read_text() == "0 0.5 0.5 0.2 0.2\n"
        assert (photos / "2.txt").read_text() == captioner.caption(photos / "2.png") + "\n"
    code, _, err = script(photos, "--write-sidecar", "--overwrite")
    assert (code, err) == (0, "kept 1 text files that are write-protected\n")
    assert (photos / "0.txt").read_text() == captioner.caption(photos / "0.png") + "\n"
    assert (photos / "1.txt").read_text() == "my own words\n"


def test_images_that_have_their_text_are_not_captioned_again(photos, script, asked, monkeypatch):
    (photos / "0.txt").write_text("mine\n")
    code, out, err = script(photos, "--write-sidecar")
    assert code == 0 and asked == ["1.png", "2.png", "3.png"] and len(out.splitlines()) == 3
    said = "whose text files exist; --overwrite captions them again"
    assert err == f"skipped 1 of 4 images, {said}\n"
    asked.clear()
    monkeypatch.setattr(Captioner, "load", lambda *_: pytest.fail("a model was loaded"))
    code, out, err = script(photos, "--write-sidecar", "--skip-existing")
    assert (code, out, err) == (0, "", f"skipped 4 of 4 images, {said}\n") and not asked
    assert (photos / "0.txt").read_text() == "mine\n"


def test_what_else_is_written_is_of_all_images(photos, script, asked, tmp_path):
    (photos / "0.txt").write_text("mine\n")
    for flags in (["--output", tmp_path / "a.csv"], ["--json", tmp_path / "a.json"]):
        asked.clear()
        assert script(photos, "--write-sidecar", *flags)[0] == 0
        assert len(asked) == 4


def test_a_prefix_and_a_suffix_are_written_not_printed(photos, script, captioner, tmp_path):
    words = ("--prefix", "写真　photo of ", "--suffix", ", 35 mm", "--min-words", 3)
    code, out, _ = script(photos / "0.png", "--write-sidecar", "--write-metadata", *words)
    caption = captioner.caption(photos / "0.png", min_words=3)
    text = f"写真　photo of {caption}, 35 mm"
    assert (code, out) == (0, f"{caption}\n") and len(caption.split()) >= 3
    assert (photos / "0.txt").read_text() == f"{text}\n"
    assert text in Image.open(photos / "0.png").info["XML:com.adobe.xmp"]


# --- descriptions in the photos


def test_captions_are_written_into_photos_and_own_descriptions_are_kept(
    photos, script, asked, captioner
):
    Image.open(photos / "3.png").save(photos / "4.tif")
    pixels = {path: Image.open(path).tobytes() for path in photos.iterdir()}
    captions = {path: captioner.caption(path) for path in pixels}
    xmp.write_description(str(photos / "0.png"), "my own words", overwrite=False)
    code, out, err = script(photos, "--write-metadata")
    said = "whose descriptions exist; --overwrite captions them again"
    assert (code, err) == (0, f"skipped 1 of 5 images, {said}\n") and len(out.splitlines()) == 4
    for path, caption in captions.items():
        beside = path.with_name("4.tif.xmp") if path.suffix == ".tif" else path
        text = caption if path.name != "0.png" else "my own words"
        assert f">{text}<".encode() in beside.read_bytes()
        assert Image.open(path).tobytes() == pixels[path]
    code, _, err = script(photos, "--write-metadata", "--no-skip-existing")
    assert (code, err) == (0, "kept 1 descriptions that exist; --overwrite replaces them\n")
    asked.clear()
    code, out, err = script(photos, "--write-metadata", "--write-sidecar")
    assert code == 0 and len(asked) == 5  # the texts are lacking
    code, out, err = script(photos, "--write-metadata", "--write-sidecar")
    assert out == "" and "5 of 5 images, whose text files and descriptions exist" in err
    assert script(photos, "--write-metadata", "--overwrite")[0] == 0
    assert f">{captions[photos / '0.png']}<".encode() in (photos / "0.png").read_bytes()


def test_descriptions_of_a_continued_file_are_written_from_its_captions(
    photos, script, asked, tmp_path
):
    out = tmp_path / "a.csv"
    assert script(photos, "--output", out)[0] == 0
    asked.clear()
    assert script(photos, "--output", out, "--write-metadata")[0] == 0
    assert asked == []
    assert all(xmp.has_description(str(photos / f"{number}.png")) for number in range(4))


def test_a_photo_whose_metadata_cannot_be_changed_is_one_line(photos, script):
    xmp.write_description(str(photos / "0.png"), "mine", overwrite=False)
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole.replace(b"</x:xmpmeta>", b"</x:xmpmeta "))
    before = (photos / "0.png").read_bytes()
    code, out, err = script(photos, "--write-metadata")
    assert code == 2 and len(out.splitlines()) == 4
    assert f"left out: {photos / '0.png'} is left as it is: its XMP is malformed" in err
    assert "1 of 4 images could not be captioned" in err and err.count("\n") == 2
    assert (photos / "0.png").read_bytes() == before
    assert xmp.has_description(str(photos / "3.png"))


# --- a file that is continued


@pytest.mark.parametrize("form", results.FORMATS)
def test_an_image_with_an_error_is_tried_again(form, photos, script, asked, tmp_path, captioner):
    out, whole = tmp_path / f"a.{form}", (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(b"broken")
    assert script(photos, "--output", out)[0] == 2
    code, _, err = script(photos, "--output", out)
    assert code == 2 and "1 of 1 images could not be captioned" in err
    assert f"{out} has captions of 3 of 4 images already" in err
    (photos / "1.png").write_bytes(whole)
    assert script(photos, "--output", out)[0] == 0
    assert asked == ["0.png", "1.png", "2.png", "3.png", "1.png", "1.png"]
    assert script(photos, "--output", tmp_path / f"b.{form}")[0] == 0
    assert out.read_bytes() == (tmp_path / f"b.{form}").read_bytes()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_json_of_a_continued_file_has_all_captions(form, photos, script, tmp_path):
    out, found, lost = tmp_path / f"a.{form}", tmp_path / "a.json", tmp_path / "lost.json"
    assert script(photos / "0.png", photos / "2.png", "--output", out, "--json", found)[0] == 0
    first = json.loads(found.read_text())
    assert script(photos, "--output", out, "--json", found)[0] == 0
    rows = json.loads(found.read_text())
    assert [row["image"] for row in rows] == [str(photos / f"{n}.png") for n in range(4)]
    assert [rows[0], rows[2]] == first
    assert script(photos, "--output", out, "--json", lost)[0] == 0  # from the rows alone
    for row, expected in zip(json.loads(lost.read_text()), rows, strict=True):
        assert row["captions"][0]["text"] == expected["captions"][0]["text"]
        assert row["captions"][0]["score"] == pytest.approx(
            expected["captions"][0]["score"], abs=1e-4
        )
    assert script(photos / "3.png", "--output", out, "--json", found)[0] == 0
    assert sorted(row["image"] for row in json.loads(found.read_text())) == [
        row["image"] for row in rows
    ]


def test_what_a_gallery_cannot_give_the_json_is_said(photos, script, tmp_path):
    out, found = tmp_path / "a.html", tmp_path / "a.json"
    assert script(photos / "0.png", "--output", out)[0] == 0
    code, _, err = script(photos, "--output", out, "--json", found)
    assert code == 0 and f"no scores of 1: they are left out of {found}" in err
    assert len(json.loads(found.read_text())) == 3


@pytest.mark.parametrize("form", results.FORMATS)
def test_copies_and_texts_of_a_continued_file_are_made_from_its_captions(
    form, photos, script, asked, tmp_path
):
    out = tmp_path / f"a.{form}"
    assert script(photos, "--output", out)[0] == 0
    text = out.read_text(encoding="utf-8")
    caption = results.parse_line(form, text.splitlines()[-1], 1).captions[0].text
    out.write_text(text.replace(caption, "my own words"), encoding="utf-8")
    before = out.read_bytes()
    (photos / "2.txt").write_text("mine\n")
    asked.clear()
    code, _, _ = script(photos, "--output", out, "--annotate", tmp_path / "copies",
                        "--write-sidecar")  # fmt: skip
    assert code == 0 and asked == [] and out.read_bytes() == before
    assert len(list((tmp_path / "copies").iterdir())) == 4
    assert (photos / "3.txt").read_text() == "my own words\n"
    assert (photos / "2.txt").read_text() == "mine\n"


def test_a_caption_that_is_no_text_costs_only_its_image(photos, script, tmp_path):
    out = tmp_path / "a.csv"
    assert script(photos, "--output", out)[0] == 0
    rows = out.read_bytes().splitlines(keepends=True)
    image, rest = rows[1].split(b",", 1)
    out.write_bytes(b"".join([rows[0], image + b",\xff " + rest, *rows[2:]]))
    code, _, err = script(photos, "--output", out, "--write-sidecar")
    assert code == 2 and "1 of 4 images could not be captioned" in err
    assert not (photos / "0.txt").exists() and (photos / "3.txt").exists()


def test_an_error_of_a_copy_is_gone_once_the_copy_is_there(photos, script, asked, tmp_path):
    out, copies = tmp_path / "a.csv", tmp_path / "copies"
    assert script(photos, "--output", out, "--annotate", copies)[0] == 0
    whole = out.read_bytes()
    lines = whole.decode().splitlines()
    out.write_text("\n".join([*lines[:2], lines[2] + "0.png can't be written", *lines[3:]]) + "\n")
    asked.clear()
    assert script(photos, "--output", out, "--annotate", copies)[0] == 0
    assert asked == [] and out.read_bytes() == whole


def test_a_second_model_or_method_needs_to_be_told(photos, run, script, tmp_path):
    out, other = tmp_path / "a.csv", tmp_path / "other.safetensors"
    tiny_model(5).save(other)
    assert script(photos / "0.png", "--output", out)[0] == 0
    before = contents(tmp_path)
    for flags, checkpoint, said in (
        ([], other, f"by another model, {run / 'best.safetensors'}, not {other}"),
        (["--method", "greedy"], run, "made with --method beam, not greedy"),
        (["--seed", 3], run, "made with --seed 0, not 3"),
    ):
        code, _, err = script(photos, "--output", out, *flags, checkpoint=checkpoint)
        assert code == 2 and said in err and "add --mix" in err and err.count("\n") == 1
        assert contents(tmp_path) == before
    shutil.copytree(run, tmp_path / "moved")  # the same model in another place
    assert script(photos / "1.png", "--output", out, checkpoint=tmp_path / "moved")[0] == 0
    assert script(photos, "--output", out, "--mix", checkpoint=other)[0] == 0
    assert len(out.read_text().splitlines()) == 5
    assert len(json.loads(results.settings_file(out).read_text())) == 2
    assert script(photos, "--output", out)[0] == 2


def test_a_file_of_unknown_origin_is_continued_and_said_so(photos, script, tmp_path, caplog):
    out = tmp_path / "a.csv"
    assert script(photos / "0.png", "--output", out)[0] == 0
    results.settings_file(out).unlink()
    assert script(photos, "--output", out, "--method", "greedy")[0] == 0
    assert "does not say which model made its captions" in caplog.text
    assert len(out.read_text().splitlines()) == 5 and not results.settings_file(out).exists()


def test_formulas_in_names_survive_a_continued_file(photos, script, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    names = ["=1+1.png", "+2.png", "@x.png"]
    for name in names:
        picture(7).save(name)
    for _ in range(2):
        assert script(*names, "--output", "a.csv")[0] == 0
    assert asked == names
    assert all(line.startswith("'") for line in (photos / "a.csv").read_text().splitlines()[1:])


# --- folders


def test_files_that_are_no_images_are_counted_by_their_ending_in_one_line(photos, script):
    for name in ("a.cr2", "b.CR2", "c.mov", "0.txt", "0.xmp", ".hidden.doc"):
        (photos / name).touch()
    picture(5).save(photos / "e.j2k", "JPEG2000")
    code, out, err = script(photos)
    assert (code, len(out.splitlines())) == (0, 5)
    assert err == "left out: 3 files that are no images: 2 .cr2, 1 .mov\n"


def test_one_bad_folder_costs_only_itself(photos, script, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (photos / "locked").mkdir()
    (photos / "self").symlink_to(photos / "self")
    scan = os.scandir

    def guarded(path):
        if os.path.basename(str(path)) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    code, out, err = script(photos, tmp_path / "empty")
    assert code == 2 and len(out.splitlines()) == 4
    assert err.splitlines() == [
        f"left out: the folder {photos / 'locked'} can't be read (Permission denied)",
        f"left out: no images in the folder {tmp_path / 'empty'}",
        "error: 2 folders or patterns were left out",
    ]
    code, out, err = script(photos / "locked")
    assert (code, out) == (2, "") and "can't be read (Permission denied)" in err


@pytest.mark.parametrize("argv", [[""], ["photos", ""], ["photos", "--output", ""],
                                  ["photos", "--json="]])  # fmt: skip
def test_an_empty_argument_is_not_the_current_folder(argv, photos, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = script(*argv)
    assert (code, out) == (2, "") and "is empty; is a variable of the shell not set?" in err
    assert ("--" not in argv[-2:][0]) or argv[-2] in err


def test_a_plan_changes_nothing(photos, tmp_path):
    before = contents(tmp_path)
    for flags in ({"output": tmp_path / "a.csv"}, {"json": tmp_path / "new/a.json"},
                  {"annotate": tmp_path / "new"}, {"write_sidecar": True}):  # fmt: skip
        assert len(plan([photos], **flags).remaining) == 4
        assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="no image was given"):
        plan([])
