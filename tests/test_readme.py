"""The README and the pages in docs do what they say: each block of code is run, each flag exists.

Scripts run as they stand in the text, on a few drawings and with a tiny model in place of data,
weights and runs; what is not run is listed with its reason.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.tiny import ROOT, as_flickr8k, picture
from safetensors.torch import save_file
from test_layout import SCRIPTS

import app
import inference
from encoder import build_tiny
from readers import read_table
from util import files

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights/README.md"]
NOT_RUN = {
    "git clone": "needs the network",
    "cd ": "goes to where the tests are already",
    "python3 -m venv": "makes an environment (.ci/run does)",
    "source ": "as above",
    "pip install": "needs the network (.ci/run does it)",
    "pytest": "this is it",
    "python download_data.py": "needs the network: tests/test_download_data.py has a stand-in",
    "python app.py": "serves until it is stopped: tests/test_app_server.py",
    "python train.py --dataset shards --data-dir https": "needs the network: tests/test_shards.py",
    "torchrun": "starts processes: tests/test_ranks.py, tests/test_bulk_ranks.py",
    "python benchmarks/": "takes minutes: tests/test_benchmarks.py",
    "python export.py runs/flickr8k captioner.onnx": "tests/test_onnx_model.py does",
    "python inference.py photo.jpg --checkpoint captioner.onnx": "as above",
}
# Flags of other programs: pip, docker, torchrun.
OTHERS = {
    "--index-url", "--shm-size", "--nproc-per-node", "--nnodes", "--rdzv-backend",
    "--rdzv-endpoint", "--max-restarts", "--hypothesis-profile",
}  # fmt: skip
SIZES = ["--d-model", "16", "--n-head", "2", "--n-decode", "1", "--fc-dim", "32"]
QUICK = ["--limit", "4", "--workers", "0"]


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in one of the languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match[1], match[2]))
    return [block for block in found if block.language in languages]


def lines(block: Block) -> list[str]:
    """Return the commands of a block."""
    whole = block.text.replace("\\\n", " ").replace("&&", "\n").split("\n")
    words = (shlex.split(line, comments=True) for line in whole)
    return [shlex.join(each) for each in words if each]


def new_commands() -> list:
    """Return the blocks of commands as parameters, each command where it comes first."""
    seen: set[str] = set()
    parameters = []
    for block in blocks("bash"):
        new = [each for each in dict.fromkeys(lines(block)) if each not in seen]
        seen.update(new)
        to_run = [command for command in new if not command.startswith(tuple(NOT_RUN))]
        if to_run:
            parameters.append(pytest.param(to_run, id=str(block)))
    return parameters


def test_every_block_is_of_a_language_that_is_checked():
    known = ("bash", "python", "csv", "json", "diff")
    assert [str(block) for block in blocks(*known)] == [
        str(block) for block in blocks(*known, "", "sh", "console", "text", "yaml")
    ]


# --- commands and Python


@pytest.fixture(scope="module")
def home(drawn, tmp_path_factory) -> Path:
    """Return a folder that holds whatever the pages name: photos, datasets, runs, weights."""
    import train

    home = tmp_path_factory.mktemp("home")
    (home / "photos").mkdir()
    for number, name in enumerate(
        ("photo.jpg", "b.png", "more.png", "photos/1.jpg", "photos/2.png")
    ):
        picture(number, (96, 64)).save(home / name)
    shutil.copytree(drawn, home / "data/shapes")
    as_flickr8k(drawn, home / "data/flickr8k", ("train", "dev", "test"))
    images = files.read_json(drawn / "captions.json")["images"]
    as_coco(images, drawn / "images", home / "data/coco")
    rows = [f"{each['filename']},{each['sentences'][0]['raw']}" for each in images]
    shutil.copytree(drawn / "images", home / "my_photos")
    (home / "my_photos/captions.csv").write_text("\n".join(["image,caption", *rows]))
    tested = [each["filename"] for each in images if each["split"] == "test"]
    results = [{"image_id": name, "caption": "a red star"} for name in tested]
    files.write_json(home / "results.json", results)
    save_file(build_tiny().state_dict(), home / "PATH.safetensors")
    command = ["--data-dir", str(home / "data/flickr8k"), "--output", str(home / "runs/flickr8k")]
    train.main([*command, *small(home)])
    names = re.findall(r"\bruns/[\w-]+", "\n".join(page.read_text("utf-8") for page in PAGES))
    for name in set(names) - {"runs/flickr8k", "runs/NAME"}:
        shutil.copytree(home / "runs/flickr8k", home / name)
    shutil.copy(home / "runs/flickr8k/best.safetensors", home / "captioner.safetensors")
    (home / "weights").mkdir()  # a copy: a command of docs/results.md writes there
    shutil.copy(ROOT / "weights/captioner.safetensors", home / "weights")
    return home


def as_coco(images: list[dict], pictures: Path, folder: Path) -> None:
    """Lay drawings out as COCO of 2014."""
    for split in ("train", "val"):
        some = [each for each in images if each["split"] == split]
        about = {
            "images": [{"id": each["imgid"], "file_name": each["filename"]} for each in some],
            "annotations": [
                {"image_id": each["imgid"], "caption": line["raw"]}
                for each in some
                for line in each["sentences"]
            ],
        }
        files.write_json(folder / f"annotations/captions_{split}2014.json", about)
        (folder / f"{split}2014").mkdir()
        for each in some:
            shutil.copy(pictures / each["filename"], folder / f"{split}2014")


def small(home: Path) -> list[str]:
    """Return flags that make a run of train.py take a second."""
    weights = str(home / "PATH.safetensors")
    cnn = ["--cnn-backbone", "tiny", "--cnn-weights", weights, "--img-size", "64"]
    return [*SIZES, *cnn, *QUICK, "--epochs", "1", "--min-count", "1"]


def shortened(command: list[str], home: Path) -> list[str]:
    """Return a script's arguments with what stands for the reader's own filled in, and small."""
    name, *words = command
    stand_ins = {"DATA": str(home / "data/flickr8k"), "PATH": str(home / "PATH.safetensors")}
    words = [stand_ins.get(word, word) for word in words]
    if name == "evaluate.py":
        return [*words, *QUICK, "--no-java"]
    if name != "train.py":
        return words
    if "--resume" in words:
        return [*words, "--epochs", "1"]
    if "--output" in words:  # it is there already, for the lines that use it
        words[words.index("--output") + 1] += "-again"
    if "--scst-epochs" in words:
        words += ["--scst-epochs", "1"]
    if "--init-from" in words:  # which says the sizes, and perhaps that there is no epoch before
        return [*words, *QUICK, *([] if "0" in words else ["--epochs", "1"])]
    return [*words, *small(home)]


def run_script(command: str, home: Path) -> None:
    """Run one of the project's scripts with what the text says."""
    words = shlex.split(command)[1:]
    assert (ROOT / words[0]).is_file(), f"{words[0]} is not here"
    script = __import__(Path(words[0]).stem)
    script.main(shortened(words, home))


