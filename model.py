"""`CaptionModel` wires an encoder to a decoder, and saves and rebuilds itself from one file.

B images · S image positions · C backbone channels · D model width · T words · M captions
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoder import DecoderConfig, DecoderOutput, build_decoder
from decoding import Ensemble
from encoder import TRANSFORM, Encoder, EncoderConfig, fingerprint, get_backbone
from util import files
from util.files import UserError
from vocabulary import START, Vocabulary

FORMAT = "image-captioning 2"
MAX_HEADER = 10_000_000  # bytes: room for half a million words


class CaptionModel(nn.Module):
    """An image captioner: CNN features in, words out, with the vocabulary they are of."""

    def __init__(
        self, encoder: Encoder, config: DecoderConfig, vocabulary: Vocabulary, img_size: int
    ):
        """`img_size`: the side in pixels of the squares that images are resized to.

        Raises ValueError where the CNN makes nothing of images that small.
        """
        super().__init__()
        self.encoder, self.config = encoder, config
        self.vocabulary, self.img_size = vocabulary, img_size
        self.decoder = build_decoder(
            config,
            vocabulary=len(vocabulary),
            channels=encoder.channels,
            positions=count_positions(encoder, img_size),
        )

    def encode(self, inputs: Tensor) -> Tensor:
        """Return memory of `inputs`: pixels (B, 3, H, W), or cached features (B, S, C)."""
        features = self.encoder(inputs) if inputs.dim() == 4 else inputs
        return self.decoder.encode(features.to(next(self.decoder.parameters()).dtype))

    @property
    def encoders(self) -> list[tuple[Encoder, int]]:
        """Return what `remember` takes: one encoder's view, at this model's image size."""
        return [(self.encoder, self.img_size)]

    def forward(self, inputs: Tensor, tokens: Tensor, owner: Tensor) -> DecoderOutput:
        """Return logits (M, T-1, V) of `tokens` (M, T), caption m being of image `owner[m]`.

        `inputs`: see `encode`. Without images or captions the logits are empty, and their backward
        pass gives every trainable parameter a zero gradient.
        """
        if len(inputs) and len(tokens):
            return self.decoder(self.encode(inputs), tokens, owner)
        # DistributedDataParallel waits for a gradient of each parameter from every rank.
        zero = 0 * sum(each.sum() for each in self.parameters() if each.requires_grad)
        length = max(tokens.shape[1] - 1, 0)
        return DecoderOutput(zero.expand(0, length, len(self.vocabulary)))

    @torch.no_grad()
    def attention_maps(self, memory: Tensor, tokens: Tensor) -> Tensor | None:
        """Return where each word of captions looked, (B, n, T, rows, columns), or None.

        `tokens` (B, n, T) are captions as decoding returns them of images with `memory` (B, S, D).
        Each word's attention sums to 1 over the image. None: the decoder has no attention, or the
        CNN's positions are not a square.
        """
        batch, count, length = tokens.shape
        side = math.isqrt(self.decoder.positions)
        rows = torch.nn.functional.pad(tokens.flatten(0, 1), (1, 0), value=START)
        owner = torch.arange(batch, device=tokens.device).repeat_interleave(count)
        where = self.decoder(memory, rows, owner, attention=True).attention
        if where is None or side < 2 or side**2 != self.decoder.positions:
            return None
        return where.view(batch, count, length, side, side)

    def trainable_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what training changes of the state dict: all but the encoder's frozen part."""
        for name, tensor in self.state_dict().items():
            part = name.removeprefix("encoder.cnn.")
            if part == name or self.encoder.is_trained(part):
                yield name, tensor

    def save(self, path: str | Path, *, half: bool = False, **about: Any) -> None:
        """Write weights, vocabulary and configuration to `path`, one safetensors file.

        With `half`, matrices are in float16 where its range (to 65,504) allows it; vectors, and so
        all of BatchNorm, stay in float32. `about` (scores, how it was trained: JSON values) goes
        into the header as well. The file holds nothing of the machine, and loads on any device.
        """
        from safetensors.torch import save

        header = {
            **about,
            "format": FORMAT,
            "model": {
                "cnn_backbone": self.encoder.name,
                "cnn_trained": self.encoder.trained,
                "img_size": self.img_size,
                "grid": self.encoder.grid,
                "transform": TRANSFORM,
                **asdict(self.config),
            },
            "vocabulary": self.vocabulary.words[len(Vocabulary.SPECIALS) :],
        }
        tensors = {
            name: (_halved(tensor) if half else tensor).contiguous()
            for name, tensor in self.state_dict().items()
        }
        metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in header.items()}
        files.write_bytes(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "CaptionModel":
        """Return the model that `save` wrote, in eval mode; `path` may be a run's folder.

        Raises FileNotFoundError where there is none, ValueError where it is not such a file.
        """
        path = checkpoint_file(path)
        about, shapes = read_header(path)
        try:
            with torch.device("meta"):  # nothing is drawn that the file's weights replace
                model = cls._described(about)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:300]
            raise UserError(
                f"{path} does not describe a model that this version can build ({reason}); use the "
                "version of the project that wrote it"
            ) from error
        # Memory is taken only now, for no more numbers than the file holds.
        wanted = model.state_dict()
        check_shapes(path, shapes, {name: tuple(each.shape) for name, each in wanted.items()})
        _, tensors = read_checkpoint(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() != wanted[name].is_floating_point():
                raise UserError(f"{path} is damaged: {name} holds {tensor.dtype}")
            # Copied: the file's tensors lie at odd addresses, which slows every product.
            tensors[name] = tensor.to(wanted[name].dtype, copy=True)
            if not tensors[name].isfinite().all():
                raise UserError(f"{path} is damaged: {name} holds infinity or NaN")
        model.load_state_dict(tensors, assign=True)
        return model.to(device).to(memory_format=torch.channels_last).eval()

    @classmethod
    def _described(cls, about: dict[str, Any]) -> "CaptionModel":
        """Return the model that a file's header describes, its weights random."""
        stored = dict(about["model"])
        if (transform := stored.pop("transform")) != TRANSFORM:
            raise UserError(f"image transform {transform!r} is not known, only {TRANSFORM!r}")
        name, trained = stored.pop("cnn_backbone"), stored.pop("cnn_trained")
        img_size, grid = stored.pop("img_size"), stored.pop("grid", None)
        EncoderConfig(name, img_size=img_size, grid=grid).validate()
        config, known = DecoderConfig(**stored), about["vocabulary"]
        config.validate()
        if not isinstance(known, list) or not all(
            isinstance(word, str) and word.isprintable() for word in known
        ):  # words go to terminals, which obey control characters
            raise UserError("its vocabulary is not a list of words")
        return cls(Encoder(name, trained, grid), config, Vocabulary(known), img_size)


def _halved(tensor: Tensor) -> Tensor:
    small = tensor.half()
    return small if tensor.dim() > 1 and small.isfinite().all() else tensor


class ModelEnsemble(nn.Module):
    """Several models that write each caption together: the mean of their probabilities decides.

    Their CNNs, image sizes and decoders may differ, their vocabulary may not. Of CNNs with equal
    weights one does the work for all.
    """

    def __init__(self, models: Sequence[CaptionModel]):
        """Raises ValueError where the vocabularies differ."""
        super().__init__()
        if any(model.vocabulary != models[0].vocabulary for model in models):
            raise UserError("the models of an ensemble must have one vocabulary")
        self.models = nn.ModuleList(models)
        self.vocabulary = models[0].vocabulary
        longest = min(model.config.seq_len for model in models)
        self.config = replace(models[0].config, seq_len=longest)
        self.decoder = Ensemble([model.decoder for model in models])
        sights = [(fingerprint(m.encoder), m.encoder.grid, m.img_size) for m in models]
        kinds = list(dict.fromkeys(sights))
        self.encoders = [models[sights.index(kind)].encoders[0] for kind in kinds]
        self.seen_by = [kinds.index(sight) for sight in sights]  # each model's view

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return each model's memory, of pixels or features for each of `encoders`."""
        features = [
            encoder(given) if given.dim() == 4 else given
            for (encoder, _), given in zip(self.encoders, inputs, strict=True)
        ]
        pairs = zip(self.models, self.seen_by, strict=True)
        return tuple(model.encode(features[view]) for model, view in pairs)

    def attention_maps(self, memory: tuple[Tensor, ...], tokens: Tensor) -> None:
        """Return None: what several models looked at is not one thing."""


@torch.no_grad()
def mean_model(models: Sequence[CaptionModel]) -> CaptionModel:
    """Return the first model with the mean of all models' weights (arXiv 2203.05482).

    They must have been trained on from the same weights. Raises ValueError where sizes or words
    differ.
    """
    first, *others = models

    def made_of(model: CaptionModel) -> tuple[Any, ...]:
        sizes = replace(model.config, dropout=0.0)  # which training may have changed
        return sizes, model.vocabulary, model.encoder.name, model.encoder.grid, model.img_size

    for each in others:
        if made_of(each) != made_of(first):
            raise UserError("models that are averaged must have the same sizes and the same words")
    states = [each.state_dict() for each in models]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0)
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    first.load_state_dict(mean, strict=False)
    return first


