"""Schedulers that remember: after a restart they decide as if there had been none. Plain objects, no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.tune.schedulers import TrialScheduler

from lavatar.cluster.schedulers import Asha, Median, Pbt, build_scheduler, packed, tune_domain, unpacked
from lavatar.configs.space import Domain, Space
from lavatar.configs.sweep import Scheduler

SPACE = Space({"avatar.samples": Domain("randint", (4, 8)), "avatar.ray_size": Domain("choice", (16, 32))})
LOSSES = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}


class FakeTrial:
    """As much of Tune's trial as a scheduler looks at."""

    def __init__(self, name: str, step: int | None) -> None:
        kept = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=4))
        self.run_metadata = SimpleNamespace(checkpoint_manager=kept)
        self.trial_id = self.experiment_tag = name
        self.last_result = {"step": step} if step else None
        self.config, self.evaluated_params = dict[str, Any](), dict[str, Any]()
        self.checkpoint, self.status = f"state of {name}", "RUNNING"

    def is_finished(self) -> bool:
        return False


def trial(name: str, step: int | None = None) -> Any:
    return FakeTrial(name, step)


class Controller:
    """Of which little is asked for."""

    search_alg = None

    def get_trials(self) -> list[Any]:
        return []

    def get_live_trials(self) -> list[Any]:
        return []


def open_(name: Scheduler, reports: Path) -> Any:
    scheduler = build_scheduler(name, SPACE, 10, 90, reports)
    assert scheduler.set_search_properties("lpips", "min")
    return cloudpickle.loads(cloudpickle.dumps(scheduler))  # as Tune stores it with the sweep


def add(scheduler: Any, *trials: Any) -> None:
    for each in trials:
        scheduler.on_trial_add(Controller(), each)


def decide(scheduler: Any, each: Any, step: int, value: float) -> str:
    return str(scheduler.on_trial_result(Controller(), each, {"step": step, "lpips": value}))


def store(path: Path, steps: dict[str, list[int]]) -> None:
    rows = {n: {"reports": [{"step": s, "lpips": LOSSES[n]} for s in found]} for n, found in steps.items()}
    path.write_text(json.dumps({"trials": rows}))


def test_asha_stops_the_worse_ones_at_a_rung(tmp_path: Path) -> None:
    scheduler = open_("asha", tmp_path / "none.json")
    trials = {name: trial(name) for name in LOSSES}
    add(scheduler, *trials.values())
    decisions = {name: decide(scheduler, each, 10, LOSSES[name]) for name, each in trials.items()}
    assert decisions == {"a": "CONTINUE", "b": "STOP", "c": "STOP", "d": "STOP", "e": "STOP"}
    assert decide(scheduler, trials["a"], 90, 1.0) == "STOP", "the end"


def test_asha_goes_on_with_its_rungs(tmp_path: Path) -> None:
    reports = tmp_path / "trials.json"
    store(reports, {"a": [10, 20], "b": [10], "c": [10]})
    fresh, again = open_("asha", tmp_path / "none.json"), open_("asha", reports)
    restored, new = [trial(name, 10) for name in "abc"], trial("d")
    for scheduler in (fresh, again):
        add(scheduler, *restored, new)
    assert decide(fresh, new, 10, LOSSES["d"]) == "CONTINUE", "without a memory the first one is the best one"
    assert decide(again, new, 10, LOSSES["d"]) == "STOP"
    rungs: Any = again._brackets[0]._rungs
    assert {step: set(seen) for step, seen in rungs if seen} == {10: {"a", "b", "c", "d"}}


def test_what_was_reported_after_the_restored_state_is_decided_anew(tmp_path: Path) -> None:
    reports = tmp_path / "trials.json"
    store(reports, {"a": [10], "b": [10], "c": [10]})
    scheduler = open_("asha", reports)
    add(scheduler, trial("a", 10), trial("b", 10), lost := trial("c"))
    assert isinstance(scheduler, Asha)
    assert decide(scheduler, lost, 10, LOSSES["c"]) == "STOP"


