"""Captions for pictures: `inference.caption("photo.jpg")`, or `python inference.py photo.jpg`.

B images · S image positions · T words · n captions an image
"""

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import files
from decoding import Decoded, beam_search, greedy, sample
from encoder import image_transform
from images import list_images, read_image
from model import CaptionModel

SHIPPED = Path(__file__).parent / "weights" / "captioner.safetensors"


@dataclass(frozen=True)
class DecodingConfig:
    """How the words are chosen."""

    method: Literal["beam", "greedy", "sample"] = "beam"
    """Beam search, the most probable word each time, or words drawn by chance."""
    beam_size: int = 5
    """Beams K of beam search."""
    length_penalty: float = 0.7
    """Beam search ranks by log-probability / length to this power (0: short captions win)."""
    no_repeat_ngram: int = 0
    """Forbid any run of this many words to come twice (0: off)."""
    max_words: int | None = None
    """Longest caption in words (default: what the model was trained for)."""
    temperature: float = 1.0
    """Sampling: below 1 plays safe, above 1 takes chances."""
    top_k: int = 0
    """Sampling: draw from the k most probable words (0: all)."""
    top_p: float = 1.0
    """Sampling: draw from the fewest words that hold this share of the probability."""
    seed: int = 0
    """Sampling: the same seed gives the same captions."""

    def __post_init__(self) -> None:
        if self.method not in ("beam", "greedy", "sample"):
            raise ValueError(
                f"method {self.method!r} is not known; choose from beam, greedy, sample"
            )
        if self.beam_size < 1:
            raise ValueError(f"beam size {self.beam_size} must be at least 1")


class Caption(NamedTuple):
    """A caption and the natural logarithm of its probability by the model."""

    text: str
    log_prob: float


def pick_device(device: torch.device | str) -> torch.device:
    """Return the device named; "auto" is the GPU where there is one, else the CPU."""
    if str(device) != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def decode(model: CaptionModel, memory: Tensor, config: DecodingConfig, n: int = 1) -> Decoded:
    """Return `n` captions an image as tokens (B, n, T), decoded from `memory` (B, S, D).

    Raises ValueError for more words than the model has positions for, or more beams than asked.
    """
    longest = model.config.seq_len
    max_words = config.max_words or longest
    if not 1 <= max_words <= longest:
        raise ValueError(f"max words {max_words} must be between 1 and the model's {longest}")
    limits = {"max_words": max_words, "no_repeat_ngram": config.no_repeat_ngram}
    if config.method == "beam":
        width = max(config.beam_size, n)
        penalty = config.length_penalty
        return beam_search(
            model.decoder, memory, beam_size=width, n=n, length_penalty=penalty, **limits
        )
    if config.method == "greedy":
        if n > 1:
            raise ValueError("the greedy method has one caption an image; use beam or sample")
        return greedy(model.decoder, memory, **limits)
    return sample(
        model.decoder,
        memory,
        n=n,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(memory.device).manual_seed(config.seed),
        **limits,
    )


def spoken(model: CaptionModel, decoded: Decoded) -> list[list[Caption]]:
    """Return the captions of each image as text."""
    return [
        [
            Caption(model.vocabulary.decode(tokens), float(log_prob))
            for tokens, log_prob in zip(rows, scores, strict=True)
        ]
        for rows, scores in zip(decoded.tokens.cpu(), decoded.log_prob.cpu(), strict=True)
    ]


