"""Several datasets in one run: their images are mixed, their words joined, their scores apart."""

import csv
import shutil

import pytest
import torch
from helpers.caches import build, make_encoder, make_images
from helpers.datasets import write_colours
from helpers.tiny import COLOURS, assert_same_run, run_script
from hypothesis import given
from hypothesis import strategies as st

import train
from config import configure
from corpora import Corpus, join_train, mean_scores, name_corpora
from dataset import CaptionDataset, get_loader, mix_evenly
from model import CaptionModel
from model_file import read_metadata
from util import files, plots
from util.files import UserError

NO_SCORES = {"CIDEr": 0.25, "BLEU-4": 0.5}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 5))
def test_every_part_of_the_order_has_each_datasets_share(sizes, seed):
    order = mix_evenly(sizes, torch.Generator().manual_seed(seed))
    total = sum(sizes)
    assert sorted(order.tolist()) == list(range(total))
    start = 0
    for size in sizes:
        counts = ((order >= start) & (order < start + size)).cumsum(0)
        share = torch.arange(1, total + 1) * size / total
        assert (counts - share).abs().max() <= len(sizes)
        start += size


def test_one_dataset_is_only_shuffled():
    order = mix_evenly([50], torch.Generator().manual_seed(4))
    assert order.equal(torch.randperm(50, generator=torch.Generator().manual_seed(4)))


def test_an_interrupted_epoch_of_two_datasets_goes_on_with_the_same_images(tmp_path):
    records = make_images(tmp_path, 11)
    dataset = CaptionDataset(records, features=Pixels())
    options = {"shuffle": True, "sizes": [8, 3], "seed": 5, "epoch": 2}
    whole = [batch.image_ids for batch in get_loader(dataset, 4, **options)]
    rest = [batch.image_ids for batch in get_loader(dataset, 4, skip=1, **options)]
    assert rest == whole[1:]
    other = [batch.image_ids for batch in get_loader(dataset, 4, **options | {"epoch": 3})]
    assert other != whole
    assert all(
        1 <= sum(name >= "008" for name in images) <= 2 for images in whole if len(images) == 4
    )


class Pixels:
    def get(self, image_id, view=0):
        return torch.zeros(1, 2)


def test_images_of_one_id_in_two_datasets_keep_their_own_captions_and_features(tmp_path):
    encoder, corpora = make_encoder("tiny"), []
    for name in ("one", "two"):
        records = make_images(tmp_path / name, 5)[:: -1 if name == "two" else 1][:3]
        records = [record._replace(captions=(f"{name} {record.image_id}",)) for record in records]
        cache = build(records, encoder, tmp_path, f"{name}-train")
        corpora.append(Corpus(name, "csv", {"train": records}, not corpora, {"train": cache}))
    records, features = join_train(corpora)
    assert [record.image_id for record in records] == [
        "000.png", "001.png", "002.png", "two/004.png", "two/003.png", "two/002.png"
    ]  # fmt: skip
    assert records[5].captions == ("two 002.png",)
    for joined, own, corpus in ((records[2], "002.png", 0), (records[5], "002.png", 1)):
        expected = corpora[corpus].caches["train"].get(own)
        assert features.get(joined.image_id).equal(expected)
    alone, cache = join_train(corpora[:1])
    assert alone is corpora[0].records["train"] and cache is corpora[0].caches["train"]


def test_names_are_those_of_the_folders_and_differ():
    places = [("flickr8k", "data/flickr8k"), ("csv", "my/pets/"), ("coco", "other/pets")]
    assert name_corpora(places) == ["flickr8k", "pets", "pets-2"]
    assert name_corpora([("csv", "my/pets")]) == ["csv"]


