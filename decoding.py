"""Choosing the words: greedy, sampling and beam search over anything that can `start` and `step`.

B images · K beams · V vocabulary · T words (the end token counts as one)

No model is known here. A decoder gives two functions: `start(memory)` returns a `State`, and
`step(token, state)` takes the last words (B, K) and returns log-probabilities (B, K, V) with the
next state. Images whose captions are complete leave the batch, so the work shrinks as it goes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from util.files import UserError
from util.results import Caption
from util.seeding import derive_seed
from vocabulary import END, PAD, START, UNK

NEVER = (PAD, START, UNK)
# An end that the model holds impossible is given this log-probability where nothing else may be
# said: low enough to lose against anything, finite so that sums of it keep their order.
LAST_RESORT = -1e4


class State(NamedTuple):
    """What a decoder remembers between two words.

    `image` tensors (B, …) belong to an image and are shared by its beams; `beam` tensors
    (B, K, …) belong to one beam. `attention` (B, K, S) is where the last word looked, or None.
    """

    image: tuple[Tensor, ...]
    beam: tuple[Tensor, ...]
    attention: Tensor | None = None

    def keep_images(self, index: Tensor) -> "State":
        """Return the state of the images in `index` (b,) alone."""

        def kept(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index)

        attention = None if self.attention is None else kept(self.attention)
        return State(tuple(map(kept, self.image)), tuple(map(kept, self.beam)), attention)

    def reorder(self, parents: Tensor) -> "State":
        """Return the state in which beam k of an image continues its old beam `parents` (B, K)."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]

        def chosen(tensor: Tensor) -> Tensor:
            # Rows of beams by one index: several times faster than tensor[rows, parents].
            flat = (rows * tensor.shape[1] + parents).flatten()
            return tensor.flatten(0, 1).index_select(0, flat).unflatten(0, parents.shape)

        attention = None if self.attention is None else chosen(self.attention)
        return State(self.image, tuple(map(chosen, self.beam)), attention)


class EnsembleState(NamedTuple):
    """The states of several decoders that write one caption together."""

    states: tuple[State, ...]

    def keep_images(self, index: Tensor) -> "EnsembleState":
        """Return the states of the images in `index` (b,) alone."""
        return EnsembleState(tuple(state.keep_images(index) for state in self.states))

    def reorder(self, parents: Tensor) -> "EnsembleState":
        """Return the states with beams reordered by `parents` (B, K)."""
        return EnsembleState(tuple(state.reorder(parents) for state in self.states))


