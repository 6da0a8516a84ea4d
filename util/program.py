"""Command-line flags, exit codes, and messages that are one line and safe on a terminal."""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import re
import signal
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from util.files import UserError

ISSUES = "https://github.com/OWNER/image-captioning/issues"


def parse(
    config: type, argv: list[str] | None, *, program: str, description: str, default: Any = None
) -> Any:
    """Return the dataclass `config` filled from the command line, on top of `default`'s values.

    `program` is the script's file name. `--help` prints the flags. An unknown flag, an invalid
    value, or a ValueError of the dataclass exits with code 2 and one line.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    for before, argument in zip(["", *argv], argv, strict=False):
        if not argument or re.fullmatch("--[^=]*=", argument):  # a Path of "" is the current folder
            flag = argument.rstrip("=") or (before if before.startswith("-") else "")
            name = f"the value of {flag}" if flag else "an argument"
            raise SystemExit(print_error(f"{name} is empty; is a variable of the shell not set?"))
    stderr = io.StringIO()
    values = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr), short_help() as kinds:
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
            message = rewrite_error(strip_frame(stderr.getvalue()), program, kinds)
            raise SystemExit(print_error(message)) from None
        raise


@contextlib.contextmanager
def short_help() -> Iterator[dict[str, Any]]:
    """In the block, tyro's --help shows `X | None` as X, and no default of None.

    Yields the flags with their types, which are known when tyro has read the dataclass.
    """
    import tyro

    registry, busy, kinds = tyro.constructors.ConstructorRegistry(), [], {}

    @registry.struct_rule
    def rule(info: Any) -> Any:
        if busy or not dataclasses.is_dataclass(info.type):
            return None  # tyro's own rule takes it
        busy.append(info)
        try:
            spec = registry.get_struct_spec(info)
        finally:
            busy.pop()
        kinds.update((f"--{field.name.replace('_', '-')}", field.type) for field in spec.fields)
        fields = tuple(shorten_field(field) for field in spec.fields)
        return dataclasses.replace(spec, fields=fields)

    with registry:
        yield kinds


def shorten_field(field: Any) -> Any:
    """Return tyro's description of a flag without the None of its type and its default."""
    import tyro

    kind, optional = drop_none(field.type)
    if not optional:
        return field
    choices = list_choices(kind)
    metavar = f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()

    def hint(default: str) -> str:
        return "" if default == "None" else f"(default: {default})"

    about = tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)
    return dataclasses.replace(field, type=Annotated[field.type, about])


def drop_none(kind: Any) -> tuple[Any, bool]:
    """Return X and True for the type `X | None`, any other type as it is and False."""
    kinds = [each for each in get_args(kind) if each is not NoneType]
    optional = len(kinds) == 1 and NoneType in get_args(kind)
    return (kinds[0], True) if optional else (kind, False)


def list_choices(kind: Any) -> list[str]:
    """Return the values that a Literal or an optional one has, none for other types."""
    kind, _ = drop_none(kind)
    return [str(each) for each in get_args(kind)] if get_origin(kind) is Literal else []


def rewrite_error(message: str, program: str, kinds: dict[str, Any]) -> str:
    """Return tyro's message without usages: the most similar flag, or the choices of a flag.

    `kinds` has the type of each flag.
    """
    if found := re.match(r"Unrecognized (?:or misplaced )?options:? (\S+?)(?:[ ,;=]|$)", message):
        typed = found[1]
        like = difflib.get_close_matches(typed.replace("_", "-"), kinds, 1)
        advice = f"did you mean {like[0]}? " if like and typed.startswith("-") else ""
        return f"Unrecognized option: {typed}; {advice}`python {program} --help` lists all"
    message = re.sub(r"; (Argument helptext|For full helptext).*", "", message)
    if found := re.match(r"(invalid choice .*) for argument '(--[\w-]+)'", message):
        choices = list_choices(kinds.get(found[2]))
        if choices:
            return f"{found[1]} for {found[2]}; choose from {', '.join(map(repr, choices))}"
    # `X | None`: tyro says why the value is neither.
    if found := re.match(r"Error parsing (\S+): no type matching .* from \[(.*?)\]", message):
        name = getattr(drop_none(kinds.get(found[1]))[0], "__name__", "value")
        return f"Error parsing {found[1]}: {found[2]} is no {name}"
    return message


def strip_frame(text: str) -> str:
    """Return tyro's framed error message as one line, without its title.

    On a terminal without UTF-8 there is no frame; the title is then the text above the first rule.
    """
    lines = [line.strip(" │") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    parts = re.split(r"^[─-]{4,}$", "\n".join(lines), flags=re.MULTILINE)
    if "╭" not in text:
        parts = parts[1:] or parts
    message = "; ".join(" ".join(part.split()) for part in parts if part.strip())
    return re.sub(r"^Error parsing \w+: ", "", message)  # users don't know the dataclass's name


def print_error(message: str) -> int:
    """Print one error line to stderr and return exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def printable(text: Any) -> str:
    """Return `text` with control and format characters as escapes (\\x1b), safe on a terminal.

    For all text from outside: names of files, captions, image ids. A terminal would obey it: move
    the cursor, change its title, or show a text in another order than it has.
    """
    return "".join(escape(char) if is_control(char) else char for char in str(text))


def is_control(char: str) -> bool:
    """Return whether a terminal might obey `char`: controls, direction marks, line separators."""
    if char.isprintable() or char in "\u200c\u200d":  # joiners: inside words of Persian, and emoji
        return False
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def escape(char: str) -> str:
    return ascii(char)[1:-1]


def one_line(message: str) -> str:
    """Return the message as one line of printable characters only."""
    text = " ".join(str(message).split())
    return "".join(char if char.isprintable() else escape(char) for char in text)


class PrintableFormatter(logging.Formatter):
    """Log records as lines that are safe to print."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


def run(main: Callable[[], Any]) -> None:
    """Run a script's `main` and exit with a code that tells what happened.

    0: done. 2, with one line: a mistake of the user, an error of the system (a full disk, a
    missing file), or too little memory. 130: interrupted. 1, with a traceback: a bug.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without é shows \xe9, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.lastResort.setFormatter(PrintableFormatter())  # of logs that nobody has configured
    # Pillow warns about damaged files in two lines; our own message names the file.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # A scheduler's SIGTERM works like Ctrl-C, so that `finally` blocks run.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()  # here, where a failure can still be reported
    except BrokenPipeError:  # `… | head`: the reader has what it wanted
        flush_or_discard_stdout()
    except KeyboardInterrupt:
        flush_or_discard_stdout()
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        flush_or_discard_stdout()
        if isinstance(error, (UserError, OSError)):
            sys.exit(print_error(explain(error)))
        if is_out_of_memory(error):
            size = re.search(r"allocate ([\d.]+ \w+)", str(error))
            sys.exit(
                print_error(
                    f"out of memory{f' ({size[1]} could not be allocated)' if size else ''}; use a "
                    "smaller --batch-size, in training a larger --accumulate, or --device cpu"
                )
            )
        for line in traceback.format_exc().splitlines():  # its message may be a stranger's text
            print(printable(line), file=sys.stderr)
        print(f"This is a bug in the program: please report it, with the lines above, at {ISSUES}",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on the CPU or a GPU.

    torch's errors are recognized by name and text: scripts without torch should not import it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    texts = ("can't allocate memory", "out of memory")  # the CPU's allocator; MPS, CUDA libraries
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def flush_or_discard_stdout() -> None:
    """Flush stdout; if that fails, redirect it to nowhere, or Python complains when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str:
    """Return an error as a sentence; of an OSError raised by the system, its text and file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
