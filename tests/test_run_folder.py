"""A run's folder stays whole: one run at a time, a full disk, a damaged state, bad losses."""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny import SMALL, assert_same_run, run_script, tiny_model

import train
import trainer
from model import CaptionModel
from model_file import read_metadata
from util import checkpoints, files, plots, program

if os.name == "posix":
    import resource
else:
    pytest.skip("signals, forks and limits of POSIX", allow_module_level=True)


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory) -> Path:
    """A run of two epochs that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main([*SMALL, "--data-dir", str(drawn), "--output", str(folder)])
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it, to be hurt."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_of(*argv, capsys) -> str:
    """Return the one line that train.py leaves on stderr, with exit code 2."""
    code, _, said = run_script(train, *argv, capsys=capsys)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


# --- one folder, one run


def hold(path: Path, held) -> None:
    with files.lock(path):
        held.set()
        signal.pause()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(
    run, tmp_path, drawn, capsys, monkeypatch
):
    monkeypatch.setattr(checkpoints, "LOCK_TIMEOUT", 0.1)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    first = context.Process(target=hold, args=(run / ".lock", held))
    first.start()
    assert held.wait(60)
    before = contents(run)
    for argv in (["--resume"], [*SMALL, "--data-dir", str(drawn)]):
        said = error_of(*argv, "--output", run, capsys=capsys)
        assert said == f"error: another run is at work in {run}; name another --output"
    assert contents(run) == before
    first.kill()
    first.join()
    train.main(["--resume", "--output", str(run)])
    assert not (run / ".lock").exists()


def test_a_run_holds_its_folder_from_the_reading_of_data_to_the_last_score(
    run, drawn, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoints, "LOCK_TIMEOUT", 0.1)
    refused = []

    def meanwhile(name):
        original = getattr(train, name)

        def watched(*arguments):
            with (
                pytest.raises(ValueError, match="another run"),
                checkpoints.run_folder(run, "shapes", resume=True),
            ):
                pass
            refused.append(name)
            return original(*arguments)

        monkeypatch.setattr(train, name, watched)

    for name in ("load_corpora", "build", "finish_epoch", "finish"):
        meanwhile(name)
    train.main(["--resume", "--output", str(run), "--epochs", "3"])
    assert refused == ["load_corpora", "build", "finish_epoch", "finish"]


def test_runs_without_a_name_take_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = functools.partial(checkpoints.run_folder, None, "shapes", resume=False)
    with new() as first, new() as second:
        assert (str(first), str(second)) == ("runs/shapes", "runs/shapes-2")
    with new() as third:
        assert third == first  # nothing came of it
        (third / "best.safetensors").touch()
    with new() as fourth:
        assert fourth == second


@pytest.mark.parametrize("fate", ["renamed", "deleted", "replaced"])
def test_a_run_whose_folder_is_gone_ends_with_one_line_and_writes_nothing(
    fate, run, tmp_path, capsys, monkeypatch
):
    kept, other = tmp_path / "kept", tmp_path / "run"
    finish_step = trainer.Trainer.finish_step

    def losing(self, words):
        finish_step(self, words)
        if self.step_number == 14:  # in the third epoch
            run.rename(kept)
            if fate == "deleted":
                shutil.rmtree(kept)
            if fate == "replaced":  # another run was started at the same place
                shutil.copytree(kept, other)

    monkeypatch.setattr(trainer.Trainer, "finish_step", losing)
    before = contents(run)
    said = error_of("--resume", "--output", run, "--epochs", "4", capsys=capsys)
    assert f"{run} was renamed, deleted or replaced" in said and "--resume --output" in said
    config = (kept if fate == "renamed" else other) / "config.json"
    if fate != "replaced":
        assert not run.exists()
    else:
        assert {**contents(run), "config.json": b""} == {**before, "config.json": b"", ".lock": b""}
    if fate == "renamed":
        assert {"config.json", "last.pt", "best.safetensors"} <= before.keys() & contents(
            kept
        ).keys()
        monkeypatch.setattr(trainer.Trainer, "finish_step", finish_step)
        train.main(["--resume", "--output", str(kept)])
        assert config.exists()
        assert torch.load(kept / "last.pt", weights_only=True)["epoch"] == 4


# --- files of somebody else's


@pytest.mark.parametrize(
    "name",
    ["config.json", "metrics.csv", "learning_curve.png", "scores.json", "samples/me.png",
     "best.safetensors", "last.pt", "previous.pt"],
)  # fmt: skip
def test_a_folder_with_a_file_that_a_run_would_replace_is_refused(name, drawn, tmp_path, capsys):
    mine = tmp_path / "project" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"model_type": "bert"}')
    before = contents(tmp_path)
    argv = [*SMALL, "--data-dir", drawn, "--output", tmp_path / "project"]
    said = error_of(*argv, capsys=capsys)
    assert f"holds {Path(name).parts[0]}, which this run would replace; name another --ou" in said
    assert contents(tmp_path) == before
    assert sorted(path.name for path in (tmp_path / "project").iterdir()) == [Path(name).parts[0]]


def test_other_files_may_be_in_the_folder_of_a_run_and_stay(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in (".lock", "notes.txt", "metrics.csv.bak"):
        (folder / name).write_text("mine")
    before = contents(folder)
    with checkpoints.run_folder(folder, "shapes", resume=False):
        pass
    assert contents(folder) == before


@pytest.mark.parametrize("hurt", ["no state", "another model", "text"])
def test_a_resumed_run_does_not_replace_or_use_a_model_of_another(hurt, run, capsys):
    path = run / "best.safetensors"
    if hurt == "no state":  # the model of the second epoch would be lost
        (run / "last.pt").unlink()
        (run / "previous.pt").unlink()
        model = read_metadata(path)
        if model["scores"]["epoch"] == 1:
            CaptionModel.load(path).save(path, scores={"epoch": 2})
    elif hurt == "another model":
        tiny_model().save(path)
    else:
        path.write_text("text")
    before = contents(run)
    said = error_of("--resume", "--output", run, capsys=capsys)
    assert "best.safetensors" in said
    assert {"no state": "--init-from", "another model": "is not a model of this run",
            "text": "is not a model file"}[hurt] in said  # fmt: skip
    before["config.json"] = (run / "config.json").read_bytes()  # with the flags of this command
    assert contents(run) == before


def test_a_state_of_another_run_is_one_line_that_names_what_to_do(run, capsys):
    state = torch.load(run / "last.pt", weights_only=True)
    state["average"] = {name: each[None] for name, each in state["average"].items()}
    torch.save(state, run / "last.pt")
    before = contents(run)
    said = error_of("--resume", "--output", run, capsys=capsys)
    assert "last.pt is damaged, or not of this run" in said and "--init-from" in said
    assert contents(run) == before


# --- places that can't be written


def test_an_output_that_is_a_file_is_one_line_before_any_work(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    argv = ["--data-dir", tmp_path / "nowhere", "--output", tmp_path / "run"]
    said = error_of(*argv, capsys=capsys)
    assert f"cannot write (Not a directory): {tmp_path}/run" in said
    assert (tmp_path / "run").read_text() == "mine"


def as_nobody(argv: list[str], said: Path) -> None:
    """Run train.py as a user that owns nothing."""
    with said.open("w") as out, contextlib.redirect_stderr(out):
        if os.geteuid() == 0:
            os.setuid(65534)
        program.run(lambda: train.main(argv))


def test_a_folder_without_permission_is_one_line_before_any_work(tmp_path):
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to other users
        folder = Path(name)
        folder.chmod(0o555)
        argv = ["--data-dir", "/nowhere", "--output", str(folder / "run")]
        context = multiprocessing.get_context("fork")
        process = context.Process(target=as_nobody, args=(argv, tmp_path / "said"))
        process.start()
        process.join(60)
        said = (tmp_path / "said").read_text()
        assert process.exitcode == 2, said
        assert said.startswith("error: cannot write (Permission denied): ") and name in said
        assert len(said.splitlines()) == 1 and not any(folder.iterdir())


# --- a disk that is full


def filling(monkeypatch, name: str) -> None:
    """Let the disk be full while a file of that name is written."""
    original = files.replacing

    @contextlib.contextmanager
    def replacing(path):
        with original(path) as temporary:
            if Path(path).name != name:
                yield temporary
                return
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
            try:
                yield temporary
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(files, "replacing", replacing)
    monkeypatch.setattr(plots, "replacing", replacing)


FILES = ["config.json", "best.safetensors", "metrics.csv", "learning_curve.png", "epoch-03.png",
         "last.pt", "scores.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_disk_full_at_any_file_is_one_line_and_the_file_before_stays(
    name, run, capsys, monkeypatch
):
    monkeypatch.setattr(trainer.Trainer, "best_score", lambda self: -2.0)  # each epoch is saved
    before = contents(run)
    with monkeypatch.context() as patch:
        filling(patch, name)
        said = error_of("--resume", "--output", run, "--epochs", "3", capsys=capsys)
    assert name in said and "cannot write (File too large)" in said
    after = contents(run)
    assert {key: value for key, value in after.items() if key.endswith(name)} == {
        key: value for key, value in before.items() if key.endswith(name)
    }
    assert not [key for key in after if Path(key).name.startswith(".")]
    assert torch.load(run / "last.pt", weights_only=True)["epoch"] == 2 + (name == "scores.json")


# --- training state that is damaged


def flip(path: Path) -> None:
    """Change one bit in the middle of the largest tensor's bytes: the file still opens."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_in_the_state_is_noticed(run, whole, capsys, caplog):
    flip(run / "last.pt")
    train.main(["--resume", "--output", str(run)])
    assert f"{run / 'last.pt'} can't be read" in caplog.text and "is damaged" in caplog.text
    assert_same_run(run, whole)


