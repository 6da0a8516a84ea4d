"""Flags fill a dataclass; every error is one line with its exit code, safe on a terminal."""

import dataclasses
import errno
import importlib
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Literal

import pytest
from helpers.processes import child, finished

from util import files, program

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, modes and limits of POSIX")


# --- flags


@dataclasses.dataclass(frozen=True)
class Inner:
    """Part of the flags."""

    size: int = 3
    """How large it is."""

    def __post_init__(self):
        if self.size < 0:
            raise files.UserError(f"size {self.size} must be at least 0")


@dataclasses.dataclass(frozen=True)
class Flags:
    """All flags."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    kind: Literal["round", "square"] = "round"
    """What shape it has."""
    place: Path | None = None
    """Where it is put."""
    form: Literal["csv", "html"] | None = None
    """How it is written (default: by its name)."""
    limit: int | None = None
    """How many."""


def parse(*argv, **how):
    return program.parse(Flags, list(argv), program="test.py", description="Test flags.", **how)


def test_flags_fill_the_dataclass_over_the_defaults_given():
    assert parse() == Flags()
    assert parse("--size", "4", "--place", "a b") == Flags(Inner(4), place=Path("a b"))
    assert parse("--kind", "round", default=Flags(Inner(5), "square")) == Flags(Inner(5), "round")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--siez", "4"],
            r"Unrecognized option: --siez; did you mean --size\? `python test.py --help`",
        ),
        (["--siez=4"], r"Unrecognized option: --siez; did you mean --size\? `python test.py"),
        (["--from", "csv"], r"--from; did you mean --form\? [^-]*--help` lists all$"),
        (["--form", "pdf"], r"error: invalid choice 'pdf' for --form; choose from 'csv', 'html'$"),
        (["--limit", "big"], r"error: Error parsing --limit: 'big' is no int$"),
        (["--kind", "oval"], r"'oval'.*'round', 'square'"),
        (["--size", "big"], r"--size.*'big'"),
        (["--size", "-1"], r"error: size -1 must be at least 0"),
        (["--size"], r"--size"),
        (["word"], r"word"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    argv, said, columns, encoding, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)
    sys.stdout.reconfigure(encoding=encoding)  # tyro draws its frames by it
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not set("│╭╰─") & set(err) and "----" not in err
    if columns == "200":
        assert re.search(said, err)


def test_help_goes_to_stdout_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert "--size" in out and "How large it is." in out and "Test flags." in out


def test_help_shows_an_optional_flag_without_none(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse("--help", default=Flags(limit=4))
    out, _ = capsys.readouterr()
    assert "None" not in out and out.count("default: by its name") == 1
    assert "--place PATH" in out and "--form {csv,html}" in out and "--limit INT" in out
    assert "(default: 4)" in out and "(default: round)" in out


@pytest.mark.parametrize(
    "name",
    ["train", "evaluate", "inference", "export", "features", "download_data", "app", "compare"],
)
def test_no_script_shows_none_in_its_help(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    words = capsys.readouterr().out.replace("│", " ").split()
    assert "{None" not in " ".join(words)
    assert "(default: None)" not in " ".join(words)


# --- running


def raising(error):
    def main():
        print("before")
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (files.UserError("size 3\n  is wrong"), "error: size 3 is wrong"),
        (files.UserError(), "error: UserError"),
        (FileNotFoundError("no dataset at x"), "error: no dataset at x"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "error: No such file: x"),
        (OSError(errno.ENOSPC, "No space left"), "error: No space left"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(error, line, capsys):
    with pytest.raises(SystemExit) as stop:
        program.run(raising(error))
    assert stop.value.code == 2
    assert capsys.readouterr() == ("before\n", line + "\n")


@pytest.mark.parametrize(
    "error",
    [ValueError("zip() argument 2 is longer than argument 1"), KeyError("a"), RuntimeError("x")],
)
def test_a_bug_keeps_its_traceback_and_asks_to_be_reported(error, capsys):
    with pytest.raises(SystemExit) as stop:
        program.run(raising(error))
    out, err = capsys.readouterr()
    *trace, last = err.splitlines()
    assert (stop.value.code, out) == (1, "before\n")
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == f"{type(error).__name__}: {error}"
    assert "please report it" in last and last.endswith(f"at {program.ISSUES}")


class OutOfMemoryError(RuntimeError):
    """Named as torch's own, which is known by its name."""


