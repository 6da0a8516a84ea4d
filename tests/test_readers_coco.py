"""COCO and Flickr30k on disk: ids, splits, several image folders, and what is said of bad files."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.datasets import save_image
from helpers.tiny import as_flickr8k

import evaluate
import train
from encoder import Encoder
from readers import SplitMissingError, load_split, load_splits
from util import shapes


def captions_of(number: int) -> list[str]:
    return [f"an image of number {number}", f"number {number} , again ."]


def annotations(numbers: range, year: int, part: str) -> dict:
    form = "COCO_{part}{year}_{number:012}.jpg" if year == 2014 else "{number:012}.jpg"
    names = {number: form.format(part=part, year=year, number=number) for number in numbers}
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    lines = [
        {"image_id": number, "caption": line} for number in numbers for line in captions_of(number)
    ]
    return {"images": images, "annotations": lines}


@pytest.fixture(params=[(2014, "annotations"), (2017, "annotations2017")])
def official(request, tmp_path) -> Path:
    year, folder = request.param
    for part, numbers in (("train", range(1, 9)), ("val", range(100, 110))):
        value = annotations(numbers, year, part)
        path = tmp_path / folder / f"captions_{part}{year}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
        for image in value["images"]:
            save_image(tmp_path / f"{part}{year}" / image["file_name"])
    return tmp_path


def test_official_annotations_give_integer_ids_and_all_captions(official):
    records = load_split("coco", official, "train")
    assert [record.image_id for record in records] == list(range(1, 9))
    assert all(list(record.captions) == captions_of(record.image_id) for record in records)
    assert all(record.path.is_file() for record in records)


def test_val_is_parted_into_val_and_test(official):
    val, test = (
        {record.image_id for record in load_split("coco", official, split)}
        for split in ("val", "test")
    )
    assert len(val) == len(test) == 5 and val | test == set(range(100, 110))
    other = {record.image_id for record in load_split("coco", official, "test", split_seed=1)}
    assert other != test


def test_karpathys_splits_win_and_restval_joins_train_from_its_own_folder(official):
    splits = {100: "restval", 101: "val", 102: "test"}
    images = [
        {"cocoid": cocoid, "split": split, "filename": path.name, "filepath": path.parent.name,
         "sentences": [{"raw": line} for line in captions_of(cocoid)]}
        for path in sorted(official.glob("*201?/*.jpg"))
        for cocoid in [int(path.stem.split("_")[-1])]
        for split in [splits.get(cocoid, "train")]
        if cocoid < 103
    ]  # fmt: skip
    (official / "dataset_coco.json").write_text(json.dumps({"images": images}))
    records = load_split("coco", official, "train")
    assert {record.image_id for record in records} == {*range(1, 9), 100}
    assert all(record.path.is_file() for record in records)
    assert [record.image_id for record in load_split("coco", official, "val")] == [101]
    assert [record.image_id for record in load_split("coco", official, "test")] == [102]


def test_coco_trains_to_its_end(official):
    flags = ["--dataset", "coco", "--data-dir", str(official), "--output", str(official / "run"),
             "--cnn-backbone", "tiny", "--cnn-weights", "none", "--epochs", "1", "--min-count",
             "1", "--d-model", "16", "--n-head", "2", "--n-decode", "1"]  # fmt: skip
    train.main(flags)
    assert {"val", "test"} == json.loads((official / "run/scores.json").read_text()).keys()


def as_coco(flickr8k: Path, folder: Path) -> Path:
    """Write a Flickr8k folder (train and dev lists, captions, images) out as COCO 2014."""
    number = 0
    for part, split in (("train", "train"), ("val", "val")):
        value: dict = {"images": [], "annotations": []}
        (folder / f"{part}2014").mkdir(parents=True)
        for record in load_split("flickr8k", flickr8k, split):
            number += 7
            name = f"COCO_{part}2014_{number:012}.jpg"
            (folder / f"{part}2014" / name).write_bytes(record.path.read_bytes())
            value["images"].append({"id": number, "file_name": name, "flickr": record.image_id})
            value["annotations"] += [
                {"id": number * 10 + place, "image_id": number, "caption": line}
                for place, line in enumerate(record.captions)
            ]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/captions_{part}2014.json").write_text(json.dumps(value))
    return folder


def with_cocos_splits(flickr8k: Path, coco: Path) -> None:
    """Give a Flickr8k folder the dev and test lists that COCO's val is parted into."""
    names = {
        image["id"]: image["flickr"]
        for image in json.loads((coco / "annotations/captions_val2014.json").read_text())["images"]
    }
    for split, word in (("val", "dev"), ("test", "test")):
        listed = [names[record.image_id] for record in load_split("coco", coco, split)]
        path = flickr8k / f"Flickr8k_text/Flickr_8k.{word}Images.txt"
        path.write_text("\n".join(listed))


