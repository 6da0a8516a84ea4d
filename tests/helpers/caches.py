"""Images, an encoder and a feature cache for tests, and ways to interrupt an extraction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import features
from encoder import Encoder, get_backbone
from features import FeatureCache, cached_features
from readers import Record
from util.images import read_image


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: rounding may depend on their number, and a forked process has only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_images(folder: Path, count: int) -> list[Record]:
    """Write `count` random images, each with one caption."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        name = f"{number:03}.png"
        values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((40, 30)).save(folder / name)
        made.append(Record(name, folder / name, ("a dog",)))
    return made


def make_encoder(name: str) -> Encoder:
    """Return a frozen encoder, the same at every call, with BatchNorm statistics of its own."""
    torch.manual_seed(0)
    encoder = Encoder(name)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # the statistics become those of the one batch below
    size = max(64, get_backbone(name).least_size)
    encoder.cnn.train()
    with torch.no_grad():
        encoder(torch.rand(4, 3, size, size) * 4 - 2)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):  # a constant channel would amplify rounding errors
            part.running_var.clamp_(min=0.01)
    return encoder.train()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    return make_images(tmp_path_factory.mktemp("images"), 11)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder("tiny")


def build(records, encoder, folder, name="test", size=32, **how) -> FeatureCache:
    how = {"batch_size": 2, "workers": 0, **how}
    return cached_features(records, encoder, size, folder, name, **how)


def suffixes(folder: Path) -> set[str]:
    """Return the suffixes of the files in a cache folder, without the locks."""
    return {path.suffix for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def reference(records, encoder, tmp_path_factory) -> FeatureCache:
    """A cache whose extraction was not interrupted."""
    return build(records, encoder, tmp_path_factory.mktemp("reference"))


def contents(cache: FeatureCache) -> tuple[bytes, bytes]:
    return cache.path.read_bytes(), cache.path.with_suffix(".json").read_bytes()


class ExtractionStoppedError(Exception):
    """Stands for anything that ends an extraction early."""


def stop_after(monkeypatch, count: int) -> list[Path]:
    """End the extraction after `count` images; return the list of the paths read, which grows."""
    read = []

    def stopping(path, at_least):
        if len(read) == count:
            raise ExtractionStoppedError
        read.append(path)
        return read_image(path, at_least)

    monkeypatch.setattr(features, "read_image", stopping)
    return read
