"""Zip archives from strangers → folders that are there whole, or not at all."""

import os
import posixpath
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

import files

MARKER = ".unpacked.json"  # inside an unpacked folder: the archive it is from
BOMB = 20  # times its archive's size: captions shrink to a fifth, photographs hardly


def unpack(archive: Path, target: Path, about: dict[str, str]) -> None:
    """Unpack `archive` into the folder `target`, which appears whole or not at all.

    `about` is what the marker in it will say. A ValueError is an archive that is not sound or
    means harm; then nothing is left.
    """
    temporary = target.with_name(f".unpacking-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            places = safe_places(opened, archive)
            look = {"desc": f"unpacking {archive.name}", "unit": "file", "disable": None}
            for member, place in tqdm(places.items(), **look):
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, open(temporary / place, "wb") as out:
                    shutil.copyfileobj(source, out)
        files.write_json(temporary / MARKER, about)
        if hasattr(os, "sync"):  # after a power cut the new name must not stand for empty files
            os.sync()
        if target.exists():
            target.rmdir()  # empty, or `is_unpacked` would have said so
        os.rename(temporary, target)
        files.sync_folder(target.parent)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError: encrypted, or packed by a method that zipfile doesn't know.
        raise ValueError(f"{archive} is not a sound zip archive ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def safe_places(opened: zipfile.ZipFile, archive: Path) -> dict[zipfile.ZipInfo, PurePosixPath]:
    """Return where each file of the archive belongs in its folder.

    Folders that all files share are taken off and the Mac's `__MACOSX` is left out. A ValueError
    is a name that could lead outside, on any system, a link, one place for two files (letters'
    case aside, as on Macs and Windows), no file at all, or far more bytes than the archive's own.
    """
    places: dict[zipfile.ZipInfo, PurePosixPath] = {}
    taken: set[str] = set()
    for member in opened.infolist():
        name = member.orig_filename  # `filename` has been changed to suit this system
        path = PurePosixPath(name)
        kind = stat.S_IFMT(member.external_attr >> 16)
        unsafe = path.is_absolute() or ".." in path.parts or any(c in name for c in "\\:\0")
        if unsafe or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{archive} is refused: {name!r} in it could write outside its folder")
        if not member.is_dir() and path.parts[:1] != ("__MACOSX",):
            place = str(path).casefold()
            if place in taken:
                raise ValueError(f"{archive} is refused: {name!r} is in it twice")
            taken.add(place)
            places[member] = path
    # zipfile unpacks no more of a file than the size it says.
    size = sum(member.file_size for member in places)
    if not places or size > BOMB * archive.stat().st_size:
        raise ValueError(
            f"{archive} is refused: {len(places)} files of {size / 1e6:.1f} MB in "
            f"{archive.stat().st_size / 1e6:.1f} MB are no dataset"
        )
    shared = posixpath.commonpath([path.parent for path in places.values()])
    return {member: path.relative_to(shared) for member, path in places.items()}
