"""Fill `data/`: download, verify and unpack a dataset, or unpack archives that you have.

    python download_data.py                            # Flickr8k into data/flickr8k
    python download_data.py coco                       # 20.4 GB into data/coco, after a question
    python download_data.py shapes                     # a small drawn dataset, no network
    python download_data.py --archives ~/Downloads     # no network for archives found there

A broken download is continued, a dead mirror is skipped, and a dataset's folder only appears when
it is complete.
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

from util import files, program
from util.files import UserError
from util.progress import progress_bar

ATTEMPTS = 3  # in a row on one mirror that bring no new byte
PAUSE = 1.0  # seconds before another attempt, doubled at each
TIMEOUT = (15, 60)  # seconds to connect, and without a byte
CHUNK = 1 << 16  # small: the chunk being read is lost when the connection breaks
ASK = 5e9  # bytes; there is a question before a larger download
SURPLUS = 1.5  # an answer of more than this times the file's size is another file
MARKER = ".unpacked.json"  # inside an unpacked folder: the archive it is from
BOMB = 20  # largest unpacked size, times the archive's: captions shrink to a fifth, images hardly
BAR = {"unit": "B", "unit_scale": True}


@dataclass(frozen=True)
class File:
    """An archive to download; its MD5 alone decides whether the content is right."""

    name: str
    md5: str
    size: int  # bytes, for the estimate of download and disk space
    folder: str  # the dataset's folder that it is unpacked into
    mirrors: tuple[str, ...]  # the URL is one of these plus the name; tried in this order
    about: str = ""  # its content, for --help
    usual: bool = True  # downloaded if no --parts are given


FLICKR8K = (
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/",
    "https://github.com/Avaneesh40585/Flickr8k-Dataset/releases/download/v1.0/",
)
# http: the host's certificate is not valid for its name. The checksum is what counts.
COCO = ("http://images.cocodataset.org/", "https://s3.amazonaws.com/images.cocodataset.org/")
IMAGES = tuple(mirror + "zips/" for mirror in COCO)
ANNOTATIONS = tuple(mirror + "annotations/" for mirror in COCO)
STANFORD = ("https://cs.stanford.edu/people/karpathy/deepimagesent/",)
# fmt: off
KARPATHY = File("caption_datasets.zip", "4fa8c08369d22fe16e41dc124bd1adc2", 36_745_453, "karpathy",
                STANFORD, "captions and splits of COCO, Flickr8k and Flickr30k by Karpathy")
# Small archives first: a network that does not work is noticed at once.
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
    """The flags of this script."""

    dataset: tyro.conf.Positional[tyro.extras.literal_type_from_choices(DATASETS)] = "flickr8k"
    """flickr8k: 1.1 GB, non-commercial research and education only. coco: 20.4 GB, after a
    question. flickr30k: captions only. shapes: drawn here."""

    parts: tuple[str, ...] = ()
    """Parts of the dataset to get, of those listed above; if none are given, those with a star."""

    root: Path = Path("data")
    """Folder of all datasets; this one goes into ROOT/DATASET."""

    archives: Path | None = None
    """Folder of archives you have: they are verified, unpacked and left where they are."""

    keep_archives: bool = False
    """Keep downloaded archives in ROOT/DATASET/archives; otherwise they are deleted."""

    yes: bool = False
    """Download without a question; otherwise there is one before more than 5 GB."""


def main(argv: list[str] | None = None) -> None:
    """Get the dataset that the command line names."""
    help_text = ["Download, verify and unpack a dataset. Run again, it continues. The parts:"]
    for dataset, rows in DATASETS.items():
        for row in rows:
            name = f"{dataset} {row.folder}" + " *" * row.usual
            help_text.append(f"{name}: {in_units(row.size)}, {row.about}")
    config = program.parse(
        Config, argv, program="download_data.py", description="\n\n".join(help_text)
    )
    wanted = choose(config.dataset, config.parts)
    folder = config.root.expanduser() / config.dataset
    if config.dataset == "shapes":
        draw_shapes(folder)
        return
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        fill(folder, wanted, config.archives, config.keep_archives, config.yes)
    if config.dataset == "flickr30k":
        print(FLICKR30K_IMAGES.format(folder=program.printable(folder)))


def choose(dataset: str, parts: Sequence[str]) -> list[File]:
    """Return the rows of the parts, or the dataset's usual ones if none are given."""
    known = {file.folder: file for file in DATASETS[dataset]}
    for part in parts:
        if part not in known:
            raise UserError(f"{dataset} has no part {part!r}; parts: {', '.join(known) or 'none'}")
    return [file for name, file in known.items() if (name in parts if parts else file.usual)]


def draw_shapes(folder: Path) -> None:
    """Draw the shapes dataset into `folder`, unless it is there."""
    from util import shapes

    if shapes.is_drawn(folder):
        print(f"{program.printable(folder)} is complete, nothing to do")
    else:
        shapes.draw(folder)
        print(f"{program.printable(folder)} is ready")


