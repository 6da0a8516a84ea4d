"""Bars are shown where people watch, and say how long a run still takes."""

import io
import sys
from types import SimpleNamespace

import pytest

from util import progress
from util.progress import TimeLeft, in_notebook, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_a_bar_is_shown_in_a_terminal_and_not_in_a_file(stream, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", output := stream())
    assert list(progress_bar(range(3), desc="counting", file=output)) == [0, 1, 2]
    assert ("counting" in output.getvalue()) == shown


@pytest.mark.parametrize(("config", "inside"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_shows_bars_although_it_is_no_terminal(config, inside, monkeypatch, recwarn):
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() == inside
    output = io.StringIO()
    with progress_bar(total=2, desc="training", file=output, gui=False) as bar:
        bar.update(2)
    assert ("training" in output.getvalue()) == inside and not recwarn.list


def test_a_bar_can_be_silenced_anywhere(monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    assert progress_bar(total=2, disable=True).disable


def test_the_time_left_is_that_of_the_steps_so_far(monkeypatch):
    clock = TimeLeft()
    assert clock.estimate(100) == "?"
    clock.count_step()
    clock.count_step()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.started + 3)
    assert clock.estimate(100) == "02:30" and clock.estimate(2500) == "1:02:30"


def test_a_log_has_a_line_a_minute(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.log_progress("abcdefgh", 8)) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "2 of 8 images, 0.0267 images/s, 03:44 left",
        "5 of 8 images, 0.0333 images/s, 01:30 left",
    ]
