"""Run as a script by the tests: a hungry training on a Ray whose memory monitor this process's environment sets.

run_hungry.py HOME DATASET BYTES_A_SAMPLE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import hungry
from cluster_specs import avatar_spec, run
from test_fault_memory import small_batches

from lavatar.cluster.stages import StageRunner

if __name__ == "__main__":
    home, dataset, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    hungry.ship()
    bodies = hungry.bodies_of(hungry.Limit(samples=0, size=size, seconds=4.0))
    with StageRunner(home, bodies=bodies) as runner:
        result, seen = run(runner, avatar_spec(home, dataset, small_batches()))
    texts = [(event.level, event.text) for event in seen]
    print(json.dumps({"metrics": result.metrics, "notes": result.notes, "events": texts}))
