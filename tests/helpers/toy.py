"""A toy decoder, every decoding method, and functions that check their captions.

B images · V vocabulary · D width of the toy
"""

import pytest
import torch

from decoding import Decoded, State, beam_search, greedy, sample
from vocabulary import END, PAD, START

WIDTH, MAX_WORDS = 8, 4
SPECIALS = 4


class Toy:
    """A random recurrent network: the next word depends on the image and on all words so far.

    `bias` maps words to what is added to their logits. The last number of an image's memory
    (D + 1,) is added to the logit of the end token, so that images can have captions of very
    different lengths.
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
        self.rows: list[int] = []  # number of images in each step

    def start(self, memory):
        hidden = torch.zeros(len(memory), 1, WIDTH, dtype=memory.dtype)
        return State((memory,), (hidden,))

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
        return logits.log_softmax(-1), State(state.image, (hidden,))


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


def to_captions(decoded: Decoded) -> list[list[tuple]]:
    """Return the words of each caption, checking that it has one end token, then padding."""
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


def repeats(caption: tuple, ngram: int) -> bool:
    windows = [caption[at : at + ngram] for at in range(len(caption) - ngram + 1)]
    return len(set(windows)) < len(windows)


def same(decoded: Decoded, other: Decoded) -> None:
    assert to_captions(decoded) == to_captions(other)
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
DETERMINISTIC = [name for name in METHODS if not name.startswith("sample")]
