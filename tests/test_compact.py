"""Flat arrays hold what lists and dicts of Python objects would, in far less memory."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact import Gathered, Places, Texts

LINES = st.lists(st.text(st.characters()))  # lone surrogates too: names of files may have them


@given(LINES)
def test_texts_are_the_strings_they_were(lines):
    for texts in (Texts(lines), Texts(lines).pack(), pickle.loads(pickle.dumps(Texts(lines)))):
        assert list(texts) == lines and texts == lines and len(texts) == len(lines)
        assert [texts[-1 - place] for place in range(len(lines))] == lines[::-1]
        with pytest.raises(IndexError):
            texts[len(lines)]


def test_texts_differ_where_lists_would():
    assert Texts(["a", "b"]) != ["a", "c"] and Texts(["a"]) != ["a", "b"] and Texts(["a"]) != "a"


def test_a_short_line_takes_its_letters_and_four_bytes():
    texts = Texts("a dog" for _ in range(100_000)).pack()
    assert len(pickle.dumps(texts)) < 9.1 * 100_000


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.text(max_size=3), max_size=3))))
def test_captions_gathered_are_a_dict_of_lists(rows):
    gathered, expected = Gathered(), {}
    for name, lines in rows:
        gathered.add(name, *lines)
        expected.setdefault(name, []).extend(lines)
    assert gathered == expected and list(gathered) == list(expected)
    assert gathered.get(9, "none") == "none" and (9 in gathered) is False


def test_captions_may_be_added_after_some_were_read():
    gathered = Gathered()
    gathered.add("a", "one")
    assert gathered["a"] == ["one"]
    gathered.add("b", "two")
    gathered.add("a", "three")
    assert gathered == {"a": ["one", "three"], "b": ["two"]}


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.booleans().map(int), unique=True))
def test_places_are_a_dicts_for_numbers(ids):
    places = Places(ids)
    assert [places.find(one) for one in ids] == list(range(len(ids))) and len(places) == len(ids)


@given(st.lists(st.text(), unique=True))
def test_places_are_a_dicts_for_names_and_leave_out_what_they_shall(ids):
    out = set(ids[::3])
    places = Places(ids, without=out)
    for row, one in enumerate(ids):
        assert places.find(one) == (None if one in out else row)
    assert places.find("no such name at all") is None and len(places) == len(ids) - len(out)


def test_two_ids_with_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr("compact._hash", lambda one: 7)
    places = Places(["a", "b", "c"], without={"b"})
    assert [places.find(one) for one in ("a", "b", "c", "d")] == [0, None, 2, None]
