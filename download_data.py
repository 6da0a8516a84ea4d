"""Fill `data/`: download, verify and unpack a dataset, or unpack archives already at hand.

    python download_data.py                            # Flickr8k into data/flickr8k
    python download_data.py coco                       # 20.4 GB into data/coco, asked for first
    python download_data.py shapes                     # a small drawn dataset, no network
    python download_data.py --archives ~/Downloads     # no network for archives found there

A broken download is continued, a dead mirror is passed over, and a dataset folder appears under
its own name only when it is whole.
"""

import hashlib
import os
import posixpath
import re
import shutil
import stat
import sys
import time
import zipfile
import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
import tyro
from tqdm import tqdm

from util import files
from util.files import UserError

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
        raise UserError(f"{archive} is not a sound zip archive ({error})") from error
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
            raise UserError(f"{archive} is refused: {name!r} in it could write outside its folder")
        if not member.is_dir() and path.parts[:1] != ("__MACOSX",):
            place = str(path).casefold()
            if place in taken:
                raise UserError(f"{archive} is refused: {name!r} is in it twice")
            taken.add(place)
            places[member] = path
    # zipfile unpacks no more of a file than the size it says.
    size = sum(member.file_size for member in places)
    if not places or size > BOMB * archive.stat().st_size:
        raise UserError(
            f"{archive} is refused: {len(places)} files of {size / 1e6:.1f} MB in "
            f"{archive.stat().st_size / 1e6:.1f} MB are no dataset"
        )
    shared = posixpath.commonpath([path.parent for path in places.values()])
    return {member: path.relative_to(shared) for member, path in places.items()}


ATTEMPTS = 3  # in a row on one mirror that bring no new byte
PAUSE = 1.0  # seconds before another attempt, doubled at each
TIMEOUT = (15, 60)  # seconds to connect, and without a byte
CHUNK = 1 << 16  # small, for what was read of one is lost when the connection breaks inside it
ASK = 5e9  # bytes; a larger download is asked for
SURPLUS = 1.5  # times its size: more than that of a file is another file
BYTES = {"unit": "B", "unit_scale": True, "disable": None}  # a bar's look; none without terminal


@dataclass(frozen=True)
class File:
    """An archive to download; the MD5 alone decides whether its bytes are right."""

    name: str
    md5: str
    size: int  # bytes, about: to show, and for the estimate of disk space
    folder: str  # of the dataset, which it alone fills, whatever the archive calls it
    mirrors: tuple[str, ...]  # addresses that the name is added to, the first to be tried first
    about: str = ""  # what is in it, for --help
    usual: bool = True  # fetched when no --parts are named


FLICKR8K = (
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/",
    "https://github.com/Avaneesh40585/Flickr8k-Dataset/releases/download/v1.0/",
)
# By http, for this host's certificate is another's; the checksum is what counts.
COCO = ("http://images.cocodataset.org/", "https://s3.amazonaws.com/images.cocodataset.org/")
IMAGES = tuple(mirror + "zips/" for mirror in COCO)
ANNOTATIONS = tuple(mirror + "annotations/" for mirror in COCO)
STANFORD = ("https://cs.stanford.edu/people/karpathy/deepimagesent/",)
# fmt: off
KARPATHY = File("caption_datasets.zip", "4fa8c08369d22fe16e41dc124bd1adc2", 36_745_453, "karpathy",
                STANFORD, "captions and splits of COCO, Flickr8k and Flickr30k by Karpathy")
# Small archives first: a dead network is then noticed at once.
DATASETS: dict[str, tuple[File, ...]] = {
    "flickr8k": (
        File("Flickr8k_text.zip", "bf6c1abcb8e4a833b7f922104de18627", 2_340_801,
             "Flickr8k_text", FLICKR8K, "captions and splits"),
        File("Flickr8k_Dataset.zip", "f18a1e2920de5bd84dae7cf08ec78978", 1_115_419_746,
             "Flicker8k_Dataset", FLICKR8K, "8,091 images"),  # misspelt so in the archive
    ),
    "flickr30k": (KARPATHY,),
    "coco": (
        KARPATHY,
        File("annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd", 252_872_794,
             "annotations2014", ANNOTATIONS, "captions, objects and keypoints of 2014"),
        File("val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3", 6_645_013_297,
             "val2014", IMAGES, "40,504 images"),
        File("train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88", 13_510_573_713,
             "train2014", IMAGES, "82,783 images"),
        File("annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 252_907_541,
             "annotations2017", ANNOTATIONS, "captions, objects and keypoints of 2017", False),
        File("val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330,
             "val2017", IMAGES, "5,000 images, all of them in 2014's too", False),
        File("train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798,
             "train2017", IMAGES, "118,287 images, all of them in 2014's too", False),
    ),
    "shapes": (),  # drawn
}
# fmt: on
FLICKR30K_IMAGES = """Flickr30k's images are given on request: ask for them at \
https://shannon.cs.illinois.edu/DenotationGraph/ and put them into {folder}/flickr30k-images"""


