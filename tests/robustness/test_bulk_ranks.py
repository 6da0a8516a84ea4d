"""Captions of folders by several processes, killed and continued: the same file as by one."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny import ROOT, picture, run_script, torchrun

import inference
from inference import Captioner
from util import distributed, results

CODE = "import inference; from util import program; program.run(inference.main)"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Eleven pictures in two folders, and one that is broken."""
    for number in range(12):
        path = tmp_path / "photos" / ("deep" if number % 3 == 0 else "") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (tmp_path / "photos/05.png").write_bytes(b"broken")
    return tmp_path / "photos"


def alone(run) -> list:
    """Flags for the model; a picture at a time, as the last digits of scores go by the batch."""
    return ["--checkpoint", run, "--device", "cpu", "--batch-size", 1]


@pytest.fixture
def script(run, capsys):
    return lambda *argv: run_script(inference, *argv, *alone(run), capsys=capsys)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The pictures that this process captions."""
    asked, many = [], Captioner.caption_many

    def counted(self, images, **settings):
        asked.extend(images)
        return many(self, images, **settings)

    monkeypatch.setattr(Captioner, "caption_many", counted)
    return asked


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def scattered(whole: Path, out: Path, parts: int, share: float, cut: int = 9) -> int:
    """Write parts as a killed job leaves them, of some rows of a whole file; return how many."""
    head, *rows = whole.read_bytes().splitlines(keepends=True)
    if whole.suffix == ".jsonl":
        head, rows = b"", [head, *rows]
    chance = random.Random(parts)
    kept = [row for row in rows if chance.random() < share]
    for number in range(parts):
        mine = kept[number::parts]
        half = rows[number][:cut]  # a kill may leave half a row
        results.part_file(out, number).write_bytes(b"".join([head, *mine, half]))
    return len(kept)


# --- by torchrun


def test_two_processes_write_what_one_writes(photos, run, script, tmp_path):
    flags = ["--n", 2, "--write-sidecar"]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    code, _, said = script(photos, *flags, "--output", one, "--annotate", tmp_path / "one")
    assert code == 2
    texts = contents(photos)
    for path in photos.rglob("*.txt"):
        path.unlink()
    job = torchrun(
        CODE, photos, *flags, "--output", two, "--annotate", tmp_path / "two", *alone(run)
    )
    assert two.read_bytes() == one.read_bytes()
    assert contents(photos) == texts and len(texts) == 12 + 11
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    errors = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert job.returncode != 0 and errors == [said.splitlines()[-1]]
    assert "1 of 12 images could not be captioned" in said
    assert not results.find_parts(two)


@pytest.mark.slow
def test_two_processes_go_on_from_the_parts_of_three(photos, run, script, tmp_path):
    (photos / "05.png").unlink()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert script(photos, "--output", one)[0] == 0
    assert 0 < scattered(one, two, 3, 0.6) < 11
    job = torchrun(CODE, photos, *alone(run), "--output", two)
    assert job.returncode == 0, job.stderr
    assert two.read_bytes() == one.read_bytes() and not results.find_parts(two)


def workers_of(process: int) -> list[int]:
    return [
        int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux does")
def test_a_job_killed_in_the_middle_is_continued_by_one_process(run, script, asked, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(1).save(folder / "000.png")
    for number in range(1, 200):
        os.link(folder / "000.png", folder / f"{number:03}.png")
    out = tmp_path / "captions.csv"
    (tmp_path / "job.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {CODE}")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               tmp_path / "job.py", folder, "--output", out, *alone(run)]  # fmt: skip
    job = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE)
    began = time.monotonic()
    parts = [results.part_file(out, number) for number in (0, 1)]
    while not all(part.exists() and part.read_bytes().count(b"\n") > 3 for part in parts):
        assert job.poll() is None and time.monotonic() - began < 300
        time.sleep(0.002)
    for process in [job.pid, *workers_of(job.pid)]:
        os.kill(process, signal.SIGKILL)
    job.communicate()
    while any(Path(f"/proc/{process}").exists() for process in workers_of(os.getpid())):
        time.sleep(0.01)
    done = len(results.merge_parts(out, "csv", 1, []))
    assert 6 <= done < 200 and not results.find_parts(out)
    assert script(folder, "--output", out)[0] == 0
    assert len(asked) == 200 - done
    assert script(folder, "--output", tmp_path / "whole.csv")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "captions.csv", "captions.csv.settings.json", "job.py", "whole.csv",
        "whole.csv.settings.json",
    ]  # fmt: skip


# --- parts


@pytest.mark.parametrize("form", ["csv", "jsonl", "html"])
@pytest.mark.parametrize("cut", [0, 9])
def test_one_process_goes_on_from_the_parts_of_several(form, cut, photos, script, asked, tmp_path):
    (photos / "05.png").unlink()
    one, two = tmp_path / f"one.{form}", tmp_path / f"two.{form}"
    assert script(photos, "--output", one)[0] == 0
    asked.clear()
    done = scattered(one, two, 3, 0.6, cut)
    assert script(photos, "--output", two)[0] == 0
    assert len(asked) == 11 - done
    assert two.read_bytes() == one.read_bytes() and not results.find_parts(two)


def test_rows_of_the_file_and_of_parts_are_kept_and_sorted(photos, script, asked, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    script(photos, "--output", one)
    rows = one.read_bytes().splitlines(keepends=True)
    two.write_bytes(rows[7] + rows[2])
    results.part_file(two, 4).write_bytes(rows[3] + rows[9])
    asked.clear()
    script(photos, "--output", two)
    assert two.read_bytes() == one.read_bytes()
    assert len(asked) == 9  # one of the four rows is an error, which is tried again


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the project catches it."""


