"""Scores of a split are those of the captions, whoever made them and in whatever batches."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny import METHODS, run_script
from PIL import Image

import evaluate
import inference
import metrics
from decoding import DecodingConfig
from evaluate import (
    caption_batch,
    captions_json,
    encode_split,
    match_image_ids,
    read_captions,
    score_split,
)
from features import cached_features
from inference import Captioner
from readers import Record, load_split
from util import java_metrics, shapes

ROOT = Path(__file__).parent.parent
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
FAULTS = ("bad_endings", "repeats")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small dataset on disk."""
    return shapes.draw(tmp_path_factory.mktemp("data"), train=2, val=12, test=4)


@pytest.fixture(scope="module")
def records(data):
    return load_split("shapes", data, "val")


@pytest.fixture
def script(data, capsys):
    """Runs the script on the shapes; later flags count."""
    given = ("--dataset", "shapes", "--data-dir", data, "--split", "val", "--workers", 0)
    return lambda *argv: run_script(evaluate, *given, "--no-java", *argv, capsys=capsys)


def right_captions(records):
    return {record.image_id: record.captions[0] for record in records}


def caption_all(model, records, decoding=None, cache=None, **options):
    captions = {}
    for batch in encode_split(model, records, cache, **options):
        captions |= caption_batch(model, batch, decoding or DecodingConfig())
    return captions


def write(path, value):
    path.write_text(json.dumps(value))
    return path


# --- two ways, one answer


def test_the_files_hold_the_scores_of_the_captions_beside_them(run, data, tmp_path, script):
    scores, captions = tmp_path / "scores.json", tmp_path / "new" / "captions.json"
    code, out, err = script("--checkpoint", run, "--json", scores, "--captions-json", captions)
    assert (code, err) == (0, "")
    report = json.loads(scores.read_text())
    drawn = json.loads((data / "captions.json").read_text())["images"]
    references = {
        image["filename"]: [sentence["raw"] for sentence in image["sentences"]]
        for image in drawn
        if image["split"] == "val"
    }
    made = {row["image_id"]: row["caption"] for row in json.loads(captions.read_text())}
    assert {name: report.pop(name) for name in NAMES} == metrics.score(references, made)
    faults = {name: report.pop(name) for name in FAULTS}
    assert faults == metrics.faults(made.values())
    assert report == {
        "dataset": "shapes",
        "split": "val",
        "images": 12,
        "decoding": asdict(DecodingConfig()),
    }
    lines = out.splitlines()
    assert lines[0] == "shapes val, 12 images"
    assert [line.split()[0] for line in lines[1:]] == [*NAMES, *FAULTS]
    for line in lines[1:]:
        name, value, *note = line.split()
        assert value == f"{json.loads(scores.read_text())[name]:.3f}"
        assert bool(note) == (name == "CIDEr")  # there are few images


def test_scoring_its_own_captions_gives_the_same_scores(run, tmp_path, script):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    captions, again = tmp_path / "captions.json", tmp_path / "again.json"
    assert script("--checkpoint", run, "--json", first, "--captions-json", captions)[0] == 0
    assert script("--captions", captions, "--json", second, "--captions-json", again)[0] == 0
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    assert {name: one[name] for name in NAMES} == {name: two[name] for name in NAMES}
    assert (two["images"], two["captions"]) == (12, "captions.json")
    assert captions.read_text() == again.read_text()


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_workers_change_no_caption(method, run, records):
    model = Captioner.load(run, "cpu").model

    def captions(**options):
        return caption_all(model, records, DecodingConfig(method=method), **options)

    expected = captions(batch_size=64, workers=0)
    assert list(expected) == [record.image_id for record in records]
    assert len(set(expected.values())) > 1
    assert captions(batch_size=5, workers=0) == expected
    assert captions(batch_size=1, workers=0) == expected
    if method == "greedy":
        assert captions(batch_size=5, workers=2) == expected


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_captions_what_inference_captions(method, run, records):
    captioner = Captioner.load(run, "cpu")
    decoding = DecodingConfig(method=method, seed=5)
    captions = caption_all(captioner.model, records, decoding, batch_size=5, workers=0)
    for record in records:
        expected = captioner.caption(record.path, method=method, seed=5)
        assert captions[record.image_id] == expected


