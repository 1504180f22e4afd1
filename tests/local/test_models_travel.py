"""A pair from a job of toy size into a home that has nothing else: reenact, MLflow in a process of its own, HTTP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from serve_files import post, predicted, served
from submit_files import TOY, Lavatar
from video_files import write_drawn_head

from lavatar.datasets.video import read_frames
from lavatar.platform.home import Home

PAIR = "lavatar-pair-ann-bob"
SIZE = TOY["avatar.image_size"]


@pytest.fixture(autouse=True)
def of_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are looked up in the homes' MLflow: one that was used in this process before stays in its environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def elsewhere(undisturbed_home: Lavatar, tmp_path_factory: pytest.TempPathFactory) -> Lavatar:
    """A home with nothing but the pair, from a file that another home wrote."""
    folder = tmp_path_factory.mktemp("elsewhere")
    code, out = undisturbed_home("models", "export", PAIR, "-o", str(folder / "pair.tar"), "--json")
    assert code == 0, undisturbed_home.errors()
    sha256 = json.loads(out)["sha256"]
    other = Lavatar(folder / "home", environment={"OMP_NUM_THREADS": "1"})
    code, out = other("models", "import", str(folder / "pair.tar"), "--json")
    assert code == 0, other.errors()
    assert json.loads(out) == {
        "model": PAIR, "version": 1, "avatar": "ann", "actor": "bob", "new": True, "sha256": sha256,
    }  # fmt: skip
    return other


@pytest.mark.slow
def test_reenact_gives_the_same_pixels_in_both_homes(
    undisturbed_home: Lavatar, elsewhere: Lavatar, weights: Path, tmp_path: Path
) -> None:
    video, frames = write_drawn_head(tmp_path / "driver.mp4", 12)
    drawn = []
    for number, lavatar in enumerate((undisturbed_home, elsewhere)):
        out = tmp_path / f"{number}.mp4"
        code, _ = lavatar("reenact", "--avatar", "ann", "--actor", "bob", "--video", str(video), "-o", str(out))
        assert code == 0, lavatar.errors()
        drawn.append(np.stack([rgb for _, _, rgb in read_frames(out)]))
    assert drawn[0].shape == (len(frames), SIZE, SIZE, 3)
    assert drawn[0].std() > 1
    assert (drawn[0] == drawn[1]).all()


@pytest.mark.slow
def test_mlflow_loads_and_predicts_in_a_process_that_knows_nothing_else(
    undisturbed_home: Lavatar, elsewhere: Lavatar, weights: Path, tmp_path: Path
) -> None:
    _, frames = write_drawn_head(tmp_path / "driver.mp4", 12)
    drawn = []
    for lavatar, alias in ((undisturbed_home, "champion"), (elsewhere, "champion"), (elsewhere, "latest")):
        uri = Home(lavatar.home).tracking_uri
        drawn.append(predicted(uri, f"models:/{PAIR}@{alias}", frames, tmp_path))
    assert (drawn[0].shape, drawn[0].dtype) == ((len(frames), SIZE, SIZE, 3), np.uint8)
    assert drawn[0].std() > 1
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


@pytest.mark.slow
def test_mlflow_serves_it_over_http(elsewhere: Lavatar, weights: Path, tmp_path: Path) -> None:
    """A whole frame, face crops, and what it cannot use."""
    _, frames = write_drawn_head(tmp_path / "driver.mp4", 2)
    faces = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    with served(Home(elsewhere.home).tracking_uri, f"models:/{PAIR}@champion", tmp_path) as url:
        for pictures in (frames[:1], faces):
            status, answer = post(url, {"inputs": pictures.tolist()})
            assert status == 200, answer
            portraits = np.asarray(answer["predictions"])
            assert portraits.shape == (len(pictures), SIZE, SIZE, 3)
            assert (portraits.min() >= 0, portraits.max() <= 255, portraits.std() > 1) == (True, True, True)
        status, answer = post(url, {"inputs": np.zeros((1, 80, 90, 3), np.uint8).tolist()})
        assert status == 400
        assert "no face was found" in answer
        status, answer = post(url, {"inputs": [[1, 2], [3, 4]]})
        assert (status, "does not match expected shape (-1, -1, -1, 3)" in answer) == (400, True)
