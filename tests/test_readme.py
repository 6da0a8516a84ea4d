"""The README's commands run, the diffs of docs/extending.md apply, and all pages are consistent.

Commands run as written, on a few drawings and with a tiny model in place of data, weights and runs.
tests/test_layout.py parses the commands of all pages.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.tiny import ROOT, SCRIPTS, as_flickr8k, picture
from safetensors.torch import save_file

from backbones import build_tiny
from readers import load_split
from util import files

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights/README.md"]
OTHER_SCRIPTS = ("how_it_works", "bench", "limits", "growth", "ranks", "scale", "streams", "busy")
NOT_RUN = {
    "git clone": "needs the network",
    "cd ": "changes to the folder of the tests",
    "python3 -m venv": "makes an environment",
    "source ": "as above",
    "pip install": "needs the network",
    "pytest": "is this test run",
    "python download_data.py": "needs the network: tests/test_download_data.py has a local server",
    "python notebooks/execute.py": "takes minutes: tests/test_notebooks.py runs the notebooks",
    "python app.py": "serves until it is stopped: tests/test_app_server.py",
}
# The pages whose commands are run, and a word of the commands behind the README's scores.
RUN_PAGES, SCORES = ("README.md", "docs/modules.md"), "show-and-tell"
# Flags of pip, docker, torchrun and curl.
OTHER_FLAGS = {
    "--index-url", "--shm-size", "--nproc-per-node", "--nnodes", "--rdzv-backend",
    "--rdzv-endpoint", "--max-restarts", "--hypothesis-profile", "--data-binary",
}  # fmt: skip
SIZES = ["--d-model", "16", "--n-head", "2", "--n-decode", "1", "--fc-dim", "32"]
FAST = ["--limit", "4", "--workers", "0"]


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in one of the languages; all blocks if none is named."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match[1], match[2]))
    return [block for block in found if not languages or block.language in languages]


def test_every_block_has_a_language_that_is_tested():
    assert {block.language for block in find_blocks()} == {"bash", "python", "csv", "json", "diff"}


@pytest.mark.parametrize("block", find_blocks("json"), ids=str)
def test_json_blocks_are_json(block):
    json.loads(re.sub(r",? *…", "", block.text))


@pytest.mark.parametrize("block", find_blocks("csv"), ids=str)
def test_csv_blocks_are_captions_tables(block, tmp_path):
    rows = [line.split(",")[0] for line in block.text.splitlines()[1:]]
    for name in set(rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name)
    # Too few images for splits of their own.
    text = "\n".join(
        line if "split" in block.text else f"{line},{'train' if number else 'split'}"
        for number, line in enumerate(block.text.splitlines())
    )
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    records = load_split("csv", tmp_path, "train")
    assert len(records) >= 1 and all(record.captions for record in records)


# ---- the README's commands and Python code ---------------------------------------------------


@pytest.fixture(scope="module")
def home(drawn, tmp_path_factory) -> Path:
    """Return a folder with everything that the pages name: images, datasets, runs, weights."""
    import train

    home = tmp_path_factory.mktemp("home")
    (home / "photos").mkdir()
    for number, name in enumerate(("photo.jpg", "b.png", "photos/1.jpg", "photos/2.png")):
        picture(number, (96, 64)).save(home / name)
    shutil.copytree(ROOT / "docs/examples", home / "docs/examples")
    shutil.copytree(drawn, home / "data/shapes")
    as_flickr8k(drawn, home / "data/flickr8k", ("train", "dev", "test"))
    images = files.read_json(drawn / "captions.json")["images"]
    as_coco(images, drawn / "images", home / "data/coco")
    rows = [f"{image['filename']},{image['sentences'][0]['raw']}" for image in images]
    shutil.copytree(drawn / "images", home / "my_photos")
    (home / "my_photos/captions.csv").write_text("\n".join(["image,caption", *rows]))
    save_file(build_tiny().state_dict(), home / "PATH.safetensors")
    data = ["--data-dir", str(home / "data/flickr8k")]
    train.main([*data, "--output", str(home / "runs/flickr8k"), *small_flags(home)])
    names = re.findall(r"\bruns/[\w-]+", "\n".join(find_commands()))
    for name in set(names) - {"runs/flickr8k", "runs/NAME"}:
        shutil.copytree(home / "runs/flickr8k", home / name)
    shutil.copy(home / "runs/flickr8k/best.safetensors", home / "captioner.safetensors")
    (home / "weights").mkdir()  # the model to start from, in place of the shipped one
    shutil.copy(home / "captioner.safetensors", home / "weights")
    return home


def as_coco(images: list[dict], image_folder: Path, folder: Path) -> None:
    """Lay drawings out as COCO of 2014."""
    for split in ("train", "val"):
        chosen = [image for image in images if image["split"] == split]
        annotations = {
            "images": [{"id": each["imgid"], "file_name": each["filename"]} for each in chosen],
            "annotations": [
                {"image_id": each["imgid"], "caption": sentence["raw"]}
                for each in chosen
                for sentence in each["sentences"]
            ],
        }
        files.write_json(folder / f"annotations/captions_{split}2014.json", annotations)
        (folder / f"{split}2014").symlink_to(image_folder)


def small_flags(home: Path) -> list[str]:
    """Return flags that make a run of train.py take a second."""
    cnn = ["--cnn-backbone", "tiny", "--cnn-weights", str(home / "PATH.safetensors")]
    return [*SIZES, *cnn, "--img-size", "64", *FAST, "--epochs", "1", "--min-count", "1"]


def shorten(command: str, home: Path) -> list[str]:
    """Return a command's words after "python", with files filled in, and made small."""
    stand_ins = {"DATA": str(home / "data/flickr8k"), "PATH": str(home / "PATH.safetensors")}
    words = [stand_ins.get(word, word) for word in shlex.split(command)[1:]]
    if words[0] == "evaluate.py":
        return [*words, *FAST, "--no-java"]
    if words[0] == "train.py":
        if "--output" in words:  # that run is there already, for the commands that use it
            words[words.index("--output") + 1] += "-again"
        return [*words, *small_flags(home)]
    return words


