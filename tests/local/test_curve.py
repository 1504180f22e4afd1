"""benchmarks/curve.py: an avatar and a pair trained for seconds, looked at on the way, their pictures kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import curve

from lavatar.configs.recipe import load_recipe
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets.preprocess import preprocess

ROOT = Path(__file__).parents[2]
SIZES = [
    "preprocess.tracker=synthetic", "preprocess.matting=alpha", "preprocess.synthetic_frames=40",
    "preprocess.portrait_size=64", "preprocess.face_size=64", "avatar.face_size=64", "avatar.image_size=64",
    "avatar.ray_size=16", "avatar.samples=4", "avatar.triplane_size=16", "ynet_training.batch_size=4",
    "mapping_training.steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed, name in enumerate(("ada", "ben"), 1):
        folders.append(tmp_path_factory.mktemp(name) / "shards")
        source, config = VideoSource(name, synthetic_seed=seed), load_recipe("tiny", SIZES).preprocess
        preprocess(source, config, folders[-1], parallel=map, events=NullSink(), stage=name)  # type: ignore[arg-type]
    return folders


@pytest.mark.parametrize("stop", [[], ["--stop"]], ids=["steps by timing", "cut off"])
def test_a_curve_of_seconds(datasets: list[Path], tmp_path: Path, stop: list[str]) -> None:
    sets = [word for text in SIZES for word in ("--set", text)]
    command = [sys.executable, str(ROOT / "benchmarks" / "curve.py"), str(datasets[0]), "--actor", str(datasets[1])]
    command += ["--recipe", "tiny", "--minutes", "0.05", "--pair-minutes", "0.02", "--first-look", "1", *stop, *sets]
    command += ["--look-frames", "2", "--look-steps", "3", "--frames", "3", "-o", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "tiny.json").read_text())
    rows = result["rows"]
    assert rows[0]["steps"] == 3
    assert [row["steps"] for row in rows] == sorted({row["steps"] for row in rows}), "no look twice"
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert rows[-1]["seconds"] < 12, "about three seconds were allowed"
    assert all(5 < row["psnr"] < 60 for row in [*rows, result["self"]])
    for name in ("self", "cross"):
        with tarfile.open(tmp_path / f"tiny-{name}.tar") as tar:
            assert len(tar.getnames()) == 3
    assert not list(tmp_path.glob(".tiny/avatar/avatar")), "its checkpoints are not kept"


def test_a_look_that_is_due_at_the_last_step_is_not_taken_twice() -> None:
    figures = {"psnr": 1.0, "ssim": 0.0, "lpips": None, "face": {"psnr": 1.0, "lpips": None}}
    looks: list[Any] = []
    look = SimpleNamespace(figures=lambda task: looks.append(task) or figures)
    watched = curve.Watched(SimpleNamespace(), look, first=1e6, steps={2, 3})  # type: ignore[arg-type]
    for done in (1, 2, 3):
        watched.measure(done)
    watched.add(watched.done)
    assert [row["steps"] for row in watched.rows] == [2, 3]
    watched.add(4)
    assert (len(looks), watched.rows[-1]["steps"]) == (3, 4)