def test_both_scripts_sample_the_same_captions(run, records, data, tmp_path, script):
    made, lines = tmp_path / "made.json", tmp_path / "lines.json"
    sampling = ("--checkpoint", run, "--method", "sample", "--seed", 3)
    assert script(*sampling, "--captions-json", made)[0] == 0
    paths = [str(record.path) for record in records]
    inference.main([*paths, *map(str, sampling), "--json", str(lines)])
    rows = json.loads(lines.read_text())
    theirs = {Path(row["image"]).name: row["captions"][0]["text"] for row in rows}
    assert theirs == {row["image_id"]: row["caption"] for row in json.loads(made.read_text())}


def test_cached_features_give_the_captions_of_the_files(run, records, tmp_path):
    model = Captioner.load(run, "cpu").model
    cache = cached_features(records, model.encoder, 64, tmp_path, "val", workers=0)
    expected = caption_all(model, records, batch_size=5, workers=0)
    assert caption_all(model, records, cache=cache, batch_size=5, workers=0) == expected


@pytest.mark.parametrize("source", ["cache", "files"])
def test_features_of_few_batches_are_in_memory_at_once(source, run, records, tmp_path):
    """So that memory does not grow with the split."""
    model, cache = Captioner.load(run, "cpu").model, None
    if source == "cache":
        features = cached_features(records, model.encoder, 64, tmp_path, "val", workers=0)
        first = features.get(records[0].image_id)
        cache = SimpleNamespace(get=lambda image_id: first)
    records = [Record(number, records[0].path, ("a dog",)) for number in range(6 * 64)]
    batches, most = [], 0

    def watch(iterable):
        nonlocal most
        for batch in iterable:
            batches.append(weakref.ref(batch.features[0]))
            most = max(most, sum(reference() is not None for reference in batches))
            yield batch

    _, captions = score_split(model, records, DecodingConfig(method="greedy"), cache, watch)
    assert len(batches) == 6 and len(captions) == len(records)
    assert most <= 3


def test_captions_may_come_in_any_order(records, tmp_path, script):
    right, scores = right_captions(records), []
    for number, names in enumerate((list(right), list(right)[::-1])):
        rows = [{"image_id": name, "caption": right[name]} for name in names]
        output = tmp_path / f"{number}.json"
        assert script("--captions", write(tmp_path / "in.json", rows), "--json", output)[0] == 0
        scores.append(json.loads(output.read_text()))
    scores[0]["captions"] = scores[1]["captions"]
    assert scores[0] == scores[1]
    assert scores[0]["BLEU-4"] == pytest.approx(1)


def test_the_function_returns_what_the_script_writes(run, data, tmp_path, script):
    config = evaluate.Config(
        checkpoint=run, dataset="shapes", data_dir=data, split="test", java=False, workers=0
    )
    report, captions = evaluate.evaluate(config)
    output, made = tmp_path / "scores.json", tmp_path / "captions.json"
    argv = ("--checkpoint", run / "best.safetensors", "--split", "test")
    assert script(*argv, "--json", output, "--captions-json", made)[0] == 0
    assert json.loads(output.read_text()) == report
    assert json.loads(made.read_text()) == captions_json(captions)


# --- captions made elsewhere


@pytest.mark.parametrize("own", [7, "7"])
@pytest.mark.parametrize("theirs", [7, "7"])
def test_ids_meet_as_numbers_or_as_text(own, theirs, tmp_path):
    record = Record(own, Path("x.jpg"), ("a dog",))
    path = write(tmp_path / "in.json", [{"image_id": theirs, "caption": "a cat"}])
    captions = match_image_ids(read_captions(path), [record], [])
    assert captions_json(captions) == [{"image_id": own, "caption": "a cat"}]


