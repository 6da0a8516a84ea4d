"""Caption images: `inference.caption("photo.jpg")`, or `python inference.py photo.jpg`.

B images · T words · n captions per image
"""

import datetime
import functools
import os
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Before torch, which reads how its threads wait when it is loaded.
from util import threads

# isort: split
import numpy as np
import torch
from torch import Tensor

from decoding import Decoded, DecodingConfig, decode, to_captions
from encoder import PRECISIONS, Encoder, image_transform, pick_dtype, prepare_encoder
from model import load_models
from model_file import checkpoint_file
from util import distributed, files, program, results
from util.bulk import caption_share, report
from util.distributed import pick_device
from util.files import UserError
from util.image_sources import as_images, read_source
from util.images import drop_traceback, read_ahead
from util.jobs import Job, OutputConfig, Tally, plan_job
from util.results import Caption
from util.truncation import set_strict

SHIPPED = Path(__file__).parent / "weights" / "captioner.safetensors"
# Limits on the memory of a batch, whatever its size: beams of all its images, and input pixels.
MAX_ROWS, MAX_PIXELS = 4096, 2**23
MAX_LOADED = 4  # models that `caption` keeps in memory
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

    def __init__(
        self,
        model: torch.nn.Module,
        decoding: DecodingConfig | None = None,
        precision: str = "auto",
    ):
        """`model`: of `model.py` or `onnx_model.py`; `decoding`: the default settings of calls;
        `precision` of the CNN: see `Captioner.load`.
        """
        self.model = model.eval()
        self.decoding = decoding or DecodingConfig()
        self.precision = precision
        sizes = [size for _, size in model.encoders]
        self.transforms = [image_transform(size, train=False) for size in sizes]
        # Pixels per side that reading an image must keep.
        self.at_least = max(transform.at_least for transform in self.transforms)

    @functools.cached_property
    def encoders(self) -> list[Callable[[Tensor], Tensor]]:
        """For each input of `model.encode`, the function that makes it from pixels (B, 3, H, W).

        The CNN is copied and prepared when the first image is captioned.
        """
        device = next(self.model.parameters()).device
        dtype = pick_dtype(self.precision, device)
        return [
            prepare_encoder(encoder, device, dtype) if isinstance(encoder, Encoder) else encoder
            for encoder, _ in self.model.encoders
        ]

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Sequence[str | Path] | None = None,
        device: torch.device | str = "auto",
        *,
        precision: str = "auto",
        **decoding: Any,
    ) -> "Captioner":
        """Return the captioner of a checkpoint: a model file (.onnx too), or the folder of a run.

        Several checkpoints form an ensemble. `precision` is what the CNN computes in: float32,
        bfloat16, or auto, which is bfloat16 where the processor multiplies it. `decoding` are
        fields of `DecodingConfig`. Without a checkpoint the shipped model is loaded; raises
        FileNotFoundError if there is none, UserError if `precision` is not known.
        """
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r} is not known; choose from {PRECISIONS}")
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
        return cls(model, DecodingConfig(**decoding), precision)

    def caption(self, image: Any, *, n: int = 1, **decoding: Any) -> str | list:
        """Return the caption of an image, or with `n` > 1 the list of its `n` best.

        `image` is a path, an http(s) address, a `data:` URI, bytes, a binary file object, or a
        PIL image; a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool,
        or floats in 0..1; or a torch tensor (3, H, W), (1, H, W) or (H, W) of uint8, or floats in
        0..1. Colours are in the order red, green, blue, and not normalised. For a list or tuple of
        images, or a tensor (B, 3, H, W), the list of their captions is returned. `decoding` are
        fields of `DecodingConfig`. Raises UserError or OSError if an image can't be read.
        """
        images = as_images(image)
        captions = [
            [each.text for each in found] if n > 1 else found[0].text
            for found in self.caption_many([image] if images is None else images, n=n, **decoding)
        ]
        return captions[0] if images is None else captions

    def candidates(
        self, image: Any, *, n: int = 5, **decoding: Any
    ) -> list[Caption] | list[list[Caption]]:
        """Return the `n` best captions of an image, or of each of a list, with log-probabilities.

        `image` is as in `caption`.
        """
        images = as_images(image)
        found = self.caption_many([image] if images is None else images, n=n, **decoding)
        return next(found) if images is None else list(found)

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

        An image is anything that `caption` takes, but no list. `workers` threads read up to two
        batches ahead. A batch is made smaller if it has many beams or pixels, which changes no
        caption. An image that can't be read raises UserError or OSError; with
        `return_exceptions`, the exception is yielded in place of its captions.
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
        vocabulary = self.model.vocabulary
        for row, caption in enumerate(to_captions(vocabulary, decoded)[0]):
            words = vocabulary.list_words(decoded.tokens[0, row])
            attention = None if maps is None else maps[0, row, : len(words)].cpu().numpy()
            explained.append(Explained(*caption, words, attention))
        return explained

    def _preprocess(self, image: Any, return_exceptions: bool = False) -> list[Tensor] | Exception:
        """Return the input pixels (3, H, W) of an image for each of the model's encoders."""
        try:
            image = read_source(image, self.at_least)
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
        inputs = [torch.stack(pixels) for pixels in zip(*batch, strict=True)]
        # An image is sampled by its pixels, so that it has the same captions alone and in a batch.
        seeds = [zlib.crc32(pixels.contiguous().numpy()) for pixels in inputs[0]]
        pairs = zip(self.encoders, inputs, strict=True)
        memory = self.model.encode(*(encode(pixels) for encode, pixels in pairs))
        return memory, decode(
            self.model.decoder, memory, config, n=n, seeds=seeds,
            longest=self.model.config.seq_len, no_repeat_ngram=self.model.no_repeat_ngram,
        )  # fmt: skip


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
    """Return a caption of `image`: a path, an address, a tensor … (see `Captioner.caption`).

    With `n` > 1 it is the list of the n best; for a list of images, a list of those. `checkpoint`
    is a model file or the folder of a run (default: the shipped model), or a list of them that
    decode together; `decoding` are further fields of `DecodingConfig`. The models of the last
    `MAX_LOADED` checkpoints stay loaded between calls, until their files change. Threads may call
    this at the same time.
    """
    paths = None
    if checkpoint is not None:
        checkpoints = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
        paths = tuple(checkpoint_file(each).resolve() for each in checkpoints)
    stats = [path.stat() for path in paths or ()]
    version = tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
    captioner = load_cached(paths, version, str(device))
    return captioner.caption(image, n=n, method=method, beam_size=beam_size, **decoding)


