"""A file is written whole or not at all, and no file of the user's is lost."""

import errno
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from helpers.processes import child, finished

from util import files

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, modes and limits of POSIX")
NOT_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing


@pytest.mark.parametrize("writer", [files.write_text, files.write_json])
def test_what_is_written_is_read_back(writer, tmp_path):
    path = tmp_path / "new" / "folders" / "file.json"
    writer(path, '"é 日本"' if writer is files.write_text else "é 日本")
    assert files.read_json(path) == "é 日本"
    assert names(path.parent) == ["file.json"]


def test_bytes_are_written_as_they_are(tmp_path):
    files.write_bytes(tmp_path / "file", b"\r\n\x00\xff")
    assert (tmp_path / "file").read_bytes() == b"\r\n\x00\xff"


def test_json_is_readable_and_keeps_letters(tmp_path):
    files.write_json(tmp_path / "file.json", {"word": "été"})
    assert (tmp_path / "file.json").read_text(encoding="utf-8") == '{\n  "word": "été"\n}\n'


def test_a_file_name_that_is_no_text_survives_json(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg") if os.name == "posix" else "caf\udce9.jpg"
    files.write_json(tmp_path / "file.json", [name, "😀 \\udce9"])
    assert files.read_json(tmp_path / "file.json") == [name, "😀 \\udce9"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_until_the_end_readers_see_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_temporary_file_has_the_suffix_and_lies_beside(tmp_path):
    for name in ("plot.png", "no suffix", ".hidden", "a" * 250):
        with files.replacing(tmp_path / name) as temporary:
            assert temporary.parent == tmp_path.resolve()
            assert temporary.name.endswith(Path(name).suffix)
            assert temporary.name.startswith(".")
    assert len(names(tmp_path)) == 4


def test_a_writer_that_renames_is_no_trouble(tmp_path):
    with files.replacing(tmp_path / "file.txt") as temporary:
        other = temporary.with_name("other")
        other.write_text("new")
        other.chmod(0o600)
        other.replace(temporary)
    assert names(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "new"


@POSIX
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "file.txt", "")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~umask


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_that_was_there_keeps_its_mode(mode, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(mode)
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@POSIX
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    files.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@POSIX
def test_devices_and_pipes_are_written_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    files.check_writable(pipe, Path(os.devnull))


@POSIX
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    """A limit on file sizes stands for the disk: the write fails half-way in the same manner."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
program.run(lambda: files.write_text(sys.argv[1], "x" * 100_000))
"""
    code, out, err = finished(child(code, path))
    assert (code, out) == (2, "")
    assert err == f"error: cannot write (File too large): {path}\n"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write") as raised:
        files.write_text(tmp_path / "file.txt", "")
    assert raised.value.filename == str(tmp_path / "file.txt")
    assert names(tmp_path) == []


def test_an_error_about_another_file_is_not_blamed_on_this_one(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.replacing(tmp_path / "file.txt"):
        (tmp_path / "other.txt").read_text()
    assert raised.value.filename == str(tmp_path / "other.txt")


@POSIX
def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = """
with files.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert finished(child(code, path))[0] == -signal.SIGKILL
    assert path.read_text() == "old"
    own = tmp_path / ".file-of-mine.txt"
    own.touch()
    assert len(names(tmp_path)) == 3  # the half is there
    files.remove_leftovers(path)
    assert names(tmp_path) == [own.name, "file.txt"]


@pytest.mark.parametrize("check", [files.check_writable, lambda path: files.write_text(path, "")])
def test_a_path_that_cannot_be_a_file_is_refused_by_its_name(check, tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, errno.EISDIR),
        (tmp_path / "file" / "in.json", errno.ENOTDIR),
        (tmp_path / "file" / "deep" / "in.json", errno.ENOTDIR),
    ):
        with pytest.raises(OSError, match="cannot write") as raised:
            check(path)
        assert (raised.value.errno, raised.value.filename) == (reason, str(path))


@NOT_ROOT
@pytest.mark.parametrize("check", [files.check_writable, lambda path: files.write_text(path, "")])
def test_a_folder_without_permission_is_told_with_the_name_of_the_file(check, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write") as raised:
        check(tmp_path / "file.txt")
    tmp_path.chmod(0o700)
    assert raised.value.filename == str(tmp_path / "file.txt")


def test_checking_makes_nothing_and_asks_nothing_of_what_is_not_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.check_writable(None, tmp_path / "a" / "b" / "c.json", Path("d.json"), Path("e/f.json"))
    assert names(tmp_path) == []


def same(path, tmp_path):
    """Return further names of a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "symlink.json").symlink_to(path)
    os.link(path, tmp_path / "hard.json")
    return [path, tmp_path / "folder" / ".." / path.name, tmp_path / "linked" / path.name,
            tmp_path / "symlink.json", tmp_path / "hard.json"]  # fmt: skip


@POSIX
def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    path.write_text("mine")
    monkeypatch.chdir(tmp_path)
    for output in [*same(path, tmp_path), "own.json", "./own.json"]:
        with pytest.raises(files.UserError, match=r"can't be written: this command uses the same"):
            files.check_output(output, (".json",), [None, "other", path])
        with pytest.raises(files.UserError, match=r"own\.json"):
            files.check_output(path, (".json",), ["other", output])
    files.check_output(tmp_path / "new.json", (".json",), [path, "other"])
    assert path.read_text() == "mine"


@POSIX
def test_two_outputs_are_two_files_before_they_exist(tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(files.UserError, match="name another file"):
        files.check_output(tmp_path / "a.json", (), [tmp_path / "linked" / "a.json"])


def test_an_output_has_the_suffix_of_its_form(tmp_path):
    for name in ("a.json", "a.JSON", "a", ".hidden", "a.b.json"):
        files.check_output(tmp_path / name, (".json", ""))
    files.check_output(tmp_path / "a.jpg")
    files.check_output(os.devnull, (".json",))
    files.check_output(None, (".json",), [None])
    for name in ("a.jpg", "a.json.jpg", "a.jsonl"):
        with pytest.raises(files.UserError, match=rf"{name} is .* must end in \.json$"):
            files.check_output(tmp_path / name, (".json", ""))
    with pytest.raises(files.UserError, match=r"must end in \.png or \.jpg"):
        files.check_output(tmp_path / "a", (".png", ".jpg"))
    with pytest.raises(OSError, match="cannot write"):
        files.check_output(tmp_path, (".json",))


def test_only_an_earlier_file_of_the_same_content_may_be_replaced(tmp_path):
    path = tmp_path / "scores.json"

    def check(is_earlier):
        files.check_replaceable(path, is_earlier, "scores")

    check(pytest.fail)  # there is none
    path.touch()
    check(pytest.fail)  # empty: nothing is lost
    path.write_text("notes")
    check(lambda found: found == path)
    for refuses in (lambda _: False, files.read_json):
        with pytest.raises(files.UserError, match=r"scores\.json is there, and does not hold sco"):
            check(refuses)
    files.check_replaceable(None, pytest.fail, "scores")


# --- reading


def test_a_mark_at_the_start_of_a_json_file_is_no_matter(tmp_path):
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf["word"]')
    assert files.read_json(tmp_path / "file.json") == ["word"]


@pytest.mark.parametrize("content", [b"", b"[1,", b"\x80\x04}q.", b"[" * 200_000, b"word"])
def test_what_is_not_json_is_told_with_its_name(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json is not a JSON file"):
        files.read_json(tmp_path / "file.json")


# --- locks


def test_two_processes_never_hold_a_lock_at_once(tmp_path):
    code = """
with files.lock(sys.argv[1]), open(sys.argv[2], "a") as log:
    for word in ("in", "out"):
        print(word, file=log, flush=True)
        time.sleep(0.05)
"""
    here = tmp_path / "new" / ".lock", tmp_path / "log"
    for process in [child(code, *here) for _ in range(3)]:
        assert finished(process) == (0, "", "")
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3


@POSIX
def test_a_killed_process_frees_its_lock(tmp_path):
    process = child(
        "with files.lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)",
        tmp_path / ".lock",
    )
    assert process.stdout.readline() == b"held\n"
    process.kill()
    finished(process)
    start = time.monotonic()
    with files.lock(tmp_path / ".lock"):
        assert time.monotonic() - start < 5


def test_a_lock_that_others_hold_is_waited_for_as_long_as_is_wished(tmp_path):
    process = child(
        "with files.lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)",
        tmp_path / ".lock",
    )
    process.stdout.readline()
    try:
        with pytest.raises(ValueError, match="taken"), files.lock(tmp_path / ".lock", 0.1, "taken"):
            pass
    finally:
        process.kill()
        finished(process)
