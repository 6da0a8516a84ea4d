"""Objectives: a batch in, a scalar with a gradient out.

M captions in a batch · T words · V vocabulary · N real words in a batch
"""

from typing import NamedTuple

from torch import Tensor

from decoding import PAD
from layers import moved


class Loss(NamedTuple):
    """Sums over the real words of a batch: divide by `words` for means.

    `objective` has the gradient (label smoothing included), `nll` is the plain negative
    log-likelihood in nats (no gradient), `words` how many targets there are.
    """

    objective: Tensor
    nll: Tensor
    words: int


def cross_entropy(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of `logits` (M, T-1, V) for `tokens` (M, T); padding never counts.

    `tokens` may be on the CPU while the logits are on a GPU, which then is never waited for.
    Smoothing mixes the target with the uniform distribution over the V words (arXiv 1512.00567).
    """
    log_probs, said, _ = _real_words(logits, tokens)
    nll = -said.sum()
    objective = nll
    if label_smoothing:
        uniform = -log_probs.mean(-1).sum()
        objective = (1 - label_smoothing) * nll + label_smoothing * uniform
    return Loss(objective, nll.detach(), len(said))


def self_critical(logits: Tensor, tokens: Tensor, advantage: Tensor) -> Loss:
    """Return the loss of `logits` (M, T-1, V) for sampled `tokens` (M, T); padding never counts.

    `advantage` (M,) says how much better a sample is than its baseline: its words become likelier
    where it is above 0, unlikelier below (REINFORCE, arXiv 1612.00563).
    """
    _, said, caption = _real_words(logits, tokens)
    return Loss(-(advantage[caption] * said).sum(), -said.detach().sum(), len(said))


def _real_words(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities (N, V) where a word is to come, the word's own, and its caption."""
    targets = tokens[:, 1:]
    # Nobody knows how many real words there are but who has the tokens: on a GPU, this waits.
    caption, position = (targets != PAD).nonzero(as_tuple=True)
    words = targets[caption, position]
    caption, position, words = (moved(each, logits.device) for each in (caption, position, words))
    log_probs = logits[caption, position].float().log_softmax(-1)  # (M, T-1, V) -> (N, V)
    said = log_probs.gather(-1, words[:, None])[:, 0]
    return log_probs, said, caption


def unlooked(attention: Tensor) -> Tensor:
    """Return the doubly stochastic penalty of attention (M, T-1, S), zero where there is no word.

    It is smallest where each image position gets as much attention over a caption's words as any
    other: the mean of (1 - its sum over the words) squared (arXiv 1502.03044, section 4.2.1).
    """
    return (1 - attention.sum(1)).square().mean()