def test_with_a_limit_captions_of_the_whole_split_may_be_given(records, tmp_path, script):
    path = write(tmp_path / "in.json", captions_json(right_captions(records)))
    output, made = tmp_path / "out.json", tmp_path / "made.json"
    code, _, err = script(
        "--captions", path, "--limit", 3, "--json", output, "--captions-json", made
    )
    assert (code, err) == (0, "")
    assert json.loads(output.read_text())["images"] == 3
    first = [record.image_id for record in records[:3]]
    assert [row["image_id"] for row in json.loads(made.read_text())] == first


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"val_00000.png": "a dog"}, r'a JSON list of {"image_id": …, "caption": "…"}, not a dict'),
        (["a dog"], "entry 1 is 'a dog'"),
        ([{"image_id": 1, "caption": "a dog"}, {"image_id": 2}], "entry 2 is {'image_id': 2}"),
        ([{"image_id": 1, "caption": 3}], "entry 1 is"),
        ([{"image_id": None, "caption": "a dog"}], "entry 1 is"),
        ([{"image_id": [1], "caption": "a dog"}], "entry 1 is"),
    ],
)
def test_a_file_that_holds_no_captions_is_described(value, said, tmp_path):
    path = write(tmp_path / "in.json", value)
    with pytest.raises(ValueError, match=r"in\.json is not a captions file") as raised:
        read_captions(path)
    assert said in str(raised.value)


@pytest.mark.parametrize("second", [7, "7"])
def test_two_captions_of_one_image_are_refused(second, tmp_path):
    rows = [{"image_id": name, "caption": "a dog"} for name in (7, second)]
    with pytest.raises(ValueError, match="two captions of image '?7'?; expected one per image"):
        read_captions(write(tmp_path / "in.json", rows))


# --- images that can't be read


@pytest.fixture
def damaged(records, tmp_path):
    """The split, one image of it being a text file."""
    (tmp_path / "text.png").write_text("this is no picture")
    return [*records[:2], records[2]._replace(path=tmp_path / "text.png"), *records[3:]]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_few_unreadable_images_are_left_out_and_said(
    batch_size, run, damaged, data, monkeypatch, caplog
):
    monkeypatch.setattr(evaluate, "load_split", lambda *_: damaged)
    config = evaluate.Config(checkpoint=run, java=False, workers=0, batch_size=batch_size)
    report, captions = evaluate.evaluate(config)
    kept = [record.image_id for record in damaged if record.path.name != "text.png"]
    assert (report["images"], list(captions)) == (11, kept)
    captioner = Captioner.load(run, "cpu")
    paths = {record.image_id: record.path for record in damaged}
    assert all(captions[name] == captioner.caption(paths[name]) for name in kept)
    assert f"1 of 12 images can't be read: {damaged[2].image_id}" in caplog.text


def test_too_many_unreadable_images_are_an_error(run, damaged, monkeypatch, tmp_path, script):
    damaged[0] = damaged[0]._replace(path=damaged[2].path)
    monkeypatch.setattr(evaluate, "load_split", lambda *_: damaged)
    code, out, err = script("--checkpoint", run, "--json", tmp_path / "out.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "more than 1 % is too many to leave out" in err
    assert not (tmp_path / "out.json").exists()


# --- METEOR and SPICE


def test_where_java_is_missing_a_line_says_so(records, monkeypatch, caplog):
    monkeypatch.setattr(java_metrics.shutil, "which", lambda name: None)
    right = right_captions(records)
    scores = evaluate.score_captions(records, right, java=True)
    assert scores == evaluate.score_captions(records, right)
    assert [line.split(":")[0] for line in caplog.messages] == [
        "METEOR not computed",
        "SPICE not computed",
    ]


def test_what_java_scores_is_printed_and_written(records, monkeypatch, tmp_path, script):
    monkeypatch.setattr(metrics, "java_scores", lambda *_: ({"METEOR": 0.25, "SPICE": 0.125}, []))
    path = write(tmp_path / "in.json", captions_json(right_captions(records)))
    code, out, _ = script("--captions", path, "--java", "--json", tmp_path / "out.json")
    assert code == 0
    assert "  METEOR   0.250\n  ROUGE-L" in out and "  SPICE    0.125\n" in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["METEOR"], report["SPICE"]) == (0.25, 0.125)


