"""What a call of `inference.py` has to do: which images, and which files are written of them.

Everything that can't be done is refused here, before a model is loaded or a file is touched.
"""

import glob
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from util import distributed, files, program, results, sidecars, xmp
from util.files import UserError
from util.image_sources import is_named_otherwise, name_source
from util.images import count_others, drop_traceback, walk_images
from util.results import Caption, Result

JSON, PAGE = (".json", ""), (".png", "")
NO_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class OutputConfig:
    """The flags that say what is written."""

    output: Path | None = None
    """Write the captions to this file (.csv, .jsonl, .html), with their scores (the mean
    log-probability per word) and errors; an existing file is continued. Required when torchrun
    starts several processes, which share the images."""
    format: Literal[results.FORMATS] | None = None
    """Format of --output (default: by its name), or of what is printed (default: plain lines)."""
    mix: bool = False
    """Continue an --output whose captions another model or other settings made."""
    write_sidecar: bool = False
    """Also write the caption of photo.jpg to photo.txt beside it, unless that exists."""
    write_metadata: bool = False
    """Also write the caption into the photo's own metadata (XMP dc:description), unless it has a
    description; pixels stay as they are. Formats other than JPEG, PNG and WebP get photo.tif.xmp
    beside them."""
    skip_existing: bool = True
    """With these two, do not caption images that have their text file or description already,
    where nothing else is written of them."""
    overwrite: bool = False
    """Let these two replace text files and descriptions that exist, except write-protected ones."""
    prefix: str = ""
    """What they write before the caption, as in --prefix "photo of "."""
    suffix: str = ""
    """What they write after it."""
    annotate: Path | None = None
    """Also write a copy of each image with its caption below it into this folder."""
    attention: Path | None = None
    """Also write a page (.png) with the attention map of each word, for a single image."""
    json: Path | None = None
    """Also write the captions to this JSON file, without the images that have none."""


class Job(NamedTuple):
    """What all processes together have to do."""

    images: list[str]
    remaining: list[str]  # the images to caption
    captioned: list[Result]  # of --output: other files of theirs are still to be written
    copies: dict[str, str]  # image -> path of its annotated copy
    format: str | None  # one of `results.FORMATS`; None: plain lines
    settings: list[dict[str, Any]]  # for the settings file of --output
    entries: dict[str, dict[str, Any]]  # image -> what --json has to keep
    left_out: int  # folders and patterns that can't be read or have no images
    sources: dict[str, Any]  # image -> what to read it from, if it is no file
    skipped: int = 0  # images that have what is to be written

    def source(self, image: str) -> Any:
        """Return what `read_source` reads an image from."""
        if image in self.sources:
            return self.sources[image]
        return Path(image) if is_named_otherwise(image) else image  # a file called data:photo.jpg


@dataclass
class Tally:
    """What a process counts while it captions."""

    failed: int = 0  # images
    error: Exception | None = None  # of the first of them
    kept: int = 0  # text files that exist and hold another text
    kept_descriptions: int = 0  # the same in photos

    def count_error(self, error: Exception) -> None:
        """Count an image that failed."""
        self.failed, self.error = self.failed + 1, self.error or drop_traceback(error)


