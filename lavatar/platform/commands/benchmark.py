"""lavatar benchmark: compare methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lavatar.configs.baselines import BASELINES
from lavatar.errors import UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home, working_in
from lavatar.platform.output import answer, answer_json, reserved

if TYPE_CHECKING:
    from lavatar.platform.registry import Registry

METHODS = ",".join(BASELINES)
TABLE, RESULTS, SHEET = "table.md", "results.json", "sheet.png"


@click.group()
def benchmark() -> None:
    """Compare methods, trained and measured alike."""


@benchmark.command()
@click.option("--pair", "pairs", multiple=True, required=True, metavar="AVATAR:ACTOR", help="Subjects; several pairs.")
@click.option("--recipe", "recipes", multiple=True, default=("paper", "fast"), show_default=True, help="Several.")
@click.option("--methods", default=METHODS, show_default=True, help="Baselines, each built on every recipe.")
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME=RECIPE:K=V;K=V", help="One more row: a changed recipe."
)
@click.option(
    "--size", type=click.Choice(["cpu", "full"]), default="cpu", show_default=True, help="cpu: 128² pictures."
)
@click.option(
    "--rate", default=1.0, show_default=True, help="Times paper's and official's rates, made for 200,000 steps."
)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one number of every row.")
@click.option("--seeds", default="0", show_default=True, metavar="N,N", help="Each row is trained with each.")
@click.option("--steps", type=click.IntRange(1), help="Equal steps: of each avatar.")
@click.option("--pair-steps", type=click.IntRange(1), help="Equal steps: of each Y-network; default: half of --steps.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Equal time: of each avatar.")
@click.option("--pair-minutes", type=click.FloatRange(0, min_open=True), help="Of each Y-network; default: --minutes.")
@click.option("--max-frames", default=100, show_default=True, help="Held-out frames measured, spread evenly; 0: all.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder; default LAVATAR_HOME/outputs/benchmark.")
@json_option
def method(
    pairs: tuple[str, ...],
    recipes: tuple[str, ...],
    methods: str,
    variants: tuple[str, ...],
    size: str,
    rate: float,
    overrides: tuple[str, ...],
    seeds: str,
    steps: int | None,
    pair_steps: int | None,
    minutes: float | None,
    pair_minutes: float | None,
    max_frames: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Train and measure LatentAvatar and its baselines (Sec. 5.2).

    Rows: LatentAvatar, LatentAvatar without cycle consistency, Coeff+Tri-plane, NeRFace; self reenactment of the
    avatar's held-out frames, cross reenactment by the actor's. With --steps and --minutes both are done.
    """
    from lavatar.configs.methods import build_methods
    from lavatar.platform.benchmark import Row
    from lavatar.platform.benchmark_budget import Budget
    from lavatar.platform.planned import person
    from lavatar.platform.registry import open_registry
    from lavatar.platform.subjects import resolve

    home = Home.from_environment()
    registry = open_registry(home)
    chosen = build_methods(recipes, [m for m in methods.split(",") if m], variants, size, rate, overrides)
    budgets = [Budget("steps", steps, pair_steps or max(1, steps // 2))] if steps else []
    budgets += [Budget("minutes", minutes, pair_minutes or minutes)] if minutes else []
    if not budgets:
        raise UsageError("no budget is given", "Say --steps N (equal steps), --minutes M (equal time), or both.")
    if not chosen:
        raise UsageError("no method is given", f"Say --methods {METHODS}, or a --variant.")
    numbers = _seeds(seeds)
    people = [tuple(person(resolve(registry, name)) for name in _pair(text)) for text in pairs]
    rows = [
        Row(each, avatar, actor, seed, budget, max_frames)
        for avatar, actor in people
        for budget in budgets
        for seed in numbers
        for each in chosen
    ]
    _run(home, registry, output or home.root / "outputs" / "benchmark", rows, as_json)


def _pair(text: str) -> tuple[str, str]:
    avatar, colon, actor = text.partition(":")
    if not colon or not avatar or not actor:
        raise UsageError(f"--pair {text!r} names no two subjects", "Write --pair AVATAR:ACTOR.")
    return avatar, actor


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {text!r} are no whole numbers", "Write --seeds 0,1,2.") from None


def _run(home: Home, registry: Registry, folder: Path, rows: list[Any], as_json: bool) -> None:
    import json

    import cv2

    from lavatar.cluster.stages import StageRunner
    from lavatar.platform.benchmark import Bench, measured
    from lavatar.platform.benchmark_table import contact_sheet, tables
    from lavatar.platform.progress import open_display
    from lavatar.platform.signals import terminate_as_interrupt
    from lavatar.platform.tracking import Tracker

    display = open_display()
    with reserved(), working_in(home):
        try:
            with StageRunner(home.root, backend="inline") as runner, terminate_as_interrupt():
                tracker = Tracker(home, lambda text: display.message(text, "warning"))
                results: list[dict[str, Any]] = []
                text = ""
                for result in measured(Bench(home, folder, display, runner, tracker, registry), rows):
                    results.append(result)
                    text = tables(results)  # written row by row: a long benchmark can be read while it runs
                    (folder / TABLE).write_text(text + "\n")
                    (folder / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            cv2.imwrite(str(folder / SHEET), contact_sheet(home.root, results)[..., ::-1])
        finally:
            display.close()
        if as_json:
            answer_json({"folder": str(folder), "results": results})
        else:
            answer(f"{text}\n\n{folder / TABLE}, {folder / RESULTS}, {folder / SHEET}")
