"""A pair from a job of toy size into a home that has nothing else: reenact, MLflow in a process of its own, HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from submit_files import LIMIT, TOY, Lavatar
from video_files import write_drawn_head

from lavatar.datasets.video import read_frames
from lavatar.platform.commands import ui
from lavatar.platform.home import Home

PAIR = "lavatar-pair-ann-bob"
SIZE = TOY["avatar.image_size"]


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


def clean(home: Path) -> dict[str, str]:
    """The environment of somebody who knows of MLflow alone."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LAVATAR_HOME", "MLFLOW_"))}
    return {**ours, "MLFLOW_TRACKING_URI": Home(home).tracking_uri, "OMP_NUM_THREADS": "1"}


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


SCRIPT = """
import sys, mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2])))
"""


@pytest.mark.slow
def test_mlflow_loads_and_predicts_in_a_process_that_knows_nothing_else(
    undisturbed_home: Lavatar, elsewhere: Lavatar, weights: Path, tmp_path: Path
) -> None:
    _, frames = write_drawn_head(tmp_path / "driver.mp4", 12)
    np.save(tmp_path / "in.npy", frames)
    drawn = []
    for lavatar, alias in ((undisturbed_home, "champion"), (elsewhere, "champion"), (elsewhere, "latest")):
        out = tmp_path / f"{len(drawn)}.npy"
        words = (f"models:/{PAIR}@{alias}", str(tmp_path / "in.npy"), str(out))
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *words], env=clean(lavatar.home), cwd=tmp_path, capture_output=True,
            text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        drawn.append(np.load(out))
    assert (drawn[0].shape, drawn[0].dtype) == ((len(frames), SIZE, SIZE, 3), np.uint8)
    assert drawn[0].std() > 1
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


@contextmanager
def served(home: Path, model: str, folder: Path) -> Iterator[str]:
    """`mlflow models serve` of a model; its address."""
    port = ui._free_port(5400)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)], env=clean(home), cwd=folder, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + LIMIT
            while not _answers(f"http://127.0.0.1:{port}/ping"):
                assert process.poll() is None, (folder / "serve.log").read_text()
                assert time.monotonic() < deadline, (folder / "serve.log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            ui._stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_mlflow_serves_it_over_http(elsewhere: Lavatar, weights: Path, tmp_path: Path) -> None:
    """A whole frame, face crops, and what it cannot use."""
    _, frames = write_drawn_head(tmp_path / "driver.mp4", 2)
    faces = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    with served(elsewhere.home, f"models:/{PAIR}@champion", tmp_path) as url:
        for pictures in (frames[:1], faces):
            status, answer = _post(url, {"inputs": pictures.tolist()})
            assert status == 200, answer
            portraits = np.asarray(answer["predictions"])
            assert portraits.shape == (len(pictures), SIZE, SIZE, 3)
            assert (portraits.min() >= 0, portraits.max() <= 255, portraits.std() > 1) == (True, True, True)
        status, answer = _post(url, {"inputs": np.zeros((1, 80, 90, 3), np.uint8).tolist()})
        assert status == 400
        assert "no face was found" in answer
        status, answer = _post(url, {"inputs": [[1, 2], [3, 4]]})
        assert (status, "does not match expected shape (-1, -1, -1, 3)" in answer) == (400, True)