@dataclass(frozen=True)
class Config:
    dataset: tyro.conf.Positional[tyro.extras.literal_type_from_choices(DATASETS)] = "flickr8k"
    """flickr8k: 1.1 GB, non-commercial research and education only. coco: 20.4 GB, asked for first.
    flickr30k: captions alone. shapes: drawn here."""

    parts: tuple[str, ...] = ()
    """Parts of the dataset to get, of those listed above; none named: those with a star."""

    root: Path = Path("data")
    """Folder of all datasets; this one lands in ROOT/DATASET."""

    archives: Path | None = None
    """Folder of archives you have: verified, unpacked without a download, left where they are."""

    keep_archives: bool = False
    """Keep what was downloaded, in ROOT/DATASET/archives; else it is deleted once unpacked."""

    yes: bool = False
    """Download without a question, however much it is; else more than 5 GB are asked for."""


def main(argv: list[str] | None = None) -> None:
    """Get the dataset that the command line names."""
    config = files.parse(Config, argv, program="download_data.py", description=overview())
    wanted = choose(config.dataset, config.parts)
    folder = config.root.expanduser() / config.dataset
    if config.dataset == "shapes":
        draw_shapes(folder)
        return
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        fill(folder, wanted, config.archives, config.keep_archives, config.yes)
    if config.dataset == "flickr30k":
        print(FLICKR30K_IMAGES.format(folder=folder))


def overview() -> str:
    """Return what --help says first, with a paragraph for each part of each dataset."""
    said = ["Download, verify and unpack a dataset. Run again, it continues. The parts:"]
    for dataset, parts in DATASETS.items():
        for part in parts:
            name = f"{dataset} {part.folder}" + " *" * part.usual
            said.append(f"{name}: {in_units(part.size)}, {part.about}")
    return "\n\n".join(said)


def choose(dataset: str, parts: Sequence[str]) -> list[File]:
    """Return the rows of the parts, or the dataset's usual ones where none is named."""
    known = {file.folder: file for file in DATASETS[dataset]}
    for part in parts:
        if part not in known:
            raise UserError(f"{dataset} has no part {part!r}; parts: {', '.join(known) or 'none'}")
    return [file for name, file in known.items() if (name in parts if parts else file.usual)]


def draw_shapes(folder: Path) -> None:
    """Draw the shapes dataset into `folder`, if it is not there."""
    from util import shapes

    if shapes.is_drawn(folder):
        print(f"{folder} is complete, nothing to do")
    else:
        shapes.draw(folder)
        print(f"{folder} is ready")


def fill(folder: Path, wanted: list[File], archives: Path | None, keep: bool, yes: bool) -> None:
    """Unpack into `folder` each wanted file that is not there, downloading those not at hand."""
    downloads = folder / "archives"
    archives = archives and archives.expanduser()
    # Where --archives names this very folder, what lies in it is the user's.
    keep = keep or (archives is not None and archives.resolve() == downloads.resolve())
    missing = [file for file in wanted if not is_unpacked(file, folder)]
    for file in wanted:
        if is_from(file, folder):  # a run may have been killed before it could clear up
            clear(file, downloads, keep)
    if not missing:
        print(f"{folder} is complete, nothing to do")
        return
    # Before any download: a wrong archive at hand should be known now, not an hour later.
    at_hand = {} if archives is None else find_archives(missing, archives)
    folder.mkdir(parents=True, exist_ok=True)
    download = plan(folder, wanted, missing, at_hand)
    if download > ASK and not yes:
        confirm(in_units(download))
    for file in missing:
        archive = at_hand.get(file) or fetch(file, downloads)
        unpack(archive, folder / file.folder, {"archive": file.name, "md5": file.md5})
        clear(file, downloads, keep)
    print(f"{folder} is ready")


def clear(file: File, downloads: Path, keep: bool) -> None:
    """Remove from `downloads` what is no longer needed of an unpacked file, and empty folders."""
    (downloads / f"{file.name}.part").unlink(missing_ok=True)  # if it came from --archives
    if not keep:
        (downloads / file.name).unlink(missing_ok=True)
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()


def is_from(file: File, folder: Path) -> bool:
    """Return whether `file`'s folder is there and was unpacked from this very archive."""
    marker = folder / file.folder / MARKER
    return marker.exists() and files.read_json(marker).get("md5") == file.md5


def is_unpacked(file: File, folder: Path) -> bool:
    """Return whether `file`'s folder is there; one that the user made counts, and is said."""
    target = folder / file.folder
    if not target.exists() or not any(target.iterdir()):
        return False
    if not is_from(file, folder):
        print(f"{target} is not from this {file.name}: left as it is (remove it to get it anew)")
    return True


