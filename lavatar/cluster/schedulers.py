"""Tune's schedulers with a memory: a sweep that was interrupted goes on with what they had decided by.

Tune stores trials and searchers but no scheduler. Each of these is told again what its trials had reported, up to
where each trial is restored, as the trials are added again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from lavatar.cluster.trial import STEP
from lavatar.configs.space import Point, Space
from lavatar.configs.sweep import Scheduler

Result = Mapping[str, Any]
REDUCTION = 3
"""Of ASHA: of the trials that come to a rung the best third goes on."""
PATIENCE = 2
"""Measurements before the median rule may stop a trial."""


class _Remembering(TrialScheduler):
    """`reports` is the file in which the reports of all trials stand (lavatar.platform.trialboard)."""

    reports: Path

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        for result in _reported(self.reports, trial):
            self.recall(trial, result)

    def recall(self, trial: Trial, result: Result) -> None:
        """Take in a result that was decided upon before."""
        raise NotImplementedError


def _reported(reports: Path, trial: Trial) -> Iterator[Result]:
    """What a restored trial has reported, none for a new one."""
    reached = (trial.last_result or {}).get(STEP)
    if reached is None or not reports.exists():
        return
    kept = json.loads(reports.read_text())["trials"].get(trial.trial_id, {})
    for result in kept.get("reports", ()):
        if result[STEP] <= reached:
            yield result


class Asha(_Remembering, AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al., MLSys 2020)."""

    def recall(self, trial: Trial, result: Result) -> None:
        own: Any = self
        if own._metric in result:
            own._trial_info[trial.trial_id].on_result(trial, result[STEP], own._metric_op * result[own._metric])


class Median(_Remembering, MedianStoppingRule):
    """Stops what is worse than the median of the others (Golovin et al., KDD 2017)."""

    def recall(self, trial: Trial, result: Result) -> None:
        own: Any = self
        if own._metric in result:
            own._results[trial].append(dict(result))


class Pbt(_Remembering, PopulationBasedTraining):
    """Population based training (Jaderberg et al., 2017)."""

    def recall(self, trial: Trial, result: Result) -> None:
        own: Any = self
        if own._metric in result:
            state = own._trial_state[trial]
            own._save_trial_state(state, result[STEP], dict(result), trial)
            state.last_perturbation_time = result[STEP]
            state.last_checkpoint = trial.checkpoint


def build_scheduler(name: Scheduler, space: Space, every: int, steps: int, reports: Path) -> TrialScheduler:
    """The scheduler of that name for trials of `steps` steps that are measured every so many."""
    if name == "none":
        return FIFOScheduler()
    scheduler: Any
    if name == "asha":
        scheduler = Asha(time_attr=STEP, max_t=steps, grace_period=min(every, steps), reduction_factor=REDUCTION)
    elif name == "median":
        scheduler = Median(time_attr=STEP, grace_period=PATIENCE * every)
    else:
        scheduler = Pbt(
            time_attr=STEP,
            perturbation_interval=every,
            hyperparam_mutations=_mutations(space),
            custom_explore_fn=space.inside,
            require_attrs=False,
            log_config=False,
        )
    scheduler.reports = reports
    return scheduler


def _mutations(space: Space) -> dict[str, Any]:
    """Lists for neighbours in a list, else what a value is drawn from anew (it is also multiplied by 0.8 or 1.2)."""
    return {key: [packed(v) for v in d.values] if d.listed else tune_domain(d) for key, d in space.domains.items()}


def tune_domain(domain: Any) -> Any:
    """A domain in Tune's words."""
    from ray import tune

    if domain.listed:
        return tune.choice([packed(value) for value in domain.values])
    if domain.kind == "randint":
        return tune.randint(domain.low, domain.high + 1)
    return getattr(tune, domain.kind)(*domain.values)


def packed(value: Any) -> Any:
    """A value as Tune may have it: it would take a list apart."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def unpacked(space: Space, config: Mapping[str, Any]) -> Point:
    """A trial's values as they were."""
    listed = {key: {packed(v): v for v in d.values} for key, d in space.domains.items() if d.listed}
    return {key: listed[key][value] if key in listed else value for key, value in config.items()}
