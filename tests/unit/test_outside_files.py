"""Files and pictures that lavatar reads back: pages, records of Rays, sweeps, values that wait, baselines, and what is
sent to a served model. What is in them is used, or refused by a LavatarError or as their readers say."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from inference_files import FACE, RECIPE, make_avatar_release
from outside import JSON, changed, damaged, only_our_errors

from lavatar.cluster import head, node, session
from lavatar.contracts import StageKind
from lavatar.errors import DataError
from lavatar.inference.cards import Card, draw_card, read_cards
from lavatar.inference.loading import load_avatar
from lavatar.inference.reenact import self_codes
from lavatar.platform import sweeps
from lavatar.platform.portraits import portraits
from lavatar.platform.sink import read_values
from lavatar.platform.speed import table

SIDE = RECIPE.avatar.image_size
DEEP = b"[" * 100_000
HUGE = 10**400


def texts_of(good: Any) -> st.SearchStrategy[bytes]:
    """A JSON file as it should be, with another value somewhere or with damage, and what is none."""
    whole = json.dumps(good).encode()
    return changed(good).map(lambda value: json.dumps(value).encode()) | damaged(whole) | st.binary(max_size=40)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A model as the registry serves it, with or without its recipe; nobody's face is in any picture."""
    folder = tmp_path_factory.mktemp("served")
    avatar = load_avatar(make_avatar_release(folder / "avatar"))

    def call(pictures: Any, about: str | None = None) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lavatar.platform.portraits._recipe", lambda path: RECIPE)
            blind = SimpleNamespace(track=lambda rgb, when: None, close=lambda: None)
            patch.setattr("lavatar.datasets.driver.open_tracker", lambda name: blind)
            return portraits(avatar, lambda faces: self_codes(avatar, faces), pictures, about)

    return call


SIDES = st.sampled_from([0, 1, 2, 3, FACE - 1, FACE, 2 * FACE])
ARRAYS = st.builds(
    lambda shape, kind: np.zeros(shape, kind),
    st.tuples(st.integers(0, 3), SIDES, SIDES, st.sampled_from([3, 3, 3, 1, 4])) | st.lists(SIDES, max_size=3),
    st.sampled_from(["uint8", "uint8", "uint8", "float32", "int64", "bool", "U3", "object", "complex64"]),
)


@settings(max_examples=40)
@given(pictures=ARRAYS | JSON, about=st.sampled_from([None, "about.json"]))
@example(pictures=[[1], [1, 2]], about=None)
@example(pictures=np.zeros((1, 0, 0, 3), np.uint8), about=None)
@example(pictures=np.zeros((1, 0, 5, 3), np.uint8), about="about.json")
@example(pictures=np.zeros((1, 1, 1, 3), np.uint8), about=None)
@example(pictures=np.zeros((2, FACE, FACE, 3), np.uint8), about="about.json")
def test_any_pictures_sent_to_a_served_model_are_drawn_or_refused(
    served: Callable[..., Any], pictures: Any, about: str | None
) -> None:
    told = None
    try:
        with only_our_errors():
            drawn = served(pictures, about)
            assert (drawn.dtype, drawn.shape) == (np.uint8, (len(pictures), SIDE, SIDE, 3))
    except ValueError as error:
        told = str(error)
    assert told is None or told.startswith("the model takes uint8 RGB pictures")


MARKUP = ("<", "![", "!", "?", "/", "div class=frame>", ">", "img src=", "h2>", "&", "#", "]]", "x")
PAGE = str(
    draw_card(Card("Self", "best", [("a", "data:image/png;base64,AAAA"), ("b<", "data:image/jpeg;base64,BB==")], "x"))
)
ADDRESS = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+")


@given(
    page=damaged(PAGE.encode()).map(lambda text: text.decode("utf-8", "replace"))
    | st.text()
    | st.lists(
        st.sampled_from(["<", "![", "!", "?", "/", "div class=frame", ">", "img src=", "h2", "&", "#x", "]]", "x"])
    )
    .map("".join)
    .map(lambda text: PAGE + text + PAGE)
)
@example(page="<![x[y]]>")
@example(page="<![")
@example(page="<!x [ <!")
@example(page="&#" + "9" * 5000 + ";")
@example(page="<div class=frame>" * 5000 + PAGE)
def test_any_page_of_an_evaluation_gives_pictures_and_text_alone(page: str) -> None:
    for card in read_cards(page):
        assert card.pictures
        assert all(ADDRESS.fullmatch(address) for _, address in card.pictures)
        assert {type(text) for text in (card.section, card.kind, card.text)} == {str}


