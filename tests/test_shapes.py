import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import scene_parser
from helpers.scene_parser import Noun, is_true, parse
from PIL import Image

from util import shapes

ROOT = Path(shapes.__file__).parents[1]
SIDE = shapes.IMAGE_SIZE
SMALL = {"train": 40, "val": 6, "test": 8}
PAIR = {
    "objects": [
        {"shape": "circle", "colour": "red", "size": "small", "x": 0.25, "y": 0.26},
        {"shape": "square", "colour": "blue", "size": "large", "x": 0.26, "y": 0.75},
    ]
}
TRIO = {
    "objects": [
        *PAIR["objects"],
        {"shape": "star", "colour": "green", "size": "large", "x": 0.74, "y": 0.76},
    ]
}
ONE = {"objects": PAIR["objects"][:1]}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return shapes.draw(tmp_path_factory.mktemp("data") / "shapes", **SMALL)


def records(root):
    return json.loads((root / "captions.json").read_text(encoding="utf-8"))["images"]


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def examples(count=400):
    return [shapes.example(0, "train", index) for index in range(count)]


def test_every_caption_is_true_of_its_scene():
    for scene, _, captions in examples():
        assert all(is_true(caption, scene) for caption in captions), captions


def test_captions_are_false_of_other_scenes():
    for (scene, _, _), (other, _, captions) in itertools.pairwise(examples()):
        kinds, others = (
            {(thing["shape"], thing["colour"]) for thing in s["objects"]} for s in (scene, other)
        )
        if kinds != others:
            assert not any(is_true(caption, scene) for caption in captions)


def test_every_image_has_five_different_captions_of_5_to_20_plain_words():
    for _, _, captions in examples():
        assert len(set(captions)) == 5
        assert all(5 <= len(caption.split()) <= 20 for caption in captions)
        assert all(re.fullmatch("[a-z]+( [a-z]+)*", caption) for caption in captions)


def test_a_caption_with_one_content_word_exchanged_is_false():
    colours, kinds = list(shapes.COLOURS), list(shapes.SHAPES)
    sizes = [word for words in shapes.SIZE_WORDS.values() for word in words]
    following = {word: group[i - 1] for group in (colours, kinds) for i, word in enumerate(group)}
    following |= {word: sizes[i - 2] for i, word in enumerate(sizes)}
    following |= {"above": "under", "over": "below", "below": "over", "under": "above"}
    following |= {"left": "right", "right": "left"}
    for scene, _, captions in examples(60):
        for words in map(str.split, captions):
            for at in (i for i, word in enumerate(words) if word in following):
                wrong = " ".join([*words[:at], following[words[at]], *words[at + 1 :]])
                assert not is_true(wrong, scene), wrong


def test_no_caption_stays_true_when_it_is_cut_short():
    for scene, _, captions in examples(60):
        for words in map(str.split, captions):
            cuts = (" ".join(words[:length]) for length in range(len(words)))
            shorter = [cut for cut in cuts if is_true(cut, scene)]
            # A single object needs no more than its name; the rest of such a caption is scenery.
            assert not shorter or len(scene["objects"]) == 1, shorter


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle", ONE),
        ("A small red circle.", ONE),
        ("there is one tiny red circle on a light background", ONE),
        ("a red circle above a blue square", PAIR),
        ("the picture shows a big blue square under one small red circle", PAIR),
        ("a blue square with a red circle over it and nothing else", PAIR),
        ("one red circle is above a blue square and the blue square is left of a green star", TRIO),
        ("a green star right of a blue square which is below a red circle", TRIO),
        ("a blue square with a green star to the right of it and a red circle above it", TRIO),
    ],
)
def test_a_caption_is_true_in_any_wording_of_the_grammar(caption, scene):
    assert is_true(caption, scene)


@pytest.mark.parametrize(
    ("wrong", "caption", "scene"),
    [
        ("colour", "a small green circle", ONE),
        ("colours swapped", "a blue circle above a red square", PAIR),
        ("shape", "a red star above a blue square", PAIR),
        ("colour missing", "a red circle above a square", PAIR),
        ("shape missing", "a red circle above a blue", PAIR),
        ("size", "a large red circle above a large blue square", PAIR),
        ("size of a single object", "there is a big red circle", ONE),
        ("relation reversed", "a red circle below a blue square", PAIR),
        ("relation on the wrong axis", "a red circle left of a blue square", PAIR),
        ("diagonal is no relation", "a red circle above a green star", TRIO),
        ("object missing", "a red circle", PAIR),
        ("object missing of three", "a red circle above a blue square", TRIO),
        ("object too many", "a red circle above a blue square", ONE),
        ("object repeated", "a red circle above a red circle", ONE),
        ("object repeated in place of another", "a blue square below a blue square", PAIR),
        ("relation missing", "a red circle and a blue square", PAIR),
        ("third not tied", "a red circle above a blue square and a green star", TRIO),
        ("related to itself", "a red circle above the red circle", ONE),
        ("the, of what was not named", "the red circle above a blue square", PAIR),
        ("ambiguous chain", "a red circle above a blue square left of a green star", TRIO),
        (
            "alone, though it is not",
            "a red circle above a blue square alone on a plain background",
            PAIR,
        ),
        ("unknown word", "a red circle above a blue square happily", PAIR),
        ("words out of order", "circle red a above square blue a", PAIR),
        ("two sentences", "a red circle above a blue square a red circle", PAIR),
        ("verb too many", "there is a red circle is above a blue square", PAIR),
        ("loose end", "a red circle above a blue square and", PAIR),
        ("nothing", "", ONE),
        ("gibberish", "a a a the of of circle", ONE),
    ],
)
def test_a_caption_that_is_wrong_in_one_way_is_false(wrong, caption, scene):
    assert not is_true(caption, scene), wrong


