"""benchmarks/scale.py from end to end, small: two nodes' worth of nothing but scheduling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_pairs_on_two_pretended_gpus(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--gpus", "2", "--avatars", "2", "--actors", "2"]
    command += ["--ideal", "8", "--alone", "-o", str(tmp_path / "scale.json")]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LAVATAR_")}
    done = subprocess.run(
        command, env={**ours, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads((tmp_path / "scale.json").read_text())
    assert (row["gpus"], row["pairs"], row["stages"]) == (2, 4, 4 + 2 + 4 + 4)
    assert (row["seconds_a_pair"], row["ideal_seconds"]) == (4.0, 6 * 4.0 / 2)
    assert row["ideal_seconds"] <= row["gpu_seconds"] < row["wall_seconds"]
    assert row["of_ideal"] == pytest.approx(row["ideal_seconds"] / row["gpu_seconds"])
    assert 0 < row["ray_of_ideal"] <= 1
    beyond = row["turnover_seconds"]["mean"] - row["ray_turnover_seconds"]["mean"]
    assert row["overhead_a_stage_seconds"] == pytest.approx(beyond)
    for name in ("registry_statements_a_stage", "driver_mb", "jobs_list_seconds", "registry_kb_a_stage"):
        assert row[name] > 0
