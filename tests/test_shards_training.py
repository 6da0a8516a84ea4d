"""An epoch of shards is each image once, in an order that only seed, epoch and rank decide."""

import math
from pathlib import Path

import pytest
import torch
from helpers.shards import as_img2dataset, copied, listed, served, write
from helpers.tiny import SMALL, assert_same_run, losses, run_code
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dataset
import shards
import train
from dataset import CaptionDataset, stream_loader
from encoder import image_transform
from readers import Record, load_split
from shards import Row
from util.images import read_image
from vocabulary import Vocabulary

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def written(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "made"
    write(drawn, folder)
    return folder


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(dataset, "BUFFER", 6)


def plan(counts: list[int], world: int, batch_size: int, **how) -> list[dataset.ShardStream]:
    """Return each rank's stream of shards of so many images."""
    rows = [
        Row(f"{shard}-{n}", Path(f"{shard}.tar/{n}.png"), ("a",))
        for shard, count in enumerate(counts)
        for n in range(count)
    ]
    loaders = [
        stream_loader(CaptionDataset(rows), "", batch_size, rank=rank, world=world, **how)
        for rank in range(world)
    ]
    return [loader.dataset for loader in loaders]


COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum)


@given(COUNTS, st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_ranks_divide_the_epoch_exactly_and_each_batch_is_full(counts, world, batch_size, seed):
    ranks = plan(counts, world, batch_size, seed=seed)
    ids = [row.image_id for rank in ranks for batch in rank.batches for row in batch]
    assert len(ids) == len(set(ids)) == sum(counts)
    sizes = [sum(map(len, step)) for step in zip(*(rank.batches for rank in ranks), strict=True)]
    assert all(size == batch_size for size in sizes[:-1])
    assert len(sizes) == math.ceil(sum(counts) / batch_size)
    shares = [sum(map(len, rank.batches)) for rank in ranks]
    assert max(shares) - min(shares) <= 1


@given(COUNTS, st.integers(1, 3), st.integers(0, 9))
def test_the_buffer_holds_no_more_images_than_it_may(counts, world, seed):
    for rank in plan(counts, world, 4, seed=seed):
        order = [row for batch in rank.batches for row in batch]
        assert all(rank.reading.index(row) < n + dataset.BUFFER for n, row in enumerate(order))


def test_orders_differ_by_epoch_and_seed_and_are_the_same_each_time():
    def order(seed: int, epoch: int) -> tuple[list, list]:
        """Return the order of the shards, and where in it the images of the batches are."""
        (stream,) = plan([5] * 9, 1, 4, seed=seed, epoch=epoch)
        names = [row.image_id for row in stream.reading]
        places = [names.index(row.image_id) for batch in stream.batches for row in batch]
        return names, places

    first, *others = (order(seed, epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0)))
    assert first == order(3, 0)
    for other in others:  # both the shards and the buffer
        assert first[0] != other[0] and first[1] != other[1]


# --- the images


def stream(root, cache_dir, **how):
    records = how.pop("records", None) or listed(root, cache_dir)
    words = Vocabulary.build((line for record in records for line in record.captions), 1)
    crop = how.pop("crop", False)
    items = CaptionDataset(
        records, words, 20, image_transform(32, train=crop), flip=crop, seed=how.get("seed", 0)
    )
    batch_size = how.pop("batch_size", 5)
    return stream_loader(items, root, batch_size, **how)


def flat(batches) -> dict:
    """Return image id → pixels and captions' tokens."""
    return {
        name: (pixels, batch.tokens[batch.owner == row])
        for batch in batches
        for row, (name, pixels) in enumerate(zip(batch.image_ids, batch.inputs, strict=True))
    }


def same(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[k][0], second[k][0]) for k in first
    )


def test_a_stream_gives_the_pixels_and_captions_of_the_files(written, drawn, tmp_path):
    found = flat(stream(written, tmp_path))
    transform = image_transform(32, train=False)
    records = load_split("shapes", drawn, "train")
    words = Vocabulary.build((line for record in records for line in record.captions), 1)
    assert len(found) == len(records) == 24
    for record in records:
        pixels, tokens = found[record.image_id]
        assert torch.equal(pixels, transform(read_image(record.path)))
        assert tuple(map(words.decode, tokens.tolist())) == record.captions


def test_a_stream_reads_a_large_jpeg_as_files_are_read(tmp_path):
    path, transform = tmp_path / "noise.jpg", image_transform(32, train=False)
    Image.effect_noise((400, 300), 90).convert("RGB").save(path)
    records = [Record("noise.jpg", path, ("a",))]
    shards.write_shards({"train": records}, tmp_path / "shards", "shapes")
    data = CaptionDataset(listed(tmp_path / "shards", tmp_path), transform=transform)
    (batch,) = stream_loader(data, tmp_path / "shards", 4)
    assert torch.equal(batch.inputs[0], transform(read_image(path, 32)))
    assert not torch.equal(batch.inputs[0], transform(read_image(path)))


