"""Python processes that run a few lines with the project's modules."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def child(code, *argv, **how):
    """Start Python on `code`, which may use `files` and `program` of `util`, with pipes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTHONUNBUFFERED": ""}
    how = {"env": env, **how}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from util import files, program\nimport os, signal, sys, time\n" + code,
            *map(str, argv),
        ],
        stdin=subprocess.PIPE,
        stdout=how.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        **how,
    )


def finished(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, (out or b"").decode(), err.decode()
