"""Words and their ids: the model's own tokenisation, and the vocabulary of a model.

T words
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from util import files
from util.files import UserError

# The four special tokens have these ids in every vocabulary.
PAD, START, END, UNK = range(4)


class _Letters(dict):
    """Maps a character to itself if it can be in a word, apostrophes to ', the rest to a space.

    Invisible characters that shape a word (joiners, soft hyphens, direction marks) go without a
    trace; the zero-width space parts words.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in "'’ʼ":
            self[code] = "'"
        elif category == "Cf" and char != "\u200b":
            self[code] = ""
        else:
            self[code] = char if category[0] in "LMN" else " "
        return self[code]


_LETTERS = _Letters()


_WORD = re.compile(r"[^\s']+(?:'[^\s']+)*")


def split_words(caption: str) -> list[str]:
    """Return the model's words: lower-cased runs of letters, marks, digits and inner apostrophes.

    Any script; Unicode is composed (NFC) first, so that é is one word in either spelling.
    """
    text = unicodedata.normalize("NFC", caption.lower())
    return _WORD.findall(text.translate(_LETTERS))


class Vocabulary:
    """The words a model knows; ids 0..3 are <pad> <start> <end> <unk>, the most frequent first."""

    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, known: Iterable[str]):
        """`known`: the words without the special ones. Raises ValueError on a repeated word."""
        self.words = (*self.SPECIALS, *known)
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise UserError("a vocabulary holds each word once, and no <pad> <start> <end> <unk>")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int) -> "Vocabulary":
        """Return the vocabulary of words that come at least `min_count` times (train split only).

        Raises ValueError where no word is left.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = [word for word, count in counts.items() if count >= min_count]
        if not kept:
            raise UserError(
                f"no word comes {min_count} times in the captions; lower --min-count "
                f"(they have {len(counts)} different words)"
            )
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def encode(self, caption: str, seq_len: int) -> list[int]:
        """Return <start> words <end> as ids, unpadded, cut to `seq_len` words (<end> stays)."""
        ids = [self.ids.get(word, UNK) for word in split_words(caption)[:seq_len]]
        return [START, *ids, END]

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Return the words of `tokens` (T,) up to <end>; special tokens are left out."""
        spoken = []
        for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
            if token == END:
                break
            if token >= len(self.SPECIALS):
                spoken.append(self.words[token])
        return " ".join(spoken)

    def save(self, path: str | Path) -> None:
        """Write the words to `path` as JSON."""
        files.write_json(path, {"words": self.words[len(self.SPECIALS) :]})

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Return the vocabulary that `save` wrote; ValueError where the file is another thing."""
        value = files.read_json(path)
        known = value.get("words") if isinstance(value, dict) else None
        if not isinstance(known, list) or not all(isinstance(word, str) for word in known):
            raise UserError(f'{path} is not a vocabulary: expected {{"words": ["a", …]}}')
        try:
            return cls(known)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
