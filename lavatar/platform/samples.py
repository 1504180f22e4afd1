"""The newest pictures of trainings, from their MLflow runs: what there is to see where there is no video (yet)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavatar.errors import JobError
from lavatar.inference.document import picture_file
from lavatar.platform.home import Home
from lavatar.platform.lookup import StageView
from lavatar.platform.runs import tracked
from lavatar.platform.tracking import connect, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "images"  # where MLflow's log_image puts them
WIDTH = 800  # pixels
_NAME = re.compile(rf"{FOLDER}/(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+\d+\+[^+]+\.png")


@dataclass(frozen=True)
class Sample:
    """A picture that a stage's training logged, as a data address."""

    stage: str
    name: str
    step: int
    address: str


def newest_samples(home: Home, views: Sequence[StageView]) -> tuple[list[Sample], list[str]]:
    """Of each picture of each stage's run the last one, and a sentence for what MLflow did not give. It may be away."""
    if not views or not tracked(home):
        return [], []
    try:
        client = connect(home)
    except JobError:  # the curves' notes say it
        return [], []
    found, notes = list[Sample](), list[str]()
    for view in views:
        try:
            found += _samples(client, view)
        except Exception as error:  # MLflow, its store, the disk: no common root
            notes.append(f"MLflow did not give the pictures of {view.name}: {first_line(error)}")
    return found, notes


def _samples(client: MlflowClient, view: StageView) -> list[Sample]:
    run_id = str(view.stage.mlflow_run_id)
    newest: dict[str, tuple[int, str]] = {}
    for file in client.list_artifacts(run_id, FOLDER):
        named = _NAME.fullmatch(file.path)
        if named and int(named["step"]) >= newest.get(named["key"], (-1, ""))[0]:
            newest[named["key"]] = int(named["step"]), file.path
    made = []
    with tempfile.TemporaryDirectory() as into:
        for key, (step, path) in sorted(newest.items()):
            address = picture_file(Path(client.download_artifacts(run_id, path, into)), WIDTH)
            if address:
                made.append(Sample(view.name, key.replace("~", "/"), step, address))
    return made