def find_commands() -> list[str]:
    """Return the commands that are run here, each once: the README's, and those it leads to."""
    text = "\n".join(
        block.text
        for block in find_blocks("bash")
        if block.page in RUN_PAGES or (block.page == "docs/results.md" and SCORES in block.text)
    )
    lines = text.replace("\\\n", " ").replace("&&", "\n").split("\n")
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    chosen = (each for each in commands if each and not each.startswith(tuple(NOT_RUN)))
    return list(dict.fromkeys(chosen))


@pytest.mark.parametrize("command", find_commands())
def test_the_readmes_commands_run(command, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(ROOT / "docs")
    assert command.startswith("python "), f"no way to run {command}"
    script, *flags = shorten(command, home)
    assert (ROOT / script).is_file()
    __import__(Path(script).stem).main(flags)
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("block", find_blocks("python"), ids=str)
def test_python_blocks_run(block, home, monkeypatch):
    def load_local(repository, *arguments, **keywords):
        assert repository == "OWNER/image-captioning"
        return load(str(ROOT), *arguments, source="local", **keywords)

    load = torch.hub.load
    monkeypatch.setattr(torch.hub, "load", load_local)
    monkeypatch.chdir(home)
    exec(compile(block.text, str(block), "exec"), {"image": picture(7)})


# ---- flags and links -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Return the flags of all scripts."""
    sys.path.insert(0, str(ROOT / "docs"))
    output = io.StringIO()
    for name in (*SCRIPTS, *OTHER_SCRIPTS):
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            __import__(name).main(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", output.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_on_a_page_exists(page, flags):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8")))
    assert named - OTHER_FLAGS <= flags


def test_the_first_caption_is_within_thirty_lines():
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")[:30]
    assert any("inference.py docs/examples/coffee.jpg" in line for line in first)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name} links to {target}"


# ---- the diffs of docs/extending.md ----------------------------------------------------------

# Uses what the diffs add, in one run of train.py as far as possible.
USE = """
import sys
from pathlib import Path
import inference, train
from readers import load_split
from util import files

home, drawn, flags = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
train.main(["--dataset", "shapes", "--data-dir", str(drawn), "--output", str(home / "run"), *flags])
print("distinct", files.read_json(home / "run/scores.json")["val"]["distinct"])

folder = home / "named"
(folder / "shape").mkdir(parents=True)
for image in files.read_json(drawn / "captions.json")["images"]:
    path = (folder / "shape" / image["filename"]).with_suffix(".jpg")
    path.write_bytes((drawn / "images" / image["filename"]).read_bytes())
splits = ("train", "val", "test")
print("sizes", [len(load_split("folders", folder, split)) for split in splits])
captions = inference.caption(path, checkpoint=home / "run", method="best-of", n=3)
print("captions", len(captions))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """Return a copy of the project to which the diffs were applied."""
    copy = tmp_path_factory.mktemp("extended")
    for pattern in ("*.py", "util/*.py", "tests/*.py", "tests/helpers/*.py", "pyproject.toml"):
        for path in ROOT.glob(pattern):
            (copy / path.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(path, copy / path.relative_to(ROOT))
    for block in find_blocks("diff"):
        done = subprocess.run(
            ["git", "apply", "-"], input=block.text, text=True, cwd=copy, capture_output=True
        )
        assert done.returncode == 0, f"{block} does not apply: {done.stderr}"
    return copy


def run_in_copy(copy: Path, *arguments: str) -> str:
    """Run Python in the copy; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_diffs_add_works(extended, drawn, tmp_path):
    flags = [*SIZES, *FAST, "--epochs", "1", "--batch-size", "4", "--objective", "focal"]
    flags += ["--cnn-backbone", "shufflenet_v2_x1_0", "--decoder", "gru"]
    output = run_in_copy(extended, "-c", USE, str(tmp_path), str(drawn), *flags)
    assert "shufflenet_v2_x1_0 + gru" in output
    assert re.search(r"distinct [01]\.\d", output)
    assert "sizes [30, 5, 5]" in output and "captions 3" in output


@pytest.mark.slow
def test_an_added_decoder_is_tested_like_the_others(extended):
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "gru")
    output = run_in_copy(extended, "-m", "pytest", "tests/test_decoder.py", *options)
    assert output.count(".") >= 15