@pytest.mark.parametrize("parts", [3, 1])
def test_a_kill_before_parts_are_removed_leaves_no_row_twice(
    parts, photos, script, asked, tmp_path, monkeypatch
):
    (photos / "05.png").unlink()
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert script(photos, "--output", one)[0] == 0
    done = scattered(one, two, parts, 0.6)
    unlink = Path.unlink

    def killed(self, missing_ok=False):
        if re.match(r"two\.csv\.part-", self.name):
            raise KilledError
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Path, "unlink", killed)
        script(photos, "--output", two)
    assert len(results.find_parts(two)) == parts
    asked.clear()
    assert script(photos, "--output", two)[0] == 0
    assert len(asked) == 11 - done
    assert two.read_bytes() == one.read_bytes() and not results.find_parts(two)


def test_a_picture_that_is_gone_keeps_its_row(photos, script, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    script(photos, "--output", one)
    scattered(one, two, 2, 1.0, 0)
    (photos / "01.png").unlink()
    script(photos, "--output", two)
    assert sorted(two.read_bytes().splitlines()) == sorted(one.read_bytes().splitlines())


def test_parts_of_another_kind_are_refused_and_kept(photos, script, tmp_path):
    out = tmp_path / "captions.csv"
    part = results.part_file(out, 0)
    part.write_text("image,caption,score,caption_2,score_2,error\n")
    code, _, said = script(photos, "--output", out)
    assert code == 2 and "captions.csv.part-0 begins with" in said and "another --n" in said
    assert part.exists() and not out.exists()


def test_a_picture_named_twice_has_one_row(photos, script, tmp_path):
    out = tmp_path / "captions.jsonl"
    script(photos / "01.png", photos, photos / "01.png", "--output", out)
    assert len(out.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("flags", "said"),
    [([], "give --output"), (["--output", "/dev/null"], "give --output"),
     (["--output", "a.csv", "--json", "a.json"], "--json is written by one process"),
     (["--output", "a.csv", "--attention", "a.png"], "--attention is written by one")],
)  # fmt: skip
def test_what_several_processes_cannot_write_is_refused(
    flags, said, photos, script, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "on_main", lambda work: work())
    code, _, err = script(photos, *flags)
    assert code == 2 and re.search(said, err) and err.count("\n") == 1
    assert not list(tmp_path.glob("a.*"))