class Ensemble:
    """Several decoders as one: each next word has the mean of the probabilities they give it.

    They may be of any kinds, but of one vocabulary. `memory` is a tuple of their memories.
    """

    def __init__(self, decoders: Sequence["StepDecoder"]):
        self.decoders = decoders

    def start(self, memory: tuple[Tensor, ...]) -> EnsembleState:
        """Return the decoders' states before the first word."""
        pairs = zip(self.decoders, memory, strict=True)
        return EnsembleState(tuple(decoder.start(one) for decoder, one in pairs))

    def step(self, token: Tensor, state: EnsembleState) -> tuple[Tensor, EnsembleState]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next states."""
        pairs = zip(self.decoders, state.states, strict=True)
        log_probs, states = zip(*(decoder.step(token, one) for decoder, one in pairs), strict=True)
        mean = torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))
        return mean, EnsembleState(states)


class StepDecoder(Protocol):
    """What decoding asks of a model."""

    def start(self, memory: Any) -> State: ...
    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]: ...


class Decoded(NamedTuple):
    """Captions, the best of an image first.

    `tokens` (B, n, T) without the start token, with the end token, then padding; `log_prob`
    (B, n) is the model's own natural-log probability of the caption, end token included. Where
    fewer than n captions are possible, the rest is padding with minus infinity.
    """

    tokens: Tensor
    log_prob: Tensor


@torch.no_grad()
def greedy(
    decoder: StepDecoder,
    memory: Any,
    *,
    max_words: int,
    min_words: int = 1,
    no_repeat_ngram: int = 0,
) -> Decoded:
    """Return one caption an image (B, 1, T): the most probable word each time.

    `max_words` and `min_words` bound a caption's words (the end token is not one);
    `no_repeat_ngram` forbids any run of that many words to come twice (0: off). A caption with no
    word left to say ends, though it be too short. Raises ValueError on bounds out of range.
    """

    def most_probable(log_probs: Tensor) -> tuple[Tensor, Tensor]:
        return log_probs.max(-1)

    return _roll(decoder, memory, 1, most_probable, max_words, min_words, no_repeat_ngram)


@torch.no_grad()
def sample(
    decoder: StepDecoder,
    memory: Any,
    *,
    max_words: int,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_words: int = 1,
    no_repeat_ngram: int = 0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Return `n` captions an image (B, n, T) drawn word by word, in the order drawn.

    `top_k` keeps the k most probable words (0: all), `top_p` the fewest words whose probabilities
    reach that sum (nucleus sampling, arXiv 1904.09751), both of the tempered distribution.
    `log_prob` stays the model's own; the bounds are `greedy`'s. Raises ValueError on a setting out
    of range.
    """
    if not 0 < temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(
            f"temperature {temperature} must be above 0 and top-p {top_p} in (0, 1]; "
            "use the greedy method for the most probable words"
        )
    if n < 1 or top_k < 0:
        raise UserError(f"n {n} must be at least 1 and top-k {top_k} at least 0 (0: all words)")

    def draw(log_probs: Tensor) -> tuple[Tensor, Tensor]:
        # The best at 0, so that no temperature sends all of them to minus infinity.
        logits = (log_probs - log_probs.amax(-1, keepdim=True)) / temperature
        logits = filter_words(logits, top_k, top_p)
        words = draw_words(logits.softmax(-1), generator)
        return log_probs.gather(-1, words)[..., 0], words[..., 0]

    return _roll(decoder, memory, n, draw, max_words, min_words, no_repeat_ngram)


def draw_words(probability: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return one word (…, 1) by each distribution (…, V), never one of probability 0.

    One random number a distribution; `torch.multinomial` draws V, which takes longer than a
    decoder's step.
    """
    reached = probability.cumsum(-1)
    chance = torch.rand(
        (*probability.shape[:-1], 1), generator=generator, device=probability.device
    )
    # The first word that goes beyond: an impossible one adds nothing, and so is never it. Rounding
    # must not bring the largest chance to the sum of all.
    place = chance * (1 - 2**-22) * reached[..., -1:]
    # Where a broken model's probabilities are NaN, a word all the same: `log_prob` will tell.
    return torch.searchsorted(reached, place, right=True).clamp(max=probability.shape[-1] - 1)


def filter_words(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return `logits` (…, V) with words outside the top k and the top-p nucleus at -infinity.

    The nucleus is that of the k words left. Of equal words as many stay as are wanted, no more.
    """
    if 0 < top_k < logits.shape[-1]:
        best, where = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, where, best)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= top_p  # the first is always inside
        logits = logits.scatter(-1, order, ordered.masked_fill(outside, -math.inf))
    return logits


