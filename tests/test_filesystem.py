"""File systems without locks, permissions, or a way to write to the disk at once."""

import errno
import fcntl
import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from features import plan_files
from util import files, filesystem
from util.checkpoints import run_folder
from util.files import UserError

LACKING = ["ENOLCK", "ENOSYS", "EINVAL", "EOPNOTSUPP"]


@pytest.fixture(autouse=True)
def warned(caplog):
    """Warnings come once in a process; each test sees them anew."""
    filesystem.warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    yield
    filesystem.warn_once.cache_clear()


def fail(name: str):
    number = getattr(errno, name)

    def failing(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return failing


# ---- locks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LACKING)
def test_without_locks_work_goes_on_after_one_warning(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", fail(name))
    for _ in range(2):
        with files.lock(tmp_path / "sub" / ".lock") as is_locked:
            assert not is_locked
    reason = os.strerror(getattr(errno, name))
    assert caplog.messages == [
        f"the file system of {tmp_path / 'sub'} has no locks ({reason}): "
        "do not start a second process that writes to this folder before this one has ended"
    ]


def test_a_run_starts_in_a_folder_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail("ENOLCK"))
    with run_folder(tmp_path / "run", "shapes", resume=False) as folder:
        files.write_json(folder / "config.json", {})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]


def test_several_processes_need_locks_to_make_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail("ENOLCK"))
    arguments = (tmp_path / "cache" / "a.npy", {}, 8, 2)
    with pytest.raises(UserError, match="several processes need locks.*--cache-dir on another"):
        plan_files(*arguments, world=2)
    assert len(plan_files(*arguments, world=1)) == 1


def test_other_errors_of_a_lock_are_errors(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), files.lock(tmp_path / "file" / ".lock"):
        pass


def hold(path: Path, held, freed) -> None:
    with files.lock(path) as is_locked:
        assert is_locked
        held.set()
        freed.wait(60)


def test_a_lock_that_another_process_holds_is_waited_for(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    held, freed = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / ".lock", held, freed))
    process.start()
    assert held.wait(60)
    with pytest.raises(UserError, match="taken"), files.lock(tmp_path / ".lock", 0.1, "taken"):
        pass
    freed.set()
    with files.lock(tmp_path / ".lock", 30, "taken") as is_locked:
        assert is_locked
    process.join(60)
    assert process.exitcode == 0 and caplog.messages == []


# ---- writing to the disk ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_without_fsync_files_are_written_after_one_warning(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", fail(name))
    for _ in range(2):
        files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and os.listdir(tmp_path) == ["a.txt"]
    (line,) = caplog.messages
    assert str(tmp_path) in line and "if the power fails" in line


@pytest.mark.parametrize("name", ["EINVAL", "EACCES", "EISDIR", "EBADF"])
def test_a_folder_that_cannot_be_synced_is_a_warning(name, tmp_path, monkeypatch, caplog):
    sync, opening = os.fsync, os.open

    def sync_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            fail(name)()
        sync(descriptor)

    def open_files_only(path, flags, *more, **keywords):
        if Path(path).is_dir():
            fail(name)()
        return opening(path, flags, *more, **keywords)

    with monkeypatch.context() as patch:
        if name in ("EINVAL", "EBADF"):
            patch.setattr(os, "fsync", sync_files_only)
        else:
            patch.setattr(os, "open", open_files_only)
        files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and len(caplog.messages) == 1


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_a_disk_that_fails_or_is_full_is_still_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(name))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        files.write_text(tmp_path / "a.txt", "text")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["EPERM", "EOPNOTSUPP"])
def test_without_permissions_of_files_they_are_written(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Path, "chmod", fail(name))
    files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and caplog.messages == []
