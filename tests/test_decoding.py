"""Decoding against the list of all captions there are, and against itself on other ways.

B images · K beams · V vocabulary · T words (the end token counts as one) · D width of the toy
"""

import itertools
import math

import pytest
import torch

import decoding
from decoding import (
    END,
    PAD,
    START,
    UNK,
    Decoded,
    Ensemble,
    State,
    beam_search,
    filter_words,
    greedy,
    sample,
)

WIDTH, MAX_WORDS = 8, 4
SPECIALS = 4
PENALTIES = (0.0, 0.7, 1.0)


class Toy:
    """A random recurrent network: what comes next depends on the image and on all words so far.

    `bias` (V,) is added to every word's logit; the last number of an image's memory (D + 1,) to
    that of the end, so that images can have captions of very different lengths.
    """

    def __init__(self, words: int = 3, seed: int = 0, bias: dict[int, float] | None = None):
        generator = torch.Generator().manual_seed(seed)
        size = SPECIALS + words
        self.embedding = 2 * torch.randn(size, WIDTH, generator=generator)
        self.recur = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.out = torch.randn(WIDTH, size, generator=generator)
        self.bias = torch.zeros(size)
        for word, value in (bias or {}).items():
            self.bias[word] = value
        self.rows: list[int] = []  # how many images each step worked on

    def start(self, memory):
        hidden = torch.zeros(len(memory), 1, WIDTH, dtype=memory.dtype)
        return State((memory,), (hidden,), hidden)

    def step(self, token, state):
        (memory,), (hidden,) = state.image, state.beam
        self.rows.append(len(token))
        assert token.shape == hidden.shape[:2] and len(memory) == len(token)
        embedding, recur, out, bias = (
            each.to(memory.dtype) for each in (self.embedding, self.recur, self.out, self.bias)
        )
        hidden = torch.tanh(hidden @ recur + embedding[token] + memory[:, None, :-1])
        logits = hidden @ out + bias
        logits[..., END] += memory[:, -1:]
        return logits.log_softmax(-1), State(state.image, (hidden,), hidden)


def images(count: int = 5, seed: int = 7, end: float = 0.0) -> torch.Tensor:
    """Return memory (B, D + 1) of images that all differ."""
    memory = torch.randn(count, WIDTH + 1, generator=torch.Generator().manual_seed(seed))
    memory[:, -1] = end
    return memory


def rescored(toy, memory, caption) -> float:
    """Return the log-probability of one caption of one image (1, D + 1), word by word."""
    state, total = toy.start(memory), 0.0
    for before, word in zip((START, *caption), (*caption, END), strict=False):
        log_probs, state = toy.step(torch.tensor([[before]]), state)
        total += float(log_probs[0, 0, word])
    return total


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


def spoken(decoded: Decoded) -> list[list[tuple]]:
    """Return the captions' words, and check that each ends once and is padded after."""
    found = []
    for rows in decoded.tokens.tolist():
        found.append([])
        for row in rows:
            if END not in row:
                assert set(row) == {PAD}
                continue
            end = row.index(END)
            assert set(row[end + 1 :]) <= {PAD}
            found[-1].append(tuple(row[:end]))
    return found


def same(decoded: Decoded, other: Decoded) -> None:
    assert spoken(decoded) == spoken(other)
    torch.testing.assert_close(decoded.log_prob, other.log_prob, atol=1e-5, rtol=1e-5)


def draw(toy, memory, **settings) -> Decoded:
    return sample(toy, memory, generator=torch.Generator().manual_seed(3), **settings)


