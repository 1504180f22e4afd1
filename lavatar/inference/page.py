"""The folder of an evaluation: metrics.json, table.txt, and index.html, one page that needs no other file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavatar.inference.cards import Card, draw_card
from lavatar.inference.chart import STYLE as CHARTS
from lavatar.inference.document import Html, document, embedded, joined, table, tag
from lavatar.inference.panels import ERROR_FULL, error_scale
from lavatar.inference.showcase import Shown
from lavatar.inference.tables import as_text, tables

METRICS, TABLE, PAGE = "metrics.json", "table.txt", "index.html"
FILES = {"metrics": METRICS, "table": TABLE, "page": PAGE}


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
    curves: Sequence[Html],
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
    title: str, metrics: Mapping[str, Any], notes: Sequence[str], sections: Sequence[Section], curves: Sequence[Html]
) -> str:
    """The HTML. `curves`: charts of the expression."""
    parts = [tag("h1", title), tag("p", "Frames held out of training, at the avatar's training resolution.")]
    parts += [tag("p", f"note: {note}", class_="legend") for note in notes]
    parts += [table(shown) for shown in tables(metrics)]
    parts += [_section(section) for section in sections]
    parts += [
        tag("h2", "Expression over the frames"),
        tag("p", "The held-out frames in order. Gaps: no face was found, or the measure cannot be seen."),
        tag("div", *curves, class_="charts"),
    ]
    return document(title, parts, CHARTS)


def _section(section: Section) -> Html:
    parts = [tag("h2", section.title), tag("p", section.text)]
    if section.error:
        scale = tag("img", alt="colour scale", src=embedded(error_scale(), ".png"))
        words = "error, mean over the colours: 0", scale, f"{ERROR_FULL} of 255 and more"
        parts.append(tag("p", *words, class_="scale"))
    for kind in dict.fromkeys(shown.kind for shown in section.frames):
        cards = [_card(section, shown) for shown in section.frames if shown.kind == kind]
        parts += [*([tag("h3", kind)] if kind else []), tag("div", *cards, class_="frames")]
    return joined(parts, "\n")


def _card(section: Section, shown: Shown) -> Html:
    digits = {"psnr": 2, "ssim": 3, "lpips": 3}
    numbers = [
        joined([f"{n.upper()}\u00a0", tag("b", f"{shown.figures[n]:.{d}f}")])
        for n, d in digits.items()
        if n in shown.figures
    ]
    pictures = [(label, embedded(picture, ".jpg")) for label, picture in shown.pictures]
    where = f"frame {shown.meta.frame}, {shown.meta.time:.2f} s"
    return draw_card(Card(section.title, shown.kind, pictures), joined([where, *numbers], " \u00a0 "))
