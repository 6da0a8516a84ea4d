"""Fill `data/`: download, verify and unpack a dataset, or unpack archives already at hand.

    python download_data.py                            # Flickr8k into data/flickr8k
    python download_data.py shapes                     # a small drawn dataset, no network
    python download_data.py --archives ~/Downloads     # no network for archives found there

A broken download is continued, a dead mirror is passed over, and a dataset folder appears under
its own name only when it is whole.
"""

import hashlib
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
import tyro
from tqdm import tqdm

import files

ATTEMPTS = 3  # in a row on one mirror that bring no new byte
PAUSE = 1.0  # seconds before another attempt, doubled at each
TIMEOUT = (15, 60)  # seconds to connect, and without a byte
# Small, because what was read of a chunk is lost when the connection breaks inside it.
CHUNK = 1 << 16
MARKER = ".unpacked.json"  # inside an unpacked folder: the archive it is from


@dataclass(frozen=True)
class File:
    """An archive to download; the MD5 alone decides whether its bytes are right."""

    name: str
    md5: str
    size: int
    """Bytes, about: for the estimate of disk space only."""
    folder: str
    """The folder of the dataset that it fills, whether or not the archive names that folder."""
    urls: tuple[str, ...]
    """Mirrors, the first to be tried first."""


FLICKR8K_MIRRORS = (
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/",
    "https://github.com/Avaneesh40585/Flickr8k-Dataset/releases/download/v1.0/",
)


def flickr8k(name: str, md5: str, size: int, folder: str) -> File:
    return File(name, md5, size, folder, tuple(mirror + name for mirror in FLICKR8K_MIRRORS))


# Small archives first: a dead network is then noticed at once.
DATASETS: dict[str, tuple[File, ...]] = {
    "flickr8k": (
        flickr8k(
            "Flickr8k_text.zip", "bf6c1abcb8e4a833b7f922104de18627", 2_340_801, "Flickr8k_text"
        ),
        flickr8k(  # "Flicker8k" is misspelt so in the archive, and by all who read it
            "Flickr8k_Dataset.zip",
            "f18a1e2920de5bd84dae7cf08ec78978",
            1_115_419_746,
            "Flicker8k_Dataset",
        ),
    ),
    "shapes": (),  # drawn
}


@dataclass(frozen=True)
class Config:
    dataset: tyro.conf.Positional[tyro.extras.literal_type_from_choices(DATASETS)] = "flickr8k"
    """flickr8k: 1.1 GB, non-commercial research and education only. shapes: drawn here."""

    root: Path = Path("data")
    """Folder of all datasets; this one lands in ROOT/DATASET."""

    archives: Path | None = None
    """Folder of archives you have: verified, unpacked without a download, left where they are."""

    keep_archives: bool = False
    """Keep what was downloaded, in ROOT/DATASET/archives; else it is deleted once unpacked."""


def main(argv: list[str] | None = None) -> None:
    """Get the dataset that the command line names."""
    config = files.parse(
        Config,
        argv,
        program="download_data.py",
        description="Download, verify and unpack a dataset. Run again, it continues.",
    )
    folder = config.root.expanduser() / config.dataset
    if config.dataset == "shapes":
        draw_shapes(folder)
        return
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        fill(folder, DATASETS[config.dataset], config.archives, config.keep_archives)


def draw_shapes(folder: Path) -> None:
    """Draw the shapes dataset into `folder`, if it is not there."""
    import shapes

    if shapes.is_drawn(folder):
        print(f"{folder} is complete, nothing to do")
        return
    shapes.draw(folder)
    print(f"{folder} is ready")


