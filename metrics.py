"""BLEU, ROUGE-L and CIDEr-D as the COCO scorer computes them, without Java.

To add a metric, write a function of (references, candidates) and give it a row in METRICS: `score`,
the list that evaluate.py prints, its report and scores.json then have it. References are one list
of captions per image, candidates one caption per image; a caption is a string or a list of tokens.
METEOR and SPICE exist only as Java programs (util/java_metrics.py); `java_scores` runs them where
they are installed.
"""

import math
import subprocess
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

from util.files import UserError
from util.java_metrics import meteor, spice
from util.scripts import is_character, is_unspaced, split_characters
from util.tokenizer import tokenize

Tokens = Sequence[Hashable]  # words, or a model's integer tokens
Caption = str | Tokens
References = Sequence[Sequence[Caption]]  # a list per image
Captions = Sequence[Caption]  # one per image

ORDERS = (1, 2, 3, 4)  # BLEU and CIDEr-D count n-grams of one to four words
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2

# ---------------------------------------------------------------------------- BLEU and ROUGE-L


def bleu(references: References, candidates: Captions) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4 as fractions; of one image alone, that image's score.

    Papineni et al. 2002 with the closest reference length, and the COCO scorer's tiny constants,
    which matter only where no n-gram matches. Raises ValueError where the lengths differ or an
    image has no reference.
    """
    references, candidates = _as_tokens(references, candidates)
    correct, total = np.zeros(len(ORDERS)), np.zeros(len(ORDERS))
    length = closest = 0
    for image_references, candidate in zip(references, candidates, strict=True):
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in image_references)[1]
        for row, n in enumerate(ORDERS):
            total[row] += max(0, len(candidate) - n + 1)
            correct[row] += _count_matches(image_references, candidate, n)
    precision = np.cumprod((correct + 1e-15) / (total + 1e-9)) ** (1 / np.array(ORDERS))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return (precision * math.exp(min(0.0, 1 - 1 / ratio))).tolist()


def _count_matches(references: References, candidate: Tokens, n: int) -> int:
    """Count the n-grams of `candidate` that match, each at most as often as in one reference."""
    wanted = _count_ngrams(candidate, n)
    most = dict.fromkeys(wanted, 0)
    for reference in references:
        for ngram, count in _count_ngrams(reference, n).items():
            if count > most.get(ngram, count):
                most[ngram] = count
    return sum(min(count, most[ngram]) for ngram, count in wanted.items())


def _count_ngrams(words: Tokens, n: int) -> Counter:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def rouge_l(references: References, candidates: Captions) -> float:
    """Return the mean ROUGE-L over images, a fraction. Errors as for `bleu`.

    Lin 2004 with beta 1.2. As in the COCO scorer, the best precision and the best recall may come
    from different references, and an empty caption counts as one empty word.
    """
    references, candidates = _as_tokens(references, candidates)
    scores = []
    for image_references, candidate in zip(references, candidates, strict=True):
        candidate = candidate if len(candidate) else [""]
        image_references = [r if len(r) else [""] for r in image_references]
        common = [_longest_common(candidate, reference) for reference in image_references]
        precision = max(common) / len(candidate)
        recall = max(c / len(r) for c, r in zip(common, image_references, strict=True))
        weighted = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / weighted if precision else 0.0)
    return math.fsum(scores) / len(candidates)


def _longest_common(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is the bits of one integer, a zero where the length grows: Hyyrö,
    Bit-parallel LCS-length computation revisited, 2004.
    """
    positions: dict[Hashable, int] = {}
    for position, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << position
    row = ones = (1 << len(first)) - 1
    for word in second:
        match = row & positions.get(word, 0)
        row = (row + match | row - match) & ones
    return len(first) - row.bit_count()


# ------------------------------------------------------------------------------------ CIDEr-D


