"""The loss against torch's own, and under changes that must not matter.

M captions in a batch · T words · V vocabulary
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import TrainConfig
from dataset import Batch
from losses import (
    Totals,
    attention_penalty,
    cross_entropy,
    cross_entropy_objective,
    leave_one_out,
    self_critical,
)
from vocabulary import END, PAD, START

SIZE = 11
SMOOTHINGS = (0.0, 0.1, 0.7)
smoothings = pytest.mark.parametrize("smoothing", SMOOTHINGS)


def batch(lengths: tuple[int, ...] = (3, 7, 1, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (M, T-1, V) that want a gradient, and tokens (M, T)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.tensor([START, *torch.randint(4, SIZE, (length,), generator=generator), END])
        for length in lengths
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    logits = torch.randn(len(rows), tokens.shape[1] - 1, SIZE, generator=generator)
    return logits.requires_grad_(), tokens


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of)[0]


@smoothings
def test_the_loss_and_its_gradient_are_torchs(smoothing):
    logits, tokens = batch()
    loss = cross_entropy(logits, tokens, smoothing)
    expected = F.cross_entropy(
        logits.flatten(0, 1),
        tokens[:, 1:].flatten(),
        ignore_index=PAD,
        label_smoothing=smoothing,
        reduction="sum",
    )
    torch.testing.assert_close(loss.objective, expected)
    torch.testing.assert_close(gradient(loss.objective, logits), gradient(expected, logits))


@smoothings
def test_the_likelihood_is_not_smoothed_and_has_no_gradient(smoothing):
    logits, tokens = batch()
    loss = cross_entropy(logits, tokens, smoothing)
    plain = cross_entropy(logits, tokens)
    torch.testing.assert_close(loss.nll, plain.objective.detach())
    assert not loss.nll.requires_grad and loss.objective.requires_grad


def test_the_words_are_counted_with_the_end_and_without_the_start():
    assert cross_entropy(*batch((3, 7, 1, 5))).words == (3 + 7 + 1 + 5) + 4


@smoothings
def test_padding_never_changes_the_loss_or_its_gradient(smoothing):
    logits, tokens = batch()
    loss = cross_entropy(logits, tokens, smoothing)
    noise = 50 * torch.randn(len(tokens), 4, SIZE)
    wider = torch.cat([logits.detach(), noise], 1).requires_grad_()
    padded = cross_entropy(wider, F.pad(tokens, (0, 4), value=PAD), smoothing)
    assert padded.words == loss.words
    torch.testing.assert_close(padded.objective, loss.objective)
    slope = gradient(padded.objective, wider)
    torch.testing.assert_close(
        slope[:, : logits.shape[1]], gradient(loss.objective, logits), atol=1e-6, rtol=1e-5
    )
    assert not slope[:, logits.shape[1] :].any()


@smoothings
def test_the_order_of_captions_never_changes_the_loss(smoothing):
    logits, tokens = batch()
    order = torch.tensor([2, 0, 3, 1])
    loss = cross_entropy(logits, tokens, smoothing)
    shuffled = cross_entropy(logits[order], tokens[order], smoothing)
    torch.testing.assert_close(shuffled.objective, loss.objective)
    assert shuffled.words == loss.words


@smoothings
def test_the_sums_of_two_halves_are_the_sum_of_the_whole(smoothing):
    logits, tokens = batch()
    whole = cross_entropy(logits, tokens, smoothing)
    halves = [cross_entropy(logits[at : at + 2], tokens[at : at + 2], smoothing) for at in (0, 2)]
    for name in ("objective", "nll", "words"):
        parts = torch.as_tensor(sum(getattr(each, name) for each in halves))
        torch.testing.assert_close(parts, torch.as_tensor(getattr(whole, name)))


@smoothings
def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary(smoothing):
    _, tokens = batch()
    loss = cross_entropy(torch.zeros(*tokens[:, 1:].shape, SIZE), tokens, smoothing)
    expected = torch.tensor(float(SIZE)).log()
    torch.testing.assert_close(loss.objective / loss.words, expected)
    torch.testing.assert_close(loss.nll / loss.words, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, tokens = batch((9,) * 200)
    half = logits.detach().to(dtype)
    loss = cross_entropy(half, tokens, 0.1)
    assert loss.objective.dtype == loss.nll.dtype == torch.float32
    torch.testing.assert_close(loss.objective, cross_entropy(half.float(), tokens, 0.1).objective)


@smoothings
def test_extreme_logits_give_finite_losses_and_gradients(smoothing):
    logits, tokens = batch()
    large = (logits.detach() * 1e4).requires_grad_()
    loss = cross_entropy(large, tokens, smoothing)
    assert loss.objective.isfinite() and gradient(loss.objective, large).isfinite().all()


@smoothings
def test_a_batch_of_padding_costs_nothing(smoothing):
    logits, tokens = batch()
    loss = cross_entropy(logits, torch.full_like(tokens, PAD), smoothing)
    assert float(loss.objective.detach()) == float(loss.nll) == loss.words == 0
    assert not gradient(loss.objective, logits).any()


# --- self-critical


def chosen(logits: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Return `count` captions (count, 1 + words) drawn from `logits` (words, V)."""
    drawn = torch.multinomial(logits.softmax(-1), count, True, generator=generator)
    return torch.cat([torch.full((count, 1), START), drawn.T], 1)


