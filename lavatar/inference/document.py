"""What lavatar's pages are made of: one HTML file each, readable without scripts, another file or a network.

Names and messages come from outside: text is escaped wherever it stands; only `Html`, which `tag` makes, is not.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from lavatar.inference.tables import Table

JPEG_QUALITY = 92
_VOID = ("img", "meta", "br", "link")

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2430; --soft: #566273; --line: #dfe4ea; --rule: #aab3bf;
  --shade: #1c243040; --card: #f7f8fa; --link: #1459b8; --good: #14713f; --bad: #b3261e; --warn: #8a5a00;
  --c0: #1f6fd6; --c1: #c9431f; --c2: #18804f; --c3: #8549c4; --c4: #a06400; --c5: #0b7f8d; --c6: #bb2f84;
  --c7: #566273; }
@media (prefers-color-scheme: dark) { :root { --page: #14181f; --ink: #e6e9ee; --soft: #a3aebd; --line: #2c343f;
  --rule: #56616f; --shade: #8fa3bd58; --card: #1b212a; --link: #7db2ff; --good: #5fd39a; --bad: #ff8f84;
  --warn: #f0b95a; --c0: #6aa9ff; --c1: #ff8a6c; --c2: #4cc790; --c3: #c39bff; --c4: #f0b24a; --c5: #4fd0dd;
  --c6: #ff86c8; --c7: #a9b4c3; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 1500px; padding: 0 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; } h4 { font-size: .9rem; margin: 1rem 0 .3rem; }
a { color: var(--link); } p, .legend { color: var(--soft); margin: .2rem 0 .6rem; } .legend { font-size: .85rem; }
code { font: .9em ui-monospace, monospace; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: 1rem 0 0; }
.scroll { overflow-x: auto; background: linear-gradient(90deg, var(--page) 50%, transparent) local 0 0 / 36px 100%,
  linear-gradient(-90deg, var(--page) 50%, transparent) local 100% 0 / 36px 100%,
  linear-gradient(90deg, var(--shade), transparent) 0 0 / 14px 100%,
  linear-gradient(-90deg, var(--shade), transparent) 100% 0 / 14px 100%; background-repeat: no-repeat; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: separate; border-spacing: 0; margin-top: .6rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding-bottom: .2rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } thead th { border-bottom-color: var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tbody th { color: inherit; font-weight: 400; }
.words th, .words td { text-align: left; vertical-align: top; }
.words td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.frames { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem; }
@media (max-width: 1000px) { .frames { grid-template-columns: minmax(0, 1fr); } }
.frame { border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
.pictures { display: flex; gap: 4px; } figure { margin: 0; flex: 1; min-width: 0; }
figure img { width: 100%; display: block; background: #fff; } figcaption { font-size: .8rem; color: var(--soft);
  padding-right: .4rem; }
.numbers { font-size: .85rem; font-variant-numeric: tabular-nums; margin-top: .3rem; }
.numbers b { font-weight: 600; }
.scale img { width: min(260px, 40vw); height: 12px; vertical-align: middle; margin: 0 .5rem; }
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 1rem; } th, td { padding: .3rem .5rem; }
  th:first-child { position: sticky; left: 0; background: var(--page); }
  tbody th:first-child { min-width: 9rem; max-width: 45vw; white-space: normal; overflow-wrap: anywhere; }
  .words { font-size: .85rem; } .words th, .words td { white-space: normal; } .words td:last-child { min-width: 8rem; }
  .words th:first-child { position: static; min-width: 0; max-width: none; overflow-wrap: normal; } }
"""


class Html(str):
    """Markup that is complete and safe."""


def tag(name: str, /, *children: str | None, **attributes: str | bool | None) -> Html:
    """An element. Children that are not `Html` are text and escaped; None is left out. Attributes: `class_` is class,
    `aria_label` aria-label; True has no value, False and None are left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            named = key.rstrip("_").replace("_", "-")
            words.append(named if value is True else f'{named}="{escape(str(value))}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in _VOID else f"{opened}{joined(children)}</{name}>")


def joined(parts: Iterable[str | None], between: str = "") -> Html:
    """One after the other; text is escaped."""
    return Html(between.join(p if isinstance(p, Html) else escape(p, quote=False) for p in parts if p is not None))


def document(title: str, body: Sequence[Html], style: str = "", script: str = "") -> str:
    """A whole page. Its policy lets in what stands in it, this style and this script, and nothing else."""
    style = STYLE + style
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src {_allowed(style)}; "
        f"script-src {_allowed(script) if script else QUOTED_NONE}; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    end = [tag("script", Html(script))] if script else []
    return f"<!doctype html>\n{tag('html', head, tag('body', joined([*body, *end], NEW_LINE)), lang='en')}\n"


QUOTED_NONE, NEW_LINE = "'none'", "\n"


def _allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def grid(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", words: bool = False, label: str = ""
) -> Html:
    """A table that scrolls where it is too wide, its rows named by their first column. `words`: its cells are text."""
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    lines = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows if len(row)
    ]
    named = tag("caption", caption) if caption else None
    drawn = tag("table", named, head, tag("tbody", *lines), class_="words" if words else None)
    label = label or caption or header[0]
    return tag("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=label)


def table(shown: Table) -> Html:
    """One of tables.py, with its legend below."""
    return joined([grid(shown.header, shown.rows, label=shown.title), tag("p", shown.legend, class_="legend")])


def data_address(data: bytes, kind: str) -> str:
    """Bytes of a MIME type, in the page itself."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def embedded(picture: np.ndarray, form: str) -> str:
    """uint8 RGB as a data address; `form` is .jpg or .png."""
    options = {
        ".jpg": [
            cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
        ".png": [cv2.IMWRITE_PNG_COMPRESSION, 9],
    }[form]  # fmt: skip
    done, data = cv2.imencode(form, picture[..., ::-1], options)
    assert done, form
    return data_address(data.tobytes(), {".jpg": "image/jpeg", ".png": "image/png"}[form])


def picture_file(path: Path, width: int) -> str | None:
    """A picture's file as a data address, photographs of at most `width` pixels; None where it cannot be read."""
    try:
        read = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    if read is None:
        return None
    if read.shape[1] > width:
        height = max(1, round(read.shape[0] * width / read.shape[1]))
        read = cv2.resize(read, (width, height), interpolation=cv2.INTER_AREA)
    return embedded(read[..., ::-1], ".jpg")
