"""Scripts that put no spaces between words (Chinese, Japanese, Thai …): split by character.

A character is a letter with the marks that follow it, such as Thai's vowel signs and tones. Digits
and words of other scripts stay whole: 穿T恤的12个人 is 穿 T 恤 的 12 个 人.
"""

import re
from collections.abc import Iterable

# The blocks of these scripts, as ranges in a regular expression.
_BLOCKS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u3005-\u3007\u3021-\u3029"  # 々 〆 〇 and numerals
    "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # Hiragana, Katakana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"  # Han
    "\ua000-\ua48c"  # Yi
)
_LETTER = rf"(?=[^\W\d_])[{_BLOCKS}]"
_CHARACTER = re.compile(rf"{_LETTER}(?:(?=\W)[{_BLOCKS}\u0300-\u036f])*")
_GAP = re.compile(rf"(?<=[{_BLOCKS}])\s+(?={_LETTER})")
# Brackets, full stops and other signs of these scripts, full-width ones too.
_SIGN = re.compile(
    r"[\u3001-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    r"\uff5b-\uff65\u0e3f\u0e4f\u0e5a\u0e5b\u104a-\u104f\u17d4-\u17db]"
)
_JOIN = re.compile(rf"(?<=[{_BLOCKS}]) | (?=[{_BLOCKS}])")
SEGMENTED = 5  # letters per space, below which somebody has put spaces between words
LEAST = 0.01  # of the captions that decide what all are taken for


def is_unspaced(captions: Iterable[str]) -> bool:
    """Return whether captions are in a script without spaces and have none between their words.

    At least 1 in 100 must be in such a script. If they have a space for every `SEGMENTED` letters,
    they were split into words by a tool.
    """
    count = unspaced = letters = gaps = 0
    for caption in captions:
        count += 1
        if not caption.isascii() and (found := len(_CHARACTER.findall(caption))):
            unspaced, letters = unspaced + 1, letters + found
            gaps += len(_GAP.findall(caption))
    return unspaced > LEAST * count and gaps * SEGMENTED < letters


def split_characters(text: str) -> str:
    """Return the text with each character of these scripts between spaces, without their signs."""
    if text.isascii():
        return text
    return _CHARACTER.sub(r" \g<0> ", _SIGN.sub(" ", text))


def join_words(words: Iterable[str]) -> str:
    """Return the words as a text, with spaces only between those of other scripts."""
    return _JOIN.sub("", " ".join(words))


def list_words(text: str) -> list[str]:
    """Return the words of a text that a model wrote: what spaces divide, characters, digits."""
    return split_characters(text).split()


def is_character(word: str) -> bool:
    """Return whether a word is one character of these scripts."""
    return bool(_CHARACTER.fullmatch(word))