def test_images_in_cocos_layout_train_and_evaluate_to_the_very_same_numbers(tmp_path):
    drawn = shapes.draw(tmp_path / "drawn", train=16, val=12, test=1)
    flickr8k = as_flickr8k(drawn, tmp_path / "flickr8k", ("train", "dev"))
    coco = as_coco(flickr8k, tmp_path / "coco")
    with_cocos_splits(flickr8k, coco)
    torch.manual_seed(0)
    torch.save(Encoder("resnet18").cnn.state_dict(), tmp_path / "cnn.pth")
    reports, tables = [], []
    for dataset, data in (("flickr8k", flickr8k), ("coco", coco)):
        run, json_file = tmp_path / f"run-{dataset}", tmp_path / f"{dataset}.json"
        train.main([
            "--dataset", dataset, "--data-dir", str(data), "--output", str(run), "--cache-dir",
            str(tmp_path / "cache"), "--cnn-weights", str(tmp_path / "cnn.pth"), "--cnn-backbone",
            "resnet18", "--img-size", "64", "--epochs", "2", "--min-count", "1", "--d-model", "16",
            "--n-head", "2", "--n-decode", "1", "--batch-size", "5", "--views", "1",
        ])  # fmt: skip
        evaluate.main([
            "--dataset", dataset, "--data-dir", str(data), "--checkpoint", str(run), "--split",
            "test", "--json", str(json_file), "--no-java",
        ])  # fmt: skip
        report = json.loads(json_file.read_text())
        assert report.pop("dataset") == dataset
        reports.append((report, json.loads((run / "scores.json").read_text())))
        with (run / "metrics.csv").open() as file:
            tables.append([{**row, "seconds": None} for row in csv.DictReader(file)])
    assert reports[0] == reports[1] and tables[0] == tables[1]
    assert len(tables[0]) == 2 and reports[0][0]["images"] == 6


def test_annotations_whose_ids_match_nothing_are_refused(official):
    path = next(official.glob("*/captions_train*.json"))
    value = json.loads(path.read_text())
    for one in value["annotations"]:
        one["image_id"] += 5000
    path.write_text(json.dumps(value))
    with pytest.raises(SplitMissingError, match="no captions of the train split in"):
        load_split("coco", official, "train")


@pytest.mark.parametrize("text", ["[]", '{"images": [{"id": 1}], "annotations": []}', "<html>"])
def test_a_file_that_is_no_annotation_is_named(official, text):
    path = next(official.glob("*/captions_val*.json"))
    path.write_text(text)
    with pytest.raises(ValueError, match=r"captions_val.* is not a"):
        load_split("coco", official, "val")


def test_an_absent_split_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no COCO captions in .* captions_val2014"):
        load_split("coco", tmp_path, "val")


def test_the_annotations_of_val_alone_are_val_and_test(official):
    next(official.glob("annotations*/captions_train*.json")).unlink()
    with pytest.raises(SplitMissingError, match="no train split in .*; it holds "):
        load_split("coco", official, "train")
    assert len(load_split("coco", official, "val")) == 5


