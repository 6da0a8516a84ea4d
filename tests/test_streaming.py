"""A stream is the whole epoch, once, in an order that only seed, epoch and rank decide."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import SMALL, assert_same_run, losses, run_code
from hypothesis import given
from hypothesis import strategies as st
from test_shards import copied, served, written  # noqa: F401

import readers
import shards
import streaming
import train
from dataset import CaptionDataset
from encoder import image_transform
from readers import load_split
from streaming import cut, mixed, segments, stream_loader
from util.images import read_image
from util.seeding import seeded_generator
from vocabulary import Vocabulary

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=8)


def epoch(counts, world: int, batch_size: int = 4, **how) -> list[list[np.ndarray]]:
    """Return every rank's batches of rows."""
    ranks = []
    for rank in range(world):
        parts = segments(counts, rank=rank, world=world, **how)
        rows = np.array([row for _, start, stop in parts for row in range(start, stop)], np.int64)
        rows = mixed(rows, seeded_generator(rank), 5)
        ranks.append(cut(rows, sum(counts), batch_size, rank, world))
    return ranks


@given(COUNTS, st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_ranks_part_the_epoch_exactly_and_each_batch_is_whole(counts, world, batch_size, seed):
    ranks = epoch(counts, world, batch_size, seed=seed, epoch=0)
    seen = [row for batches in ranks for rows in batches for row in rows.tolist()]
    assert sorted(seen) == list(range(sum(counts)))
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [sum(map(len, step)) for step in zip(*ranks, strict=True)]
    assert all(size == batch_size for size in sizes[:-1])
    assert len(sizes) == max(1, math.ceil(sum(counts) / batch_size))
    shares = [sum(map(len, batches)) for batches in ranks]
    assert max(shares) - min(shares) <= 1


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 9))
def test_the_buffer_never_gives_what_it_cannot_hold(count, size, seed):
    rows = mixed(np.arange(count), seeded_generator(seed), size)
    assert sorted(rows.tolist()) == list(range(count))
    assert all(row < place + size for place, row in enumerate(rows.tolist()))


def test_orders_differ_by_epoch_and_are_the_same_each_time():
    orders = [np.concatenate(epoch([9, 8, 7], 1, seed=3, epoch=number)[0]) for number in (0, 0, 1)]
    assert (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()


# --- the images themselves


def stream(root, **how):
    records = how.pop("records", None) or readers.listed(str(root), "train")
    words = Vocabulary.build((line for record in records for line in record.captions), 1)
    crop = how.pop("crop", False)
    dataset = CaptionDataset(
        records, words, 20, image_transform(32, train=crop), flip=crop, seed=how.get("seed", 0)
    )
    return stream_loader(dataset, str(root), how.pop("batch_size", 5), **how)


def flat(loader) -> dict:
    return {
        name: (row, captions)
        for batch in loader
        for name, row, captions in zip(
            batch.image_ids, batch.inputs, batch.references, strict=False
        )
    }


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER", 6)


def same(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[k][0], second[k][0]) for k in first
    )


def test_a_stream_gives_the_pixels_and_captions_of_the_files(written, drawn):  # noqa: F811
    found = flat(stream(written))
    transform = image_transform(32, train=False)
    records = load_split("shapes", drawn, "train")
    assert len(found) == len(records) == 24
    for record in records:
        pixels, captions = found[record.image_id]
        assert torch.equal(pixels, transform(read_image(record.path)))
        assert tuple(captions) == record.captions


@pytest.mark.parametrize("crop", [False, True])
def test_workers_change_nothing(crop, written):  # noqa: F811
    plain = flat(stream(written, crop=crop, seed=4))
    assert same(plain, flat(stream(written, crop=crop, seed=4, workers=3)))
    assert list(plain) != list(flat(stream(written, crop=crop, seed=5)))


def test_skipped_batches_leave_the_others_as_they_were(written, monkeypatch):  # noqa: F811
    whole = stream(written)
    rest = stream(written, skip=3)
    assert len(whole) == 5 and len(rest) == 2
    assert same(flat(list(whole)[3:]), flat(rest))
    assert len(stream(written, skip=5)) == 0 and not list(stream(written, skip=5))


