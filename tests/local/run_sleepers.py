"""Run as a script by the tests: one driver of a cluster whose stages only hold what they ask for.

run_sleepers.py HOME AVATARS ACTORS PRIORITY    a job of every avatar × every actor (a letter each); prints of each pair
when it could have been started, was started, began to hold its GPU and ended, as JSON
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scale

from lavatar.cluster.head import address_for
from lavatar.cluster.stages import StageRunner
from lavatar.configs.recipe import load_recipe
from lavatar.contracts import StageKind
from lavatar.platform import lookup
from lavatar.platform.execution import Office
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.planned import make_plan
from lavatar.platform.progress import PlainDisplay
from lavatar.platform.registry import open_registry
from lavatar.platform.subjects import add_subject, describe_synthetic

if __name__ == "__main__":
    os.environ[scale.SECONDS] = "6"
    ray.cloudpickle.register_pickle_by_value(scale)  # Ray's workers cannot import it
    home = Home(Path(sys.argv[1])).ensure()
    registry = open_registry(home)
    people = {n: add_subject(registry, describe_synthetic(n, ord(n)))[0] for n in sys.argv[2] + sys.argv[3]}
    chosen = [(people[a], people[b]) for a in sys.argv[2] for b in sys.argv[3]]
    small = [f"resources.{kind}.cpus=0.25" for kind in ("preprocess", "avatar", "pair", "preview")]
    recipe = load_recipe("tiny", [*small, "resources.pair.gpus=0.25", "pair_learning.warm=false"])
    plan = make_plan(home, registry, chosen, recipe, shared=False)

    def open_runner() -> StageRunner:
        return StageRunner(home.root, address_for(home.root), bodies=scale.BODIES)

    run_job(Office(home, registry, PlainDisplay(), open_runner, Owner.current()), plan, int(sys.argv[4]))
    rows = {row.key: row for row in lookup.get_stages(registry, [stage.key for stage in plan.stages])}
    pairs = [stage for stage in plan.stages if stage.spec.kind is StageKind.PAIR]
    told = {
        pair.name: {
            "ready": max(rows[need].ended or 0.0 for need in pair.needs),
            "started": rows[pair.key].started,
            "began": rows[pair.key].metrics["began"],
            "ended": rows[pair.key].metrics["ended"],
        }
        for pair in pairs
    }
    print(json.dumps(told))
