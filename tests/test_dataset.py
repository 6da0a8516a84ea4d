"""Batches that depend on nothing but the seed and the epoch."""

import pytest
import torch
from PIL import Image

from config import DataConfig
from dataset import CaptionDataset, collate_fn, get_loader
from encoder import image_transform
from readers import Record
from util.seeding import derive_seed
from vocabulary import PAD, Vocabulary

LINES = ["a dog runs .", "a dog and a cat", "The dog's ball , red", "zebra"]
VOCABULARY = Vocabulary.build(LINES, 1)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    """Eleven pictures with left and right sides that differ; every third caption names a side."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(11):
        picture = Image.linear_gradient("L").rotate(90).resize((60, 40)).convert("RGB")
        picture.putpixel((0, 0), (number, 0, 0))
        picture.save(folder / f"{number}.png")
        said = "a dog on the Left side" if number % 3 == 0 else f"a dog {number}"
        captions = ("a cat", said, *["zebra"] * (number % 4))
        made.append(Record(f"{number}.png", folder / f"{number}.png", captions))
    return made


def batches(records, **how) -> list:
    keys = ("batch_size", "shuffle", "seed", "epoch", "skip", "workers", "rank", "world",
            "accumulate")  # fmt: skip
    order = {key: how.pop(key) for key in keys if key in how}
    transform = image_transform(32, train=how.pop("crop", False))
    dataset = CaptionDataset(records, VOCABULARY, 5, transform, **how)
    return list(get_loader(dataset, **{"batch_size": 4, **order}))


def pixels_by_id(found) -> dict:
    return {
        name: row
        for batch in found
        for name, row in zip(batch.image_ids, batch.inputs, strict=True)
    }


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- batches


def test_a_batch_holds_all_captions_of_its_images(records):
    batch = batches(records)[1]
    assert batch.image_ids == ["4.png", "5.png", "6.png", "7.png"]
    assert batch.inputs.shape == (4, 3, 32, 32) and batch.tokens.dtype == torch.int64
    assert batch.references == [list(record.captions) for record in records[4:8]]
    assert batch.owner.tolist() == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 5
    lines = [line for captions in batch.references for line in captions]
    for row, line in zip(batch.tokens.tolist(), lines, strict=True):
        tokens = VOCABULARY.encode(line, 5)
        assert row == tokens + [PAD] * (len(row) - len(tokens))


def test_padding_goes_no_further_than_the_longest_caption():
    items = [("x", torch.zeros(1), [[1, 4, 2], [1, 2]], []), ("y", torch.zeros(1), [[1, 5, 2]], [])]
    assert collate_fn(items).tokens.tolist() == [[1, 4, 2], [1, 2, 0], [1, 5, 2]]


def test_without_a_vocabulary_there_are_pixels_and_no_tokens(records):
    dataset = CaptionDataset(records, transform=image_transform(32, train=False))
    batch = next(iter(get_loader(dataset, 3)))
    assert batch.tokens.shape == (0, 0) and batch.owner.shape == (0,)
    assert batch.inputs.shape == (3, 3, 32, 32) and len(batch.references) == 3


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 2), (3, 2), (5, 1)])
def test_processes_and_parts_share_each_batch(records, world, accumulate):
    how = {"shuffle": True, "seed": 5, "epoch": 2, "skip": 1, "batch_size": 4}
    whole = [batch.image_ids for batch in batches(records, **how)]
    assert len(whole[-1]) == 3  # fewer images than parts
    shares = [
        batches(records, **how, rank=rank, world=world, accumulate=accumulate)
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {accumulate * len(whole)}
    for number, wanted in enumerate(whole):
        parts = [
            part
            for share in shares
            for part in share[number * accumulate : (number + 1) * accumulate]
        ]
        assert sorted(name for part in parts for name in part.image_ids) == sorted(wanted)
        for part in parts:  # a borrowed image has no name, but pixels and captions
            assert len(part.inputs) == max(1, len(part.image_ids)) and len(part.tokens)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_every_image_comes_once_an_epoch_the_last_partial_batch_included(records, shuffle, size):
    found = batches(records, batch_size=size, shuffle=shuffle)
    ids = [name for batch in found for name in batch.image_ids]
    assert sorted(ids) == sorted(record.image_id for record in records)
    assert len(found) == -(-len(records) // size)
    assert shuffle or ids == [record.image_id for record in records]


def test_the_order_depends_on_seed_and_epoch_alone(records):
    def order(**how):
        torch.manual_seed(how.pop("noise", 0))
        return [batch.image_ids for batch in batches(records, shuffle=True, **how)]

    first = order(seed=1, epoch=2)
    assert first == order(seed=1, epoch=2, noise=7) == order(seed=1, epoch=2, workers=2)
    assert first != order(seed=2, epoch=2) and first != order(seed=1, epoch=3)


@pytest.mark.parametrize("skip", [1, 2, 3, 9])
def test_skipping_batches_leaves_the_tail_of_the_epoch(records, skip):
    how = {"shuffle": True, "epoch": 5, "flip": True, "crop": True}
    whole, tail = batches(records, **how), batches(records, skip=skip, **how)
    assert [batch.image_ids for batch in tail] == [batch.image_ids for batch in whole[skip:]]
    for ours, theirs in zip(tail, whole[skip:], strict=True):
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.tokens, theirs.tokens)


def test_augmentation_depends_on_seed_epoch_and_image_alone(records):
    how = {"flip": True, "crop": True, "seed": 0}
    plain = pixels_by_id(batches(records, **how))
    assert same(plain, pixels_by_id(batches(records, workers=2, **how)))
    assert same(plain, pixels_by_id(batches(records, shuffle=True, batch_size=3, **how)))
    assert same(plain, pixels_by_id(batches(records[::-1], **how)))
    assert not same(plain, pixels_by_id(batches(records, epoch=1, **how)))


def test_loaders_of_two_epochs_do_not_disturb_each_other(records):
    dataset = CaptionDataset(records, VOCABULARY, 5, image_transform(32, train=True), flip=True)
    first, second = (get_loader(dataset, 4, epoch=epoch) for epoch in (0, 1))
    alone = pixels_by_id(get_loader(dataset, 4, epoch=0))
    assert same(pixels_by_id(first), alone) and not same(pixels_by_id(second), alone)
    assert dataset.epoch == 0


def test_reading_images_leaves_torchs_own_chance_alone(records):
    dataset = CaptionDataset(records, VOCABULARY, 5, image_transform(32, train=True), flip=True)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    _ = dataset[0], dataset[1]
    assert torch.equal(torch.rand(3), expected)


def test_half_of_the_images_are_mirrored_but_none_that_speak_of_sides(records):
    plain = pixels_by_id(batches(records))
    mirrored = dict.fromkeys(plain, 0)
    for epoch in range(20):
        for name, pixels in pixels_by_id(batches(records, flip=True, epoch=epoch)).items():
            turned = torch.equal(pixels, plain[name].flip(-1))
            assert turned or torch.equal(pixels, plain[name])
            mirrored[name] += turned
    sided = [record.image_id for record in records if "Left" in record.captions[1]]
    assert [mirrored[name] for name in sided] == [0] * 4
    free = [count for name, count in mirrored.items() if name not in sided]
    assert all(2 <= count <= 18 for count in free) and 45 <= sum(free) <= 95


@pytest.mark.parametrize(
    ("caption", "speaks"),
    [("to the RIGHT .", True), ("left-hand", True), ("a lefthanded man", True), ("rightmost", True),
     ("upright", False), ("bright cleft", False), ("the leftovers", False)],
)  # fmt: skip
def test_sides_are_words_of_their_own(caption, speaks, records):
    record = records[1]._replace(captions=("a cat", caption))
    shown = [
        CaptionDataset([record], None, 5, image_transform(32, train=False), flip=True, epoch=e)[0][
            1
        ]
        for e in range(12)
    ]
    assert all(torch.equal(pixels, shown[0]) for pixels in shown) == speaks


def test_features_take_the_place_of_pixels(records):
    class Features:
        def get(self, image_id, view=0):
            return torch.full((2, 3), float(image_id.split(".")[0]))

    gone = [record._replace(path=record.path.with_name("gone.png")) for record in records]
    dataset = CaptionDataset(gone, VOCABULARY, 5, features=Features(), flip=True)
    batch = list(get_loader(dataset, 4))[1]
    assert batch.inputs.shape == (4, 2, 3) and batch.inputs[:, 0, 0].tolist() == [4, 5, 6, 7]


def test_a_view_is_drawn_each_epoch_and_none_mirrored_of_what_has_sides(records):
    class Features:
        def get(self, image_id, view=0):
            return torch.tensor([[float(view)]])

    sided = records[1]._replace(captions=("a cat on the left",))
    plain = records[0]._replace(captions=("a cat",))
    dataset = CaptionDataset([plain, sided], VOCABULARY, 5, features=Features(), views=4)
    seen = [
        next(iter(get_loader(dataset, 2, epoch=e))).inputs.flatten().tolist() for e in range(60)
    ]
    free, bound = zip(*seen, strict=True)
    assert set(free) == {0, 1, 2, 3} and set(bound) == {0, 2}
    assert all(free.count(view) > 5 for view in range(4))
    again = next(iter(get_loader(dataset, 2, epoch=7))).inputs.flatten().tolist()
    assert again == seen[7]


def test_an_empty_dataset_has_no_batches():
    loader = get_loader(CaptionDataset([], VOCABULARY), 4, shuffle=True, workers=2)
    assert len(loader) == 0 and list(loader) == []


def test_of_thousands_of_captions_each_epoch_has_others(records):
    lines = tuple(f"a dog {number}" for number in range(5000))
    many = [records[0]._replace(captions=lines), records[1]]
    vocabulary = Vocabulary.build(lines, 1)
    seen = []
    for epoch in (0, 0, 1):
        dataset = CaptionDataset(many, vocabulary, 5, image_transform(32, train=False))
        (batch,) = get_loader(dataset, 2, epoch=epoch)
        assert batch.owner.tolist() == [0] * 50 + [1] * len(records[1].captions)
        assert batch.references == [list(lines), list(records[1].captions)]
        seen.append({vocabulary.decode(row[1:]) for row in batch.tokens[:50]})
    assert seen[0] == seen[1] != seen[2]
    assert all(len(each) == 50 and each <= set(lines) for each in seen)


def test_a_batch_size_below_one_is_an_error(records):
    with pytest.raises(ValueError, match="batch size 0 must be at least 1"):
        get_loader(CaptionDataset(records), 0)


def test_mixed_seeds_differ_and_stay():
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3) and derive_seed(1, "a.jpg") == derive_seed(
        1, "a.jpg"
    ) != derive_seed(1, "b.jpg")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("limit", 0, "--limit 0 must be at least 1"), ("limit", -5, "at least 1"),
     ("min_count", 0, "--min-count 0 must"), ("views", 0, "--views 0 must"),
     ("workers", -1, "--workers -1 must be at least 0"),
     ("train_fraction", 0.0, "--train-fraction 0.0 must be above 0"),
     ("train_fraction", 1.5, "at most 1"), ("train_fraction", float("nan"), "at most 1")],
)  # fmt: skip
def test_flags_out_of_range_name_themselves(flag, value, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**{flag: value})
