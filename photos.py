"""Photographs on disk: which are meant, and the captioned copies and texts written for them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

import files
import plots
from images import read_image, walk_images


def find_photos(
    places: Sequence[Path], made: Path | None = None, *, recursive: bool = True
) -> list[str]:
    """Return the pictures named, folders replaced by what they hold, but nothing below `made`.

    Raises ValueError where a folder holds none, and where nothing is named.
    """
    if not places:
        raise ValueError("no picture was named; give files or folders: python inference.py PHOTO")
    found: list[str] = []
    for place in places:
        inside = walk_images(place, recursive) if place.is_dir() else iter([str(place)])
        if made and place.is_dir() and place.resolve() in made.resolve().parents:
            below = os.path.join(place / made.resolve().relative_to(place.resolve()), "")
            inside = (photo for photo in inside if not photo.startswith(below))  # made earlier
        before = len(found)
        found += inside
        if len(found) == before:
            raise ValueError(f"no pictures in the folder {place}")
    return found


def sidecar(photo: str) -> str:
    """Return the text file beside a picture, photo.txt for photo.jpg."""
    return str(Path(photo).with_suffix(".txt"))


def check_sidecars(photos: Sequence[str]) -> None:
    """Raise ValueError where two pictures would share a sidecar, OSError where none can be made."""
    owners: dict[str, str] = {}
    for photo in photos:
        text = sidecar(photo)
        if (other := owners.setdefault(text, photo)) != photo:
            raise ValueError(f"{other} and {photo} would both have {text}; rename one of them")
    check_folders(owners)


def check_folders(targets: Iterable[str]) -> None:
    """Raise OSError where the folder of a target can't be written: one look a folder."""
    files.check_writable(*{os.path.dirname(target): target for target in targets}.values())


# --- captioned pictures

WRITABLE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
MADE_HERE = "image-captioning --annotate"


def annotated_places(folder: Path, places: Sequence[Path], photos: Sequence[str]) -> dict[str, str]:
    """Return the file in `folder` for each picture: its path below the place named, or its name.

    A number is added where that is taken, .png where Pillow can't write the picture's own format.
    Raises ValueError where a file would be overwritten that was not made so before.
    """
    targets: dict[str, str] = {}
    taken: set[str] = set()
    for photo in dict.fromkeys(photos):
        name = below_place(Path(photo), places)
        if name.suffix.lower() not in WRITABLE:
            name = name.with_name(f"{name.name}.png")
        target, number = str(folder / name), 2
        while target in taken:
            target, number = str(folder / name.with_stem(f"{name.stem}-{number}")), number + 1
        if os.path.exists(target) and not made_here(target):
            raise ValueError(
                f"--annotate {folder} would overwrite {target}, a file of your own; name another "
                "folder"
            )
        targets[photo] = target
        taken.add(target)
    check_folders(taken)
    return targets


def below_place(photo: Path, places: Sequence[Path]) -> Path:
    """Return the picture's path below the first place named that it lies in, else its name."""
    base = next((place for place in places if place in photo.parents), photo.parent)
    return photo.relative_to(base)


def made_here(path: str) -> bool:
    """Tell whether a picture was written by `write_annotated`."""
    try:
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE) == MADE_HERE
    except (OSError, ValueError, SyntaxError):
        return False


def write_annotated(target: str, photo: str, text: str) -> None:
    """Write the picture with its caption under it, and in its EXIF description.

    Raises ValueError where it can't be written.
    """
    picture = plots.annotate(read_image(photo), text)
    about = Image.Exif()
    about[DESCRIPTION] = text.encode()  # bytes: Pillow would make ? of all but ASCII
    about[SOFTWARE] = MADE_HERE
    form = WRITABLE[Path(target).suffix.lower()]
    try:
        with files.replacing(target) as temporary:
            picture.save(temporary, format=form, quality=92, exif=about)
    except (ValueError, OSError) as error:
        raise ValueError(f"{target} can't be written ({error})") from error
