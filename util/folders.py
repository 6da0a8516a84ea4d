"""The files in a dataset's folder and the folders in it, however they were unpacked."""

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from util.images import HIDDEN, leads_to_folder, log_unread

Folders = Mapping[Path, set[str]]  # the names of the files in each folder


def scan_folders(root: Path) -> dict[Path, set[str]]:
    """Return the names of the files in `root` and the folders in it, two levels deep.

    Hidden folders and those of Macs are left out, and those that can't be read, which are logged.
    """
    check_folder(root)
    found: dict[Path, set[str]] = {}
    level = [root]
    for _ in range(3):
        below = []
        for folder in level:
            try:
                if not os.access(folder, os.R_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
                with os.scandir(folder) as entries:
                    found[folder] = set()
                    for entry in entries:
                        if not leads_to_folder(entry):
                            found[folder].add(entry.name)
                        elif not entry.name.startswith(HIDDEN):
                            below.append(folder / entry.name)
            except OSError as error:
                if folder == root:
                    raise
                log_unread(error)
        level = sorted(below)
    return found


def check_folder(root: Path) -> None:
    """Raise FileNotFoundError if the dataset's folder is not there."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"no dataset at {root}: there is no such folder; run python download_data.py flickr8k "
            "(or coco, flickr30k), or give --data-dir, the folder that holds the dataset's files"
        )


def find_file(folders: Folders, *names: str) -> Path | None:
    """Return the path of the first of `names` that is in any of `folders`, or None."""
    found = (folder / name for name in names for folder in folders if name in folders[folder])
    return next(found, None)


def find_subfolder(folders: Folders, path: str) -> str:
    """Return `path` or its last part, whichever is a folder below one of `folders`, or "".

    Paths that lead out of a folder, as those of another computer do, are searched for by their last
    part.
    """
    place = PurePosixPath(path)
    is_inside = not place.is_absolute() and ".." not in place.parts
    for known in (str(place), place.name) if is_inside else (place.name,):
        if known not in ("", ".") and any(os.path.isdir(folder / known) for folder in folders):
            return known
    return ""


def add_folders(
    folders: Folders, images: Sequence[tuple[str, str]], default: str = ""
) -> list[str]:
    """Return the path of each image, given as the folder and the name that an annotation says.

    It is the name alone where there is no such folder, so that it is found in any other, unless
    images of two folders have this name. Images without a folder are those in the folder `default`,
    if they are there.
    """
    places = {folder: find_subfolder(folders, folder) for folder in {each[0] for each in images}}
    usual = {name for folder in folders if folder.name == default for name in folders[folder]}
    shared = Counter(name for _, name in set(images))
    paths = []
    for folder, name in images:
        place = places[folder] or (default if name in usual else "")
        if not place and shared[name] > 1:
            place = folder.strip("/")
        paths.append(f"{place}/{name}" if place else name)
    return paths


def find_images(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the path of each image that is in `root` or a folder in it.

    An image of which there are several is taken from the folder with the most images. A name may
    be a path below a folder.
    """
    folders = scan_folders(root)
    nested = defaultdict(set)
    for name in names:
        if os.path.basename(name) != name:
            nested[os.path.dirname(name)].add(name)
    found = {folder: listed.intersection(names) for folder, listed in folders.items()}
    for folder in folders:
        for parent, wanted in nested.items():
            place = folder / parent
            if wanted and os.path.isdir(place):  # False where one may not look
                listed = folders.get(place, set())  # a set is faster than to ask the system
                here = {
                    name
                    for name in wanted
                    if os.path.basename(name) in listed
                    or os.path.isfile(os.path.join(folder, name))
                }
                found[folder] |= here
                wanted -= here
    paths: dict[str, Path] = {}
    for folder in sorted(found, key=lambda folder: -len(found[folder])):
        paths.update((name, folder / name) for name in found[folder] - paths.keys())
    return paths
