"""What captioning writes beside the images or of them: text files, annotated copies.

A text file or an image that somebody else made is never replaced: a text file is kept unless
`overwrite` says otherwise, an image always.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from util import files
from util.files import UserError
from util.images import read_image


def sidecar(image: str) -> str:
    """Return the path of the text file beside an image: photo.txt for photo.jpg."""
    return str(Path(image).with_suffix(".txt"))


def check_sidecars(images: Iterable[str]) -> None:
    """Raise UserError if two images would share a sidecar or one is an image itself.

    Raises OSError if one can't be written.
    """
    owners: dict[str, str] = {}
    for image in images:
        path = sidecar(image)
        if (other := owners.setdefault(path, image)) != image:
            raise UserError(f"{other} and {image} would both have {path}; rename one of them")
    files.check_writable(*owners)
    check_inputs(owners, owners.values())


def write_sidecar(path: str, text: str, overwrite: bool) -> bool:
    """Write a caption to `path`; return False if another text is there, which is kept.

    With `overwrite` it is replaced, unless the file is write-protected.
    """
    content = f"{text}\n"
    if not os.path.lexists(path):
        files.write_text(path, content)
        return True
    if os.path.exists(path) and Path(path).read_bytes() == content.encode():
        return True
    if not overwrite or files.is_protected(path):
        return False
    files.write_text(path, content)
    return True


def check_inputs(outputs: Iterable[str], images: Iterable[str]) -> None:
    """Raise UserError if one of the `outputs` is one of the `images`, whatever its name."""
    existing = [path for path in outputs if os.path.exists(path)]
    inputs = {files.identify(image): image for image in images} if existing else {}
    for path in existing:
        if image := inputs.get(files.identify(path)):
            raise UserError(f"{path} would replace the image {image}, which is to be captioned")


# --- annotated copies

WRITABLE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
MADE_BY = "image-captioning --annotate"


def plan_annotated(folder: Path, places: Sequence[Path], images: Iterable[str]) -> dict[str, str]:
    """Return the path in `folder` of each image's annotated copy.

    It is the image's path below the place that contains it, or its name; numbered if that is
    taken, with .png added if Pillow can't write the image's format. Raises UserError if a file
    would be overwritten that is not such a copy, or is to be captioned itself.
    """
    paths: dict[str, str] = {}
    taken: set[str] = set()
    for image in map(Path, dict.fromkeys(images)):
        base = next((place for place in places if place in image.parents), image.parent)
        copy, number = folder / image.relative_to(base), 2
        if copy.suffix.lower() not in WRITABLE:
            copy = copy.with_name(f"{copy.name}.png")
        path = str(copy)
        while path in taken:
            path, number = str(copy.with_stem(f"{copy.stem}-{number}")), number + 1
        if os.path.exists(path) and not is_made_by(path, MADE_BY):
            raise UserError(
                f"--annotate {folder} would overwrite {path}, a file of your own; name another "
                "folder"
            )
        paths[str(image)] = path
        taken.add(path)
    files.check_writable(*taken)
    check_inputs(taken, paths)
    return paths


def is_made_by(path: str | Path, program: str) -> bool:
    """Return whether an image was written by `program`, as its EXIF block says."""
    try:
        with Image.open(path, formats=tuple(WRITABLE.values())) as image:
            return image.getexif().get(SOFTWARE) == program
    except (OSError, ValueError, SyntaxError):
        return False


def write_annotated(path: str, image: str, text: str) -> None:
    """Write the image with its caption below it, and in its EXIF description.

    Raises UserError if it can't be written.
    """
    from util import plots  # here, as captions alone need no plots

    annotated, exif = plots.annotate(read_image(image), text), Image.Exif()
    exif[DESCRIPTION] = text.encode()  # bytes: Pillow would replace all but ASCII by ?
    exif[SOFTWARE] = MADE_BY
    try:
        with files.replacing(path) as temporary:
            kind = WRITABLE[Path(path).suffix.lower()]
            annotated.save(temporary, format=kind, quality=92, exif=exif)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} can't be written ({error})") from error