def plan_job(
    places: Sequence[str | Path],
    config: OutputConfig,
    settings: Mapping[str, Any],
    *,
    recursive: bool = True,
    inputs: Iterable[Path] = (),
) -> Job:
    """Return what there is to do; raises UserError or OSError if it is not possible.

    `settings` are those that captions depend on, with "n" for the number of captions per image;
    `inputs` are the files, besides the images, that must not be written.
    """
    if distributed.world_size() > 1:
        if config.output is None or files.is_special(config.output):
            raise UserError("several processes need a file to write captions to; give --output")
        for name in ("json", "attention"):
            if getattr(config, name):
                raise UserError(f"--{name} is written by one process; start it without torchrun")
    if config.mix and not config.output:
        raise UserError("--mix is about --output, which is not given")
    for flag in ("overwrite", "prefix", "suffix"):
        if getattr(config, flag) and not (config.write_sidecar or config.write_metadata):
            raise UserError(
                f"--{flag} is about --write-sidecar, which is not given, nor is --write-metadata"
            )
    for flag in ("prefix", "suffix"):
        if NO_LINE.search(getattr(config, flag)):  # a line break would make two captions
            raise UserError(f"--{flag} {getattr(config, flag)!r} must be one line of text")
    paths = [place for place in places if not is_named_otherwise(place)]
    forms = ((config.json, JSON), (config.attention, PAGE), (config.output, ()))
    for path, suffixes in forms:
        files.check_output(path, suffixes, [*inputs, *paths])
    images, left_out, sources = find_images(places, config.annotate, recursive=recursive)
    for name in ("write_sidecar", "write_metadata", "annotate"):
        if sources and getattr(config, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for image files, and {next(iter(sources))} is none;"
                " save the image first, or use --output"
            )
    if config.attention:
        check_attention(config.attention, images)
    copies = {}
    if config.annotate:
        copies = sidecars.plan_annotated(config.annotate, [*map(Path, paths)], images)
    beside = [sidecars.sidecar(image) for image in images] if config.write_sidecar else []
    if config.write_sidecar:
        sidecars.check_sidecars(images)
    if config.write_metadata:
        beside += [f"{image}.xmp" for image in images]
        sidecars.check_inputs(beside, images)
        files.check_writable(*images)
    others: list[str | Path | None] = [*beside, *copies.values()]
    others += [image for image in images if image not in sources]
    for path, _ in forms:
        files.check_output(path, (), others)
        others.append(path)
    format = None
    if config.output or config.format:
        format = results.pick_format(config.output, config.format)
    entries = read_entries(config.json) if config.json else {}
    job = Job(images, images, [], copies, format, [dict(settings)], {}, left_out, sources)
    if config.output:
        return continue_job(job, config, settings, entries)
    return skip_existing(job, config)


def skip_existing(job: Job, config: OutputConfig) -> Job:
    """Return the job without the images that have all that is to be written of them."""
    is_alone = not (config.format or config.json or config.annotate or config.attention)
    writes = config.write_sidecar or config.write_metadata
    if not (writes and is_alone and config.skip_existing) or config.overwrite:
        return job
    remaining = [image for image in job.images if is_incomplete(image, job, config)]
    return job._replace(remaining=remaining, skipped=len(job.images) - len(remaining))


def continue_job(
    job: Job, config: OutputConfig, settings: Mapping[str, Any], entries: dict[str, dict[str, Any]]
) -> Job:
    """Return what is left of a job whose --output may have rows; they are merged first.

    `entries` are those of an existing --json.
    """
    images = list(dict.fromkeys(job.images))  # one row per image, however often it is named
    n = settings["n"]
    rows = results.merge_parts(config.output, job.format, n, images)
    if not rows:
        return job._replace(images=images, remaining=images)
    all_settings = results.check_settings(config.output, settings, config.mix)
    remaining, captioned, kept = [], [], dict(entries) if config.json else {}
    for image in images:
        row = results.parse_line(job.format, rows[image], n) if image in rows else None
        if row is None or not row.captions:
            remaining.append(image)
            continue
        if row.error or is_incomplete(image, job, config):
            captioned.append(row)
        if config.json and row.has_scores:
            kept.setdefault(image, row.to_json())
    done = len(images) - len(remaining)
    message = f"{config.output} has captions of {done} of {len(images)} images already"
    if config.json and (lacking := done - sum(image in kept for image in images)):
        # A gallery page has no scores, nor does a row that was written by hand.
        message += f", but no scores of {lacking}: they are left out of {config.json}"
    print(program.printable(message), file=sys.stderr)
    return job._replace(
        images=images, remaining=remaining, captioned=captioned, settings=all_settings, entries=kept
    )


def is_incomplete(image: str, job: Job, config: OutputConfig) -> bool:
    """Return whether a captioned image lacks a file that was requested."""
    paths = [job.copies[image]] if job.copies else []
    if config.write_sidecar:
        paths.append(sidecars.sidecar(image))
    if config.overwrite or not all(os.path.lexists(path) for path in paths):
        return True
    return config.write_metadata and not xmp.has_description(image)


