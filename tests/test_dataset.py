"""Batches hold all captions of their images, and depend on the seed and the epoch alone."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset import (
    CaptionDataset,
    collate_fn,
    describe_changes,
    digest_records,
    get_loader,
)
from encoder import image_transform
from readers import Record
from util.images import read_image
from util.seeding import derive_seed
from vocabulary import PAD, Vocabulary

LINES = ["a dog runs .", "a dog and a cat", "The dog's ball , red", "zebra"]
VOCABULARY = Vocabulary.build(LINES, 1)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    """Eleven images that are not symmetric; a caption of every third one mentions a side."""
    folder = tmp_path_factory.mktemp("images")
    made = []
    for number in range(11):
        image = Image.linear_gradient("L").rotate(90).resize((60, 40)).convert("RGB")
        image.putpixel((0, 0), (number, 0, 0))
        image.save(folder / f"{number}.png")
        second = "a dog on the Left side" if number % 3 == 0 else f"a dog {number}"
        captions = ("a cat", second, *["zebra"] * (number % 4))
        made.append(Record(f"{number}.png", folder / f"{number}.png", captions))
    return made


def load_batches(records, *, flip=False, crop=False, batch_size=4, seed=0, **settings) -> list:
    """Return an epoch's batches; `settings` are those of `get_loader`."""
    transform = image_transform(32, train=crop)
    dataset = CaptionDataset(records, VOCABULARY, 5, transform, flip=flip, seed=seed)
    return list(get_loader(dataset, batch_size, seed=seed, **settings))


def pixels_by_id(batches) -> dict:
    return {
        image_id: pixels
        for batch in batches
        for image_id, pixels in zip(batch.image_ids, batch.inputs, strict=True)
    }


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- pixels


@pytest.mark.parametrize("crop", [False, True])
def test_a_large_jpeg_is_decoded_no_larger_than_a_random_crop_needs(crop, tmp_path, monkeypatch):
    path, given = tmp_path / "noise.jpg", []
    Image.effect_noise((800, 600), 90).convert("RGB").save(path)
    transform = image_transform(64, train=crop)
    resize = transform.resize
    monkeypatch.setattr(transform, "resize", lambda image: [given.append(image), resize(image)][1])
    item = CaptionDataset([], transform=transform).item(Record("a", path, ("a",)))
    assert given[0].size == (200, 150) and item[1].shape == (3, 64, 64)
    if not crop:
        assert torch.equal(item[1], transform(read_image(path, 64)))


# --- batches


def test_a_batch_holds_all_captions_of_its_images(records):
    batch = load_batches(records)[1]
    assert batch.image_ids == ["4.png", "5.png", "6.png", "7.png"]
    assert batch.inputs.shape == (4, 3, 32, 32) and batch.tokens.dtype == torch.int64
    assert batch.owner.tolist() == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 5
    captions = [caption for record in records[4:8] for caption in record.captions]
    for row, caption in zip(batch.tokens.tolist(), captions, strict=True):
        tokens = VOCABULARY.encode(caption, 5)
        assert row == tokens + [PAD] * (len(row) - len(tokens))


def test_negative_indices_count_from_the_end(records):
    dataset = CaptionDataset(records, VOCABULARY, 5, image_transform(32, train=False))
    (first_id, first, first_tokens), (last_id, last, last_tokens) = dataset[10], dataset[-1]
    assert first_id == last_id == "10.png"
    assert torch.equal(first, last) and first_tokens == last_tokens


def test_a_batch_of_no_items_is_empty():
    batch = collate_fn([])
    assert batch.image_ids == [] and batch.inputs.shape == (0,)
    assert batch.tokens.shape == (0, 1) and batch.tokens.dtype == torch.int64
    assert batch.owner.shape == (0,) and batch.owner.dtype == torch.int64


def test_captions_are_padded_to_the_longest_of_the_batch():
    items = [("x", torch.zeros(1), [[1, 4, 2], [1, 2]]), ("y", torch.zeros(1), [[1, 5, 2]])]
    assert collate_fn(items).tokens.tolist() == [[1, 4, 2], [1, 2, 0], [1, 5, 2]]


