"""A file of captions is scored by whatever it names its images, and never by a wrong one."""

import json
from pathlib import Path

import pytest
from helpers.tiny import picture, run_script

import evaluate
import inference
from caption_results import match_image_ids, read_captions
from readers import Record, load_split
from util.files import UserError
from util.results import Caption, Result, format_header, format_line

RESULTS = [
    Result("photos/a.png", [Caption("a dog", -2.0), Caption("a cat", -3.0)]),
    Result("photos/broken.png", (), "cannot identify it"),
    Result("-photos/=b.png", [Caption("=a red, dog", -1.0), Caption("a", -3.0)]),
]
READ = {"photos/a.png": "a dog", "-photos/=b.png": "=a red, dog"}


@pytest.fixture
def records(drawn):
    return load_split("shapes", drawn, "val")


@pytest.fixture
def script(drawn, capsys):
    given = ("--dataset", "shapes", "--data-dir", drawn, "--split", "val", "--no-java")
    return lambda *argv: run_script(evaluate, *given, *argv, capsys=capsys)


def record(image_id, path="images/x.jpg"):
    return Record(image_id, Path(path), ("a dog",))


# --- formats


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.html", "csv", "jsonl", "html"])
def test_what_inference_writes_is_read(name, tmp_path):
    path, format = tmp_path / name, name.removeprefix("a.")
    lines = [format_line(format, result, 2, tmp_path) for result in RESULTS]
    path.write_text(format_header(format, 2) + "".join(lines))
    assert read_captions(path) == READ
    path.write_text(path.read_text().replace("\n", "\r\n"), newline="")
    assert read_captions(path) == READ


def test_the_json_of_inference_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([each.to_json() for each in RESULTS]))
    assert read_captions(tmp_path / "a.json") == READ


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "filename;text\nphotos/a.png;a dog\n-photos/=b.png;=a red, dog\n"),
        ("a.jsonl", '{"file_name": "photos/a.png", "text": "a dog"}\n'
                    '{"image_id": "-photos/=b.png", "caption": "=a red, dog"}\n'),
        ("a.json", json.dumps([{"image": k, "captions": [v, "more"]} for k, v in READ.items()])),
    ],
)  # fmt: skip
def test_tables_are_read(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert read_captions(tmp_path / name) == READ


def test_half_a_row_of_a_killed_job_is_left_out(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"image": "a", "caption": "b"}\n{"image": "b", "ca')
    assert read_captions(tmp_path / "a.jsonl") == {"a": "b"}
    assert "half a row" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{}\n", "line 1 is {}"),
        ("a.jsonl", "[\n{}\n", "line 1 is not JSON"),
        ("a.html", "<!doctype html><p>mine", "is not a page of captions"),
        ("a.html", format_header("html", 1) + "<p>mine\n", "line 2 is not an image"),
        ("a.csv", "name,words\na,b\n", "must have the columns image and caption"),
        ("a.csv", "image,caption\na,b\na,c\n", "two captions of image 'a'"),
        ("a.json", '[{"image": "a", "captions": [{"txt": "b"}]}]', "entry 1 is"),
        ("a.bin", "\x00\x01", "not a JSON file"),
    ],
)
def test_other_files_are_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as raised:
        read_captions(tmp_path / name)
    assert name in str(raised.value) and said in str(raised.value)


# --- whose caption it is


@pytest.mark.parametrize(
    ("image_id", "path", "name"),
    [
        ("x.jpg", "images/x.jpg", "x.jpg"),
        ("x.jpg", "images/x.jpg", "/elsewhere/x.jpg"),
        ("x.jpg", "images/x.jpg", r"C:\photos\x.jpg"),
        (7, "images/x.jpg", "7"),
        (7, "images/x.jpg", "somewhere/x.jpg"),
        ("seven", "images/x.jpg", "x.jpg"),
        ("cat/x.jpg", "images/cat/x.jpg", "x.jpg"),
        ("cat/x.jpg", "images/cat/x.jpg", "../all/cat/x.jpg"),
        ("cat/x.jpg", "images/cat/x.jpg", "./images/cat/x.jpg"),
    ],
)
def test_an_image_is_its_id_or_its_path(image_id, path, name):
    assert match_image_ids({name: "a dog"}, [record(image_id, path)]) == {image_id: "a dog"}