def test_flickr30k_is_read_from_karpathys_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Flickr30k captions in .*_flickr30k.json"):
        load_split("flickr30k", tmp_path, "train")
    images = [
        {"filename": f"{n}.jpg", "split": "test" if n == 3 else "train",
         "sentences": [{"raw": line} for line in captions_of(n)]}
        for n in range(4)
    ]  # fmt: skip
    (tmp_path / "karpathy").mkdir()
    (tmp_path / "karpathy/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    for n in range(4):
        save_image(tmp_path / f"flickr30k-images/{n}.jpg")
    assert [record.image_id for record in load_split("flickr30k", tmp_path, "test")] == ["3.jpg"]
    assert len(load_split("flickr30k", tmp_path, "train")) == 3


def test_captions_of_images_that_are_not_listed_are_left_out_with_a_line(official, caplog):
    path = next(official.glob("annotations*/captions_train*.json"))
    value = json.loads(path.read_text())
    value["annotations"].append({"image_id": 77, "caption": "a stranger"})
    path.write_text(json.dumps(value))
    assert len(load_split("coco", official, "train")) == 8
    assert "left out: captions of 1 images that" in caplog.text and "id 77" in caplog.text


def test_two_images_of_one_name_are_named(official):
    path = next(official.glob("annotations*/captions_train*.json"))
    value = json.loads(path.read_text())
    value["images"][1]["file_name"] = "elsewhere/" + value["images"][0]["file_name"]
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"is listed as image 1 .* and as image 2"):
        load_split("coco", official, "train")


def test_an_id_may_come_again_in_the_file_of_another_split_but_not_in_its_own(official):
    _, val = sorted(official.glob("annotations*/captions_*.json"))
    value = json.loads(val.read_text())
    for number, image in enumerate(value["images"], 1):
        image["id"] = number
    for number, each in enumerate(value["annotations"]):
        each["image_id"] = 1 + number // 2
    val.write_text(json.dumps(value))
    found = load_split("coco", official, "val") + load_split("coco", official, "test")
    assert {record.image_id for record in found} == set(range(1, 11))
    images = [
        {"filename": path.name, "cocoid": 7, "split": "train", "sentences": [{"raw": "a"}]}
        for path in official.glob("train*/*.jpg")
    ]
    (official / "dataset_coco.json").write_text(json.dumps({"images": images}))
    with pytest.raises(ValueError, match="two images of the train split in .* the same id"):
        load_split("coco", official, "train")


@pytest.mark.parametrize("image", [{"id": 1e999, "file_name": "a"}, {"id": 1, "file_name": 3}])
def test_ids_and_names_that_are_none_are_told(image, official):
    path = next(official.glob("annotations*/captions_train*.json"))
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"images": [*value["images"], image]}))
    with pytest.raises(ValueError, match=r"captions_train.* is not a COCO captions file"):
        load_split("coco", official, "train")


# --- images of one name in several folders


def karpathys(
    root: Path, places: list[tuple[str, str, str]], name="dataset_flickr30k.json"
) -> Path:
    """Write a JSON file with an image of each (filepath, filename, split)."""
    images = [
        {"filepath": folder, "filename": name, "split": split, "cocoid": number,
         "sentences": [{"raw": f"{folder} {number}"}]}
        for number, (folder, name, split) in enumerate(places)
    ]  # fmt: skip
    (root / name).write_text(json.dumps({"images": images}))
    return root


def colours_of(dataset: str, root: Path, split: str) -> dict:
    return {
        record.image_id: (record.path.relative_to(root).as_posix(), record.captions)
        for record in load_split(dataset, root, split)
    }


@pytest.mark.parametrize("deep", ["", "images", "photos/all"])
def test_images_of_one_name_in_two_folders_are_two(deep, tmp_path):
    places = [("a", "1.jpg", "train"), ("b", "1.jpg", "train"), ("b", "2.jpg", "train")]
    for folder, name, _ in [*places, ("c", "1.jpg", ""), ("c", "2.jpg", "")]:
        save_image(tmp_path / deep / folder / name)
    found = colours_of("flickr30k", karpathys(tmp_path, places), "train")
    start = f"{deep}/" if deep else ""
    assert found == {
        "a/1.jpg": (f"{start}a/1.jpg", ("a 0",)),
        "b/1.jpg": (f"{start}b/1.jpg", ("b 1",)),
        "2.jpg": (f"{start}b/2.jpg", ("b 2",)),
    }