class _NgramIds:
    """Numbers every n-gram of 1 to 4 words: its key is the id of its first n-1 words and one word.

    Sorted arrays in place of dictionaries of tuples take a fraction of the memory (COCO has
    millions of n-grams), and hundreds of captions are found in them at once.
    """

    def __init__(self, captions: Captions) -> None:
        self.words: dict[Hashable, int] = {}
        for caption in captions:
            for word in caption:
                self.words.setdefault(word, len(self.words))
        self.keys: dict[int, np.ndarray] = {}  # by order: sorted keys, a key's place is its id

    def size(self, n: int) -> int:
        return len(self.words) if n == 1 else len(self.keys[n]) - 1

    def count(self, captions: Captions) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return for each order the arrays caption, n-gram and count.

        An n-gram that is not known has an id of `size(n)` or more. The first call fixes which are.
        """
        owner = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
        ids = words = self._word_ids(captions)
        counts = []
        for n in ORDERS:
            inside = owner[n - 1 :] == owner[: max(0, len(owner) - n + 1)]
            if n > 1:
                keys = ids[:-1] << 32 | words[n - 1 :]
                if n not in self.keys:
                    # The last entry, above every key, lets searchsorted always point at one.
                    self.keys[n] = np.append(np.unique(keys[inside]), np.iinfo(np.int64).max)
                ids = _find(self.keys[n], keys)
            span = self.size(n) + len(ids) + 1
            pairs = owner[: len(ids)][inside] * span + ids[inside]
            pairs, times = np.unique(pairs, return_counts=True)
            counts.append((pairs // span, pairs % span, times))
        return counts

    def _word_ids(self, captions: Captions) -> np.ndarray:
        new: dict[Hashable, int] = {}
        ids = []
        for caption in captions:
            for word in caption:
                known = self.words.get(word)
                ids.append(
                    new.setdefault(word, len(self.words) + len(new)) if known is None else known
                )
        return np.array(ids, np.int64)


def _find(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the place of each key in the sorted `table`; keys not in it number from its end."""
    places = np.searchsorted(table, keys)
    unknown = table[places] != keys
    places[unknown] = len(table) - 1 + np.unique(keys[unknown], return_inverse=True)[1]
    return places


class CiderD:
    """CIDEr-D of any captions against the references of some images, which are prepared once.

    `references` holds one list of captions per image. Rare n-grams weigh more; how rare they are is
    counted over these images. A caption's end counts only where the caller appends an end token to
    candidates and references alike. Vedantam et al. 2015, sigma 6, times 10.
    """

    def __init__(self, references: References) -> None:
        self._by_character = are_unspaced(references)
        references = [
            [split_text(caption, self._by_character) for caption in captions]
            for captions in references
        ]
        captions = [caption for image in references for caption in image]
        self._per_image = np.array([len(image) for image in references])
        image_of = np.repeat(np.arange(len(references)), self._per_image)
        self._lengths = _bigrams(captions)
        self._ids = _NgramIds(captions)
        self._rarity, self._entries = [], []
        for n, (caption, ngram, times) in zip(ORDERS, self._ids.count(captions), strict=True):
            span = self._ids.size(n) + 1  # one more id, for all n-grams of no reference
            pair = image_of[caption] * span + ngram
            frequency = np.bincount(np.unique(pair) % span, minlength=span)
            rarity = math.log(len(references)) - np.log(np.maximum(1, frequency))
            norm = _norms(caption, times * rarity[ngram], len(captions))
            weight = times * rarity[ngram] ** 2 / norm[caption]
            order = np.argsort(pair)
            self._rarity.append(rarity)
            self._entries.append((pair[order], caption[order], times[order], weight[order]))

    def scores(self, candidates: Captions, image_index: Sequence[int]) -> np.ndarray:
        """Return the CIDEr-D of each candidate (float64, 0 to 10) against its image's references.

        `image_index` gives for each candidate the place of its image in `references`: an image
        may have any number of candidates. Raises ValueError for a place that does not exist.
        """
        image = np.asarray(image_index, np.int64)
        exists = (image >= 0) & (image < len(self._per_image))
        if len(image) != len(candidates) or not exists.all():
            raise ValueError(
                f"each of the {len(candidates)} candidates needs one image index from 0 to "
                f"{len(self._per_image) - 1}; got {list(image_index)[:5]}…"
            )
        candidates = [split_text(candidate, self._by_character) for candidate in candidates]
        lengths, total = _bigrams(candidates), np.zeros(len(candidates))
        for row, (caption, ngram, times) in enumerate(self._ids.count(candidates)):
            pair, owner, reference_times, weight = self._entries[row]
            ngram = np.minimum(ngram, len(self._rarity[row]) - 1)
            norm = _norms(caption, times * self._rarity[row][ngram], len(candidates))
            ours, theirs = _matches(image[caption] * len(self._rarity[row]) + ngram, pair)
            by = caption[ours]
            # The scorer takes the number of bigrams for the length; kept for comparable scores.
            gap = lengths[by] - self._lengths[owner[theirs]]
            value = np.minimum(times[ours], reference_times[theirs]) * weight[theirs] / norm[by]
            value *= np.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
            total += np.bincount(by, value, minlength=len(total))
        return 10 * total / len(ORDERS) / self._per_image[image]