def fill(folder: Path, wanted: Sequence[File], archives: Path | None, keep: bool) -> None:
    """Unpack into `folder` each wanted file that is not there, downloading those not at hand."""
    missing = [file for file in wanted if not is_unpacked(file, folder)]
    if not missing:
        print(f"{folder} is complete, nothing to do")
        return
    # Before any download: a wrong archive at hand should be known now, not an hour later.
    at_hand = {} if archives is None else find_archives(missing, archives.expanduser())
    downloads = folder / "archives"
    downloads.mkdir(parents=True, exist_ok=True)
    check_space(folder, missing, at_hand, downloads)
    for file in missing:
        unpack(at_hand.get(file) or fetch(file, downloads), file, folder)
        if not keep and file not in at_hand:  # --archives may be this very folder
            (downloads / file.name).unlink()
        (downloads / f"{file.name}.part").unlink(missing_ok=True)  # if it came from --archives
    if not any(downloads.iterdir()):
        downloads.rmdir()
    print(f"{folder} is ready")


def is_unpacked(file: File, folder: Path) -> bool:
    """Return whether `file`'s folder is there; one that the user made counts, and is said."""
    target = folder / file.folder
    if not target.exists() or not any(target.iterdir()):
        return False
    marker = target / MARKER
    if not marker.exists() or files.read_json(marker).get("md5") != file.md5:
        print(f"{target} is not from this {file.name}: left as it is (remove it to get it anew)")
    return True


def find_archives(wanted: Sequence[File], archives: Path) -> dict[File, Path]:
    """Return those wanted files that lie in `archives`; a wrong one is a ValueError."""
    if not archives.is_dir():
        raise FileNotFoundError(f"--archives {archives} is not a folder")
    found = {}
    for file in wanted:
        path = archives / file.name
        if not path.exists():
            print(f"{file.name} is not in {archives}: it will be downloaded")
        elif (actual := md5_of(path)) != file.md5:
            raise ValueError(
                f"{path} is not the right archive: MD5 {file.md5} expected, {actual} found; "
                f"replace it, or remove it to have it downloaded"
            )
        else:
            found[file] = path
    return found


def check_space(
    folder: Path, missing: Sequence[File], at_hand: Container[File], downloads: Path
) -> None:
    """Say in one line what is needed; too little room on the disk is an OSError."""
    here = sum(path.stat().st_size for path in downloads.iterdir())
    download = max(0, sum(file.size for file in missing if file not in at_hand) - here)
    unpacked = sum(file.size for file in missing)  # photographs: zipped they are hardly smaller
    free = shutil.disk_usage(folder).free
    need = (
        f"{folder} needs about {tqdm.format_sizeof(download, 'B')} to download and "
        f"{tqdm.format_sizeof(unpacked, 'B')} to unpack; {tqdm.format_sizeof(free, 'B')} free"
    )
    if download + unpacked > free:
        raise OSError(f"too little disk space: {need}; make room, or choose another --root")
    print(need, flush=True)