METHODS = {
    "greedy": greedy,
    "sample": draw,
    "samples": lambda *args, **settings: draw(*args, n=4, **settings),
    "beam of one": lambda *args, **settings: beam_search(*args, beam_size=1, **settings),
    "beam": lambda *args, **settings: beam_search(*args, beam_size=3, n=3, **settings),
    "beam, mean": lambda *args, **settings: beam_search(
        *args, beam_size=4, n=2, length_penalty=1, **settings
    ),
    "wide beam": lambda *args, **settings: beam_search(*args, beam_size=30, n=3, **settings),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


# ---- brute force -----------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", (*PENALTIES, -0.5))
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_captions_in_order(penalty, seed):
    toy, memory = Toy(seed=seed), images(seed=seed)
    decoded = beam_search(
        toy, memory, max_words=MAX_WORDS, beam_size=120, n=20, length_penalty=penalty
    )
    for row, found in enumerate(spoken(decoded)):
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
    free = spoken(beam_search(toy, memory, **settings))
    blocked = spoken(beam_search(toy, memory, no_repeat_ngram=ngram, **settings))
    for row, (found,) in enumerate(blocked):
        captions = every_caption(toy, memory[row : row + 1], 5, 3)
        allowed = {each: value for each, value in captions.items() if not repeats(each, ngram)}
        assert found == ranked(allowed, penalty)[0]
    assert ngram == 3 or free != blocked


def repeats(caption: tuple, ngram: int) -> bool:
    windows = [caption[at : at + ngram] for at in range(len(caption) - ngram + 1)]
    return len(set(windows)) < len(windows)


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
    for row, found in enumerate(spoken(decoded)):
        captions = narrow(toy, memory[row : row + 1], beam_size, 6)
        assert found == ranked(captions, 0)[:beam_size]


def test_samples_come_as_often_as_they_are_probable():
    toy, memory = Toy(), images(2)
    decoded = draw(toy, memory, max_words=2, n=8000)
    for row, found in enumerate(spoken(decoded)):
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
        return spoken(beam_search(Table(), torch.zeros(1, 1), **settings))[0][0]

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
    for row, captions in enumerate(spoken(decoded)):
        expected = [rescored(toy, memory[row : row + 1], each) for each in captions]
        torch.testing.assert_close(
            decoded.log_prob[row], torch.tensor(expected), atol=1e-5, rtol=1e-5
        )


def test_log_prob_of_samples_is_the_models_own_at_any_temperature():
    toy, memory = Toy(words=6), images()
    decoded = draw(toy, memory, max_words=5, n=3, temperature=3.0, top_k=4, top_p=0.9)
    for row, captions in enumerate(spoken(decoded)):
        expected = [rescored(toy, memory[row : row + 1], each) for each in captions]
        torch.testing.assert_close(
            decoded.log_prob[row], torch.tensor(expected), atol=1e-5, rtol=1e-5
        )


def test_the_words_of_a_caption_are_as_probable_by_any_method():
    """Sampling's captions are among the wide beam's, with the same log-probability."""
    toy, memory = Toy(), images()
    every = beam_search(toy, memory, max_words=3, beam_size=39, n=39)
    drawn = draw(toy, memory, max_words=3, n=20)
    for row, captions in enumerate(spoken(drawn)):
        known = dict(zip(spoken(every)[row], every.log_prob[row].tolist(), strict=True))
        for caption, log_prob in zip(captions, drawn.log_prob[row].tolist(), strict=True):
            assert known[caption] == pytest.approx(log_prob, abs=1e-5)


LENGTHS = (4.0, -30.0, 0.0, 30.0, -30.0, 1.0)  # from one word to as many as there may be


def mixed() -> torch.Tensor:
    memory = images(len(LENGTHS))
    memory[:, -1] = torch.tensor(LENGTHS)
    return memory


DETERMINISTIC = [name for name in METHODS if not name.startswith("sample")]


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


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_image_has_the_same_captions_alone_and_in_any_batch(name):
    method, toy, memory = METHODS[name], Toy(words=6, seed=1), mixed()
    together = method(toy, memory, max_words=12)
    order = [4, 2, 0, 5, 3, 1]
    shuffled = method(toy, memory[order], max_words=12)
    lengths = [len(each[0]) for each in spoken(together)]
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
    for row, (captions, scores) in enumerate(zip(spoken(decoded), decoded.log_prob, strict=True)):
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
    for captions, scores in zip(spoken(decoded), decoded.log_prob.tolist(), strict=True):
        assert captions and len(captions) == sum(score > -math.inf for score in scores)
        for caption in captions:
            assert 1 <= len(caption) <= 5 and min(caption) >= SPECIALS
            assert not (ngram and repeats(caption, ngram))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_captions_that_cannot_end_are_cut_at_the_longest(name):
    end = -math.inf
    for captions in spoken(METHODS[name](Toy(bias={END: end}), images(), max_words=6)):
        assert [len(each) for each in captions] == [6] * len(captions)


@every_method
def test_captions_have_at_least_the_words_asked_for(method):
    decoded = method(Toy(bias={END: 5.0}), images(), max_words=6, min_words=4)
    assert {len(each) for captions in spoken(decoded) for each in captions} <= {4, 5, 6}


@every_method
def test_a_caption_with_no_word_left_ends_though_it_be_too_short(method):
    decoded = method(Toy(words=2), images(), max_words=6, min_words=5, no_repeat_ngram=1)
    assert decoded.log_prob.isfinite()[:, 0].all()
    assert all(set(each[0]) == {4, 5} and len(each[0]) == 2 for each in spoken(decoded))


@pytest.mark.parametrize("beam_size", (2, 8, 9, 50))
def test_a_beam_may_be_larger_than_the_vocabulary(beam_size):
    """Of two words and up to two in a caption there are six captions, and no more are made up."""
    toy, memory = Toy(words=2), images()
    decoded = beam_search(toy, memory, max_words=2, beam_size=beam_size, n=beam_size)
    for row, captions in enumerate(spoken(decoded)):
        assert len(captions) == min(6, beam_size) == len(set(captions))
        assert (decoded.log_prob[row, 6:] == -math.inf).all()
        assert (decoded.tokens[row, 6:] == PAD).all()
        if beam_size > 2:
            assert captions == ranked(every_caption(toy, memory[row : row + 1], 2), 0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_n_best_differ_and_come_best_first(penalty):
    decoded = beam_search(
        Toy(words=8), images(), max_words=8, beam_size=6, n=6, length_penalty=penalty
    )
    for captions, scores in zip(spoken(decoded), decoded.log_prob.tolist(), strict=True):
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


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_search_stops_when_its_captions_are_complete_and_waits_for_no_miracle(penalty):
    toy = Toy(words=6, bias={END: 8.0})
    beam_search(toy, images(), max_words=60, beam_size=4, length_penalty=penalty)
    assert len(toy.rows) < 5


def test_the_same_seed_draws_the_same_captions_and_another_seed_others():
    toy, memory = Toy(words=6), images()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return spoken(sample(toy, memory, max_words=6, n=5, generator=generator))

    assert drawn(1) == drawn(1) != drawn(2)


@every_method
def test_decoding_keeps_no_gradient(method):
    memory = images().requires_grad_()
    assert not method(Toy(), memory, max_words=3).log_prob.requires_grad


# ---- which words are left --------------------------------------------------------------------


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