def find_images(
    places: Sequence[str | Path], annotated: Path | None = None, *, recursive: bool = True
) -> tuple[list[str], int, dict[str, Any]]:
    """Return the images at `places`, folders and patterns replaced by their images.

    Those `annotated` are left out. Also returns how many folders can't be read or have no images
    and how many patterns match nothing; each is printed. The last is what the images that are no
    files are read from: addresses, `data:` URIs, standard input. Raises UserError if no place is
    given, or there are no images at all.
    """
    if not places:
        raise UserError("no image was given; name files or folders: python inference.py IMAGE")
    images: list[str] = []
    problems: list[str] = []
    sources: dict[str, Any] = {}
    others: Counter[str] = Counter()

    def note(error: OSError) -> None:
        problems.append(f"the folder {error.filename} can't be read ({error.strerror})")

    waiting = deque(places)
    while waiting:
        place = waiting.popleft()
        if is_named_otherwise(place):
            name, source = name_source(place)
            sources[name] = source
            images.append(name)
            continue
        place = Path(place)
        if is_pattern(place):
            matches = sorted(glob.glob(str(place), recursive=True))
            waiting.extendleft(map(Path, reversed(matches)))
            problems += [] if matches else [f"no file matches {place}"]
            continue
        if not os.path.isdir(place):
            images.append(str(place))
            continue
        before = len(images), len(problems)
        found = walk_images(place, recursive, note, others)
        if annotated and place.resolve() in annotated.resolve().parents:
            below = place / annotated.resolve().relative_to(place.resolve())
            copies = os.path.join(below, "")
            found = (image for image in found if not image.startswith(copies))
        images += found
        if (len(images), len(problems)) == before:
            problems.append(f"no images in the folder {place}")
    if not images:
        raise UserError("; ".join(problems))
    for problem in problems + [count_others(others)] * bool(others):
        print(f"left out: {program.one_line(problem)}", file=sys.stderr)
    return images, len(problems), sources


def is_pattern(place: Path) -> bool:
    """Return whether a path is a pattern that the shell left alone (Windows' do), and no file."""
    return any(char in str(place) for char in "*?[") and not os.path.lexists(place)


def check_attention(path: Path, images: Sequence[str]) -> None:
    """Raise UserError if no page of attention maps can be written to `path`."""
    from util import plots  # here, as captions alone need no plots

    if len(images) != 1:
        raise UserError(f"--attention is of a single image, but {len(images)} were given")
    if path.is_file() and not sidecars.is_made_by(path, plots.MADE_BY):
        raise UserError(f"--attention {path} would overwrite a file of your own; name another file")


# --- what is written of an image


def make_text(caption: Caption, config: OutputConfig) -> str:
    """Return what a text file or a photo says; UserError if a file has it in no UTF-8."""
    text = f"{config.prefix}{caption.text}{config.suffix}"
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"the caption {text[:60]!r} is not text in UTF-8; correct it")
    return text


def write_files(
    image: str,
    captions: Sequence[Caption] | Exception,
    job: Job,
    config: OutputConfig,
    tally: Tally,
) -> Result:
    """Write the annotated copy, the sidecar and the description of an image; return its result."""
    error = captions if isinstance(captions, Exception) else None
    captions = () if error else captions
    try:
        if captions and job.copies:
            sidecars.write_annotated(job.copies[image], image, captions[0].text)
        if captions and config.write_sidecar:
            path, text = sidecars.sidecar(image), make_text(captions[0], config)
            tally.kept += not sidecars.write_sidecar(path, text, config.overwrite)
        if captions and config.write_metadata:
            text = make_text(captions[0], config)
            tally.kept_descriptions += not xmp.write_description(image, text, config.overwrite)
    except (UserError, OSError) as caught:
        error = caught
    if error:
        tally.count_error(error)
    return Result(image, captions, program.one_line(program.explain(error)) if error else "")


# --- the JSON file


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return image -> its entry in an existing --json file; UserError if it is another file."""
    if not path.is_file() or not path.stat().st_size:
        return {}
    entries = files.read_json(path)
    try:
        return {entry["image"]: {**entry, "captions": entry["captions"]} for entry in entries}
    except results.NO_RESULT as error:
        raise UserError(
            f"--json {path} would overwrite a file that is no list of captions; name another file"
        ) from error


def write_entries(path: Path, job: Job, written: Iterable[Result]) -> None:
    """Write the JSON file: what it has to keep and what was captioned now, in order."""
    entries = [result.to_json() for result in written]
    images = {entry["image"] for entry in entries}
    entries = [each for image, each in job.entries.items() if image not in images] + entries
    position = {image: number for number, image in enumerate(job.images)}
    if entries:
        files.write_json(path, sorted(entries, key=lambda each: position.get(each["image"], -1)))