def ask_page(command: str, home: Path, monkeypatch) -> str:
    """Run a curl command with the web page at hand; return what it said."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    captioner = inference.Captioner.load(home / "runs/flickr8k", "cpu")
    server = app.create_server(app.create_app(captioner), app.Config(port=0))
    threading.Thread(target=server.run, daemon=True).start()
    try:
        here = command.replace(":8000", f":{server.effective_port}")
        done = subprocess.run(shlex.split(here), capture_output=True, text=True, cwd=home)
        return done.stdout
    finally:
        server.close()


@pytest.mark.parametrize("commands", new_commands())
def test_the_commands_run(commands, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(ROOT / "docs")
    for command in commands:
        if command.startswith("curl"):
            assert json.loads(ask_page(command, home, monkeypatch))["captions"]
            continue
        assert command.startswith("python "), f"there is no way to run {command}"
        run_script(command, home)
        assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_the_python_runs(block, home, monkeypatch):
    def local(repository, *arguments, **keywords):
        assert repository == "OWNER/image-captioning"
        return load(str(ROOT), *arguments, source="local", **keywords)

    load = torch.hub.load
    monkeypatch.setattr(torch.hub, "load", local)
    monkeypatch.chdir(home)
    exec(compile(block.text, str(block), "exec"), {"image": picture(7)})


@pytest.mark.parametrize("block", blocks("csv"), ids=str)
def test_the_tables_are_tables(block, tmp_path):
    (tmp_path / "captions.csv").write_text(block.text, encoding="utf-8")
    table = read_table(tmp_path / "captions.csv")
    assert len(table) == block.text.count("\n") - 1 and all(table["caption"])


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_the_json_is_json(block):
    json.loads(re.sub(r",? *…", "", block.text))


# --- flags


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Return the flags of all scripts."""
    import contextlib
    import io

    sys.path.insert(0, str(ROOT / "docs"))
    said = io.StringIO()
    for name in (
        *SCRIPTS,
        "how_it_works",
        "bench",
        "limits",
        "growth",
        "ranks",
        "scale",
        "streams",
        "busy",
    ):
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            __import__(name).main(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", said.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page, flags):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8")))
    assert named - OTHERS <= flags