def fill(folder: Path, wanted: list[File], archives: Path | None, keep: bool, yes: bool) -> None:
    """Unpack each wanted file that is not in `folder` yet; download those not in `archives`."""
    downloads = folder / "archives"
    archives = archives and archives.expanduser()
    # If --archives is this very folder, its files are the user's.
    keep = keep or (archives is not None and archives.resolve() == downloads.resolve())
    missing = [file for file in wanted if not is_unpacked(file, folder)]
    for file in wanted:
        if is_from(file, folder):  # a run may have been killed before it could clean up
            clean_up(file, downloads, keep)
    if not missing:
        print(f"{program.printable(folder)} is complete, nothing to do")
        return
    # Verified before any download: a wrong archive is reported now, not an hour later.
    at_hand = {} if archives is None else find_archives(missing, archives)
    folder.mkdir(parents=True, exist_ok=True)
    size = plan(folder, wanted, missing, at_hand)
    if size > ASK and not yes:
        ask(in_units(size))
    for file in missing:
        archive = at_hand.get(file) or fetch(file, downloads)
        unpack(archive, folder / file.folder, {"archive": file.name, "md5": file.md5})
        clean_up(file, downloads, keep)
    print(f"{program.printable(folder)} is ready")


def clean_up(file: File, downloads: Path, keep: bool) -> None:
    """Remove an unpacked file's archive and partial download, and `downloads` if it is empty."""
    (downloads / f"{file.name}.part").unlink(missing_ok=True)
    if not keep:
        (downloads / file.name).unlink(missing_ok=True)
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()


def is_from(file: File, folder: Path) -> bool:
    """Return whether `file`'s folder was unpacked from this very archive."""
    marker = folder / file.folder / MARKER
    return marker.exists() and files.read_json(marker).get("md5") == file.md5


def is_unpacked(file: File, folder: Path) -> bool:
    """Return whether `file`'s folder is there; one that the user made counts, with a message."""
    target = folder / file.folder
    if not target.exists() or not any(target.iterdir()):
        return False
    if not is_from(file, folder):
        name = program.printable(target)
        print(f"{name} is not from this {file.name}: left as it is (remove it to get it anew)")
    return True


def find_archives(wanted: Sequence[File], archives: Path) -> dict[File, Path]:
    """Return the wanted files that are in `archives`; raises UserError if one has another MD5."""
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
    """Print what there is and what is needed; return the number of bytes to download."""
    download = 0
    for file in wanted:
        left = 0
        if file in missing and file not in at_hand:
            path = folder / "archives" / file.name
            have = size_of(path) + size_of(path.with_name(f"{path.name}.part"))
            left = max(0, file.size - have)
        download += left
        state = f"{in_units(left)} to download" if left else "is here"
        print(f"{file.folder:17} {in_units(file.size):>8}  {state}")
    unpacked = sum(file.size for file in missing)  # images hardly shrink in an archive
    free = shutil.disk_usage(folder).free
    need = f"{in_units(download)} to download, {in_units(unpacked)} unpacked, {in_units(free)} free"
    if download + unpacked > free:
        raise OSError(f"too little disk space: {need}; make room, or choose another --root")
    print(need, flush=True)
    return download


def ask(size: str) -> None:
    """Ask on the terminal before a download; raises UserError without a yes, or a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(f"{size} to download and no terminal to ask on: give --yes to agree")
    print(f"download {size}? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was downloaded, because the answer was not yes")


def in_units(size: float) -> str:
    """Return a number of bytes as text: 20.4 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# --- downloads


