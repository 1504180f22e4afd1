"""Models behind MLflow's real server, on PostgreSQL and S3: what is registered lands in the bucket and loads back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import s3_server
from inference_files import FACE, RECIPE, make_avatar_release, make_pair_release
from model_files import Models, measures
from platform_fakes import FakeHandle, fresh, plain_digest
from postgres_files import Server

from lavatar.contracts import StageResult
from lavatar.platform.cli import run
from lavatar.platform.commands import ui
from lavatar.platform.tracking import connect

__all__ = ["plain_digest"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # MLflow's server makes its tables, which takes half a minute
AVATAR, PAIR = "lavatar-avatar-A", "lavatar-pair-A-B"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3]:
    with s3_server.running(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, s3: s3_server.S3) -> Iterator[str]:
    """Of a server that alone knows the database and the bucket."""
    port, folder = ui._free_port(5400), tmp_path_factory.mktemp("server")
    with Server.at(folder / "pg") as postgres, (folder / "log").open("wb") as log:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--artifacts-destination", f"s3://{s3_server.BUCKET}/mlflow"]
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
            yield f"http://127.0.0.1:{port}"
        finally:
            ui._stop(process)


@pytest.fixture
def models(home: Path, address: str, plain_digest: None, monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    grey = np.full((1, FACE, FACE, 3), 128, np.uint8)
    monkeypatch.setattr("lavatar.platform.modelregistry._example", lambda release: grey)
    place, registry = fresh(home)
    return Models(place, registry, connect(place))


def untrained(handle: FakeHandle) -> StageResult:
    """A stage that leaves a real release."""
    make = make_avatar_release if handle.spec.kind == "avatar" else make_pair_release
    return StageResult({"release": make(handle.spec.out_dir / "release")})


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


def test_models_on_postgresql_and_s3(models: Models, s3: s3_server.S3, capfd: pytest.CaptureFixture[str]) -> None:
    import mlflow

    sizes = tuple(f"avatar.{key}={getattr(RECIPE.avatar, key)}" for key in ("image_size", "ray_size", "face_size"))
    sizes += (f"preprocess.face_size={FACE}", f"ynet.face_size={FACE}", "preprocess.portrait_size=64")
    stages = {"avatar": untrained, "pair": untrained}
    models.submit(*sizes, **stages)
    models.submit(*sizes, "avatar_training.steps=99", preview=measures(lpips=0.04, error=0.5), **stages)
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [2, 1]

    stored = [key for key in keys_of(s3) if key.endswith("model.safetensors")]
    assert all(key.startswith("mlflow/") for key in stored)
    assert len(stored) == 2 * 1 + 2 * 2, "an avatar's holds one release, a pair's two"
    assert not list(models.home.mlartifacts.rglob("*")), "nothing in the home"
    mlflow.set_tracking_uri(models.home.tracking_uri)
    faces = np.full((2, FACE, FACE, 3), 128, np.uint8)
    for name in (AVATAR, PAIR):
        portraits = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(faces)
        assert portraits.shape == (2, RECIPE.avatar.image_size, RECIPE.avatar.image_size, 3)

    def call(*args: str) -> Any:
        capfd.readouterr()
        assert run(["models", *args, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    listed = {model["name"]: model for model in call("list")["models"]}
    assert [version["stale"] for version in listed[PAIR]["versions"]] == [False, True]
    assert listed[AVATAR]["champions"] == [1, 2]
    shown = call("show", "A<-B@latest")
    assert shown["tags"]["lavatar.avatar.version"] == f"{AVATAR}/2"
    assert shown["card"].startswith("# A driven by B")
    assert call("compare", "A/1", "A/2")["same_frames"] is True
    assert call("rollback", "A")["version"] == 1
    assert call("delete", "A/2")["pairs"] == [f"models:/{PAIR}/2"]
    assert models.numbers(AVATAR) == [1]