LOADED: OrderedDict[tuple, tuple[tuple, Captioner]] = OrderedDict()  # the last used comes last
LOADING = threading.Lock()


def load_cached(paths: tuple[Path, ...] | None, version: tuple, device: str) -> Captioner:
    """Return the captioner of `paths`, loaded once per `version` of the files, by one thread.

    The `MAX_LOADED` that were used last stay in memory.
    """
    key = (paths, device)
    with LOADING:
        if LOADED.get(key, (None,))[0] != version:
            LOADED.pop(key, None)  # not two versions in memory
            LOADED[key] = version, Captioner.load(paths, device)
        LOADED.move_to_end(key)
        while len(LOADED) > MAX_LOADED:
            LOADED.popitem(last=False)
        return LOADED[key][1]


# --- the script


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    images: tuple[str, ...]
    """Images, folders of images, http(s) addresses, or - for an image from standard input."""
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
    outputs: OutputConfig = field(default_factory=OutputConfig)
    strict: bool = False
    """Refuse images that lack their last bytes, in place of reading them as far as they go."""
    batch_size: int = 16
    """Images per batch."""
    workers: int = field(default_factory=threads.default_workers)
    """Threads that read images ahead."""
    device: str = "auto"
    """auto, cpu, cuda (or gpu), cuda:1, mps."""
    threads: int | None = None
    """CPU threads to compute with (default: one for each CPU that this process may use)."""
    precision: Literal[PRECISIONS] = "auto"
    """What the CNN computes in. auto: bfloat16 where the processor multiplies it, else float32."""


def main(argv: list[str] | None = None) -> None:
    """Caption images: print a line each, or write a file."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    about = {"program": "inference.py", "description": "Caption images."}
    with distributed.join(MAX_WAIT):
        config = distributed.on_main(lambda: program.parse(flags, argv, **about))
        threads.set_up_process(config.threads)
        set_strict(config.strict)
        job = distributed.on_main(lambda: plan(config))
        outputs = config.outputs
        if job.skipped and not job.remaining:  # no model is needed
            report(Tally(), job, outputs)
            return
        checkpoints = list_checkpoints(config.checkpoint, config.ensemble)
        settings = {"precision": config.precision, **asdict(config.decoding)}
        captioner = Captioner.load(checkpoints, config.device, **settings)
        if outputs.output and distributed.is_main():
            results.write_settings(outputs.output, job.settings)
        sizes = {"n": config.n, "batch_size": config.batch_size, "workers": config.workers}
        with_name = len(job.images) > 1 or os.path.isdir(config.images[0])
        share = captioner.caption_many, job, outputs
        tally = caption_share(*share, with_name=with_name, **sizes)
        counts = [tally.failed, tally.kept, tally.kept_descriptions]
        failed, *kept = map(int, distributed.all_reduce_sum(counts))
        # From here on all parts are written.
        if outputs.output and distributed.is_main():
            results.merge_parts(outputs.output, job.format, config.n, job.images)
        if outputs.attention and not failed:
            write_attention(captioner, job.source(job.images[0]), outputs.attention)
        total = len(job.remaining) + len(job.captioned)
        if failed and total == 1 and not job.format and not job.left_out:
            raise tally.error
        if distributed.is_main():
            report(Tally(failed, tally.error, *kept), job, outputs)


def plan(config: Config) -> Job:
    """Return what there is to do; raises UserError or OSError if it is not possible."""
    checkpoints = list_checkpoints(config.checkpoint, config.ensemble) or (SHIPPED,)
    models = [checkpoint_file(path) for path in checkpoints if path != SHIPPED or path.exists()]
    settings = {"checkpoint": ", ".join(map(str, models)), "n": config.n}
    if config.outputs.output:  # a run goes on and a file is moved: only content tells the model
        settings["model"] = [files.digest(path) for path in models]
    settings |= asdict(config.decoding)
    inputs = [*models, *(path / "config.json" for path in checkpoints)]
    recursive = config.recursive
    return plan_job(config.images, config.outputs, settings, recursive=recursive, inputs=inputs)


def list_checkpoints(checkpoint: Path | None, ensemble: Sequence[Path]) -> tuple[Path, ...] | None:
    """Return the checkpoints that the two flags name, as `Captioner.load` takes them."""
    return (*filter(None, [checkpoint]), *ensemble) or None


def write_attention(captioner: Captioner, image: Any, path: Path) -> None:
    """Write a page of the image's caption with the attention map of each word."""
    from util import plots  # here, as captions alone need no plots

    (explained,) = captioner.explain(image)
    if explained.attention is None:
        raise UserError(
            "this model reads the image as one vector, so there is no attention to show; use a "
            "single model with the transformer or attention-lstm decoder"
        )
    words, attention = explained.words, explained.attention
    plots.attention_page(path, read_source(image), words, attention, explained.text)


if __name__ == "__main__":
    program.run(main)
