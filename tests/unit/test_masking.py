"""No password, key or token in an error, a log, MLflow or the registry."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
import string
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar.cluster import environment
from lavatar.cluster.logs import note
from lavatar.configs.recipe import load_recipe
from lavatar.errors import JobError, LavatarError
from lavatar.masking import is_secret, masked
from lavatar.platform import ledger, lookup
from lavatar.platform.home import REGISTRY_VARIABLE, TRACKING_VARIABLE, Home
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.sink import MlflowSinkFactory
from lavatar.platform.states import State
from lavatar.platform.tracking import Tracker

WORDS = st.text(string.ascii_lowercase, min_size=1, max_size=8)
PASSWORDS = st.text(string.ascii_letters + string.digits + string.punctuation + "äß中", max_size=12).map("S3C".__add__)


@given(WORDS, WORDS, PASSWORDS, WORDS)
def test_the_password_of_an_address_is_never_shown(scheme: str, user: str, password: str, host: str) -> None:
    shown = masked(f"could not reach {scheme}://{user}:{password}@{host}:5432/db, try again")
    assert shown == f"could not reach {scheme}://{user}:***@{host}:5432/db, try again"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://s3cr3t@host/x", "https://***@host/x"),
        ("postgresql:///db?host=h&password=s3cr3t&sslmode=off", "postgresql:///db?host=h&password=***&sslmode=off"),
        ("https://b.example/k?X-Amz-Signature=s3cr3t", "https://b.example/k?X-Amz-Signature=***"),
        ("AWS_SECRET_ACCESS_KEY=s3cr3t", "AWS_SECRET_ACCESS_KEY=***"),
        ("Authorization: Bearer s3cr3t", "Authorization: Bearer ***"),
        ('{"key": 1, "secret": "s3cr3t"}', '{"key": 1, "secret": "***"}'),
        ("conninfo 'user=u password=s3cr3t host=h'", "conninfo 'user=u password=*** host=h'"),
    ],
)
def test_named_secrets_are_not_shown(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/a/.lavatar/registry.db", "models:/lavatar-pair-a-b@champion", "http://127.0.0.1:8265",
        "postgresql+psycopg://user@host/database", "export RAY_AUTH_TOKEN_PATH=FILE", "avatar.encoder=strided",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_errors_logs_and_arguments_are_masked(tmp_path: Path) -> None:
    url = "postgresql://u:s3cr3t@host/db"
    error = LavatarError(f"{url} is away", f"Correct {url}.")
    assert "s3cr3t" not in f"{error} {error.message} {error.hint} {error!r}"
    note(tmp_path / "stage.log", f"Traceback\n  {url}")
    assert "u:***@host" in (tmp_path / "stage.log").read_text()
    factory = MlflowSinkFactory(url, "run")
    assert "s3cr3t" not in repr(factory)
    assert dataclasses.astuple(factory)[:2] == (url, "run")
    assert "s3cr3t" not in ledger.failure(RuntimeError(url))[0]


def test_the_registry_keeps_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REGISTRY_VARIABLE, raising=False)
    registry: Registry = open_registry(Home(tmp_path))
    url = "https://u:s3cr3t@mlflow.example"
    with registry.write() as session:
        session.add(ledger.Stage(key="k", kind="avatar", name="n", out_dir="o", created=0.0))
    ledger.store_model(registry, "k", "model", 1, url)
    ledger.record(registry, None, f"MLflow at {url} is away", level="warning")
    assert [row.uri for row in lookup.artefacts(registry, ["k"], "model")] == [masked(url)]
    registry.close()
    assert not any(b"s3cr3t" in path.read_bytes() for path in tmp_path.rglob("*.db*"))


def test_mlflow_keeps_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING_VARIABLE, f"sqlite:///{tmp_path / 'mlflow.db'}?password=s3cr3t")
    monkeypatch.setenv(REGISTRY_VARIABLE, "postgresql://u:s3cr3t@host/db")
    warnings: list[str] = []
    tracker = Tracker(Home(tmp_path), warnings.append)
    recipe = load_recipe("tiny").model_dump(mode="json")
    run = tracker.open_job("lavatar/a<-b", "job1", None, {"avatar": "a", **recipe})
    assert run
    monkeypatch.setattr("sys.argv", ["lavatar", "submit", "--actor", "https://u:s3cr3t@host/clip.mp4"])
    tracker.log_origin(run, recipe)
    factory = tracker.sink_factory(run)
    assert factory
    with contextlib.closing(factory()) as sink:
        sink.log_params({"steps": 3})
        sink.log_metrics(1, {"loss": 0.5})
    tracker._try("fail", lambda: tracker.client.get_run(f"https://u:s3cr3t@host/{run}"))
    assert tracker.end(run, State.FINISHED)
    assert [text for text in warnings if "s3cr3t" in text] == []
    assert len(warnings) == 1
    assert tracker.client.get_run(run).data.metrics == {"loss": 0.5}
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in kept if b"s3cr3t" in path.read_bytes()] == []
    assert any(path.name.startswith("mlflow.db") for path in kept)


def test_an_mlflow_that_is_away_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING_VARIABLE, "http://u:s3cr3t@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(JobError, match=re.escape("http://u:***@127.0.0.1:1")) as caught:
        Tracker(Home(tmp_path), print)
    assert "s3cr3t" not in masked("".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:/u:s3cr3t@host/db", "s3cr3t", "postgresql://u:a@s3cr3t:c@s3cr3t/db", "oracle://u:s3cr3t@host/db",
        "postgresql://u:s3cr3t@host:s3cr3t/db", "sqlite://u:s3cr3t@host/db",
    ],
)  # fmt: skip
def test_a_wrong_registry_address_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(REGISTRY_VARIABLE, url)
    with pytest.raises(JobError, match="is not a database address") as caught:
        open_registry(Home(tmp_path))
    assert "s3cr3t" not in masked("".join(traceback.format_exception(caught.value)))


def test_a_registry_that_is_away_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REGISTRY_VARIABLE, "postgresql://u:s3cr3t@127.0.0.1:1/db")
    with pytest.raises(LavatarError, match=re.escape("u:***@127.0.0.1:1/db")) as caught:
        open_registry(Home(tmp_path))
    assert "s3cr3t" not in masked("".join(traceback.format_exception(caught.value)))


def test_what_is_handed_to_a_cluster_is_in_a_file_that_only_its_owner_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("UNRELATED", "x")
    (tmp_path / "handed").mkdir(mode=0o755)
    monkeypatch.setenv("LAVATAR_STORE", "s3://bucket/path")
    monkeypatch.setenv(REGISTRY_VARIABLE, "postgresql://u:s3cr3t@host/db")
    told = environment.hand_over(tmp_path, "job1")
    assert told["LAVATAR_STORE"] == "s3://bucket/path"
    assert "s3cr3t" not in json.dumps(told)
    path = Path(told[environment.HANDED_VARIABLE])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["AWS_SECRET_ACCESS_KEY"] == "s3cr3t"
    assert "UNRELATED" not in path.read_text()
    assert "LAVATAR_STORE" not in path.read_text()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    monkeypatch.setenv(environment.HANDED_VARIABLE, str(path))
    environment.take_over()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "s3cr3t"
    assert not path.exists(), "the driver has it: nobody else needs it"
    assert environment.HANDED_VARIABLE not in os.environ


def test_files_of_killed_drivers_and_of_jobs_that_never_began_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    own, waiting = (Path(environment.hand_over(tmp_path, job)[environment.HANDED_VARIABLE]) for job in ("", "job1"))
    dead = own.with_name(own.name.replace(str(os.getpid()), "99999999"))
    dead.write_text("{}")
    environment.hand_over(tmp_path)
    assert sorted(own.parent.iterdir()) == sorted([own, waiting])
    os.utime(waiting, (0, 0))
    environment.hand_over(tmp_path)
    assert list(own.parent.iterdir()) == [own]


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_ACCESS_KEY_ID", "AKIA", True), ("AWS_SECRET_ACCESS_KEY", "x", True), ("AWS_SESSION_TOKEN", "x", True),
        ("MLFLOW_TRACKING_PASSWORD", "x", True), ("MLFLOW_TRACKING_TOKEN", "x", True), ("PGPASSWORD", "x", True),
        ("LAVATAR_REGISTRY", "postgresql://u:p@h/d", True), ("LAVATAR_STORE_OPTIONS", '{"secret": "x"}', True),
        ("LAVATAR_REGISTRY", "postgresql://u@h/d", False), ("MLFLOW_TRACKING_URI", "http://host:5000", False),
        ("AWS_DEFAULT_REGION", "eu-1", False), ("LAVATAR_WEIGHTS", "/weights", False), ("PGHOST", "h", False),
    ],
)  # fmt: skip
def test_what_is_a_secret(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_without_a_secret_there_is_no_file_and_without_the_file_a_machines_own_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(environment.HANDED)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LAVATAR_WEIGHTS", "/weights")
    assert environment.hand_over(tmp_path) == {"LAVATAR_WEIGHTS": "/weights"}
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the machine")
    monkeypatch.setenv(environment.HANDED_VARIABLE, str(tmp_path / "handed" / "x.json"))
    environment.take_over()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "of the machine"
    assert "is not on this machine" in capsys.readouterr().err
