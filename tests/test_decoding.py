"""What captions always are, by any method and with any settings, and which words may be said."""

import math

import pytest
import torch
from helpers.toy import (
    DETERMINISTIC,
    METHODS,
    SPECIALS,
    Toy,
    draw,
    every_method,
    images,
    repeats,
    to_captions,
)

import decoding
from decoding import State, beam_search, filter_words, greedy, sample
from vocabulary import END, PAD, START, UNK

# ---- what captions always are ----------------------------------------------------------------


BIASES = {
    "no bias": {},
    "specials likely": {PAD: 9.0, START: 9.0, UNK: 9.0},
    "the end likely": {END: 9.0},
    "the end never likely": {END: -1e4},
    "the end impossible": {END: -math.inf},
    "known words next to impossible": {4: -1e30, 5: -1e30, 6: -1e30},
}


@every_method
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("ngram", (0, 2))
def test_every_caption_is_one_of_known_words_and_not_empty(method, bias, ngram):
    decoded = method(Toy(bias=bias), images(), max_words=5, no_repeat_ngram=ngram)
    assert not decoded.log_prob.isnan().any()
    for captions, scores in zip(to_captions(decoded), decoded.log_prob.tolist(), strict=True):
        assert captions and len(captions) == sum(score > -math.inf for score in scores)
        for caption in captions:
            assert 1 <= len(caption) <= 5 and min(caption) >= SPECIALS
            assert not (ngram and repeats(caption, ngram))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_captions_that_cannot_end_are_cut_at_the_longest(name):
    end = -math.inf
    for captions in to_captions(METHODS[name](Toy(bias={END: end}), images(), max_words=6)):
        assert [len(each) for each in captions] == [6] * len(captions)


@every_method
def test_captions_have_at_least_the_words_asked_for(method):
    decoded = method(Toy(bias={END: 5.0}), images(), max_words=6, min_words=4)
    assert {len(each) for captions in to_captions(decoded) for each in captions} <= {4, 5, 6}


@every_method
def test_a_caption_with_no_word_left_ends_though_it_be_too_short(method):
    decoded = method(Toy(words=2), images(), max_words=6, min_words=5, no_repeat_ngram=1)
    assert decoded.log_prob.isfinite()[:, 0].all()
    assert all(set(each[0]) == {4, 5} and len(each[0]) == 2 for each in to_captions(decoded))


def test_tokens_are_as_long_as_the_longest_caption():
    toy = Toy(bias={END: 50.0})
    assert greedy(toy, images(), max_words=9).tokens.shape == (5, 1, 2)
    assert greedy(Toy(bias={END: -50.0}), images(), max_words=9).tokens.shape == (5, 1, 10)
    assert beam_search(toy, images(), max_words=9, beam_size=3, n=2).tokens.shape[:2] == (5, 2)
    assert draw(toy, images(), max_words=9, n=4).tokens.shape == (5, 4, 2)


@every_method
def test_no_images_have_no_captions(method):
    assert len(method(Toy(), images(0), max_words=3).tokens) == 0


@pytest.mark.parametrize("method", [greedy, METHODS["beam"]], ids=["greedy", "beam"])
def test_images_that_have_ended_are_worked_on_no_more(method):
    toy, memory = Toy(words=6), images(4)
    memory[:, -1] = torch.tensor([60.0, 60.0, 60.0, -60.0])
    method(toy, memory, max_words=8)
    assert toy.rows[0] == 4 and toy.rows[4:] == [1] * 5


def test_the_same_seed_draws_the_same_captions_and_another_seed_others():
    toy, memory = Toy(words=6), images()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return to_captions(sample(toy, memory, max_words=6, n=5, generator=generator))

    assert drawn(1) == drawn(1) != drawn(2)


@every_method
def test_decoding_keeps_no_gradient(method):
    memory = images().requires_grad_()
    assert not method(Toy(), memory, max_words=3).log_prob.requires_grad


# ---- which words are left --------------------------------------------------------------------


