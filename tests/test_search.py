"""What a search finds, against all possible captions and against other ways to the same result.

K beams
"""

import itertools
import math

import pytest
import torch
from helpers.toy import (
    DETERMINISTIC,
    MAX_WORDS,
    METHODS,
    SPECIALS,
    Toy,
    draw,
    every_method,
    images,
    repeats,
    rescored,
    same,
    to_captions,
)

import decoding
from decoding import Decoded, State, beam_search, greedy, sample
from model import Ensemble
from vocabulary import END, PAD, START, UNK

PENALTIES = (0.0, 0.7, 1.0)


# ---- brute force -----------------------------------------------------------------------------


def every_caption(toy, memory, longest: int = MAX_WORDS, least: int = 1) -> dict[tuple, float]:
    """Return every possible caption of one image with its log-probability."""
    words = range(SPECIALS, len(toy.bias))
    state, token, total = toy.start(memory), torch.tensor([[START]]), torch.zeros(1)
    found: dict[tuple, float] = {}
    for length in range(longest + 1):
        log_probs, state = toy.step(token, state)
        prefixes = list(itertools.product(words, repeat=length))  # in the order of the rows
        if length >= least:
            found |= zip(prefixes, (total + log_probs[0, :, END]).tolist(), strict=True)
        total = (total[:, None] + log_probs[0, :, SPECIALS:]).flatten()
        token = torch.tensor([words]).repeat(1, len(prefixes))
        grown = tuple(each.repeat_interleave(len(words), dim=1) for each in state.beam)
        state = State(state.image, grown)
    return found


def ranked(captions: dict[tuple, float], penalty: float) -> list[tuple]:
    return sorted(captions, key=lambda each: -captions[each] / (len(each) + 1) ** penalty)