@given(
    text=texts_of({"address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:2", "host": "127.0.0.1"}),
    here=st.booleans(),
)
@example(text=DEEP, here=True)
@example(text=b'{"address": 1, "dashboard": 2, "host": 3}', here=True)
@example(text=b'{"address": 1, "dashboard": 2, "host": 3}', here=False)
@example(text=b'{"address": "a", "dashboard": "http://[", "host": "h"}', here=False)
def test_any_record_of_a_cluster_is_one_or_none(tmp_path: Path, text: bytes, here: bool) -> None:
    """Whether its head runs here or answers elsewhere."""

    def answer(request: Any, *_: Any, **__: Any) -> Any:
        raise urllib.error.HTTPError(request, 401, "none", {}, None)  # type: ignore[arg-type]

    session.shared_of(tmp_path).mkdir(exist_ok=True)
    (session.shared_of(tmp_path) / head.RECORD).write_bytes(text)
    with pytest.MonkeyPatch.context() as patch, only_our_errors():
        patch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        patch.setattr(node, "has_head", lambda home: here)
        patch.setattr(head._DIRECT, "open", answer)
        found = head.current(tmp_path)
        assert found is None or {type(part) for part in (found.address, found.dashboard, found.host)} == {str}


@pytest.fixture
def rays(tmp_path: Path) -> Iterator[Path]:
    """A home with the folder in which Rays have their records; it may lie under the system's temporary one."""
    folder = session.private_folder(tmp_path)
    yield tmp_path
    shutil.rmtree(folder)


@given(text=texts_of({"pid": os.getpid(), "address": "x", "dashboard": "http://127.0.0.1:2"}))
@example(text=DEEP)
@example(text=json.dumps({"pid": HUGE}).encode())
@example(text=b'{"pid": 1e400}')
@example(text=json.dumps({"pid": os.getpid(), "dashboard": 3}).encode())
def test_any_record_of_a_ray_is_an_address_or_none(rays: Path, text: bytes) -> None:
    (session.root_of(rays) / f"session-{os.getpid()}.json").write_bytes(text)
    with only_our_errors():
        assert all(address is None or isinstance(address, str) for address in session.running(rays))


SWEEP = {
    "format": 1, "created": 1.0, "avatar": "ann", "actor": None, "digests": ["d"], "recipe": "tiny", "overrides": [],
    "space": {"avatar.samples": {"choice": [4, 6]}}, "points": [{"avatar.samples": 4}], "trials": 1,
    "scheduler": "asha", "search": "random", "metric": "lpips", "mode": "min", "length": 10, "every": 5,
}  # fmt: skip


def test_the_definition_that_is_changed_below_is_one(tmp_path: Path) -> None:
    (tmp_path / sweeps.DEFINITION).write_text(json.dumps(SWEEP))
    found = sweeps.read(tmp_path)
    assert (found.kind, found.trials, sweeps.created(tmp_path)) == (StageKind.AVATAR, 1, 1.0)


@given(text=texts_of(SWEEP))
@example(text=DEEP)
@example(text=json.dumps({**SWEEP, "created": HUGE, "length": HUGE}).encode())
def test_any_definition_of_a_sweep_is_read_or_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / sweeps.DEFINITION).write_bytes(text)
    with only_our_errors():
        found = sweeps.read(tmp_path)
        assert isinstance(found.trials, int)
        assert isinstance(found.space, dict)
    assert isinstance(sweeps.created(tmp_path), float)


TRIALS = {"run_id": "r", "trials": {"a": {"number": 1, "state": "finished", "params": {"x": 1}, "reports": []}}}


@given(text=texts_of(TRIALS))
@example(text=DEEP)
@example(text=b'{"run_id": null, "trials": {"a": "text"}}')
def test_any_trials_of_a_sweep_are_read_or_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / sweeps.TRIALS).write_bytes(text)
    try:
        found = sweeps.read_trials(tmp_path)
    except DataError:
        return
    for row in found["trials"].values():
        assert {"number", "state", "params", "reports"} <= set(row)


VALUES = [["avatar/total", 0.5, 1_700_000_000_000, 10], ["avatar/lr", 1e-3, 1_700_000_000_001, 10]]


@given(
    lines=st.lists(changed(VALUES[0]).map(json.dumps) | st.just(json.dumps(VALUES[1])), max_size=3).map(
        lambda lines: "\n".join(lines).encode()
    )
    | damaged("\n".join(map(json.dumps, VALUES)).encode())
    | st.binary(max_size=40)
)
@example(lines=DEEP)
@example(lines=json.dumps(["n", HUGE, HUGE, 1]).encode())
@example(lines=b'["n", 1, 1e400, 1]')
def test_any_values_that_wait_for_mlflow_are_read_or_left(tmp_path: Path, lines: bytes) -> None:
    file = tmp_path / "unsent"
    file.write_bytes(lines)
    found = read_values(file)
    assert all(tuple(map(type, value)) == (str, float, int, int) for value in found)


AT = SimpleNamespace(device=torch.device("cpu"), full=False)
BASELINE = {"of": table.shapes(AT), "machine": "m", "ratios": {"loader": 2.0, "cli": 1.5}}  # type: ignore[arg-type]


@given(text=texts_of(BASELINE))
@example(text=DEEP)
@example(text=json.dumps({**BASELINE, "ratios": {"loader": HUGE}}).encode())
def test_any_baseline_is_read_or_refused(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "baseline.json"
    file.write_bytes(text)
    with only_our_errors():
        ratios = table.read_baseline(file, AT)  # type: ignore[arg-type]
        assert {(type(row), type(value)) for row, value in ratios.items()} <= {(str, float)}