def fetch(file: File, folder: Path) -> Path:
    """Return `folder / file.name`, verified: the one that is there, or else from the mirrors.

    Bytes that come are kept in `<name>.part`, which the next call continues. When no mirror gives
    the right bytes, a ConnectionError says what was wrong with each.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    if path.exists() and md5_of(path) == file.md5:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    with requests.Session() as session:
        for url in file.urls:
            print(f"downloading {url}", flush=True)
            try:
                download(session, url, part, file.md5)
            except (requests.RequestException, ValueError) as error:
                faults.append(f"{url} ({describe(error)})")
                print(f"failed: {describe(error)}", flush=True)
            else:
                os.replace(part, path)
                return path
    raise ConnectionError(
        f"{file.name} could not be downloaded: {', '.join(faults)}. Run again later, or get "
        f"{file.name} (MD5 {file.md5}) another way, put it in a folder DIR and run again with "
        f"--archives DIR"
    )


def download(session: requests.Session, url: str, part: Path, md5: str) -> None:
    """Complete `part` from `url`; a wrong checksum removes it and is a ValueError."""
    for last in (False, True):
        in_one_piece = complete(session, url, part)
        actual = md5_of(part)
        if actual == md5:
            return
        part.unlink()
        # Pieces may be of two versions of the file, or of two mirrors: once more, from the start.
        if in_one_piece or last:
            raise ValueError(f"MD5 {md5} expected, {actual} found")


def complete(session: requests.Session, url: str, part: Path) -> bool:
    """Return whether all of `part` came in one answer, after as many attempts as it takes."""
    most, failures = size_of(part), 0
    while True:
        try:
            return receive(session, url, part) == 0
        except requests.RequestException as error:
            # A long download may break many times: only attempts that bring nothing new count.
            failures = failures + 1 if size_of(part) <= most else 0
            most = max(most, size_of(part))
            if failures == ATTEMPTS or is_final(error):
                raise
            time.sleep(PAUSE * 2**failures)


def receive(session: requests.Session, url: str, part: Path) -> int:
    """Append to `part` what it lacks, and return the byte at which the server began."""
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == 416:  # nothing after `have`: the checksum will tell
            return have
        response.raise_for_status()
        start = first_byte(response, have)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        look = {"desc": part.stem, "unit": "B", "unit_scale": True, "disable": None}
        with open(part, "ab") as out, tqdm(total=total, initial=start, **look) as bar:
            out.truncate(start)
            for chunk in response.iter_content(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    if total is not None and size_of(part) < total:  # older urllib3 does not notice
        raise requests.ConnectionError("the connection broke")
    return start


def first_byte(response: requests.Response, asked: int) -> int:
    """Return where the answer's bytes belong: at 0 if the server ignores ranges."""
    if response.status_code != 206:
        return 0
    said = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(said[1]) if said else asked


def is_final(error: requests.RequestException) -> bool:
    """Return whether the server's answer will not change: a 4xx, but for "later" and "slower"."""
    status = error.response.status_code if error.response is not None else 0
    return 400 <= status < 500 and status not in (408, 429)


def describe(error: Exception) -> str:
    """Return the error in a few words: those of requests hold the address again, and objects."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}"
    return type(error).__name__ if isinstance(error, requests.RequestException) else str(error)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def md5_of(path: Path) -> str:
    """Return the file's MD5 in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, file: File, folder: Path) -> None:
    """Unpack `archive` into `folder / file.folder`, which appears whole or not at all."""
    target, temporary = folder / file.folder, folder / f".unpacking-{file.folder}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            places = safe_places(opened, archive, file.folder)
            look = {"desc": f"unpacking {file.name}", "unit": "file", "disable": None}
            for member, place in tqdm(places.items(), **look):
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, open(temporary / place, "wb") as out:
                    shutil.copyfileobj(source, out)
        files.write_json(temporary / MARKER, {"archive": file.name, "md5": file.md5})
        if hasattr(os, "sync"):  # after a power cut the new name must not stand for empty files
            os.sync()
        if target.exists():
            target.rmdir()  # empty, or `is_unpacked` would have said so
        os.rename(temporary, target)
        files.sync_folder(folder)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a sound zip archive ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def safe_places(
    opened: zipfile.ZipFile, archive: Path, top: str
) -> dict[zipfile.ZipInfo, PurePosixPath]:
    """Return where each file of the archive belongs in the folder `top`.

    A leading `top` is taken off and the Mac's `__MACOSX` is left out. A name that could lead
    outside, on any system, or a link is a ValueError.
    """
    places = {}
    for member in opened.infolist():
        name = member.orig_filename  # `filename` has been changed to suit this system
        path = PurePosixPath(name)
        kind = stat.S_IFMT(member.external_attr >> 16)
        unsafe = path.is_absolute() or ".." in path.parts or any(c in name for c in "\\:\0")
        if unsafe or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{archive} is refused: {name!r} in it could write outside its folder")
        if not member.is_dir() and path.parts[:1] != ("__MACOSX",):
            places[member] = path.relative_to(top) if path.parts[:1] == (top,) else path
    return places


if __name__ == "__main__":
    files.run(main)