def test_an_image_of_that_name_in_another_folder_is_another(caplog):
    cat = record("cat/1.jpg", "images/cat/1.jpg")
    captions = {"images/cat/1.jpg": "a cat", "images/dog/1.jpg": "a dog"}
    assert match_image_ids(captions, [cat]) == {"cat/1.jpg": "a cat"}
    assert "1 of 2 captions are of no image of this split" in caplog.text
    assert match_image_ids({"images/dog/1.jpg": "a dog"}, [cat]) == {}


def test_what_may_be_two_images_is_one_line():
    both = [record(f"{name}/1.jpg", f"images/{name}/1.jpg") for name in ("cat", "dog")]
    with pytest.raises(UserError, match="'1.jpg' may be any of 2 images, such as 'cat/1.jpg'"):
        match_image_ids({"1.jpg": "a cat"}, both)
    with pytest.raises(UserError, match="'a/x.jpg' and 'b/x.jpg' are both the image 'x.jpg'"):
        match_image_ids({"a/x.jpg": "a cat", "b/x.jpg": "a dog"}, [record("x.jpg")])


# --- scores


@pytest.mark.parametrize("flag", ["--output in.csv", "--output in.jsonl", "--json in.json"])
def test_what_inference_wrote_has_the_scores_of_the_model(
    flag, run, drawn, records, tmp_path, monkeypatch, script, capsys
):
    """Captions of the whole folder are given; the split is scored."""
    monkeypatch.chdir(tmp_path)
    flag, name = flag.split()
    run_script(
        inference, drawn / "images", "--checkpoint", run, "--device", "cpu", flag, name,
        capsys=capsys,
    )  # fmt: skip
    code, _, err = script("--captions", name, "--json", "one.json")
    assert (code, err) == (0, "")
    assert script("--checkpoint", run, "--device", "cpu", "--json", "two.json")[0] == 0
    one, two = (json.loads(Path(f"{each}.json").read_text()) for each in ("one", "two"))
    assert one.pop("captions") == name and two.pop("decoding")
    assert one == two and one["images"] == len(records)


def test_images_without_a_caption_are_an_error_that_names_the_flag(records, tmp_path, script):
    rows = [{"image_id": each.image_id, "caption": each.captions[0]} for each in records[:3]]
    path, scores = tmp_path / "in.json", tmp_path / "scores.json"
    path.write_text(json.dumps(rows))
    code, out, err = script("--captions", path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"5 of 8 images have references but no caption in {path}" in err
    assert "--only-captioned scores those" in err
    code, out, _ = script("--captions", path, "--only-captioned", "--json", scores)
    assert code == 0 and out.startswith("shapes val, 3 of 8 images\n")
    assert "  (says little of fewer than 100 images)\n" in out
    report = json.loads(scores.read_text())
    assert (report["images"], report["split_images"]) == (3, 8)
    assert report["BLEU-1"] > 0.99
    code, _, err = script("--only-captioned")
    assert code == 2 and "--only-captioned is about --captions" in err


def test_captions_of_another_dataset_are_an_error_with_the_flag_too(tmp_path, script):
    picture(1).save(tmp_path / "mine.png")
    (tmp_path / "in.csv").write_text("image,caption\nmine.png,a dog\n")
    code, _, err = script("--captions", tmp_path / "in.csv", "--only-captioned")
    assert code == 2 and "it has none of this split" in err and err.count("\n") == 1


def test_a_cider_of_many_images_has_no_note(records, tmp_path, script, monkeypatch):
    monkeypatch.setattr(evaluate, "FEW", 8)
    rows = [{"image_id": each.image_id, "caption": each.captions[0]} for each in records]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    code, out, _ = script("--captions", tmp_path / "in.json")
    assert code == 0 and "says little" not in out


def test_captions_with_scores_are_not_replaced_by_captions_json(run, tmp_path, script):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([each.to_json() for each in RESULTS]))
    code, _, err = script("--checkpoint", run, "--captions-json", path)
    assert code == 2 and "does not hold captions of images" in err