def find_archives(wanted: Sequence[File], archives: Path) -> dict[File, Path]:
    """Return those wanted files that lie in `archives`; a wrong one is a ValueError."""
    if not archives.is_dir():
        raise FileNotFoundError(f"--archives {archives} is not a folder")
    found = {file: archives / file.name for file in wanted if (archives / file.name).exists()}
    for file, path in found.items():
        if (actual := md5_of(path)) != file.md5:
            raise UserError(
                f"{path} is not the right archive: MD5 {file.md5} expected, {actual} found; "
                f"replace it, or remove it to have it downloaded"
            )
    return found


def plan(folder: Path, wanted: list[File], missing: list[File], at_hand: Container[File]) -> int:
    """Print what there is and what it takes, and return how many bytes are to be downloaded."""
    download = 0
    for file in wanted:
        left = 0
        if file in missing and file not in at_hand:
            here = folder / "archives" / file.name
            left = max(0, file.size - size_of(here) - size_of(here.with_name(f"{here.name}.part")))
        download += left
        state = f"{in_units(left)} to download" if left else "is here"
        print(f"{file.folder:17} {in_units(file.size):>8}  {state}")
    unpacked = sum(file.size for file in missing)  # photographs: zipped they are hardly smaller
    free = shutil.disk_usage(folder).free
    need = f"{in_units(download)} to download, {in_units(unpacked)} unpacked, {in_units(free)} free"
    if download + unpacked > free:
        raise OSError(f"too little disk space: {need}; make room, or choose another --root")
    print(need, flush=True)
    return download


def confirm(size: str) -> None:
    """Ask on the terminal before a download; a no, or nobody to ask, is a ValueError."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(f"{size} to download and no terminal to ask on: give --yes to agree")
    print(f"download {size}? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was downloaded, for the answer was not yes")


def in_units(size: float) -> str:
    """Return a number of bytes as people say it: 20.4 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


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
        for url in (mirror + file.name for mirror in file.mirrors):
            print(f"downloading {url}", flush=True)
            try:
                download(session, url, part, file)
            except (requests.RequestException, ValueError) as error:
                faults.append(f"{url} ({describe(error)})")
                print(f"failed: {describe(error)}", flush=True)
            else:
                os.replace(part, path)
                return path
    raise ConnectionError(
        f"{file.name} could not be downloaded: {', '.join(faults)}. Run again later, or put "
        f"{file.name} (MD5 {file.md5}) into a folder DIR and run again with --archives DIR"
    )


def download(session: requests.Session, url: str, part: Path, file: File) -> None:
    """Complete `part` from `url`; a wrong checksum removes it and is a ValueError."""
    most = int(SURPLUS * file.size)
    for last in (False, True):
        in_one_piece = complete(session, url, part, most)
        if (actual := md5_of(part)) == file.md5:
            return
        part.unlink()
        # Pieces may be of two versions of the file, or of two mirrors: once more, from the start.
        if in_one_piece or last:
            raise UserError(f"MD5 {file.md5} expected, {actual} found")


def complete(session: requests.Session, url: str, part: Path, most: int) -> bool:
    """Return whether all of `part` came in one answer, after as many attempts as it takes."""
    longest, failures = size_of(part), 0
    while True:
        try:
            return receive(session, url, part, most) == 0
        except requests.RequestException as error:
            # A long download may break many times: only attempts that bring nothing new count.
            failures = failures + 1 if size_of(part) <= longest else 0
            longest = max(longest, size_of(part))
            if failures == ATTEMPTS or is_final(error):
                raise
            time.sleep(PAUSE * 2**failures)


def receive(session: requests.Session, url: str, part: Path, most: int) -> int:
    """Append to `part` what it lacks, and return the byte at which the server began.

    An answer that can't be the archive is a ValueError: a page of HTML (a login, an error), bytes
    from elsewhere in the file, or over `most` bytes. Nothing of such an answer is kept.
    """
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == 416:  # nothing after `have`: the checksum will tell
            return have
        response.raise_for_status()
        if "html" in response.headers.get("Content-Type", ""):
            raise UserError("a page of HTML in place of the archive")
        start = first_byte(response, have)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if start > have or (total or 0) > most:
            raise UserError(
                f"bytes {start} to {total} were offered, {have} to {most} at most wanted"
            )
        with open(part, "ab") as out, tqdm(None, part.stem, total, initial=start, **BYTES) as bar:
            out.truncate(start)
            came = start
            for chunk in response.iter_content(CHUNK):
                if (came := came + len(chunk)) > most:  # it told no length, and may have no end
                    out.truncate(start)
                    raise UserError(f"more than {most} bytes came")
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
    with open(path, "rb") as file, tqdm(total=size_of(path), desc="checking", **BYTES) as bar:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


if __name__ == "__main__":
    files.run(main)
