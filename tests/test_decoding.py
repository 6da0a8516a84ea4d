"""What holds for captions of every method, which words are allowed, and sampling by seeds."""

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
from decoding import (
    DecodingConfig,
    State,
    beam_search,
    decode,
    draw_words,
    filter_words,
    greedy,
    sample,
)
from masks import mask_impossible_words
from util.files import UserError
from vocabulary import END, PAD, START, UNK, Vocabulary

# ---- what holds for every caption ----------------------------------------------------------------


BIASES = {
    "no bias": {},
    "specials likely": {PAD: 9.0, START: 9.0, UNK: 9.0},
    "the end likely": {END: 9.0},
    "the end unlikely": {END: -1e4},
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
def test_captions_that_cannot_end_have_max_words(name):
    end = -math.inf
    for captions in to_captions(METHODS[name](Toy(bias={END: end}), images(), max_words=6)):
        assert [len(each) for each in captions] == [6] * len(captions)


@every_method
def test_captions_have_at_least_min_words(method):
    decoded = method(Toy(bias={END: 5.0}), images(), max_words=6, min_words=4)
    assert {len(each) for captions in to_captions(decoded) for each in captions} <= {4, 5, 6}


@every_method
def test_a_caption_with_no_allowed_word_ends_below_min_words(method):
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
    tokens = method(Toy(), images(0), max_words=3).tokens
    assert len(tokens) == 0 and tokens.shape[2] == 1  # even so there is a column


@pytest.mark.parametrize("method", [greedy, METHODS["beam"]], ids=["greedy", "beam"])
def test_finished_images_leave_the_batch(method):
    toy, memory = Toy(words=6), images(4)
    memory[:, -1] = torch.tensor([60.0, 60.0, 60.0, -60.0])
    method(toy, memory, max_words=8)
    assert toy.rows[0] == 4 and toy.rows[4:] == [1] * 5


def test_a_generator_with_the_same_seed_gives_the_same_samples():
    toy, memory = Toy(words=6), images()

    def samples(seed):
        generator = torch.Generator().manual_seed(seed)
        return to_captions(sample(toy, memory, max_words=6, n=5, generator=generator))

    assert samples(1) == samples(1) != samples(2)


@every_method
def test_decoding_keeps_no_gradient(method):
    memory = images().requires_grad_()
    assert not method(Toy(), memory, max_words=3).log_prob.requires_grad


# ---- which words are allowed -----------------------------------------------------------------


def test_only_words_that_decoding_may_choose_stay_possible():
    logits = torch.randn(2, 5, 8)
    masked = mask_impossible_words(logits, max_words=3)
    possible = masked > -math.inf
    assert not possible[..., [PAD, START, UNK]].any()
    assert possible[:, :, END].tolist() == [[False, True, True, True, True]] * 2
    assert possible[:, :3, 4:].all() and not possible[:, 3:, 4:].any()
    assert torch.equal(masked[possible], logits[possible])


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24, 1.0])
def test_the_smallest_and_the_largest_random_number_draw_possible_words(number):
    """1.0 too, which a generator with fewer bits than float32 rounds up to."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, 3, 40, generator=generator).softmax(-1)
    probs[..., [0, 1, 2, 7, 38, 39]] = 0
    words = draw_words(probs, torch.full((500, 3), number))
    assert words.shape == (500, 3) and (words == (3 if number == 0 else 37)).all()


def test_a_random_number_on_the_border_draws_the_next_possible_word():
    probs = torch.tensor([[[0.0, 0.5, 0.0, 0.0, 0.5, 0.0]]])
    border = 0.5 / (1 - 2**-22)
    for number, word in ((border - 1e-6, 1), (border, 4), (border + 1e-6, 4)):
        assert draw_words(probs, torch.tensor([[number]])).tolist() == [[word]]


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
    # Words that reach the share exactly are enough: these probabilities have no rounding.
    assert [len(kept([0.0] * 4, top_p=share)) for share in (0.25, 0.5, 0.75)] == [1, 2, 3]
    assert len(kept([0.0] * 8, top_p=0.875)) == 7


def test_top_p_is_of_the_words_that_top_k_left():
    # Of 0.4 and 0.3 the first alone is 57 %.
    assert kept(SHARES, top_k=2, top_p=0.55) == [1]
    assert kept(SHARES, top_k=2, top_p=0.6) == [1, 3]


def test_filtering_leaves_the_logits_that_stay_as_they_are():
    logits = torch.randn(2, 3, 11)
    left = filter_words(logits, 4, 0.9)
    assert torch.equal(left[left.isfinite()], logits[left.isfinite()])
    assert left.isfinite().any(-1).all()


def test_reorder_gives_each_beam_its_parents_past_and_keeps_the_images():
    beam = torch.arange(24.0).view(2, 3, 4)
    moved = State((torch.arange(2.0),), (beam,)).reorder(torch.tensor([[2, 2], [0, 1]]))
    assert moved.image[0].tolist() == [0.0, 1.0]
    expected = torch.stack([beam[0, [2, 2]], beam[1, [0, 1]]])
    assert torch.equal(moved.beam[0], expected)
    last = moved.keep_images(torch.tensor([1]))
    assert last.image[0].tolist() == [1.0] and torch.equal(last.beam[0], expected[1:])


# ---- sampling with a seed per image ----------------------------------------------------------


SEEDS = (11, 5, 2**56 - 1, 0, 8, 11)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("n", (1, 3))
def test_samples_of_an_image_depend_on_its_seed_alone(n, settings):
    """Alone, in a batch and in another order, while images leave the batch at different steps."""
    toy, memory = Toy(words=6), images(len(SEEDS))
    memory[:, -1] = torch.tensor([4.0, -30.0, 0.0, 1.0, -30.0, 30.0])  # from 1 to 12 words

    def samples(rows) -> list:
        seeds = [SEEDS[row] for row in rows]
        return to_captions(sample(toy, memory[rows], max_words=12, n=n, seeds=seeds, **settings))

    together = samples([0, 1, 2, 3, 4, 5])
    assert {1, 12} <= {len(each) for captions in together for each in captions}
    order = [4, 2, 0, 5, 3, 1]
    assert samples(order) == [together[row] for row in order]
    for row in range(len(SEEDS)):
        assert samples([row]) == [together[row]]


def test_another_seed_gives_other_samples_and_torchs_generator_is_not_used():
    toy, memory = Toy(words=6), images(1).expand(6, -1)
    before = torch.get_rng_state()
    found = to_captions(sample(toy, memory, max_words=6, n=4, seeds=SEEDS))
    assert torch.equal(before, torch.get_rng_state())
    assert found[0] == found[5] and len({tuple(captions) for captions in found}) == 5
    first = to_captions(sample(toy, memory, max_words=6, n=1, seeds=SEEDS))
    assert first == [captions[:1] for captions in found]


# ---- decoding as configured ------------------------------------------------------------------


@pytest.mark.parametrize("method", decoding.METHODS)
def test_min_words_and_max_words_are_settings_of_every_method(method):
    toy, memory = Toy(bias={END: 5.0}), images()
    for least, most in ((1, None), (3, 4), (6, None)):
        config = DecodingConfig(method, min_words=least, max_words=most)
        captions = to_captions(decode(toy, memory, config, longest=6))
        found = {len(each) for one in captions for each in one}
        assert found <= set(range(least, (most or 6) + 1))
        assert least > 1 or 1 in found


def test_samples_depend_on_the_seed_of_the_configuration_and_of_the_image():
    toy, memory = Toy(words=6), images(2)

    def samples(seed, **kwargs):
        config = DecodingConfig("sample", seed=seed)
        return to_captions(decode(toy, memory, config, longest=9, n=5, **kwargs))

    assert samples(1) == samples(1) == samples(1, seeds=[0, 1]) != samples(1, seeds=[1, 0])
    assert samples(1) != samples(2)


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_decode_returns_as_many_captions_as_asked(method):
    decoded = decode(Toy(words=6), images(), DecodingConfig(method, beam_size=2), longest=6, n=4)
    assert all(len(captions) == 4 for captions in to_captions(decoded))


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


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"method": "best"}, {}, "method 'best' is not known; choose from beam, greedy, sample"),
        ({"min_words": 0}, {}, "min words 0 must be at least 1"),
        ({"min_words": 7}, {}, "min words 7 must be between 1 and max words, 6"),
        ({"max_words": 7}, {}, "max words 7 must be between 1 and the model's 6"),
        ({"beam_size": 1001}, {}, "beam size 1001 must be at most 1,000"),
        ({"length_penalty": math.nan}, {}, "length penalty nan must be between -100 and 100"),
        ({"method": "greedy"}, {"n": 2}, "the greedy method has one caption per image"),
        ({}, {"n": 0}, "n 0 must be at least 1"),
        ({"method": "sample"}, {"n": 1001}, "n 1001 must be at most 1,000"),
    ],
)
def test_a_configuration_out_of_range_is_named(settings, arguments, message):
    with pytest.raises(UserError, match=message):
        decode(Toy(), images(), DecodingConfig(**settings), longest=6, **arguments)


def test_probabilities_that_are_no_numbers_are_one_clear_line():
    vocabulary = Vocabulary(["a", "b", "c"])
    decoded = greedy(Toy(bias={4: math.nan}), images(), max_words=3)
    with pytest.raises(UserError, match="the model's probabilities are NaN"):
        decoding.to_captions(vocabulary, decoded)
    decoded = draw(Toy(bias={4: math.nan}), images(), max_words=3)
    with pytest.raises(UserError, match="the model's probabilities are NaN"):
        decoding.to_captions(vocabulary, decoded)


def test_captions_as_text_leave_out_those_that_are_not_possible():
    decoded = beam_search(Toy(words=2), images(2), max_words=1, beam_size=4, n=4)
    captions = decoding.to_captions(Vocabulary(["yes", "no"]), decoded)
    assert [sorted(each.text for each in row) for row in captions] == [["no", "yes"]] * 2
    assert captions[1][0].log_prob == pytest.approx(float(decoded.log_prob[1, 0]))
