"""The report of `evaluate.py --report`: a web page of the best and the worst captions."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import metrics
from readers import Record
from util import files
from util.images import read_image

SHOWN = 24  # captions on the report's page, of the best and of the worst
THUMBNAIL = (480, 360)  # pixels, for screens that draw two for each of a page's

STYLE = """
:root { color-scheme: light dark; --faint: color-mix(in srgb, currentColor 9%, transparent) }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2.5rem auto;
padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 1rem }
table { border-collapse: collapse } td, th { padding: .3rem 1.6rem .3rem 0; text-align: left;
white-space: nowrap }
td { font-variant-numeric: tabular-nums; font-size: 1.15rem } th { font-weight: 400; opacity: .7 }
main { display: grid; gap: 2rem 1.5rem;
grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
figure { margin: 0 } img { width: 100%; aspect-ratio: 4/3; object-fit: contain; border-radius: 6px;
background: var(--faint) } figcaption { font-weight: 600; margin-top: .4rem }
ul { margin: .3rem 0 0; padding: 0 0 0 1.1rem; font-size: .875rem; opacity: .8 }
small { font-size: .8rem; font-weight: 400; opacity: .7; display: block; overflow-wrap: anywhere }
"""
REPORT = '<!doctype html><html lang="en"><meta charset="utf-8"><title>'


def write_report(
    path: Path, records: Sequence[Record], captions: Mapping[Any, str], scores: Mapping[str, Any]
) -> None:
    """Write an HTML page, which needs no other file, of the best and the worst `captions`.

    They are ranked by their own CIDEr-D. The table has those of `scores` that are fractions.
    """
    given = [captions[record.image_id] for record in records]
    scorer = metrics.CiderD([record.captions for record in records])
    values = scorer.scores(given, range(len(records)))
    ranked = sorted(range(len(records)), key=lambda place: -values[place])
    best = ranked[: min(SHOWN, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][-SHOWN:][::-1]
    title = html.escape(f"{scores.get('dataset', '')} {scores.get('split', '')}".strip())
    table = {name: f"{value:.3f}" for name, value in scores.items() if isinstance(value, float)}
    names = "".join(f"<th scope=col>{html.escape(name.replace('_', ' '))}" for name in table)
    cells = "".join(f"<td>{value}" for value in table.values())
    parts = [
        f"{REPORT}{title}: captions</title>"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{title}, {len(records)} images</h1>"
        f'<div style="overflow-x:auto"><table><tr>{names}<tr>{cells}</table></div>'
    ]
    for heading, places in (("Best captions", best), ("Worst captions", worst)):
        figures = "".join(format_figure(records[p], given[p], values[p]) for p in places)
        parts.append(f"<h2>{heading}</h2><main>{figures}</main>")
    files.write_text(path, "\n".join(parts) + "\n")


def format_figure(record: Record, caption: str, value: float) -> str:
    """Return the HTML of an image with its caption, that caption's CIDEr-D, and its references."""
    image = read_image(record.path, at_least=max(THUMBNAIL))
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    text = html.escape(caption)
    lines = "".join(f"<li>{html.escape(line)}" for line in record.captions)
    return (
        f'<figure><img loading="lazy" alt="{text}" src="{source}"><figcaption>{text}'
        f"<small>CIDEr {value:.2f} · {html.escape(str(record.image_id))}</small>"
        f"</figcaption><ul>{lines}</ul></figure>"
    )


def is_report(path: Path) -> bool:
    """Return whether a file is one that `--report` wrote."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(len(REPORT)) == REPORT
