"""Results and checkpoints in a store: S3 (a real server), a folder and memory; two homes stand for two nodes' disks."""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))
import s3_server
import toy_bodies
from cluster_specs import avatar_spec, dataset_spec, run, small_recipe, watch

from lavatar.cluster import objects
from lavatar.cluster.results import read_result
from lavatar.cluster.shelf import Shelf
from lavatar.cluster.stages import StageRunner
from lavatar.cluster.store import Store, open_store
from lavatar.configs.recipe import Recipe
from lavatar.contracts import Event, NullSink, StageKind, StageSpec, VideoSource
from lavatar.errors import ConfigError, DataError, Interrupted, StorageError
from lavatar.inference.loading import load_avatar
from lavatar.training import checkpoint as checkpoints

RECIPE = small_recipe(steps=8, engine="torch")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3]:
    with s3_server.running(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture(autouse=True)
def fresh_clients() -> None:
    """fsspec keeps its clients, with the credentials and the endpoint that they began with."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def in_s3(s3: s3_server.S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The address of a store of the test's own in S3."""
    return _use(monkeypatch, s3.environment, f"s3://{s3_server.BUCKET}/{_name(request)}")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a store on a disk."""
    _use(monkeypatch, {}, f"file://{tmp_path}/store")
    return tmp_path / "store"


@pytest.fixture(params=["s3", "file", "memory"])
def address(request: pytest.FixtureRequest, s3: s3_server.S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    ways = {
        "s3": f"s3://{s3_server.BUCKET}/{_name(request)}",
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{_name(request)}",
    }
    return _use(monkeypatch, s3.environment, ways[request.param])


def _name(request: pytest.FixtureRequest) -> str:
    return hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


def _use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str) -> str:
    for name, value in {**environment, "LAVATAR_STORE": url}.items():
        monkeypatch.setenv(name, value)
    return url


def _store(home: Path) -> Store:
    store = open_store(home)
    assert store is not None
    return store


def _at(spec: StageSpec, home: Path) -> StageSpec:
    """The same stage on another disk."""
    moved = {role: home / folder.relative_to(spec.home) for role, folder in spec.inputs.items()}
    return dataclasses.replace(spec, home=home, out_dir=home / spec.out_dir.relative_to(spec.home), inputs=moved)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageSpec, StageSpec]:
    """A dataset and an avatar of it, made where there was no store."""
    home = tmp_path_factory.mktemp("made")
    with StageRunner(home, backend="inline") as runner:
        data = dataset_spec(home, 1, RECIPE)
        run(runner, data)
        avatar = avatar_spec(home, data.out_dir, RECIPE)
        run(runner, avatar)
    return data, avatar


def _stored(made: tuple[StageSpec, StageSpec], home: Path) -> tuple[StageSpec, StageSpec]:
    """The same on another disk, and stored from there."""
    shutil.copytree(made[0].home, home)
    data, avatar = (_at(spec, home) for spec in made)
    with StageRunner(home, backend="inline", bodies={spec.kind: _refuse for spec in made}) as runner:
        run(runner, data)
        run(runner, avatar)
    return data, avatar


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refuse(spec: StageSpec, context: Any) -> Any:
    raise AssertionError(f"{spec.name} was run again")


def test_another_node_gets_the_same_and_runs_nothing_again(
    address: str, made: tuple[StageSpec, StageSpec], tmp_path: Path
) -> None:
    data, avatar = _stored(made, tmp_path / "one")
    there = _at(avatar, tmp_path / "two")
    with StageRunner(tmp_path / "two", backend="inline", bodies={StageKind.AVATAR: _refuse}) as runner:
        result, _ = run(runner, there)
    kept = read_result(avatar)
    assert kept is not None
    assert result.metrics == kept.metrics
    assert result.artefacts == {"release": there.out_dir / "release"}
    assert not there.out_dir.exists(), "nothing is fetched before it is needed"
    store = _store(tmp_path / "two")
    assert store.fetch(there.inputs["dataset"]) == sum(
        len(content) for name, content in _files(data.out_dir).items() if name != "result.json"
    )
    store.fetch(there.out_dir / "release")
    assert _files(there.inputs["dataset"]) == _files(data.out_dir)
    assert _files(there.out_dir / "release") == _files(avatar.out_dir / "release")
    assert store.fetch(there.inputs["dataset"]) == 0
    assert load_avatar(there.out_dir / "release").subject == "anna"


def test_a_stage_fetches_what_it_needs_and_says_so(
    in_s3: str, made: tuple[StageSpec, StageSpec], tmp_path: Path
) -> None:
    data, avatar = _stored(made, tmp_path / "one")
    changed = RECIPE.model_copy(
        update={"avatar_training": RECIPE.avatar_training.model_copy(update={"learning_rate": 1e-4})}
    )
    there = dataclasses.replace(
        _at(avatar, tmp_path / "two"), key="e" * 64, out_dir=tmp_path / "two" / "checkpoints" / ("e" * 64)
    )
    there = dataclasses.replace(there, recipe=changed.model_dump(mode="json"))
    with StageRunner(tmp_path / "two", backend="inline") as runner:
        _, seen = run(runner, there)
    assert any("MB fetched from the store: dataset" in event.text for event in seen)
    assert not any(path.name.startswith(".") for path in (tmp_path / "two" / "shards").rglob("*"))
    assert _files(there.inputs["dataset"]) == _files(data.out_dir)


def _toy(home: Path, key: str = "f" * 64, name: str = "plain") -> StageSpec:
    """Two toy trainings of 20 steps, a checkpoint every 5."""
    dump = Recipe(name="test").model_dump(mode="json")
    return StageSpec(StageKind.PAIR, f"pair:{name}", key, home, home / "checkpoints" / key, {}, dump)


def _train(home: Path, spec: StageSpec) -> tuple[Any, list[Event]]:
    with StageRunner(home, backend="inline", bodies=toy_bodies.BODIES) as runner:
        return run(runner, spec)


def _stop_at(home: Path, spec: StageSpec, step: int) -> None:
    with StageRunner(home, backend="inline", bodies=toy_bodies.BODIES) as runner:
        handle = runner.start(spec)
        while not any((event.done or 0) >= step for event in handle.poll()):
            assert not handle.done()
        handle.cancel()
        watch(handle)
        with pytest.raises(Interrupted):
            handle.result()


def test_a_training_goes_on_from_the_store_bit_by_bit(address: str, tmp_path: Path) -> None:
    whole = _toy(tmp_path / "whole", "0" * 64)
    _train(tmp_path / "whole", whole)
    first = _toy(tmp_path / "one", name="slow")
    _stop_at(tmp_path / "one", first, 8)
    stopped = checkpoints.latest(first.out_dir / "ynet")[0]
    assert stopped is not None
    shutil.rmtree(tmp_path / "one")
    second = _toy(tmp_path / "two")
    _, seen = _train(tmp_path / "two", second)
    assert any(f"checkpoint of step {int(stopped.name[5:])} fetched" in event.text for event in seen)
    for phase in ("ynet", "mapping"):
        for name in ("modules", "optimizer", "rng", "task"):
            file = Path(phase) / "step-00000020" / f"{name}.safetensors"
            assert (second.out_dir / file).read_bytes() == (whole.out_dir / file).read_bytes()
    store = _store(tmp_path / "two").objects
    kept = store.names(f"stages/{second.key}/checkpoints/ynet")
    assert (len(kept), kept[-1]) == (2, "step-00000020")
    assert not list(tmp_path.rglob(".step-*"))


def test_two_that_need_the_same_fetch_it_once(
    in_s3: str, made: tuple[StageSpec, StageSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = _stored(made, tmp_path / "one")
    fetched: list[str] = []
    get = objects.ObjectStore.get

    def counted(self: objects.ObjectStore, name: str, file: Path) -> None:
        fetched.append(name)
        get(self, name, file)

    monkeypatch.setattr(objects.ObjectStore, "get", counted)
    there = _at(data, tmp_path / "two").out_dir
    threads = [threading.Thread(target=_store(tmp_path / "two").fetch, args=(there,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(set(fetched)) == len(_files(data.out_dir)) - 1
    assert _files(there) == _files(data.out_dir)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone"])
def test_a_damaged_object_is_named_and_not_used(
    in_s3: str, made: tuple[StageSpec, StageSpec], tmp_path: Path, harm: str
) -> None:
    data, _ = _stored(made, tmp_path / "one")
    there = _at(data, tmp_path / "two").out_dir
    files, root = fsspec.core.url_to_fs(in_s3)
    tar = f"{root}/stages/{data.key}/files/00001.tar"
    content = files.cat_file(tar)
    if harm == "gone":
        files.rm(tar)
    else:
        files.pipe_file(tar, content[:-7] if harm == "truncated" else content[:9] + b"!" + content[10:])
    with pytest.raises(DataError, match=r"00001\.tar is (damaged: its SHA-256|missing)") as caught:
        _store(tmp_path / "two").fetch(there)
    assert "Submit again" in caught.value.hint
    assert not list(there.parent.iterdir()), "nothing half fetched stays"
    assert _store(tmp_path / "two").finished([data.key]) == set()
    with StageRunner(tmp_path / "one", backend="inline", bodies={data.kind: _refuse}) as runner:
        run(runner, data)
    _store(tmp_path / "two").fetch(there)
    assert _files(there) == _files(data.out_dir)


def test_a_byte_flipped_on_the_way_is_fetched_again(
    in_s3: str, s3: s3_server.S3, made: tuple[StageSpec, StageSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = _stored(made, tmp_path / "one")
    there = _at(data, tmp_path / "two").out_dir
    proxy = s3_server.Faulty(s3.port, every=0, flip=2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.environment["AWS_ENDPOINT_URL"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    said: list[str] = []
    store = open_store(tmp_path / "two", said.append)
    assert store is not None
    store.fetch(there)
    proxy.close()
    assert proxy.flip == 0
    assert len([text for text in said if "fetched again" in text]) == 2
    assert _files(there) == _files(data.out_dir)


def test_one_request_in_five_fails_and_the_results_are_the_same(
    in_s3: str, s3: s3_server.S3, made: tuple[StageSpec, StageSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _toy(tmp_path / "whole", "0" * 64)
    _train(tmp_path / "whole", whole)
    proxy = s3_server.Faulty(s3.port, seed=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.environment["AWS_ENDPOINT_URL"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    data, avatar = _stored(made, tmp_path / "one")
    spec = _toy(tmp_path / "one")
    _, seen = _train(tmp_path / "one", spec)
    assert [event.text for event in seen if event.level != "info"] == []
    store = _store(tmp_path / "two")
    store.check()
    for folder in (data.out_dir, avatar.out_dir / "release", spec.out_dir / "release"):
        there = tmp_path / "two" / folder.relative_to(tmp_path / "one")
        store.fetch(there)
        assert _files(there) == _files(folder)
    proxy.close()
    assert _files(spec.out_dir / "mapping" / "step-00000020") == _files(whole.out_dir / "mapping" / "step-00000020")
    assert len(proxy.failed) == 5, proxy.failed
    assert sum(proxy.failed.values()) > proxy.requests / 10
    log = "".join(path.read_text() for path in (tmp_path / "one" / "logs").glob("*.log"))
    assert "secret-of-the-tests" not in log


def test_of_a_large_file_only_the_failed_parts_are_sent_again(
    in_s3: str, s3: s3_server.S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 101 MB, which go in parts of 50; one request in three fails."""
    file, back = tmp_path / "large", tmp_path / "back"
    with file.open("wb") as stream:
        stream.truncate(101 * 2**20)
    proxy = s3_server.Faulty(s3.port, every=3, seed=1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.environment["AWS_ENDPOINT_URL"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    said: list[str] = []
    store = open_store(tmp_path, said.append)
    assert store is not None
    store.objects.put(file, "large")
    assert sum(proxy.failed.values()) >= 2, proxy.failed
    assert said == [], "the whole was sent again"
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment["AWS_ENDPOINT_URL"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    _store(tmp_path).objects.get("large", back)
    assert filecmp.cmp(file, back, shallow=False)


def test_the_newest_whole_checkpoint_is_taken(in_folder: Path, tmp_path: Path) -> None:
    spec = _toy(tmp_path / "one", name="slow")
    _stop_at(tmp_path / "one", spec, 11)
    stored = in_folder / "stages" / spec.key / "checkpoints" / "ynet"
    newest = sorted(stored.iterdir())[-1]
    module = newest / "modules.safetensors"
    module.write_bytes(module.read_bytes()[:-1] + b"!")
    unfinished = stored / "step-00000099"
    shutil.copytree(newest, unfinished)
    (unfinished / "COMPLETE.json").unlink()
    shutil.rmtree(tmp_path / "one")
    _, seen = _train(tmp_path / "two", _toy(tmp_path / "two"))
    texts = [event.text for event in seen]
    assert any("in the store is skipped" in text and "modules.safetensors is damaged" in text for text in texts)
    assert any("checkpoint of step 10 fetched" in text for text in texts), texts


class _Rank:
    """An engine's part in agreeing on a checkpoint: this worker is the second, the first one is at step `first`."""

    rank, world = 1, 2

    def __init__(self, first: int) -> None:
        self.first = first

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, tensor: Any) -> list[Any]:
        return [tensor * 0 + self.first, tensor]


def test_workers_on_other_disks_take_up_the_first_one_s_checkpoint(in_folder: Path, tmp_path: Path) -> None:
    spec = _toy(tmp_path / "one", name="slow")
    _stop_at(tmp_path / "one", spec, 11)
    there = _toy(tmp_path / "two")
    folder = there.out_dir / "ynet"
    shutil.copytree(spec.out_dir / "ynet" / "step-00000010", folder / "step-00000090")  # never sent
    first, _ = checkpoints.latest(spec.out_dir / "ynet")
    assert first is not None
    with Shelf(there, NullSink()) as shelf:
        shelf.restore(folder, _Rank(int(first.name[5:])))  # type: ignore[arg-type]
    assert [path.name for path in folder.iterdir()] == [first.name]
    assert _files(folder / first.name) == _files(first)


def test_a_store_that_is_away_stops_no_training_and_gets_all_afterwards(
    in_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_SECONDS", 0.001)
    spec = _toy(tmp_path / "one")
    in_folder.mkdir()
    in_folder.rename(tmp_path / "away")
    in_folder.write_text("not a folder")
    with StageRunner(tmp_path / "one", backend="inline", bodies=toy_bodies.BODIES) as runner:
        handle = runner.start(spec)
        seen = watch(handle)
        with pytest.raises(StorageError, match=r"the store file://.* failed at") as caught:
            handle.result()
    assert "LAVATAR_STORE" in caught.value.hint
    in_folder.unlink()
    _, seen = _train(tmp_path / "one", spec)
    assert seen[-1].done == 40
    assert _store(tmp_path / "one").finished([spec.key, "0" * 64]) == {spec.key}


def test_a_node_without_the_video_fetches_it(address: str, tmp_path: Path) -> None:
    video = tmp_path / "anna.mp4"
    video.write_bytes(bytes(range(256)) * 100)
    source = VideoSource("anna", video, digest=hashlib.sha256(video.read_bytes()).hexdigest())
    store = _store(tmp_path / "two")
    store.keep_video(source)
    store.keep_video(source)
    assert store.fetch_video(source) is source, "it is here"
    seed = VideoSource("drawn", synthetic_seed=1)
    assert store.fetch_video(seed) is seed
    video.rename(tmp_path / "away")
    found = store.fetch_video(source)
    assert found.path == tmp_path / "two" / "videos" / source.digest / "anna.mp4"
    assert found.path.read_bytes() == (tmp_path / "away").read_bytes()
    assert store.fetch_video(source) == found
    with pytest.raises(DataError, match=r"anna\.mp4 is missing") as caught:
        store.fetch_video(dataclasses.replace(source, digest="0" * 64))
    assert f"Put it back at {video}" in caught.value.hint
    assert [path.name for path in (tmp_path / "two" / "videos").iterdir()] == [source.digest]


def test_an_index_cannot_lead_out_of_the_folder(in_folder: Path, tmp_path: Path) -> None:
    spec = _toy(tmp_path / "one")
    index = in_folder / "stages" / spec.key / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"files": {"release/../../../evil": {"sha256": "0", "bytes": 1}}}))
    with pytest.raises(DataError, match="outside of its folder"):
        _store(tmp_path / "one").fetch(spec.out_dir / "release")
    index.write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        _store(tmp_path / "one").fetch(spec.out_dir / "release")
    index.unlink()
    with pytest.raises(DataError, match="neither on this disk nor in the store"):
        _store(tmp_path / "one").fetch(spec.out_dir / "release")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("results", "is not an address"),
        ("/mnt/results", "is not an address"),
        ("s3://key:secret@bucket/x", "holds credentials"),
        ("nowhere://x/y", "Protocol not known"),
    ],
)
def test_an_address_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, text: str
) -> None:
    monkeypatch.setenv("LAVATAR_STORE", url)
    with pytest.raises(ConfigError, match=text) as caught:
        open_store(tmp_path)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_told(s3: s3_server.S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _use(monkeypatch, s3.environment, "s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="no-such-bucket/x cannot be written"):
        _store(tmp_path).check()


def test_missing_credentials_are_told_at_once(
    s3: s3_server.S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _use(monkeypatch, s3.environment, f"s3://{s3_server.BUCKET}/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="Unable to locate credentials") as caught:
        _store(tmp_path).check()
    assert "the credentials in the environment" in caught.value.hint


def test_a_store_that_works_is_left_as_it_was(address: str, tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.check()
    assert store.objects.names("") == []