@pytest.mark.parametrize("penalty", (*PENALTIES, -0.5))
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_captions_in_order(penalty, seed):
    toy, memory = Toy(seed=seed), images(seed=seed)
    decoded = beam_search(
        toy, memory, max_words=MAX_WORDS, beam_size=120, n=20, length_penalty=penalty
    )
    for row, found in enumerate(to_captions(decoded)):
        captions = every_caption(toy, memory[row : row + 1])
        assert found == ranked(captions, penalty)[:20]
        expected = torch.tensor([captions[each] for each in found])
        torch.testing.assert_close(decoded.log_prob[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("ngram", (1, 2, 3))
def test_a_wide_beam_finds_the_best_caption_without_a_repeated_ngram(penalty, ngram):
    # Repeating a word is probable here, so that there is something to forbid.
    toy, memory = Toy(seed=5, bias={SPECIALS: 3.0}), images(3)
    settings = {"max_words": 5, "min_words": 3, "beam_size": 400, "length_penalty": penalty}
    free = to_captions(beam_search(toy, memory, **settings))
    blocked = to_captions(beam_search(toy, memory, no_repeat_ngram=ngram, **settings))
    for row, (found,) in enumerate(blocked):
        captions = every_caption(toy, memory[row : row + 1], 5, 3)
        allowed = {each: value for each, value in captions.items() if not repeats(each, ngram)}
        assert found == ranked(allowed, penalty)[0]
    assert ngram == 3 or free != blocked


def search_with_lists(toy, memory, beam_size: int, longest: int) -> dict[tuple, float]:
    """Return the captions that beam search completes for one image, with lists and loops.

    Of the 2K most probable candidates, those that end are captions and K of the others grow on.
    """
    found, growing = {}, [((), 0.0)]
    for length in range(longest + 1):
        candidates = []
        for caption, total in growing:
            state = toy.start(memory)
            for before in (START, *caption):
                log_probs, state = toy.step(torch.tensor([[before]]), state)
            for word in range(END, len(toy.bias)):
                allowed = word != UNK and (word == END) >= (length == longest)
                if allowed and (word != END or length):
                    candidates.append(((*caption, word), total + float(log_probs[0, 0, word])))
        candidates = sorted(candidates, key=lambda each: -each[1])[: 2 * beam_size]
        found |= {caption[:-1]: total for caption, total in candidates if caption[-1] == END}
        growing = [each for each in candidates if each[0][-1] != END][:beam_size]
    return found


@pytest.mark.parametrize("beam_size", (2, 3, 5))
@pytest.mark.parametrize("end", (-2.0, 0.0, 2.0))
def test_a_narrow_beam_finds_what_a_search_with_lists_finds(beam_size, end):
    toy, memory = Toy(words=6, seed=3), images(4, end=end)
    decoded = beam_search(toy, memory, max_words=6, beam_size=beam_size, n=beam_size)
    for row, found in enumerate(to_captions(decoded)):
        captions = search_with_lists(toy, memory[row : row + 1], beam_size, 6)
        assert found == ranked(captions, 0)[:beam_size]


@pytest.mark.parametrize("beam_size", (2, 8, 9, 50))
def test_a_beam_may_be_larger_than_the_vocabulary(beam_size):
    """Two words make six captions of up to two words: no others are returned."""
    toy, memory = Toy(words=2), images()
    decoded = beam_search(toy, memory, max_words=2, beam_size=beam_size, n=beam_size)
    for row, captions in enumerate(to_captions(decoded)):
        assert len(captions) == min(6, beam_size) == len(set(captions))
        assert (decoded.log_prob[row, 6:] == -math.inf).all()
        assert (decoded.tokens[row, 6:] == PAD).all()
        if beam_size > 2:
            assert captions == ranked(every_caption(toy, memory[row : row + 1], 2), 0)


@pytest.mark.parametrize("seeds", [None, (3, 4)], ids=["one generator", "seed per image"])
def test_samples_are_as_frequent_as_they_are_probable(seeds):
    torch.manual_seed(0)
    toy, memory = Toy(), images(2)
    samples = sample(toy, memory, max_words=2, n=8000, seeds=seeds)
    for row, found in enumerate(to_captions(samples)):
        expected = sampling_probabilities(toy, memory[row : row + 1])
        assert sum(expected.values()) == pytest.approx(1)
        shares = {caption: found.count(caption) / len(found) for caption in expected}
        assert shares == pytest.approx(expected, abs=0.02)


def sampling_probabilities(toy, memory) -> dict[tuple, float]:
    """Return the probabilities of all captions of one or two words of one image.

    At each step the probability of tokens that are not allowed is shared among the others.
    """
    words, found = range(SPECIALS, len(toy.bias)), {}
    log_probs, state = toy.step(torch.tensor([[START]]), toy.start(memory))
    first = log_probs[0, 0, SPECIALS:].softmax(-1).tolist()
    for word, share in zip(words, first, strict=True):
        log_probs, _ = toy.step(torch.tensor([[word]]), state)
        second = log_probs[0, 0, [END, *words]].softmax(-1).tolist()
        captions = [(word,), *((word, after) for after in words)]
        found |= {each: share * p for each, p in zip(captions, second, strict=True)}
    return found


@pytest.mark.parametrize("penalty", (0.0, -0.5))
@pytest.mark.parametrize("seed", range(4))
def test_stopping_early_changes_no_caption_if_longer_ones_never_score_better(
    penalty, seed, monkeypatch
):
    settings = {"max_words": 9, "beam_size": 4, "n": 2, "length_penalty": penalty}
    toy, memory = Toy(words=6, seed=seed), images(6)
    stopped = beam_search(toy, memory, **settings)
    steps = sum(toy.rows)
    monkeypatch.setattr(decoding, "can_stop", lambda best, *_: torch.zeros_like(best).bool())
    toy.rows.clear()
    same(stopped, beam_search(toy, memory, **settings))
    assert steps < sum(toy.rows)


class Table:
    """A decoder of which each word depends on the last one only, by a table (V, V)."""

    def __init__(self, probs: dict[int, dict[int, float]]):
        self.probs = torch.full((7, 7), 1e-9)
        for before, row in probs.items():
            for word, value in row.items():
                self.probs[before, word] = value

    def start(self, memory):
        return State((memory,), (torch.zeros(len(memory), 1),))

    def step(self, token, state):
        return self.probs[token].log(), state


def find_best(probs: dict, max_words: int, penalty: float) -> tuple:
    settings = {"max_words": max_words, "beam_size": 2, "length_penalty": penalty}
    return to_captions(beam_search(Table(probs), torch.zeros(1, 1), **settings))[0][0]


def test_a_long_caption_wins_if_its_mean_is_better_although_shorter_ones_are_complete():
    # After 4 and after 5 the caption ends or 5 follows, each with 1/2.
    probs = {START: {4: 1.0}, 4: {END: 0.5, 5: 0.5}, 5: {END: 0.5, 5: 0.5}}
    assert find_best(probs, 4, 0) == find_best(probs, 4, 0.7) == (4,)
    assert find_best(probs, 4, 3) == (4, 5, 5, 5)


def test_a_search_goes_on_while_the_longest_caption_could_still_win():
    # With one more token the beam scores log(0.4) / 3 at best, less than the complete caption's
    # log(0.6) / 2. With two more it scores log(0.4) / 4, which is better than both.
    probs = {START: {4: 1.0}, 4: {END: 0.6, 5: 0.4}, 5: {6: 1.0}, 6: {END: 1.0}}
    assert find_best(probs, 3, 1) == (4, 5, 6)


def test_a_search_goes_on_while_the_next_caption_could_win_with_a_negative_penalty():
    # The complete caption scores 2 log(0.3), the beam 3 log(0.7) if it ends now, but less than
    # the complete one if it has as many words as allowed.
    probs = {START: {4: 1.0}, 4: {END: 0.3, 5: 0.7}, 5: {END: 1.0}}
    assert find_best(probs, 9, -1) == (4, 5)


# ---- two ways, one result --------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("ngram", (0, 1, 2))
@pytest.mark.parametrize("seed", range(2))
def test_beam_of_one_is_greedy(penalty, ngram, seed):
    toy, memory = Toy(words=9, seed=seed), images(8)
    settings = {"max_words": 7, "no_repeat_ngram": ngram}
    beam = beam_search(toy, memory, beam_size=1, length_penalty=penalty, **settings)
    same(beam, greedy(toy, memory, **settings))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-6}, {"temperature": 1e-42}, {"top_k": 1}, {"top_p": 1e-6}],
    ids=str,
)
def test_sampling_only_the_most_probable_word_is_greedy(settings):
    toy, memory = Toy(words=9), images(8)
    expected = greedy(toy, memory, max_words=7)
    samples = draw(toy, memory, max_words=7, n=2, **settings)
    for place in range(2):
        only = Decoded(samples.tokens[:, place : place + 1], samples.log_prob[:, place : place + 1])
        same(only, expected)


