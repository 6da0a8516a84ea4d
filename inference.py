"""Captions for pictures: `inference.caption("photo.jpg")`, or `python inference.py photo.jpg`.

B images · S image positions · T words · n captions an image
"""

import functools
import math
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import files
import plots
from dataset import mix
from decoding import PAD, Decoded, beam_search, greedy, sample
from encoder import image_transform
from images import list_images, read_image
from model import CaptionModel, ModelEnsemble, checkpoint_file, load_models

SHIPPED = Path(__file__).parent / "weights" / "captioner.safetensors"
# What bounds the memory of a batch, whatever is asked for: beams of one image, beams of all images,
# pixels of all images as the CNN sees them.
MOST_BEAMS, MOST_ROWS, MOST_PIXELS = 1000, 4096, 2**23


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
    """Sampling: the same seed gives an image the same captions."""

    def __post_init__(self) -> None:
        if self.method not in ("beam", "greedy", "sample"):
            raise ValueError(
                f"method {self.method!r} is not known; choose from beam, greedy, sample"
            )
        least = {"beam_size": 1, "no_repeat_ngram": 0, "max_words": 1, "top_k": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name.replace('_', ' ')} {value} must be at least {low}")
        if self.beam_size > MOST_BEAMS:
            raise ValueError(f"beam size {self.beam_size} must be at most {MOST_BEAMS:,}")


class Caption(NamedTuple):
    """A caption and the natural logarithm of its probability by the model."""

    text: str
    log_prob: float


class Explained(NamedTuple):
    """A caption with what each of its words looked at.

    `attention` (words, rows, columns), each word's sums to 1 over the image; None where the model
    has none (a pooled image, an ensemble).
    """

    text: str
    log_prob: float
    words: list[str]
    attention: np.ndarray | None


