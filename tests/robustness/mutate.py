"""Make small wrong changes to a copy of the project, one at a time, and see which tests notice.

    python tests/robustness/mutate.py [--only decoding,metrics] [--fault REGEX]

The changes are in `mutants.py`. A change is killed where a related test fails, and survives where
all of them pass: then a test is missing, and the exit code is 1. Each change takes seconds, as
torch is imported once, and every run of pytest is a process forked from this one (Linux, macOS).
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))
from mutants import AREAS, Mutant

ROOT = Path(__file__).parents[2]
BIG = ("weights", "notebooks", "docs", "static")  # linked, not copied
LIMIT = 300  # seconds; a change may let a loop never end


class Result:
    """Collects, as a plugin of pytest, how many tests ran and the first that failed."""

    def __init__(self):
        self.passed, self.failed = 0, ""

    def pytest_runtest_logreport(self, report) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} (not importable)"


def main() -> int:
    """Run what the command line asks for, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(AREAS), help="areas, with commas between")
    parser.add_argument("--fault", default="", help="only changes whose description matches")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - AREAS.keys():
        parser.error(f"no area {', '.join(unknown)}; choose from {', '.join(AREAS)}")
    import_libraries()
    counts, survivors = [], []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(Path(folder) / "project")
        for name in wanted:
            chosen = [each for each in AREAS[name] if re.search(options.fault, each.fault)]
            print(f"\n{name}", flush=True)
            for tests in dict.fromkeys(mutant.tests for mutant in chosen):
                seconds, verdict = run_tests(copy, tests)
                print(f"{seconds:4.0f} s  unchanged: {tests}: {verdict}", flush=True)
                if verdict.startswith("killed"):
                    sys.exit("a test fails on the unchanged code")
            alive = []
            for mutant in chosen:
                with changed(copy, mutant):
                    seconds, verdict = run_tests(copy, mutant.tests)
                if not verdict.startswith("killed"):
                    alive.append(f"{mutant.file}: {mutant.fault}")
                print(f"{seconds:4.0f} s  {mutant.file}: {mutant.fault}: {verdict}", flush=True)
            survivors += alive
            counts.append((name, len(chosen), len(alive)))
    print(f"\n{'area':<12}{'changes':>8}{'killed':>8}{'survived':>10}")
    for name, total, alive in counts:
        print(f"{name:<12}{total:>8}{total - alive:>8}{alive:>10}")
    print("\n".join(["", *(f"survived: {each}" for each in survivors)]))
    return int(bool(survivors))


def import_libraries() -> None:
    """Import what most tests need and no change touches, so that forked processes have it."""
    import hypothesis  # noqa: F401
    import nltk.tokenize.destructive  # noqa: F401
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import tyro  # noqa: F401

    torch.set_num_threads(1)  # a forked process has no other threads
    sys.dont_write_bytecode = True  # a change of equal length in the same second would go unseen


def copy_project(copy: Path) -> Path:
    """Copy the project's folder to `copy`, without its history and data; big folders are linked."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", *BIG)
    shutil.copytree(ROOT, copy, ignore=left_out)
    for name in BIG:
        (copy / name).symlink_to(ROOT / name)
    return copy


@contextlib.contextmanager
def changed(copy: Path, mutant: Mutant):
    """Make one change to the copy, and take it back at the end."""
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.file} has {text.count(mutant.old)} times, not once: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(copy: Path, tests: str) -> tuple[float, str]:
    """Return the seconds and the verdict: "killed by TEST" or how many tests passed."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=run_pytest, args=(copy, tests, answers))
    started = time.monotonic()
    process.start()
    process.join(LIMIT)
    if late := process.is_alive():
        process.kill()
        process.join()
    seconds = time.monotonic() - started
    if late or answers.empty():
        return seconds, "killed by the time limit" if late else "killed by the end of the process"
    passed, failed = answers.get()
    verdict = f"killed by {failed.removeprefix('tests/')}" if failed else f"{passed} tests passed"
    return seconds, verdict


def run_pytest(copy: Path, tests: str, answers) -> None:
    """Run the tests of the copy in this process, up to the first that fails."""
    import pytest

    os.chdir(copy)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # of processes that tests start
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != Path(__file__).parent]
    result = Result()
    code = pytest.main(["-x", "-n0", "-pno:cacheprovider", *shlex.split(tests)], [result])
    if code not in (0, 1) and not result.failed:
        result.failed = f"pytest itself, exit code {int(code)}"
    answers.put((result.passed, result.failed))


if __name__ == "__main__":
    sys.exit(main())
