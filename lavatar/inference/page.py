"""The folder of an evaluation: metrics.json, table.txt, and index.html, one page that needs no other file."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lavatar.inference.panels import ERROR_FULL, error_scale
from lavatar.inference.showcase import Shown
from lavatar.inference.tables import Table, as_text, tables

METRICS, TABLE, PAGE = "metrics.json", "table.txt", "index.html"
FILES = {"metrics": METRICS, "table": TABLE, "page": PAGE}
JPEG_QUALITY = 92

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 2rem auto; max-width: 1500px;
  padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, .legend { color: #596575; margin: .2rem 0 .6rem; } .legend { font-size: .85rem; }
table { border-collapse: collapse; margin-top: .6rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e3e7ec; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: #596575; border-bottom-color: #aab3bf; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.scroll { overflow-x: auto; }
.frames { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }
@media (max-width: 1000px) { .frames { grid-template-columns: 1fr; } }
.frame { border: 1px solid #e3e7ec; border-radius: 6px; padding: .6rem; }
.pictures { display: flex; gap: 4px; } figure { margin: 0; flex: 1; min-width: 0; }
figure img { width: 100%; display: block; background: #fff; } figcaption { font-size: .8rem; color: #596575; }
.numbers { font-size: .85rem; font-variant-numeric: tabular-nums; margin-top: .3rem; }
.numbers b { font-weight: 600; } .scale img { width: 260px; height: 12px; vertical-align: middle; margin: 0 .5rem; }
img.curves { max-width: 100%; border: 1px solid #e3e7ec; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and frames; `error`: some of their pictures are error maps."""

    title: str
    text: str
    frames: Sequence[Shown]
    error: bool


def write_folder(
    folder: Path,
    title: str,
    metrics: Mapping[str, Any],
    notes: Sequence[str],
    sections: Sequence[Section],
    curves: np.ndarray,
) -> dict[str, Path]:
    """Write the three files, each by rename; `metrics` as JSON takes them. Returns them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        METRICS: json.dumps(metrics, indent=1, allow_nan=False) + "\n",
        TABLE: "\n".join([title, "", as_text(metrics), *(f"note: {note}" for note in notes)]) + "\n",
        PAGE: page(title, metrics, notes, sections, curves),
    }
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)
    return {key: folder / name for key, name in FILES.items()}


def page(
    title: str, metrics: Mapping[str, Any], notes: Sequence[str], sections: Sequence[Section], curves: np.ndarray
) -> str:
    """The HTML."""
    parts = [f"<h1>{escape(title)}</h1>", "<p>Frames held out of training, at the avatar's training resolution.</p>"]
    parts += [f'<p class="legend">note: {escape(note)}</p>' for note in notes]
    parts += [_table(table) for table in tables(metrics)]
    parts += [_section(section) for section in sections]
    parts += [
        "<h2>Expression over the frames</h2>",
        "<p>Blue: the truth (in cross reenactment the actor). Red: the result. Gaps: no face was found, or the measure "
        "cannot be seen.</p>",
        f'<img class="curves" alt="expression measures over the frames" src="{_embedded(curves, ".png")}">',
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html>\n<html lang="en"><head>{head}{view}<style>{STYLE}</style></head>\n<body>\n' + (
        "\n".join(parts) + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="legend">{escape(table.legend)}</p>'
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
    if section.error:
        scale = _embedded(error_scale(), ".png")
        parts.append(
            f'<p class="scale">error, mean over the colours: 0<img alt="colour scale" src="{scale}">'
            f"{ERROR_FULL} of 255 and more</p>"
        )
    for kind in dict.fromkeys(shown.kind for shown in section.frames):
        cards = "".join(_card(shown) for shown in section.frames if shown.kind == kind)
        parts.append((f"<h3>{escape(kind)}</h3>" if kind else "") + f'<div class="frames">{cards}</div>')
    return "\n".join(parts)


def _card(shown: Shown) -> str:
    figures = "".join(
        f'<figure><img alt="{label}" src="{_embedded(picture, ".jpg")}"><figcaption>{label}</figcaption></figure>'
        for label, picture in ((escape(name), shown_as) for name, shown_as in shown.pictures)
    )
    digits = {"psnr": 2, "ssim": 3, "lpips": 3}
    numbers = [f"{n.upper()} <b>{shown.figures[n]:.{d}f}</b>" for n, d in digits.items() if n in shown.figures]
    where = f"frame {shown.meta.frame}, {shown.meta.time:.2f} s"
    return (
        f'<div class="frame"><div class="pictures">{figures}</div>'
        f'<div class="numbers">{" &nbsp; ".join([escape(where), *numbers])}</div></div>'
    )


def _embedded(picture: np.ndarray, form: str) -> str:
    """uint8 RGB as a data address."""
    options = {
        ".jpg": [
            cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
        ".png": [cv2.IMWRITE_PNG_COMPRESSION, 9],
    }[form]  # fmt: skip
    done, data = cv2.imencode(form, picture[..., ::-1], options)
    assert done, form
    kind = {".jpg": "jpeg", ".png": "png"}[form]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
