"""Models behind MLflow's real server, on PostgreSQL and S3, with a registry on PostgreSQL: everything that works in a
home alone works there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import s3_server
from inference_files import FACE, RECIPE, make_avatar_release, make_pair_release
from model_files import Models, measures
from platform_fakes import FakeHandle, FakeRunner, fresh, plain_digest, use_plain_digest
from postgres_files import Server
from serve_files import post, predicted, served
from video_files import write_drawn_head

from lavatar.contracts import StageResult
from lavatar.datasets.video import read_frames
from lavatar.platform.cli import run
from lavatar.platform.commands import ui
from lavatar.platform.home import Home
from lavatar.platform.subjects import add_subject, describe_synthetic
from lavatar.platform.tracking import connect
from lavatar.training.files import file_digest

__all__ = ["plain_digest"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # MLflow's server makes its tables, which takes half a minute
AVATAR, PAIR = "lavatar-avatar-A", "lavatar-pair-A-B"
SIZE = RECIPE.avatar.image_size
SIZES = (
    *(f"avatar.{key}={getattr(RECIPE.avatar, key)}" for key in ("image_size", "ray_size", "face_size")),
    f"preprocess.face_size={FACE}",
    f"ynet.face_size={FACE}",
    "preprocess.portrait_size=64",
    "evaluation.panel_size=64",
)
"""What the recipe says of the untrained releases."""
Call = Callable[..., Any]


@dataclass(frozen=True)
class Services:
    """Where MLflow's server is; it alone knows its database and its bucket. And a PostgreSQL for registries."""

    mlflow: str
    postgres: str
    s3: s3_server.S3

    def database(self, name: str) -> str:
        """A new one."""
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.postgres.replace("/postgres?", f"/{name}?", 1)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    port, folder = ui._free_port(5400), tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", f"s3://{s3_server.BUCKET}/mlflow"]
    with (
        s3_server.running(folder / "s3.log") as s3,
        Server.at(folder / "pg") as postgres,
        (folder / "log").open("wb") as log,
    ):
        database = postgres.uri.replace("postgresql://", "postgresql+psycopg://", 1)
        environment = {
            **os.environ,
            **s3.environment,
            "MLFLOW_S3_ENDPOINT_URL": s3.environment["AWS_ENDPOINT_URL"],
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_REGISTRY_STORE_URI": database,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ui, "_START_SECONDS", 400.0)
                ui._wait(process, f"http://127.0.0.1:{port}")
            yield Services(f"http://127.0.0.1:{port}", postgres.uri, s3)
        finally:
            ui._stop(process)


@pytest.fixture
def models(home: Path, services: Services, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Models:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", services.mlflow)
    monkeypatch.setenv("LAVATAR_REGISTRY", services.database(request.node.name))
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    grey = np.full((1, FACE, FACE, 3), 128, np.uint8)
    monkeypatch.setattr("lavatar.platform.modelregistry._example", lambda *of: grey)
    place, registry = fresh(home)
    return Models(place, registry, connect(place))


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command line; what is returned is the answer to --json."""

    def answered(*args: str | Path, code: int = 0) -> Any:
        capfd.readouterr()
        found = run([*map(str, args), "--json"])
        out, err = capfd.readouterr()
        assert found == code, err
        return json.loads(out)

    return answered


def untrained(handle: FakeHandle) -> StageResult:
    """A stage that leaves a real release."""
    make = make_avatar_release if handle.spec.kind == "avatar" else make_pair_release
    return StageResult({"release": make(handle.spec.out_dir / "release")})


STAGES = {"avatar": untrained, "pair": untrained}


def keys_of(s3: s3_server.S3) -> list[str]:
    import boto3

    names = {key.removeprefix("AWS_").lower(): value for key, value in s3.environment.items()}
    client = boto3.client(
        "s3",
        endpoint_url=names["endpoint_url"],
        aws_access_key_id=names["access_key_id"],
        aws_secret_access_key=names["secret_access_key"],
        region_name="us-east-1",
    )
    return [found["Key"] for found in client.list_objects_v2(Bucket=s3_server.BUCKET).get("Contents", [])]


def test_models_are_listed_compared_promoted_rolled_back_and_deleted(
    models: Models, services: Services, plain_digest: None, call: Call
) -> None:
    import mlflow

    models.submit(*SIZES, **STAGES)
    models.submit(*SIZES, "avatar_training.steps=99", preview=measures(lpips=0.04, error=0.5), **STAGES)
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [2, 1]

    stored = [key for key in keys_of(services.s3) if key.endswith("model.safetensors")]
    assert all(key.startswith("mlflow/") for key in stored)
    assert len(stored) == 2 * 1 + 2 * 2, "an avatar's holds one release, a pair's two"
    assert not list(models.home.mlartifacts.rglob("*")), "nothing in the home"
    mlflow.set_tracking_uri(models.home.tracking_uri)
    faces = np.full((2, FACE, FACE, 3), 128, np.uint8)
    for name in (AVATAR, PAIR):
        portraits = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(faces)
        assert portraits.shape == (2, SIZE, SIZE, 3)

    listed = {model["name"]: model for model in call("models", "list")["models"]}
    assert [version["stale"] for version in listed[PAIR]["versions"]] == [False, True]
    assert listed[AVATAR]["champions"] == [1, 2]
    shown = call("models", "show", "A<-B@latest")
    assert shown["tags"]["lavatar.avatar.version"] == f"{AVATAR}/2"
    assert shown["card"].startswith("# A driven by B")
    compared = call("models", "compare", "A/1", "A/2")
    assert compared["same_frames"] is True
    assert [version["figures"]["self/lpips"] for version in compared["versions"]] == [0.05, 0.04]
    assert call("models", "rollback", "A") == {"name": AVATAR, "version": 1, "before": 2}
    assert models.champion(AVATAR) == 1
    assert call("models", "promote", "A/2")["before"] == 1
    assert call("models", "promote", "A/1", "--alias", "approved")["before"] is None
    assert (models.champion(AVATAR), models.version("A@approved").number) == (2, 1)
    assert call("models", "delete", "A/2", code=1)["error"]["message"] == f"{AVATAR} version 2 is the champion"
    assert call("models", "rollback", "A")["version"] == 1
    assert call("models", "delete", "A/2")["pairs"] == [f"models:/{PAIR}/2"]
    assert models.numbers(AVATAR) == [1]


def test_a_pair_travels_and_is_used_by_whoever_reaches_the_server(
    models: Models, services: Services, call: Call, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported, imported by another installation with a registry and a store of its own, reenacted by both; then
    MLflow alone, in clean processes and over HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        use_plain_digest(patch)
        models.submit(*SIZES, names="CD", **STAGES)
    video, frames = write_drawn_head(tmp_path / "driver.mp4")
    exported = call("models", "export", "C<-D", "-o", tmp_path / "pair.tar")
    assert (exported["version"], exported["sha256"]) == (1, file_digest(tmp_path / "pair.tar"))
    call("reenact", "--avatar", "C", "--actor", "D", "--video", video, "-o", tmp_path / "here.mp4")

    other = Home(tmp_path / "elsewhere")
    for name, value in services.s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LAVATAR_HOME", str(other.root))
    monkeypatch.setenv("LAVATAR_REGISTRY", services.database("elsewhere"))
    monkeypatch.setenv("LAVATAR_STORE", f"s3://{s3_server.BUCKET}/store")
    imported = call("models", "import", tmp_path / "pair.tar", "--as", "cleo:dan")
    pair = "lavatar-pair-cleo-dan"
    assert imported == {
        "model": pair, "version": 1, "avatar": "cleo", "actor": "dan", "new": True, "sha256": exported["sha256"],
    }  # fmt: skip
    assert call("models", "import", tmp_path / "pair.tar", "--as", "cleo:dan")["new"] is False
    shown = call("models", "show", pair)
    assert (shown["aliases"], shown["figures"]) == (["latest", "champion"], call("models", "show", "C<-D")["figures"])
    assert not list(other.mlartifacts.rglob("*"))
    assert any(key.startswith("store/stages/") for key in keys_of(services.s3))
    call("reenact", "--avatar", "cleo", "--actor", "dan", "--video", video, "-o", tmp_path / "there.mp4")
    here, there = (np.stack([rgb for _, _, rgb in read_frames(tmp_path / name)]) for name in ("here.mp4", "there.mp4"))
    assert here.shape == (len(frames), 64, 64, 3)
    assert here.std() > 1
    assert (here == there).all()

    drawn = [
        predicted(services.mlflow, f"models:/{name}@champion", frames, tmp_path) for name in ("lavatar-pair-C-D", pair)
    ]
    assert (drawn[0].shape, drawn[0].dtype) == ((len(frames), SIZE, SIZE, 3), np.uint8)
    assert (drawn[0] == drawn[1]).all()
    with served(services.mlflow, f"models:/{pair}@champion", tmp_path) as url:
        status, answer = post(url, {"inputs": frames[:1].tolist()})
        assert (status, np.shape(answer["predictions"])) == (200, (1, SIZE, SIZE, 3)), answer


def test_stale_pairs_are_brought_up_to_date(
    models: Models, plain_digest: None, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavatar.cluster import stages

    @contextlib.contextmanager
    def opened(*args: object, **kwargs: object) -> Iterator[FakeRunner]:
        yield FakeRunner({"preview": measures(), **STAGES})

    monkeypatch.setattr(stages, "StageRunner", opened)
    for name in "GHI":
        add_subject(models.registry, describe_synthetic(name, ord(name)))
    cold = (*SIZES, "pair_learning.warm=false", "ynet_training.steps=77")
    for actor in "HI":
        models.submit(*cold, names=f"G{actor}", **STAGES)
    assert call("jobs", "retry", "--stale") == {"jobs": [], "left": {}}
    better = measures(lpips=0.01)
    models.submit(*cold, "avatar_training.steps=99", names="GI", preview=better, **STAGES)
    ours = [f"lavatar-{name}" for name in ("avatar-G", "pair-G-H", "pair-G-I")]

    def stale() -> list[bool]:
        listed = {model["name"]: model["stale"] for model in call("models", "list")["models"]}
        return [listed[name] for name in ours]

    assert stale() == [False, True, False]
    (job,) = call("jobs", "retry", "--stale")["jobs"]
    assert (job["state"], job["avatar"], job["actor"]) == ("finished", "G", "H")
    assert {stage["name"]: stage["cached"] for stage in job["stages"]} == {
        "preprocess:G": True, "preprocess:H": True, "avatar:G": True, "pair:G<-H": False, "preview:G<-H": False
    }  # fmt: skip
    assert models.version("G<-H@latest").tags["lavatar.avatar.version"] == "lavatar-avatar-G/2"
    assert stale() == [False] * 3
    assert call("jobs", "retry", "--stale") == {"jobs": [], "left": {}}