def _roll(
    decoder: StepDecoder,
    memory: Any,
    n: int,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    max_words: int,
    min_words: int,
    no_repeat_ngram: int,
) -> Decoded:
    """Extend `n` independent captions an image by `choose`, until all have ended.

    `choose` picks a word of log-probabilities (B, K, V), minus infinity where forbidden: it
    returns the words' log-probabilities (B, K) and the words (B, K).
    """
    _check(max_words, min_words, no_repeat_ngram)
    state = decoder.start(memory)
    images, device = _size(state)
    results = torch.full((images, n, max_words + 1), PAD, device=device)
    log_prob = torch.full((images, n), math.nan, device=device)  # stays so where none can end
    alive = torch.arange(images, device=device)  # which image each row of the batch is
    token = torch.full((images, 1), START, device=device)
    said = token[..., None][..., :0].expand(-1, n, -1)  # (B, K, 0)
    total = torch.zeros(images, n, device=device)
    ended = torch.zeros(images, n, dtype=torch.bool, device=device)
    for position in range(max_words + 1):
        log_probs, state = decoder.step(token, state)
        if position == 0 and n > 1:
            state = state.reorder(torch.zeros(len(alive), n, dtype=torch.long, device=device))
            log_probs = log_probs.expand(-1, n, -1)  # (B, 1, V) -> (B, n, V)
        allowed = _allow(log_probs, said, position, max_words, min_words, no_repeat_ngram)
        gain, token = choose(allowed)
        if n > 1:  # of one caption an image, those that have ended are gone
            gain, token = gain.masked_fill(ended, 0), token.masked_fill(ended, PAD)
        total, ended = total + gain, ended | (token == END)
        said = torch.cat([said, token[..., None]], -1)
        done = ended.all(-1)
        if done.any():
            rows, leaving = (~done).nonzero()[:, 0], alive[done]
            results[leaving, :, : position + 1] = said[done]
            log_prob = log_prob.index_put((leaving,), total[done])
            if not len(rows):
                break
            alive, token, said, state = (
                alive[rows],
                token[rows],
                said[rows],
                state.keep_images(rows),
            )
            total, ended = total[rows], ended[rows]
    return Decoded(_trim(results), log_prob)


@torch.no_grad()
def beam_search(
    decoder: StepDecoder,
    memory: Any,
    *,
    max_words: int,
    beam_size: int = 5,
    n: int = 1,
    length_penalty: float = 0.0,
    min_words: int = 1,
    no_repeat_ngram: int = 0,
) -> Decoded:
    """Return the `n` best captions an image (B, n, T) found with `beam_size` beams.

    Captions are ranked by log-probability / T ** `length_penalty`: 0 is the probability itself
    (short captions win), 1 the mean over the words. One beam is the greedy method, whatever the
    penalty. A caption of `max_words` words must end, so there is always one to return; the bounds
    are `greedy`'s. Raises ValueError on a setting out of range.
    """
    if not 1 <= n <= beam_size:
        raise UserError(f"n {n} must be between 1 and the beam size, {beam_size}")
    if beam_size == 1:
        # Below, an end is noted even where K words are likelier. That finds better captions (+0.003
        # CIDEr on 500 images of Flickr8k), but with one beam it would not be greedy.
        return greedy(
            decoder,
            memory,
            max_words=max_words,
            min_words=min_words,
            no_repeat_ngram=no_repeat_ngram,
        )
    _check(max_words, min_words, no_repeat_ngram)
    state = decoder.start(memory)
    images, device = _size(state)
    results = Decoded(
        torch.full((images, n, max_words + 1), PAD, device=device),
        torch.full((images, n), -math.inf, device=device),
    )
    alive = torch.arange(images, device=device)  # which image each row of the batch is
    token = torch.full((images, 1), START, device=device)
    said = token[..., None][..., :0]  # (B, K, 0): the words of the growing beams
    total = torch.zeros(images, 1, device=device)
    ended = _Ended.none(images, beam_size, max_words + 1, device)
    for position in range(max_words + 1):
        log_probs, state = decoder.step(token, state)
        allowed = _allow(log_probs, said, position, max_words, min_words, no_repeat_ngram)
        width = allowed.shape[-1]
        candidates = (total[..., None] + allowed).flatten(1)  # (B, K*V)
        # Of 2K candidates at most K end, so at least K go on.
        best, where = candidates.topk(min(2 * beam_size, candidates.shape[1]), dim=1)
        parents, words = where // width, where % width
        rows = torch.arange(len(alive), device=device)[:, None]
        grown = torch.cat([said[rows, parents], words[..., None]], dim=-1)
        ends = words == END
        length = position + 1
        ended = ended.add(grown, best.masked_fill(~ends, -math.inf), length, length_penalty)

        total, chosen = best.masked_fill(ends, -math.inf).topk(min(beam_size, best.shape[1]), dim=1)
        hopeless = _hopeless(total[:, 0], ended.score, n, length, max_words + 1, length_penalty)
        done = hopeless | (position == max_words)
        if done.any():
            leaving = alive[done]
            results.tokens[leaving] = ended.tokens[done, :n]
            results.log_prob[leaving] = ended.log_prob[done, :n]
            rows = (~done).nonzero()[:, 0]
            if not len(rows):
                break
            alive, state, ended = alive[rows], state.keep_images(rows), ended.keep(rows)
            total, chosen, parents, grown = total[rows], chosen[rows], parents[rows], grown[rows]
        rows = torch.arange(len(alive), device=device)[:, None]
        said, token = grown[rows, chosen], grown[rows, chosen][..., -1]
        state = state.reorder(parents.gather(1, chosen))
    missing = results.log_prob[..., None] == -math.inf
    return Decoded(_trim(results.tokens.masked_fill(missing, PAD)), results.log_prob)


