"""A page of a split's scores, and of the captions that did best and worst with their pictures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import files
import metrics
from images import read_image
from records import Record
from tokenizer import tokenize

SHOWN = 24  # captions at either end
THUMBNAIL = (480, 360)  # pixels: sharp on a screen that doubles them

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


def write_report(
    path: Path, records: Sequence[Record], captions: Mapping[Any, str], scores: Mapping[str, Any]
) -> None:
    """Write an HTML page, one file that needs no other, of `captions` by the ids of `records`.

    They are ranked by their own CIDEr-D. `scores` are the split's; what is no number is left out.
    """
    references = [[tokenize(line) for line in record.captions] for record in records]
    given = [tokenize(captions[record.image_id]) for record in records]
    values = metrics.CiderD(references).scores(given, range(len(records)))
    ranked = sorted(range(len(records)), key=lambda place: -values[place])
    best = ranked[: min(SHOWN, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][-SHOWN:][::-1]
    parts = [head(scores, len(records))]
    for title, places in (("Best captions", best), ("Worst captions", worst)):
        figures = [figure(records[p], captions[records[p].image_id], values[p]) for p in places]
        parts.append(f"<h2>{title}</h2><main>{''.join(figures)}</main>")
    files.write_text(path, "\n".join(parts) + "\n")


def head(scores: Mapping[str, Any], images: int) -> str:
    """Return the page's beginning: its style, and the scores as a table."""
    title = html.escape(f"{scores.get('dataset', '')} {scores.get('split', '')}".strip())
    rows = {name: f"{value:.3f}" for name, value in scores.items() if isinstance(value, float)}
    names = "".join(f"<th scope=col>{html.escape(name.replace('_', ' '))}" for name in rows)
    cells = "".join(f"<td>{value}" for value in rows.values())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: captions</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{title}, {images} images</h1>"
        f'<div style="overflow-x:auto"><table><tr>{names}<tr>{cells}</table></div>'
    )


def figure(record: Record, caption: str, value: float) -> str:
    """Return a picture with its caption, that caption's CIDEr-D, and what people wrote."""
    lines = "".join(f"<li>{html.escape(line)}" for line in record.captions)
    text = html.escape(caption)
    return (
        f'<figure><img loading="lazy" alt="{text}" src="{embedded(record.path)}">'
        f"<figcaption>{text}<small>CIDEr {value:.2f} · {html.escape(str(record.image_id))}</small>"
        f"</figcaption><ul>{lines}</ul></figure>"
    )


def embedded(path: Path) -> str:
    """Return a small copy of a picture as an address that holds it."""
    picture = read_image(path)
    picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