def test_its_mean_gradient_is_that_of_the_expected_reward():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, generator=generator).index_fill_(1, torch.tensor(PAD), -1e4)
    logits.requires_grad_()
    worth = torch.rand(6, 6, generator=generator)  # the reward of any two words
    first, second = logits.softmax(-1)
    expected = gradient((first[:, None] * second * worth).sum(), logits)
    samples = chosen(logits.detach(), generator, 200_000)
    rewards = worth[samples[:, 1], samples[:, 2]].view(-1, 5)
    advantage = (rewards - leave_one_out(rewards)).flatten()
    loss = self_critical(logits.expand(len(samples), 2, 6), samples, advantage)
    found = gradient(-loss.objective / len(samples), logits)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert expected.abs().max() > 0.02


def test_padding_never_changes_it_and_words_are_counted():
    logits, tokens = batch()
    advantage = torch.tensor([1.0, -0.5, 0.0, 2.0])
    loss = self_critical(logits, tokens, advantage)
    wider = torch.cat([logits, torch.randn(len(tokens), 4, SIZE)], 1)
    padded = self_critical(wider, F.pad(tokens, (0, 4), value=PAD), advantage)
    torch.testing.assert_close(padded.objective, loss.objective)
    assert padded.words == loss.words == cross_entropy(logits, tokens).words
    torch.testing.assert_close(loss.nll, cross_entropy(logits, tokens).nll)
    slope = gradient(loss.objective, logits)
    assert not slope[2].any() and slope[0].any()


def test_even_attention_has_no_penalty_and_staring_has_one():
    even = torch.full((2, 4, 4), 0.25)
    staring = torch.zeros(1, 4, 4)
    staring[..., 0] = 1
    assert attention_penalty(even) == 0
    assert attention_penalty(staring) == pytest.approx((9 + 3) / 4)
    padded = torch.cat([even, torch.zeros(2, 3, 4)], 1)
    assert attention_penalty(padded) == 0


def test_the_objectives_of_parts_add_up_to_that_of_the_whole_batch():
    """Of its words, and of the attention penalty, which is a mean over captions."""
    logits, tokens = batch()
    attention = torch.rand(*logits.shape[:2], 9)
    totals = Totals(float((tokens[:, 1:] != PAD).sum()), len(tokens))

    def objective(rows: slice) -> Tensor:
        part = Batch([], torch.empty(0), tokens[rows], torch.empty(0))
        options = TrainConfig(attention_penalty=0.7)
        loss = cross_entropy_objective(logits[rows], attention[rows], part, totals, options)
        return loss.objective

    whole = objective(slice(None))
    parts = [objective(rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 4))]
    torch.testing.assert_close(sum(parts), whole)
    expected = cross_entropy(logits, tokens, 0.1).objective / totals.words
    torch.testing.assert_close(whole, expected + 0.7 * attention_penalty(attention))