def test_bounded_logits_leave_what_decoding_may_choose():
    logits = torch.randn(2, 5, 8)
    left = decoding.bounded(logits, max_words=3, min_words=2)
    free = left > -math.inf
    assert not free[..., [PAD, START, UNK]].any()
    assert free[:, :, END].tolist() == [[False, False, True, True, True]] * 2
    assert free[:, :3, 4:].all() and not free[:, 3:, 4:].any()
    assert torch.equal(left[free], logits[free])


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-24])
def test_the_least_and_the_largest_chance_draw_possible_words(chance, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(500, 3, 40, generator=generator).softmax(-1)
    probability[..., [0, 1, 2, 7, 38, 39]] = 0
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, chance))
    words = decoding.draw_words(probability)
    assert words.shape == (500, 3, 1) and (words == (3 if chance == 0 else 37)).all()


def kept(logits, top_k=0, top_p=1.0) -> list[int]:
    return filter_words(torch.tensor(logits), top_k, top_p).isfinite().nonzero()[:, 0].tolist()


SHARES = [math.log(share) for share in (0.1, 0.4, 0.05, 0.3, 0.15)]


def test_top_k_keeps_exactly_the_k_most_probable_words():
    assert [kept(SHARES, top_k=k) for k in (1, 2, 3)] == [[1], [1, 3], [1, 3, 4]]
    assert kept(SHARES, top_k=0) == kept(SHARES, top_k=5) == kept(SHARES, top_k=99) == [*range(5)]
    assert len(kept([0.0] * 6, top_k=2)) == 2


def test_top_p_keeps_the_fewest_words_that_reach_it():
    expected = {0.01: [1], 0.39: [1], 0.41: [1, 3], 0.69: [1, 3], 0.71: [1, 3, 4], 0.84: [1, 3, 4]}
    assert {share: kept(SHARES, top_p=share) for share in expected} == expected
    assert kept(SHARES, top_p=0.96) == kept(SHARES, top_p=1.0) == [*range(5)]
    assert len(kept([0.0] * 6, top_p=0.45)) == 3


def test_top_p_is_of_the_words_that_top_k_left():
    # Of 0.4 and 0.3 the first alone is 57 %.
    assert kept(SHARES, top_k=2, top_p=0.55) == [1]
    assert kept(SHARES, top_k=2, top_p=0.6) == [1, 3]


def test_filtering_leaves_the_logits_that_stay_as_they_are():
    logits = torch.randn(2, 3, 11)
    left = filter_words(logits, 4, 0.9)
    assert torch.equal(left[left.isfinite()], logits[left.isfinite()])
    assert left.isfinite().any(-1).all()


def test_a_state_gives_each_beam_its_parents_past_and_leaves_the_images():
    beam = torch.arange(24.0).view(2, 3, 4)
    state = State((torch.arange(2.0),), (beam,), beam + 100)
    moved = state.reorder(torch.tensor([[2, 2], [0, 1]]))
    assert moved.image[0] is state.image[0]
    expected = torch.stack([beam[0, [2, 2]], beam[1, [0, 1]]])
    assert torch.equal(moved.beam[0], expected) and torch.equal(moved.attention, expected + 100)
    last = moved.keep_images(torch.tensor([1]))
    assert last.image[0].tolist() == [1.0] and torch.equal(last.beam[0], expected[1:])
    assert torch.equal(last.attention, expected[1:] + 100)
    assert State((), (beam,)).reorder(torch.tensor([[0], [0]])).attention is None


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (greedy, {"max_words": 0}, "max words, 0"),
        (greedy, {"min_words": 0}, "min words 0 must be between 1 and max words, 5"),
        (greedy, {"min_words": 6}, "min words 6"),
        (greedy, {"no_repeat_ngram": -1}, "n-gram -1 must be at least 0"),
        (beam_search, {"beam_size": 0}, "n 1 must be between 1 and the beam size, 0"),
        (beam_search, {"beam_size": 2, "n": 3}, "n 3 must be between 1 and the beam size, 2"),
        (beam_search, {"n": 0}, "n 0 must be between 1"),
        (beam_search, {"min_words": 0}, "min words 0"),
        (beam_search, {"beam_size": 1, "min_words": 0}, "min words 0"),
        (sample, {"temperature": 0}, "temperature 0 must be above 0"),
        (sample, {"temperature": math.nan}, "temperature nan must be"),
        (sample, {"temperature": math.inf}, "temperature inf must be"),
        (sample, {"top_p": 0}, "top-p 0 in"),
        (sample, {"top_p": 1.1}, "top-p 1.1 in"),
        (sample, {"top_k": -1}, "top-k -1"),
        (sample, {"n": 0}, "n 0 must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_named(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(Toy(), images(), **{"max_words": 5, **settings})