def _hopeless(
    best: Tensor, scores: Tensor, n: int, length: int, longest: int, penalty: float
) -> Tensor:
    """Return for each image (B,) whether its search may stop.

    `best` (B,) is the log-probability of the best growing beam, of `length` words, minus infinity
    where none grows; `scores` (B, K) are the complete captions', best first.
    """
    # A beam's log-probability can only fall. With a penalty its score may still rise, to this:
    bound = torch.maximum(best / longest**penalty, best / (length + 1) ** penalty)
    beaten = bound <= scores[:, n - 1]
    # Waiting for that takes a third longer and gives no better captions (Flickr8k, K = 5, penalty
    # 0.7), so K captions suffice that all beat the best beam as it is now.
    return beaten | (best / length**penalty <= scores[:, -1])


class _Ended(NamedTuple):
    """The best complete captions of each image, best first: (B, K, T), (B, K), (B, K)."""

    tokens: Tensor
    log_prob: Tensor
    score: Tensor

    @classmethod
    def none(cls, images: int, beams: int, length: int, device: torch.device) -> "_Ended":
        missing = torch.full((images, beams), -math.inf, device=device)
        tokens = torch.full((images, beams, length), PAD, device=device)
        return cls(tokens, missing, missing.clone())

    def add(self, tokens: Tensor, log_prob: Tensor, length: int, penalty: float) -> "_Ended":
        """Return the list with `tokens` (B, N, length) merged in; minus infinity is no caption."""
        padding = self.tokens.shape[-1] - length
        tokens = torch.nn.functional.pad(tokens, (0, padding), value=PAD)
        score, order = torch.cat([self.score, log_prob / length**penalty], 1).topk(
            self.score.shape[1], dim=1
        )
        rows = torch.arange(len(order), device=order.device)[:, None]
        return _Ended(
            torch.cat([self.tokens, tokens], 1)[rows, order],
            torch.cat([self.log_prob, log_prob], 1)[rows, order],
            score,
        )

    def keep(self, rows: Tensor) -> "_Ended":
        return _Ended(*(tensor[rows] for tensor in self))


def _allow(
    log_probs: Tensor,
    said: Tensor,
    position: int,
    max_words: int,
    min_words: int,
    no_repeat_ngram: int,
) -> Tensor:
    """Return `log_probs` (B, K, V) with the words that may not come next at minus infinity."""
    only_end, no_end = position >= max_words, position < min_words
    allowed = log_probs.float() + _forbidden(
        log_probs.shape[-1], only_end, no_end, log_probs.device
    )
    if no_repeat_ngram and position >= no_repeat_ngram:
        # Windows of n words whose first n - 1 are the last n - 1 said forbid their last word.
        windows = said.unfold(-1, no_repeat_ngram, 1)  # (B, K, windows, n)
        suffix = said[..., None, position - no_repeat_ngram + 1 :]
        repeats = (windows[..., :-1] == suffix).all(-1)
        ceiling = torch.full_like(repeats, math.inf, dtype=allowed.dtype)
        ceiling = ceiling.masked_fill(repeats, -math.inf)
        allowed = allowed.scatter_reduce(-1, windows[..., -1], ceiling, "amin")
    # Where no word is left, the caption ends.
    stuck = allowed.amax(-1) == -math.inf
    end = log_probs[..., END].float().clamp(min=LAST_RESORT)
    allowed[..., END] = torch.where(stuck, end, allowed[..., END])
    return allowed


