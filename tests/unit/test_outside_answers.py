"""What the store and Ray's dashboard answer: used, or refused by one of our errors, and no file made outside."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from outside import JSON, changed, damaged, only_our_errors

from lavatar.cluster import head
from lavatar.cluster.shelf import Shelf
from lavatar.cluster.store import Store, open_store
from lavatar.configs.recipe import load_recipe
from lavatar.contracts import NullSink, StageKind, StageSpec
from lavatar.platform import champions, recorded, stale
from lavatar.platform.catalogue import Version
from lavatar.platform.jsonable import mapping
from lavatar.platform.leases import marked_alive

KEY = "a" * 64
FILE = b"what a stage left"
SUM = hashlib.sha256(FILE).hexdigest()
INDEX = {"files": {"release/config.json": {"sha256": SUM, "bytes": len(FILE)}}}
TEXT = st.text() | st.text("step-0123456789²٣_+ ./\0", max_size=20)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("LAVATAR_STORE", "memory://answers")
    monkeypatch.setattr("lavatar.cluster.objects.READS", 1)
    opened = open_store(tmp_path / "home")
    assert opened is not None
    opened.objects.write(f"stages/{KEY}/files/release/config.json", FILE)
    yield opened
    opened.objects.remove("stages")


@given(answer=changed(INDEX).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(INDEX).encode()))
@example(answer=b'{"files": {"release/x": {"sha256": "0", "bytes": 1e400}}}')
@example(answer=b"[" * 100_000)
@example(answer=b'{"files": {"release/a\\u0000b": {"sha256": "0", "bytes": 1}}}')
@example(answer=b'{"files": {"release/../../../x": {"sha256": "0", "bytes": 1}}}')
def test_any_index_of_the_store_is_followed_or_refused(store: Store, tmp_path: Path, answer: bytes) -> None:
    store.objects.write(f"stages/{KEY}/index.json", answer)
    with only_our_errors():
        store.fetch(tmp_path / "home" / "checkpoints" / KEY / "release")
    assert isinstance(store.size_of(KEY), int)
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


@given(
    answer=changed(INDEX).map(lambda value: json.dumps(value).encode()) | st.binary(),
    names=st.lists(TEXT, max_size=3),
)
@example(answer=b'{"files": {"x": {"sha256": "0", "bytes": 1e400}}}', names=["step-²"])
@example(answer=b"[" * 100_000, names=["step-" + "9" * 5000])
def test_any_checkpoint_in_the_store_is_taken_or_skipped(
    store: Store, tmp_path: Path, answer: bytes, names: list[str]
) -> None:
    """Its marker, and what lies beside it."""
    home = tmp_path / "home"
    spec = StageSpec(StageKind.AVATAR, "avatar:a", KEY, home, home / "checkpoints" / KEY, {}, {})
    place, folder = f"stages/{KEY}/checkpoints/avatar", spec.out_dir / "avatar"
    store.objects.remove(place)
    for name in ("step-00000010", *(name for name in names if name.strip("/.") and "\0" not in name)):
        store.objects.write(f"{place}/{name}/COMPLETE.json", answer)
    Shelf(spec, NullSink())._restore(store, folder)
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


def _answered(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(request: urllib.request.Request, *_: Any, **__: Any) -> Any:
        if str(request.full_url).endswith("/api/jobs/x-2"):
            raise urllib.error.HTTPError(request.full_url, 404, "none", {}, io.BytesIO(b""))  # type: ignore[arg-type]
        return io.BytesIO(value)

    monkeypatch.setattr(head._DIRECT, "open", open_)


@given(
    answer=st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | changed({"data": {"result": {"result": [{"node_ip": "1", "state": "ALIVE"}]}}, "status": "X"}).map(
        lambda value: json.dumps(value).encode()
    )
)
@example(answer=b"[" * 100_000)
@example(answer=b'{"data": {"result": {"result": [{"node_ip": 1, "state": "ALIVE", "resources_total": 3}]}}}')
def test_any_answer_of_the_dashboard_is_understood_or_refused(tmp_path: Path, answer: bytes) -> None:
    cluster = head.Head("127.0.0.1:1", "http://127.0.0.1:2", "127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        _answered(answer, patch)
        with only_our_errors():
            for node in head.nodes(tmp_path, cluster):
                assert isinstance(node["resources"], dict)
        with only_our_errors():
            assert all(isinstance(one.status, str) for one in head.submissions(tmp_path, cluster, "x"))
        with only_our_errors():
            head.submit(tmp_path, cluster, "x", "true", {})


@given(TEXT.map(lambda text: f"{text}|{text}|{text}") | st.text())
@example("h|²|1")
def test_any_owner_in_a_tag_is_known_or_not(tag: str) -> None:
    assert marked_alive(tag) in (True, False, None)


@given(st.text() | st.sampled_from(["s3://", "s3:///x", "file://", "memory://", "x://y", "://", "s3://["]))
def test_any_address_of_a_store_is_opened_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch, only_our_errors():
        assume("\0" not in text and text.isprintable())  # else it can be no variable of the environment
        patch.setenv("LAVATAR_STORE", text)
        open_store(tmp_path_factory.getbasetemp())


@given(text=JSON.map(json.dumps) | st.text() | st.binary() | st.none())
@example(text="[" * 100_000)
def test_any_text_of_mlflow_is_a_mapping_or_none(text: Any) -> None:
    found = mapping(text)
    assert isinstance(found, dict)
    dataset = SimpleNamespace(profile=text, digest="d" * 8)
    assert isinstance(recorded._digest(dataset), str)


@given(text=TEXT | st.lists(st.integers(0, 30)).map(lambda numbers: ",".join(map(str, numbers))))
@example(text="1,²,3")
@example(text="9" * 5000)
def test_any_list_of_champions_is_read(text: str) -> None:
    past = champions.history({champions.HISTORY_TAG: text}, None)
    assert all(number >= 0 for number in past)
    assert champions.history({champions.HISTORY_TAG: text}, 7)[-1] == 7


@given(text=changed(load_recipe("tiny").model_dump(mode="json")).map(json.dumps) | st.text() | JSON.map(json.dumps))
def test_the_recipe_of_any_version_is_taken_or_refused(text: str) -> None:
    with only_our_errors():
        stale._kept(Version("lavatar-pair-A-B", 1, (), {stale.SECTIONS_TAG: text}, "", "", "", 0.0), ("A", "B"))