def _bigrams(captions: Captions) -> np.ndarray:
    return np.array([max(0, len(caption) - 1) for caption in captions], np.int64)


def _norms(caption: np.ndarray, values: np.ndarray, captions: int) -> np.ndarray:
    """Return the Euclidean norm of each caption's values; 1 in place of 0, to divide zeros by."""
    norm = np.sqrt(np.bincount(caption, values**2, minlength=captions))
    return np.where(norm > 0, norm, 1.0)


def _matches(wanted: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all (i, j) with wanted[i] == pairs[j]; `pairs` is sorted and may repeat."""
    first = np.searchsorted(pairs, wanted, "left")
    found = np.searchsorted(pairs, wanted, "right") - first
    shift = first - (np.cumsum(found) - found)
    return np.repeat(np.arange(len(wanted)), found), np.arange(found.sum()) + np.repeat(
        shift, found
    )


def cider_d(references: References, candidates: Captions) -> float:
    """Return the mean CIDEr-D over images; 1 is about what one person scores against four others.

    Errors as for `bleu`. N-grams are weighed by these images' own references, so the score of a
    part of a split is not comparable, and one image alone always scores 0.
    """
    references, candidates = _as_tokens(references, candidates)
    return float(CiderD(references).scores(candidates, range(len(candidates))).mean())


# ---------------------------------------------------------------------------------- all metrics

# Names of the values -> function of (references, candidates), in the order they are printed.
METRICS: dict[tuple[str, ...], Callable[..., float | Sequence[float]]] = {
    ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"): bleu,
    ("METEOR",): meteor,
    ("ROUGE-L",): rouge_l,
    ("CIDEr",): cider_d,
    ("SPICE",): spice,
}
JAVA_METRICS = {("METEOR",), ("SPICE",)}  # computed only by `java_scores`
FAULTS = ("bad_endings", "repeats")  # the shares that `faults` returns


def score(
    references: Mapping[Hashable, Sequence[Caption]], candidates: Mapping[Hashable, Caption]
) -> dict[str, float]:
    """Return the scores of `METRICS` that need no Java by name: BLEU-1 to 4, ROUGE-L, CIDEr.

    They are fractions, those of pycocoevalcap to 1e-6. Both mappings go by image id. Raises
    ValueError for empty input and where the image ids differ.
    """
    wanted, given = _in_one_order(references, candidates)
    scores: dict[str, float] = {}
    for names, metric in METRICS.items():
        if names not in JAVA_METRICS:
            values = metric(wanted, given)
            scores |= zip(names, values if len(names) > 1 else [values], strict=True)
    return scores


def java_scores(
    references: Mapping[Hashable, Sequence[Caption]], candidates: Mapping[Hashable, Caption]
) -> tuple[dict[str, float], list[str]]:
    """Return ({"METEOR": …, "SPICE": …}, reasons): what Java could score, and a line for the rest.

    Arguments and errors as for `score`. Needs Java and the package pycocoevalcap.
    """
    wanted, given = _in_one_order(references, candidates)
    scores, reasons = {}, []
    for names, metric in METRICS.items():
        if names in JAVA_METRICS:
            try:
                scores[names[0]] = metric(wanted, given)
            except (OSError, ValueError, ImportError, subprocess.SubprocessError) as error:
                reasons.append(f"{names[0]} not computed: {' '.join(str(error).split())}")
    return scores, reasons


# Words that no finished caption ends with: "a man with a", "a dog in the".
DANGLING = frozenset("""
    a an the his her their its my your our this these some another and or but nor as of in on at to
    for from by with into onto near through over under behind between against toward towards during
    beside while that which who whose is are was were be has have very
""".split())  # fmt: skip  # noqa: SIM905


def faults(captions: Iterable[Caption]) -> dict[str, float]:
    """Return the shares of captions with faults that n-gram scores hardly show.

    "bad_endings": the last word wants another after it ("a man with a"); "repeats": one to four
    words come twice in a row ("a dog and and", "in a field in a field").
    """
    captions = list(captions)
    by_character = are_unspaced([captions])
    tokens = [split_text(caption, by_character) for caption in captions]
    bad_endings = sum(bool(words) and words[-1] in DANGLING for words in tokens)
    repeats = sum(
        any(
            words[start : start + n] == words[start + n : start + 2 * n]
            and not (n == 1 and by_character and is_character(words[start]))  # 人人, 慢慢
            for n in ORDERS
            for start in range(len(words) - 2 * n + 1)
        )
        for words in tokens
    )
    count = max(1, len(tokens))
    return dict(zip(FAULTS, (bad_endings / count, repeats / count), strict=True))


# ------------------------------------------------------------------------------ input and errors


def are_unspaced(references: References) -> bool:
    """Return whether captions are to be split by character (`util.scripts.is_unspaced`)."""
    return is_unspaced(
        each for captions in references for each in captions if isinstance(each, str)
    )


def split_text(caption: Caption, by_character: bool) -> Tokens:
    """Return the scorer's words of a caption; tokens are returned as they are."""
    if not isinstance(caption, str):
        return caption
    return tokenize(split_characters(caption) if by_character else caption)


def _as_tokens(
    references: References,
    candidates: Captions,
    image_ids: Iterable[Hashable] | None = None,
) -> tuple[list[list[Tokens]], list[Tokens]]:
    """Return references and candidates as tokens; raises UserError where they do not match."""
    if not len(references):
        raise UserError("nothing to score: give at least one image with references")
    for image_id, captions in zip(image_ids or range(len(references)), references, strict=True):
        if isinstance(captions, str) or not len(captions):
            raise UserError(
                f"the references of image {image_id!r} must be a list of at least one caption, "
                f"got {captions!r}"
            )
    if len(references) != len(candidates):
        raise UserError(
            f"{len(references)} images have references, but there are {len(candidates)} "
            "candidates: give one candidate per image, in the same order"
        )
    by_character = are_unspaced(references)
    split = [[split_text(caption, by_character) for caption in captions] for captions in references]
    return split, [split_text(caption, by_character) for caption in candidates]


def _in_one_order(
    references: Mapping[Hashable, Sequence[Caption]], candidates: Mapping[Hashable, Caption]
) -> tuple[list[list[Tokens]], list[Tokens]]:
    """Return both as tokens, in the order of the references' image ids."""
    if not references or not candidates:
        raise UserError("nothing to score: give at least one image with references and a caption")
    missing = [key for key in references if key not in candidates]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(references)} images have references but no caption, "
            f"{missing[0]!r} for one: caption every image, or leave out its references"
        )
    unknown = [key for key in candidates if key not in references]
    if unknown:
        raise UserError(
            f"{len(unknown)} captions are of images without references, {unknown[0]!r} for one: "
            "leave them out, or check that both sides use the same image ids"
        )
    given = [candidates[key] for key in references]
    return _as_tokens(list(references.values()), given, references)
