"""Photographs on disk: which are meant, and the captioned copies and texts written for them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import files
import plots
from images import list_images, read_image


def find_photos(
    places: Sequence[Path], made: Path | None = None, *, recursive: bool = True
) -> list[Path]:
    """Return the pictures named, folders replaced by what they hold, but nothing below `made`.

    Raises ValueError where a folder holds none, and where nothing is named.
    """
    if not places:
        raise ValueError("no picture was named; give files or folders: python inference.py PHOTO")
    found: list[Path] = []
    for place in places:
        inside = list_images(place, recursive) if place.is_dir() else [place]
        if made and place.is_dir() and place.resolve() in made.resolve().parents:
            below = place / made.resolve().relative_to(place.resolve())
            inside = [photo for photo in inside if below not in photo.parents]  # made earlier
        if not inside:
            raise ValueError(f"no pictures in the folder {place}")
        found += inside
    return found


def sidecar_places(photos: Sequence[Path]) -> dict[Path, Path]:
    """Return the text file beside each picture, photo.txt for photo.jpg.

    Raises ValueError where two pictures would share one.
    """
    targets: dict[Path, Path] = {}
    owners: dict[Path, Path] = {}
    for photo in dict.fromkeys(photos):
        text = photo.with_suffix(".txt")
        if (other := owners.setdefault(text, photo)) != photo:
            raise ValueError(f"{other} and {photo} would both have {text}; rename one of them")
        targets[photo] = text
    files.check_writable(*targets.values())
    return targets


# --- captioned pictures

WRITABLE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
MADE_HERE = "image-captioning --annotate"


def annotated_places(folder: Path, places: Sequence[Path], photos: Sequence[Path]) -> dict:
    """Return the file in `folder` for each picture: its path below the place named, or its name.

    A number is added where that is taken, .png where Pillow can't write the picture's own format.
    Raises ValueError where a file would be overwritten that was not made so before.
    """
    targets: dict[Path, Path] = {}
    taken: set[Path] = set()
    for photo in dict.fromkeys(photos):
        base = next((place for place in places if place in photo.parents), photo.parent)
        name = photo.relative_to(base)
        if name.suffix.lower() not in WRITABLE:
            name = name.with_name(f"{name.name}.png")
        target, number = folder / name, 2
        while target in taken:
            target, number = folder / name.with_stem(f"{name.stem}-{number}"), number + 1
        if target.exists() and not made_here(target):
            raise ValueError(
                f"--annotate {folder} would overwrite {target}, a file of your own; name another "
                "folder"
            )
        targets[photo] = target
        taken.add(target)
    files.check_writable(*taken)
    return targets


def made_here(path: Path) -> bool:
    """Tell whether a picture was written by `write_annotated`."""
    try:
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE) == MADE_HERE
    except (OSError, ValueError, SyntaxError):
        return False


def write_annotated(target: Path, photo: Path, text: str) -> None:
    """Write the picture with its caption under it, and in its EXIF description.

    Raises ValueError where it can't be written.
    """
    picture = plots.annotate(read_image(photo), text)
    about = Image.Exif()
    about[DESCRIPTION] = text.encode()  # bytes: Pillow would make ? of all but ASCII
    about[SOFTWARE] = MADE_HERE
    form = WRITABLE[target.suffix.lower()]
    try:
        with files.replacing(target) as temporary:
            picture.save(temporary, format=form, quality=92, exif=about)
    except (ValueError, OSError) as error:
        raise ValueError(f"{target} can't be written ({error})") from error
