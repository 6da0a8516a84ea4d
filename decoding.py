"""Decoding: greedy, sampling and beam search with any decoder that has `start` and `step`.

B images · K beams · V vocabulary · T words (here the end token counts as one)

No model is known here. `start(memory)` returns a `State`; `step(token, state)` takes the last
words (B, K) and returns log-probabilities (B, K, V) and the next state. All images of a batch
advance together, and those whose captions are complete leave the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

# Before torch, which reads how its threads wait when it is loaded.
from util import threads  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from masks import Limits, mask_words
from util.files import UserError
from util.results import Caption
from util.seeding import derive_seed
from vocabulary import END, PAD, START, Vocabulary

MAX_BEAMS = 1000  # per image: their states and candidates take memory
MAX_PENALTY = 100  # larger powers of a caption's length overflow


class State(NamedTuple):
    """What a decoder carries from one word to the next.

    Tensors in `image` (B, ...) belong to an image and are shared by its beams; tensors in `beam`
    (B, K, ...) belong to one beam.
    """

    image: tuple[Tensor, ...]
    beam: tuple[Tensor, ...]

    def size(self) -> tuple[int, torch.device]:
        """Return the number of images B and the device."""
        first = (*self.image, *self.beam)[0]
        return len(first), first.device

    def keep_images(self, index: Tensor) -> "State":
        """Return the state of only the images in `index` (b,)."""
        image, beam = ([x.index_select(0, index) for x in part] for part in self)
        return State(tuple(image), tuple(beam))

    def reorder(self, parents: Tensor) -> "State":
        """Return the state in which beam k continues what was beam `parents[:, k]`, (B, K)."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]

        def select(tensor: Tensor) -> Tensor:
            # One flat index: several times faster than tensor[rows, parents].
            flat = (rows * tensor.shape[1] + parents).flatten()
            return tensor.flatten(0, 1).index_select(0, flat).unflatten(0, parents.shape)

        return State(self.image, tuple(map(select, self.beam)))


class StepDecoder(Protocol):
    """What decoding needs of a model; `memory` is the model's own representation of B images."""

    def start(self, memory: Any) -> State: ...
    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]: ...


class Decoded(NamedTuple):
    """n captions per image, in beam search the best first.

    `tokens` (B, n, T): words, the end token, then padding; no start token. `log_prob` (B, n): the
    model's natural-log probability of the caption, end token included. If fewer than n captions
    are possible, the rest are padding with log-probability minus infinity.
    """

    tokens: Tensor
    log_prob: Tensor


@torch.no_grad()
def greedy(
    decoder: StepDecoder, memory: Any, *,
    max_words: int, min_words: int = 1, no_repeat_ngram: int = 0,
) -> Decoded:  # fmt: skip
    """Return one caption per image (B, 1, T): at each step the most probable word.

    Captions have `min_words` to `max_words` words; no sequence of `no_repeat_ngram` words occurs
    twice (0: off). If no word is allowed, the caption ends, even with fewer words. Raises
    UserError if a limit is out of range.
    """
    limits = Limits(max_words, min_words, no_repeat_ngram)
    return generate(decoder, memory, 1, lambda log_probs, *_: log_probs.max(-1).indices, limits)


