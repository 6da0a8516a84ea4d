"""torch.hub gives a captioner out of this folder."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.tiny import picture
from test_layout import LIBRARIES

import hubconf
from inference import Captioner

ROOT = Path(__file__).parent.parent


def load(*args, **keywords):
    return torch.hub.load(str(ROOT), *args, source="local", **keywords)


def test_torch_hub_gives_a_captioner(run):
    captioner = load("captioner", checkpoint=run, device="cpu", beam_size=3)
    assert captioner.decoding.beam_size == 3
    assert captioner.caption(picture(1)) == Captioner.load(run, "cpu", beam_size=3).caption(
        picture(1)
    )


def test_the_captioner_is_the_one_entry_that_torch_hub_lists():
    public = {name for name, value in vars(hubconf).items() if callable(value)}
    assert {name for name in public if not name.startswith("_")} == {"captioner"}
    assert "`checkpoint` is a model file" in hubconf.captioner.__doc__


def test_without_a_checkpoint_the_error_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load("captioner", checkpoint=tmp_path / "none.safetensors")


def test_it_works_from_another_folder_and_needs_no_more_than_it_names(run, tmp_path):
    """torch.hub looks for the dependencies first, and forgets where the project is after."""
    picture(1).save(tmp_path / "photo.png")
    code = f"""
        import sys, torch
        captioner = torch.hub.load({str(ROOT)!r}, "captioner", source="local",
                                   checkpoint={str(run)!r}, device="cpu")
        print(captioner.caption("photo.png"))
        print(*{{name.split(".")[0] for name in sys.modules}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, modules = done.stdout.splitlines()
    assert said == Captioner.load(run, "cpu").caption(picture(1))
    brought_by_torch = {"filelock"}
    assert set(modules.split()) & LIBRARIES <= {*hubconf.dependencies} | brought_by_torch
