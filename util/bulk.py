"""Captioning many images for `inference.py`: progress, results as they come, what was left out."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from util import distributed, program, results, threads
from util.files import UserError
from util.jobs import Job, OutputConfig, Tally, write_entries, write_files
from util.progress import in_notebook, log_progress, progress_bar
from util.results import Result


def caption_share(
    caption_many: Callable[..., Iterator[Any]], job: Job, outputs: OutputConfig, *,
    n: int, batch_size: int, workers: int, with_name: bool,
) -> Tally:  # fmt: skip
    """Caption this process's share of the images and write everything that was requested.

    `caption_many` is that of `inference.Captioner`; `with_name`: printed captions have their
    image's name before them. Only errors of reading and writing an image are caught: settings that
    are wrong for one image are wrong for all.
    """
    images, tally = distributed.split_by_rank(job.remaining), Tally()
    written = []
    if len(images) > batch_size:
        threads.warn_of_overload()
    with contextlib.ExitStack() as stack:
        if job.format:
            file = outputs.output or sys.stdout
            if distributed.world_size() > 1:
                file = results.part_file(file, distributed.rank())
            write = stack.enter_context(results.open_results(file, job.format, n))
        else:
            write = functools.partial(print_captions, with_name=with_name)
        for image, captions, _ in distributed.split_by_rank(job.captioned):
            write(write_files(image, captions, job, outputs, tally))
        sources = [job.source(image) for image in images]
        sizes = {"n": n, "batch_size": batch_size, "workers": workers}
        captions = caption_many(sources, return_exceptions=True, **sizes)
        found_of = zip(images, captions, strict=True)
        with tell_how_far(len(images), outputs) as count:
            for image, found in show_progress(found_of, len(images), outputs):
                result = write_files(image, found, job, outputs, tally)
                try:
                    write(result)
                except UserError as bad_name:
                    print(f"left out: {program.one_line(str(bad_name))}", file=sys.stderr)
                    if not result.error:
                        tally.count_error(bad_name)
                if outputs.json and result.captions:
                    written.append(result)
                count()
    if outputs.json:
        write_entries(outputs.json, job, written)
    return tally


def show_progress(items: Iterable[Any], total: int, outputs: OutputConfig) -> Iterable[Any]:
    """Return the items; of these a terminal shows a bar, and a log file has a line a minute."""
    if sys.stderr.isatty() or in_notebook():
        # Printed lines would break a progress bar.
        return progress_bar(items, total=total, unit=" images", disable=not outputs.output)
    return log_progress(items, total) if distributed.is_main() else items


@contextlib.contextmanager
def tell_how_far(total: int, outputs: OutputConfig) -> Iterator[Callable[[], None]]:
    """Yield a function that counts an image; when the block is interrupted, print how many were."""
    done = itertools.count()
    try:
        yield lambda: next(done)
    except KeyboardInterrupt:
        if total > 1 and distributed.is_main():
            message = f"{next(done)} of {total} images are captioned"
            if outputs.output:
                message += f" and in {outputs.output}; the same command goes on with the others"
            print(program.printable(message), file=sys.stderr)
        raise


def print_captions(result: Result, with_name: bool) -> None:
    """Print a line per caption, if `with_name` after the image's name; errors go to stderr."""
    if result.error and with_name:
        print(f"left out: {program.printable(result.error)}", file=sys.stderr)
    name = f"{program.printable(result.image)}\t" if with_name else ""
    for each in result.captions:
        print(f"{name}{program.printable(each.text)}", flush=True)


def report(tally: Tally, job: Job, outputs: OutputConfig) -> None:
    """Print what was kept and skipped; raise UserError if images or folders were left out."""
    why = "are write-protected" if outputs.overwrite else "exist; --overwrite replaces them"
    for number, what in ((tally.kept, "text files"), (tally.kept_descriptions, "descriptions")):
        if number:
            print(f"kept {number} {what} that {why}", file=sys.stderr)
    if job.skipped:
        what = ["text files"] * outputs.write_sidecar + ["descriptions"] * outputs.write_metadata
        print(
            f"skipped {job.skipped} of {len(job.images)} images, whose {' and '.join(what)} exist; "
            "--overwrite captions them again",
            file=sys.stderr,
        )
    failed, left_out, total = tally.failed, job.left_out, len(job.remaining) + len(job.captioned)
    messages = []
    if failed:
        messages.append(f"{failed} of {total} images could not be captioned")
    if left_out:
        messages.append(f"{left_out} folders or patterns were left out")
    if messages:
        raise UserError("; ".join(messages))
