"""torch.hub gives a captioner from this folder, beside modules of the caller with equal names."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.tiny import picture

import hubconf
from inference import Captioner

ROOT = Path(__file__).parent.parent


def load(*args, **keywords):
    return torch.hub.load(str(ROOT), *args, source="local", **keywords)


def run_in(folder: Path, code: str) -> str:
    """Return what Python `code` prints when it runs in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_hub_gives_a_captioner(run):
    captioner = load("captioner", checkpoint=run, device="cpu", beam_size=3)
    assert captioner.decoding.beam_size == 3
    expected = Captioner.load(run, "cpu", beam_size=3).caption(picture(1))
    assert captioner.caption(picture(1)) == expected


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
    caption, modules = run_in(tmp_path, f"""
        import sys, torch
        captioner = torch.hub.load({str(ROOT)!r}, "captioner", source="local",
                                   checkpoint={str(run)!r}, device="cpu")
        print(captioner.caption("photo.png"))
        print(*{{name.split(".")[0] for name in sys.modules}}, "torch._dynamo" in sys.modules)
    """).splitlines()  # fmt: skip
    assert caption == Captioner.load(run, "cpu").caption(picture(1))
    optional = {"matplotlib", "pandas", "nltk", "tyro", "requests", "flask", "onnxruntime"}
    assert not optional & set(modules.split())
    assert "True" not in modules.split()  # torch's compiler takes a second to import
    assert "model" not in modules.split()


NAMES = ("model", "dataset", "inference", "images", "encoder", "config", "decoding", "vocabulary")


@pytest.mark.parametrize("first", ["the caller's", "the project's"])
def test_modules_of_the_caller_with_equal_names_and_the_projects_both_work(first, run, tmp_path):
    picture(1).save(tmp_path / "photo.png")
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"OWNER = 'the caller of {name}'")
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "__init__.py").write_text("OWNER = 'the caller of util'")
    (tmp_path / "util" / "files.py").write_text("OWNER = 'the caller of util.files'")
    own = f"import {', '.join(NAMES)}, util.files"
    printed = run_in(tmp_path, f"""
        import sys, torch
        if {first == "the caller's"}:
            {own}
        before, path = dict(sys.modules), list(sys.path)
        captioner = torch.hub.load({str(ROOT)!r}, "captioner", source="local",
                                   checkpoint={str(run)!r}, device="cpu")
        assert sys.path == path
        assert all(sys.modules[name] is module for name, module in before.items())
        {own}
        for module in ({", ".join(NAMES)}, util, util.files):
            assert module.OWNER == "the caller of " + module.__name__, module
        print(captioner.caption("photo.png"))
        print(captioner.explain("photo.png")[0].attention is not None)
        lazy = sys.modules[type(captioner).__module__].main  # imports tyro, and reads flags
        try:
            lazy(["--help"])
        except SystemExit as stop:
            print(stop.code)
    """)  # fmt: skip
    caption = Captioner.load(run, "cpu").caption(picture(1))
    lines = printed.splitlines()
    assert lines[0] == caption and lines[1] == "True" and lines[-1] == "0"
