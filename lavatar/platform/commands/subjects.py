"""lavatar subjects: the people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, table

if TYPE_CHECKING:
    from lavatar.platform.registry import Registry
    from lavatar.platform.tables import Subject


def _registry() -> Registry:
    from lavatar.platform.registry import open_registry

    return open_registry(Home.from_environment())


@click.group()
def subjects() -> None:
    """The people: add, list, show, remove."""


@subjects.command()
@click.argument("name")
@click.argument("video", required=False, type=click.Path(path_type=Path))
@click.option("--synthetic", type=int, metavar="SEED", help="A synthetic head instead of a video.")
@json_option
def add(name: str, video: Path | None, synthetic: int | None, as_json: bool) -> None:
    """Register a person under NAME, by a VIDEO of them.

    The video is looked at and remembered by its path and its content; it is not copied.
    `lavatar subjects add --synthetic SEED NAME` registers a synthetic head.
    """
    from lavatar.platform.subjects import add_subject, check_name, describe_synthetic, describe_video, to_json

    check_name(name)
    if (video is None) == (synthetic is None):
        wrong = "neither a video nor --synthetic SEED" if video is None else "both a video and --synthetic"
        raise UsageError(f"{name!r} was given with {wrong}", f"Write: lavatar subjects add {name} VIDEO")
    subject = describe_video(name, video) if video is not None else describe_synthetic(name, synthetic or 0)
    stored, new = add_subject(_registry(), subject)
    if as_json:
        answer_json({**to_json(stored), "new": new})
        return
    answer(f"{'added' if new else 'already there:'} {_line(stored)}")


@subjects.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """All registered people."""
    from lavatar.platform.subjects import describe_source, list_subjects, to_json

    rows = list_subjects(_registry())
    if as_json:
        answer_json({"subjects": [to_json(row) for row in rows]})
    elif rows:
        answer(
            table(
                [(r.name, r.kind, _video_text(r), describe_source(r)) for r in rows], ("NAME", "KIND", "VIDEO", "FROM")
            )
        )
    else:
        note("no subjects yet: lavatar subjects add NAME VIDEO")


@subjects.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """What is known of one person."""
    from lavatar.platform.lookup import list_datasets
    from lavatar.platform.subjects import get_subject, to_json

    registry = _registry()
    subject = get_subject(registry, name, wanted=False)
    datasets = list_datasets(registry, name)
    if as_json:
        home = Home.from_environment()
        found = [{"key": d.key, "folder": str(home.absolute(d.folder)), **d.summary} for d in datasets]
        answer_json({**to_json(subject), "datasets": found})
        return
    answer(_line(subject))
    answer(f"  content {subject.digest[:16]}…")
    for dataset in datasets:
        s = dataset.summary
        answer(
            f"  dataset {dataset.key[:12]}: {s.get('frames')} frames "
            f"({s.get('train')} train, {s.get('eval')} held out), "
            f"{s.get('dropped')} dropped, pose error {s.get('reprojection_px')} px"
        )


@subjects.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Forget a person. Finished models and videos of them stay."""
    from lavatar.platform.subjects import remove_subject

    subject = remove_subject(_registry(), name)
    if as_json:
        answer_json({"removed": subject.name})
        return
    answer(f"removed {subject.name}")
    note("its finished datasets, models and results stay in the home; the video itself was not touched")


def _line(subject: Subject) -> str:
    from lavatar.platform.subjects import describe_source

    details = _video_text(subject)
    return f"{subject.name}: {describe_source(subject)}" + (f" ({details})" if details else "")


def _video_text(subject: Subject) -> str:
    v = subject.video or {}
    if not v:
        return ""
    length = f", {v['duration']:.1f} s" if v.get("duration") else ""
    sound = "" if v.get("has_audio") else ", no sound"
    return f"{v.get('width')}×{v.get('height')}, {v.get('fps') or 0:.3g} frames/s{length}{sound}"