def pick_device(device: torch.device | str) -> torch.device:
    """Return the device named; "auto" is the GPU where there is one, else the CPU.

    Raises ValueError for a name that torch does not know, and for a device that is not there.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"device {str(device)!r} can't be used ({reason}); choose from auto, cpu, cuda, "
            "cuda:1, mps"
        ) from error


def decode(
    model: CaptionModel | ModelEnsemble,
    memory: Tensor | tuple[Tensor, ...],
    config: DecodingConfig,
    n: int = 1,
    keys: Sequence[int] | None = None,
) -> Decoded:
    """Return `n` captions an image as tokens (B, n, T), decoded from what the model remembers.

    Beam search widens to `n` beams. `keys` (one an image; default: the places in the batch) are
    what sampling derives an image's chance from, beside the seed. Raises ValueError for more words
    than the model has positions for, and for more than one greedy caption.
    """
    longest = model.config.seq_len
    max_words = longest if config.max_words is None else config.max_words
    if max_words > longest:
        raise ValueError(f"max words {max_words} must be between 1 and the model's {longest}")
    if n < 1:
        raise ValueError(f"n {n} must be at least 1: the number of captions an image")
    if n > MOST_BEAMS:
        raise ValueError(f"n {n} must be at most {MOST_BEAMS:,}")
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
    chances = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    first = memory if isinstance(memory, Tensor) else memory[0]
    images, device = len(first), first.device
    # One image at a time, each with a generator of its own: its words are then the same whatever
    # else is in the batch.
    drawn = [
        sample(
            model.decoder,
            one_image(memory, row),
            n=n,
            generator=torch.Generator(device).manual_seed(mix(config.seed, key)),
            **chances,
            **limits,
        )
        for row, key in enumerate(range(images) if keys is None else keys)
    ]
    return together(drawn)


def one_image(memory: Tensor | tuple[Tensor, ...], row: int) -> Tensor | tuple[Tensor, ...]:
    """Return the memory of one image of the batch, itself a batch of one."""
    if isinstance(memory, Tensor):
        return memory[row : row + 1]
    return tuple(part[row : row + 1] for part in memory)


def together(parts: Sequence[Decoded]) -> Decoded:
    """Return the captions of several batches as one: (B, n, T), T the longest of any."""
    length = max(part.tokens.shape[-1] for part in parts)
    tokens = [
        torch.nn.functional.pad(part.tokens, (0, length - part.tokens.shape[-1]), value=PAD)
        for part in parts
    ]
    return Decoded(torch.cat(tokens), torch.cat([part.log_prob for part in parts]))


def spoken(model: CaptionModel | ModelEnsemble, decoded: Decoded) -> list[list[Caption]]:
    """Return the captions of each image as text; fewer than n where no more are possible.

    Raises ValueError where the model gave no probability (NaN).
    """
    if decoded.log_prob.isnan().any():
        raise ValueError(
            "the model's probabilities are NaN: its weights are damaged, or too large for these "
            "pictures"
        )
    return [
        [
            Caption(model.vocabulary.decode(tokens), log_prob)
            for tokens, log_prob in zip(rows, scores.tolist(), strict=True)
            if log_prob != -math.inf
        ]
        for rows, scores in zip(decoded.tokens.cpu(), decoded.log_prob.cpu(), strict=True)
    ]


class Captioner:
    """A model at hand: give it pictures, it gives captions."""

    def __init__(self, model: CaptionModel | ModelEnsemble, decoding: DecodingConfig | None = None):
        """`decoding`: how words are chosen unless a call says otherwise."""
        self.model = model.eval()
        self.decoding = decoding or DecodingConfig()
        self.transforms = [image_transform(size, train=False) for _, size in model.views]

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Sequence[str | Path] | None = None,
        device: torch.device | str = "auto",
        **decoding: Any,
    ) -> "Captioner":
        """Return the captioner of a checkpoint: a model file, or the folder of a run.

        Several checkpoints are an ensemble. `decoding` are fields of `DecodingConfig`. With no
        checkpoint the shipped model is used; raises FileNotFoundError where there is none.
        """
        if checkpoint is None:
            checkpoint = SHIPPED
            if not SHIPPED.exists():
                raise FileNotFoundError(
                    "no checkpoint was named and none is shipped; train one (python train.py) "
                    "and give its run folder: --checkpoint runs/NAME"
                )
            print(f"using the shipped model {SHIPPED}", file=sys.stderr)
        paths = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
        model = load_models(paths, pick_device(device))
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
        """Yield the `n` best captions of each picture, in order, reading as it goes.

        Of no picture more is kept than the CNN sees, and a batch is made smaller where the CNN's
        pictures or the beams are many: that changes no caption. Raises ValueError or OSError at a
        picture that can't be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} must be at least 1")
        config = replace(self.decoding, **decoding)
        beams = max(n, config.beam_size if config.method == "beam" else 1)
        pixels = sum(size**2 for _, size in self.model.views)
        batch_size = min(batch_size, max(1, min(MOST_PIXELS // pixels, MOST_ROWS // beams)))
        images = iter(images)
        while batch := [self._seen(image) for image in islice(images, batch_size)]:
            yield from spoken(self.model, self._decoded(batch, n, config)[1])

    def explain(self, image: Any, *, n: int = 1, **decoding: Any) -> list[Explained]:
        """Return the `n` best captions of a picture, and where in it each word looked."""
        config = replace(self.decoding, **decoding)
        memory, decoded = self._decoded([self._seen(image)], n, config)
        captions = spoken(self.model, decoded)[0]
        looks = self.model.look(memory, decoded.tokens)
        explained = []
        for row, caption in enumerate(captions):
            words = caption.text.split()
            where = None if looks is None else looks[0, row, : len(words)].cpu().numpy()
            explained.append(Explained(*caption, words, where))
        return explained

    def _seen(self, image: Any) -> list[Tensor]:
        """Return a picture as each CNN sees it."""
        picture = read_image(image)
        return [see(picture) for see in self.transforms]

    @torch.inference_mode()
    def _decoded(
        self, batch: Sequence[Sequence[Tensor]], n: int, config: DecodingConfig
    ) -> tuple[Any, Decoded]:
        """Return the memory of pictures, and `n` captions of each as tokens."""
        device = next(self.model.parameters()).device
        views = [torch.stack(seen) for seen in zip(*batch, strict=True)]
        # Sampling goes by the pixels: a picture has its words alone as in any list.
        keys = [zlib.crc32(pixels.contiguous().numpy()) for pixels in views[0]]
        memory = self.model.remember(*(pixels.to(device) for pixels in views))
        return memory, decode(self.model, memory, config, n, keys)


@functools.lru_cache(maxsize=2)
def _captioner(
    checkpoints: tuple[Path, ...] | None, version: tuple[tuple[int, ...], ...], device: str
) -> Captioner:
    return Captioner.load(checkpoints, device)


def caption(
    image: Any,
    *,
    checkpoint: str | Path | Sequence[str | Path] | None = None,
    method: str = "beam",
    beam_size: int = 5,
    n: int = 1,
    device: str = "auto",
    **decoding: Any,
) -> str | list:
    """Return a caption of `image`: a path, PIL image, numpy array, bytes or file object.

    `n` > 1 gives the list of the n best; a list of images gives a list of those. `checkpoint` is
    a model file or a run's folder (default: the shipped model), or a list of them, decoded
    together; `decoding` are further fields of `DecodingConfig`. The model stays loaded between
    calls, until its file changes.
    """
    paths = None
    if checkpoint is not None:
        named = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
        paths = tuple(checkpoint_file(each).resolve() for each in named)
    abouts = [path.stat() for path in paths or ()]
    version = tuple((about.st_mtime_ns, about.st_size, about.st_ino) for about in abouts)
    captioner = _captioner(paths, version, str(device))
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
    ensemble: tuple[Path, ...] = ()
    """Several checkpoints, decoded together: the mean of their probabilities decides. Pictures are
    named before it."""
    n: int = 1
    """How many captions a picture."""
    annotate: Path | None = None
    """Also write each picture with its caption under it, into this folder."""
    json: Path | None = None
    """Also write the captions, and why a picture has none, to this JSON file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def main(argv: list[str] | None = None) -> None:
    """Caption pictures and print a line each."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = files.parse(flags, argv, program="inference.py", description="Caption pictures.")
    files.check_writable(config.json)
    photos = find_photos(config.photos, config.annotate)
    if config.annotate:
        pictures = annotated_places(config.annotate, config.photos, photos)
    checkpoint = named(config.checkpoint, config.ensemble)
    captioner = Captioner.load(checkpoint, config.device, **asdict(config.decoding))
    many = len(photos) > 1 or config.photos[0].is_dir()
    rows: list[dict[str, Any]] = []
    errors: list[Exception] = []
    for photo, captions in caption_files(captioner, photos, config.n):
        if isinstance(captions, Exception):
            errors.append(captions)
            reason = files.one_line(files.explain(captions))
            rows.append({"image": str(photo), "captions": [], "error": reason})
            continue
        for each in captions:
            print(f"{photo}\t{each.text}" if many else each.text, flush=True)
        if config.annotate:
            try:
                write_annotated(pictures[photo], photo, captions[0].text)
            except (ValueError, OSError) as error:
                errors.append(ValueError(f"{pictures[photo]} can't be written ({error})"))
        found = [each._asdict() for each in captions]
        rows.append({"image": str(photo), "captions": found, "error": None})
    if config.json and (len(photos) > 1 or rows[0]["captions"]):
        files.write_json(config.json, rows)
    if errors and len(photos) == 1:
        raise errors[0]
    for error in errors:
        print(f"left out: {files.one_line(files.explain(error))}", file=sys.stderr)
    if errors:
        raise ValueError(f"{len(errors)} of {len(photos)} pictures could not be captioned")


def caption_files(
    captioner: Captioner, photos: Iterable[Path], n: int
) -> Iterator[tuple[Path, list[Caption] | Exception]]:
    """Yield each picture in order with its captions, or with the reason why it can't be read.

    Only reading is forgiven: settings that are wrong for one picture are wrong for all.
    """
    waiting: deque[tuple[Path, Exception | None]] = deque()

    def read() -> Iterator[Any]:
        for photo in photos:
            try:
                image = read_image(photo)
            except (ValueError, OSError) as error:
                waiting.append((photo, error))
            else:
                waiting.append((photo, None))
                yield image

    for captions in captioner.caption_many(read(), n=n):
        while waiting[0][1]:
            yield waiting.popleft()
        yield waiting.popleft()[0], captions
    yield from waiting


def named(checkpoint: Path | None, ensemble: Sequence[Path]) -> tuple[Path, ...] | None:
    """Return the checkpoints that the flags name, as `Captioner.load` takes them."""
    return (*filter(None, [checkpoint]), *ensemble) or None


def find_photos(places: Sequence[Path], made: Path | None = None) -> list[Path]:
    """Return the pictures named, folders replaced by what they hold, but nothing below `made`.

    Raises ValueError where a folder holds none, and where nothing is named.
    """
    if not places:
        raise ValueError("no picture was named; give files or folders: python inference.py PHOTO")
    found: list[Path] = []
    for place in places:
        inside = list_images(place) if place.is_dir() else [place]
        if made and place.is_dir() and place.resolve() in made.resolve().parents:
            below = place / made.resolve().relative_to(place.resolve())
            inside = [photo for photo in inside if below not in photo.parents]  # made earlier
        if not inside:
            raise ValueError(f"no pictures in the folder {place}")
        found += inside
    return found


# --- captioned pictures

WRITABLE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
MADE_HERE = "image-captioning --annotate"


def annotated_places(folder: Path, places: Sequence[Path], photos: Sequence[Path]) -> dict:
    """Return the file in `folder` for each picture: its path below the place named, or its name.

    A number is added where that is taken, .png where Pillow can't write the picture's own format.
    Raises ValueError where a file would be overwritten that was not made so before.
    """
    targets: dict[Path, Path] = {}
    taken: set[Path] = set()
    for photo in dict.fromkeys(photos):
        base = next((place for place in places if place in photo.parents), photo.parent)
        name = photo.relative_to(base)
        if name.suffix.lower() not in WRITABLE:
            name = name.with_name(f"{name.name}.png")
        target, number = folder / name, 2
        while target in taken:
            target, number = folder / name.with_stem(f"{name.stem}-{number}"), number + 1
        if target.exists() and not made_here(target):
            raise ValueError(
                f"--annotate {folder} would overwrite {target}, a file of your own; name another "
                "folder"
            )
        targets[photo] = target
        taken.add(target)
    files.check_writable(*taken)
    return targets


def made_here(path: Path) -> bool:
    """Tell whether a picture was written by `write_annotated`."""
    try:
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE) == MADE_HERE
    except (OSError, ValueError, SyntaxError):
        return False


def write_annotated(target: Path, photo: Path, text: str) -> None:
    """Write the picture with its caption under it, and in its EXIF description."""
    picture = plots.annotate(read_image(photo), text)
    about = Image.Exif()
    about[DESCRIPTION] = text.encode()  # bytes: Pillow would make ? of all but ASCII
    about[SOFTWARE] = MADE_HERE
    with files.replacing(target) as temporary:
        picture.save(temporary, format=WRITABLE[target.suffix.lower()], quality=92, exif=about)


if __name__ == "__main__":
    files.run(main)
