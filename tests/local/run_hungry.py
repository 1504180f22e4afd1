"""Run as a script by the tests of memory, with Ray's monitor of it set by the environment: a stage whose training eats.

run_hungry.py HOME DATASET SAMPLES BYTES    the recipe's JSON comes through standard input; prints a JSON line
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import hungry
from cluster_specs import avatar_spec, watch

from lavatar.cluster import session
from lavatar.cluster.stages import StageRunner
from lavatar.configs.recipe import Recipe
from lavatar.errors import LavatarError

if __name__ == "__main__":
    home, limit = Path(sys.argv[1]), hungry.Limit(int(sys.argv[3]), watched=True, sample=int(sys.argv[4]))
    spec = avatar_spec(home, Path(sys.argv[2]), Recipe.model_validate_json(sys.stdin.read()))
    own = session.start(home, cpus=2)
    try:
        hungry.ship()
        with StageRunner(home, bodies=hungry.bodies_of(limit)) as runner:
            try:
                handle = runner.start(spec)
                seen = watch(handle, 300)  # what was killed begins again as a whole
                result = handle.result()
                answer = {"metrics": result.metrics, "notes": result.notes, "seen": [vars(event) for event in seen]}
            except LavatarError as error:
                answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    finally:
        own.stop()
    print(json.dumps(answer, default=str))