def bounded(logits: Tensor, max_words: int, min_words: int = 1) -> Tensor:
    """Return `logits` (M, T, V) of captions, word by word, as decoding's bounds leave them.

    A word that decoding would never choose is at minus infinity. Self-critical training needs
    this: it would else learn to give captions it regrets the probability of <unk>, which is never
    drawn and so never regretted.
    """
    _, length, words = logits.shape
    never = [
        _forbidden(words, place >= max_words, place < min_words, logits.device)
        for place in range(length)
    ]
    return logits.float() + torch.stack(never)


@functools.lru_cache(maxsize=64)
def _forbidden(words: int, only_end: bool, no_end: bool, device: torch.device) -> Tensor:
    """Return (V,) to add to log-probabilities: minus infinity where a word may not come."""
    forbidden = torch.zeros(words)
    if only_end:
        forbidden[:] = -math.inf
        forbidden[END] = 0
    forbidden[list(NEVER)] = -math.inf
    if no_end:
        forbidden[END] = -math.inf
    return forbidden.to(device)


def _check(max_words: int, min_words: int, no_repeat_ngram: int) -> None:
    """Raise ValueError where the bounds of a caption are out of range."""
    if not 1 <= min_words <= max_words:
        raise UserError(f"min words {min_words} must be between 1 and max words, {max_words}")
    if no_repeat_ngram < 0:
        raise UserError(f"no-repeat n-gram {no_repeat_ngram} must be at least 0 (0: off)")


def _size(state: State | EnsembleState) -> tuple[int, torch.device]:
    if isinstance(state, EnsembleState):
        return _size(state.states[0])
    first = (*state.image, *state.beam)[0]
    return len(first), first.device


def _trim(tokens: Tensor) -> Tensor:
    """Return `tokens` (B, n, T) without the columns at the end that are all padding."""
    used = int((tokens != PAD).any(0).any(0).sum())
    return tokens[..., : max(1, used)]


MOST_BEAMS = 1000  # of one image, which bounds the memory it takes
MOST_PENALTY = 100  # a caption's length to this power is still a number

Memory = Tensor | tuple[Tensor, ...]  # of one model, or one of each of an ensemble's