@torch.no_grad()
def sample(
    decoder: StepDecoder, memory: Any, *,
    max_words: int, n: int = 1, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_words: int = 1, no_repeat_ngram: int = 0,
    generator: torch.Generator | None = None, seeds: Sequence[int] | None = None,
) -> Decoded:  # fmt: skip
    """Return `n` captions per image (B, n, T), each word drawn from the model's distribution.

    `top_k` keeps the k most probable words (0: all) and `top_p` the fewest words whose
    probabilities sum up to at least p (nucleus sampling, arXiv 1904.09751), both after
    `temperature`. `log_prob` is still the model's own. Limits are those of `greedy`.

    With `seeds`, one per image, an image's captions depend on its seed alone, not on the other
    images of the batch; otherwise the numbers come from `generator` (default: torch's global one).
    Raises UserError if a setting is out of range.
    """
    if not 0 < temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(
            f"temperature {temperature} must be above 0 and top-p {top_p} in (0, 1]; "
            "use the greedy method for the most probable words"
        )
    if n < 1 or top_k < 0:
        raise UserError(f"n {n} must be at least 1 and top-k {top_k} at least 0 (0: all words)")
    limits = Limits(max_words, min_words, no_repeat_ngram)
    uniform = None
    if seeds is not None:  # drawn on the CPU, so that a GPU samples the same captions
        uniform = torch.empty(len(seeds), n, max_words + 1)
        for row, seed in zip(uniform, seeds, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(seed))

    def choose(log_probs: Tensor, alive: Tensor, position: int) -> Tensor:
        nonlocal uniform
        # With the maximum at 0, no temperature turns all logits into minus infinity.
        logits = (log_probs - log_probs.amax(-1, keepdim=True)) / temperature
        probs = filter_words(logits, top_k, top_p).softmax(-1)
        if uniform is None:
            numbers = torch.rand(probs.shape[:2], generator=generator, device=probs.device)
        else:
            uniform = uniform.to(probs.device)  # a copy in the first step only
            numbers = uniform[alive, :, position]
        return draw_words(probs, numbers)

    return generate(decoder, memory, n, choose, limits)


def draw_words(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return one word (B, K) of each distribution `probs` (B, K, V), by inverting its sum.

    `uniform` (B, K) are random numbers in [0, 1]; a word of probability 0 is never drawn. That is
    one number per word: `torch.multinomial` draws V of them, slower than a step of the decoder.
    """
    total = probs.cumsum(-1)
    # Below the total even for a number that was rounded up to 1.
    target = uniform[..., None] * (1 - 2**-22) * total[..., -1:]
    # `right`: the first word whose sum exceeds the target, and an impossible word adds nothing.
    words = torch.searchsorted(total, target, right=True)[..., 0]
    return words.clamp(max=probs.shape[-1] - 1)  # for NaN probabilities, which log_prob will show


def filter_words(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return `logits` (..., V), minus infinity outside the top k and the top-p nucleus of those.

    Of equally probable words only as many remain as needed.
    """
    if 0 < top_k < logits.shape[-1]:
        best, words = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, words, best)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # more probable words already reach p
        logits = logits.scatter(-1, order, ordered.masked_fill(outside, -math.inf))
    return logits


def generate(
    decoder: StepDecoder,
    memory: Any,
    n: int,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    limits: Limits,
) -> Decoded:
    """Return `n` independent captions per image (B, n, T), word by word as `choose` decides.

    `choose(log_probs, alive, position)` returns the next words (b, K) for log-probabilities
    (b, K, V), minus infinity where a word is not allowed; `alive` (b,) are the images still in the
    batch.
    """
    limits.check()
    state = decoder.start(memory)
    images, device = state.size()
    tokens = torch.full((images, n, limits.max_words + 1), PAD, device=device)
    log_prob = torch.full((images, n), math.nan, device=device)  # remains if the model gives NaN
    alive = torch.arange(images, device=device)  # the image of each row of the batch
    token = torch.full((images, 1), START, device=device)
    words = token.new_empty(images, n, 0)  # (b, n, t): the captions so far
    total = torch.zeros(images, n, device=device)
    ended = torch.zeros(images, n, dtype=torch.bool, device=device)
    for position in range(limits.max_words + 1):
        log_probs, state = decoder.step(token, state)
        if position == 0 and n > 1:  # all captions of an image share the first step
            state = state.reorder(token.new_zeros(len(alive), n))
            log_probs = log_probs.expand(-1, n, -1)
        log_probs = mask_words(log_probs, words, limits)
        token = choose(log_probs, alive, position)
        gain = log_probs.gather(-1, token[..., None])[..., 0]
        if n > 1:  # an ended caption waits for the others of its image
            gain, token = gain.masked_fill(ended, 0), token.masked_fill(ended, PAD)
        total, ended = total + gain, ended | (token == END)
        words = torch.cat([words, token[..., None]], -1)
        done = ended.all(-1)
        # Counted here, and nowhere else: each count, and each index by booleans, waits for a GPU.
        if len(leaving := done.nonzero()[:, 0]):
            gone = alive[leaving]
            tokens[gone, :, : position + 1] = words[leaving]
            log_prob[gone] = total[leaving]
            rows = (~done).nonzero()[:, 0]
            if not len(rows):
                break
            alive, token, words, total, ended = (
                x[rows] for x in (alive, token, words, total, ended)
            )
            state = state.keep_images(rows)
    return Decoded(trim(tokens), log_prob)


