"""A small dataset that draws itself: coloured shapes on a light ground, five true captions each.

It needs no download, so the whole pipeline, training included, runs anywhere. An image shows one
to three objects, each with a size, and a shape and a colour that no other object of it has. They
sit on a jittered 2×2 grid and never touch, and each shares a row or a column with the one before
it, so "above" or "left of" is plain to see.

All images differ. What a held-out image shows was described in training where it has one
object, by default in one of five where it has two, and practically never where it has three.
The same seed draws the same pixels and words with any number of images; the bytes of the files
may change with the versions of Pillow and zlib.
"""

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from util import files
from util.progress import progress_bar

Point = tuple[float, float]

IMAGE_SIZE = 64  # pixels a side
GRID = 2  # cells a side
SUPERSAMPLING = 4  # drawn so many times larger, then averaged down: smooth edges
POSITION_JITTER = 0.035  # of the image's side, each way
RADIUS_JITTER = 0.05  # of the radius, each way
COLOUR_JITTER = 10  # of 255, each way
GROUND = (228, 255)  # darkest and lightest background, of 255
COUNTS = {1: 0.25, 2: 0.40, 3: 0.35}  # how often an image shows so many objects

# Half of an object's width, in image sides. A cell is 1/2: two large neighbours, both jittered
# towards each other, still leave 2 pixels between them.
SIZES = {"small": 0.105, "large": 0.19}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "yellow": (245, 205, 10),
    "purple": (125, 35, 160),
    "pink": (255, 130, 190),
    "black": (20, 20, 20),
}

SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
SHORT = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("left of",),
    "right": ("right of",),
}
LONG = {**SHORT, "left": ("to the left of",), "right": ("to the right of",)}
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}

# {A} names the first object with its size, {a} without; {ab} is how the first object lies to the
# second, {AB} the same in longer words. Each object of three is tied to the middle one, {b}.
TEMPLATES = {
    1: (
        "there is a {A}",
        "a {a} on a plain background",
        "the picture shows one {A}",
        "one {A} and nothing else",
        "a {A} alone on a light background",
    ),
    2: (
        "a {A} {ab} a {B}",
        "there is a {B} {BA} a {A}",
        "the picture shows a {a} {ab} a {b}",
        "one {A} is {AB} a {B}",
        "a {b} with a {a} {ab} it",
    ),
    3: (
        "a {A} {ab} a {B} which is {bc} a {C}",
        "there is a {C} {cb} a {b} that is {ba} a {a}",
        "the picture shows a {a} {ab} a {b} and a {c} {cb} the {b}",
        "one {a} is {ab} a {b} and the {b} is {bc} a {c}",
        "a {B} with a {A} {ab} it and a {C} {cb} it",
    ),
}


