"""Limits of a caption: which words may come next, as masks of minus infinity.

B images · K beams · V vocabulary · T words · M captions in a batch
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from util.files import UserError
from vocabulary import END, PAD, START, UNK

NEVER = (PAD, START, UNK)  # tokens that no caption contains


# Lowest log-probability of an end token that is forced because no other word is possible: below
# any other candidate, but finite, so that sums of it can still be compared.
FORCED_END = -1e4


class Limits(NamedTuple):
    """Which captions are allowed: number of words (the end token is not one), repetition."""

    max_words: int
    min_words: int = 1
    no_repeat_ngram: int = 0

    def check(self) -> None:
        """Raise UserError if a limit is out of range."""
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(
                f"min words {self.min_words} must be between 1 and max words, {self.max_words}"
            )
        if self.no_repeat_ngram < 0:
            raise UserError(f"no-repeat n-gram {self.no_repeat_ngram} must be at least 0 (0: off)")


def mask_words(log_probs: Tensor, words: Tensor, limits: Limits) -> Tensor:
    """Return `log_probs` (B, K, V), minus infinity at words that `limits` do not allow next.

    `words` (B, K, t) are the captions so far.
    """
    position, ngram = words.shape[-1], limits.no_repeat_ngram
    only_end, no_end = position >= limits.max_words, position < limits.min_words
    masked = log_probs.float() + build_mask(log_probs.shape[-1], only_end, no_end, log_probs.device)
    if ngram and position >= ngram:
        # An n-gram that begins with the last n - 1 words must not be completed again.
        windows = words.unfold(-1, ngram, 1)  # (B, K, windows, ngram)
        suffix = words[..., None, position - ngram + 1 :]
        repeats = (windows[..., :-1] == suffix).all(-1)
        ceiling = torch.full_like(repeats, math.inf, dtype=masked.dtype)
        ceiling = ceiling.masked_fill(repeats, -math.inf)
        masked = masked.scatter_reduce(-1, windows[..., -1], ceiling, "amin")
    # If no word is left the caption ends, even if the model gives the end probability 0.
    stuck = masked.amax(-1) == -math.inf
    end = log_probs[..., END].float().clamp(min=FORCED_END)
    masked[..., END] = torch.where(stuck, end, masked[..., END])
    return masked


def mask_impossible_words(logits: Tensor, max_words: int) -> Tensor:
    """Return `logits` (M, T, V) of captions, minus infinity at words that decoding never chooses.

    For self-critical training (arXiv 1612.00563), whose probabilities must be those that captions
    were sampled with. Otherwise lowering the probability of bad samples raises that of <unk>,
    which is never sampled and so never corrected.
    """
    masks = [
        build_mask(logits.shape[-1], position >= max_words, position < 1, logits.device)
        for position in range(logits.shape[1])
    ]
    return logits.float() + torch.stack(masks)


@functools.lru_cache(maxsize=64)
def build_mask(vocabulary: int, only_end: bool, no_end: bool, device: torch.device) -> Tensor:
    """Return (V,) to add to log-probabilities: 0, or minus infinity at words not allowed."""
    mask = torch.zeros(vocabulary)
    if only_end:
        mask[:] = -math.inf
        mask[END] = 0
    mask[list(NEVER)] = -math.inf
    if no_end:
        mask[END] = -math.inf
    return mask.to(device)
