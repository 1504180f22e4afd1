"""Run as a script by the tests: one driver of a cluster whose stages only hold what they ask for.

run_sleepers.py HOME AVATARS ACTORS PRIORITY    a job of every avatar × every actor (a letter each); prints when each
pair began and ended, and on which node, as JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lavatar.cluster.bodies import Context
from lavatar.cluster.head import address_for
from lavatar.cluster.stages import StageRunner
from lavatar.configs.recipe import load_recipe
from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.platform import ledger
from lavatar.platform.execution import Office
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.planned import make_plan
from lavatar.platform.progress import PlainDisplay
from lavatar.platform.registry import open_registry
from lavatar.platform.subjects import add_subject, describe_synthetic

PAIR_SECONDS = 2.0


def hold(seconds: float) -> tuple[float, float]:
    """The work: what the stage asked for is held."""
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def sleeping(spec: StageSpec, context: Context) -> StageResult:
    """A stage that leaves the least that counts as finished."""
    import ray

    wanted = spec.recipe["resources"][spec.kind.value]
    seconds = PAIR_SECONDS if spec.kind is StageKind.PAIR else 0.0
    work = ray.remote(num_cpus=wanted["cpus"], num_gpus=wanted["gpus"])(hold)
    span = ray.get(work.remote(seconds))
    marker = {StageKind.PREPROCESS: "manifest.json", StageKind.PREVIEW: "metrics.json"}.get(spec.kind)
    file = spec.out_dir / (marker or "release/config.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    return StageResult({"file": file if marker else file.parent}, {"span": span})


if __name__ == "__main__":
    home = Home(Path(sys.argv[1])).ensure()
    registry = open_registry(home)
    people = {n: add_subject(registry, describe_synthetic(n, ord(n)))[0] for n in sys.argv[2] + sys.argv[3]}
    pairs = [(people[a], people[b]) for a in sys.argv[2] for b in sys.argv[3]]
    kinds = ("preprocess", "avatar", "pair", "preview")
    small = [f"resources.{kind}.cpus=0.25" for kind in kinds]
    recipe = load_recipe("tiny", [*small, "resources.pair.gpus=0.25", "pair_learning.warm=false"])
    plan = make_plan(home, registry, pairs, recipe, shared=False)
    bodies = dict.fromkeys(StageKind, sleeping)

    def open_runner() -> StageRunner:
        return StageRunner(home.root, address_for(home.root), bodies=bodies)

    run_job(Office(home, registry, PlainDisplay(), open_runner, Owner.current()), plan, int(sys.argv[4]))
    rows = ledger.get_stages(registry, [pair.bridge.key for pair in plan.pairs])
    print(json.dumps({row.name: row.metrics["span"] for row in rows}))
