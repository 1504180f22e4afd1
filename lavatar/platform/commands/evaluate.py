"""lavatar evaluate: measure a finished avatar or pair again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lavatar.errors import JobError, LavatarError, UsageError
from lavatar.platform.commands.options import choice_options, json_option
from lavatar.platform.home import Home, working_in
from lavatar.platform.output import answer, answer_json, note, reserved

if TYPE_CHECKING:
    from lavatar.platform.finished import Finished
    from lavatar.platform.progress import Display
    from lavatar.platform.registry import Registry


@click.command()
@click.option("--avatar", required=True, metavar="NAME", help="Self reenactment of its held-out frames.")
@click.option("--actor", metavar="NAME", help="Also cross reenactment of this actor's held-out frames.")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder for index.html, metrics.json and table.txt (default: outputs/evaluation in the home).",
)
@choice_options
@json_option
def evaluate(
    avatar: str, actor: str | None, folder: Path | None, version: str | None, job: str | None, as_json: bool
) -> None:
    """Measure a finished avatar or pair again, on the frames held out of training.

    Measured is the champion of the registered models, the newest where there is none. Beside the results stand the mean
    and the nearest training frame. Expressions are reported as correlation (r), amplitude (result ÷ truth) and error.
    index.html shows the best, median and worst frames.
    """
    from lavatar.inference.tables import as_text
    from lavatar.platform.choosing import Choice, Chooser
    from lavatar.platform.progress import open_display
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    chosen = Chooser(registry, home, avatar, actor, note, frames=True).choose(Choice(version, job))
    found = chosen.found
    folder = (folder or home.evaluation_dir(avatar, actor)).absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"the output {folder} is a file", "Name a folder: the page, the figures and the table go there."
        )
    if found.avatar_data is None:
        raise JobError(
            f"{avatar!r} was imported as a model, without the frames that it would be measured on",
            "Evaluate it where it was trained: `lavatar models import` brings the figures from there in its card.",
        )
    with reserved(), working_in(home):
        home.fetch(found.avatar, found.avatar_data, found.pair, found.actor_data)
        display = open_display()
        try:
            metrics, notes, files = _measure(found, folder, display)
            _log(home, run_of(registry, found.job, avatar, actor), metrics, files, display)
        finally:
            display.close()
        if as_json:
            paths = {name: str(path) for name, path in files.items()}
            shown = {"job": found.job, "model": chosen.model, "avatar": avatar, "actor": actor, "notes": notes}
            answer_json({**shown, "folder": str(folder), **paths, "metrics": metrics, "metrics_file": paths["metrics"]})
        else:
            lines = [chosen.text, "", as_text(metrics), *(f"note: {note}" for note in notes)]
            answer("\n".join([*lines, "", f"page    {files['page']}", f"metrics {files['metrics']}"]))


def _measure(
    found: Finished, folder: Path, display: Display
) -> tuple[dict[str, Any], tuple[str, ...], dict[str, Path]]:
    """The figures, the sentences for the user, and the files written to `folder`."""
    from lavatar.platform.progress import DisplaySink

    display.message("loading PyTorch and the models")
    from lavatar.inference.encode_video import storage_error
    from lavatar.inference.evaluate import evaluate_both
    from lavatar.inference.loading import best_device, load_avatar, load_pair
    from lavatar.inference.write_evaluation import write_evaluation

    assert found.avatar_data is not None
    device = best_device()
    avatar = load_avatar(found.avatar, device)
    pair = load_pair(found.pair, device) if found.pair else None
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the minutes that the figures take
        both = evaluate_both(
            avatar, found.avatar_data, found.recipe, pair, found.actor_data, events=DisplaySink(display)
        )
        display.message("drawing the page")
        files = write_evaluation(folder, both, avatar, found.avatar_data, found.recipe, pair, found.actor_data)
    except OSError as error:
        raise storage_error(folder, error) from None
    return both.metrics, both.notes, files


def run_of(registry: Registry, job_id: str, avatar: str, actor: str | None) -> str | None:
    """The job's MLflow run; in a job of many pairs the one of this pair's preview, or of the avatar."""
    from lavatar.contracts import StageKind
    from lavatar.platform.finished import stage_in
    from lavatar.platform.lookup import get_job, job_pairs

    job = get_job(registry, job_id)
    if len(job_pairs(registry, job.id)) == 1:
        return job.mlflow_run_id
    stage = stage_in(registry, job, StageKind.PREVIEW if actor else StageKind.AVATAR, avatar, actor)
    return stage.mlflow_run_id if stage else None


def _log(
    home: Home, run_id: str | None, metrics: Mapping[str, Any], files: Mapping[str, Path], display: Display
) -> None:
    """Into the MLflow run; that it is away costs the figures nothing."""
    from lavatar.platform.tracking import Tracker

    def warn(text: str) -> None:
        display.message(text, "warning")

    if run_id is None:
        return
    try:
        Tracker(home, warn).log_evaluation(run_id, metrics, files)
    except LavatarError as error:
        warn(error.message)
