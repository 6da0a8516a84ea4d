"""Safe files and plain errors: atomic writes, locks, flags, and a user's mistake in one line.

Every file this project writes goes through `replacing`, so a crash, a full disk or Ctrl-C leaves
either the old file or the new one, never half of one.
"""

import contextlib
import errno
import io
import json
import os
import re
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, to be shown as one line: it names the value and says what to do."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is fsynced and renamed to `path`.

    On any exception the temporary file is removed and `path` stays as it was. Folders that are
    missing are made, links are followed, and the file keeps its mode. The temporary name keeps the
    suffix, which some writers choose a format by. Devices and pipes (/dev/stdout) can't be
    replaced: they are yielded themselves.
    """
    check_writable(path)
    if is_special(Path(path)):
        yield Path(path)
        return
    target, temporary = Path(os.path.realpath(path)), None
    try:
        temporary = temporary_file(target)
        yield temporary
        with open(temporary, "rb+") as file:
            temporary.chmod(usual_mode(target))
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        # A full disk names no file, and the temporary name would tell nobody anything.
        if error.errno and error.filename in (None, str(target), str(temporary)):
            raise write_error(error.errno, path) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(*paths: str | Path | None) -> None:
    """Raise OSError where a path can't be written, before hours of work go into what it is for.

    None stands for a file that nobody asked for. Nothing is made.
    """
    for path in filter(None, paths):
        obstacle = find_obstacle(Path(path).absolute())
        if obstacle:
            raise write_error(obstacle, path)


def find_obstacle(path: Path) -> int:
    """Return the errno that writing to `path` would meet for certain, else 0."""
    if path.is_dir():
        return errno.EISDIR
    place = path
    if not is_special(path):
        place = next(folder for folder in path.parents if folder.exists())
        if not place.is_dir():
            return errno.ENOTDIR
    return 0 if os.access(place, os.W_OK) else errno.EACCES


def write_error(number: int, path: str | Path) -> OSError:
    """Return the error that says why `path` can't be written."""
    return OSError(number, f"cannot write ({os.strerror(number)})", str(path))


def is_special(path: Path) -> bool:
    """Return whether `path` is there but no regular file: a device, a pipe."""
    return path.exists() and not path.is_file()


def temporary_file(target: Path) -> Path:
    """Return a new empty file beside `target`, whose folder is made where it is missing."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.stem[:40]}-", suffix=target.suffix, dir=target.parent
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    os.close(handle)
    return Path(name)


def sweep(target: Path) -> None:
    """Remove what killed processes left of writing `target`; nobody else may be writing it now."""
    for left in target.parent.glob(f".{target.stem[:40]}-????????{target.suffix}"):
        left.unlink(missing_ok=True)


def usual_mode(target: Path) -> int:
    """Return the permissions `target` has, or a new file would get: mkstemp's are private."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)  # it can be read only by setting it
    os.umask(umask)
    return 0o666 & ~umask


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
    text = f"{json_text(value)}\n"
    # File names may hold bytes that are no text (lone surrogates): "\udcff" is also JSON's escape.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def json_text(value: Any) -> str:
    """Return `value` as JSON to be read by people, too."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def read_json(path: str | Path) -> Any:
    """Return what the JSON file holds; a file that is not JSON is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error})") from error


@contextlib.contextmanager
def lock(path: str | Path, wait: float = -1, refusal: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path` among processes; a killed process frees its lock.

    After `wait` seconds without it (-1: never) a ValueError says the `refusal`.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        holding = FileLock(path).acquire(timeout=wait)
    except Timeout:
        raise UserError(refusal) from None
    with holding:
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
    """Return tyro's framed message as one line, without its title.

    Where the terminal has no UTF-8 there is no frame, and the title is what precedes a first rule.
    """
    lines = [line.strip(" │") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = re.split(r"^[─-]{4,}$", "\n".join(lines), flags=re.MULTILINE)
    if "╭" not in box:
        parts = parts[1:] or parts
    said = "; ".join(" ".join(part.split()) for part in parts if part.strip())
    return re.sub(r"^Error parsing \w+: ", "", said)  # the name of a dataclass: no user knows it


def fail(message: str) -> int:
    """Print one error line to stderr and return exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    """Return the message in one line, without control characters: names may be anybody's."""
    text = " ".join(str(message).split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def run(main: Callable[[], Any]) -> None:
    """Run a script's `main`; exit with 2 and one line for a user's mistake or a full disk."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without é gets \xe9, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    # Pillow's two lines about a file: what can't be read is told in one, by name.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # A scheduler's SIGTERM is Ctrl-C: what was begun is put away, not dropped.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()  # here, where a failure can still be told
    except BrokenPipeError:  # `… | head`: the reader has what it wanted
        give_up_output()
    except (ValueError, OSError) as error:
        give_up_output()
        sys.exit(fail(explain(error)))
    except KeyboardInterrupt:
        give_up_output()
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def give_up_output() -> None:
    """Flush stdout; if that fails, send the rest nowhere, lest Python complain at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str:
    """Return what went wrong as a sentence: the system's words for an OSError it raised itself."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
