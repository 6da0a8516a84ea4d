"""METEOR and SPICE: the Java programs of the package pycocoevalcap, where they are installed.

References are one list of captions per image, candidates one caption per image; a caption is a list
of words. Each function raises UserError, with what to install, where its program can't run.
"""

import contextlib
import importlib.util
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from util.files import UserError

Words = Sequence[str]

METEOR_SECONDS = 1200  # thousands of images take one minute: after this long, Java hangs
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def meteor(references: Sequence[Sequence[Words]], candidates: Sequence[Words]) -> float:
    """Return the METEOR (version 1.5) of a split, a fraction."""
    check_java()
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    timer = threading.Timer(METEOR_SECONDS, scorer.meteor_p.kill)
    timer.start()
    try:
        return scorer.compute_score(*as_lines(references, candidates))[0]
    except (OSError, ValueError) as error:
        scorer.meteor_p.kill()
        lines = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise UserError(f"Java ended early ({lines[-1] if lines else 'no message'})") from error
    finally:
        timer.cancel()
        scorer.meteor_p.kill()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        # An error leaves the scorer's lock taken, and its __del__ would wait for it for ever.
        if scorer.lock.locked():
            scorer.lock.release()


def spice(references: Sequence[Sequence[Words]], candidates: Sequence[Words]) -> float:
    """Return the SPICE of a split, a fraction; its models (385 MB) are never downloaded."""
    check_java()
    folder = Path(importlib.util.find_spec("pycocoevalcap.spice").origin).parent / "lib"
    missing = [jar for jar in SPICE_JARS if not (folder / jar).is_file()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing in {folder}; both are in Stanford's "
            "stanford-corenlp-full-2015-12-09.zip (385 MB), to be put there by hand"
        )
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(*as_lines(references, candidates))[0])


def check_java() -> None:
    """Raise UserError where Java or the package is missing."""
    if shutil.which("java") is None:
        raise UserError("no java on the PATH (install a Java runtime, 8 or later)")
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError("pycocoevalcap is not installed: pip install -r requirements-dev.txt")


def as_lines(
    references: Sequence[Sequence[Words]], candidates: Sequence[Words]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return both as the programs take them: image number -> captions, words joined by spaces."""
    lines = {i: [" ".join(words) for words in image] for i, image in enumerate(references)}
    return lines, {i: [" ".join(words)] for i, words in enumerate(candidates)}
