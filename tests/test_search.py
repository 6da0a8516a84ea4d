"""What a search finds, against the list of all captions and against itself on other ways.

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
)

import decoding
from decoding import Decoded, Ensemble, State, beam_search, greedy, to_captions
from vocabulary import END, PAD, START, UNK

PENALTIES = (0.0, 0.7, 1.0)


# ---- brute force -----------------------------------------------------------------------------


def every_caption(toy, memory, longest: int = MAX_WORDS, least: int = 1) -> dict[tuple, float]:
    """Return every caption there is with its log-probability, for one image."""
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
    # Saying a word again is likely here, so that blocking has something to block.
    toy, memory = Toy(seed=5, bias={SPECIALS: 3.0}), images(3)
    settings = {"max_words": 5, "min_words": 3, "beam_size": 400, "length_penalty": penalty}
    free = to_captions(beam_search(toy, memory, **settings))
    blocked = to_captions(beam_search(toy, memory, no_repeat_ngram=ngram, **settings))
    for row, (found,) in enumerate(blocked):
        captions = every_caption(toy, memory[row : row + 1], 5, 3)
        allowed = {each: value for each, value in captions.items() if not repeats(each, ngram)}
        assert found == ranked(allowed, penalty)[0]
    assert ngram == 3 or free != blocked


def narrow(toy, memory, beam_size: int, longest: int) -> dict[tuple, float]:
    """Return the captions that a beam meets, for one image, by lists and loops.

    Of the 2K likeliest ways on, those that end are captions and K of the others go on.
    """
    found, growing = {}, [((), 0.0)]
    for length in range(longest + 1):
        ways = []
        for caption, total in growing:
            state = toy.start(memory)
            for before in (START, *caption):
                log_probs, state = toy.step(torch.tensor([[before]]), state)
            for word in range(END, len(toy.bias)):
                allowed = word != UNK and (word == END) >= (length == longest)
                if allowed and (word != END or length):
                    ways.append(((*caption, word), total + float(log_probs[0, 0, word])))
        ways = sorted(ways, key=lambda way: -way[1])[: 2 * beam_size]
        found |= {caption[:-1]: total for caption, total in ways if caption[-1] == END}
        growing = [way for way in ways if way[0][-1] != END][:beam_size]
    return found


@pytest.mark.parametrize("beam_size", (2, 3, 5))
@pytest.mark.parametrize("end", (-2.0, 0.0, 2.0))
def test_a_narrow_beam_is_the_same_as_one_of_lists_and_loops(beam_size, end):
    toy, memory = Toy(words=6, seed=3), images(4, end=end)
    decoded = beam_search(toy, memory, max_words=6, beam_size=beam_size, n=beam_size)
    for row, found in enumerate(to_captions(decoded)):
        captions = narrow(toy, memory[row : row + 1], beam_size, 6)
        assert found == ranked(captions, 0)[:beam_size]


@pytest.mark.parametrize("beam_size", (2, 8, 9, 50))
def test_a_beam_may_be_larger_than_the_vocabulary(beam_size):
    """Of two words and up to two in a caption there are six captions, and no more are made up."""
    toy, memory = Toy(words=2), images()
    decoded = beam_search(toy, memory, max_words=2, beam_size=beam_size, n=beam_size)
    for row, captions in enumerate(to_captions(decoded)):
        assert len(captions) == min(6, beam_size) == len(set(captions))
        assert (decoded.log_prob[row, 6:] == -math.inf).all()
        assert (decoded.tokens[row, 6:] == PAD).all()
        if beam_size > 2:
            assert captions == ranked(every_caption(toy, memory[row : row + 1], 2), 0)


def test_samples_come_as_often_as_they_are_probable():
    toy, memory = Toy(), images(2)
    decoded = draw(toy, memory, max_words=2, n=8000)
    for row, found in enumerate(to_captions(decoded)):
        captions = every_caption(toy, memory[row : row + 1], 2)
        # Words that may not be said leave their share to the others, at each word anew.
        for first in range(SPECIALS, len(toy.bias)):
            share = sum(each[0] == first for each in found) / len(found)
            singles = [math.exp(first_word(toy, memory[row : row + 1], word)) for word in (4, 5, 6)]
            assert share == pytest.approx(singles[first - SPECIALS] / sum(singles), abs=0.02)
        assert set(found) <= set(captions)


def first_word(toy, memory, word) -> float:
    return float(toy.step(torch.tensor([[START]]), toy.start(memory))[0][0, 0, word])


@pytest.mark.parametrize("penalty", (0.0, -0.5))
@pytest.mark.parametrize("seed", range(4))
def test_stopping_early_changes_no_caption_where_longer_is_never_better(penalty, seed, monkeypatch):
    settings = {"max_words": 9, "beam_size": 4, "n": 2, "length_penalty": penalty}
    toy, memory = Toy(words=6, seed=seed), images(6)
    stopped = beam_search(toy, memory, **settings)
    worked = sum(toy.rows)
    monkeypatch.setattr(decoding, "_hopeless", lambda best, *_: torch.zeros_like(best).bool())
    toy.rows.clear()
    same(stopped, beam_search(toy, memory, **settings))
    assert worked < sum(toy.rows)


def test_a_long_caption_wins_where_its_mean_is_better_though_shorter_ones_are_complete():
    # After 4 and after 5 the caption ends or 5 follows, each with 1/2.
    table = torch.full((7, 7), 1e-9)
    table[START, 4] = 1.0
    table[(4, 4, 5, 5), (5, END, 5, END)] = 0.5

    class Table:
        def start(self, memory):
            return State((memory,), (torch.zeros(len(memory), 1),))

        def step(self, token, state):
            return table[token].log(), state

    def best(penalty):
        settings = {"max_words": 4, "beam_size": 2, "length_penalty": penalty}
        return to_captions(beam_search(Table(), torch.zeros(1, 1), **settings))[0][0]

    assert best(0) == best(0.7) == (4,)
    assert best(3) == (4, 5, 5, 5)


# ---- two ways, one answer --------------------------------------------------------------------


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
def test_sampling_without_chance_is_greedy(settings):
    toy, memory = Toy(words=9), images(8)
    expected = greedy(toy, memory, max_words=7)
    drawn = draw(toy, memory, max_words=7, n=2, **settings)
    for place in range(2):
        only = Decoded(drawn.tokens[:, place : place + 1], drawn.log_prob[:, place : place + 1])
        same(only, expected)


@every_method
@pytest.mark.parametrize("ngram", (0, 2))
def test_log_prob_is_that_of_the_tokens(method, ngram):
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


def test_the_words_of_a_caption_are_as_probable_by_any_method():
    """Sampling's captions are among the wide beam's, with the same log-probability."""
    toy, memory = Toy(), images()
    every = beam_search(toy, memory, max_words=3, beam_size=39, n=39)
    drawn = draw(toy, memory, max_words=3, n=20)
    for row, captions in enumerate(to_captions(drawn)):
        known = dict(zip(to_captions(every)[row], every.log_prob[row].tolist(), strict=True))
        for caption, log_prob in zip(captions, drawn.log_prob[row].tolist(), strict=True):
            assert known[caption] == pytest.approx(log_prob, abs=1e-5)


LENGTHS = (4.0, -30.0, 0.0, 30.0, -30.0, 1.0)  # from one word to as many as there may be


def mixed() -> torch.Tensor:
    memory = images(len(LENGTHS))
    memory[:, -1] = torch.tensor(LENGTHS)
    return memory


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_image_has_the_same_captions_alone_and_in_any_batch(name):
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
def test_an_ensemble_of_a_model_with_itself_is_the_model(method):
    toy, memory = Toy(words=6), mixed()
    same(
        method(Ensemble([toy, toy]), (memory, memory), max_words=8),
        method(toy, memory, max_words=8),
    )


@every_method
def test_an_ensemble_gives_each_word_the_mean_of_its_probabilities(method):
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
def test_any_floating_type_of_model_can_be_decoded(method, dtype):
    memory = images()
    decoded = method(Toy(words=6), memory.to(dtype), max_words=5)
    assert decoded.log_prob.dtype == torch.float32 and decoded.tokens.dtype == torch.int64
    if dtype == torch.float64:
        same(decoded, method(Toy(words=6), memory, max_words=5))


# ---- the n best, and when to stop ------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_n_best_differ_and_come_best_first(penalty):
    decoded = beam_search(
        Toy(words=8), images(), max_words=8, beam_size=6, n=6, length_penalty=penalty
    )
    for captions, scores in zip(to_captions(decoded), decoded.log_prob.tolist(), strict=True):
        assert len(set(captions)) == len(captions) == 6
        values = [
            score / (len(each) + 1) ** penalty for each, score in zip(captions, scores, strict=True)
        ]
        assert values == sorted(values, reverse=True)


def test_asking_for_fewer_captions_of_a_beam_gives_the_first_ones():
    toy, memory = Toy(words=8), images()
    settings = {"max_words": 8, "beam_size": 6}
    five = beam_search(toy, memory, n=5, **settings)
    one = beam_search(toy, memory, n=1, **settings)
    same(one, Decoded(five.tokens[:, :1], five.log_prob[:, :1]))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_search_stops_when_its_captions_are_complete_and_waits_for_no_miracle(penalty):
    toy = Toy(words=6, bias={END: 8.0})
    beam_search(toy, images(), max_words=60, beam_size=4, length_penalty=penalty)
    assert len(toy.rows) < 5
