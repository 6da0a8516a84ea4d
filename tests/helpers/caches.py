"""Pictures, an encoder and the cache of them, and what breaks an extraction off."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import features
from encoder import Encoder, backbone
from features import FeatureCache, cached_features
from readers import Record
from util.images import read_image


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Rounding may depend on the number of threads, and a forked process can have but one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(folder: Path, count: int) -> list[Record]:
    """Write pictures that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        name = f"{number:03}.png"
        values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((40, 30)).save(folder / name)
        made.append(Record(name, folder / name, ("a dog",)))
    return made


def stirred(name: str) -> Encoder:
    """A frozen encoder, the same at every call, whose BatchNorm has something to do."""
    torch.manual_seed(0)
    encoder = Encoder(name)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # its statistics become those of the one batch it sees here
    size = max(64, backbone(name).least_size)
    encoder.cnn.train()
    with torch.no_grad():
        encoder(torch.rand(4, 3, size, size) * 4 - 2)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):  # a channel that said nothing would drown in rounding
            part.running_var.clamp_(min=0.01)
    return encoder.train()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    return draw(tmp_path_factory.mktemp("pictures"), 11)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return stirred("tiny")


def build(records, encoder, folder, name="test", size=32, **how) -> FeatureCache:
    how = {"batch_size": 2, "workers": 0, **how}
    return cached_features(records, encoder, size, folder, name, **how)


def leftovers(folder: Path) -> set[str]:
    """The suffixes of the files in a cache folder, the lock aside."""
    return {path.suffix for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def whole(records, encoder, tmp_path_factory) -> FeatureCache:
    """A cache that nobody disturbed."""
    return build(records, encoder, tmp_path_factory.mktemp("whole"))


def contents(cache: FeatureCache) -> tuple[bytes, bytes]:
    return cache.path.read_bytes(), cache.path.with_suffix(".json").read_bytes()


class Stop(Exception):  # noqa: N818
    """Stands for whatever breaks the work off."""


def stop_after(monkeypatch, count: int) -> list[Path]:
    """Break the work off after so many pictures; return the list of those that were read."""
    read = []

    def stopping(path):
        if len(read) == count:
            raise Stop
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(features, "read_image", stopping)
    return read