def test_the_first_caption_comes_within_thirty_lines():
    beginning = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")[:30]
    assert any("inference.py photo.jpg" in line for line in beginning)


def test_what_the_readme_links_to_is_here():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# --- diffs

USE = """
import sys
from pathlib import Path
import inference, train
from util import files
from readers import load_split

home, drawn = Path(sys.argv[1]), Path(sys.argv[2])
small = sys.argv[3:]
shapes = ["--dataset", "shapes", "--data-dir", str(drawn), *small]
train.main([*shapes, "--output", str(home / "cnn"), "--cnn-backbone", "efficientnet_b0"])
train.main([*shapes, "--output", str(home / "gru"), "--decoder", "gru"])

beside = home / "beside"
beside.mkdir()
for one in files.read_json(drawn / "captions.json")["images"]:
    photo = beside / one["filename"]
    photo.write_bytes((drawn / "images" / photo.name).read_bytes())
    photo.with_suffix(".txt").write_text("\\n".join(each["raw"] for each in one["sentences"]))
tiny = ["--cnn-backbone", "tiny", "--cnn-weights", "none", "--img-size", "64"]
own = ["--dataset", "sidecars", "--data-dir", str(beside), "--output", str(home / "own")]
train.main([*own, *tiny, *small])
print("sizes", [len(load_split("sidecars", beside, split)) for split in ("train", "val", "test")])
words = inference.caption(photo, checkpoint=home / "gru", method="best-of", n=3)
print("captions", len(set(words)))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """Return a copy of the project to which the README's diffs were applied."""
    copy = tmp_path_factory.mktemp("extended")
    for pattern in ("*.py", "tests/*.py", "pyproject.toml"):
        for path in ROOT.glob(pattern):
            (copy / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, copy / path.relative_to(ROOT))
    for block in blocks("diff"):
        done = subprocess.run(
            ["git", "apply", "-"], input=block.text, text=True, cwd=copy, capture_output=True
        )
        assert done.returncode == 0, f"{block} does not apply: {done.stderr}"
    return copy


def in_copy(copy: Path, *arguments: str) -> str:
    """Run Python in the copy; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_diffs_add_works(extended, drawn, tmp_path):
    few = [*SIZES, *QUICK, "--epochs", "1", "--batch-size", "4"]
    said = in_copy(extended, "-c", USE, str(tmp_path), str(drawn), *few)
    assert "efficientnet_b0 + transformer" in said and "tiny + gru" in said
    assert "sizes [30, 5, 5]" in said
    assert "captions 3" in said
    ours = in_copy(extended, "train.py", "--help")
    assert all(name in ours for name in ("efficientnet_b0", "sidecars", "gru"))


@pytest.mark.slow
def test_a_decoder_that_is_added_is_tested_by_itself(extended):
    options = ("-q", "-p", "no:cacheprovider", "-k", "gru")
    said = in_copy(extended, "-m", "pytest", "tests/test_decoder.py", *options)
    assert said.count(".") >= 15
