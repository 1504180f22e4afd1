"""What the page of a job and the page of two jobs are made of: head, videos, pictures, curves, troubles."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavatar.inference.cards import Card, draw_card, read_cards
from lavatar.inference.chart import STYLE as CHARTS
from lavatar.inference.document import Html, data_address, document, grid, joined, picture_file, tag
from lavatar.platform.home import size_text
from lavatar.platform.jobfacts import MOST_TROUBLES, JobFacts, PairFacts
from lavatar.platform.output import when
from lavatar.platform.progress import duration
from lavatar.platform.samples import Sample
from lavatar.platform.states import State

VIDEO_BYTES = 50_000_000
"""Of all videos in a page together: a browser keeps the whole page in its memory."""
STILL_WIDTH, SMALL_WIDTH = 1600, 800  # pixels of a still: of a pair in detail, and of one in brief
STILL_TEXT = "moments that cover the actor's expression: the actor above the result"
MOST_STILLS = 60  # pairs of which the page has a picture
CARDS_UNRANKED = 3  # frames shown of an evaluation that has none best and none worst

STYLE = (
    CHARTS
    + """
.state { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; } .finished { color: var(--good); } .failed, .error { color: var(--bad); }
.interrupted, .cancelled, .warning, .retry, .waiting { color: var(--warn); } .running, .pending { color: var(--link); }
.alert { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem 1rem; margin: 1rem 0; }
.alert p { color: inherit; margin: .1rem 0; }
.videos { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
.tables { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 0 1.6rem; }
.tables > * { min-width: 0; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
@media (max-width: 700px) { .two { grid-template-columns: minmax(0, 1fr); } }
.two .frames { grid-template-columns: minmax(0, 1fr); }
video, .videos img, .still { width: 100%; max-width: 1100px; height: auto; display: block; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; }
@media (max-width: 600px) { .still { width: 820px; max-width: none; } }
button { font: inherit; color: var(--link); background: var(--card); border: 1px solid currentColor; border-radius: 6px;
  padding: .3rem .9rem; margin: .4rem 0 .8rem; cursor: pointer; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); font-weight: 600; }
details > pre { white-space: pre-wrap; font: .85rem/1.45 ui-monospace, monospace; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
"""
)

SCRIPT = """
const videos = [...document.querySelectorAll('video')], button = document.querySelector('#play');
const label = () => { button.textContent = videos.some(v => !v.paused) ? 'Pause all' : 'Play all together'; };
const play = () => videos.forEach(v => { v.currentTime = 0; v.play().catch(() => {}); });
if (button) {
  button.hidden = false;
  button.onclick = () => videos.some(v => !v.paused) ? videos.forEach(v => v.pause()) : play();
  videos.forEach(v => { v.addEventListener('play', label); v.addEventListener('pause', label); });
  label();
  if (!matchMedia('(prefers-reduced-motion: reduce)').matches) play();
}
"""


@dataclass
class Room:
    """How many more bytes of videos the page takes, how many it has, and what was said of those left out."""

    left: int = field(default_factory=lambda: VIDEO_BYTES)
    videos: int = 0
    notes: list[str] = field(default_factory=list)

    def video(self, path: Path) -> str | None:
        """The video as a data address, if there is room for it (and it was not taken away this moment)."""
        try:
            data = path.read_bytes() if path.stat().st_size <= self.left else None
        except OSError:
            return None
        if data is None:
            return None
        self.left -= len(data)
        self.videos += 1
        return data_address(data, "video/mp4")


def draw_pair(pair: PairFacts, room: Room, *, detailed: bool, caption: str = "") -> Html:
    """The pair's video; its still where the page has no room for it, or a sentence where there is neither."""
    caption = caption or pair.name
    address = room.video(pair.files["video"]) if detailed and "video" in pair.files else None
    if address:
        video = tag(
            "video", controls=True, muted=True, loop=True, playsinline=True, preload="metadata",
            aria_label=f"{caption}: the actor left, the result right", src=address,
        )  # fmt: skip
        return tag("figure", video, tag("figcaption", caption))
    reason = pair.missing or f"{pair.state}: there is no video yet"
    if "video" in pair.files:
        why = "it is not among the first pairs" if not detailed else f"the videos fill {size_text(VIDEO_BYTES)}"
        reason = f"the video is left out, for {why}"
        room.notes.append(f"{pair.name}: {reason}: {pair.files['video']}")
    still = picture_file(pair.files["still"], SMALL_WIDTH) if "still" in pair.files else None
    shown = tag("img", src=still, alt=f"{caption}: {STILL_TEXT}") if still else None
    return tag("figure", shown, tag("figcaption", tag("b", caption), f" – {reason}"))


def draw_pictures(pair: PairFacts) -> Html:
    """The stills, and of the evaluation's frames the best, the median and the worst."""
    parts = []
    named = (("still", STILL_TEXT), ("self_still", "moments held out of training: the truth above the result"))
    for name, text in named:
        address = picture_file(pair.files[name], STILL_WIDTH) if name in pair.files else None
        if address:
            picture = tag("img", src=address, alt=f"{pair.name}: {text}", class_="still")
            wide = tag("div", picture, class_="scroll", tabindex="0", role="region", aria_label=f"{pair.name}, {name}")
            parts.append(tag("figure", wide, tag("figcaption", text)))
    cards = _cards(pair.files["page"]) if "page" in pair.files else []
    for section in dict.fromkeys(card.section for card in cards):
        drawn = [
            tag("div", tag("h4", card.kind) if card.kind else None, draw_card(card))
            for card in cards
            if card.section == section
        ]
        parts += [tag("h3", section), tag("div", *drawn, class_="frames")]
    if cards:
        parts.append(tag("p", "More frames: ", tag("code", str(pair.files["page"])), class_="legend"))
    return joined(parts, "\n") if parts else tag("p", pair.missing or "There are no pictures yet.")


def draw_samples(samples: Sequence[Sample]) -> Html | None:
    """The newest pictures of trainings."""
    if not samples:
        return None
    drawn = [
        tag("figure", tag("img", src=each.address, alt=f"{each.stage}: {each.name}"),
            tag("figcaption", f"{each.stage}: {each.name}, step {each.step:,}"))
        for each in samples
    ]  # fmt: skip
    return joined([tag("h3", "Samples of the trainings"), tag("div", *drawn, class_="videos")])


def _cards(page: Path) -> list[Card]:
    """Of the frames in the page of an evaluation the first of each kind in each section."""
    try:
        cards = read_cards(page.read_text("utf-8", "replace"))
    except OSError:
        return []
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for card in cards:
        place = (card.section, card.kind)
        seen[place] = seen.get(place, 0) + 1
        if seen[place] <= (1 if card.kind else CARDS_UNRANKED):
            kept.append(card)
    return kept


def head_of(facts: JobFacts) -> Html:
    """State, recipe and times of a job in a line, and what ended it if it did not finish."""
    job = facts.job
    made = f"submitted {when(job.created)}, {duration(facts.seconds)} of work"
    if facts.imported:
        made = f"imported {when(job.created)}"
    line = tag(
        "p",
        f"Job {job.id} ",
        tag("span", job.state, class_=f"state {job.state}"),
        f" recipe {job.recipe_name}, {made}.",
    )
    parts = [line]
    if job.state in (State.RUNNING, State.PENDING):
        parts.append(tag("p", f"It was {job.state} when this page was made: the page shows what there was then."))
    elif job.state != State.FINISHED and job.message:
        parts.append(tag("div", tag("p", tag("b", job.message)), tag("p", job.hint), class_="alert", role="note"))
    return joined(parts)


def draw_troubles(facts: JobFacts) -> Html:
    """Failures, warnings and retries, and what stages that did not finish say."""
    stages = [
        (view.name, view.stage.state, f"{view.stage.message} {view.stage.hint}".strip())
        for view in facts.views
        if view.stage.state != State.FINISHED and view.stage.message
    ]
    parts = (
        [grid(("stage", "state", "message"), stages, caption="Stages that did not finish", words=True)]
        if stages
        else []
    )
    shown = facts.troubles[-MOST_TROUBLES:]
    if len(shown) < len(facts.troubles):
        parts.append(tag("p", f"The last {len(shown)} of {len(facts.troubles)}: lavatar jobs logs {facts.job.id}"))
    if shown:
        rows = [
            (when(t.time), t.stage or "job", tag("span", t.level, class_=t.level), t.text + _times(t.count))
            for t in shown
        ]
        parts.append(grid(("time", "stage", "what", "message"), rows, caption="Events", words=True))
    notes = [(view.name, note) for view in facts.views for note in view.stage.notes]
    if notes:
        parts.append(grid(("stage", "note"), notes, caption="Notes of the stages", words=True))
    return joined(parts, "\n") if parts else tag("p", "Nothing: no failure, no warning and no retry.")


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def page_of(title: str, top: Html, sections: Iterable[tuple[str, Html]], room: Room) -> str:
    """The whole page: a list of its sections, how large it is, and the sections."""
    parts = list(sections)
    links = [tag("li", tag("a", name, href=f"#{_anchor(name)}")) for name, _ in parts]
    drawn = [tag("section", tag("h2", name, id=_anchor(name)), body) for name, body in parts]
    size = sum(len(part.encode()) for part in drawn)
    videos = f" with {room.videos} video{'' if room.videos == 1 else 's'} in it" if room.videos else ""
    about = tag(
        "p", f"One file of {size_text(size)}{videos}, made {when(time.time())}. It needs no network.", class_="legend"
    )
    nav = tag("nav", tag("ul", *links), aria_label="Sections")
    return document(title, [tag("header", tag("h1", title), top, about, nav), tag("main", *drawn)], STYLE, SCRIPT)


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def play_button(room: Room) -> Html | None:
    """For scripts to show."""
    return tag("button", "Play all together", id="play", type="button", hidden=True) if room.videos else None