def test_without_a_vocabulary_there_are_pixels_and_no_tokens(records):
    dataset = CaptionDataset(records, transform=image_transform(32, train=False))
    batch = next(iter(get_loader(dataset, 3)))
    assert batch.tokens.shape == (0, 1) and batch.owner.shape == (0,)
    assert batch.inputs.shape == (3, 3, 32, 32) and len(batch.image_ids) == 3


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 2), (3, 2), (5, 1)])
def test_ranks_and_micro_batches_share_each_batch(records, world, accumulate):
    settings = {"shuffle": True, "seed": 5, "epoch": 2, "skip": 1}
    expected = [batch.image_ids for batch in load_batches(records, **settings)]
    assert len(expected) == 2 and len(expected[-1]) == 3
    by_rank = [
        load_batches(records, **settings, rank=rank, world=world, accumulate=accumulate)
        for rank in range(world)
    ]
    assert {len(batches) for batches in by_rank} == {accumulate * len(expected)}
    for step, image_ids in enumerate(expected):
        first = step * accumulate
        parts = [part for batches in by_rank for part in batches[first : first + accumulate]]
        assert sorted(name for part in parts for name in part.image_ids) == sorted(image_ids)
        for part in parts:  # some are empty
            assert len(part.inputs) == len(part.image_ids) == len(part.owner.unique())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_images_gets_empty_batches(workers, records):
    settings = {"batch_size": 2, "world": 3, "rank": 2, "accumulate": 2, "workers": workers}
    batches = load_batches(records[:3], **settings)
    assert len(batches) == 4
    assert all(batch.image_ids == [] and batch.tokens.shape == (0, 1) for batch in batches)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_every_image_is_used_once_per_epoch(records, shuffle, size):
    batches = load_batches(records, batch_size=size, shuffle=shuffle)
    ids = [name for batch in batches for name in batch.image_ids]
    assert sorted(ids) == sorted(record.image_id for record in records)
    assert len(batches) == -(-len(records) // size)  # the last may be smaller
    assert shuffle or ids == [record.image_id for record in records]


def test_the_order_depends_on_seed_and_epoch_alone(records):
    def order(**settings):
        return [batch.image_ids for batch in load_batches(records, shuffle=True, **settings)]

    torch.manual_seed(0)
    first = order(seed=1, epoch=2)
    torch.manual_seed(7)
    assert first == order(seed=1, epoch=2) == order(seed=1, epoch=2, workers=2)
    assert first != order(seed=2, epoch=2) and first != order(seed=1, epoch=3)


@pytest.mark.parametrize("skip", [1, 2, 3, 9])
def test_skip_continues_an_interrupted_epoch(records, skip):
    settings = {"shuffle": True, "epoch": 5, "flip": True, "crop": True}
    expected = load_batches(records, **settings)[skip:]
    for ours, theirs in zip(load_batches(records, skip=skip, **settings), expected, strict=True):
        assert ours.image_ids == theirs.image_ids
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.tokens, theirs.tokens)


def test_augmentation_depends_on_seed_epoch_and_image_alone(records):
    def pixels(records, **settings):
        return pixels_by_id(load_batches(records, flip=True, crop=True, **settings))

    first = pixels(records)
    assert same(first, pixels(records, workers=2))
    assert same(first, pixels(records, shuffle=True, batch_size=3))
    assert same(first, pixels(records[::-1]))
    assert not same(first, pixels(records, epoch=1))
    assert not same(first, pixels(records, seed=1))


def test_loaders_of_two_epochs_do_not_disturb_each_other(records):
    dataset = CaptionDataset(records, VOCABULARY, 5, image_transform(32, train=True), flip=True)
    first, second = (get_loader(dataset, 4, epoch=epoch) for epoch in (0, 1))
    alone = pixels_by_id(get_loader(dataset, 4, epoch=0))
    assert same(pixels_by_id(first), alone) and not same(pixels_by_id(second), alone)
    assert dataset.epoch == 0


def test_augmentation_does_not_change_torchs_generator(records):
    dataset = CaptionDataset(records, VOCABULARY, 5, image_transform(32, train=True), flip=True)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    _ = dataset[0], dataset[1]
    assert torch.equal(torch.rand(3), expected)


def test_half_of_the_images_are_mirrored_but_none_whose_captions_mention_a_side(records):
    plain = pixels_by_id(load_batches(records))
    times_mirrored = dict.fromkeys(plain, 0)
    for epoch in range(20):
        for name, pixels in pixels_by_id(load_batches(records, flip=True, epoch=epoch)).items():
            mirrored = torch.equal(pixels, plain[name].flip(-1))
            assert mirrored or torch.equal(pixels, plain[name])
            times_mirrored[name] += mirrored
    sided = [record.image_id for record in records if "Left" in record.captions[1]]
    assert [times_mirrored.pop(name) for name in sided] == [0] * 4
    assert all(2 <= count <= 18 for count in times_mirrored.values())
    assert 45 <= sum(times_mirrored.values()) <= 95


