"""The user's cache of calibrations: computed once, never trusted when it cannot be read, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lavatar.datasets import calibrations


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lavatar" / "calibrations"


def counted(values: list[float]) -> tuple[Callable[[], dict[str, np.ndarray]], list[int]]:
    """What computes an array of these values, and how often it did."""
    calls: list[int] = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(len(calls))
        return {"a": np.array(values), "b": np.arange(6, dtype=np.float32).reshape(3, 2).T}

    return compute, calls


def test_computed_once_and_the_same_to_the_bit(cache: Path) -> None:
    compute, calls = counted([0.1, np.nan, -0.0])
    first, again = (calibrations.kept("x", "one", compute) for _ in range(2))
    assert calls == [0]
    for name in ("a", "b"):
        assert first[name].tobytes() == again[name].tobytes()
        assert (first[name].dtype, first[name].shape) == (again[name].dtype, again[name].shape)
    assert len(list(cache.iterdir())) == 1, "nothing but the file itself is left"


def test_another_cause_is_another_calibration(cache: Path) -> None:
    calibrations.kept("x", "one", counted([1.0])[0])
    assert calibrations.kept("x", "two", counted([2.0])[0])["a"] == 2.0
    assert calibrations.kept("y", "one", counted([3.0])[0])["a"] == 3.0
    assert calibrations.kept("x", "one", counted([9.0])[0])["a"] == 1.0


def test_another_version_of_the_code_computes_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrations.kept("x", "one", counted([1.0])[0])
    monkeypatch.setattr(calibrations, "_code", lambda: "another")
    assert calibrations.kept("x", "one", counted([2.0])[0])["a"] == 2.0


@pytest.mark.parametrize("damage", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense", None])
def test_a_damaged_file_is_computed_again_and_replaced(cache: Path, damage: bytes | None) -> None:
    compute, calls = counted([4.0])
    calibrations.kept("x", "one", compute)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] if damage is None else damage)
    assert calibrations.kept("x", "one", compute)["a"] == 4.0
    assert calls == [0, 1]
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    compute, calls = counted([5.0])
    assert [calibrations.kept("x", "one", compute)["a"].item() for _ in range(2)] == [5.0, 5.0]
    assert calls == [0, 1]


def test_the_longest_unused_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "MOST_FILES", 2)
    for k, name in enumerate(("unused", "used")):
        calibrations.kept(name, "", counted([1.0])[0])
        for path in cache.glob(f"{name}-*"):
            os.utime(path, (k, k))
    calibrations.kept("used", "", counted([1.0])[0])
    fresh, stale = cache / "fresh.part", cache / "stale.part"
    fresh.touch()
    stale.touch()
    os.utime(stale, (0, 0))
    calibrations.kept("new", "", counted([1.0])[0])
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["fresh.part", "new", "used"]
