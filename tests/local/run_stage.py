"""Run as a script by the tests: a foreground submit in small, to be ended in every way.

run_stage.py HOME NAME [SILENCE]    prints "running" once the training's first steps are done
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import toy_bodies
from test_cluster_stages import _pair_spec

from lavatar.cluster import mailbox
from lavatar.cluster.stages import StageRunner

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a submit has it
    home, told = Path(sys.argv[1]), False
    toy_bodies.ship()
    mailbox.SILENCE_SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else mailbox.SILENCE_SECONDS
    with StageRunner(home, bodies=toy_bodies.BODIES) as runner:
        if sys.argv[2] == "raise":
            raise RuntimeError("the driver fails")
        handle = runner.start(_pair_spec(home, sys.argv[2]))
        try:
            while not handle.done():
                if any((event.done or 0) >= 8 for event in handle.poll()) and not told:
                    told = True
                    print("running", flush=True)
                time.sleep(0.1)
        except KeyboardInterrupt:
            handle.cancel()
            while not handle.done():
                time.sleep(0.1)
            sys.exit(130)
