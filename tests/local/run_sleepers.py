"""Run as a script by the tests: one driver of a cluster whose stages only hold what they ask for.

run_sleepers.py HOME AVATARS ACTORS PRIORITY    a job of every avatar × every actor (a letter each); prints when each
pair began and ended, as JSON
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
    pairs = [(people[a], people[b]) for a in sys.argv[2] for b in sys.argv[3]]
    small = [f"resources.{kind}.cpus=0.25" for kind in ("preprocess", "avatar", "pair", "preview")]
    recipe = load_recipe("tiny", [*small, "resources.pair.gpus=0.25", "pair_learning.warm=false"])
    plan = make_plan(home, registry, pairs, recipe, shared=False)

    def open_runner() -> StageRunner:
        return StageRunner(home.root, address_for(home.root), bodies=scale.BODIES)

    run_job(Office(home, registry, PlainDisplay(), open_runner, Owner.current()), plan, int(sys.argv[4]))
    rows = lookup.get_stages(registry, [pair.bridge.key for pair in plan.pairs])
    print(json.dumps({row.name: (row.metrics["began"], row.metrics["ended"]) for row in rows}))
