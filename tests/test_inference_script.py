"""`inference.py` prints captions, writes files, and says in a line what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import picture, run_script

import inference
from inference import Captioner, caption
from util.results import Caption

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twenty pictures of several sizes: more than a batch."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(20):
        picture(number, (64, 48 + number)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def script(capsys):
    return lambda *argv: run_script(inference, *argv, capsys=capsys)


def test_one_photo_prints_its_caption_alone(captioner, run, photos, script):
    photo = photos / "03.png"
    code, out, err = script(photo, "--checkpoint", run)
    assert (code, out, err) == (0, captioner.caption(photo) + "\n", "")
    code, out, _ = script(photo, "--checkpoint", run, "--n", 3, "--beam-size", 4)
    assert out.splitlines() == captioner.caption(photo, n=3, beam_size=4)


def test_a_folder_of_one_photo_is_printed_like_any_folder(run, tmp_path, script):
    picture(1).save(tmp_path / "only.png")
    _, out, _ = script(tmp_path, "--checkpoint", run)
    assert out == f"{tmp_path / 'only.png'}\t{caption(picture(1), checkpoint=run)}\n"


def test_the_json_holds_every_caption_with_its_log_probability(
    captioner, run, photos, tmp_path, script
):
    output = tmp_path / "new" / "captions.json"
    assert script(photos, "--checkpoint", run, "--n", 2, "--json", output)[0] == 0
    paths = sorted(photos.iterdir())
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, expected in zip(rows, captioner.caption_many(paths, n=2), strict=True):
        found = [Caption(each["text"], each["log_prob"]) for each in row["captions"]]
        assert [each.text for each in found] == [each.text for each in expected]
        assert [each["score"] for each in row["captions"]] == [each.score for each in found]
        assert [each.log_prob for each in found] == pytest.approx(
            [each.log_prob for each in expected], abs=1e-4
        )


def test_one_bad_photo_among_several_costs_only_itself(captioner, run, photos, tmp_path, script):
    bad, output = tmp_path / "text.jpg", tmp_path / "out.json"
    bad.write_text("this is no picture")
    good = [photos / "00.png", photos / "01.png"]
    lost = tmp_path / "lost.png"
    code, out, err = script(good[0], bad, lost, good[1], "--checkpoint", run, "--json", output)
    assert code == 2
    assert out.splitlines() == [f"{path}\t{captioner.caption(path)}" for path in good]
    assert err.splitlines() == [
        f"left out: {bad} is not an image that can be read (no image format that is known)",
        f"left out: No such file or directory: {lost}",
        "error: 2 of 4 images could not be captioned",
    ]
    assert [row["image"] for row in json.loads(output.read_text())] == list(map(str, good))


def test_a_bad_photo_alone_is_one_line_and_writes_nothing(run, tmp_path, script):
    (tmp_path / "text.jpg").write_text("this is no picture")
    output = tmp_path / "out.json"
    code, out, err = script(tmp_path / "text.jpg", "--checkpoint", run, "--json", output)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "text.jpg is not an image that can be read" in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "no image was given"),
        (("nothing",), "No such file or directory: nothing"),
        (("empty",), "no images in the folder empty"),
        (("photo.png", "--json", "empty"), "cannot write (Is a directory): empty"),
        (("photo.png", "--json", "photo.png/x"), "cannot write (Not a directory): photo.png/x"),
        (("photo.png", "photo.png", "--n", "2", "--method", "greedy"), "the greedy method has one"),
        (("photo.png", "photo.png", "--max-words", "99"), "max words 99 must be between 1 and"),
        (("photo.png", "--beam-size", "0"), "beam size 0 must be at least 1"),
        (("photo.png", "--device", "banana"), "device 'banana' can't be used"),
        (("photo.png", "--method", "bream"), "'bream'"),
        (("photo.png", "--beem-size", "3"), "--beem-size"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    argv, said, run, tmp_path, monkeypatch, script
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    picture(1).save(tmp_path / "photo.png")
    code, out, err = script(*argv, "--checkpoint", run)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_ctrl_c_leaves_no_json(run, photos, tmp_path, monkeypatch, script):
    def interrupted(self, images, **_):
        yield [Caption("a dog", -1.0)]
        raise KeyboardInterrupt

    monkeypatch.setattr(Captioner, "caption_many", interrupted)
    code, out, err = script(photos, "--checkpoint", run, "--json", tmp_path / "out.json")
    assert (code, err) == (130, "1 of 20 images are captioned\ninterrupted\n")
    assert out == f"{photos / '00.png'}\ta dog\n"
    assert list(tmp_path.iterdir()) == []


def command(*argv, **environment):
    """Run inference.py as a user does."""
    return subprocess.run(
        [sys.executable, ROOT / "inference.py", *argv],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_the_command_prints_what_the_function_returns(run, photos):
    done = command(photos / "01.png", "--checkpoint", run, PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == caption(photos / "01.png", checkpoint=run) + "\n"


def test_the_command_says_one_line_about_a_text_file(run, tmp_path):
    (tmp_path / "text.jpg").write_text("this is no picture")
    done = command(tmp_path / "text.jpg", "--checkpoint", run)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- text that a terminal would obey


EVIL = "\x1b]0;owned\x07\x9b2J\u202egpj"


def test_names_of_files_reach_no_terminal_as_they_are(run, tmp_path, script):
    folder = tmp_path / f"photos{EVIL}"
    folder.mkdir()
    for name in (f"a{EVIL}.png", "b.png"):
        picture(1).save(folder / name)
    (folder / f"c{EVIL}.png").write_bytes(b"no image")
    code, out, err = script(folder, "--checkpoint", run)
    assert code == 2 and out.count("\n") == 2
    assert not set(EVIL) - set("gpj]0;owned2J") & set(out + err)
    assert out.count(r"\x1b]0;owned\x07\x9b2J\u202egpj") == 3  # the folder twice, and a file
    assert r"c\x1b]0;owned" in err and out.count("\t") == 2


def test_a_table_keeps_its_content_but_on_a_terminal(run, tmp_path, script, monkeypatch):
    picture(1).save(tmp_path / f"a{EVIL}.png")
    argv = (tmp_path / f"a{EVIL}.png", "--checkpoint", run, "--format", "csv")
    assert EVIL in script(*argv)[1]
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    on_terminal = script(*argv)[1]
    assert "\x1b" not in on_terminal and r"a\x1b]0;owned" in on_terminal
