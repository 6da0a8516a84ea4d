"""Safe files and plain errors: atomic writes, locks, flags, and a user's mistake in one line.

Every file this project writes goes through `replacing`, so a crash, a full disk or Ctrl-C leaves
either the old file or the new one, never half of one.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is fsynced and renamed to `path`.

    On any exception the temporary file is removed and `path` stays as it was. Folders that are
    missing are made. The temporary name keeps the suffix, which some writers choose a format by.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private, and writers that rename do as they like: restore the usual
        # mode (a umask can be read only by setting it).
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.errno:  # a full disk names no file
            raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable, where the system can do it (Windows can't)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as readable JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Return what the JSON file holds; a file that is not JSON is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` among processes; a killed process frees its lock."""
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def parse(
    config: type, argv: list[str] | None, *, program: str, description: str, default: Any = None
) -> Any:
    """Return a `config` (a dataclass) filled from the command line, over `default`'s values.

    `program` is the script's file name. `--help` prints the flags; a flag or value that is not
    known exits with code 2 and one line.
    """
    import tyro

    said = io.StringIO()
    values = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                args=argv,
                prog=program,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                **values,
            )
    except SystemExit as stop:
        if stop.code:
            raise SystemExit(fail(unframed(said.getvalue()))) from None
        raise


def unframed(box: str) -> str:
    """Return tyro's framed message as one line, without its title."""
    lines = [line.strip(" │|─╰╯") for line in box.splitlines() if not line.startswith("╭")]
    return " ".join(line for line in lines if line)


def fail(message: str) -> int:
    """Print one error line to stderr and return exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def run(main: Callable[[], Any]) -> None:
    """Run a script's `main` and exit: 0, or 2 with one line for a user's mistake or a full disk."""
    try:
        main()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `… | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        sys.exit(fail(explain(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def explain(error: BaseException) -> str:
    """Return what went wrong as a sentence: the system's words for an OSError it raised itself."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
