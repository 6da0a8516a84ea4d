"""What training minimises (a function and a row in `OBJECTIVES` each), and the reward of samples.

B images · M captions in a batch · T words · V vocabulary · S image positions
n samples per image · N real words in a batch (not padding)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import metrics
from dataset import Batch
from decoding import sample
from masks import mask_impossible_words
from readers import Record
from util.layers import to_device
from vocabulary import END, PAD, START, Vocabulary


class Loss(NamedTuple):
    """A loss and its parts; the real words of a batch are those that are not padding.

    `objective` has the gradient: a sum over the real words from `cross_entropy` and
    `self_critical`, already divided by the step's totals from a function in `OBJECTIVES`. `nll` is
    the sum of the negative log-likelihood in nats (no smoothing, no gradient), `words` the number
    of real words.
    """

    objective: Tensor
    nll: Tensor
    words: int


class Totals(NamedTuple):
    """What a step's batch holds over all processes and micro-batches."""

    words: float
    captions: float


class SampledBatch(NamedTuple):
    """A `Batch` whose captions were sampled from the model.

    `advantage` (M,): a caption's reward minus its baseline. `max_words`: the length
    at which sampling ended a caption.
    """

    image_ids: list[str]
    inputs: Tensor
    tokens: Tensor
    owner: Tensor
    advantage: Tensor
    max_words: int


# --- losses


