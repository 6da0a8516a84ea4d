"""Captions to words, words to ids and back."""

import json
import pickle
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vocabulary import END, PAD, START, UNK, Vocabulary, list_words, split_words

LINES = ["a dog runs .", "a dog and a cat", "The dog's ball , red", "zebra"]
VOCABULARY = Vocabulary.build(LINES, 1)


# --- words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog, 3 T-shirts & 1,000 balls.", "a dog 3 t shirts 1 000 balls"),
        ("the dog's friends' 'big' rock'n'roll don’t", "the dog's friends big rock'n'roll don't"),
        ("लाल गेंद को फेंकता है।", "लाल गेंद को फेंकता है"),
        ("น้ำ ใส", "น้ำ ใส"),
        ("كَلْبٌ، أسود؟", "كَلْبٌ أسود"),
        ("一只狗，在跑。", "一只狗 在跑"),
        ("Ein Fluß; Ünïcode_snake", "ein fluß ünïcode snake"),
        ("می\u200cخواهم co\u00adoperate \u200fكلب", "میخواهم cooperate كلب"),
        ("สวัส\u200bดี", "สวัส ดี"),
        ("👩‍👧 !!! ''' ", ""),
        ("best day ❤️", "best day"),
        ("1️⃣ dog #️⃣ ℹ️ sign 👍🏽 🇩🇪 🏴\U000e0067\U000e007f ☠︎", "1 dog sign"),
        ("\ufeffa \u2060 dog\ufeff \u034f \u180b \U000e0100 \u200e", "a dog"),
        ("do\u034fg ca\ufe00t bi\u115frd", "dog cat bird"),
        ("a\u3164dog \u3164 \uffa0 \u2800 cat", "a dog cat"),
        ("\u0301 best ❤\u0301 \u0301day '\u0301s, dog's\u0301", "best day s dog'ś"),
        ("e\u00ad\u0301te\u200d\u0301", "été"),
        ("ก\u200b\u0e34 x\u20e3 ½ e\u0301\u0323", "ก x ½ ẹ́"),
    ],
)
def test_words_are_runs_of_letters_marks_digits_and_inner_apostrophes(caption, expected):
    composed = unicodedata.normalize("NFC", expected)
    assert split_words(caption) == composed.split()


def test_composed_and_decomposed_letters_give_the_same_words():
    composed, decomposed = "Café été", unicodedata.normalize("NFD", "Café été")
    assert composed != decomposed
    assert split_words(composed) == split_words(decomposed) == ["café", "été"]


def test_splitting_words_again_changes_nothing():
    caption = (
        "The dog's 'red' ball – Ελλάδα, 東京 İstanbul naïve Über-cool 3½ ❤️\u0301 e\u00ad\u0301"
    )
    assert split_words(" ".join(split_words(caption))) == split_words(caption)


@given(st.text("aé'\u0301\u200b\u200d\ufe0f\u3164\u034f\u20e3 ❤1ि") | st.text())
def test_no_word_is_invisible_begins_with_a_mark_or_changes_when_split_again(caption):
    words = split_words(caption)
    assert split_words(" ".join(words)) == words
    for word in words:
        kinds = [unicodedata.category(char)[0] for char in word]
        assert kinds[0] in "LN" and set(kinds) - {"P"} <= set("LMN")


# --- vocabulary


def test_the_special_tokens_are_ids_0_to_3():
    assert VOCABULARY.words[:4] == ("<pad>", "<start>", "<end>", "<unk>")
    assert (PAD, START, END, UNK) == (0, 1, 2, 3)


def test_words_are_ordered_by_count_then_alphabet():
    assert VOCABULARY.words[4:] == ("a", "dog", *sorted(["and", "ball", "cat", "dog's", "red",
                                    "runs", "the", "zebra"]))  # fmt: skip
    assert Vocabulary.build(reversed(LINES), 1) == VOCABULARY


@pytest.mark.parametrize(("min_count", "kept"), [(1, 10), (2, 2), (3, 1)])
def test_words_below_the_minimum_count_are_unknown(min_count, kept):
    vocabulary = Vocabulary.build(LINES, min_count)
    assert len(vocabulary) == 4 + kept
    assert vocabulary.encode("a zebra", 9) == [START, 4, vocabulary.ids.get("zebra", UNK), END]


def test_without_a_frequent_word_the_error_names_min_count():
    with pytest.raises(ValueError, match=r"no word occurs 9 times.*--min-count.*10 different"):
        Vocabulary.build(LINES, 9)


@pytest.mark.parametrize("line", [*LINES, "RED cat, the dog's zebra!"])
def test_encode_then_decode_gives_the_words_back(line):
    tokens = VOCABULARY.encode(line, 30)
    expected = " ".join(split_words(line))
    assert VOCABULARY.decode(tokens) == expected
    assert VOCABULARY.decode(torch.tensor([*tokens, PAD, PAD])) == expected


def test_truncation_counts_words_and_keeps_the_end_token():
    tokens = VOCABULARY.encode("a dog and a cat", 3)
    assert tokens[0] == START and tokens[-1] == END and len(tokens) == 5
    assert VOCABULARY.decode(tokens) == "a dog and"
    assert VOCABULARY.encode("", 3) == [START, END]


def test_decoding_stops_at_the_end_token_and_omits_special_tokens():
    assert VOCABULARY.decode([START, 4, UNK, 5, PAD, END, 6, 7]) == "a dog"
    assert VOCABULARY.decode([]) == ""


def test_save_and_load_give_the_same_vocabulary(tmp_path):
    vocabulary = Vocabulary.build(["लाल गेंद", "dog's été", "東京"], 1)
    vocabulary.save(tmp_path / "words.json")
    assert Vocabulary.load(tmp_path / "words.json") == vocabulary
    text = (tmp_path / "words.json").read_text(encoding="utf-8")
    assert "गेंद" in text and json.loads(text)["words"] == list(vocabulary.words[4:])
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


@pytest.mark.parametrize("text", ["[]", '{"words": 3}', '{"words": ["a", 4]}', "{"])
def test_a_file_that_is_not_a_vocabulary_is_an_error(text, tmp_path):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(ValueError, match=r"words\.json is not a"):
        Vocabulary.load(tmp_path / "words.json")


@pytest.mark.parametrize("known", [["a", "a"], ["<pad>"]])
def test_a_repeated_word_is_an_error(known):
    with pytest.raises(ValueError, match="each word once"):
        Vocabulary(known)


def test_unknown_words_are_counted_and_listed_the_most_frequent_first():
    counts = VOCABULARY.count_unknown(["A Rex , rex and ocean", "ocean zebra rex ant", "<unk>"])
    assert list(counts.items()) == [("rex", 3), ("ocean", 2), ("ant", 1), ("unk", 1)]
    assert list_words(counts) == "rex (3), ocean (2), ant (1), unk (1)"
    assert list_words(counts, most=1) == "rex (3) and 3 more"
    assert VOCABULARY.known == VOCABULARY.words[4:]
