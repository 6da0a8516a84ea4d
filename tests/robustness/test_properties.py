"""Properties of any text and any setting, tested by Hypothesis on generated examples.

`pytest tests/robustness/test_properties.py --hypothesis-profile long` tries a hundred times more.
"""

import csv
import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.toy import MAX_WORDS, METHODS, SPECIALS, Toy, images, rescored, same, to_captions
from hypothesis import example, given
from hypothesis import strategies as st

import evaluate
from decoding import beam_search, greedy
from readers import load_split, read_table, read_token_file
from util import program
from vocabulary import Vocabulary, split_words

# Any line of a text file: no line ends, and no lone surrogates, which UTF-8 cannot encode.
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), max_size=40)
NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=12
).filter(
    lambda name: (
        name.strip("\ufeff") == name == name.strip()
        and os.path.normpath(name) == name
        and not os.path.isabs(name)
    )
)
CAPTIONS = st.dictionaries(NAMES, st.lists(LINE, min_size=1, max_size=4), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


def captions_of(table: pd.DataFrame) -> dict[str, list[str]]:
    rows = table.groupby("file", sort=False)["caption"]
    return {file: [line.strip() for line in lines] for file, lines in rows}


def stripped(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: [line.strip() for line in lines] for name, lines in captions.items()}


# --- parsers: what is written is read


@given(CAPTIONS, st.sampled_from(["utf-8", "utf-8-sig"]), st.sampled_from(["\n", "\r\n"]))
def test_a_token_file_is_read_as_it_was_written(folder, captions, encoding, end):
    path = folder / "token.txt"
    rows = [f"{name}#{i}\t{line}" for name, each in captions.items() for i, line in enumerate(each)]
    path.write_bytes(end.join(rows).encode(encoding))
    assert captions_of(read_token_file(path)) == stripped(captions)


@given(CAPTIONS, st.sampled_from(["utf-8", "utf-8-sig"]), st.sampled_from(["\n", "\r\n"]))
def test_a_csv_file_is_read_as_it_was_written(folder, captions, encoding, end):
    path = folder / "captions.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        rows = csv.writer(file, lineterminator=end)
        rows.writerow(["image", "caption"])
        rows.writerows([name, line] for name, lines in captions.items() for line in lines)
    assert captions_of(read_table(path)) == stripped(captions)


@given(CAPTIONS, st.booleans())
def test_json_lines_are_read_as_they_were_written(folder, captions, plain):
    path = folder / "captions.jsonl"
    pairs = [{"image": name, "caption": line} for name, lines in captions.items() for line in lines]
    text = "".join(json.dumps(pair, ensure_ascii=plain) + "\n" for pair in pairs)
    path.write_text(text, encoding="utf-8")
    assert captions_of(read_table(path)) == stripped(captions)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["images", "filename", "split", "sentences", "raw", "cocoid", "id",
                             "file_name", "annotations", "image_id", "caption", "words"]),
            inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip
READERS = {
    "dataset_flickr8k.json": lambda path: load_split("flickr8k", path.parent, "train"),
    "dataset_coco.json": lambda path: load_split("coco", path.parent, "train"),
    "captions_train2014.json": lambda path: load_split("coco", path.parent, "train"),
    "captions.jsonl": read_table,
    "captions.csv": read_table,
    "captions.tsv": read_table,
    "token.txt": read_token_file,
    "results.json": evaluate.read_captions,
    "vocabulary.json": Vocabulary.load,
}


@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"")
@example(content=b"image,caption\n" + b'"' * 999)
@example(content=b'{"images": [{"cocoid": 1e999, "split": "train"}]}')
@example(content=b'{"images": [{"filename": [], "split": "train", "sentences": []}]}')
@example(content=b'{"images": [{"id": 1, "file_name": 3}], "annotations": []}')
def test_a_reader_accepts_any_content_or_raises_one_clear_line(name, content, folder):
    path = folder / name.split(".")[0] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        READERS[name](path)
    except (ValueError, OSError) as error:
        assert str(path.parent) in str(error)
        assert program.one_line(str(error)).isprintable()


