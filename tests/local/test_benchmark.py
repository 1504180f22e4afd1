"""`lavatar benchmark method` through the real command line, at toy size: trained, stopped, taken up, measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOY = (
    "preprocess.portrait_size=96", "preprocess.synthetic_frames=60", "avatar.image_size=32", "avatar.ray_size=32",
    "avatar.samples=4", "avatar.fine_samples=4", "avatar.field_width=8", "avatar.triplane_size=16",
    "avatar_learning.ray_batch=64", "avatar_training.checkpoint_every=5", "avatar_training.picture_every=1000",
)  # fmt: skip
SMALL = "avatar.encoder_widths=[4,8];avatar.superresolution_capacity=2"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lavatar.platform.cli", *arguments]


def benchmark(folder: Path, steps: int, *more: str) -> list[str]:
    sets = [part for value in TOY for part in ("--set", value)]
    return command(
        "benchmark", "method", "--pair", "ada:bruna", "--steps", str(steps), "--pair-steps", "4", "--max-frames", "4",
        "--variant", f"ours=tiny:{SMALL}", "-o", str(folder), "--json", *sets, *more,
    )  # fmt: skip


@pytest.fixture
def subjects(home: Path) -> Path:
    for seed, name in enumerate(("ada", "bruna")):
        subprocess.run(command("subjects", "add", "--synthetic", str(seed), name), check=True, capture_output=True)
    return home


@pytest.mark.slow
def test_rows_are_trained_measured_and_not_done_again(subjects: Path, tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "out"
    first = subprocess.Popen(
        benchmark(folder, 4000, "--methods", ""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    shards = subjects / "checkpoints"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(shards.glob("*/avatar/step-*/COMPLETE.json")):
        assert first.poll() is None, first.communicate()[1][-2000:]
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said[-2000:]
    assert not list((folder / "runs").glob("*.json"))

    arguments = benchmark(folder, 6, "--methods", "nerface", "--recipe", "tiny")
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert [row["method"] for row in answer["results"]] == ["nerface", "ours"]
    ours = answer["results"][1]
    assert ours["training"]["avatar"]["avatar"]["steps"] == 6
    assert ours["training"]["pair"]["ynet"]["steps"] == 4
    assert ours["metrics"]["self"]["psnr"] > 5
    assert ours["metrics"]["cross"]["truth"]["psnr"] > 5
    assert "| ours |" in (folder / "table.md").read_text()
    assert (folder / "sheet.png").stat().st_size > 1000

    began = time.monotonic()
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout) == answer
    assert again.stderr.count("measured before") == 2
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pair", "ada:bruna", "--methods", "latentavatr", "--steps", "5"), "no method 'latentavatr'"),
        (("--pair", "ada", "--steps", "5"), "names no two subjects"),
        (("--pair", "ada:bruna"), "no budget is given"),
        (("--pair", "ada:bruna", "--steps", "5", "--seeds", "0,x"), "no whole numbers"),
        (("--pair", "nobody:bruna", "--steps", "5"), "nobody"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(home: Path, arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(command("benchmark", "method", *arguments), capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert not (home / "outputs" / "benchmark").exists()
