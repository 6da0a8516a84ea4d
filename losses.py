"""Objectives: a batch in, a scalar with a gradient out.

M captions in a batch · T words · V vocabulary · N real words in a batch
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import metrics
from compact import Places
from readers import Record
from util.layers import to_device
from util.tokenizer import tokenize
from vocabulary import END, PAD, Vocabulary


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
    caption, position, words = (
        to_device(each, logits.device) for each in (caption, position, words)
    )
    log_probs = logits[caption, position].float().log_softmax(-1)  # (M, T-1, V) -> (N, V)
    said = log_probs.gather(-1, words[:, None])[:, 0]
    return log_probs, said, caption


def attention_penalty(attention: Tensor) -> Tensor:
    """Return the doubly stochastic penalty of attention (M, T-1, S), zero where there is no word.

    It is smallest where each image position gets as much attention over a caption's words as any
    other: the mean of (1 - its sum over the words) squared (arXiv 1502.03044, section 4.2.1).
    """
    return (1 - attention.sum(1)).square().mean()


OVER = "<end>"  # the end of a caption as a word of its own: no tokeniser gives that


class Rewards:
    """CIDEr-D of captions against those of their images, plus `bleu_weight` times BLEU-4.

    Words are the scorer's own. How rare an n-gram is, is counted over these records (the train
    split). The end of a caption is a word of it, in references too, so that one which breaks off
    ("a man with a") gains nothing by it.
    """

    def __init__(self, records: Sequence[Record], vocabulary: Vocabulary, bleu_weight: float = 0.0):
        self.vocabulary, self.bleu_weight = vocabulary, bleu_weight
        self.records = records
        self.places = Places(record.image_id for record in records)
        self.cider = metrics.CiderD([reference_words(record) for record in records])

    def __call__(self, image_ids: Sequence[str], tokens: Tensor) -> Tensor:
        """Return the rewards (B, n), float32, of `tokens` (B, n, T) as decoding returns them."""
        images, samples, _ = tokens.shape
        candidates = [self.to_captions(caption) for caption in tokens.flatten(0, 1).tolist()]
        rows = [self.places.find(image_id) for image_id in image_ids]
        places = [row for row in rows for _ in range(samples)]
        rewards = self.cider.scores(candidates, places)
        if self.bleu_weight:
            references = {row: reference_words(self.records[row]) for row in rows}
            bleu = [
                metrics.bleu([references[place]], [candidate])[-1]
                for place, candidate in zip(places, candidates, strict=True)
            ]
            rewards += self.bleu_weight * torch.tensor(bleu).numpy()
        return torch.from_numpy(rewards).float().view(images, samples)

    def to_captions(self, tokens: Sequence[int]) -> list[str]:
        """Return the scorer's words of a caption; its end is one where it has one."""
        words = tokenize(self.vocabulary.decode(tokens))
        return [*words, OVER] if END in tokens else words


def reference_words(record: Record) -> list[list[str]]:
    """Return the scorer's words of an image's captions, each with its end."""
    return [[*tokenize(caption), OVER] for caption in record.captions]


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return for each of `rewards` (B, n) the mean of its image's n - 1 others."""
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