# --- errors of the script


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--data-dir", "nowhere", "--dataset", "flickr8k"), "no dataset at nowhere"),
        (("--data-dir", "empty", "--dataset", "flickr8k"), "no Flickr8k captions in empty"),
        (("--dataset", "flickr9k"), "'flickr9k'"),
        (("--split", "dev"), "'dev'"),
        (("--limit", "0"), "--limit 0 must be at least 1"),
        (("--limit", "-3"), "--limit -3 must be at least 1"),
        (("--batch-size", "0"), "--batch-size 0 must be at least 1"),
        (("--workers", "-1"), "--workers -1 must be at least 0"),
        (("--beam-size", "0"), "beam size 0 must be at least 1"),
        (("--max-words", "99"), "max words 99 must be between 1 and the model's 8"),
        (("--checkpoint", "text"), "text is not a model file"),
        (("--checkpoint", "nothing"), "no checkpoint at nothing"),
        (("--device", "banana"), "device 'banana' can't be used"),
        (("--captions", "nothing"), "No such file or directory: nothing"),
        (("--captions", "text"), "text is not a JSON file"),
        (("--captions", "other.json"), "images have references but no caption"),
        (("--captions", "none.json"), "nothing to score"),
        (("--captions-json", "empty"), "cannot write (Is a directory): empty"),
        (("--captions-jsn", "x"), "--captions-jsn"),
    ],
)
def test_a_users_mistake_is_one_line_exit_code_2_and_no_file(
    argv, said, run, tmp_path, monkeypatch, script
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text").write_text("this is no JSON")
    write(Path("other.json"), [{"image_id": 1, "caption": "a dog"}])
    write(Path("none.json"), [])
    before = sorted(tmp_path.rglob("*"))
    code, out, err = script("--checkpoint", run, "--json", "scores.json", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--json", "--captions-json"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    flag, run, tmp_path, monkeypatch, script
):
    monkeypatch.setattr(evaluate, "load_split", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "scores.json"
    code, _, err = script("--checkpoint", run, flag, place)
    assert (code, err) == (2, f"error: cannot write (Not a directory): {place}\n")


def test_captions_made_elsewhere_are_scored_without_reading_a_picture(
    records, tmp_path, monkeypatch, script
):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was read"))
    path = write(tmp_path / "in.json", captions_json(right_captions(records)))
    assert script("--captions", path)[0] == 0


def test_the_command_says_one_line_where_there_is_no_dataset(run, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--checkpoint", run],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no dataset at ") and done.stderr.count("\n") == 1


# --- files of somebody else's


OTHERS = {"notes": '{"title": "notes"}', "page": "<html>my page", "text": "no JSON at all"}


@pytest.mark.parametrize(
    ("flag", "name", "content"),
    [("--json", "a.json", "notes"), ("--json", "a.json", "text"), ("--report", "a.html", "page"),
     ("--captions-json", "a.json", "notes"), ("--captions-json", "a.json", "text")],
)  # fmt: skip
def test_an_output_does_not_replace_a_file_of_another_kind(
    flag, name, content, run, tmp_path, monkeypatch, script
):
    monkeypatch.setattr(evaluate, "load_split", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / name).write_text(OTHERS[content])
    code, _, err = script("--checkpoint", run, flag, tmp_path / name)
    assert code == 2 and err.count("\n") == 1 and "is there, and does not hold" in err
    assert (tmp_path / name).read_text() == OTHERS[content]


def test_outputs_of_before_are_written_again(run, tmp_path, script):
    names = {"--json": "a.json", "--captions-json": "b.json", "--report": "c.html"}
    argv = [word for flag, name in names.items() for word in (flag, tmp_path / name)]
    for _ in range(2):
        assert script("--checkpoint", run, *argv)[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--captions", "in.json", "--json", "in.json"), "uses the same file"),
        (("--captions", "in.json", "--captions-json", "./in.json"), "uses the same file"),
        (("--json", "new.json", "--captions-json", "new.json"), "uses the same file"),
        (("--json", "scores.csv"), "must end in .json"),
        (("--captions-json", "photo.jpg"), "must end in .json"),
        (("--report", "page.json"), "must end in .html"),
    ],
)
def test_an_output_that_is_an_input_or_of_another_form_is_refused(
    argv, said, run, tmp_path, monkeypatch, script
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_split", lambda *_: pytest.fail("the work has begun"))
    write(Path("in.json"), [{"image_id": 1, "caption": "a dog"}])
    before = Path("in.json").read_bytes()
    code, _, err = script(*argv)
    assert code == 2 and said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
    assert Path("in.json").read_bytes() == before