class Finished(NamedTuple):
    """The best complete captions of each image so far, best first; score minus infinity: none."""

    tokens: Tensor  # (B, K, T)
    log_prob: Tensor  # (B, K)
    score: Tensor  # (B, K): log_prob / length ** penalty

    def add(self, words: Tensor, log_prob: Tensor, penalty: float) -> "Finished":
        """Return the best of these and of `words` (B, J, t), minus infinity where not complete."""
        length = words.shape[-1]
        words = F.pad(words, (0, self.tokens.shape[-1] - length), value=PAD)
        scores = torch.cat([self.score, log_prob / length**penalty], 1)
        score, order = scores.topk(self.score.shape[1], dim=1)
        rows = torch.arange(len(order), device=order.device)[:, None]
        tokens = torch.cat([self.tokens, words], 1)[rows, order]
        return Finished(tokens, torch.cat([self.log_prob, log_prob], 1)[rows, order], score)


@torch.no_grad()
def beam_search(
    decoder: StepDecoder, memory: Any, *,
    max_words: int, beam_size: int = 5, n: int = 1, length_penalty: float = 0.0,
    min_words: int = 1, no_repeat_ngram: int = 0,
) -> Decoded:  # fmt: skip
    """Return the `n` best captions per image (B, n, T) that beam search with K beams finds.

    Captions are ranked by log-probability / T ** `length_penalty`: 0 is the probability itself,
    which favours short captions, 1 the mean per word. One beam is the greedy method, whatever the
    penalty. Limits are those of `greedy`. Raises UserError if a setting is out of range.
    """
    if not 1 <= n <= beam_size:
        raise UserError(f"n {n} must be between 1 and the beam size, {beam_size}")
    limits = Limits(max_words, min_words, no_repeat_ngram)
    if beam_size == 1:
        # Below, an end token counts even if K other words are more probable. That finds better
        # captions (+0.003 CIDEr on 500 images of Flickr8k), but with one beam is not greedy.
        return greedy(decoder, memory, **limits._asdict())
    limits.check()
    state = decoder.start(memory)
    images, device = state.size()
    tokens = torch.full((images, beam_size, max_words + 1), PAD, device=device)
    missing = torch.full((images, beam_size), -math.inf, device=device)
    finished = Finished(tokens, missing, missing)
    result = Decoded(tokens[:, :n].clone(), missing[:, :n].clone())
    alive = torch.arange(images, device=device)  # the image of each row of the batch
    token = torch.full((images, 1), START, device=device)
    words = token.new_empty(images, 1, 0)  # (b, K, t): the growing beams
    total = torch.zeros(images, 1, device=device)  # (b, K): their log-probabilities
    for length in range(1, max_words + 2):
        log_probs, state = decoder.step(token, state)
        log_probs = mask_words(log_probs, words, limits)
        candidates = (total[..., None] + log_probs).flatten(1)  # (b, K*V)
        # At most K of 2K candidates end (one per beam), so at least K can grow on.
        best, index = candidates.topk(min(2 * beam_size, candidates.shape[1]), dim=1)
        parents, token = index // log_probs.shape[-1], index % log_probs.shape[-1]
        rows = torch.arange(len(alive), device=device)[:, None]
        words = torch.cat([words[rows, parents], token[..., None]], dim=-1)  # (b, 2K, t+1)
        ends = token == END
        finished = finished.add(words, best.masked_fill(~ends, -math.inf), length_penalty)
        total, chosen = best.masked_fill(ends, -math.inf).topk(min(beam_size, best.shape[1]), dim=1)

        done = can_stop(total[:, 0], finished.score, n, length, max_words + 1, length_penalty)
        done |= length > max_words
        if len(leaving := done.nonzero()[:, 0]):
            result.tokens[alive[leaving]] = finished.tokens[leaving, :n]
            result.log_prob[alive[leaving]] = finished.log_prob[leaving, :n]
            rows = (~done).nonzero()[:, 0]
            if not len(rows):
                break
            state, finished = state.keep_images(rows), Finished(*(x[rows] for x in finished))
            alive, total, chosen, parents, words = (
                x[rows] for x in (alive, total, chosen, parents, words)
            )
        words = words.gather(1, chosen[..., None].expand(-1, -1, length))
        token = words[..., -1]
        state = state.reorder(parents.gather(1, chosen))
    missing = result.log_prob[..., None] == -math.inf
    return Decoded(trim(result.tokens.masked_fill(missing, PAD)), result.log_prob)


