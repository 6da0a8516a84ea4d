"""Progress bars: in a terminal and in a notebook, silent where the output goes to a file."""

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """Return a bar of tqdm with `settings`, over `iterable` or to be updated by hand.

    It is shown in a terminal and in a notebook, where stderr is no terminal either, but people
    watch; elsewhere it is disabled, unless `settings` say `disable`.
    """
    if not in_notebook():
        return tqdm(iterable, **{"disable": None, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it becomes a bar of text
        from tqdm.auto import tqdm as notebook_tqdm
    return notebook_tqdm(iterable, **{"disable": False, **settings})


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook (Jupyter, Colab, VS Code)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def log_progress(
    items: Iterable[Any], total: int, unit: str = "images", seconds: float = 60.0
) -> Iterator[Any]:
    """Yield the items, and print a line to stderr every `seconds`: how many are done, time left.

    For log files, where a bar would be a line of many thousand characters.
    """
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed >= seconds:
            rate, printed = done / (now - started), now
            left = tqdm.format_interval((total - done) / rate)
            print(f"{done} of {total} {unit}, {rate:.3g} {unit}/s, {left} left", file=sys.stderr)
        yield item


class TimeLeft:
    """An estimate of the time that a run still needs, from the time its steps took so far.

    All between two steps counts: validation, files, the next epoch's images.
    """

    def __init__(self) -> None:
        self.started, self.steps = time.monotonic(), 0

    def count_step(self) -> None:
        """Count a step as done."""
        self.steps += 1

    def estimate(self, steps: float) -> str:
        """Return the time that as many further `steps` take, as 1:23:45; "?" before the first."""
        if not self.steps:
            return "?"
        seconds = (time.monotonic() - self.started) / self.steps * steps
        return tqdm.format_interval(seconds)
