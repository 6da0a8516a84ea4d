"""A small dataset in every layout of Flickr8k, and images of one colour."""

import csv
import json
from pathlib import Path

from PIL import Image

from shards import SPLITS

NAMES = [f"image_{number:02}.jpg" for number in range(24)]
CAPTIONS = {
    name: [
        f"A dog , number {number} , runs .",
        f'a man in a "cool" shirt and {number} birds',
        "une fête à la plage",
        "लाल गेंद",
        "a caption's apostrophe # and hash",
    ]
    for number, name in enumerate(NAMES)
}
PARTS = {"train": NAMES[:14], "val": NAMES[14:18], "test": NAMES[18:]}
LIST_WORDS = {"train": "train", "val": "dev", "test": "test"}


def draw(folder: Path, names=NAMES) -> None:
    """Write small images; the same name gives the same image anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        colour = tuple(hash_byte * 7 % 256 for hash_byte in name.encode()[-6:-3])
        Image.new("RGB", (6, 4), colour).save(folder / name, "PNG")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def token_text(captions=CAPTIONS) -> str:
    rows = [
        f"{name}#{i}\t{line}\n" for name, lines in captions.items() for i, line in enumerate(lines)
    ]
    return "".join(rows)


def official(root: Path, splits=SPLITS, images_of=NAMES, captions=CAPTIONS) -> Path:
    draw(root / "Flicker8k_Dataset", images_of)
    write(root / "Flicker8k_Dataset" / ".unpacked.json", "{}")  # our downloader's
    write(root / "Flickr8k_text" / "Flickr8k.token.txt", token_text(captions))
    for split in splits:
        name = f"Flickr_8k.{LIST_WORDS[split]}Images.txt"
        write(root / "Flickr8k_text" / name, "\n".join(PARTS[split]) + "\n")
    return root


def kaggle(root: Path) -> Path:
    draw(root / "Images")
    with (root / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([name, line] for name, lines in CAPTIONS.items() for line in lines)
    return root


def older(root: Path) -> Path:
    draw(root / "Images")
    write(root / "Flickr8k.token.txt", token_text())
    return root


def karpathy(root: Path, parts=PARTS) -> Path:
    draw(root / "Flicker8k_Dataset")
    images = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": line, "tokens": line.split()} for line in CAPTIONS[name]],
        }
        for split, names in parts.items()
        for name in names
    ]
    write(root / "dataset_flickr8k.json", json.dumps({"images": images, "dataset": "flickr8k"}))
    return root


LAYOUTS = {"official": official, "kaggle": kaggle, "older": older, "karpathy": karpathy}


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (120, 90, 30)).save(path)


def write_colours(folder: Path, more: tuple[str, ...] = ()) -> Path:
    """Write red and blue images with a table of captions; `more`: further rows of train."""
    rows = ["image,caption,split"]
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for number in range(count):
            colour, caption = [("red", "a red apple"), ("blue", "a blue ocean")][number % 2]
            name = f"{split}-{number}.png"
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), colour).save(folder / name)
            rows.append(f"{name},{caption},{split}")
    (folder / "captions.csv").write_text("\n".join([*rows, *more]))
    return folder