@pytest.mark.parametrize("gone", [False, True])
def test_without_a_sound_state_a_run_says_so_and_begins_nothing(gone, run, capsys):
    (run / "last.pt").write_bytes(b"torn")
    (run / "previous.pt").unlink() if gone else flip(run / "previous.pt")
    before = contents(run)
    said = error_of("--resume", "--output", run, capsys=capsys)
    assert f"{run / 'last.pt'} can't be read" in said and f"--init-from {run}" in said
    assert ("previous.pt" in said) != gone
    assert contents(run) == before


def test_a_run_killed_before_its_first_state_begins_anew_with_or_without_resume(
    whole, drawn, tmp_path, capsys
):
    place = ["--output", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "run")
    with checkpoints.run_folder(tmp_path / "run", "shapes", resume=False) as folder:
        assert folder == tmp_path / "run"
    train.main(["--resume", *place])
    assert "has no training state yet" in capsys.readouterr().out
    assert_same_run(folder, whole)


def test_a_run_that_stops_early_says_so(whole, drawn, tmp_path, capsys, monkeypatch):
    original, falling = train.score_split, iter([0.5, 0.4, 0.3, 0.2, 0.1])

    def score_split(*arguments):
        scores, captions = original(*arguments)
        return {**scores, "CIDEr": next(falling)}, captions

    monkeypatch.setattr(train, "score_split", score_split)
    slow = [*SMALL, "--patience", "1", "--epochs", "4"]
    train.main([*slow, "--data-dir", str(drawn), "--output", str(tmp_path / "run")])
    line = (
        "stopped early after epoch 2 of 4: 1 epochs without a better CIDEr (--patience 1; 0 trains "
        "to the end); the best is epoch 1 with 0.500"
    )
    assert line in capsys.readouterr().out
    monkeypatch.setattr(train, "score_split", original)
    train.main(["--resume", "--output", str(tmp_path / "run")])  # and why it trains no more
    assert line in capsys.readouterr().out
    train.main(["--resume", "--output", str(whole)])
    assert "stopped early" not in capsys.readouterr().out


