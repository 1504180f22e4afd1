"""How the trials of a sweep are made and compared: their points, the figure that decides, the recipe of one."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from lavatar.configs.evaluation import HIGHER
from lavatar.configs.recipe import Recipe, nearest, with_values
from lavatar.configs.space import Point, Space
from lavatar.contracts import EXPRESSIONS, StageKind
from lavatar.errors import ConfigError

Scheduler = Literal["asha", "pbt", "median", "none"]
Search = Literal["random", "grid", "optuna"]
Mode = Literal["min", "max"]


Curve = list[tuple[int, dict[str, float]]]
"""Steps and their losses, learning rates and pace by name."""


class Donor(NamedTuple):
    """Whose weights another trial goes on with, and at which step they were."""

    trial: str
    step: int


def trial_points(space: Space, search: Search, trials: int | None, scheduler: Scheduler) -> list[Point]:
    """The points of the trials of a random or grid search, in order; none for optuna, which asks as it goes.

    Raises ConfigError for what does not go together.
    """
    if search == "grid":
        points = space.grid()
        if trials is not None and trials < len(points):
            raise ConfigError(
                f"--search grid: the space has {len(points)} combinations, --trials is {trials}",
                f"Say --trials {len(points)}, leave it out, or take --search random.",
            )
        return points
    if trials is None:
        raise ConfigError("--trials is missing", "Say how many trials to make: --trials N.")
    if scheduler == "pbt" and trials < 2:
        raise ConfigError("--scheduler pbt needs a population: --trials is 1", "Say --trials 4 or more.")
    if search == "optuna":
        if scheduler == "pbt":
            raise ConfigError("--scheduler pbt makes its own points", "Take --search random with it.")
        return []
    points = space.random(trials)
    if len(points) < trials:
        raise ConfigError(
            f"--trials is {trials}, but the space has {len(points)} points", "Lower it, or take --search grid."
        )
    return points


def require_search(search: Search) -> None:
    """Raises ConfigError where a search needs what is not installed."""
    if search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "--search optuna: optuna is not installed",
            "Install it: pip install 'lavatar[optuna]'; or take --search random.",
        )


_IMAGE = ("mse", "psnr", "ssim", "lpips")


def known_metrics(kind: StageKind, both_synthetic: bool) -> list[str]:
    """What trials of that stage can be compared by, as the evaluation names it (docs/CONVENTIONS.md).

    A pair's portraits have a truth only where both subjects are synthetic.
    """
    pictures = [*_IMAGE, *(f"face/{name}" for name in _IMAGE), "landmark_error/mouth", "landmark_error/eyes"]
    expressions = [f"expression/{name}/{what}" for name in EXPRESSIONS for what in ("error", "r")]
    seen = pictures if kind is StageKind.AVATAR or both_synthetic else []
    return ["expression_error", *seen, *expressions]


def checked_metric(metric: str | None, mode: Mode | None, kind: StageKind, both_synthetic: bool) -> tuple[str, Mode]:
    """Metric and mode, by default lpips of an avatar and the expression error of a pair. Raises ConfigError."""
    known = known_metrics(kind, both_synthetic)
    metric = metric or ("lpips" if kind is StageKind.AVATAR else "expression_error")
    if metric not in known:
        raise ConfigError(
            f"--metric {metric!r:.60}: trials of this {kind.value} have no such figure",
            f"{nearest(metric, known)}There are: {', '.join(known)}.",
        )
    return metric, mode or ("max" if metric.rpartition("/")[2] in HIGHER else "min")


def choices(of: Any) -> list[str]:
    """The words of a Literal."""
    return list(get_args(of))


def trial_recipe(recipe: Recipe, point: Mapping[str, Any], kind: StageKind, every: int) -> Recipe:
    """The recipe of one trial, which is measured and stored every so many steps, and its losses logged then too: as
    often as the recipe says, or oftener. Raises ConfigError."""
    names = ("avatar_training",) if kind is StageKind.AVATAR else ("ynet_training", "mapping_training")
    changed = with_values(recipe, point)
    update = {}
    for name in names:
        training = getattr(changed, name)
        logged = max(n for n in range(1, min(training.log_every, every) + 1) if every % n == 0)
        cadence = {"checkpoint_every": every, "log_every": logged, "picture_every": training.steps}
        update[name] = training.model_copy(update={"engine": "torch", "zero_stage": 0, **cadence})
    return changed.model_copy(update=update)