ADVICE = "use a smaller --batch-size, in training a larger --accumulate, or --device cpu"


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "7.28 TiB"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 …"), "2.00 GiB"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4000000000000 bytes. Error code 12"
            ),
            "4000000000000 bytes",
        ),
        (RuntimeError("CUDA error: out of memory"), ""),
    ],
)
def test_too_little_memory_is_one_line_with_advice(error, size, capsys):
    with pytest.raises(SystemExit) as stop:
        program.run(raising(error))
    size = f" ({size} could not be allocated)" if size else ""
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: out of memory{size}; {ADVICE}\n"


def test_torchs_own_error_of_too_little_memory_is_known(capsys):
    torch = pytest.importorskip("torch")
    assert program.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(SystemExit):
        program.run(lambda: torch.empty(2**55))
    assert capsys.readouterr().err.startswith("error: out of memory (")


def test_a_script_that_ends_well_returns(capsys):
    program.run(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_is_asked_for_is_one_word_and_exit_code_130(number):
    process = child("program.run(lambda: (print('on', flush=True), time.sleep(60)))")
    process.stdout.readline()
    process.send_signal(number)
    assert finished(process) == (130, "", "interrupted\n")


@POSIX
@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_leaves_early_is_no_error(flush):
    reader, writer = os.pipe()
    process = child(f"program.run(lambda: print(sys.stdin.read(), flush={flush}))", stdout=writer)
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(b"words", timeout=30)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
@pytest.mark.parametrize("flush", [True, False])
def test_output_to_a_full_disk_is_one_line(flush):
    with open("/dev/full", "w") as full:
        process = child(f"program.run(lambda: print('words', flush={flush}))", stdout=full)
        assert finished(process) == (2, "", "error: No space left on device\n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "café 犬"), ("ascii", r"caf\xe9 \u72ac")]
)
def test_a_caption_prints_on_any_terminal(encoding, shown):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    process = child("program.run(lambda: print('café 犬'))", env=env)
    code, out, err = finished(process)
    assert (code, out.strip(), err) == (0, shown, "")


def test_json_written_to_stdout_reaches_it(tmp_path):
    if not Path("/dev/stdout").exists():
        pytest.skip("no /dev/stdout here")
    code, out, err = finished(child("files.write_json('/dev/stdout', [1])"))
    assert (code, json.loads(out), err) == (0, [1], "")


# --- text from outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07.jpg", r"\x1b]0;owned\x07.jpg"),
        ("a\x9b2Jb\x7f\r\n\t", r"a\x9b2Jb\x7f\r\n\t"),
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("\u2066a\u2069 \u200f\u061c\u2028\ufeff", r"\u2066a\u2069 \u200f\u061c\u2028\ufeff"),
        ("\udcff.png", r"\udcff.png"),
        ("Bild 5.30\u202fPM\u3000é 狗 می\u200cخواهم 👨\u200d👩 ", None),  # names that people have
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    assert program.printable(text) == (text if shown is None else shown)


def test_a_bugs_message_cannot_move_the_cursor(capsys):
    with pytest.raises(SystemExit):
        program.run(raising(RuntimeError("a\x1b[2Jb\nsecond")))
    said = capsys.readouterr().err
    assert "\x1b" not in said and r"RuntimeError: a\x1b[2Jb" in said.splitlines()


def test_a_log_line_cannot_move_the_cursor(capsys, monkeypatch):
    logger = logging.getLogger("a test's")
    monkeypatch.setattr(logger, "propagate", False)  # pytest has a handler of its own
    program.run(lambda: logger.warning("left out: %s", "a\x1b[2J\u202e.png"))
    assert capsys.readouterr().err == "left out: a\\x1b[2J\\u202e.png\n"
