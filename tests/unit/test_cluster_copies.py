"""What a node keeps of a stored result is damaged on its disk: it is named, and the store's copy takes its place."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavatar.cluster.bodies import BODIES, Context, run_body
from lavatar.cluster.copies import there
from lavatar.cluster.results import write_result
from lavatar.cluster.store import Store, open_store
from lavatar.contracts import Event, StageKind, StageResult, StageSpec
from lavatar.datasets import shards
from lavatar.datasets.preprocess import WORK
from lavatar.errors import ObjectError

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import flip_bytes, make_dataset
from repair_files import flip_byte, write_model

DATA, AVATAR = "d" * 64, "a" * 64
TAR, MEMBER = "shard-00001.tar", "00000009.image.jpg"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the store."""
    monkeypatch.setenv("LAVATAR_STORE", (tmp_path / "store").as_uri())
    return tmp_path / "store"


def store_of(home: Path) -> Store:
    store = open_store(home)
    assert store is not None
    return store


def data_spec(home: Path) -> StageSpec:
    return StageSpec(StageKind.PREPROCESS, "preprocess:anna", DATA, home, home / "shards" / DATA, {}, {})


def avatar_spec(home: Path) -> StageSpec:
    inputs = {"dataset": data_spec(home).out_dir}
    return StageSpec(StageKind.AVATAR, "avatar:anna", AVATAR, home, home / "checkpoints" / AVATAR, inputs, {})


def made(home: Path) -> StageSpec:
    """A finished dataset of three tars."""
    spec = data_spec(home)
    spec.out_dir.mkdir(parents=True)
    make_dataset(spec.out_dir)
    write_result(spec, StageResult({"manifest": spec.out_dir / "manifest.json"}))
    return spec


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A dataset that one node stored and another one has fetched: its folder there."""
    spec, store = made(tmp_path / "one"), store_of(tmp_path / "one")
    store.publish(spec)
    store.finish(spec)
    there = data_spec(tmp_path / "two").out_dir
    assert store_of(tmp_path / "two").fetch(there) > 0
    return there


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Number and content of each."""
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def _flip(folder: Path) -> None:
    flip_bytes(folder / TAR, MEMBER, 1)


def _cut(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-100])


def _remove(folder: Path) -> None:
    (folder / TAR).unlink()


@pytest.mark.parametrize(
    ("harm", "name", "words"),
    [(_flip, TAR, f"{TAR} has SHA-256"), (_remove, TAR, f"{TAR} is missing"), (_cut, "manifest.json", "is damaged")],
)
def test_the_damaged_file_alone_is_fetched(
    copy: Path, tmp_path: Path, harm: Callable[[Path], None], name: str, words: str
) -> None:
    before, told = files(copy), []
    harm(copy)
    assert not there(copy)
    store = store_of(tmp_path / "two")
    assert store.fetch(copy, told.append) == len(before[name][1])
    (text,) = told
    assert words in text
    assert text.endswith("the store's copy takes its place")
    after = files(copy)
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    assert {n for n, (number, _) in after.items() if number == before[n][0]} == set(before) - {name}
    assert store.fetch(copy, told.append) == 0
    assert [path.name for path in copy.parent.iterdir()] == [DATA], "nothing half fetched stays"


def test_a_stage_that_meets_it_says_so_and_goes_on(copy: Path, tmp_path: Path) -> None:
    """By what every stage does before its own work; the stage itself looks through the tars once more."""
    _flip(copy)
    seen: list[Event] = []

    class Sink:
        def emit(self, event: Event) -> None:
            seen.append(event)

    def train(plan: Any) -> dict[str, Any]:
        shards.require_whole(copy)
        write_model(spec.out_dir / "release")
        return {"loss": 0.5}

    spec = avatar_spec(tmp_path / "two")
    context = Context(Sink(), lambda: False, None, map, train)  # type: ignore[arg-type]
    assert run_body(spec, context).metrics == {"loss": 0.5}
    warned, fetched = seen
    assert (warned.stage, warned.level) == ("avatar:anna", "warning")
    assert f"{TAR} has SHA-256" in warned.text
    assert "MB fetched from the store: dataset" in fetched.text


def test_a_damaged_release_is_named_and_fetched(tmp_path: Path) -> None:
    spec, store = avatar_spec(tmp_path / "one"), store_of(tmp_path / "one")
    write_model(spec.out_dir / "release")
    write_result(spec, StageResult({"release": spec.out_dir / "release"}))
    store.publish(spec)
    store.finish(spec)
    weights = spec.out_dir / "release" / "model.safetensors"
    whole, told = weights.read_bytes(), []
    flip_byte(weights)
    assert store.fetch(weights.parent, told.append) == len(whole)
    assert weights.read_bytes() == whole
    assert "release: the weights do not have the checksum" in told[0]


def test_what_was_stored_with_the_damage_is_finished_no_more(tmp_path: Path) -> None:
    spec, store = made(tmp_path / "one"), store_of(tmp_path / "one")
    _flip(spec.out_dir)
    store.publish(spec)
    store.finish(spec)
    assert store.finished([DATA]) == {DATA}
    with pytest.raises(ObjectError, match="with the same damage"):
        store.fetch(spec.out_dir, print)
    assert store.finished([DATA]) == set()


def test_a_damaged_dataset_is_not_stored_but_made_again(tmp_path: Path, folder: Path) -> None:
    """It was finished before there was a store. What is whole of it is taken up."""
    spec, seen = made(tmp_path / "one"), []
    _flip(spec.out_dir)
    kept = shutil.copytree(spec.out_dir, tmp_path / "damaged")

    class Sink:
        def emit(self, event: Event) -> None:
            seen.append(event.text)

    def again(spec: StageSpec, context: Context) -> StageResult:
        work = spec.out_dir / WORK
        assert sorted(path.name for path in work.glob("*.tar")) == ["shard-00000.tar", "shard-00002.tar"]
        shutil.rmtree(work)
        make_dataset(spec.out_dir)
        return StageResult({"manifest": spec.out_dir / "manifest.json"}, {"made": 1})

    context = Context(Sink(), lambda: False, None, map, BODIES.get)  # type: ignore[arg-type]
    assert run_body(spec, context, {StageKind.PREPROCESS: again}).metrics == {"made": 1}
    assert [f"{TAR} has SHA-256" in text and text.endswith("it is made again") for text in seen] == [True]
    stored = folder / "stages" / DATA / "files" / TAR
    assert stored.read_bytes() == (spec.out_dir / TAR).read_bytes() != (kept / TAR).read_bytes()
    assert json.loads((folder / "stages" / DATA / "result.json").read_text())["metrics"] == {"made": 1}