def test_ranks_see_different_images_and_together_all(written):  # noqa: F811
    seen = [list(flat(stream(written, rank=rank, world=5, batch_size=10))) for rank in range(5)]
    assert sorted(map(len, seen)) == [4, 5, 5, 5, 5] and len(set().union(*seen)) == 24


def test_parts_of_a_batch_are_the_batch_and_one_without_images_counts_for_nothing(written):  # noqa: F811
    whole = list(stream(written, world=3, batch_size=5))
    parts = list(stream(written, world=3, batch_size=5, accumulate=2))
    assert len(parts) == len(stream(written, world=3, batch_size=5, accumulate=2)) == 10
    for step, batch in enumerate(whole):
        both = parts[2 * step].image_ids + parts[2 * step + 1].image_ids
        assert sorted(both) == sorted(batch.image_ids)
    assert any(not part.image_ids for part in parts)
    assert all(len(part.inputs) == max(1, len(part.image_ids)) for part in parts)


def test_only_the_shards_that_are_needed_are_opened(written, monkeypatch):  # noqa: F811
    opened, original = [], shards.samples

    def samples(root, shard, wanted):
        opened.append(shard)
        return original(root, shard, wanted)

    monkeypatch.setattr(shards, "samples", samples)
    list(stream(written, rank=0, world=3))
    assert len(opened) < 3
    opened.clear()
    list(stream(written, records=readers.listed(str(written), "train")[:10]))
    assert opened == ["train-000000.tar"]


def test_a_missing_image_is_left_out_and_too_many_are_an_error(written, tmp_path, monkeypatch):  # noqa: F811
    folder = copied(written, tmp_path / "made")
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-15_000])
    for workers in (0, 2):
        with pytest.raises(ValueError, match="of 24 images of the shards can't be read: .*png"):
            list(stream(folder, workers=workers))
    monkeypatch.setattr(streaming, "MAX_LEFT_OUT", 0.5)
    monkeypatch.setattr("readers.MAX_LEFT_OUT", 0.5)
    assert 14 < len(flat(stream(folder))) < 24


def test_a_shard_that_is_gone_is_one_clear_error(written, tmp_path):  # noqa: F811
    folder = copied(written, tmp_path / "made")
    (folder / "train-000001.tar").unlink()
    for workers in (0, 1):
        with pytest.raises(FileNotFoundError, match=r"train-000001\.tar"):
            list(stream(folder, workers=workers))


# --- training

STREAMED = [*SMALL[2:], "--dataset", "shards", "--cnn-backbone", "tiny", "--cnn-weights", "none",
            "--img-size", "64", "--min-count", "1", "--no-augment", "--workers", "1"]  # fmt: skip
STOPPED = """
    import os, signal, sys
    import train, trainer
    from util import files
    step = trainer.Trainer.step
    def stopping(self, batch):
        step(self, batch)
        if self.step_number == 8:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Trainer.step = stopping
    files.run(lambda: train.main(sys.argv[1:]))
"""


def test_a_run_from_shards_learns_scores_and_resumes_exactly(written, tmp_path):  # noqa: F811
    place = ["--data-dir", str(written), "--cache-dir", str(tmp_path / "cache")]

    train.main([*STREAMED, *place, "--output", str(tmp_path / "whole")])
    assert len(losses(tmp_path / "whole")) == 2 and (tmp_path / "whole/scores.json").exists()
    stopped = run_code(STOPPED, *STREAMED, *place, "--output", str(tmp_path / "run"))
    assert stopped.returncode == 130, stopped.stderr
    train.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_views_need_a_cache(written, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="--views 2 is for a feature cache"):
        train.main([*STREAMED, "--views", "2", "--data-dir", str(written),
                    "--output", str(tmp_path / "run")])  # fmt: skip


def test_training_images_may_come_from_an_address(written, monkeypatch):  # noqa: F811
    pytest.importorskip("webdataset")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(Path(written)) as address:
        assert same(flat(stream(address, workers=1)), flat(stream(written)))
