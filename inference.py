"""Captions for pictures: `inference.caption("photo.jpg")`, or `python inference.py photo.jpg`.

B images · S image positions · T words · n captions an image
"""

import contextlib
import datetime
import functools
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from decoding import Decoded, DecodingConfig, decode, to_captions
from encoder import image_transform
from model import CaptionModel, ModelEnsemble, checkpoint_file, load_models
from onnx_model import OnnxModel, is_onnx, load_onnx
from util import distributed, files, plots
from util.distributed import pick_device
from util.files import UserError
from util.images import read_image
from util.results import (
    Caption,
    Lines,
    Result,
    Results,
    annotated_places,
    as_json,
    check_sidecars,
    find_known,
    find_parts,
    find_photos,
    free_part,
    json_list,
    merge,
    open_results,
    part_file,
    pick_form,
    sidecar,
    write_annotated,
)

SHIPPED = Path(__file__).parent / "weights" / "captioner.safetensors"
# What bounds the memory of a batch, whatever is asked for: beams of all its images, and their
# pixels as the CNN sees them.
MOST_ROWS, MOST_PIXELS = 4096, 2**23
# How long a process that is done waits for the others to have done their pictures.
LONGEST_WAIT = datetime.timedelta(days=7)


class Explained(NamedTuple):
    """A caption with what each of its words looked at.

    `attention` (words, rows, columns), each word's sums to 1 over the image; None where the model
    has none (a pooled image, an ensemble).
    """

    text: str
    log_prob: float
    words: list[str]
    attention: np.ndarray | None


class Captioner:
    """A model at hand: give it pictures, it gives captions."""

    def __init__(
        self,
        model: CaptionModel | ModelEnsemble | OnnxModel,
        decoding: DecodingConfig | None = None,
    ):
        """`decoding`: how words are chosen unless a call says otherwise."""
        self.model = model.eval()
        self.decoding = decoding or DecodingConfig()
        self.transforms = [image_transform(size, train=False) for _, size in model.encoders]

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Sequence[str | Path] | None = None,
        device: torch.device | str = "auto",
        **decoding: Any,
    ) -> "Captioner":
        """Return the captioner of a checkpoint: a model file (.onnx too), or the folder of a run.

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
            if distributed.is_main():
                print(f"using the shipped model {SHIPPED}", file=sys.stderr)
        paths = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
        if any(map(is_onnx, paths)):
            model = load_onnx(paths, device)
        else:
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
        self,
        images: Iterable[Any],
        *,
        n: int = 1,
        batch_size: int = 16,
        workers: int = 0,
        forgiving: bool = False,
        **decoding: Any,
    ) -> Iterator[list[Caption]]:
        """Yield the `n` best captions of each picture, in order, reading as it goes.

        `workers` threads read pictures ahead, two batches at most. A batch is made smaller where
        its beams or the CNN's pixels are many: that changes no caption. At a picture that can't be
        read raises ValueError or OSError; if `forgiving`, yields the error in place of captions.
        """
        if batch_size < 1 or workers < 0:
            raise UserError(
                f"batch size {batch_size} must be at least 1, workers {workers} at least 0"
            )
        config = replace(self.decoding, **decoding)
        beams = max(n, config.beam_size if config.method == "beam" else 1)
        pixels = sum(size**2 for _, size in self.model.encoders)
        batch_size = min(batch_size, max(1, min(MOST_PIXELS // pixels, MOST_ROWS // beams)))
        ahead = 2 * batch_size if workers else 0
        seen = read_ahead(functools.partial(self._see, forgiving=forgiving), images, workers, ahead)
        while batch := list(islice(seen, batch_size)):
            good = [views for views in batch if not isinstance(views, Exception)]
            captions = iter(
                to_captions(self.model.vocabulary, self._decoded(good, n, config)[1])
                if good
                else ()
            )
            for views in batch:
                yield views if isinstance(views, Exception) else next(captions)

    def _see(self, image: Any, forgiving: bool = False) -> list[Tensor] | Exception:
        """Return a picture as pixels (3, H, W) for each of the model's views."""
        try:
            image = read_image(image)
        except (ValueError, OSError) as error:
            if forgiving:
                return bare(error)
            raise
        return [see(image) for see in self.transforms]

    def explain(self, image: Any, *, n: int = 1, **decoding: Any) -> list[Explained]:
        """Return the `n` best captions of a picture, and where in it each word looked."""
        config = replace(self.decoding, **decoding)
        memory, decoded = self._decoded([self._see(image)], n, config)
        captions = to_captions(self.model.vocabulary, decoded)[0]
        looks = self.model.attention_maps(memory, decoded.tokens)
        explained = []
        for row, caption in enumerate(captions):
            words = caption.text.split()
            where = None if looks is None else looks[0, row, : len(words)].cpu().numpy()
            explained.append(Explained(*caption, words, where))
        return explained

    @torch.inference_mode()
    def _decoded(
        self, batch: Sequence[list[Tensor]], n: int, config: DecodingConfig
    ) -> tuple[Any, Decoded]:
        """Return the memory of pictures, and `n` captions of each as tokens."""
        device = next(self.model.parameters()).device
        views = [torch.stack(view) for view in zip(*batch, strict=True)]
        # Sampling goes by the pixels: a picture has its words alone as in any list.
        seeds = [zlib.crc32(pixels.contiguous().numpy()) for pixels in views[0]]
        memory = self.model.encode(*(pixels.to(device) for pixels in views))
        longest = self.model.config.seq_len
        return memory, decode(self.model.decoder, memory, config, longest=longest, n=n, seeds=seeds)


