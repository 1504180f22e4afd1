"""A job that is no more than a model file that was imported: what there is of it, and what there is not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lavatar.platform import lookup
from lavatar.platform.champions import FIGURE_TAG, figure
from lavatar.platform.home import Home
from lavatar.platform.lookup import StageView
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import IMPORTED, Job
from lavatar.platform.tracking import connect

_PARTS = ("truth", "face", "landmark_error", "identity", "expression", "spread")
_FIGURE = re.compile(r"(self|cross)(/truth)?/((face|landmark_error|identity)/\w+|expression/\w+/\w+|\w+)")


def is_imported(job: Job) -> bool:
    return job.state == State.FINISHED and job.message == IMPORTED


def imported_figures(home: Home, registry: Registry, views: Sequence[StageView]) -> dict[str, Any]:
    """The figures that its model brought along, nested as in metrics.json; none where MLflow does not tell them."""
    models = lookup.artefacts(registry, [view.stage.key for view in views], "model")
    try:
        client = connect(home)
        tags = [client.get_model_version(model.name, str(model.version)).tags for model in models]
    except Exception:  # MLflow, SQLAlchemy, requests: no common root. The page shows what there is.
        return {}
    found: dict[str, Any] = {}
    for each in tags:
        _nest(each, found)
    return found


def _nest(tags: Mapping[str, str], into: dict[str, Any]) -> None:
    """The figures among the tags. What a file from elsewhere calls a figure and is none is left out."""
    for path in (name.removeprefix(FIGURE_TAG) for name in tags if name.startswith(FIGURE_TAG)):
        *parts, last = path.split("/")
        if not _FIGURE.fullmatch(path) or last in _PARTS:
            continue
        place = into
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = figure(tags, path)
