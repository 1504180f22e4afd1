"""Jobs whose stages are small functions and whose models go to a real MLflow."""

from __future__ import annotations

import contextlib
import copy
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_files import FACE, RECIPE, make_avatar_release, make_pair_release
from mlflow import MlflowClient
from platform_fakes import METRICS, Body, FakeHandle, FakeRunner, Recorder, finish, fresh, make_plan, office

from lavatar.contracts import StageKind, StageResult
from lavatar.platform.about import About, Someone
from lavatar.platform.catalogue import Catalogue, Version
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.modelregistry import Release, avatar_model_name, pair_model_name, register
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry
from lavatar.platform.tracking import Tracker, connect


def figures(lpips: float = 0.05, psnr: float = 30.0, error: float = 0.4) -> dict[str, Any]:
    """What a preview measures."""
    metrics = copy.deepcopy(METRICS)
    metrics["self"] |= {"lpips": lpips, "psnr": psnr, "frames": 6, "spread": {"psnr": 0.5}}
    metrics["cross"] |= {"expression_error": error, "frames": 6}
    return metrics


def measures(**values: float) -> Body:
    """A preview that comes to these figures."""

    def preview(handle: FakeHandle) -> StageResult:
        result = finish(handle)
        return StageResult(result.artefacts, figures(**values))

    return preview


PEOPLE = {"avatar": Someone(name="ann", digest="1" * 64), "actor": Someone(name="bob", digest="2" * 64)}
KNOWN = {"job": "j", "lavatar": "0", "created": "today", "recipe": RECIPE.model_dump(mode="json")}


def register_untrained(home: Home, folder: Path) -> Tracker:
    """An avatar (ann) and a pair (ann driven by bob) in the model registry, as a job registers them; their releases are
    made in `folder`."""
    folders = {"avatar": make_avatar_release(folder / "a"), "pair": make_pair_release(folder / "p")}
    tracker, size = Tracker(home, print), RECIPE.avatar.image_size
    about = {
        "avatar": About(kind="avatar", avatar=PEOPLE["avatar"], stage="a" * 64, **KNOWN),
        "pair": About(kind="pair", **PEOPLE, stage="b" * 64, **KNOWN),
    }
    for name, kind, given, pair in (
        (avatar_model_name("ann"), StageKind.AVATAR, {"avatar": folders["avatar"]}, None),
        (pair_model_name("ann", "bob"), StageKind.PAIR, folders, ("ann", "bob")),
    ):
        key = about[kind.value].stage
        release = Release(kind, key, name, given, size, FACE, pair=pair, about=about[kind.value])
        assert register(home, tracker, release, None, print) == 1
    return tracker


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database as MLflow makes it, which takes ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(tmp_path_factory.mktemp("tables")).ensure()
        connect(home)
    return home.root / "mlflow.db"


@dataclass
class Models:
    """A home with a registry and MLflow in it."""

    home: Home
    registry: Registry
    client: MlflowClient
    display: Recorder = field(default_factory=Recorder)

    def submit(self, *overrides: str, names: str = "AB", **bodies: Body) -> Plan:
        """A job of two letters' people, whose preview comes to `figures()` unless `preview` says otherwise."""
        plan = make_plan(self.home, *names, *overrides)
        self.run(plan, **bodies)
        return plan

    def run(self, plan: Plan, **bodies: Body) -> FakeRunner:
        runner = FakeRunner({"preview": measures(), **bodies})
        desk = office(self.home, self.registry, runner)
        assert isinstance(desk.display, Recorder)
        self.display = desk.display
        run_job(desk, plan)
        return runner

    def version(self, reference: str) -> Version:
        return Catalogue(self.client).version(reference)

    def numbers(self, name: str) -> list[int]:
        return sorted(int(v.version) for v in self.client.search_model_versions(f"name = '{name}'"))

    def champion(self, name: str) -> int | None:
        found = self.client.get_registered_model(name).aliases.get("champion")
        return int(found) if found else None


@pytest.fixture
def models(home: Path, mlflow_tables: Path, plain_digest: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """The `lavatar` fixture works in the same home."""
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    grey = np.full((1, 128, 128, 3), 128, np.uint8)  # the datasets of these stages hold no face
    monkeypatch.setattr("lavatar.platform.modelregistry._example", lambda *of: grey)
    place, registry = fresh(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.tracking_uri)  # as mlflow.set_tracking_uri leaves it behind
    with contextlib.closing(sqlite3.connect(mlflow_tables)) as tables:
        tables.execute(f"VACUUM INTO '{home / 'mlflow.db'}'")
    yield Models(place, registry, connect(place))
    registry.close()
