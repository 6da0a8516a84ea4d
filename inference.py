"""Caption images: `inference.caption("photo.jpg")`, or `python inference.py photo.jpg`.

B images · T words · n captions per image
"""

import contextlib
import datetime
import functools
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
from model import checkpoint_file, load_models
from util import distributed, files, results
from util.distributed import pick_device
from util.files import UserError
from util.images import drop_traceback, read_ahead, read_image
from util.results import Caption, Result

SHIPPED = Path(__file__).parent / "weights" / "captioner.safetensors"
# Limits on the memory of a batch, whatever its size: beams of all its images, and input pixels.
MAX_ROWS, MAX_PIXELS = 4096, 2**23
# How long a process that has finished its share of the images waits for the others.
MAX_WAIT = datetime.timedelta(days=7)


class Explained(NamedTuple):
    """A caption with the attention map of each of its words.

    `attention` (words, rows, columns) sums to 1 per word; None if the model has none (a pooled
    image, an ensemble).
    """

    text: str
    log_prob: float
    words: list[str]
    attention: np.ndarray | None

    @property
    def score(self) -> float:
        """Return the mean log-probability per word, as `Caption.score`."""
        return Caption(self.text, self.log_prob).score


class Captioner:
    """A loaded model that captions images."""

    def __init__(self, model: torch.nn.Module, decoding: DecodingConfig | None = None):
        """`model`: of `model.py` or `onnx_model.py`; `decoding`: the default settings of calls."""
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

        Several checkpoints form an ensemble. `decoding` are fields of `DecodingConfig`. Without a
        checkpoint the shipped model is loaded; raises FileNotFoundError if there is none.
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
        if any(Path(path).suffix == ".onnx" for path in paths):
            from onnx_model import load_onnx  # here, as other models don't need it

            model = load_onnx(paths, device)
        else:
            model = load_models(paths, pick_device(device))
        return cls(model, DecodingConfig(**decoding))

    def caption(self, image: Any, *, n: int = 1, **decoding: Any) -> str | list[str]:
        """Return the caption of an image, or with `n` > 1 the list of its `n` best.

        `image` is anything that `util.images.read_image` reads; `decoding` are fields of
        `DecodingConfig`.
        """
        captions = [caption.text for caption in self.candidates(image, n=n, **decoding)]
        return captions if n > 1 else captions[0]

    def candidates(self, image: Any, *, n: int = 5, **decoding: Any) -> list[Caption]:
        """Return the `n` best captions of an image with their log-probabilities."""
        return next(self.caption_many([image], n=n, **decoding))

    def caption_many(
        self,
        images: Iterable[Any],
        *,
        n: int = 1,
        batch_size: int = 16,
        workers: int = 0,
        return_exceptions: bool = False,
        **decoding: Any,
    ) -> Iterator[list[Caption]]:
        """Yield the `n` best captions of each image, in order; images are read as needed.

        `workers` threads read up to two batches ahead. A batch is made smaller if it has many beams
        or pixels, which changes no caption. An image that can't be read raises UserError or
        OSError; with `return_exceptions`, the exception is yielded in place of its captions.
        """
        if batch_size < 1 or workers < 0:
            raise UserError(
                f"batch size {batch_size} must be at least 1, workers {workers} at least 0"
            )
        config = replace(self.decoding, **decoding)
        beams = max(n, config.beam_size if config.method == "beam" else 1)
        pixels = sum(size**2 for _, size in self.model.encoders)
        batch_size = min(batch_size, max(1, min(MAX_PIXELS // pixels, MAX_ROWS // beams)))
        read = functools.partial(self._preprocess, return_exceptions=return_exceptions)
        preprocessed = read_ahead(read, images, workers, 2 * batch_size)
        while batch := list(islice(preprocessed, batch_size)):
            readable = [inputs for inputs in batch if not isinstance(inputs, Exception)]
            captions = iter(())
            if readable:
                _, decoded = self._decode(readable, n, config)
                captions = iter(to_captions(self.model.vocabulary, decoded))
            for inputs in batch:
                yield inputs if isinstance(inputs, Exception) else next(captions)

    def explain(self, image: Any, *, n: int = 1, **decoding: Any) -> list[Explained]:
        """Return the `n` best captions of an image with an attention map for each word."""
        config = replace(self.decoding, **decoding)
        memory, decoded = self._decode([self._preprocess(image)], n, config)
        maps = self.model.attention_maps(memory, decoded.tokens)
        explained = []
        for row, caption in enumerate(to_captions(self.model.vocabulary, decoded)[0]):
            words = caption.text.split()
            attention = None if maps is None else maps[0, row, : len(words)].cpu().numpy()
            explained.append(Explained(*caption, words, attention))
        return explained

    def _preprocess(self, image: Any, return_exceptions: bool = False) -> list[Tensor] | Exception:
        """Return the input pixels (3, H, W) of an image for each of the model's encoders."""
        try:
            image = read_image(image)
        except (UserError, OSError) as error:
            if return_exceptions:
                return drop_traceback(error)
            raise
        return [transform(image) for transform in self.transforms]

    @torch.inference_mode()
    def _decode(
        self, batch: Sequence[list[Tensor]], n: int, config: DecodingConfig
    ) -> tuple[Any, Decoded]:
        """Return the memory of a batch of preprocessed images, and their captions as tokens."""
        device = next(self.model.parameters()).device
        inputs = [torch.stack(pixels) for pixels in zip(*batch, strict=True)]
        # An image is sampled by its pixels, so that it has the same captions alone and in a batch.
        seeds = [zlib.crc32(pixels.contiguous().numpy()) for pixels in inputs[0]]
        memory = self.model.encode(*(pixels.to(device) for pixels in inputs))
        longest = self.model.config.seq_len
        return memory, decode(self.model.decoder, memory, config, longest=longest, n=n, seeds=seeds)


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

    With `n` > 1 it is the list of the n best; for a list of images, a list of those. `checkpoint`
    is a model file or the folder of a run (default: the shipped model), or a list of them that
    decode together; `decoding` are further fields of `DecodingConfig`. The model stays loaded
    between calls, until its file changes.
    """
    paths = None
    if checkpoint is not None:
        checkpoints = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
        paths = tuple(checkpoint_file(each).resolve() for each in checkpoints)
    stats = [path.stat() for path in paths or ()]
    version = tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
    captioner = load_cached(paths, version, str(device))
    settings = {"n": n, "method": method, "beam_size": beam_size, **decoding}
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    captions = [
        [each.text for each in found] if n > 1 else found[0].text
        for found in captioner.caption_many(images, **settings)
    ]
    return captions if isinstance(image, (list, tuple)) else captions[0]


@functools.lru_cache(maxsize=2)
def load_cached(paths: tuple[Path, ...] | None, version: tuple, device: str) -> Captioner:
    """Return the captioner of `paths`; another `version` of the files is another entry."""
    return Captioner.load(paths, device)


# --- the script


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    images: tuple[Path, ...]
    """Images, or folders of images."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    checkpoint: Path | None = None
    """A model file, or the folder of a run (default: the shipped model)."""
    ensemble: tuple[Path, ...] = ()
    """Several checkpoints that decode together by the mean of their probabilities. Name the images
    before it."""
    n: int = 1
    """Number of captions per image."""
    recursive: bool = True
    """Take the images in subfolders too."""
    output: Path | None = None
    """Write the captions to this file (.csv, .jsonl, .html), with their scores (the mean
    log-probability per word) and errors; an existing file is continued. Required when torchrun
    starts several processes, which share the images."""
    format: Literal[results.FORMATS] | None = None
    """Format of --output (default: by its name), or of what is printed (default: plain lines)."""
    write_sidecar: bool = False
    """Also write the caption of photo.jpg to photo.txt beside it."""
    annotate: Path | None = None
    """Also write a copy of each image with its caption below it into this folder."""
    attention: Path | None = None
    """Also write a page (.png) with the attention map of each word, for a single image."""
    json: Path | None = None
    """Also write the captions to this JSON file, without the images that have none."""
    batch_size: int = 16
    """Images per batch."""
    workers: int = 2
    """Threads that read images ahead."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def main(argv: list[str] | None = None) -> None:
    """Caption images: print a line each, or write a file."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    about = {"program": "inference.py", "description": "Caption images."}
    with distributed.join(MAX_WAIT):
        config = distributed.on_main(lambda: files.parse(flags, argv, **about))
        job = distributed.on_main(lambda: plan_job(config))
        checkpoints = list_checkpoints(config.checkpoint, config.ensemble)
        captioner = Captioner.load(checkpoints, config.device, **asdict(config.decoding))
        failed, error = caption_share(captioner, job, config)
        (failed,) = distributed.all_reduce_sum([failed])  # from here on all parts are written
        if config.output and distributed.is_main():
            results.merge_parts(config.output, job.format, config.n, job.images)
        if config.attention and not failed:
            write_attention(captioner, config.images[0], config.attention)
        if failed and len(job.remaining) == 1 and not job.format:
            raise error
        if failed and distributed.is_main():
            raise UserError(f"{failed:.0f} of {len(job.remaining)} images could not be captioned")


def list_checkpoints(checkpoint: Path | None, ensemble: Sequence[Path]) -> tuple[Path, ...] | None:
    """Return the checkpoints that the two flags name, as `Captioner.load` takes them."""
    return (*filter(None, [checkpoint]), *ensemble) or None


class Job(NamedTuple):
    """What all processes together have to do."""

    images: list[str]
    remaining: list[str]  # the images that have no row in --output yet
    copies: dict[str, str]  # image -> path of its annotated copy
    format: str | None  # one of `results.FORMATS`; None: plain lines


def plan_job(config: Config) -> Job:
    """Return what there is to do; raises UserError or OSError if it is not possible."""
    if distributed.world_size() > 1:
        if config.output is None or files.is_special(config.output):
            raise UserError("several processes need a file to write captions to; give --output")
        for name in ("json", "attention"):
            if getattr(config, name):
                raise UserError(f"--{name} is written by one process; start it without torchrun")
    files.check_writable(config.json, config.output, config.attention)
    images = results.find_images(config.images, config.annotate, recursive=config.recursive)
    if config.attention and len(images) != 1:
        raise UserError(f"--attention is of a single image, but {len(images)} were given")
    copies = {}
    if config.annotate:
        copies = results.plan_annotated(config.annotate, config.images, images)
    if config.write_sidecar:
        results.check_sidecars(images)
    format, remaining = None, images
    if config.output or config.format:
        format = results.pick_format(config.output, config.format)
    if config.output:
        images = list(dict.fromkeys(images))  # one row per image, however often it is named
        known = results.merge_parts(config.output, format, config.n, images)
        remaining = [image for image in images if image not in known]
    return Job(images, remaining, copies, format)


def caption_share(captioner: Captioner, job: Job, config: Config) -> tuple[int, Exception | None]:
    """Caption this process's share of the images and write everything that was requested.

    Returns how many of them failed, and the first one's error. Only errors of reading and writing
    an image are caught: settings that are wrong for one image are wrong for all.
    """
    images = distributed.split_by_rank(job.remaining)
    written, failed, first_error = [], 0, None
    with contextlib.ExitStack() as stack:
        if job.format:
            file = config.output or sys.stdout
            if distributed.world_size() > 1:
                file = results.part_file(file, distributed.rank())
            write = stack.enter_context(results.open_results(file, job.format, config.n))
        else:
            with_name = len(job.remaining) > 1 or config.images[0].is_dir()
            write = functools.partial(print_captions, with_name=with_name)
        sizes = {"n": config.n, "batch_size": config.batch_size, "workers": config.workers}
        captions = captioner.caption_many(images, return_exceptions=True, **sizes)
        quiet = None if config.output else True  # printed lines would break a progress bar
        for image, found in tqdm(
            zip(images, captions, strict=True), total=len(images), unit=" images", disable=quiet
        ):
            result, error = write_files(image, found, job, config)
            try:
                write(result)
            except UserError as bad_name:
                error = bad_name
                print(f"left out: {files.one_line(str(error))}", file=sys.stderr)
            if config.json and result.captions:
                written.append(result)
            if error:
                failed, first_error = failed + 1, first_error or drop_traceback(error)
    if written:
        files.write_json(config.json, [result.to_json() for result in written])
    return failed, first_error


def write_files(
    image: str, captions: list[Caption] | Exception, job: Job, config: Config
) -> tuple[Result, Exception | None]:
    """Write the annotated copy and the sidecar of an image; return its result and its error."""
    error = captions if isinstance(captions, Exception) else None
    captions = () if error else captions
    try:
        if captions and job.copies:
            results.write_annotated(job.copies[image], image, captions[0].text)
        if captions and config.write_sidecar:
            files.write_text(results.sidecar(image), f"{captions[0].text}\n")
    except (UserError, OSError) as caught:
        error = caught
    return Result(image, captions, files.one_line(files.explain(error)) if error else ""), error


def print_captions(result: Result, with_name: bool) -> None:
    """Print a line per caption, if `with_name` after the image's name; errors go to stderr."""
    if result.error and with_name:
        print(f"left out: {result.error}", file=sys.stderr)
    for each in result.captions:
        print(f"{result.image}\t{each.text}" if with_name else each.text, flush=True)


def write_attention(captioner: Captioner, image: Path, path: Path) -> None:
    """Write a page of the image's caption with the attention map of each word."""
    from util import plots  # here, as captions alone need no plots

    (explained,) = captioner.explain(image)
    if explained.attention is None:
        raise UserError(
            "this model reads the image as one vector, so there is no attention to show; use a "
            "single model with the transformer or attention-lstm decoder"
        )
    plots.attention_page(path, read_image(image), explained.words, explained.attention)


if __name__ == "__main__":
    files.run(main)