@every_method
@pytest.mark.parametrize("ngram", (0, 2))
def test_log_prob_is_the_models_for_these_tokens(method, ngram):
    toy, memory = Toy(words=6, seed=2), images()
    decoded = method(toy, memory, max_words=6, no_repeat_ngram=ngram)
    for row, captions in enumerate(to_captions(decoded)):
        expected = [rescored(toy, memory[row : row + 1], each) for each in captions]
        torch.testing.assert_close(
            decoded.log_prob[row], torch.tensor(expected), atol=1e-5, rtol=1e-5
        )


def test_log_prob_of_samples_is_the_models_own_at_any_temperature():
    toy, memory = Toy(words=6), images()
    decoded = draw(toy, memory, max_words=5, n=3, temperature=3.0, top_k=4, top_p=0.9)
    for row, captions in enumerate(to_captions(decoded)):
        expected = [rescored(toy, memory[row : row + 1], each) for each in captions]
        torch.testing.assert_close(
            decoded.log_prob[row], torch.tensor(expected), atol=1e-5, rtol=1e-5
        )


def test_a_caption_has_the_same_log_prob_by_sampling_and_by_beam_search():
    toy, memory = Toy(), images()
    every = beam_search(toy, memory, max_words=3, beam_size=39, n=39)
    samples = draw(toy, memory, max_words=3, n=20)
    for row, captions in enumerate(to_captions(samples)):
        known = dict(zip(to_captions(every)[row], every.log_prob[row].tolist(), strict=True))
        for caption, log_prob in zip(captions, samples.log_prob[row].tolist(), strict=True):
            assert known[caption] == pytest.approx(log_prob, abs=1e-5)


LENGTHS = (4.0, -30.0, 0.0, 30.0, -30.0, 1.0)  # logits of the end: 1 to max_words words


def mixed() -> torch.Tensor:
    memory = images(len(LENGTHS))
    memory[:, -1] = torch.tensor(LENGTHS)
    return memory


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_captions_of_an_image_do_not_depend_on_the_batch(name):
    method, toy, memory = METHODS[name], Toy(words=6, seed=1), mixed()
    together = method(toy, memory, max_words=12)
    order = [4, 2, 0, 5, 3, 1]
    shuffled = method(toy, memory[order], max_words=12)
    lengths = [len(each[0]) for each in to_captions(together)]
    assert (len(set(lengths)) > 2 and max(lengths) == 12) or name == "wide beam"
    for row in range(len(memory)):
        alone = method(toy, memory[row : row + 1], max_words=12)
        same(Decoded(*(part[row : row + 1] for part in together)), alone)
        place = order.index(row)
        same(Decoded(*(part[place : place + 1] for part in shuffled)), alone)