def around(radii: list[float], turns: float = 0.0) -> list[Point]:
    """Return a polygon's corners at equal angles, the first at the top plus `turns` of a circle."""
    angles = [2 * math.pi * (index / len(radii) + turns) for index in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


# Outlines within -1..1, y downwards.
SHAPES: dict[str, list[Point]] = {
    "circle": around([0.95] * 48),
    "square": around([0.85 * math.sqrt(2)] * 4, turns=1 / 8),
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": around([1, 0.42] * 5),
    "cross": [
        *[(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)],
        *[(0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)],
    ],
}


def is_drawn(root: str | Path) -> bool:
    """Return whether `root` holds the whole dataset; a half-drawn folder does not count."""
    return (Path(root) / "captions.json").is_file()


def draw(
    root: str | Path, *, seed: int = 0, train: int = 4000, val: int = 500, test: int = 500
) -> Path:
    """Return `root`, a folder that now holds `images/` and `captions.json` in Karpathy's layout.

    `train`, `val` and `test` count images. A folder that is drawn already stays as it is,
    whatever its seed and sizes; a half-drawn one is drawn again. Processes that ask at the same
    time wait for the first of them.
    """
    root = Path(root)
    if is_drawn(root):
        return root
    with files.lock(root / ".lock"):
        if not is_drawn(root):
            counts = {"train": train, "val": val, "test": test}
            names = [(split, i) for split, count in counts.items() for i in range(count)]
            (root / "images").mkdir(exist_ok=True)
            bar = progress_bar(names, desc="drawing shapes", unit="image")
            images = [
                draw_one(root, seed, split, index, imgid)
                for imgid, (split, index) in enumerate(bar)
            ]
            # Last, and in one move: this file is what says that the folder is complete.
            files.write_text(
                root / "captions.json", json.dumps({"dataset": "shapes", "images": images}) + "\n"
            )
    return root


def draw_one(root: Path, seed: int, split: str, index: int, imgid: int) -> dict:
    """Write one image and return its record in Karpathy's layout, with its scene."""
    scene, image, captions = example(seed, split, index)
    filename = f"{split}_{index:05d}.png"
    # Not through files.replacing: 5,000 fsyncs are slow, and captions.json guards the folder.
    image.save(root / "images" / filename, compress_level=1)
    return {
        "filename": filename,
        "split": split,
        "imgid": imgid,
        "sentences": [{"raw": caption, "tokens": caption.split()} for caption in captions],
        "scene": scene,
    }


def example(
    seed: int, split: str, index: int, side: int = IMAGE_SIZE
) -> tuple[dict, Image.Image, list[str]]:
    """Return a scene, its RGB image of `side` pixels and five true captions of it.

    They are the same ones at every call, whatever the side.
    A scene is `{"objects": [{"shape", "colour", "size", "x", "y"}, …]}`, x and y being the
    centre in fractions of the image's width and height, from the top left.
    """
    # Seeded by text, so that no image depends on another or on Python's hash seed.
    rng = random.Random(f"{seed}/{split}/{index}")
    objects = compose(rng)
    return {"objects": objects}, paint(objects, rng, side), describe(objects, rng)


def compose(rng: random.Random) -> list[dict]:
    """Return a scene's objects at random; each shares a grid line with the one before it."""
    (count,) = rng.choices(list(COUNTS), weights=list(COUNTS.values()))
    looks = zip(rng.sample(list(SHAPES), count), rng.sample(list(COLOURS), count), strict=True)
    objects = []
    for (shape, colour), (column, row) in zip(looks, place(count, rng), strict=True):
        x, y = (
            round((cell + 0.5) / GRID + rng.uniform(-POSITION_JITTER, POSITION_JITTER), 4)
            for cell in (column, row)
        )
        size = rng.choice(list(SIZES))
        objects.append({"shape": shape, "colour": colour, "size": size, "x": x, "y": y})
    return objects


def place(count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Return `count` different (column, row) cells, each on a line with the one before it."""
    cells = [(column, row) for column in range(GRID) for row in range(GRID)]
    chosen = [rng.choice(cells)]
    while len(chosen) < count:
        column, row = chosen[-1]
        free = [c for c in cells if c not in chosen and (c[0] == column or c[1] == row)]
        chosen.append(rng.choice(free))
    return chosen


def paint(objects: list[dict], rng: random.Random, side: int = IMAGE_SIZE) -> Image.Image:
    """Return the RGB image of `objects` on a light ground, with slight jitter of the looks."""
    side *= SUPERSAMPLING
    image = Image.new("RGB", (side, side), tuple(rng.randint(*GROUND) for _ in "rgb"))
    pen = ImageDraw.Draw(image)
    for thing in objects:
        radius = SIZES[thing["size"]] * rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
        outline = [
            (side * (thing["x"] + radius * x), side * (thing["y"] + radius * y))
            for x, y in SHAPES[thing["shape"]]
        ]
        pen.polygon(outline, fill=tinted(COLOURS[thing["colour"]], rng))
    return image.reduce(SUPERSAMPLING)


def tinted(colour: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """Return `colour` a little off."""
    return tuple(
        min(255, max(0, value + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for value in colour
    )


def describe(objects: list[dict], rng: random.Random) -> list[str]:
    """Return five true captions of `objects`, each by another template, of 6 to 20 words."""
    return [template.format(**words(objects, rng)) for template in TEMPLATES[len(objects)]]


def words(objects: list[dict], rng: random.Random) -> dict[str, str]:
    """Return what the fields of a template stand for, synonyms chosen at random."""
    fields = {}
    for letter, thing in zip("abc", objects, strict=False):
        plain = f"{thing['colour']} {thing['shape']}"
        fields[letter] = plain
        fields[letter.upper()] = f"{rng.choice(SIZE_WORDS[thing['size']])} {plain}"
    for pair, first, second in zip(("ab", "bc"), objects, objects[1:], strict=False):
        relation = relate(first, second)
        for name, way in ((pair, relation), (pair[::-1], OPPOSITE[relation])):
            fields[name] = rng.choice(SHORT[way])
            fields[name.upper()] = rng.choice(LONG[way])
    return fields


def relate(first: dict, second: dict) -> str:
    """Return where `first` lies as seen from `second`, on the axis that parts them more."""
    across, down = first["x"] - second["x"], first["y"] - second["y"]
    if abs(down) > abs(across):
        return "above" if down < 0 else "below"
    return "left" if across < 0 else "right"
