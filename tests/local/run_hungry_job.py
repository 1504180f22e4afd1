"""Run as a script by the tests of memory: the command line, where the training of the avatar eats (hungry.py).

run_hungry_job.py SAMPLES STEP COMMAND...    from STEP on its process may take the memory of so many SAMPLES
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import hungry

from lavatar.cluster import stages
from lavatar.cluster.bodies import BODIES

ROOM = 300 * 2**20
"""More than without MLflow, whose threads reserve memory too; less than a sample."""


class HungryRunner(stages.StageRunner):
    """Runs the real stages, but for the avatar's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        limit = hungry.Limit(int(sys.argv[1]), from_step=int(sys.argv[2]), room=ROOM)
        super().__init__(*args, bodies={**BODIES, **hungry.bodies_of(limit)}, **options)


if __name__ == "__main__":
    hungry.ship()
    stages.StageRunner = HungryRunner  # type: ignore[misc]
    from lavatar.platform.cli import main

    main(sys.argv[3:])