@every_method
def test_an_ensemble_of_a_model_with_itself_equals_the_model(method):
    toy, memory = Toy(words=6), mixed()
    same(
        method(Ensemble([toy, toy]), (memory, memory), max_words=8),
        method(toy, memory, max_words=8),
    )


@every_method
def test_an_ensemble_uses_the_mean_of_its_probabilities(method):
    toys = [Toy(words=6), Toy(words=6, seed=5)]
    memory = (mixed(), images(len(mixed()), seed=9))
    decoded = method(Ensemble(toys), memory, max_words=6)
    for row, (captions, scores) in enumerate(
        zip(to_captions(decoded), decoded.log_prob, strict=True)
    ):
        alone = tuple(part[row : row + 1] for part in memory)
        assert float(scores[0]) == pytest.approx(rescored_by_hand(toys, alone, captions[0]))


def rescored_by_hand(toys, memory, caption) -> float:
    """Return the log-probability of a caption by the mean of two models' probabilities."""
    states = [toy.start(part) for toy, part in zip(toys, memory, strict=True)]
    total = 0.0
    for before, word in zip((START, *caption), (*caption, END), strict=True):
        mean = 0.0
        for number, toy in enumerate(toys):
            log_probs, states[number] = toy.step(torch.tensor([[before]]), states[number])
            mean += float(log_probs[0, 0, word].exp()) / len(toys)
        total += math.log(mean)
    return total


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
@every_method
def test_models_of_any_floating_point_type_can_be_decoded(method, dtype):
    memory = images()
    decoded = method(Toy(words=6), memory.to(dtype), max_words=5)
    assert decoded.log_prob.dtype == torch.float32 and decoded.tokens.dtype == torch.int64
    if dtype == torch.float64:
        same(decoded, method(Toy(words=6), memory, max_words=5))


# ---- the n best, and when to stop ------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_n_best_differ_and_are_sorted(penalty):
    decoded = beam_search(
        Toy(words=8), images(), max_words=8, beam_size=6, n=6, length_penalty=penalty
    )
    for captions, scores in zip(to_captions(decoded), decoded.log_prob.tolist(), strict=True):
        assert len(set(captions)) == len(captions) == 6
        values = [
            score / (len(each) + 1) ** penalty for each, score in zip(captions, scores, strict=True)
        ]
        assert values == sorted(values, reverse=True)


def test_fewer_captions_of_a_beam_are_the_first_ones():
    toy, memory = Toy(words=8), images()
    settings = {"max_words": 8, "beam_size": 6}
    five = beam_search(toy, memory, n=5, **settings)
    one = beam_search(toy, memory, n=1, **settings)
    same(one, Decoded(five.tokens[:, :1], five.log_prob[:, :1]))


@pytest.mark.parametrize(
    ("penalty", "best", "score", "stops"),
    [
        # The best beam has 2 words, a caption at most 8: its score may become best / 8 ** penalty.
        (1.0, -4.0, -0.6, False),  # -4 / 8 is better than -0.6, though -4 / 3 is not
        (1.0, -4.0, -0.5, True),  # no better than what is complete already
        (1.0, -4.0, -0.4, True),
        (0.0, -4.0, -4.1, False),
        (0.0, -4.0, -4.0, True),
        (-1.0, -4.0, -12.5, False),  # the next word, which is the third, would give -12
        (-1.0, -4.0, -12.0, True),
    ],
)
def test_a_search_stops_when_no_length_could_make_its_best_beam_win(penalty, best, score, stops):
    # The second score, of a worse caption, is out of reach of the rule for K complete captions.
    scores = torch.tensor([[score, -99.0]])
    found = decoding.can_stop(torch.tensor([best]), scores, 1, 2, 8, penalty)
    assert found.tolist() == [stops]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_search_stops_early_when_its_captions_are_complete(penalty):
    toy = Toy(words=6, bias={END: 8.0})
    beam_search(toy, images(), max_words=60, beam_size=4, length_penalty=penalty)
    assert len(toy.rows) < 5
