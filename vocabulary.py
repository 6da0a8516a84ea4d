"""Words and token ids: how captions are split into words, and the vocabulary of a model.

T words
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from util import files, scripts
from util.files import UserError

# The ids of the special tokens, the same in every vocabulary.
PAD, START, END, UNK = range(4)


class _CharacterMap(dict):
    """The table for `str.translate`; a character is classified when it is first met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in "'’ʼ":
            self[code] = "'"
        elif char in BLANKS:
            self[code] = " "
        elif category in ("Cf", "Me") or _INVISIBLE.match(char):
            # Joiners, soft hyphens, direction marks and variation selectors are invisible and
            # inside words. Marks that enclose a character (Me) make a sign of it, as of 1️⃣.
            self[code] = ""
        else:  # letters, marks (vowel signs, accents) and digits make words
            self[code] = char if category[0] in "LMN" else " "
        return self[code]


# Blanks and signs whose category is that of joiners or letters: the zero-width space, blank
# letters of Hangul, ℹ as in ℹ️.
BLANKS = "\u200b\u3164\uffa0\u2139"
# Invisible characters of other categories than Cf: Unicode's Default_Ignorable_Code_Point.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0000-\U000e0fff]"
)
_CHARACTERS = _CharacterMap()
_WORD = re.compile(r"[^\s']+(?:'[^\s']+)*")


def split_words(caption: str, by_character: bool = False) -> list[str]:
    """Return the words of a caption: lower-cased runs of letters, digits and inner apostrophes.

    With `by_character`, each character of a script without spaces is a word (`util.scripts`);
    otherwise a whole phrase in such a script is one. Unicode is normalised (NFC), so that an
    accented letter gives the same word whether it is stored as one character or as two. Emoji,
    invisible characters and combining marks without a letter give no words.
    """
    text = unicodedata.normalize("NFC", caption.lower()).translate(_CHARACTERS)
    if not text.isascii():
        # Once more, as something invisible may have been between a letter and its mark.
        text = unicodedata.normalize("NFC", drop_stray_marks(text))
        if by_character:
            text = scripts.split_characters(text)
    return _WORD.findall(text)


def drop_stray_marks(text: str) -> str:
    """Return the text without combining marks that do not follow a letter or digit."""
    kept = " "
    for char in text:
        if unicodedata.category(char)[0] != "M" or kept[-1] not in " '":
            kept += char
    return kept[1:]


def count_words(captions: Iterable[str], by_character: bool = False) -> Counter[str]:
    """Return how often each word occurs in the captions; `by_character`: see `split_words`."""
    return Counter(word for caption in captions for word in split_words(caption, by_character))


def list_words(counts: Mapping[str, int], most: int = 20) -> str:
    """Return "rex (3), ocean (2) and 5 more" for messages: the first `most` words, their counts."""
    names = [f"{word} ({count})" for word, count in list(counts.items())[:most]]
    rest = len(counts) - len(names)
    return ", ".join(names) + (f" and {rest:,} more" if rest else "")


class Vocabulary:
    """The words of a model and their ids.

    Ids 0 to 3 are <pad>, <start>, <end> and <unk> (any other word); the words follow, the most
    frequent first. With `by_character`, each character of a script without spaces is a word, and
    such captions are written without spaces.
    """

    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, known: Iterable[str], by_character: bool = False):
        """`known`: the words in the order of their ids, without the special tokens.

        Raises UserError where a word is repeated.
        """
        self.by_character = by_character
        self.words = (*self.SPECIALS, *known)
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise UserError("a vocabulary holds each word once, and no <pad> <start> <end> <unk>")

    @classmethod
    def build(
        cls, captions: Iterable[str], min_count: int, by_character: bool | None = None
    ) -> "Vocabulary":
        """Return the vocabulary of all words that occur at least `min_count` times.

        `captions` should be those of the train split only. They are split `by_character` (None: if
        they are in a script without spaces). Raises UserError where no word is frequent enough.
        """
        captions = list(captions)
        if by_character is None:
            by_character = scripts.is_unspaced(captions)
        counts = count_words(captions, by_character)
        kept = [word for word, count in counts.items() if count >= min_count]
        if not kept:
            raise UserError(
                f"no word occurs {min_count} times in the captions; lower --min-count "
                f"(they have {len(counts)} different words)"
            )
        return cls(sorted(kept, key=lambda word: (-counts[word], word)), by_character)

    @property
    def known(self) -> tuple[str, ...]:
        """The words in the order of their ids, without the special tokens."""
        return self.words[len(self.SPECIALS) :]

    def count_unknown(self, captions: Iterable[str]) -> dict[str, int]:
        """Return the words that it lacks with their counts in the captions, most frequent first."""
        counts = count_words(captions, self.by_character)
        lacking = counts.keys() - self.ids.keys()
        return {word: counts[word] for word in sorted(lacking, key=lambda w: (-counts[w], w))}

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.words, self.by_character) == (
            other.words, other.by_character
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.words, self.by_character))

    def split(self, caption: str) -> list[str]:
        """Return the words of a caption, known or not."""
        return split_words(caption, self.by_character)

    def encode(self, caption: str, seq_len: int) -> list[int]:
        """Return the ids of <start> words <end>, unpadded.

        Only the first `seq_len` words are kept, always followed by <end>.
        """
        ids = [self.ids.get(word, UNK) for word in self.split(caption)[:seq_len]]
        return [START, *ids, END]

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Return the text of `tokens` (T,) up to the first <end>, without special tokens."""
        words = self.list_words(tokens)
        return scripts.join_words(words) if self.by_character else " ".join(words)

    def list_words(self, tokens: Iterable[int] | Tensor) -> list[str]:
        """Return the words of `tokens` (T,) up to the first <end>, without special tokens."""
        words = []
        for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
            if token == END:
                break
            if token >= len(self.SPECIALS):
                words.append(self.words[token])
        return words

    def to_entries(self) -> dict[str, bool]:
        """Return what a file says beside the words; nothing, as in older ones, for most models."""
        return {"by_character": True} if self.by_character else {}

    def save(self, path: str | Path) -> None:
        """Write the words to `path` as JSON."""
        files.write_json(path, {"words": self.known, **self.to_entries()})

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Return the vocabulary that `save` wrote; raises UserError where the file is not one."""
        value = files.read_json(path)
        try:
            value = value if isinstance(value, dict) else {}
            return cls.from_file(value.get("words"), value)
        except UserError as error:
            raise UserError(f"{path} is not a vocabulary: {error}") from error

    @classmethod
    def from_file(cls, known: Any, entries: Mapping[str, Any]) -> "Vocabulary":
        """Return the vocabulary of the words of a file, which may be a stranger's.

        `entries`: those of the file, where `to_entries` has put what they are besides. Raises
        UserError where `known` is not a list of different words.
        """
        if not isinstance(known, list) or not all(
            isinstance(word, str) and word.isprintable() for word in known
        ):  # a terminal would obey control characters
            raise UserError("its vocabulary is not a list of words in printable characters")
        return cls(known, entries.get("by_character") is True)