class Captioner:
    """A model at hand: give it pictures, it gives captions."""

    def __init__(self, model: CaptionModel, decoding: DecodingConfig | None = None):
        """`decoding`: how words are chosen unless a call says otherwise."""
        self.model = model.eval()
        self.decoding = decoding or DecodingConfig()
        self.transform = image_transform(model.img_size, train=False)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        device: torch.device | str = "auto",
        **decoding: Any,
    ) -> "Captioner":
        """Return the captioner of a checkpoint: a model file, or the folder of a run.

        `decoding` are fields of `DecodingConfig`. With no checkpoint the shipped model is used;
        raises FileNotFoundError where there is none.
        """
        if checkpoint is None:
            checkpoint = SHIPPED
            if not SHIPPED.exists():
                raise FileNotFoundError(
                    "no checkpoint was named and none is shipped; train one (python train.py) "
                    "and give its run folder: --checkpoint runs/NAME"
                )
            print(f"using the shipped model {SHIPPED}", file=sys.stderr)
        model = CaptionModel.load(checkpoint, pick_device(device))
        return cls(model, DecodingConfig(**decoding))

    def caption(self, image: Any, *, n: int = 1, **decoding: Any) -> str | list[str]:
        """Return the caption of a picture, or with `n` > 1 its `n` best; see `images.read_image`
        for what a picture can be. `decoding` are fields of `DecodingConfig`.
        """
        captions = [caption.text for caption in self.candidates(image, n=n, **decoding)]
        return captions if n > 1 else captions[0]

    def candidates(self, image: Any, *, n: int = 5, **decoding: Any) -> list[Caption]:
        """Return the `n` best captions of a picture with their log-probabilities."""
        return next(self.caption_many([image], n=n, **decoding))

    def caption_many(
        self, images: Iterable[Any], *, n: int = 1, batch_size: int = 16, **decoding: Any
    ) -> Iterator[list[Caption]]:
        """Yield the `n` best captions of each picture, in order, reading as it goes."""
        config = replace(self.decoding, **decoding)
        device = next(self.model.parameters()).device
        images = iter(images)
        while batch := [self.transform(read_image(image)) for image in islice(images, batch_size)]:
            with torch.inference_mode():
                memory = self.model.remember(torch.stack(batch).to(device))
                decoded = decode(self.model, memory, config, n)
            yield from spoken(self.model, decoded)


@functools.lru_cache(maxsize=2)
def _captioner(checkpoint: Path | None, changed: float, device: str) -> Captioner:
    return Captioner.load(checkpoint, device)


def caption(
    image: Any,
    *,
    checkpoint: str | Path | None = None,
    method: str = "beam",
    beam_size: int = 5,
    n: int = 1,
    device: str = "auto",
    **decoding: Any,
) -> str | list:
    """Return a caption of `image`: a path, PIL image, numpy array, bytes or file object.

    `n` > 1 gives the list of the n best; a list of images gives a list of those. `checkpoint` is
    a model file or a run's folder (default: the shipped model); `decoding` are further fields of
    `DecodingConfig`. The model stays loaded between calls.
    """
    from model import checkpoint_file

    path = checkpoint_file(checkpoint).resolve() if checkpoint is not None else None
    captioner = _captioner(path, path.stat().st_mtime if path else 0.0, device)
    settings = {"method": method, "beam_size": beam_size, **decoding}
    many = list(image) if isinstance(image, (list, tuple)) else [image]
    found = [
        [each.text for each in captions] if n > 1 else captions[0].text
        for captions in captioner.caption_many(many, n=n, **settings)
    ]
    return found if isinstance(image, (list, tuple)) else found[0]


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    photos: tuple[Path, ...]
    """Pictures, or folders of pictures."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    checkpoint: Path | None = None
    """A model file, or the folder of a run (default: the shipped model)."""
    n: int = 1
    """How many captions a picture."""
    json: Path | None = None
    """Also write the captions to this JSON file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def main(argv: list[str] | None = None) -> None:
    """Caption pictures and print a line each."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = files.parse(flags, argv, program="inference.py", description="Caption pictures.")
    photos = find_photos(config.photos)
    captioner = Captioner.load(config.checkpoint, config.device, **asdict(config.decoding))
    rows, failed = [], []
    for photo in photos:
        try:
            captions = captioner.candidates(photo, n=config.n)
        except (ValueError, FileNotFoundError) as error:
            if len(photos) == 1:
                raise
            failed.append(photo)
            print(f"left out: {files.explain(error)}", file=sys.stderr)
            continue
        for each in captions:
            print(each.text if len(photos) == 1 else f"{photo}\t{each.text}", flush=True)
        rows.append({"image": str(photo), "captions": [each._asdict() for each in captions]})
    if config.json:
        files.write_json(config.json, rows)
    if failed:
        raise ValueError(f"{len(failed)} of {len(photos)} pictures could not be captioned")


def find_photos(places: Sequence[Path]) -> list[Path]:
    """Return the pictures named, folders replaced by what they hold; an empty one is an error."""
    found: list[Path] = []
    for place in places:
        inside = list_images(place) if place.is_dir() else [place]
        if not inside:
            raise ValueError(f"no pictures in the folder {place}")
        found += inside
    return found


if __name__ == "__main__":
    files.run(main)