def test_parsing_returns_the_objects_and_relations_that_are_said():
    said = parse("a tiny red circle with a blue square below it")
    assert said.objects == [Noun("small", "red", "circle"), Noun(None, "blue", "square")]
    assert said.relations == [(1, "below", 0)]
    assert parse("a red circle below") is None


def test_the_parser_and_the_dataset_know_the_same_shapes_and_colours():
    assert set(shapes.SHAPES) == scene_parser.SHAPES
    assert set(shapes.COLOURS) == scene_parser.COLOURS


def test_splits_have_the_sizes_asked_for_and_every_named_file_is_there(drawn):
    images = records(drawn)
    splits = [image["split"] for image in images]
    assert {split: splits.count(split) for split in SMALL} == SMALL
    assert [image["imgid"] for image in images] == list(range(len(images)))
    files = {path.name for path in (drawn / "images").iterdir()}
    assert files == {image["filename"] for image in images}
    assert all(s["tokens"] == s["raw"].split() for image in images for s in image["sentences"])


def test_no_picture_occurs_twice(drawn):
    pictures = {path.read_bytes() for path in (drawn / "images").iterdir()}
    assert len(pictures) == sum(SMALL.values())


def test_the_same_seed_draws_the_same_bytes_and_another_seed_draws_others(drawn, tmp_path):
    again = contents(shapes.draw(tmp_path / "again", **SMALL))
    other = contents(shapes.draw(tmp_path / "other", seed=1, **SMALL))
    assert again == contents(drawn)
    assert again.keys() == other.keys()
    assert all(again[name] != other[name] for name in again)


def test_a_picture_does_not_depend_on_how_many_are_drawn_or_on_the_hash_seed(drawn, tmp_path):
    code = "import sys; from util import shapes; shapes.draw(sys.argv[1], train=3, val=0, test=2)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    few, many = contents(tmp_path), contents(drawn)
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 5
    assert all(few[name] == many[name] for name in pictures)
    sentences = {image["filename"]: image["sentences"] for image in records(drawn)}
    assert all(image["sentences"] == sentences[image["filename"]] for image in records(tmp_path))


def test_a_drawn_folder_is_left_as_it_is(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*.*")}
    assert shapes.draw(drawn, seed=5, train=99) == drawn
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*.*")} == before


def test_an_interrupted_drawing_is_drawn_again(drawn, tmp_path, monkeypatch):
    calls = itertools.count()

    def stop_at_the_tenth(*args):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return example(*args)

    example = shapes.example
    monkeypatch.setattr(shapes, "example", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        shapes.draw(tmp_path, **SMALL)
    assert not shapes.is_drawn(tmp_path)
    (tmp_path / "images" / "train_00003.png").write_bytes(b"half a picture")
    monkeypatch.undo()
    shapes.draw(tmp_path, **SMALL)
    assert shapes.is_drawn(tmp_path)
    assert contents(tmp_path) == contents(drawn)


def test_is_drawn_says_no_of_a_folder_that_is_not_there(tmp_path):
    assert not shapes.is_drawn(tmp_path / "nowhere")


def test_pictures_are_small_rgb_files(drawn):
    for image in records(drawn):
        with Image.open(drawn / "images" / image["filename"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (shapes.IMAGE_SIZE,) * 2)


def test_each_object_has_its_colour_at_its_centre():
    for scene, picture, _ in examples(100):
        for thing in scene["objects"]:
            pixel = picture.getpixel((int(thing["x"] * SIDE), int(thing["y"] * SIDE)))
            distance = {
                name: sum((a - b) ** 2 for a, b in zip(pixel, colour, strict=True))
                for name, colour in shapes.COLOURS.items()
            }
            assert min(distance, key=distance.get) == thing["colour"]


def blobs(picture):
    """Return the bounding boxes of the connected parts that are not background."""
    pixels = np.asarray(picture).astype(int)
    left = {tuple(at) for at in np.argwhere(np.abs(pixels - pixels[0, 0]).max(axis=2) > 3)}
    boxes = []
    while left:
        front = [left.pop()]
        part = set(front)
        while front:
            row, column = front.pop()
            near = {(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            part |= near
            front.extend(near)
        boxes.append((*np.min(list(part), axis=0), *np.max(list(part), axis=0)))
    return boxes


def test_a_picture_has_one_separate_blob_an_object_where_and_as_large_as_said():
    for scene, picture, _ in examples(100):
        boxes = blobs(picture)
        assert len(boxes) == len(scene["objects"])
        for thing in scene["objects"]:
            row, column = thing["y"] * SIDE, thing["x"] * SIDE
            (box,) = [b for b in boxes if b[0] <= row <= b[2] + 1 and b[1] <= column <= b[3] + 1]
            assert min(box[:2]) > 0 and max(box[2:]) < SIDE - 1
            assert (box[3] - box[1] > 17) == (thing["size"] == "large")


def test_objects_of_a_picture_share_neither_shape_nor_colour():
    for scene, _, _ in examples():
        for look in ("shape", "colour"):
            looks = [thing[look] for thing in scene["objects"]]
            assert len(set(looks)) == len(looks)


def test_the_counts_of_objects_the_shapes_and_the_colours_all_occur():
    scenes = [scene["objects"] for scene, _, _ in examples()]
    assert {len(objects) for objects in scenes} == {1, 2, 3}
    things = [thing for objects in scenes for thing in objects]
    assert {thing["shape"] for thing in things} == set(shapes.SHAPES)
    assert {thing["colour"] for thing in things} == set(shapes.COLOURS)