@pytest.mark.parametrize("crop", [False, True])
def test_workers_change_nothing(crop, written, tmp_path):
    plain = flat(stream(written, tmp_path, crop=crop, seed=4))
    assert same(plain, flat(stream(written, tmp_path, crop=crop, seed=4, workers=3)))
    assert list(plain) != list(flat(stream(written, tmp_path, crop=crop, seed=5)))


def test_skipped_batches_leave_the_others_as_they_were(written, tmp_path):
    complete = stream(written, tmp_path, crop=True)
    rest = stream(written, tmp_path, crop=True, skip=3)
    assert len(complete) == 5 and len(rest) == 2
    assert same(flat(list(complete)[3:]), flat(rest))
    assert len(stream(written, tmp_path, skip=5)) == 0
    assert not list(stream(written, tmp_path, skip=5))


def test_ranks_read_different_images_and_together_all(written, tmp_path):
    ids = [
        list(flat(stream(written, tmp_path, rank=rank, world=5, batch_size=10)))
        for rank in range(5)
    ]
    assert sorted(map(len, ids)) == [4, 5, 5, 5, 5] and len(set().union(*ids)) == 24


def test_the_parts_of_a_batch_are_the_batch_and_may_be_empty(written, tmp_path):
    batches = list(stream(written, tmp_path, world=3, batch_size=5))
    parts = list(stream(written, tmp_path, world=3, batch_size=5, accumulate=2))
    assert len(parts) == 10
    for step, batch in enumerate(batches):
        both = parts[2 * step].image_ids + parts[2 * step + 1].image_ids
        assert sorted(both) == sorted(batch.image_ids)
    empty = [part for part in parts if not part.image_ids]
    assert empty and all(len(part.inputs) == len(part.tokens) == 0 for part in empty)


def test_only_the_shards_that_are_needed_are_opened(written, tmp_path, monkeypatch):
    opened, original = [], shards.read_tar

    def read_tar(root, shard, wanted):
        opened.append(shard)
        return original(root, shard, wanted)

    monkeypatch.setattr(shards, "read_tar", read_tar)
    flat(stream(written, tmp_path))
    assert len(opened) == 3
    for how in ({"rank": 0, "world": 3}, {"skip": 4}):
        opened.clear()
        flat(stream(written, tmp_path, **how))
        assert 0 < len(opened) < 3
    opened.clear()
    flat(stream(written, tmp_path, records=listed(written, tmp_path)[:10]))
    assert opened == ["train-000000.tar"]


def test_missing_images_are_left_out_and_too_many_are_an_error(
    written, tmp_path, monkeypatch, caplog
):
    folder = copied(written, tmp_path / "made")
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-15_000])
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"^\d+ of 24 images of the shards can't be read: .*p"):
            list(stream(folder, tmp_path, workers=workers))
    monkeypatch.setattr("util.images.MAX_LEFT_OUT", 0.5)
    assert 14 < len(flat(stream(folder, tmp_path))) < 24
    assert "train-000001.tar is damaged" in caplog.text
    assert "images of the shards can't be read" in caplog.text


def test_a_shard_that_is_gone_is_one_clear_error(written, tmp_path):
    folder = copied(written, tmp_path / "made")
    (folder / "train-000001.tar").unlink()
    for workers in (0, 1):
        with pytest.raises(FileNotFoundError, match=r"train-000001\.tar"):
            list(stream(folder, tmp_path, workers=workers))


def test_training_images_may_come_from_an_address(written, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(Path(written)) as address:
        found = flat(stream(address, tmp_path, workers=1))
    assert same(found, flat(stream(written, tmp_path)))


def test_a_folder_of_img2dataset_is_streamed(drawn, tmp_path):
    expected = as_img2dataset(drawn, tmp_path / "laion")
    found = flat(stream(tmp_path / "laion", tmp_path / "cache"))
    assert found.keys() == expected.keys()


# --- training

STREAMED = [*SMALL[2:], "--dataset", "shards", "--cnn-backbone", "tiny", "--cnn-weights", "none",
            "--img-size", "64", "--min-count", "1", "--no-augment", "--workers", "1"]  # fmt: skip
STOPPED = """
    import os, signal, sys
    import train, trainer
    from util import program
    finish_step = trainer.Trainer.finish_step
    def stopping(self, words):
        finish_step(self, words)
        if self.step_number == 8:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Trainer.finish_step = stopping
    program.run(lambda: train.main(sys.argv[1:]))
"""


def test_a_run_from_shards_learns_scores_and_resumes_exactly(written, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BUFFER", 1000)  # as in the process that is stopped
    place = ["--data-dir", str(written), "--cache-dir", str(tmp_path / "cache")]
    train.main([*STREAMED, *place, "--output", str(tmp_path / "complete")])
    assert len(losses(tmp_path / "complete")) == 2
    assert (tmp_path / "complete/scores.json").exists()
    stopped = run_code(STOPPED, *STREAMED, *place, "--output", str(tmp_path / "run"))
    assert stopped.returncode == 130, stopped.stderr
    train.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", tmp_path / "complete")


def test_views_need_a_cache(written, tmp_path):
    with pytest.raises(ValueError, match="--views 2 is for a feature cache"):
        train.main([*STREAMED, "--views", "2", "--data-dir", str(written),
                    "--output", str(tmp_path / "run")])  # fmt: skip