def can_stop(
    best: Tensor, scores: Tensor, n: int, length: int, longest: int, penalty: float
) -> Tensor:
    """Return (B,), True for images whose beams can no longer give one of the n best captions.

    `best` (B,) is the log-probability of the best growing beam, of `length` words (minus infinity:
    none grows); `scores` (B, K) are those of the complete captions, best first.
    """
    # A beam's log-probability can only fall, but its score may still rise with the length: of all
    # lengths the caption may end at, the shortest or the longest gives the highest score.
    bound = torch.maximum(best / longest**penalty, best / (length + 1) ** penalty)
    beaten = bound <= scores[:, n - 1]
    # Waiting for that takes a third longer and gives no better captions (Flickr8k, K = 5, penalty
    # 0.7): K complete captions that all beat the best beam as it is now are enough.
    return beaten | (best / length**penalty <= scores[:, -1])


def trim(tokens: Tensor) -> Tensor:
    """Return `tokens` (B, n, T) without the last columns if they are padding in every caption."""
    used = int((tokens != PAD).any(0).any(0).sum())
    return tokens[..., : max(1, used)]


@dataclass(frozen=True)
class DecodingConfig:
    """How the words are chosen."""

    method: "Literal[tuple(METHODS)]" = "beam"  # as text: the table is further down
    """Beam search, the most probable word at each step, or random sampling."""
    beam_size: int = 5
    """Beams K of beam search."""
    length_penalty: float = 0.7
    """Beam search ranks by log-probability / length to this power (0: short captions win)."""
    no_repeat_ngram: int | None = None
    """No sequence of this many words occurs twice in a caption (0: off; default: what the model's
    file asks for, else off)."""
    max_words: int | None = None
    """Longest caption in words (default: what the model was trained for)."""
    min_words: int = 1
    """Shortest caption in words."""
    temperature: float = 1.0
    """Sampling: below 1 prefers probable words, above 1 gives more variety."""
    top_k: int = 0
    """Sampling: only from the k most probable words (0: all)."""
    top_p: float = 1.0
    """Sampling: only from the fewest words that have this share of the probability."""
    seed: int = 0
    """Sampling: the same seed gives an image the same captions."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(f"method {self.method!r} is not known; choose from {known}")
        least = {"beam_size": 1, "no_repeat_ngram": 0, "max_words": 1, "min_words": 1, "top_k": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name.replace('_', ' ')} {value} must be at least {low}")
        if self.beam_size > MAX_BEAMS:
            raise UserError(f"beam size {self.beam_size} must be at most {MAX_BEAMS:,}")
        if not -MAX_PENALTY <= self.length_penalty <= MAX_PENALTY:
            raise UserError(
                f"length penalty {self.length_penalty} must be between -{MAX_PENALTY} and "
                f"{MAX_PENALTY}"
            )


def decode(
    decoder: StepDecoder, memory: Any, config: DecodingConfig, *,
    longest: int, no_repeat_ngram: int = 0, n: int = 1, seeds: Sequence[int] | None = None,
) -> Decoded:  # fmt: skip
    """Return `n` captions per image as tokens (B, n, T), by the method that `config` names.

    `longest` is the number of words that the model was built for (`seq_len`), `no_repeat_ngram`
    what it asks for where `config` does not say. `seeds`, one per
    image (default: 0, 1, ...), are combined with `config.seed` for sampling. Raises UserError if
    more words or captions are asked for than possible.
    """
    max_words = longest if config.max_words is None else config.max_words
    if max_words > longest:
        raise UserError(f"max words {max_words} must be between 1 and the model's {longest}")
    if n < 1:
        raise UserError(f"n {n} must be at least 1: the number of captions per image")
    if n > MAX_BEAMS:
        raise UserError(f"n {n} must be at most {MAX_BEAMS:,}")
    if config.no_repeat_ngram is None:
        config = replace(config, no_repeat_ngram=no_repeat_ngram)
    config = replace(config, max_words=max_words)
    return METHODS[config.method](decoder, memory, config, n, seeds)


# Each method returns n captions per image; the limits in `config` are numbers here, not None.


def decode_beam(decoder, memory, config, n, seeds) -> Decoded:
    """Return the `n` best captions of beam search, with at least `n` beams."""
    search = {"beam_size": max(config.beam_size, n), "length_penalty": config.length_penalty}
    return beam_search(decoder, memory, n=n, **search, **get_limits(config))


def decode_greedy(decoder, memory, config, n, seeds) -> Decoded:
    """Return the caption of the most probable words; raises UserError for more than one."""
    if n > 1:
        raise UserError("the greedy method has one caption per image; use beam or sample")
    return greedy(decoder, memory, **get_limits(config))


def decode_sample(decoder, memory, config, n, seeds) -> Decoded:
    """Return `n` sampled captions; an image's depend on its seed and `config.seed` alone."""
    if seeds is None:
        seeds = range(len(memory if isinstance(memory, Tensor) else memory[0]))
    seeds = [derive_seed(config.seed, seed) for seed in seeds]
    settings = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    return sample(decoder, memory, n=n, seeds=seeds, **settings, **get_limits(config))


METHODS: dict[str, Callable[..., Decoded]] = {
    "beam": decode_beam,
    "greedy": decode_greedy,
    "sample": decode_sample,
}


def get_limits(config: DecodingConfig) -> dict[str, Any]:
    """Return the limits that all methods keep to, by the names of their parameters."""
    return {name: getattr(config, name) for name in Limits._fields}


def to_captions(vocabulary: Vocabulary, decoded: Decoded) -> list[list[Caption]]:
    """Return the captions of each image as text; fewer than n where no more are possible.

    Raises UserError if the model's probabilities are NaN.
    """
    if decoded.log_prob.isnan().any():
        raise UserError(
            "the model's probabilities are NaN: its weights are damaged, or too large for these "
            "images"
        )
    return [
        [
            Caption(vocabulary.decode(tokens), log_prob)
            for tokens, log_prob in zip(rows, scores.tolist(), strict=True)
            if log_prob != -math.inf
        ]
        for rows, scores in zip(decoded.tokens.cpu(), decoded.log_prob.cpu(), strict=True)
    ]