# --- a loss that is no number


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_and_spoils_no_file(what, run, capsys, monkeypatch):
    clip, watch, names = trainer.Trainer.clip_gradients, trainer.Trainer.watch, []

    def broken_clip(self):
        if what == "gradient" and self.step_number == 14:  # the third of the third epoch's six
            next(self.model.decoder.parameters()).grad.fill_(float("nan"))
        return clip(self)

    def broken_watch(self, batches, values):
        if self.step_number == 14:
            names.extend(batches[0].image_ids)
            if what == "loss":
                values = values * torch.tensor([float("nan"), 1.0])
        watch(self, batches, values)

    monkeypatch.setattr(trainer.Trainer, "watch", broken_watch)
    monkeypatch.setattr(trainer.Trainer, "clip_gradients", broken_clip)
    before = contents(run)
    said = error_of("--resume", "--output", run, "--epochs", "3", capsys=capsys)
    assert f"error: the {what} became " in said
    assert "at step 15 (epoch 3, learning rate " in said
    assert len(names) == 4 and ", ".join(names) in said
    assert "go on from there with --resume and a lower --lr" in said
    after = contents(run)
    for name in ("last.pt", "previous.pt", "best.safetensors", "metrics.csv"):
        assert after[name] == before[name]


def test_a_rate_far_too_high_is_noticed_within_its_first_look(drawn, tmp_path, capsys):
    argv = [*SMALL, "--data-dir", drawn, "--output", tmp_path / "run", "--lr", "1000"]
    said = error_of(*argv, capsys=capsys)
    assert "became" in said and "epoch 1, learning rate " in said
    assert not (tmp_path / "run/last.pt").exists()


