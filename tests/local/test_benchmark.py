"""`lavatar benchmark method` through the real command line, at toy size: trained, stopped, taken up, measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavatar.configs.recipe import load_recipe
from lavatar.platform.benchmark import EXPERIMENT
from lavatar.platform.benchmark_budget import affordable
from lavatar.platform.home import Home
from lavatar.platform.tracking import connect

TOY = (
    "preprocess.portrait_size=96", "preprocess.synthetic_frames=60", "avatar.image_size=32", "avatar.ray_size=32",
    "avatar.samples=4", "avatar.fine_samples=4", "avatar.field_width=8", "avatar.triplane_size=16",
    "avatar_learning.ray_batch=64", "avatar_training.checkpoint_every=5", "avatar_training.picture_every=1000",
)  # fmt: skip
NARROW = (
    "ynet.encoder_widths=[4,8]", "ynet.neck_width=8", "ynet.decoder_widths=[8,4]", "ynet_training.batch_size=4",
    "mapping_training.batch_size=4", "pair_learning.error_every=100",
)  # fmt: skip
SMALL = "avatar.encoder_widths=[4,8];avatar.superresolution_capacity=2"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lavatar.platform.cli", *arguments]


def benchmark(folder: Path, *more: str) -> list[str]:
    sets = [part for value in TOY for part in ("--set", value)]
    return command(
        "benchmark", "method", "--pair", "ada:bruna", "--max-frames", "4", "--variant", f"ours=tiny:{SMALL}",
        "-o", str(folder), "--json", *sets, *more,
    )  # fmt: skip


def in_steps(folder: Path, steps: int, *more: str) -> list[str]:
    return benchmark(folder, "--steps", str(steps), "--pair-steps", "4", *more)


@pytest.fixture
def subjects(home: Path) -> Path:
    for seed, name in enumerate(("ada", "bruna")):
        subprocess.run(command("subjects", "add", "--synthetic", str(seed), name), check=True, capture_output=True)
    return home


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_are_trained_measured_and_not_done_again(subjects: Path, tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "out"
    first = subprocess.Popen(
        in_steps(folder, 4000, "--methods", ""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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

    methods = ("latentavatar", "no-cycle", "coeff-triplane", "nerface")
    small = [part for value in (*NARROW, *SMALL.split(";")) for part in ("--set", value)]
    arguments = in_steps(folder, 6, "--methods", ",".join(methods), "--recipe", "tiny", *small)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    rows = {row["method"]: row for row in answer["results"]}
    assert list(rows) == [*(f"{method} (tiny)" for method in methods[:3]), "nerface", "ours"]
    for row in answer["results"]:
        assert row["training"]["avatar"]["avatar"]["steps"] == 6
        assert row["metrics"]["self"]["psnr"] > 5
        assert row["metrics"]["cross"]["truth"]["psnr"] > 5
    assert [name for name, row in rows.items() if "pair" in row["training"]] == [
        "latentavatar (tiny)", "no-cycle (tiny)", "ours",
    ]  # fmt: skip
    assert rows["latentavatar (tiny)"]["release"] == rows["no-cycle (tiny)"]["release"], "one avatar for both"
    ours = rows["ours"]
    assert ours["training"]["pair"]["ynet"]["steps"] == 4
    assert "| ours |" in (folder / "table.md").read_text()
    assert (folder / "sheet.png").stat().st_size > 1000

    recorded_as_a_training_is(subjects, 1 + len(rows))

    began = time.monotonic()
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout) == answer
    assert again.stderr.count("measured before") == 5
    assert time.monotonic() - began < 60


def recorded_as_a_training_is(home: Path, count: int) -> None:
    """Code, command, machine, seeds, datasets and curves of each row are in MLflow."""
    client = connect(Home(home))
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert len(runs) == count
    for run in runs:
        tags, params = run.data.tags, run.data.params
        assert tags["lavatar.command"].startswith("lavatar benchmark method --pair ada:bruna")
        assert tags["lavatar.code"]
        assert tags["lavatar.provenance"]
        assert tags["lavatar.machine.cores"]
        assert params["avatar_training.seed"] == params["seed"] == "0"
        assert json.loads(run.inputs.dataset_inputs[0].dataset.profile)["frames"] == 60
    paired = [run for run in runs if "ynet_training.steps" in run.data.params]
    assert len(paired) == 3
    assert {run.data.params["ynet_training.steps"] for run in paired} == {"4"}
    assert any("ynet/total" in run.data.metrics for run in paired)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_equal_time_becomes_steps_and_they_are_kept(subjects: Path, tmp_path: Path, weights: Path) -> None:
    folder, minutes, pair_minutes = tmp_path / "out", 0.04, 0.06
    times = ("--minutes", str(minutes), "--pair-minutes", str(pair_minutes))
    narrow = [part for value in NARROW for part in ("--set", value)]
    arguments = benchmark(folder, "--methods", "", *times, *narrow)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    (row,) = answer["results"]
    assert (row["method"], row["budget"]) == ("ours", {"kind": "minutes", "avatar": minutes, "pair": pair_minutes})
    kept = [json.loads(path.read_text()) for path in (folder / "steps").glob("*.json")]
    avatar, pair = sorted(kept, key=lambda timed: len(timed["seconds_a_step"]))
    (head,), (ynet, mapping) = avatar["seconds_a_step"], pair["seconds_a_step"]
    assert avatar["steps"] == affordable(60 * minutes, head)
    longest = load_recipe("tiny").mapping_training.steps
    assert pair["steps"] == affordable(60 * pair_minutes, ynet, mapping, longest)
    assert row["training"]["avatar"]["avatar"]["steps"] == avatar["steps"] > 1
    assert row["training"]["pair"]["ynet"]["steps"] == pair["steps"] > 1
    assert row["training"]["pair"]["mapping"]["steps"] == min(longest, pair["steps"])
    table = (folder / "table.md").read_text()
    assert f"equal time: {minutes} minutes an avatar, {pair_minutes} a Y-network" in table
    (line,) = [line for line in table.splitlines() if line.startswith("| ours |")]
    assert {str(avatar["steps"]), str(pair["steps"])} < set(line.split(" | "))

    for path in (folder / "runs").glob("*.json"):
        path.unlink()  # measured anew: the time is not, so that the trainings are found again
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "timing a step" not in again.stderr
    assert json.loads(again.stdout)["results"][0]["training"] == row["training"]


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