def test_the_median_rule_remembers_the_others(tmp_path: Path) -> None:
    reports = tmp_path / "trials.json"
    store(reports, {name: [10, 20, 30] for name in "abc"})
    scheduler = open_("median", reports)
    assert isinstance(scheduler, Median)
    add(scheduler, *(trial(name, 30) for name in "abc"), bad := trial("e"), good := trial("d"))
    assert decide(scheduler, bad, 20, 9.0) == TrialScheduler.STOP
    assert decide(scheduler, good, 20, 0.5) == TrialScheduler.CONTINUE


def test_a_population_remembers_scores_and_when_it_was_perturbed(tmp_path: Path) -> None:
    reports = tmp_path / "trials.json"
    store(reports, {name: [10, 20] for name in "abcd"})
    scheduler = open_("pbt", reports)
    assert isinstance(scheduler, Pbt)
    trials = {name: trial(name, 20) for name in "abcd"}
    add(scheduler, *trials.values())
    low, high = scheduler._quantiles()
    assert ([t.trial_id for t in low], [t.trial_id for t in high]) == (["d"], ["a"])
    state = scheduler._trial_state[trials["a"]]
    assert (state.last_perturbation_time, state.last_checkpoint) == (20, "state of a")


def test_a_population_explores_inside_the_space(tmp_path: Path) -> None:
    from ray.tune.schedulers import pbt

    explore: Any = pbt._explore

    scheduler: Any = open_("pbt", tmp_path / "none.json")
    seen = set()
    for _ in range(200):
        new, _ = explore(
            {"avatar.samples": 8, "avatar.ray_size": 32}, scheduler._hyperparam_mutations, 0.25, (1.2, 0.8),
            scheduler._custom_explore_fn,
        )  # fmt: skip
        assert new["avatar.ray_size"] in (16, 32)
        assert isinstance(new["avatar.samples"], int)
        seen.add(new["avatar.samples"])
    assert seen <= {4, 5, 6, 7, 8}
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (Domain("uniform", (0, 1)), "Float"),
        (Domain("loguniform", (0.1, 1)), "Float"),
        (Domain("quniform", (0, 1, 0.5)), "Float"),
        (Domain("randint", (4, 8)), "Integer"),
        (Domain("grid", (4, 8)), "Categorical"),
    ],
)
def test_domains_in_tunes_words(domain: Domain, words: str) -> None:
    found = tune_domain(domain)
    assert type(found).__name__ == words
    drawn = {found.sample() for _ in range(60)}
    assert all(domain.inside(value) == pytest.approx(value) for value in drawn)
    if domain.kind in ("randint", "grid"):
        assert max(drawn) == 8


def test_tune_keeps_lists_whole() -> None:
    from ray.tune.search.variant_generator import _get_preset_variants

    widths, words = ([8, 16], [16, 32]), Domain("choice", ([8, 16], [16, 32]))
    space = Space({"avatar.encoder_widths": words, "avatar.samples": Domain("randint", (4, 8))})
    for point in ({"avatar.encoder_widths": w, "avatar.samples": n} for w in widths for n in (4, 8)):
        config = {key: packed(value) for key, value in point.items()}
        spec = {"config": {key: tune_domain(domain) for key, domain in space.domains.items()}}
        ((_, found),) = _get_preset_variants(spec, config)
        assert unpacked(space, found["config"]) == point


def test_a_state_that_was_cut_short_with_its_driver_is_not_restored(tmp_path: Path) -> None:
    from lavatar.cluster.sweep import _restored

    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "tuner.pkl").write_bytes(b"")
    (tmp_path / "tune" / "experiment_state-2026-01-01_00-00-00.json").write_text('{"trial_data": [')
    plan: Any = SimpleNamespace(folder=tmp_path)
    assert _restored(plan, None) is None
    assert not list((tmp_path / "tune").glob("experiment_state-*"))