def test_a_run_stopped_after_a_loss_that_is_no_number_saves_nothing(run, capsys, monkeypatch):
    finish_step = trainer.Trainer.finish_step

    def broken(self, words):
        finish_step(self, words)
        self.unchecked[-1][1].fill_(float("inf"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "finish_step", broken)
    before = (run / "last.pt").read_bytes()
    said = error_of("--resume", "--output", run, "--epochs", "3", capsys=capsys)
    assert "the loss became inf at step 13" in said
    assert (run / "last.pt").read_bytes() == before


def test_losses_are_looked_at_together_not_one_by_one(run, monkeypatch):
    looks = []
    check = trainer.Trainer.check_finite

    def counted(self):
        looks.append(len(self.unchecked))
        check(self)

    monkeypatch.setattr(trainer.Trainer, "check_finite", counted)
    train.main(["--resume", "--output", str(run), "--epochs", "3"])
    assert looks == [6, 0]  # at the end of the epoch, and before its state is saved


# --- mistakes that are found after the folder was made


@pytest.mark.parametrize(
    "mistake",
    [
        ["--device", "banana"],
        ["--device", "cuda:99"],
        ["--cnn-backbone", "resnet18", "--cnn-weights", "none.pth"],
        ["--init-from", "none.safetensors"],
        ["--dataset", "flickr8k", "--data-dir", "none"],
        ["--dataset", "csv", "--data-dir", "none"],
        ["--also", "coco:none"],
    ],
)
def test_a_mistake_leaves_no_run_folder(mistake, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error_of(*SMALL, "--data-dir", drawn, *mistake, capsys=capsys)
    error_of(*SMALL, "--data-dir", drawn, *mistake, "--output", "a/b", capsys=capsys)
    assert not Path("a").exists() and not Path("runs").exists()


@pytest.mark.parametrize("before", [{}, {"notes.txt": b"mine"}, {"config.json": None}])
def test_a_mistake_leaves_a_folder_as_it_was(before, whole, drawn, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in before.items():
        (folder / name).write_bytes(content or (whole / name).read_bytes())
    before = contents(folder)
    mistake = ["--cnn-backbone", "resnet18", "--cnn-weights", "none.pth", "--output", folder]
    error_of(*SMALL, "--data-dir", drawn, *mistake, capsys=capsys)
    assert folder.is_dir() and contents(folder) == before