@pytest.mark.parametrize(
    ("caption", "mentions_side"),
    [("to the RIGHT .", True), ("left-hand", True), ("a lefthanded man", True), ("rightmost", True),
     ("upright", False), ("bright cleft", False), ("the leftovers", False)],
)  # fmt: skip
def test_left_and_right_count_only_as_separate_words(caption, mentions_side, records):
    record = records[1]._replace(captions=("a cat", caption))
    batches = [load_batches([record], flip=True, epoch=epoch)[0] for epoch in range(12)]
    never_mirrored = all(torch.equal(batch.inputs, batches[0].inputs) for batch in batches)
    assert never_mirrored == mentions_side


def test_an_image_is_not_mirrored_either_where_an_epoch_leaves_the_side_out(records):
    lines = ("a cat on the left", *(f"a dog {number}" for number in range(500)))
    record = records[1]._replace(captions=lines)
    first, *others = (load_batches([record], flip=True, epoch=epoch)[0] for epoch in range(12))
    assert all(torch.equal(batch.inputs, first.inputs) for batch in others)


def test_with_features_no_image_is_read(records):
    class Features:
        def get(self, image_id, view=0):
            return torch.full((2, 3), float(image_id.split(".")[0]))

    gone = [record._replace(path=record.path.with_name("gone.png")) for record in records]
    dataset = CaptionDataset(gone, VOCABULARY, 5, features=Features(), flip=True)
    batch = list(get_loader(dataset, 4))[1]
    assert batch.inputs.shape == (4, 2, 3) and batch.inputs[:, 0, 0].tolist() == [4, 5, 6, 7]


def test_each_epoch_has_a_random_view_but_no_mirrored_one_where_captions_mention_a_side(records):
    class Features:
        def get(self, image_id, view=0):
            return torch.tensor([[float(view)]])

    sided = records[1]._replace(captions=("a cat on the left",))
    plain = records[0]._replace(captions=("a cat",))
    dataset = CaptionDataset([plain, sided], VOCABULARY, 5, features=Features(), views=4)

    def views(epoch):
        (batch,) = get_loader(dataset, 2, epoch=epoch)
        return batch.inputs.flatten().tolist()

    of_plain, of_sided = zip(*map(views, range(60)), strict=True)
    assert set(of_plain) == {0, 1, 2, 3} and set(of_sided) == {0, 2}
    assert all(of_plain.count(view) > 5 for view in range(4))
    assert views(7) == [of_plain[7], of_sided[7]]


def test_an_empty_dataset_has_no_batches():
    loader = get_loader(CaptionDataset([], VOCABULARY), 4, shuffle=True, workers=2)
    assert len(loader) == 0 and list(loader) == []


def test_each_epoch_has_other_captions_of_an_image_with_thousands(records):
    lines = tuple(f"a dog {number}" for number in range(5000))
    many = [records[0]._replace(captions=lines), records[1]]
    vocabulary = Vocabulary.build(lines, 1)
    seen = []
    for epoch in (0, 0, 1):
        dataset = CaptionDataset(many, vocabulary, 5, image_transform(32, train=False))
        (batch,) = get_loader(dataset, 2, epoch=epoch)
        assert batch.owner.tolist() == [0] * 50 + [1] * len(records[1].captions)
        seen.append({vocabulary.decode(row[1:]) for row in batch.tokens[:50]})
    assert seen[0] == seen[1] != seen[2]
    assert all(len(each) == 50 and each <= set(lines) for each in seen)


def test_a_batch_size_below_one_is_an_error(records):
    with pytest.raises(ValueError, match="batch size 0 must be at least 1"):
        get_loader(CaptionDataset(records), 0)


def test_derived_seeds_are_distinct_and_constant():
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, "a.jpg") == derive_seed("1", "a.jpg") != derive_seed(1, "b.jpg")


def test_changes_of_the_data_are_counted():
    path = Path("x")
    before = [Record(name, path, (f"a {name}", "b")) for name in ("one", "two", "three", 4)]
    digests = digest_records(before)
    assert digests.shape == (4, 2) and describe_changes(digests, digests) == ""
    shuffled = [record._replace(captions=record.captions[::-1]) for record in before]
    assert describe_changes(digests, digest_records(shuffled)) == ""
    assert describe_changes(digests, digest_records(before[::-1])) == "images in another order"
    now = [before[0], before[1]._replace(captions=("a two", "c")), Record("five", path, ("d",))]
    now.append(Record("six", path, ("d",)))
    expected = "images: 2 added, 2 removed, 1 with other captions"
    assert describe_changes(digests, digest_records(now)) == expected
    assert describe_changes(digests, digest_records([])) == "images: 4 removed"