# --- words


@given(st.text(max_size=60))
@example("ﬁ İ ß ǆ")
@example("x\ud800y")
def test_splitting_any_caption_gives_printable_words_that_split_no_further(caption):
    found = split_words(caption)
    assert split_words(" ".join(found)) == found
    assert all(word.isprintable() and word.split() == [word] for word in found)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(0, 8))
def test_encode_keeps_the_known_words_of_any_caption_up_to_seq_len(captions, seq_len):
    known = sorted({word for caption in captions[:3] for word in split_words(caption)})
    vocabulary = Vocabulary(known)
    for caption in captions:
        tokens = vocabulary.encode(caption, seq_len)
        kept = split_words(caption)[:seq_len]
        assert len(tokens) == len(kept) + 2
        assert vocabulary.decode(tokens[1:]) == " ".join(w for w in kept if w in vocabulary.ids)


# --- decoding


SETTINGS = st.fixed_dictionaries(
    {"max_words": st.integers(1, 6), "no_repeat_ngram": st.integers(0, 3)}
)
TOYS = st.builds(
    Toy,
    words=st.integers(1, 6),
    seed=st.integers(0, 99),
    bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-50.0, -3.0, 0.0, 3.0, 50.0])),
)
MEMORY = st.builds(
    images, count=st.integers(1, 4), seed=st.integers(0, 99), end=st.sampled_from([-5.0, 0.0, 5.0])
)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@given(toy=TOYS, memory=MEMORY, settings=SETTINGS)
def test_every_caption_is_within_bounds_and_its_log_probability_is_correct(
    method, toy, memory, settings
):
    decoded = method(toy, memory, **settings)
    longest, ngram = settings["max_words"], settings["no_repeat_ngram"]
    for row, captions in enumerate(to_captions(decoded)):
        assert captions
        for place, caption in enumerate(captions):
            assert 1 <= len(caption) <= longest and min(caption) >= SPECIALS
            runs = (
                [caption[i : i + ngram] for i in range(len(caption) - ngram + 1)] if ngram else []
            )
            assert len(set(runs)) == len(runs)
            wanted = rescored(toy, memory[row : row + 1], caption)
            assert float(decoded.log_prob[row, place]) == pytest.approx(wanted, abs=1e-3, rel=1e-4)


@given(TOYS, MEMORY, SETTINGS, st.sampled_from([0.0, 0.7, 1.0]))
def test_beam_of_one_is_greedy_for_any_decoder(toy, memory, settings, penalty):
    beam = beam_search(toy, memory, beam_size=1, length_penalty=penalty, **settings)
    same(beam, greedy(toy, memory, **settings))


@pytest.mark.parametrize("method", ["greedy", "beam", "beam, mean", "wide beam"])
@given(toy=TOYS, memory=MEMORY, settings=SETTINGS)
def test_neither_batch_nor_order_changes_a_caption(method, toy, memory, settings):
    whole = METHODS[method](toy, memory, **settings)
    backwards = METHODS[method](toy, memory.flip(0), **settings)
    assert to_captions(backwards)[::-1] == to_captions(whole)
    for row in range(len(memory)):
        alone = METHODS[method](toy, memory[row : row + 1], **settings)
        assert to_captions(alone)[0] == to_captions(whole)[row]
        torch.testing.assert_close(alone.log_prob[0], whole.log_prob[row], atol=1e-4, rtol=1e-4)


@given(TOYS, MEMORY, st.integers(1, MAX_WORDS), st.integers(2, 12))
def test_the_captions_of_a_beam_are_distinct_and_ordered_by_score(
    toy, memory, max_words, beam_size
):
    decoded = beam_search(toy, memory, max_words=max_words, beam_size=beam_size, n=beam_size)
    for captions in to_captions(decoded):
        assert len(set(captions)) == len(captions)
    scores = decoded.log_prob
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())
