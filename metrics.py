"""Captions in, numbers out: the COCO scorer's words, BLEU, ROUGE-L and CIDEr-D, without Java.

METEOR and SPICE exist only as Java programs; `java_scores` runs them where they are installed.
"""

import contextlib
import importlib.util
import math
import re
import shutil
import subprocess
import threading
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

Tokens = Sequence[Hashable]  # words, or a model's integer tokens: the formulas don't mind

ORDERS = (1, 2, 3, 4)  # BLEU and CIDEr-D count runs of one to four words
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
METEOR_SECONDS = 1200  # thousands of images take one minute: past this Java is stuck
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

# ------------------------------------------------------------------------------------- words

# Vowel signs and accents belong to their letter; \w alone would break Hindi and Thai words.
_MARKS = "".join(chr(c) for c in range(0x300, 0xAC00) if unicodedata.category(chr(c))[0] == "M")
_NUMERALS = "²³¹¼-¾⁰-₎⅐-↉"  # \w holds these, but each is a token of its own
_A = rf"(?:[^\W_{_NUMERALS}]|[{_MARKS}])"  # letter, mark or digit
_L = rf"(?!\d){_A}"  # letter or mark
_END = rf"(?!{_A})"
_PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of black/white or t-shirt/jeans
_ALONE = rf"(?!{_A}|[-/.!?'][A-Za-z0-9])"
_CLITIC = rf"'(?i:[msd]|re|ve|ll){_END}"


def _any(words: str) -> str:
    return "|".join(words.split())


# Found by asking the Java program: these keep their full stop (and any single letter does).
_SHORT = r"""adj adm adv al alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd
    brig bros calif capt cf cie cmdr co col colo comdr conn cont'd corp cos cpl ct dak dec dept det
    dr drs (?:ed|ph)\.d elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp
    intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn mlle mme mo
    mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pvt rd rep
    reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs
    treas tue tues univ va vs vt wed wis wisc wm wyo"""
_SHORT_IF_CAPITAL = "A[zZ] A[rR][kK] Del Ill La Mass Miss Ore Pa Tex Wash"
# Before one of these a single letter and its full stop end a sentence: "plan B. The dog".
_STARTERS = "A An As At He In It Many One She Some That The Then There These They This We While"