def bare(error: Exception) -> Exception:
    """Return the error without where it was raised, which holds on to the pixels read till then."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def read_ahead(
    read: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int
) -> Iterator[Any]:
    """Yield `read(item)` for each item, in order; `workers` threads work on the next `ahead`."""
    if not workers:
        yield from map(read, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(read, item) for item in islice(items, ahead))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in islice(items, 1))
                yield result
        finally:
            for each in waiting:
                each.cancel()


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
    recursive: bool = True
    """Of folders, take the pictures in the folders below too."""
    output: Path | None = None
    """Write the captions to this file (.csv, .jsonl, .html), with their scores (the mean
    log-probability a word) and errors; if it is there already, go on where it stopped. Needed
    where torchrun starts several processes, which share the pictures."""
    format: Literal["csv", "jsonl", "html"] | None = None
    """Form of --output (default: by its name), or of what is printed (default: plain lines)."""
    write_sidecar: bool = False
    """Also write the caption of photo.jpg to photo.txt beside it."""
    annotate: Path | None = None
    """Also write each picture with its caption under it, into this folder."""
    attention: Path | None = None
    """Also write a page (.png) of the one picture named, lit for each word where it looked."""
    json: Path | None = None
    """Also write the captions to this JSON file (why a picture has none: see --output)."""
    batch_size: int = 16
    """Pictures captioned at a time."""
    workers: int = 2
    """Threads that read pictures ahead."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def main(argv: list[str] | None = None) -> None:
    """Caption pictures: a line each, or a file of them."""
    with distributed.join(LONGEST_WAIT):
        config = distributed.on_main(lambda: configure(argv))
        work = distributed.on_main(lambda: plan(config))
        captioner = Captioner.load(
            named(config.checkpoint, config.ensemble), config.device, **asdict(config.decoding)
        )
        failed, error = caption_share(captioner, work, config)
        if config.attention and not failed:
            write_attention(captioner, config.photos[0], config.attention)
        if failed and len(work.photos) == 1 and not work.form:
            raise error
        if failed and distributed.is_main():
            raise UserError(f"{failed} of {len(work.photos)} pictures could not be captioned")


def configure(argv: list[str] | None) -> Config:
    """Return the flags given."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    return files.parse(flags, argv, program="inference.py", description="Caption pictures.")


class Work(NamedTuple):
    """What there is to do, for all processes together."""

    every: list[str]  # the pictures named
    photos: list[str]  # those that have no row yet
    copies: dict[str, str]  # where --annotate writes
    form: str | None  # of `results.FORMS`; None: plain lines
    part: int | None  # the first process's part of the output; None: it writes the file itself


def plan(config: Config) -> Work:
    """Return what there is to do; raises ValueError or OSError where it can't be done."""
    if distributed.world_size() > 1:
        check_alone(config)
    files.check_writable(config.json, config.output, config.attention)
    every = find_photos(config.photos, config.annotate, recursive=config.recursive)
    if config.attention and len(every) != 1:
        raise UserError(f"--attention is of one picture, but {len(every)} were named")
    copies = annotated_places(config.annotate, config.photos, every) if config.annotate else {}
    if config.write_sidecar:
        check_sidecars(every)
    form = pick_form(config.output, config.format) if config.output or config.format else None
    if not config.output:
        return Work(every, every, copies, form, None)
    every = list(dict.fromkeys(every))  # a row a picture, however often it is named
    known = find_known(config.output, form, config.n)
    photos = [photo for photo in every if photo not in known]
    part = free_part(config.output, form, config.n, every)
    return Work(every, photos, copies, form, part if part or distributed.world_size() > 1 else None)


