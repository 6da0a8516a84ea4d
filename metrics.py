"""Captions in, numbers out: the COCO scorer's words, BLEU, ROUGE-L and CIDEr-D, without Java.

METEOR and SPICE exist only as Java programs; `java_scores` runs them where they are installed.
"""

import contextlib
import importlib.util
import math
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from util.files import UserError
from util.tokenizer import tokenize

Tokens = Sequence[Hashable]  # words, or a model's integer tokens: the formulas don't mind

ORDERS = (1, 2, 3, 4)  # BLEU and CIDEr-D count runs of one to four words
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
METEOR_SECONDS = 1200  # thousands of images take one minute: past this Java is stuck
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

# ---------------------------------------------------------------------------- BLEU and ROUGE-L


def bleu(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4 as fractions.

    `references` holds one list of token lists per image, `candidates` one token list per image;
    one image alone gives that image's score. Papineni et al. 2002 with the closest reference
    length, and the COCO scorer's tiny constants, which decide when no n-gram matches. Raises
    ValueError when the lengths differ or something is empty.
    """
    _check_pairs(references, candidates)
    correct, total = np.zeros(len(ORDERS)), np.zeros(len(ORDERS))
    length = closest = 0
    for image_references, candidate in zip(references, candidates, strict=True):
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in image_references)[1]
        for row, n in enumerate(ORDERS):
            total[row] += max(0, len(candidate) - n + 1)
            correct[row] += _clipped_matches(image_references, candidate, n)
    precision = np.cumprod((correct + 1e-15) / (total + 1e-9)) ** (1 / np.array(ORDERS))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return (precision * math.exp(min(0.0, 1 - 1 / ratio))).tolist()


def _ngrams(words: Tokens, n: int) -> Counter:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _clipped_matches(references: Sequence[Tokens], candidate: Tokens, n: int) -> int:
    wanted = _ngrams(candidate, n)
    best = dict.fromkeys(wanted, 0)
    for reference in references:
        for gram, count in _ngrams(reference, n).items():
            if count > best.get(gram, count):
                best[gram] = count
    return sum(min(count, best[gram]) for gram, count in wanted.items())


def rouge_l(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> float:
    """Return the mean ROUGE-L over images, a fraction.

    Arguments and errors as for `bleu`; one image alone gives that image's score. Lin 2004 with
    beta 1.2; as in the COCO scorer the best precision and the best recall may come from different
    references, and an empty caption counts as one empty word.
    """
    _check_pairs(references, candidates)
    scores = map(_rouge_of_image, references, candidates)
    return math.fsum(scores) / len(candidates)


def _rouge_of_image(references: Sequence[Tokens], candidate: Tokens) -> float:
    candidate = candidate if len(candidate) else [""]
    references = [reference if len(reference) else [""] for reference in references]
    common = [_longest_common(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(c / len(r) for c, r in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence; one row of the table is the bits of an integer.

    Hyyrö, Bit-parallel LCS-length computation revisited, 2004: a zero bit marks a step up.
    """
    places: dict[Hashable, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    row = full = (1 << len(first)) - 1
    for word in second:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return len(first) - row.bit_count()


# ------------------------------------------------------------------------------------ CIDEr-D


class _NgramIds:
    """Numbers every run of 1 to 4 words: an n-gram is its first n-1 words' number and one word.

    Sorted arrays in place of dictionaries of tuples: a fraction of the memory (COCO has millions
    of n-grams), and hundreds of captions are looked up at once.
    """

    def __init__(self) -> None:
        self.words: dict[Hashable, int] = {}
        self.tables: dict[int, np.ndarray] = {}  # order -> sorted keys; place = the n-gram's number

    def size(self, n: int) -> int:
        return len(self.words) if n == 1 else len(self.tables[n]) - 1

    def count(
        self, captions: Sequence[Tokens], learn: bool = False
    ) -> list[tuple[np.ndarray, ...]]:
        """For each order: arrays caption, n-gram, count. Unknown n-grams number from `size(n)`."""
        flat = self._word_numbers(captions, learn)
        owner = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
        grams, counted = flat, []
        for n in ORDERS:
            inside = owner[n - 1 :] == owner[: max(0, len(owner) - n + 1)]
            if n > 1:
                keys = grams[:-1] << 32 | flat[n - 1 :]
                if learn:
                    # The last entry, above every key, lets searchsorted always point at one.
                    self.tables[n] = np.append(np.unique(keys[inside]), np.iinfo(np.int64).max)
                grams = _numbers(self.tables[n], keys)
            span = self.size(n) + len(grams) + 1
            pairs = owner[: len(grams)][inside] * span + grams[inside]
            pairs, times = np.unique(pairs, return_counts=True)
            counted.append((pairs // span, pairs % span, times))
        return counted

    def _word_numbers(self, captions: Sequence[Tokens], learn: bool) -> np.ndarray:
        known = self.words
        new: dict[Hashable, int] = {}
        flat = [word for caption in captions for word in caption]
        for word in flat:
            if word not in known:
                new.setdefault(word, len(known) + len(new))
        numbers = [known[word] if word in known else new[word] for word in flat]
        if learn:
            known.update(new)
        return np.array(numbers, np.int64)


def _numbers(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    numbers = np.searchsorted(table, keys)
    unknown = table[numbers] != keys
    numbers[unknown] = len(table) - 1 + np.unique(keys[unknown], return_inverse=True)[1]
    return numbers


class CiderD:
    """CIDEr-D of any captions against the references of some images, which are prepared once.

    `references` holds one list of token lists per image. Rare n-grams weigh more: how rare is
    counted over the images of `documents` (same layout; by default the references themselves, as
    the COCO scorer does; the train references where sampled captions are rewarded). A caption's
    end counts only where the caller appends an end token to candidates and references alike.
    Vedantam et al. 2015, sigma 6, times 10. Raises ValueError where an image has no reference.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]],
        documents: Sequence[Sequence[Tokens]] | None = None,
    ) -> None:
        _check_references(references)
        images = [*references, *(documents or ())]
        captions = [caption for image in images for caption in image]
        image_of = np.repeat(np.arange(len(images)), [len(image) for image in images])
        self._per_image = np.array([len(image) for image in references])
        self._lengths = _bigrams(captions)
        self._ids = _NgramIds()
        counted = self._ids.count(captions, learn=True)
        self._rarity, self._entries = [], []
        for n, (caption, gram, times) in zip(ORDERS, counted, strict=True):
            span = self._ids.size(n) + 1  # one number to spare: the n-grams seen nowhere
            pair = image_of[caption] * span + gram
            seen = np.unique(pair[image_of[caption] >= len(references)] if documents else pair)
            frequency = np.bincount(seen % span, minlength=span)
            rarity = math.log(len(documents or references)) - np.log(np.maximum(1, frequency))
            norm = _norms(caption, times * rarity[gram], len(captions))
            weight = times * rarity[gram] ** 2 / norm[caption]
            order = np.argsort(pair)
            order = order[pair[order] < len(references) * span]
            self._rarity.append(rarity)
            self._entries.append((pair[order], caption[order], times[order], weight[order]))

    def scores(self, candidates: Sequence[Tokens], image_index: Sequence[int]) -> np.ndarray:
        """Return the CIDEr-D of each candidate (float64, 0 to 10) against its image's references.

        `image_index` gives for each candidate the place of its image in `references`: an image
        may have any number of candidates. Raises ValueError on a place that does not exist.
        """
        image = np.asarray(image_index, np.int64)
        known = (image >= 0) & (image < len(self._per_image))
        if len(image) != len(candidates) or not known.all():
            raise UserError(
                f"each of the {len(candidates)} candidates needs one image index from 0 to "
                f"{len(self._per_image) - 1}; got {list(image_index)[:5]}…"
            )
        lengths, total = _bigrams(candidates), np.zeros(len(candidates))
        for row, (caption, gram, times) in enumerate(self._ids.count(candidates)):
            pair, owner, reference_times, weight = self._entries[row]
            gram = np.minimum(gram, len(self._rarity[row]) - 1)
            norm = _norms(caption, times * self._rarity[row][gram], len(candidates))
            mine, theirs = _matches(image[caption] * len(self._rarity[row]) + gram, pair)
            by = caption[mine]
            # The scorer calls the count of bigrams a caption's length; kept for comparability.
            gap = lengths[by] - self._lengths[owner[theirs]]
            likeness = np.minimum(times[mine], reference_times[theirs]) * weight[theirs] / norm[by]
            likeness *= np.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
            total += np.bincount(by, likeness, minlength=len(total))
        return 10 * total / len(ORDERS) / self._per_image[image]


def _bigrams(captions: Sequence[Tokens]) -> np.ndarray:
    return np.array([max(0, len(caption) - 1) for caption in captions], np.int64)


def _norms(caption: np.ndarray, values: np.ndarray, captions: int) -> np.ndarray:
    """Euclidean length of each caption's values; 1 where it is 0, which then divides a 0."""
    norm = np.sqrt(np.bincount(caption, values**2, minlength=captions))
    return np.where(norm > 0, norm, 1.0)


def _matches(wanted: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with wanted[i] == pairs[j]; `pairs` is sorted and may repeat."""
    first = np.searchsorted(pairs, wanted, "left")
    found = np.searchsorted(pairs, wanted, "right") - first
    start = np.cumsum(found) - found
    return np.repeat(np.arange(len(wanted)), found), np.arange(found.sum()) + np.repeat(
        first - start, found
    )


def cider_d(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> float:
    """Return the mean CIDEr-D over images; 1 is about what one person scores against four others.

    Arguments and errors as for `bleu`. N-grams are weighed by these images' own references, so
    the score of a part of a split is not comparable, and one image alone always scores 0.
    """
    _check_pairs(references, candidates)
    return float(CiderD(references).scores(candidates, range(len(candidates))).mean())


# ----------------------------------------------------------------------------- all of a split


def score(
    references: Mapping[Hashable, Sequence[str]], candidates: Mapping[Hashable, str]
) -> dict[str, float]:
    """Return {"BLEU-1" … "BLEU-4", "ROUGE-L", "CIDEr"} of plain captions, as fractions.

    Both mappings go by image id. The numbers are those of pycocoevalcap to 1e-6. Raises
    ValueError on empty input and where the image ids differ.
    """
    image_ids = _check_ids(references, candidates)
    wanted = [[tokenize(caption) for caption in references[key]] for key in image_ids]
    given = [tokenize(candidates[key]) for key in image_ids]
    scores = {f"BLEU-{n}": value for n, value in zip(ORDERS, bleu(wanted, given), strict=True)}
    return {**scores, "ROUGE-L": rouge_l(wanted, given), "CIDEr": cider_d(wanted, given)}


# Words that no finished caption ends with: "a man with a", "a dog in the".
DANGLING = frozenset("""
    a an the his her their its my your our this these some another and or but nor as of in on at to
    for from by with into onto near through over under behind between against toward towards during
    beside while that which who whose is are was were be has have very
""".split())  # fmt: skip  # noqa: SIM905


def faults(captions: Iterable[str]) -> dict[str, float]:
    """Return the share of plain captions with a fault that n-gram scores hardly see.

    "bad_endings": the last word wants another after it ("a man with a"); "repeats": one to four
    words come twice in a row ("a dog and and", "in a field in a field").
    """
    spoken = [tokenize(caption) for caption in captions]
    bad = sum(bool(words) and words[-1] in DANGLING for words in spoken)
    count = max(1, len(spoken))
    return {"bad_endings": bad / count, "repeats": sum(map(_repeats, spoken)) / count}


def _repeats(words: Sequence[str]) -> bool:
    return any(
        words[at : at + n] == words[at + n : at + 2 * n]
        for n in ORDERS
        for at in range(len(words) - 2 * n + 1)
    )


def _check_ids(
    references: Mapping[Hashable, Sequence[str]], candidates: Mapping[Hashable, str]
) -> list[Hashable]:
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
    for key, captions in references.items():
        if isinstance(captions, str) or not len(captions):
            raise UserError(
                f"the references of image {key!r} must be a list of captions, got {captions!r}"
            )
    return list(references)


def _check_references(references: Sequence[Sequence[Tokens]]) -> None:
    if not len(references):
        raise UserError("nothing to score: give at least one image with references")
    for place, captions in enumerate(references):
        if not len(captions):
            raise UserError(f"image number {place} has no reference: give each at least one")


def _check_pairs(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> None:
    _check_references(references)
    if len(references) != len(candidates):
        raise UserError(
            f"{len(references)} images have references, but there are {len(candidates)} "
            "candidates: give one candidate per image, in the same order"
        )


# ---------------------------------------------------------------------- the Java programs


def java_scores(
    references: Mapping[Hashable, Sequence[str]], candidates: Mapping[Hashable, str]
) -> tuple[dict[str, float], list[str]]:
    """Return ({"METEOR": …, "SPICE": …}, reasons): what Java could score, and a line for the rest.

    Arguments and errors as for `score`. Needs Java and the package pycocoevalcap. Nothing is
    ever downloaded: SPICE's models (385 MB) are used only where they already lie.
    """
    image_ids = _check_ids(references, candidates)
    if shutil.which("java") is None:
        reason = "no java on the PATH (install a Java runtime, 8 or later)"
    elif importlib.util.find_spec("pycocoevalcap") is None:
        reason = "pycocoevalcap is not installed: pip install -r requirements-dev.txt"
    else:
        # Numbers for ids: SPICE sorts them and writes them as JSON.
        wanted = {i: [_line(c) for c in references[key]] for i, key in enumerate(image_ids)}
        given = {i: [_line(candidates[key])] for i, key in enumerate(image_ids)}
        return _run_java(wanted, given)
    return {}, [f"{name} not computed: {reason}" for name in ("METEOR", "SPICE")]


def _line(caption: str) -> str:
    return " ".join(tokenize(caption))


def _run_java(wanted: dict, given: dict) -> tuple[dict[str, float], list[str]]:
    scores, reasons = {}, []
    for name, run in (("METEOR", _meteor), ("SPICE", _spice)):
        try:
            scores[name] = run(wanted, given)
        except (OSError, ValueError, ImportError, subprocess.SubprocessError) as error:
            reasons.append(f"{name} not computed: {' '.join(str(error).split())}")
    return scores, reasons


def _meteor(wanted: dict, given: dict) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    clock = threading.Timer(METEOR_SECONDS, scorer.meteor_p.kill)
    clock.start()
    try:
        return scorer.compute_score(wanted, given)[0]
    except (OSError, ValueError) as error:
        scorer.meteor_p.kill()
        said = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise UserError(
            f"Java ended early ({said[-1] if said else 'it gave no answer'})"
        ) from error
    finally:
        clock.cancel()
        scorer.meteor_p.kill()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        # An error leaves the scorer's lock taken, and its __del__ would wait for it for ever.
        if scorer.lock.locked():
            scorer.lock.release()


def _spice(wanted: dict, given: dict) -> float:
    folder = Path(importlib.util.find_spec("pycocoevalcap.spice").origin).parent / "lib"
    absent = [jar for jar in SPICE_JARS if not (folder / jar).is_file()]
    if absent:
        raise UserError(
            f"{' and '.join(absent)} missing in {folder}; both are in Stanford's "
            "stanford-corenlp-full-2015-12-09.zip (385 MB), to be put there by hand"
        )
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(wanted, given)[0])