def load_models(
    paths: Sequence[str | Path], device: torch.device | str = "cpu"
) -> CaptionModel | ModelEnsemble:
    """Return the model of one checkpoint, or the ensemble of several.

    Raises ValueError naming two checkpoints whose vocabularies differ.
    """
    if not paths:
        raise UserError("no checkpoint was named; give a model file or the folder of a run")
    models = [CaptionModel.load(path, device) for path in paths]
    for path, model in zip(paths, models, strict=True):
        if model.vocabulary != models[0].vocabulary:
            raise UserError(
                f"{paths[0]} and {path} have different vocabularies "
                f"({len(models[0].vocabulary)} and {len(model.vocabulary)} words), but an ensemble "
                "needs one; train its models on the same captions with the same --min-count"
            )
    return models[0] if len(models) == 1 else ModelEnsemble(models)


def count_positions(encoder: Encoder, img_size: int) -> int:
    """Return how many positions S the encoder makes of an image of that size.

    Raises ValueError where the size is too small for it.
    """
    training = encoder.training
    try:
        with torch.inference_mode():
            device = next(encoder.parameters()).device
            features = encoder.eval()(torch.zeros(1, 3, img_size, img_size, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--img-size {img_size} does not fit the CNN {encoder.name} ({reason}); its own size "
            f"is {get_backbone(encoder.name).img_size}"
        ) from error
    finally:
        encoder.train(training)
    return features.shape[1]


def checkpoint_file(path: str | Path) -> Path:
    """Return the model file that `path` means: itself, or best.safetensors of a run's folder."""
    path = Path(path)
    if path.is_dir():
        if not (path / "best.safetensors").is_file():
            raise FileNotFoundError(
                f"no best.safetensors in {path}: it is not the folder of a run, or the run has "
                "not finished its first epoch"
            )
        return path / "best.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a model file says of itself, and its tensors (nothing is ever unpickled).

    Raises ValueError where it is another file, or damaged.
    """
    from safetensors.torch import load_file

    return read_header(path)[0], load_file(path)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return what a model file says of itself, and its tensors' shapes, reading no tensor.

    Raises ValueError where it is another file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    try:
        # The library's own limit is ten times higher, and text grows when it is parsed.
        if MAX_HEADER < length < path.stat().st_size:
            raise SafetensorError(f"a header of {length:,} bytes, at most {MAX_HEADER:,} are read")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        said = str(header.get("format"))[:60]
        if said != json.dumps(FORMAT):  # other programs' needn't be JSON
            raise UserError(
                f"{path} is not a captioning model of this version: its header has the format "
                f"{said}, expected {json.dumps(FORMAT)}; train it anew, or use "
                "the version of the project that wrote it"
            )
        about = {key: json.loads(value) for key, value in header.items()}
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a model file, or is cut short ({error}); expected a .safetensors "
            "file written by train.py"
        ) from error
    return about, shapes


def check_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError where a file's tensors are not those that its header makes one expect."""
    absent, besides = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    other = [name for name in wanted if name in found and found[name] != wanted[name]]
    if absent:
        reason = f"it lacks {min(absent)} and {len(absent) - 1} more"
    elif besides:
        reason = f"it has {min(besides)[:99]!r} besides, and {len(besides) - 1} more"
    elif other:
        name = other[0]
        reason = f"{name} has shape {found[name]}, expected {wanted[name]}"
    else:
        return
    raise UserError(f"{path} has other weights than it says: {reason}")
