"""A run is killed or stopped, anywhere; nothing of it is lost.

One process imports the project and forks a life of the run for each attempt, so that a life takes
a second or two. The lives tell by shared memory what they are at, and a signal is sent at a random
moment of that.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import ROOT, SMALL, as_flickr8k, assert_same_run, losses, run_code

import dataset
import train
import trainer
from encoder import Encoder

if os.name != "posix":
    pytest.skip("signals and forks of POSIX", allow_module_level=True)

# Lives of runs, by a plan: for each run the (phase, signal) that end its lives, one by one. The
# last life of each is left alone. A signal may come too late, when the run is over: the plan is
# gone through again until enough of them have ended a life. Prints what happened as JSON.
LIVES = """
import itertools, json, mmap, os, random, signal, sys, time
from pathlib import Path
import matplotlib.pyplot, filelock, numpy, safetensors.torch
import evaluate, train, trainer
from util import extraction, plots, program

job = json.loads(sys.argv[1])
PHASES = ["between", "caching", "step", "evaluation", "checkpoint", "plot", "critical", "end"]
memory = numpy.frombuffer(mmap.mmap(-1, 4096))  # shared with the lives
now, entered, seconds = memory[:8], memory[8:16], memory[16:24]
extraction.SAVE_EVERY = 1

def marking(owner, name, phase):
    original = getattr(owner, name)
    def marked(*arguments, **keywords):
        at = PHASES.index(phase(arguments) if callable(phase) else phase)
        outer, now[0], began = now[0], at, time.perf_counter()
        entered[at] += 1
        try:
            return original(*arguments, **keywords)
        finally:
            seconds[at] += time.perf_counter() - began
            now[0] = outer
    setattr(owner, name, marked)

marking(extraction, "extract", "caching")
stage = lambda given: "critical" if given[0].critical else "step"
marking(trainer.Trainer, "clip_gradients", stage)
marking(evaluate, "caption_batch", "evaluation")
marking(evaluate, "batch_loss", "evaluation")
marking(train, "save_state", "checkpoint")
marking(train, "write_metrics", "checkpoint")
marking(train.CaptionModel, "save", "checkpoint")
marking(train, "finish", "end")
for name in ("learning_curve", "caption_page"):
    if not job["plots"]:
        setattr(plots, name, lambda *arguments, **keywords: None)
    marking(plots, name, "plot")

