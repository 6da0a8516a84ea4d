"""`CaptionModel` joins an encoder and a decoder, and saves and loads itself as one file.

B images · S image positions · C backbone channels · D model width · T words · V vocabulary
M captions in a batch
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

# Before torch, which reads how its threads wait when it is loaded.
from util import threads  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder import DecoderConfig, DecoderOutput, build_decoder
from decoding import State, StepDecoder
from encoder import (
    CAPTIONER_PREFIX,
    TRANSFORM,
    Encoder,
    EncoderConfig,
    fingerprint,
)
from model_file import (
    FORMAT,
    INT8_FORMAT,
    checkpoint_file,
    digest,
    read_header,
    read_no_repeat_ngram,
    read_tensors,
    to_half,
    to_json,
)
from util import files
from util.files import UserError
from util.layers import SkipInit
from util.quantization import quantize_state
from vocabulary import START, UNK, Vocabulary


class CaptionModel(nn.Module):
    """An image captioner: the encoder, the decoder and the vocabulary of its captions."""

    def __init__(
        self, encoder: Encoder, config: DecoderConfig, vocabulary: Vocabulary, img_size: int
    ):
        """`img_size`: pixels per side of the square that images are resized to.

        Raises UserError where the image size is too small for the backbone.
        """
        super().__init__()
        self.encoder, self.config = encoder, config
        self.vocabulary, self.img_size = vocabulary, img_size
        # Where a `DecodingConfig` does not say it.
        self.no_repeat_ngram = 0
        self.decoder = build_decoder(
            config,
            vocabulary=len(vocabulary),
            channels=encoder.channels,
            positions=encoder.count_positions(img_size),
        )

    def encode(self, inputs: Tensor) -> Tensor:
        """Return memory (B, S, D) of `inputs`: pixels (B, 3, H, W), or features (B, S, C)."""
        features = self.encoder(inputs) if inputs.dim() == 4 else inputs
        return self.decoder.encode(features.to(next(self.decoder.parameters()).dtype))

    @property
    def encoders(self) -> list[tuple[Encoder, int]]:
        """The encoder and its image size, one pair per input of `encode`."""
        return [(self.encoder, self.img_size)]

    def forward(self, inputs: Tensor, tokens: Tensor, owner: Tensor) -> DecoderOutput:
        """Return logits (M, T-1, V) of `tokens` (M, T), caption m describes image `owner[m]`.

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
        """Return the attention (B, n, T, rows, columns) of each word of `tokens` (B, n, T).

        `tokens` are captions as decoding returns them, of images with `memory` (B, S, D). Each
        word's attention sums to 1 over the image. None: the decoder has no attention, or the
        image positions are not a square.
        """
        batch, count, length = tokens.shape
        side = math.isqrt(self.decoder.positions)
        rows = F.pad(tokens.flatten(0, 1), (1, 0), value=START)
        owner = torch.arange(batch, device=tokens.device).repeat_interleave(count)
        attention = self.decoder(memory, rows, owner, attention=True).attention
        if attention is None or side < 2 or side**2 != self.decoder.positions:
            return None
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-12)
        return attention.view(batch, count, length, side, side)

    def trainable_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what training changes of the state dict: all but the frozen part of the CNN."""
        for name, tensor in self.state_dict().items():
            key = name.removeprefix(CAPTIONER_PREFIX)
            if key == name or self.encoder.is_trained(key):
                yield name, tensor

    def save(
        self, path: str | Path, *, half: bool = False, int8: bool = False, **metadata: Any
    ) -> None:
        """Write weights, vocabulary and configuration to `path`, one safetensors file.

        With `half`, matrices are in float16 where its range (to 65,504) allows it; vectors, and
        with them all of BatchNorm, stay in float32. With `int8`, moreover, the CNN's large matrices
        are in int8 with a scale per output channel. `metadata` (scores, how it was trained: JSON
        values) goes into the header too. The file loads on any device, as float32.
        """
        from safetensors.torch import save

        if self.no_repeat_ngram:
            metadata["decoding"] = {"no_repeat_ngram": self.no_repeat_ngram}
        metadata = {
            **metadata,
            "format": INT8_FORMAT if int8 else FORMAT,
            "model": {
                "cnn_backbone": self.encoder.name,
                "cnn_trained": self.encoder.trained,
                "img_size": self.img_size,
                "grid": self.encoder.grid,
                "transform": TRANSFORM,
                **asdict(self.config),
            },
            "vocabulary": self.vocabulary.known,
            **self.vocabulary.to_entries(),
        }
        state = self.state_dict()
        if int8:
            state = quantize_state(state, CAPTIONER_PREFIX)
        tensors = {
            name: (to_half(tensor) if half or int8 else tensor).contiguous()
            for name, tensor in state.items()
        }
        metadata["digest"] = digest(metadata, tensors)
        header = {key: to_json(value) for key, value in metadata.items()}
        files.write_bytes(path, save(tensors, header))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "CaptionModel":
        """Return the model that `save` wrote, in eval mode; `path` may be a run's folder.

        Raises FileNotFoundError where there is none, UserError where it is not such a file.
        """
        path = checkpoint_file(path)
        metadata, expected = read_header(path)
        try:
            # No memory and no random numbers: the file has the weights.
            with torch.device("meta"), SkipInit():
                model = cls.from_metadata(metadata)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:300]
            raise UserError(
                f"{path} does not describe a model that this version can build ({reason}); use the "
                "version of the project that wrote it"
            ) from error
        tensors = read_tensors(path, model.state_dict(), metadata, expected)
        model.load_state_dict(tensors, assign=True)
        if model.decoder.tagger:
            model.decoder.tagger.check(model.vocabulary, path)
        return model.to(device).to(memory_format=torch.channels_last).eval()

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "CaptionModel":
        """Return the model that the header of a model file describes, with random weights."""
        sizes, words = dict(metadata["model"]), metadata["vocabulary"]
        if (transform := sizes.pop("transform")) != TRANSFORM:
            raise UserError(f"image transform {transform!r} is not known, only {TRANSFORM!r}")
        name, trained = sizes.pop("cnn_backbone"), sizes.pop("cnn_trained")
        img_size, grid = sizes.pop("img_size"), sizes.pop("grid", None)
        EncoderConfig(name, img_size=img_size, grid=grid).validate()
        config = DecoderConfig(**sizes)
        config.validate()
        vocabulary = Vocabulary.from_file(words, metadata)
        model = cls(Encoder(name, trained, grid), config, vocabulary, img_size)
        model.no_repeat_ngram = read_no_repeat_ngram(metadata)
        return model


def add_rows(
    state: dict[str, Tensor], larger: dict[str, Tensor], shares: Sequence[float]
) -> dict[str, Tensor]:
    """Return a model's `state` with rows for new words, so that it fits a model with more words.

    `larger`: the state of that one, which is otherwise the same. `shares`: how much of all unknown
    words in the captions each new one makes up. So far they were <unk>, whose row says where they
    occur. A new row of the embedding, the output layer or its bias lies between that and the mean
    of the V words' rows, at w = 1 + log(share) / log(V): the probability of the new word then is at
    most share * P(<unk>)^w, because the geometric mean of the words' probabilities is at most 1/V.
    """
    extended = {}
    for name, tensor in state.items():
        if tensor.dim() and len(tensor) < len(larger[name]):
            words = tensor[len(Vocabulary.SPECIALS) :]
            weights = 1 + tensor.new_tensor(shares).log() / math.log(max(2, len(words)))
            weights = weights.clamp(min=0).view(-1, *[1] * (tensor.dim() - 1))
            tensor = torch.cat([tensor, words.mean(0).lerp(tensor[UNK], weights)])
        extended[name] = tensor
    return extended


class EnsembleState(NamedTuple):
    """The states of several decoders that write one caption together."""

    states: tuple[State, ...]

    def size(self) -> tuple[int, torch.device]:
        """Return the number of images B and the device."""
        return self.states[0].size()

    def keep_images(self, index: Tensor) -> "EnsembleState":
        """Return the states of only the images in `index` (b,)."""
        return EnsembleState(tuple(state.keep_images(index) for state in self.states))

    def reorder(self, parents: Tensor) -> "EnsembleState":
        """Return the states with beams reordered by `parents` (B, K)."""
        return EnsembleState(tuple(state.reorder(parents) for state in self.states))


class Ensemble:
    """Several decoders as one: a word's probability is the mean of those that they give it.

    The decoders may be of different kinds but must have the same vocabulary. `memory` is a tuple
    with the memory of each.
    """

    def __init__(self, decoders: Sequence[StepDecoder]):
        self.decoders = decoders

    def start(self, memory: tuple[Tensor, ...]) -> EnsembleState:
        """Return the decoders' states before the first word."""
        pairs = zip(self.decoders, memory, strict=True)
        return EnsembleState(tuple(decoder.start(one) for decoder, one in pairs))

    def step(self, token: Tensor, state: EnsembleState) -> tuple[Tensor, EnsembleState]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next states."""
        pairs = zip(self.decoders, state.states, strict=True)
        log_probs, states = zip(*(decoder.step(token, one) for decoder, one in pairs), strict=True)
        mean = torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))
        return mean, EnsembleState(states)


class ModelEnsemble(nn.Module):
    """Several models that write each caption together, by the mean of their probabilities.

    Their backbones, image sizes and decoders may differ, but not their vocabulary. A backbone that
    several models share, with equal weights, runs once.
    """

    def __init__(self, models: Sequence[CaptionModel]):
        """Raises UserError where the vocabularies differ."""
        super().__init__()
        if any(model.vocabulary != models[0].vocabulary for model in models):
            raise UserError("the models of an ensemble must have one vocabulary")
        self.models = nn.ModuleList(models)
        self.vocabulary = models[0].vocabulary
        shortest = min(model.config.seq_len for model in models)
        self.config = replace(models[0].config, seq_len=shortest)
        self.no_repeat_ngram = max(model.no_repeat_ngram for model in models)
        self.decoder = Ensemble([model.decoder for model in models])
        keys = [(fingerprint(m.encoder), m.encoder.grid, m.img_size) for m in models]
        distinct = list(dict.fromkeys(keys))
        self.encoders = [models[keys.index(key)].encoders[0] for key in distinct]
        self.encoder_index = [distinct.index(key) for key in keys]  # of each model

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return each model's memory; `inputs` are pixels or features for each of `encoders`."""
        features = [
            encoder(each) if each.dim() == 4 else each
            for (encoder, _), each in zip(self.encoders, inputs, strict=True)
        ]
        pairs = zip(self.models, self.encoder_index, strict=True)
        return tuple(model.encode(features[index]) for model, index in pairs)

    def attention_maps(self, memory: tuple[Tensor, ...], tokens: Tensor) -> None:
        """Return None: the models' attention can't be joined, their image positions may differ."""


@torch.no_grad()
def mean_model(models: Sequence[CaptionModel]) -> CaptionModel:
    """Return the first model with the mean of all models' weights (arXiv 2203.05482).

    Their training must have begun with the same weights. Raises UserError where sizes or
    vocabularies differ.
    """

    def sizes(model: CaptionModel) -> tuple[Any, ...]:
        config = replace(model.config, dropout=0.0)  # dropout may differ
        return config, model.vocabulary, model.encoder.name, model.encoder.grid, model.img_size

    first = models[0]
    if any(sizes(model) != sizes(first) for model in models):
        raise UserError("models that are averaged must have the same sizes and the same words")
    states = [model.state_dict() for model in models]
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

    Raises UserError that names two checkpoints whose vocabularies differ.
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