def fetch(file: File, folder: Path) -> Path:
    """Return the verified archive in `folder`, downloaded from the first mirror that works.

    Received bytes are kept in `<name>.part`, which the next call continues. If no mirror gives the
    right content, a ConnectionError lists what was wrong with each.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    if path.exists():
        if md5_of(path) == file.md5:
            return path
        raise UserError(
            f"{path} is there, but is not this archive (MD5 {file.md5} expected): it would be "
            "lost; move it away, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    with requests.Session() as session:
        for url in (mirror + file.name for mirror in file.mirrors):
            print(f"downloading {url}", flush=True)
            try:
                download(session, url, part, file)
            except (requests.RequestException, UserError) as error:
                reason = type(error).__name__  # the text of requests' errors repeats the URL
                if isinstance(error, requests.HTTPError):
                    reason = f"HTTP {error.response.status_code}"
                elif isinstance(error, UserError):
                    reason = str(error)
                faults.append(f"{url} ({reason})")
                print(f"failed: {program.printable(reason)}", flush=True)
            else:
                os.replace(part, path)
                return path
    raise ConnectionError(
        f"{file.name} could not be downloaded: {', '.join(faults)}. Run again later, or put "
        f"{file.name} (MD5 {file.md5}) into a folder DIR and run again with --archives DIR"
    )


def download(session: requests.Session, url: str, part: Path, file: File) -> None:
    """Complete `part` from `url`; if its MD5 is wrong, remove it and raise UserError."""
    for last in (False, True):
        in_one_piece = complete(session, url, part, int(SURPLUS * file.size))
        if (actual := md5_of(part)) == file.md5:
            return
        part.unlink()
        # The pieces may be of two versions or mirrors of the file: once more, from the start.
        if in_one_piece or last:
            raise UserError(f"MD5 {file.md5} expected, {actual} found")


def complete(session: requests.Session, url: str, part: Path, limit: int) -> bool:
    """Receive the rest of `part`, with retries; return whether all of it came in one answer."""
    longest, failures = size_of(part), 0
    while True:
        try:
            return receive(session, url, part, limit) == 0
        except requests.RequestException as error:
            # A long download may break many times: only attempts without a new byte count.
            failures = failures + 1 if size_of(part) <= longest else 0
            longest = max(longest, size_of(part))
            status = error.response.status_code if error.response is not None else 0
            final = 400 <= status < 500 and status not in (408, 429)  # but for "later", "slower"
            if failures == ATTEMPTS or final:
                raise
            time.sleep(PAUSE * 2**failures)


def receive(session: requests.Session, url: str, part: Path, limit: int) -> int:
    """Append to `part` what is missing, and return the byte at which the answer began.

    Raises UserError for an answer that can't be the archive: a page of HTML (a login, an error),
    bytes from elsewhere in the file, or more than `limit` bytes. Nothing of it is kept.
    """
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == 416:  # there is nothing more: the MD5 decides
            return have
        response.raise_for_status()
        if "html" in response.headers.get("Content-Type", ""):
            raise UserError("a page of HTML in place of the archive")
        start = 0  # a server may ignore ranges
        if response.status_code == 206:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            start = int(match[1]) if match else have
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if start > have or (total or 0) > limit:
            raise UserError(
                f"bytes {start} to {total} were offered, {have} to {limit} at most wanted"
            )
        bar = progress_bar(desc=part.stem, total=total, initial=start, **BAR)
        with open(part, "ab") as out, bar:
            out.truncate(start)
            received = start
            for chunk in response.iter_content(CHUNK):
                received += len(chunk)
                if received > limit:  # the answer has no length, and perhaps no end
                    out.truncate(start)
                    raise UserError(f"more than {limit} bytes came")
                out.write(chunk)
                bar.update(len(chunk))
    if total is not None and size_of(part) < total:  # older urllib3 does not notice
        raise requests.ConnectionError("the connection broke")
    return start


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def md5_of(path: Path) -> str:
    """Return the file's MD5 in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress_bar(total=size_of(path), desc="checking", **BAR) as bar:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


# --- archives, which may be damaged or hostile


def unpack(archive: Path, target: Path, source: dict[str, str]) -> None:
    """Unpack `archive` into the folder `target`, which appears complete or not at all.

    `source` is the content of its marker file. Raises UserError for an archive that is damaged, or
    that is refused; then nothing is left.
    """
    temporary = target.with_name(f".unpacking-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    try:
        with zipfile.ZipFile(archive) as content:
            paths = check_members(content, archive)
            bar = progress_bar(paths.items(), desc=f"unpacking {archive.name}", unit="file")
            for member, path in bar:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as packed, open(temporary / path, "wb") as out:
                    shutil.copyfileobj(packed, out)
        files.write_json(temporary / MARKER, source)
        if hasattr(os, "sync"):  # else, after a power cut, the folder may hold empty files
            os.sync()
        if target.exists():
            target.rmdir()  # it is empty, or `is_unpacked` would have been true
        os.rename(temporary, target)
        files.sync_folder(target.parent)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError: encrypted, or packed by a method that zipfile doesn't know.
        raise UserError(f"{archive} is not a sound zip archive ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_members(content: zipfile.ZipFile, archive: Path) -> dict[zipfile.ZipInfo, PurePosixPath]:
    """Return the path of each file of the archive in its folder.

    Leading folders common to all files are removed, and `__MACOSX` is left out. Raises UserError
    for a path that could lead outside on any system, a link, two files of one path (upper and lower
    case are the same, as on Macs and Windows), no file at all, or far more bytes than the archive.
    """
    paths: dict[zipfile.ZipInfo, PurePosixPath] = {}
    seen: set[str] = set()
    for member in content.infolist():
        name = member.orig_filename  # `filename` is changed to suit this system
        path = PurePosixPath(name)
        kind = stat.S_IFMT(member.external_attr >> 16)
        unsafe = path.is_absolute() or ".." in path.parts or any(c in name for c in "\\:\0")
        if unsafe or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{archive} is refused: {name!r} in it could write outside its folder")
        if member.is_dir() or path.parts[:1] == ("__MACOSX",):
            continue
        if (key := str(path).casefold()) in seen:
            raise UserError(f"{archive} is refused: {name!r} is in it twice")
        seen.add(key)
        paths[member] = path
    # zipfile unpacks no more of a file than the size that the archive gives.
    size = sum(member.file_size for member in paths)
    if not paths or size > BOMB * archive.stat().st_size:
        raise UserError(
            f"{archive} is refused: {len(paths)} files of {size / 1e6:.1f} MB in "
            f"{archive.stat().st_size / 1e6:.1f} MB are no dataset"
        )
    common = posixpath.commonpath([path.parent for path in paths.values()])
    return {member: path.relative_to(common) for member, path in paths.items()}


if __name__ == "__main__":
    program.run(main)
