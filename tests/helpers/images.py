"""A photo, its bytes in any format, and the pixels that are read of it."""

import io

import numpy as np
import pytest
from PIL import Image

from util.images import read_image


def pixels(source, **how):
    """The picture as integers, so that differences do not wrap."""
    return np.asarray(read_image(source, **how)).astype(int)


def bytes_of(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@pytest.fixture
def photo():
    """A smooth picture, wider than high, with no symmetry."""
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([x * 4, y * 5, (x + y) * 2], axis=2).astype(np.uint8))
