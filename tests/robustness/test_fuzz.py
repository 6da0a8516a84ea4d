"""Thousands of damaged files: each is read or refused in one line, in bounded time and memory.

The corpus is made here, file by file, from a number; nothing is shipped. A failure names its
number, and `damaged(kind, number)` makes that file again.
"""

import contextlib
import io
import json
import random
import signal
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import token_text
from helpers.tiny import tiny_model
from PIL import Image, features

import evaluate
from inference import Captioner
from model import CaptionModel
from readers import load_split
from util import program
from vocabulary import Vocabulary

SECONDS, MEMORY = 20, 3 << 30  # for one file; 3 GiB is what the largest picture takes, and a half
ODD = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
ODD_WORDS = [
    None, True, -1, 1e999, 10**30, "", "\0", "\ud800", "../../x", "/etc/passwd", [], {}, [[]],
    "a" * 5000, {"raw": 3}, "\u2028", "train", "\x1b[2J",
]  # fmt: skip


class TooSlowError(Exception):
    """A file took longer than any may; no OSError, lest it be taken for an answer."""


@pytest.fixture(autouse=True)
def bounded():
    """Let no more memory be had than `MEMORY` beyond what is in use, where the system can say."""
    resource = pytest.importorskip("resource")
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    used = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(used.split()[1]) * 1024 + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def timed(what: str):
    """Raise TooSlowError where the block takes more than `SECONDS` of processor time."""

    def stop(*_):
        raise TooSlowError(what)

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# --- what is damaged


def photo() -> Image.Image:
    y, x = np.mgrid[:12, :16]
    return Image.fromarray(np.stack([x * 15, y * 20, (x + y) * 9], axis=2).astype(np.uint8))


@cache
def pictures() -> dict[str, bytes]:
    """Return small pictures, one of each kind that Pillow writes and reads."""
    rgb, palette, turned = photo(), photo().quantize(16), Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray((np.arange(192).reshape(12, 16) * 300).astype(np.uint16))
    frames = {"save_all": True, "append_images": [rgb.rotate(180)]}
    kinds = [(rgb, kind, {}) for kind in ("BMP", "JPEG2000", "PPM", "MPO", "EPS", "TGA")]
    kinds += [(rgb, kind, {"exif": turned}) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    kinds += [(rgb, "AVIF", {})] * features.check("avif")
    kinds += [(rgb, kind, frames) for kind in ("PNG", "WEBP", "TIFF")]
    kinds += [(rgb, "TIFF", {"compression": how}) for how in ("tiff_lzw", "jpeg", "packbits")]
    kinds += [(rgb.convert("1"), "PPM", {}), (rgb.convert("F"), "TIFF", {})]
    kinds += [(deep, kind, {}) for kind in ("PNG", "TIFF", "PPM")]
    kinds += [
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("I"), "TIFF", {}),
        (palette, "PNG", {"transparency": 3}),
        (palette, "GIF", {"save_all": True, "append_images": [palette.rotate(180)]}),
        (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
    ]
    made = {}
    for number, (image, kind, how) in enumerate(kinds):
        file = io.BytesIO()
        image.save(file, kind, **how)
        made[f"{number:02}-{kind.lower()}"] = file.getvalue()
    return made


def karpathy() -> dict:
    images = [
        {"filename": f"{n}.jpg", "cocoid": n, "split": part, "sentences": [{"raw": f"a dog {n}"}]}
        for n, part in enumerate(("train", "train", "restval", "val", "test"))
    ]
    return {"images": images, "dataset": "any"}


def coco() -> dict:
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)],
        "annotations": [{"image_id": n, "caption": f"a dog {n}"} for n in range(4)],
    }


CSV = "image,caption,split\n0.jpg,a dog,train\n1.jpg,\"a, 'b'\",val\n2.jpg,लाल गेंद,test\n"
JSONL = "".join(f'{{"image": "{n}.jpg", "caption": "a dog"}}\n' for n in range(9))


def split_of(dataset: str) -> Callable[[Path], object]:
    return lambda path: [
        load_split(dataset, path.parent, part) for part in ("train", "val", "test")
    ]


# A file's name → what it holds, and what reads it.
ANNOTATIONS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "captions.txt": (CSV.replace(",split", "").encode(), split_of("flickr8k")),
    "Flickr8k.token.txt": (
        token_text({f"{n}.jpg": ["a dog"] for n in range(9)}).encode(),
        split_of("flickr8k"),
    ),
    "dataset_flickr8k.json": (json.dumps(karpathy()).encode(), split_of("flickr8k")),
    "dataset_flickr30k.json": (json.dumps(karpathy()).encode(), split_of("flickr30k")),
    "dataset_coco.json": (json.dumps(karpathy()).encode(), split_of("coco")),
    "captions_train2014.json": (json.dumps(coco()).encode(), split_of("coco")),
    "captions.csv": (CSV.encode(), split_of("csv")),
    "captions.tsv": (CSV.replace(",", "\t").encode(), split_of("csv")),
    "captions.jsonl": (JSONL.encode(), split_of("csv")),
    "vocabulary.json": (b'{"words": ["a", "dog", "caf\\u00e9"]}', Vocabulary.load),
    "results.json": (
        b'[{"image_id": 1, "caption": "a"}, {"image_id": "b", "caption": ""}]',
        evaluate.read_captions,
    ),
}


