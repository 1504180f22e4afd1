"""What it costs to register a model: processor seconds of the driver, on SQLite and a folder.

    python benchmarks/registering.py [--against FOLDER]

A real job of avatars × actors whose stages are functions that leave small files; the driver, the registry and MLflow
are real. Counted is what the thread does that registers, of each model: its version with lineage, figures and card, and
the champion. `--against` runs a checkout in FOLDER too, the two by turns, and gives the ratio. `--profile` says where
the time goes.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from lavatar.contracts import EXPRESSIONS

HERE = Path(__file__).resolve().parents[1]


def figures() -> dict[str, Any]:
    """What a preview of real people measures: as many figures, of any value."""
    image = {"mse": 0.001, "psnr": 30.0, "ssim": 0.9, "lpips": 0.05}
    measures = {name: {"r": 0.9, "amplitude": 1.1, "error": 0.4} for name in EXPRESSIONS}
    followed = {
        "expression": measures, "expression_error": 0.4, "landmark_error": {"mouth": 0.03, "eyes": 0.02},
        "identity": {"distance": 0.4, "similarity": 0.9, "reference": {"distance": 0.3, "similarity": 0.95}},
        "no_face": 0, "frames": 60,
    }  # fmt: skip
    whole = {**image, "face": image, "flicker": 0.5, "spread": image, **followed}
    return {"self": whole, "cross": {**followed, "truth": image}, "mean_frame": whole, "nearest_frame": whole}


def measure(avatars: int, actors: int, profile: bool) -> dict[str, float]:
    """One job; seconds of processor time and of the clock a model."""
    sys.path.insert(0, str(Path(os.environ["PYTHONPATH"]) / "tests" / "unit"))
    import pytest
    from inference_files import make_subject
    from platform_fakes import FakeHandle, FakeRunner, Recorder, finish, fresh, make_plan_of, office, use_plain_digest

    from lavatar.contracts import StageResult
    from lavatar.platform import registering
    from lavatar.platform.jobs import run_job

    measured, spent, walls, seen = figures(), 0.0, 0.0, cProfile.Profile()
    bring = registering.Registrar._bring

    def timed(self: Any, models: Any) -> None:
        nonlocal spent, walls
        began, wall = time.thread_time(), time.monotonic()
        if profile:
            seen.enable()
        try:
            bring(self, models)
        finally:
            seen.disable()
            spent, walls = spent + time.thread_time() - began, walls + time.monotonic() - wall

    def dataset(handle: FakeHandle) -> StageResult:
        seed = next(iter(handle.spec.sources.values())).synthetic_seed
        make_subject(handle.spec.out_dir, seed or 0, frames=3, held_out=1)
        return StageResult({"manifest": handle.spec.out_dir / "manifest.json"})

    def preview(handle: FakeHandle) -> StageResult:
        return StageResult(finish(handle).artefacts, measured)

    letters = [chr(ord("a") + i) for i in range(avatars + actors)]
    pairs = " ".join(a + b for a in letters[:avatars] for b in letters[avatars:])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        use_plain_digest(patch)
        patch.setattr(registering.Registrar, "_bring", timed)
        home, registry = fresh(Path(folder))
        desk = office(home, registry, FakeRunner({"preprocess": dataset, "preview": preview}))
        run_job(desk, make_plan_of(home, pairs))
        assert isinstance(desk.display, Recorder)
        failed = [text for text in desk.display.messages if "could not" in text]
        assert not failed, failed[:3]
        registry.close()
    if profile:
        pstats.Stats(seen, stream=sys.stderr).sort_stats("cumulative").print_stats(
            "lavatar|mlflow.tracking|mlflow.pyfunc|mlflow.models|importlib_meta", 60
        )
    models = avatars + avatars * actors
    return {"models": models, "cpu_seconds": spent / models, "wall_seconds": walls / models}


@click.command()
@click.option("--avatars", default=3, show_default=True)
@click.option("--actors", default=9, show_default=True)
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Another checkout of lavatar.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--profile", is_flag=True)
@click.option("--one", is_flag=True, hidden=True)
def main(avatars: int, actors: int, against: Path | None, rounds: int, profile: bool, one: bool) -> None:
    """Register the models of a job, each time in a process and a home of its own."""
    if one:
        click.echo(json.dumps(measure(avatars, actors, profile)))
        return
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for tree in [HERE, *([against.resolve()] if against else [])]:
            command = [sys.executable, __file__, "--one", "--avatars", str(avatars), "--actors", str(actors)]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            environment.pop("MLFLOW_TRACKING_URI", None)
            answer = subprocess.run(
                [*command, *(["--profile"] if profile else [])], env=environment, stdout=subprocess.PIPE, text=True,
                check=True,
            )  # fmt: skip
            result = json.loads(answer.stdout.strip().splitlines()[-1])
            found.setdefault("here" if tree == HERE else "against", []).append(result["cpu_seconds"])
            click.echo(f"{tree.name}: {json.dumps(result)}")
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        click.echo(f"{name}: {value:.3f} s of processor time a model (median of {rounds})")
    if against:
        click.echo(f"ratio: {medians['here'] / medians['against']:.2f}")


if __name__ == "__main__":
    main()