def test_the_folder_that_the_json_names_counts_and_no_other(tmp_path):
    for folder in ("train2014", "val2014"):
        for number in range(4 if folder == "train2014" else 2):
            save_image(tmp_path / folder / f"{number}.jpg")
    places = [("val2014", f"{number}.jpg", "val") for number in range(3)]
    karpathys(tmp_path, places, "dataset_coco.json")
    found = colours_of("coco", tmp_path, "val")  # the third is missing there
    assert [path for path, _ in found.values()] == ["val2014/0.jpg", "val2014/1.jpg"]


@pytest.mark.parametrize("folder", ["/home/someone/val2014", "../val2014", "coco/val2014", "gone"])
def test_a_folder_of_another_computer_is_found_by_its_last_part_or_not_needed(folder, tmp_path):
    save_image(tmp_path / "val2014" / "1.jpg")
    found = colours_of("flickr30k", karpathys(tmp_path, [(folder, "1.jpg", "val")]), "val")
    assert found == {"1.jpg": ("val2014/1.jpg", (f"{folder} 0",))}


def test_images_of_one_name_whose_folders_are_gone_are_never_mixed_up(tmp_path):
    save_image(tmp_path / "all" / "1.jpg")
    save_image(tmp_path / "all" / "2.jpg")
    places = [("a", "1.jpg", "val"), ("b", "1.jpg", "val"), ("a", "2.jpg", "val")]
    with pytest.raises(ValueError, match="2 of 3 images of the val split have no image file"):
        load_split("flickr30k", karpathys(tmp_path, places), "val")


@pytest.mark.parametrize("named", ["", "val2014/", "other/"])
def test_an_official_file_has_its_own_folder_or_the_one_it_names(named, tmp_path):
    value = annotations(range(1, 4), 2017, "val")
    for image in value["images"]:
        for folder in ("train2014", "val2014"):
            save_image(tmp_path / folder / image["file_name"])
        save_image(tmp_path / "train2014" / f"more{image['file_name']}")
        image["file_name"] = named + image["file_name"]
    (tmp_path / "captions_val2014.json").write_text(json.dumps(value))
    records = load_split("coco", tmp_path, "val") + load_split("coco", tmp_path, "test")
    assert {record.path.parent.name for record in records} == {"val2014"}
    assert len(records) == 3


def test_two_images_of_an_official_file_may_have_one_name_in_two_folders(tmp_path):
    value = annotations(range(1, 4), 2017, "train")
    for image, folder in zip(value["images"], "aab", strict=True):
        image["file_name"] = f"{folder}/{'x' if image['id'] != 2 else 'y'}.jpg"
        save_image(tmp_path / image["file_name"])
    (tmp_path / "captions_train2014.json").write_text(json.dumps(value))
    found = {record.image_id: record.path for record in load_split("coco", tmp_path, "train")}
    assert found == {image["id"]: tmp_path / image["file_name"] for image in value["images"]}


# --- splits that are not wanted


def test_annotations_of_splits_that_are_not_wanted_are_not_read(official):
    (path,) = official.glob("annotations*/captions_train*.json")
    path.write_text("not JSON")
    assert len(load_split("coco", official, "val")) == 5
    assert load_splits("coco", official, splits=("val", "test")).keys() == {"val", "test"}
    with pytest.raises(ValueError, match="is not a JSON file"):
        load_splits("coco", official, splits=("test", "train"))


def test_a_split_without_annotations_is_missing_and_the_others_are_named(official):
    (path,) = official.glob("annotations*/captions_val*.json")
    path.unlink()
    with pytest.raises(SplitMissingError, match="no val split in .*; it holds train"):
        load_split("coco", official, "val")
