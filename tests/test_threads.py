"""How many CPUs a process may use, threads that sleep while they wait, and overloaded machines."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from util import threads
from util.files import UserError

ROOT = Path(__file__).parent.parent


def groups(tmp_path: Path, text: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write control groups: what /proc/self/cgroup says, and files below /sys/fs/cgroup."""
    for name, content in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(text)
    return tmp_path / "sys", tmp_path / "own"


QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"
V1, V1_SHARED = "3:cpuset:/\n1:cpu:/docker/ab\n", "4:cpu,cpuacct:/\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a\n", {"a/cpu.max": "300000 100000\n", "cpu.max": "100000 100000\n"}, 1),
        # In a container of version 1, the group's path is the host's, but its folder the root.
        (V1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (
            V1_SHARED,
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("0::/\n", {"cpu.max": "nonsense"}, math.inf),
        ("0::/\n", {"cpu.max": "100000 0\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_quota_of_a_container(own, files, quota, tmp_path):
    assert threads.read_quota(*groups(tmp_path, own, files)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert threads.read_quota(tmp_path, tmp_path / "none") == math.inf
    assert threads.read_quota() > 0


@pytest.mark.parametrize(
    ("allowed", "quota", "count"),
    [(64, 2.0, 2), (64, 1.5, 2), (64, 0.1, 1), (4, math.inf, 4), (2, 8, 2)],
)
def test_the_cpus_are_those_allowed_or_the_containers_share(allowed, quota, count, monkeypatch):
    monkeypatch.setattr(threads, "count_allowed", lambda: allowed)
    monkeypatch.setattr(threads, "read_quota", lambda: quota)
    assert threads.count_cpus() == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_only_cpus_that_the_process_may_use_are_counted():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from util import threads; print(threads.count_cpus(), threads.default_workers())"
    )
    assert run(code) == "1 1"


@pytest.mark.parametrize(
    ("cpus", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (8, 4, 2), (2, 8, 1)]
)
def test_the_processes_of_a_job_share_the_workers(cpus, processes, workers, monkeypatch):
    monkeypatch.setattr(threads, "count_cpus", lambda: cpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert threads.default_workers() == workers


# ---- before torch is loaded ------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    names = (*threads.WAITING, "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **environment}, check=True,
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


# An import hook, so that nothing heavy is imported: it prints what torch would see.
HOOK = """
import os, sys
class Hook:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"))
            raise SystemExit
sys.meta_path.insert(0, Hook())
"""


@pytest.mark.parametrize(
    "module", ["train", "evaluate", "inference", "features", "dataset", "model", "decoding", "app",
               "export"],
)  # fmt: skip
def test_threads_sleep_while_they_wait_whatever_is_imported_first(module):
    assert run(f"{HOOK}\nimport {module}") in ("passive None", "passive 1")


@pytest.mark.parametrize("name", [*threads.WAITING])
def test_the_users_own_settings_of_waiting_are_kept(name):
    code = (
        "from util import threads; import os; print(sorted(set(threads.WAITING) & set(os.environ)))"
    )
    assert run(code, **{name: "1"}) == str([name])


def test_a_container_gets_as_many_threads_as_cpus(monkeypatch):
    monkeypatch.setattr(threads, "read_quota", lambda: 2.0)
    monkeypatch.setattr(threads, "count_allowed", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads.set_environment()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    threads.set_environment()
    assert os.environ["OMP_NUM_THREADS"] == "5"


# ---- flags and messages ----------------------------------------------------------------------


def test_the_flag_sets_torchs_threads(monkeypatch):
    import torch

    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    threads.set_up_process(None)
    threads.set_up_process(3)
    assert counts == [3]
    for count in (0, -1, 5000):
        with pytest.raises(UserError, match=f"--threads {count} must be between 1 and 1,024"):
            threads.set_up_process(count)


@pytest.mark.parametrize("script", ["train", "evaluate", "inference"])
def test_scripts_take_the_flag(script, monkeypatch, tmp_path):
    class DoneError(Exception):
        pass

    def stop(count):
        raise DoneError(count)

    module = __import__(script)
    monkeypatch.setattr(module.threads, "set_up_process", stop)
    arguments = {"train": ["--dataset", "shapes"], "inference": ["a.jpg"]}.get(script, [])
    with pytest.raises(DoneError) as caught:
        module.main([*arguments, "--threads", "3"])
    assert caught.value.args == (3,)


@pytest.mark.parametrize(("load", "lines"), [(0.5, 0), (3.9, 0), (4.0, 1), (9.4, 1)])
def test_an_overloaded_machine_is_one_line(load, lines, monkeypatch, caplog):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 1, 1))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with caplog.at_level(logging.WARNING):
        threads.warn_of_overload()
    assert len(caplog.messages) == lines
    if lines:
        assert "shared its 2 CPUs" in caplog.messages[0] and "--threads 1" in caplog.messages[0]