def check_alone(config: Config) -> None:
    """Raise ValueError for flags that are not for several processes."""
    if config.output is None or files.is_special(config.output):
        raise UserError("several processes need a file to put their captions into; give --output")
    for name in ("json", "attention"):
        if getattr(config, name):
            raise UserError(f"--{name} is written by one process alone; start it without torchrun")


def caption_share(captioner: Captioner, work: Work, config: Config) -> tuple[int, Exception | None]:
    """Caption this process's share and write what is asked for.

    Returns how many of all pictures could not be captioned, and why the first of the share
    couldn't.
    """
    with contextlib.ExitStack() as stack:
        out = Lines(len(work.photos) > 1 or config.photos[0].is_dir())
        if config.output:
            file = config.output
            if work.part is not None:
                file = part_file(file, work.part + distributed.rank())
            out = stack.enter_context(open_results(file, work.form, config.n))
        elif work.form:
            out = Results(sys.stdout, work.form, config.n, Path())
        also = stack.enter_context(json_list(config.json)) if config.json else None
        failed, error = caption_files(captioner, work, config, out, also)
    (failed,) = distributed.all_reduce_sum([failed])
    if work.part is not None and distributed.is_main():
        merge(find_parts(config.output), config.output, work.form, config.n, work.every)
    return int(failed), error


def caption_files(
    captioner: Captioner,
    work: Work,
    config: Config,
    out: Lines | Results,
    also: Callable[[Any], None] | None,
) -> tuple[int, Exception | None]:
    """Caption this process's share of the pictures into `out` and what else is asked for.

    Only reading and writing are forgiven: settings wrong for one picture are wrong for all.
    """
    failed, first = 0, None
    photos = distributed.split_by_rank(work.photos)
    sizes = {"n": config.n, "batch_size": config.batch_size, "workers": config.workers}
    captioned = captioner.caption_many(photos, forgiving=True, **sizes)
    quiet = None if config.output else True  # a bar and printed lines would be in each other's way
    for photo, captions in tqdm(
        zip(photos, captioned, strict=True), total=len(photos), unit=" images", disable=quiet
    ):
        result, error = beside(photo, captions, work, config)
        try:
            out.add(result)
        except ValueError as broken:  # a name that would break the file's lines costs only itself
            error = broken
            print(f"left out: {files.one_line(str(error))}", file=sys.stderr)
        if also and result.captions:
            also(as_json(result))
        if error:
            failed, first = failed + 1, first or bare(error)
    return failed, first


def beside(
    photo: str, captions: list[Caption] | Exception, work: Work, config: Config
) -> tuple[Result, Exception | None]:
    """Write what lies beside or in place of a picture; return its row, and what went wrong."""
    if isinstance(captions, Exception):
        return Result(photo, (), files.one_line(files.explain(captions))), captions
    try:
        if photo in work.copies:
            write_annotated(work.copies[photo], photo, captions[0].text)
        if config.write_sidecar:
            files.write_text(sidecar(photo), f"{captions[0].text}\n")
        return Result(photo, captions), None
    except (ValueError, OSError) as error:
        return Result(photo, captions, files.one_line(files.explain(error))), error


def write_attention(captioner: Captioner, photo: Path, path: Path) -> None:
    """Write the page of what each word of a picture's caption looked at."""
    (explained,) = captioner.explain(photo)
    if explained.attention is None:
        raise UserError(
            "this model looks at the whole picture at once, so there is no attention to show; use "
            "a single model with the transformer or attention-lstm decoder"
        )
    plots.attention_page(path, read_image(photo), explained.words, explained.attention)


def named(checkpoint: Path | None, ensemble: Sequence[Path]) -> tuple[Path, ...] | None:
    """Return the checkpoints that the flags name, as `Captioner.load` takes them."""
    return (*filter(None, [checkpoint]), *ensemble) or None


if __name__ == "__main__":
    files.run(main)
