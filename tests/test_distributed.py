"""Two processes that torchrun starts, and one alone."""

import json
import time
import types
from pathlib import Path

import pytest
import torch
from helpers.tiny import SLOW_TO_LOOK, torchrun

from util import distributed
from util.files import UserError

JOB = """
import json, os, signal, sys, time
from util import distributed, files, program

def main():
    how, folder = sys.argv[1:]
    with distributed.join():
        print("begun")
        if how == "both":
            raise files.UserError("the data are missing")
        if how == "second" and distributed.rank() == 1:
            raise files.UserError("only mine are missing")
        if how == "killed" and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "script" and distributed.is_main():
            raise SystemExit(program.print_error("no such flag"))
        told = {
            "gathered": distributed.gather(distributed.rank() * 10),
            "shared": distributed.broadcast(f"of {distributed.rank()}"),
            "on_main": distributed.on_main(lambda: distributed.rank()),
            "total": distributed.all_reduce_sum([1.0, distributed.rank()]),
            "share": list(distributed.split_by_rank(range(5))),
            "world": distributed.world_size(),
        }
        with open(f"{folder}/{distributed.rank()}.json", "w") as file:
            json.dump(told, file)
        print("the end")

program.run(main)
"""


def errors(run) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("error:")]


def test_two_processes_tell_each_other_and_only_the_first_speaks(tmp_path):
    run = torchrun(JOB, "well", tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n") == ["begun", "the end", ""]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("gathered"), second.pop("gathered")) == ([0, 10], None)
    assert (first.pop("share"), second.pop("share")) == ([0, 2, 4], [1, 3])
    assert first == second == {"shared": "of 0", "on_main": 0, "total": [2.0, 1.0], "world": 2}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does may ask for Python's lock when Python is gone, which aborts the process."""
    run = torchrun("""
        import os, sys
        from util import distributed

        before = len(os.listdir("/proc/self/task"))
        with distributed.join():
            import torchvision  # late, as the scripts do
            distributed.barrier()
        sys.exit(len(os.listdir("/proc/self/task")) - before)
    """)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("both", "error: the data are missing"),
        ("second", "error: only mine are missing"),
        ("killed", "error: process 0 of 2 has lost another one"),
        ("script", "error: no such flag"),
    ],
)
def test_what_ends_a_process_ends_the_job_with_one_line(how, line, tmp_path):
    began = time.monotonic()
    run = torchrun(JOB, how, tmp_path, flags=SLOW_TO_LOOK)
    assert run.returncode != 0
    assert [said.startswith(line) for said in errors(run)] == [True], run.stderr
    assert time.monotonic() - began < 120  # and nobody waits for who is gone
    assert list(tmp_path.iterdir()) == []


def test_alone_there_is_nothing_to_tell():
    with distributed.join():
        assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
        assert distributed.gather("a") == ["a"]
        assert distributed.broadcast("a") == distributed.on_main(lambda: "a") == "a"
        assert distributed.all_reduce_sum([1, 2]) == [1.0, 2.0]
        assert distributed.split_by_rank([1, 2]) == [1, 2]
        distributed.barrier()


def test_an_error_that_is_not_of_the_connection_stays_what_it_is():
    assert distributed.as_lost(RuntimeError("shapes differ")) is None
    assert distributed.as_lost(ValueError("gloo")) is None
    assert isinstance(distributed.as_lost(RuntimeError("[gloo] closed")), ConnectionError)


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "chosen"),
    [
        ("gpu", True, False, "cuda"),
        ("GPU:1", True, False, "cuda:1"),
        ("gpu", False, True, "mps"),
        ("gpu", False, False, "device 'gpu' can't be used"),
        ("banana", True, True, "'banana' can't be used (there is no such device); choose from"),
    ],
)
def test_gpu_is_understood_and_a_wrong_device_is_one_short_line(
    name, cuda, mps, chosen, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    empty = torch.empty

    def pretend(size, device):  # this machine may lack the device
        there = {"cuda": cuda, "mps": mps}.get(str(device).partition(":")[0])
        if there is None:
            return empty(size, device=device)
        if not there:
            raise RuntimeError("no driver")
        return types.SimpleNamespace(device=torch.device(device))

    monkeypatch.setattr(torch, "empty", pretend)
    try:
        said = str(distributed.pick_device(name))
    except UserError as error:
        said = str(error)
    assert said == chosen or (" " in chosen and chosen in said and len(said) < 120)