# The first row that fits wins, so a longer reading stands above a shorter one. What no row takes
# is dropped: quotes, commas, dashes and a lone . ! ? as the reference's list of punctuation
# says, emoji because its alphabet lacks them.
_ROWS = (
    # The plain word, most of every caption, first: three times as fast.
    r"(?![CGLWcglw](?i:annot|onna|otta|emme|imme|anna)[ ])[A-Za-z]+(?=[ ])",
    # Addresses, tags, faces, @names and #topics, currencies.
    r"https?://[^\s\"<>()|]*\w/?",
    r"[A-Za-z0-9][\w.+-]{0,63}@[^\s\"<>|(){}@]*[^\s\"<>|(){}@.]",
    rf"(?i:www\.(?:[\w-]+\.)+[a-z]{{2,4}}|(?:[a-z]+\.)+(?:com|net|org|edu)(?=/)){_END}"
    r"(?:/[^\s\"<>()|]+\w)?",
    r"</?[A-Za-z][^<>]*>",
    r"[<>]?[:;=][-o*']?[DPdpO()\\{@|\[\]](?![A-Za-z])|[-^~=<>]_[-^~=<>]",
    rf"@[A-Za-z_]+|\#(?:_|{_L})+|[A-Z]+\$",
    # can|not, gon|na, got|ta, lem|me; do|n't; dog|'s; then '80s, 'em and rock|'n'|roll.
    rf"(?i:can(?=not{_ALONE})|(?:gon|wan)(?=na{_ALONE})|got(?=ta{_ALONE}))",
    rf"(?i:(?:lem|gim)(?=me{_ALONE})|'t(?=(?:is|was){_END}))",
    rf"[A-Za-z]*[A-MO-Za-mo-z](?=[Nn]['`][Tt]{_END})|[Nn]['`][Tt]{_END}",
    rf"(?<!')(?:{_CLITIC}|'(?i:em|till?|cause|[2-9]0s){_END}|'\d\d(?=[ ]))|'[Nn](?:'|{_END})",
    # Words that hold an apostrophe: o'clock, O'Brien, ma'am.
    rf"(?i:c'est|c'mon|e'er|ev'ry|li'l|nat'l|nor'easter|o'o|s'mores|cont'd(?!\.)){_END}",
    rf"(?i:y'(?={_L})|[ld]'(?!{_L}|')|j'|ol')",
    rf"(?!.{_CLITIC})(?:[dDoOlL]'{_L}{_A}+(?:[-_]{_A}+)*|[A-HJ-XZn]'(?:{_L}){{2,}})",
    rf"(?:{_L})+(?<=[aeiouyAEIOUY])(?!{_CLITIC})'[aeiouA-Z](?:{_L})*",
    # and/or, 24/7; t-shirt, U.S.-based; R&B.
    rf"[A-Za-z](?=\.[ ]+(?:{_any(_STARTERS)})[ ])",
    r"\d{1,4}-\d{1,4}/\d{1,4}(?!\d)",
    rf"{_PART}(?:/{_PART}){{1,2}}",
    rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:[-_‐‑](?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+{_END}",
    r"[A-Z]+(?:[+&][A-Z]+)+|(?i:pro|anti)-",
    # A full stop that stays: U.S., Mr., No. 5, and (a quirk) any word's before a comma.
    rf"[A-Za-z](?:\.[A-Za-z])*\.(?!{_L})",
    rf"(?:(?i:{_any(_SHORT)})|{_any(_SHORT_IF_CAPITAL)})\.(?!{_L})",
    r"(?i:no|nos|figs?|prop|art|pp|op|ca)\.(?=[ ]?\d)",
    rf"{_L}{_A}*(?:\.(?=[,;:])|(?:[.!?]{_L}{_A}*)+)",
    # Numbers: 1,000 and 10:30, .5, -5; then any other word, and signs that are tokens.
    r"(?:(?<!-)[-+])?(?:\d+(?:[.:,]\d+)+|(?<!\.\.)(?:[.:,]\d+)+)|(?<!-)[-+]\d+",
    rf"{_A}+(?:[-_‐‑]{_A}+)*",
    r"\$|[!?]{2,}|\*+|_+|@+|\#+|<<|>>|[%&+<=>/\\^|~()\[\]{}¡¢-©¬®-´¶-¹¼-¿×÷⁰-₎‖-‗‚„-•‰-‸※-⁂⁄]",
    r"[⅐-⅟℀-⅏←-⯿։־؆-،؛؞؟٪٭۔।॥、。〒・！-／：-＠［-｀｛-･￠￡￥￦₤€฿]",
)
_TOKEN = re.compile(rf'(?![\s"]|[.,;:][ ])(?:{"|".join(_ROWS)})')
_TYPED = str.maketrans({"’": "'", "‘": "'", "\x92": "'", "\xa0": " ", "\xad": None})
_ENTITIES = {"&lt;": " < ", "&gt;": " > ", "&amp;": "&", "&quot;": '"', "&apos;": "'"}
_WRITTEN = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
    | {"£": "#", "€": "$", "¤": "$", "¢": "cents"}
    | {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
)


def tokenize(caption: str) -> list[str]:
    """Return the words that the COCO scorer counts: lower-cased, clitics apart, punctuation gone.

    Follows Stanford's PTBTokenizer (CoreNLP 3.4.1) as pycocoevalcap calls it. Measured against
    that Java program: the same for all 35,460 Flickr8k captions tried, for 75 of 80 lines of
    oddities, and for 94.8 % of 40,000 strings of oddities glued together at random. 0.2 s for
    those captions. Brackets stay, as "-lrb-" and "-rrb-": the reference means to drop them but
    compares capitals with small letters. Known differences: telephone numbers, "&#39;", "S&P-500";
    curly apostrophes come out straight; scripts that Java cuts at their vowel signs (Burmese,
    Khmer, Sinhala, Tibetan, part of Kannada) keep whole words.
    """
    if not caption.isascii():
        caption = caption.translate(_TYPED)
    if "&" in caption:
        for entity, sign in _ENTITIES.items():
            caption = caption.replace(entity, sign)
    caption = caption.replace("\n", " ") + " "  # rows look ahead for the space after a word
    return " ".join(_TOKEN.findall(caption)).lower().translate(_WRITTEN).split()


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
            raise ValueError(
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


def _check_ids(
    references: Mapping[Hashable, Sequence[str]], candidates: Mapping[Hashable, str]
) -> list[Hashable]:
    if not references or not candidates:
        raise ValueError("nothing to score: give at least one image with references and a caption")
    missing = [key for key in references if key not in candidates]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(references)} images have references but no caption, "
            f"{missing[0]!r} for one: caption every image, or leave out its references"
        )
    unknown = [key for key in candidates if key not in references]
    if unknown:
        raise ValueError(
            f"{len(unknown)} captions are of images without references, {unknown[0]!r} for one: "
            "leave them out, or check that both sides use the same image ids"
        )
    for key, captions in references.items():
        if isinstance(captions, str) or not len(captions):
            raise ValueError(
                f"the references of image {key!r} must be a list of captions, got {captions!r}"
            )
    return list(references)


def _check_references(references: Sequence[Sequence[Tokens]]) -> None:
    if not len(references):
        raise ValueError("nothing to score: give at least one image with references")
    for place, captions in enumerate(references):
        if not len(captions):
            raise ValueError(f"image number {place} has no reference: give each at least one")


def _check_pairs(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> None:
    _check_references(references)
    if len(references) != len(candidates):
        raise ValueError(
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
        raise ValueError(
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
        raise ValueError(
            f"{' and '.join(absent)} missing in {folder}; both are in Stanford's "
            "stanford-corenlp-full-2015-12-09.zip (385 MB), to be put there by hand"
        )
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(wanted, given)[0])