def test_the_mean_of_the_datasets_comes_first_and_then_each_alone():
    scores = {"a": {"CIDEr": 0.2, "val_loss": 3.0}, "b": {"CIDEr": 0.6, "val_loss": 1.0}}
    assert mean_scores(scores) == pytest.approx({
        "CIDEr": 0.4, "val_loss": 2.0, "CIDEr a": 0.2, "val_loss a": 3.0, "CIDEr b": 0.6,
        "val_loss b": 1.0,
    })  # fmt: skip
    assert mean_scores({"a": NO_SCORES}) == NO_SCORES
    assert mean_scores({}) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--also", "photos"], r"--also photos must be KIND:DIR, .*; the kinds are flickr8k, "),
        (["--also", "csv:"], "must be KIND:DIR"),
        (["--also", "vizwiz:data"], "must be KIND:DIR"),
        (["--also", "shards:data"], "shards are streamed"),
        (["--dataset", "shards", "--also", "csv:data"], "--also does not go with --dataset shards"),
    ],
)
def test_what_also_cannot_mean_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        configure(flags)


# --- runs


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    for name in ("learning_curve", "caption_page"):
        monkeypatch.setattr(plots, name, lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with the datasets first and second, which have words of their own."""
    home = tmp_path_factory.mktemp("corpora")
    write_colours(home / "first")
    write_colours(home / "second", ("train-0.png,zebra zebra zebra zebra,train",))
    return home


def flags(home, run, *more):
    places = ["--data-dir", home / "first", "--also", f"csv:{home / 'second'}", "--output", run]
    return [*COLOURS, *map(str, places), *more]


def test_a_run_on_two_datasets_learns_all_words_and_scores_each(home, tmp_path):
    train.main(flags(home, tmp_path / "run", "--epochs", "2"))
    assert {"zebra", "apple"} <= set(read_metadata(tmp_path / "run")["vocabulary"])
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        own = [float(row["CIDEr first"]), float(row["CIDEr second"])]
        assert float(row["CIDEr"]) == pytest.approx(sum(own) / 2)
    best = max(rows, key=lambda row: float(row["CIDEr"]))
    metadata = read_metadata(tmp_path / "run")
    assert metadata["scores"]["epoch"] == int(best["epoch"])
    assert metadata["training"]["also"] == ["csv:second"]
    scores = files.read_json(tmp_path / "run/scores.json")
    assert {"val", "second-val"} <= scores.keys()


def test_the_names_of_folders_reach_the_terminal_without_control_characters(home, tmp_path, capsys):
    odd = shutil.copytree(home / "second", tmp_path / "od\x1b[31md $x$")
    more = ["--epochs", "1", "--also", f"csv:{odd}"]
    train.main(flags(home, tmp_path / "run", *more))
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"od\x1b[31md $x$ 0." in out
    assert (tmp_path / "run/scores.json").is_file()


def test_a_resumed_run_on_two_datasets_is_the_run_that_was_not_interrupted(home, tmp_path, caplog):
    train.main(flags(home, tmp_path / "whole", "--epochs", "2"))
    train.main(flags(home, tmp_path / "parts", "--epochs", "2"))
    (tmp_path / "parts/previous.pt").replace(tmp_path / "parts/last.pt")  # after the first epoch
    # The second dataset has moved meanwhile.
    moved = shutil.copytree(home / "second", tmp_path / "second")
    train.main(["--resume", "--output", str(tmp_path / "parts"), "--also", f"csv:{moved}"])
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert files.read_json(tmp_path / "parts/config.json")["also"] == [f"csv:{moved}"]
    assert not [line for line in caplog.messages if "the data has changed" in line]


def test_a_resumed_run_keeps_the_kinds_of_its_datasets(home, tmp_path, capsys):
    train.main(flags(home, tmp_path / "run", "--epochs", "1"))
    for also in ([], ["--also", "coco:data"]):
        code, _, error = run_script(
            train, "--resume", "--output", tmp_path / "run", "--epochs", 2, *also, capsys=capsys
        )
        if also:
            assert code == 2 and "--also names coco, but the run has csv" in error
        else:
            assert code == 0
    assert CaptionModel.load(tmp_path / "run").vocabulary


def test_a_further_dataset_without_a_train_split_is_refused(home, tmp_path, capsys):
    folder = write_colours(tmp_path / "third")
    table = folder / "captions.csv"
    table.write_text(table.read_text().replace(",train", ",val"))
    code, _, error = run_script(
        train, *flags(home, tmp_path / "run", "--also", f"csv:{folder}"), capsys=capsys
    )
    assert code == 2 and "no train split" in error and "third" in error
