"""Images from addresses, data: URIs and tensors are the images that files hold."""

import base64
import io

import numpy as np
import pytest
import torch
from helpers.tiny import picture

import inference
from util import image_sources
from util.files import UserError
from util.image_sources import read_source


@pytest.fixture
def image():
    return picture(1, (20, 12))


@pytest.fixture
def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def pixels(source):
    return np.asarray(read_source(source))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_addresses_and_data_uris_are_read(image, png, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        image_sources, "fetch", lambda url, *_, **how: fetched.append((url, how["private"])) or png
    )
    assert (pixels("https://host/photo") == np.asarray(image)).all()
    assert fetched == [("https://host/photo", True)]
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    assert (pixels(uri) == np.asarray(image)).all()


def test_what_is_no_image_is_named(monkeypatch):
    pages = iter([b"\n<!DOCTYPE html><html>", b"text"])
    monkeypatch.setattr(image_sources, "fetch", lambda *_, **__: next(pages))
    with pytest.raises(UserError, match="https://host/page is a web page; give the address of"):
        read_source("https://host/page")
    with pytest.raises(UserError, match="https://host/text is not an image that can be read"):
        read_source("https://host/text")
    with pytest.raises(UserError, match=r"data:image/png \(sha256 \w{12}\) is not an image that"):
        read_source("data:image/png,text")


def test_tensors_are_read(image):
    colour, values = to_tensor(image), np.asarray(image)
    assert (pixels(colour) == values).all()
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert (pixels((colour.double() / 255).to(dtype)) == values).all()
    assert (pixels((colour / 255).bfloat16()).astype(int) - values <= 1).all()
    assert (pixels((colour / 255).requires_grad_()) == values).all()
    grey = np.array(image.convert("L").convert("RGB"))
    assert (pixels(torch.from_numpy(grey)[..., 0]) == grey).all()
    assert (pixels(torch.from_numpy(grey)[None, ..., 0]) == grey).all()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 8, 8), r"shape \(2, 8, 8\) and torch.float32 is not an image; expected"),
        (torch.zeros(8, 9, 3), r"its channels come last: use tensor.permute\(2, 0, 1\)"),
        (torch.zeros(8), "expected shape"),
        (torch.zeros(3, 0, 8), "expected shape"),
        (torch.zeros(1, 3, 8, 8), "expected shape"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "torch.int64 is not an image; expected"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "expected shape"),
        (torch.full((3, 8, 8), 255.0), "its values reach from 255 to 255; expected"),
        (torch.linspace(-2, 2, 192).view(3, 8, 8), "from -2 to 2; .*, not normalised"),
        (torch.full((8, 8), float("nan")), "its values reach from nan to nan"),
        (torch.full((8, 8), float("inf")), "its values reach from inf to inf"),
    ],
)
def test_tensors_that_are_no_images_are_refused(tensor, message):
    with pytest.raises(UserError, match=message) as error:
        read_source(tensor)
    assert "\n" not in str(error.value)


def test_lists_and_batches_have_lists_of_captions(captioner, run):
    images = [picture(number) for number in range(3)]
    alone = [captioner.caption(image) for image in images]
    assert len(set(alone)) > 1
    batch = torch.stack([to_tensor(image) for image in images])
    for several in (images, tuple(images), batch, batch / 255, list(batch)):
        assert captioner.caption(several) == alone
        assert inference.caption(several, checkpoint=run) == alone
    assert captioner.caption(batch[0]) == alone[0]
    assert captioner.caption(batch[:1]) == alone[:1]
    assert captioner.caption([]) == captioner.caption(batch[:0]) == []
    best = [captioner.candidates(image, n=2) for image in images]
    texts = [[each.text for each in found] for found in best]
    assert captioner.caption(images, n=2) == texts
    for several in (images, batch):
        found = captioner.candidates(several, n=2)
        assert [[each.text for each in captions] for captions in found] == texts