def live(folder):
    "Fork a life of the run in the folder; return its process id."
    memory[:] = 0
    argv = [*job["flags"], "--output", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    if (folder / "run/config.json").exists():  # else the same command begins the run anew
        argv = ["--resume", "--output", str(folder / "run")]
    if child := os.fork():
        return child
    os.setsid()
    with open(folder / "said.txt", "a") as said:
        os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
        code = 1
        try:
            program.run(lambda: train.main(argv))
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

def over(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

def end(child, phase, number):
    "Send the signal at a random moment of the phase; return the phase it came in, None if none."
    at = PHASES.index(phase)
    mean = usual[1][at] / max(1, usual[0][at]) if at else usual[2]
    which = random.randint(1, max(1, int(usual[0][at]) // 2)) if at else 0
    while entered[at] < which:
        if over(child):
            return None
        time.sleep(0.0005)
    time.sleep(random.uniform(0, mean))
    if over(child):
        return None
    if number == signal.SIGKILL:
        os.kill(child, number)
    else:  # as a terminal and many a scheduler do: to the loader's workers too
        os.killpg(child, number)
    return int(now[0])

random.seed(job["seed"])
base = Path(job["base"])
(base / "whole").mkdir()
began = time.perf_counter()
child = live(base / "whole")
while not now[0] and not over(child):
    time.sleep(0.0005)
start = time.perf_counter() - began
assert os.waitpid(child, 0)[1] == 0, (base / "whole/said.txt").read_text()
usual = entered.copy(), seconds.copy(), start
steps = [PHASES.index("step"), PHASES.index("critical")]
report = {"steps": float(entered[steps].sum()), "runs": []}
ended, planned = 0, len(job["plan"])
for number, plan in enumerate(itertools.chain(*[job["plan"]] * 4)):
    if number >= planned and ended >= job["least"]:
        break
    folder = base / str(number)
    folder.mkdir()
    run = {"folder": str(folder / "run"), "ends": [], "steps": 0.0}
    for phase, sent in [*plan, (None, None)]:
        child = live(folder)
        came = end(child, phase, sent) if phase else None
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        run["steps"] += entered[steps].sum()
        run["ends"].append((phase, None if came is None else PHASES[came], code))
        ended += code in (130, -signal.SIGKILL)
        with open(folder / "said.txt", "a") as said:
            print(f"-- {run['ends'][-1]}", file=said)
    report["runs"].append(run)
print(json.dumps(report))
"""


def live(
    base: Path, flags: list[str], plan: list, seed: int = 0, plots: bool = True, least: int = 0
) -> dict:
    """Return what became of the lives of `plan`, of which at least that many were ended.

    The undisturbed run lies in base/whole/run.
    """
    job = {"base": str(base), "flags": flags, "plan": plan, "seed": seed, "plots": plots}
    job["least"] = least
    done = subprocess.run(
        [sys.executable, "-c", LIVES, json.dumps(job)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    whole = base / "whole/run"
    for run in report["runs"]:
        said = Path(run["folder"], "../said.txt").read_text()
        assert run["ends"][-1][2] == 0, said
        assert "Traceback" not in said
        assert_same_run(Path(run["folder"]), whole)
        assert losses(Path(run["folder"])) == losses(whole)
        ours, theirs = (Path(each, "scores.json").read_text() for each in (run["folder"], whole))
        assert ours == theirs
        for name in ("last", "best"):  # what a kill left half written is gone
            assert not list(Path(run["folder"]).glob(f".{name}-*"))
    return report


@pytest.fixture(scope="module")
def resnet(drawn, tmp_path_factory) -> list[str]:
    """Flags of a run with a frozen CNN, and so with a cache, that has both stages."""
    base = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    torch.save(Encoder("resnet18").cnn.state_dict(), base / "resnet18.pth")
    data = as_flickr8k(drawn, base / "data", ("train", "dev", "test"))
    return [
        "--cnn-backbone", "resnet18", "--cnn-weights", str(base / "resnet18.pth"), "--img-size",
        "64", "--epochs", "2", "--scst-epochs", "1", "--batch-size", "4", "--d-model", "16",
        "--n-head", "2", "--n-decode", "1", "--fc-dim", "32", "--min-count", "1", "--workers", "0",
        "--dropout", "0.1", "--data-dir", str(data),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_or_stopped_anywhere_ends_with_the_weights_of_one_left_alone(resnet, tmp_path):
    killed = [(phase, signal.SIGKILL) for phase in ("checkpoint", "critical")]
    stopped = [("step", signal.SIGINT)]
    flags = [*resnet, "--limit", "8", "--epochs", "1", "--batch-size", "2"]
    report = live(tmp_path, flags, [killed, stopped], plots=False)
    first, second = report["runs"]
    assert -signal.SIGKILL in [code for _, _, code in first["ends"]]
    assert [code for _, _, code in second["ends"][:-1]] == [130]
    # Asked to stop, it saves first: no step is done twice.
    assert second["steps"] == report["steps"]


PHASES = ["between", "caching", "step", "evaluation", "checkpoint", "plot", "critical", "end"]


@pytest.mark.slow
def test_thirty_kills_lose_nothing_of_a_run_with_a_cache(resnet, tmp_path):
    report = live(tmp_path, resnet, kills(40, PHASES), 1, least=30)
    assert_killed(report, 30)


@pytest.mark.slow
def test_thirty_kills_lose_nothing_of_a_run_from_pixels(drawn, tmp_path):
    flags = [*SMALL, "--scst-epochs", "1", "--dropout", "0.1", "--data-dir", str(drawn)]
    phases = [each for each in PHASES if each != "caching"]
    report = live(tmp_path, flags, kills(40, phases), 2, least=30)
    assert_killed(report, 30)


def kills(count: int, phases: list[str]) -> list[list[tuple[str, int]]]:
    """Return a plan of kills in every phase, a run for each round of them."""
    return [[(phase, signal.SIGKILL) for phase in phases] for _ in range(-(-count // len(phases)))]


def assert_killed(report: dict, least: int) -> None:
    died = [came for run in report["runs"] for _, came, code in run["ends"] if code == -9]
    print({phase: died.count(phase) for phase in PHASES})
    assert len(died) >= least


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_twenty_requests_to_stop_lose_no_step(cached, resnet, drawn, tmp_path):
    flags = resnet if cached else [*SMALL, "--data-dir", str(drawn), "--workers", "2"]
    random.seed(3)
    phases = [each for each in PHASES if each != "between" and (cached or each != "caching")]
    plan = [
        [(phase, random.choice([signal.SIGTERM, signal.SIGINT])) for phase in phases]
        for _ in range(3)
    ]
    report = live(tmp_path, [*flags, "--scst-epochs", "1"], plan, 3, least=20)
    codes = [code for run in report["runs"] for _, _, code in run["ends"][:-1]]
    print(codes.count(130), "stops")
    assert codes.count(130) >= 20 and set(codes) <= {0, 130}
    assert {run["steps"] for run in report["runs"]} == {report["steps"]}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_birth_of_a_loaders_worker_kills_it_not(sent, monkeypatch):
    main, threads = os.getpid(), torch.set_num_threads

    def struck(number):  # what a worker does first, before it can say what it ignores
        if os.getpid() != main:
            os.kill(os.getpid(), sent)
        threads(number)

    monkeypatch.setattr(torch, "set_num_threads", struck)
    loader = dataset.Loader(range(6), 2, num_workers=2, multiprocessing_context="fork")
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_loader_that_an_error_keeps_does_not_keep_the_program_from_ending():
    code = """
        import dataset
        loader = iter(dataset.Loader(range(6), 2, num_workers=2))
        next(loader)
        raise SystemExit(3)
    """
    assert run_code(code).returncode == 3  # it has two minutes


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the project catches it."""


def test_a_kill_between_the_second_stages_first_files_begins_it_with_the_same_model(
    drawn, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer.Trainer, "best_score", lambda self: -2.0)  # each epoch is saved
    small = [*SMALL, "--limit", "8", "--epochs", "1", "--scst-epochs", "1", "--scst-lr", "1e-2"]
    flags = [*small, "--data-dir", str(drawn), "--output"]
    train.main([*flags, str(tmp_path / "whole")])
    rows = train.write_metrics

    def killed(path, table):
        if len(table) == 2:  # best.safetensors is of the second stage already, last.pt is not
            raise KilledError
        rows(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_metrics", killed)
        with pytest.raises(KilledError):
            train.main([*flags, str(tmp_path / "run")])
    train.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", tmp_path / "whole")
