"""The entry point of `torch.hub.load("OWNER/image-captioning", "captioner", checkpoint=FILE)`."""

import pathlib  # whole modules: torch.hub.list takes whatever can be called here for an entry
import typing

dependencies = ["torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm"]


def captioner(
    checkpoint: str | pathlib.Path | None = None, device: str = "auto", **decoding: typing.Any
) -> typing.Any:
    """Return an `inference.Captioner`: `.caption(image)`, `.candidates(image, n=5)`, and more.

    `checkpoint` is a model file or the folder of a run (default: the shipped model); `decoding`
    are the flags of `inference.py` that choose words, `beam_size=3` for one. Raises
    FileNotFoundError where there is no checkpoint.
    """
    from inference import Captioner  # here, when torch.hub has found what it needs

    return Captioner.load(checkpoint, device, **decoding)
