"""What a model says of what it remembers: the settings of decoding, and captions as text.

A method of choosing words is one function and one row in `METHODS`.

B images · T words · n captions an image
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import distributed
from dataset import mix
from decoding import PAD, Decoded, Steps, beam_search, greedy, sample
from model import CaptionModel, ModelEnsemble
from results import Caption

MOST_BEAMS = 1000  # of one image, which bounds the memory it takes
MOST_PENALTY = 100  # a caption's length to this power is still a number

Memory = Tensor | tuple[Tensor, ...]  # of one model, or one of each of an ensemble's


@dataclass(frozen=True)
class DecodingConfig:
    """How the words are chosen."""

    method: "Literal[tuple(METHODS)]" = "beam"  # as text: the table is further down
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
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"method {self.method!r} is not known; choose from {known}")
        least = {"beam_size": 1, "no_repeat_ngram": 0, "max_words": 1, "top_k": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name.replace('_', ' ')} {value} must be at least {low}")
        if self.beam_size > MOST_BEAMS:
            raise ValueError(f"beam size {self.beam_size} must be at most {MOST_BEAMS:,}")
        if not -MOST_PENALTY <= self.length_penalty <= MOST_PENALTY:
            raise ValueError(
                f"length penalty {self.length_penalty} must be between -{MOST_PENALTY} and "
                f"{MOST_PENALTY}"
            )


def pick_device(device: torch.device | str) -> torch.device:
    """Return the device named; "auto" is the GPU where there is one, else the CPU.

    Of several processes on a machine each has a GPU of its own, unless one is named by its number.
    Raises ValueError for a name that torch does not know, and for a device that is not there.
    """
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        return own_gpu()
    if str(device) == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"device {str(device)!r} can't be used ({reason}); choose from auto, cpu, cuda, "
            "cuda:1, mps"
        ) from error


def own_gpu() -> torch.device:
    """Return this process's GPU; ValueError where there are more processes than GPUs."""
    if distributed.world() == 1:
        return torch.device("cuda")
    number, count = distributed.local_rank(), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"process {number + 1} on this machine has no GPU of its own, there are {count}; give "
            f"torchrun --nproc-per-node {count}, or --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def decode(
    model: CaptionModel | ModelEnsemble,
    memory: Memory,
    config: DecodingConfig,
    n: int = 1,
    keys: Sequence[int] | None = None,
) -> Decoded:
    """Return `n` captions an image as tokens (B, n, T), decoded from what the model remembers.

    `keys` (one an image; default: the places in the batch) are what sampling derives an image's
    chance from, beside the seed. Raises ValueError for more words than the model has positions
    for, and for more than one greedy caption.
    """
    longest = model.config.seq_len
    max_words = longest if config.max_words is None else config.max_words
    if max_words > longest:
        raise ValueError(f"max words {max_words} must be between 1 and the model's {longest}")
    if n < 1:
        raise ValueError(f"n {n} must be at least 1: the number of captions an image")
    if n > MOST_BEAMS:
        raise ValueError(f"n {n} must be at most {MOST_BEAMS:,}")
    config = replace(config, max_words=max_words)
    if keys is None:
        keys = range(len(memory if isinstance(memory, Tensor) else memory[0]))
    return METHODS[config.method](model.decoder, memory, config, n, keys)


# --- the methods: n captions an image, config.max_words being said


def by_beams(
    decoder: Steps, memory: Memory, config: DecodingConfig, n: int, keys: Sequence[int]
) -> Decoded:
    """Return the `n` best captions of beam search, which widens to `n` beams."""
    width, penalty = max(config.beam_size, n), config.length_penalty
    return beam_search(
        decoder, memory, beam_size=width, n=n, length_penalty=penalty, **limits(config)
    )


def by_greed(
    decoder: Steps, memory: Memory, config: DecodingConfig, n: int, keys: Sequence[int]
) -> Decoded:
    """Return the caption of the most probable word each time; ValueError for more than one."""
    if n > 1:
        raise ValueError("the greedy method has one caption an image; use beam or sample")
    return greedy(decoder, memory, **limits(config))


def by_chance(
    decoder: Steps, memory: Memory, config: DecodingConfig, n: int, keys: Sequence[int]
) -> Decoded:
    """Return `n` captions drawn by chance, each image's from its own of `keys` and the seed."""
    chances = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    device = (memory if isinstance(memory, Tensor) else memory[0]).device
    # One image at a time, each with a generator of its own: its words are then the same whatever
    # else is in the batch.
    drawn = [
        sample(
            decoder,
            one_image(memory, row),
            n=n,
            generator=torch.Generator(device).manual_seed(mix(config.seed, key)),
            **chances,
            **limits(config),
        )
        for row, key in enumerate(keys)
    ]
    return together(drawn)


METHODS: dict[str, Callable[..., Decoded]] = {
    "beam": by_beams,
    "greedy": by_greed,
    "sample": by_chance,
}


def limits(config: DecodingConfig) -> dict[str, int | None]:
    """Return what all methods heed."""
    return {"max_words": config.max_words, "no_repeat_ngram": config.no_repeat_ngram}


def one_image(memory: Memory, row: int) -> Memory:
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