@cache
def model_file(folder: Path, int8: bool) -> tuple[dict, bytes]:
    """Return the header and the tensors of a model file."""
    path = folder / "whole.safetensors"
    tiny_model(decoder="lstm").save(path, int8=int8)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damage(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Return `data` with one to sixteen faults: bytes changed, lost, added, doubled, or another's
    end; often in the first bytes, where sizes are told."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        size = max(1, len(data))
        at = chance.randrange(chance.choice([size, min(size, 64)]))
        fault = chance.randrange(7)
        if fault == 0:
            data[at : at + 1] = chance.randbytes(1)
        elif fault == 1:
            del data[at:]
        elif fault == 2:
            width = chance.choice([1, 2, 4])
            number = chance.choice(ODD) % 256**width
            data[at : at + width] = number.to_bytes(width, chance.choice(["big", "little"]))
        elif fault == 3:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif fault == 4:
            del data[at : at + chance.randrange(1, 9)]
        elif fault == 5:
            data[at:at] = data[at : at + chance.randrange(64)]
        else:
            other = chance.choice(others)
            data[at:] = other[chance.randrange(len(other)) :]
    return bytes(data)


def twisted(value: object, chance: random.Random) -> object:
    """Return JSON with about one value in ten replaced by one that nobody expects."""
    if chance.random() < 0.1:
        return chance.choice(ODD_WORDS)
    if isinstance(value, dict):
        return {key: twisted(each, chance) for key, each in value.items() if chance.random() < 0.95}
    return [twisted(each, chance) for each in value] if isinstance(value, list) else value


def damaged(kind: str, number: int) -> tuple[str, bytes]:
    """Return the name and the bytes of file `number` of a kind: "picture" or "annotation"."""
    chance = random.Random(f"{kind} {number}")
    table = pictures() if kind == "picture" else {k: v for k, (v, _) in ANNOTATIONS.items()}
    name = list(table)[number % len(table)]
    if name.endswith(".json") and chance.random() < 0.5:
        return name, json.dumps(twisted(json.loads(table[name]), chance)).encode()
    return name, damage(table[name], chance, list(table.values()))


def damaged_model(number: int, folder: Path) -> bytes:
    """Return model file `number`: its header has odd values, or its bytes are damaged."""
    chance = random.Random(f"model {number}")
    header, tensors = model_file(folder, int8=number % 2 == 1)
    if chance.random() < 0.5:
        about = {key: json.loads(value) for key, value in header["__metadata__"].items()}
        part = chance.choice(list(about))
        about[part] = twisted(about[part], chance)
        said = {key: json.dumps(value) for key, value in about.items()}
        text = json.dumps(header | {"__metadata__": said}).encode()
    else:
        text = json.dumps(header).encode()
        text = damage(text, chance, [text]) if chance.random() < 0.5 else text
        tensors = damage(tensors, chance, [text or tensors]) if chance.random() < 0.5 else tensors
    length = len(text) if chance.random() < 0.9 else chance.choice(ODD)
    return struct.pack("<Q", length) + text + tensors


def check_refusal(error: Exception, folder: Path, what: str) -> None:
    """Fail unless an error is one line that names a file, of a length that can be read."""
    said = program.one_line(program.explain(error))
    named = str(folder) in said or "too many to leave out" in said  # which lists the images
    assert named and len(said) < 1500 and said.isprintable(), (what, said)


# --- what becomes of it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_damaged_picture_has_a_caption_or_a_reason(count, run, tmp_path):
    captioner, read = Captioner.load(run, "cpu", method="greedy"), 0
    for start in range(0, count, 50):
        paths = []
        for number in range(start, min(start + 50, count)):
            name, content = damaged("picture", number)
            paths.append(tmp_path / f"{number}-{name}")
            paths[-1].write_bytes(content)
        with timed(f"pictures {start} to {start + 49}"):
            found = list(captioner.caption_many(paths, return_exceptions=True))
        for path, said in zip(paths, found, strict=True):
            if isinstance(said, Exception):
                check_refusal(said, path, path.name)
            else:
                assert said[0].text
                read += 1
            path.unlink()
    assert count / 20 < read < count  # the damage is neither too much nor too little


@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_annotations_are_read_or_refused(count, tmp_path):
    read = 0
    for number in range(9):
        photo().save(tmp_path / f"{number}.jpg")
    for number in range(count):
        name, content = damaged("annotation", number)
        path = tmp_path / name
        path.write_bytes(content)
        try:
            with timed(f"annotation {number}"):
                ANNOTATIONS[name][1](path)
            read += 1
        except (ValueError, OSError) as error:
            check_refusal(error, tmp_path, f"annotation {number}, {name}")
        path.unlink()
    assert count / 20 < read < count


@pytest.mark.parametrize("count", [100, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_damaged_model_file_is_loaded_or_refused(count, tmp_path):
    loaded, path = 0, tmp_path / "best.safetensors"
    for number in range(count):
        path.write_bytes(damaged_model(number, tmp_path))
        try:
            with timed(f"model {number}"):
                CaptionModel.load(path)
            loaded += 1
        except (ValueError, OSError) as error:
            check_refusal(error, path, f"model {number}")
    assert 0 < loaded < count