def cross_entropy(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of `logits` (M, T-1, V) for `tokens` (M, T); padding never counts.

    `tokens` may be on the CPU while the logits are on a GPU: nothing here waits for the GPU then.
    Smoothing mixes the target with the uniform distribution over the V words (arXiv 1512.00567).
    """
    log_probs, target_log_prob, _ = real_log_probs(logits, tokens)
    nll = -target_log_prob.sum()
    objective = nll
    if label_smoothing:
        # The cross-entropy with the uniform distribution: the mean over all words of a target.
        uniform = -log_probs.mean(-1).sum()
        objective = (1 - label_smoothing) * nll + label_smoothing * uniform
    return Loss(objective, nll.detach(), len(target_log_prob))


def self_critical(logits: Tensor, tokens: Tensor, advantage: Tensor) -> Loss:
    """Return the loss of `logits` (M, T-1, V) for sampled `tokens` (M, T); padding never counts.

    REINFORCE with a baseline (arXiv 1612.00563): the words of a caption become more probable where
    its `advantage` (M,) is above 0, less probable where it is below.
    """
    _, target_log_prob, caption = real_log_probs(logits, tokens)
    objective = -(advantage[caption] * target_log_prob).sum()
    return Loss(objective, -target_log_prob.detach().sum(), len(target_log_prob))


def real_log_probs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities (N, V) of the real targets, those of the target (N,), its caption.

    Only the N targets that are no padding go through the softmax, the largest tensor of a step.
    """
    targets = tokens[:, 1:]
    # Which targets are real is only known where the tokens are. On a GPU, `nonzero` would wait for
    # it; the loader leaves them on the CPU.
    caption, position = (targets != PAD).nonzero(as_tuple=True)
    words = targets[caption, position]
    caption, position, words = (
        to_device(each, logits.device) for each in (caption, position, words)
    )
    # In float32: sums of thousands of bfloat16 numbers would lose the small ones.
    log_probs = logits[caption, position].float().log_softmax(-1)  # (M, T-1, V) -> (N, V)
    return log_probs, log_probs.gather(-1, words[:, None])[:, 0], caption


def attention_penalty(attention: Tensor) -> Tensor:
    """Return the doubly stochastic penalty of attention (M, T-1, S), which is zero at padding.

    The mean of (1 - a position's attention summed over the words) squared: it is smallest where
    a caption attends to all positions equally (arXiv 1502.03044, section 4.2.1).
    """
    return (1 - attention.sum(1)).square().mean()


# --- objectives: logits and attention of a micro-batch -> its share of the step's loss
#
# `options` has the flags (config.TrainConfig). The shares of all micro-batches and processes add up
# to the loss of the whole batch, so each divides by the totals of the batch and not by its own.


def cross_entropy_objective(
    logits: Tensor, attention: Tensor | None, batch: Batch, totals: Totals, options: Any
) -> Loss:
    """Return the cross-entropy per word of the captions that people wrote.

    Where the decoder returns attention (M, T-1, S), plus the doubly stochastic penalty.
    """
    loss = cross_entropy(logits, batch.tokens, options.label_smoothing)
    objective = loss.objective / totals.words
    if attention is not None and len(batch.tokens):
        share = len(batch.tokens) / totals.captions
        objective = objective + options.attention_penalty * share * attention_penalty(attention)
    return loss._replace(objective=objective)


def self_critical_objective(
    logits: Tensor, attention: Tensor | None, batch: SampledBatch, totals: Totals, options: Any
) -> Loss:
    """Return the self-critical loss per word of captions sampled from the model.

    Words that decoding never chooses are left out of the softmax, as they were when the captions
    were sampled: otherwise a caption with a negative advantage would push probability to <unk>,
    which is never sampled and so never pushed back.
    """
    if len(logits):
        logits = mask_impossible_words(logits, batch.max_words)
    loss = self_critical(logits, batch.tokens, batch.advantage)
    return loss._replace(objective=loss.objective / totals.words)


# What `--objective` offers. Self-critical training is a stage of its own, after these.
OBJECTIVES: dict[str, Callable[..., Loss]] = {"cross-entropy": cross_entropy_objective}


# --- self-critical training


@torch.no_grad()
def sample_captions(
    model: Any, batch: Batch, reward: "Reward", n: int
) -> tuple[SampledBatch, Tensor]:
    """Return a batch of `n` captions per image sampled from the model, and their rewards (B, n).

    They are sampled without gradients; training scores them again by teacher forcing, so that there
    is one path for gradients. Both need dropout off, or the two passes would disagree.
    """
    device, max_words = next(model.parameters()).device, model.config.seq_len
    if not batch.image_ids:  # this process has no image in the micro-batch
        empty = SampledBatch([], *batch[1:4], torch.zeros(0, device=device), max_words)
        return empty, torch.zeros(0, n)
    memory = model.encode(to_device(batch.inputs, device))
    # (B, n, T), on the CPU: n-grams are counted there, and which tokens are words must be known
    # there, or training, which scores the samples again, would wait for a GPU to tell it.
    samples = sample(model.decoder, memory, max_words=max_words, n=n).tokens.cpu()
    rewards = reward(batch.image_ids, samples)
    start = torch.full_like(samples[..., :1], START)
    tokens = torch.cat([start, samples], -1).flatten(0, 1)
    owner = torch.arange(len(samples)).repeat_interleave(n)
    advantage = to_device((rewards - leave_one_out(rewards)).flatten(), device)
    return SampledBatch(batch.image_ids, batch.inputs, tokens, owner, advantage, max_words), rewards


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return the baseline (B, n): for each sample, the mean reward of its image's n - 1 others."""
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


class Reward:
    """CIDEr-D of captions against those of their images, plus `bleu_weight` times BLEU-4.

    Words are the scorer's. Document frequencies are those of the records (the train split). The end
    of a caption counts as a word, in references too: otherwise a caption that breaks off ("a man
    with a") would score higher than a complete one.
    """

    END_WORD = "<end>"  # the scorer's tokeniser never gives this one

    def __init__(self, records: Sequence[Record], vocabulary: Vocabulary, bleu_weight: float = 0.0):
        self.records, self.bleu_weight = records, bleu_weight
        self.rows = {record.image_id: row for row, record in enumerate(records)}
        self.by_character = metrics.are_unspaced([record.captions for record in records])
        self.cider = metrics.CiderD([self.reference_words(row) for row in range(len(records))])
        # A sampled caption consists of vocabulary words: each is tokenised once, here. Special
        # tokens are no words, but for the end.
        specials = len(Vocabulary.SPECIALS)
        self.scorer_words = [[]] * specials + [self.split(word) for word in vocabulary.known]
        self.scorer_words[END] = [self.END_WORD]

    def __call__(self, image_ids: Sequence[str], samples: Tensor) -> Tensor:
        """Return the rewards (B, n), float32, of `samples` (B, n, T) as decoding returns them."""
        n = samples.shape[1]
        captions = [self.to_words(tokens) for tokens in samples.flatten(0, 1).tolist()]
        rows = [self.rows[image_id] for image_id in image_ids for _ in range(n)]
        rewards = torch.from_numpy(self.cider.scores(captions, rows))
        if self.bleu_weight:
            bleu = [
                metrics.bleu([self.reference_words(row)], [caption])[-1]
                for row, caption in zip(rows, captions, strict=True)
            ]
            rewards += self.bleu_weight * torch.tensor(bleu)
        return rewards.float().view(len(image_ids), n)

    def reference_words(self, row: int) -> list[list[str]]:
        """Return the scorer's words of an image's captions, each with END_WORD."""
        return [[*self.split(caption), self.END_WORD] for caption in self.records[row].captions]

    def split(self, text: str) -> list[str]:
        """Return the scorer's words of a caption or a word."""
        return metrics.split_text(text, self.by_character)

    def to_words(self, tokens: Sequence[int]) -> list[str]:
        """Return the scorer's words of a sampled caption (T,), END_WORD last if it has an end."""
        return [word for token in tokens for word in self.scorer_words[token]]