@dataclass(frozen=True)
class DecodingConfig:
    """How the words are chosen."""

    method: "Literal[tuple(METHODS)]" = "beam"  # as text: the table is further down
    """Beam search, the most probable word each time, or words drawn by chance."""
    beam_size: int = 5
    """Beams K of beam search."""
    length_penalty: float = 0.7
    """Beam search ranks by log-probability / length to this power (0: short captions win)."""
    no_repeat_ngram: int = 0
    """Forbid any run of this many words to come twice (0: off)."""
    max_words: int | None = None
    """Longest caption in words (default: what the model was trained for)."""
    temperature: float = 1.0
    """Sampling: below 1 plays safe, above 1 takes chances."""
    top_k: int = 0
    """Sampling: draw from the k most probable words (0: all)."""
    top_p: float = 1.0
    """Sampling: draw from the fewest words that hold this share of the probability."""
    seed: int = 0
    """Sampling: the same seed gives an image the same captions."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(f"method {self.method!r} is not known; choose from {known}")
        least = {"beam_size": 1, "no_repeat_ngram": 0, "max_words": 1, "top_k": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name.replace('_', ' ')} {value} must be at least {low}")
        if self.beam_size > MOST_BEAMS:
            raise UserError(f"beam size {self.beam_size} must be at most {MOST_BEAMS:,}")
        if not -MOST_PENALTY <= self.length_penalty <= MOST_PENALTY:
            raise UserError(
                f"length penalty {self.length_penalty} must be between -{MOST_PENALTY} and "
                f"{MOST_PENALTY}"
            )


def decode(
    model: Any,
    memory: Memory,
    config: DecodingConfig,
    n: int = 1,
    keys: Sequence[int] | None = None,
) -> Decoded:
    """Return `n` captions an image as tokens (B, n, T), decoded from what the model remembers.

    `keys` (one an image; default: the places in the batch) are what sampling derives an image's
    chance from, beside the seed. Raises ValueError for more words than the model has positions
    for, and for more than one greedy caption.
    """
    longest = model.config.seq_len
    max_words = longest if config.max_words is None else config.max_words
    if max_words > longest:
        raise UserError(f"max words {max_words} must be between 1 and the model's {longest}")
    if n < 1:
        raise UserError(f"n {n} must be at least 1: the number of captions an image")
    if n > MOST_BEAMS:
        raise UserError(f"n {n} must be at most {MOST_BEAMS:,}")
    config = replace(config, max_words=max_words)
    if keys is None:
        keys = range(len(memory if isinstance(memory, Tensor) else memory[0]))
    return METHODS[config.method](model.decoder, memory, config, n, keys)


# --- the methods: n captions an image, config.max_words being said


def decode_beam(
    decoder: StepDecoder, memory: Memory, config: DecodingConfig, n: int, keys: Sequence[int]
) -> Decoded:
    """Return the `n` best captions of beam search, which widens to `n` beams."""
    width, penalty = max(config.beam_size, n), config.length_penalty
    return beam_search(
        decoder, memory, beam_size=width, n=n, length_penalty=penalty, **limits(config)
    )


def decode_greedy(
    decoder: StepDecoder, memory: Memory, config: DecodingConfig, n: int, keys: Sequence[int]
) -> Decoded:
    """Return the caption of the most probable word each time; ValueError for more than one."""
    if n > 1:
        raise UserError("the greedy method has one caption an image; use beam or sample")
    return greedy(decoder, memory, **limits(config))


def decode_sample(
    decoder: StepDecoder, memory: Memory, config: DecodingConfig, n: int, keys: Sequence[int]
) -> Decoded:
    """Return `n` captions drawn by chance, each image's from its own of `keys` and the seed."""
    chances = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    device = (memory if isinstance(memory, Tensor) else memory[0]).device
    # One image at a time, each with a generator of its own: its words are then the same whatever
    # else is in the batch.
    drawn = [
        sample(
            decoder,
            one_image(memory, row),
            n=n,
            generator=torch.Generator(device).manual_seed(derive_seed(config.seed, key)),
            **chances,
            **limits(config),
        )
        for row, key in enumerate(keys)
    ]
    return together(drawn)


METHODS: dict[str, Callable[..., Decoded]] = {
    "beam": decode_beam,
    "greedy": decode_greedy,
    "sample": decode_sample,
}


def limits(config: DecodingConfig) -> dict[str, int | None]:
    """Return the bounds that all methods keep to."""
    return {"max_words": config.max_words, "no_repeat_ngram": config.no_repeat_ngram}


def one_image(memory: Memory, row: int) -> Memory:
    """Return the memory of one image of the batch, itself a batch of one."""
    if isinstance(memory, Tensor):
        return memory[row : row + 1]
    return tuple(part[row : row + 1] for part in memory)


def together(parts: Sequence[Decoded]) -> Decoded:
    """Return the captions of several batches as one: (B, n, T), T the longest of any."""
    length = max(part.tokens.shape[-1] for part in parts)
    tokens = [
        torch.nn.functional.pad(part.tokens, (0, length - part.tokens.shape[-1]), value=PAD)
        for part in parts
    ]
    return Decoded(torch.cat(tokens), torch.cat([part.log_prob for part in parts]))


def to_captions(model: Any, decoded: Decoded) -> list[list[Caption]]:
    """Return the captions of each image as text; fewer than n where no more are possible.

    Raises ValueError where the model gave no probability (NaN).
    """
    if decoded.log_prob.isnan().any():
        raise UserError(
            "the model's probabilities are NaN: its weights are damaged, or too large for these "
            "pictures"
        )
    return [
        [
            Caption(model.vocabulary.decode(tokens), log_prob)
            for tokens, log_prob in zip(rows, scores.tolist(), strict=True)
            if log_prob != -math.inf
        ]
        for rows, scores in zip(decoded.tokens.cpu(), decoded.log_prob.cpu(), strict=True)
    ]
