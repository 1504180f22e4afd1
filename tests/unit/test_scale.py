"""benchmarks/scale.py: its figures, of a schedule that is computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale

from lavatar.contracts import StageKind
from lavatar.platform import lookup


def test_a_gap_is_from_the_end_of_a_stage_to_the_beginning_of_the_next_on_that_gpu() -> None:
    """Two GPUs: one holds 0 to 10, 12 to 20 and 21 to 30; the other 0 to 11, 15 to 25 and nothing more."""
    spans = [(12.0, 20.0), (0.0, 11.0), (21.0, 30.0), (0.0, 10.0), (15.0, 25.0)]
    assert scale._gaps(spans) == [2.0, 4.0, 1.0]


def test_a_gpu_that_is_taken_at_once_has_no_gap() -> None:
    """What waits in Ray begins at the very moment at which another ends; nobody has waited before the first stage."""
    assert scale._gaps([(0.0, 5.0), (5.0, 9.0), (9.5, 12.0)]) == [0.0, 0.5]
    assert scale._gaps([(3.0, 5.0)]) == []


def test_mean_median_and_95th_percentile() -> None:
    values = [float(value) for value in range(20, 0, -1)]
    assert scale._summary(values) == {"mean": 10.5, "p50": 11.0, "p95": 20.0}
    assert scale._summary([0.1, 0.1, 0.1, 9.7])["mean"] == pytest.approx(2.5)
    assert scale._summary([]) == {"mean": 0.0, "p50": 0.0, "p95": 0.0}


def test_the_figures_of_a_small_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """One avatar and three pairs, each 10 s, on two GPUs from second 100 on:

    GPU 1: avatar 100-110, pair x 111-121, pair z 122-132; GPU 2: pair y 114-124 (no GPU was freed for it). Previews
    begin 1, 2 and 6 s after their pairs.
    """
    schedule: dict[str, tuple[StageKind, tuple[float, float], tuple[str, ...]]] = {
        "data": (StageKind.PREPROCESS, (90.0, 95.0), ()),
        "avatar": (StageKind.AVATAR, (100.0, 110.0), ("data",)),
        "x": (StageKind.PAIR, (111.0, 121.0), ("avatar",)),
        "y": (StageKind.PAIR, (114.0, 124.0), ("avatar",)),
        "z": (StageKind.PAIR, (122.0, 132.0), ("avatar",)),
        "preview x": (StageKind.PREVIEW, (122.0, 123.0), ("avatar", "x")),
        "preview y": (StageKind.PREVIEW, (126.0, 127.0), ("avatar", "y")),
        "preview z": (StageKind.PREVIEW, (138.0, 139.0), ("avatar", "z")),
    }
    stages = [SimpleNamespace(key=k, spec=SimpleNamespace(kind=v[0]), needs=v[2]) for k, v in schedule.items()]
    rows = [SimpleNamespace(key=k, metrics=dict(zip(("began", "ended"), v[1], strict=True)))
            for k, v in schedule.items()]  # fmt: skip

    def get_stages(registry: Any, keys: list[str]) -> list[SimpleNamespace]:
        return [row for row in rows if row.key in keys]

    monkeypatch.setattr(lookup, "get_stages", get_stages)
    figures = scale._figures(None, SimpleNamespace(stages=stages), gpus=2, seconds=10.0)
    assert figures == {
        "seconds_a_pair": 10.0,
        "ideal_seconds": 20.0,
        "gpu_seconds": 32.0,
        "of_ideal": 0.625,
        "turnover_seconds": {"mean": 1.0, "p50": 1.0, "p95": 1.0},
        "preview_after_pair_seconds": {"mean": 3.0, "p50": 2.0, "p95": 6.0},
    }


def test_what_a_stage_takes_beyond_bare_tasks() -> None:
    """Tasks of 10 s on two GPUs, 0.5 and 1.5 s between two: 22 s where 20 are ideal."""
    alone = [(0.0, 10.0), (0.5, 10.5), (10.5, 20.5), (12.0, 22.0)]
    job = {"ideal_seconds": 20.0, "turnover_seconds": {"mean": 1.2, "p50": 0.0, "p95": 0.0}}
    assert scale._beyond(alone, job) == {
        "ray_turnover_seconds": {"mean": 1.0, "p50": 1.5, "p95": 1.5},
        "ray_of_ideal": pytest.approx(20 / 22),
        "overhead_a_stage_seconds": pytest.approx(0.2),
    }
