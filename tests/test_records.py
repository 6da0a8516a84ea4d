"""Records held in flat arrays are the records themselves, in a tenth of the memory."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from readers import Record, Records

FOLDERS = [Path("data/one"), Path("/else where/two")]
CAPTIONS = st.lists(st.text(max_size=9), max_size=4).map(tuple)
NAMES = st.text("abc.é\udcff", min_size=1, max_size=6).filter(lambda name: name.strip("."))


def listed(names, rows) -> list[Record]:
    return [
        Record(one, FOLDERS[number % 2] / str(one), lines)
        for number, (one, lines) in enumerate(zip(names, rows, strict=False))
    ]


MADE = st.builds(
    listed,
    st.lists(NAMES, unique=True) | st.lists(st.integers(0, 2**62), unique=True),
    st.lists(CAPTIONS),
)


@given(MADE, st.slices(12), st.sets(st.integers(0, 11)))
def test_records_slices_and_selections_are_those_of_a_list(plain, part, chosen):
    packed = Records.of(plain)
    assert packed == plain and list(packed) == plain and plain == packed
    assert packed[part] == plain[part] and packed[part][::-1] == plain[part][::-1]
    chosen = [place for place in sorted(chosen, reverse=True) if place < len(plain)]
    assert packed.take(chosen) == [plain[place] for place in chosen]
    ids = {plain[place].image_id for place in chosen}
    assert packed.keep(ids) == [record for record in plain if record.image_id in ids]
    assert list(packed[part].image_ids) == [record.image_id for record in plain[part]]
    assert pickle.loads(pickle.dumps(packed[part])) == plain[part]
    assert Records.of(packed) is packed


@pytest.mark.parametrize("records", [Records.of([]), Records.of([Record("a", Path("a"), ())])])
def test_there_is_no_record_after_the_last(records):
    for place in (len(records), -len(records) - 1):
        with pytest.raises(IndexError):
            records[place]


def test_other_ids_leave_the_files_as_they_are():
    plain = listed(["a.jpg", "b/c.jpg"], [("x",), ("y", "z")])
    renamed = Records.of(plain).with_ids([7, 9])
    assert renamed == [plain[0]._replace(image_id=7), plain[1]._replace(image_id=9)]
    assert renamed.with_ids(["u", "v"])[1] == plain[1]._replace(image_id="v")


def test_a_path_below_the_folder_is_found_there():
    records = Records()
    records.add("b/c.jpg", Path("data"), "b/c.jpg", ["x"])
    assert records.pack() == [Record("b/c.jpg", Path("data/b/c.jpg"), ("x",))]


def test_a_caption_takes_its_letters_and_few_bytes_more():
    said = "a brown dog is running through the grass with a red ball"
    plain = [Record(f"{n:08}.jpg", Path(f"data/{n:08}.jpg"), (said,) * 5) for n in range(4000)]
    assert len(pickle.dumps(Records.of(plain))) / (5 * 4000) < len(said) + 10
