"""Checkpoints: whole or not at all, damaged ones skipped, a full disk leaves the older ones intact."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lavatar.errors import CheckpointError, StorageError
from lavatar.training.checkpoint import MARKER, Checkpoint, latest, load, save
from lavatar.training.rng import rng_state, set_rng_state, untouched_rng


def _checkpoint(step: int, size: int = 100) -> Checkpoint:
    values = torch.arange(size, dtype=torch.float32) + step
    return Checkpoint(
        step,
        {"net.weight": values, "net.count": torch.tensor(7), "half": torch.ones(3, dtype=torch.bfloat16)},
        {"exp_avg/net.weight": values / 3, "exp_avg_sq/net.weight": values**2, "step/net.weight": torch.tensor(2.0)},
        {"torch/0": torch.get_rng_state()},
        {"extra": torch.tensor([step])},
        {"world": 2, "config": {"steps": 5}},
    )


def test_what_is_saved_is_what_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, _checkpoint(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    path, damaged = latest(tmp_path)
    assert path is not None
    assert not damaged
    found, wanted = load(path), _checkpoint(30)
    assert (found.step, found.info) == (30, {"world": 2, "config": {"steps": 5}})
    for ours, theirs in ((found.modules, wanted.modules), (found.optimizer, wanted.optimizer), (found.rng, wanted.rng)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert found.modules["half"].dtype == torch.bfloat16
    assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".safetensors", ".json", "")]


@pytest.mark.parametrize("harm", ["flip", "truncate", "unlink", "no marker", "bad marker", "empty"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, harm: str) -> None:
    save(tmp_path, _checkpoint(1))
    newest = save(tmp_path, _checkpoint(2))
    file = newest / "optimizer.safetensors"
    if harm == "flip":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif harm == "unlink":
        file.unlink()
    elif harm == "no marker":
        (newest / MARKER).unlink()
    elif harm == "bad marker":
        (newest / MARKER).write_text("{")
    else:
        (newest / MARKER).write_text(json.dumps({"files": None}))
    path, damaged = latest(tmp_path)
    assert path is not None
    assert path.name == "step-00000001"
    assert [bad.folder for bad in damaged] == [newest]
    assert damaged[0].reason
    save(tmp_path, _checkpoint(2))  # written anew in the same place
    assert latest(tmp_path) == (newest, [])


def test_no_folder_is_no_checkpoint_and_a_strange_one_an_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") == (None, [])
    path = save(tmp_path, _checkpoint(1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="another format"):
        load(path)


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """No file of this process may grow past 64 KiB: writing more fails in the kernel (EFBIG)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_write_that_fails_in_the_kernel_keeps_the_older_one(tmp_path: Path, file_size_limit: None) -> None:
    save(tmp_path, _checkpoint(1))
    with pytest.raises(StorageError, match="step-00000002") as caught:
        save(tmp_path, _checkpoint(2, size=100_000))
    assert "Free some space" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    path, damaged = latest(tmp_path)
    assert path is not None
    assert load(path).step == 1
    assert not damaged


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs the right to mount: the file size limit above covers the rest")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_older_one(small_disk: Path) -> None:
    save(small_disk, _checkpoint(1, size=5000))
    with pytest.raises(StorageError, match="No space left"):
        save(small_disk, _checkpoint(2, size=50_000))
    path, damaged = latest(small_disk)
    assert path is not None
    assert load(path).step == 1
    assert not damaged
    (small_disk / "fill").write_bytes(b"0" * (110 * 1024))
    with pytest.raises(StorageError, match="No space left"):
        save(small_disk, _checkpoint(2, size=5000))
    assert latest(small_disk) == (path, [])


def test_every_generator_comes_back() -> None:
    cpu = torch.device("cpu")
    np.random.seed(3)
    np.random.normal()  # leaves half a Box-Muller pair behind
    state = rng_state(cpu)

    def draw() -> tuple[float, float, float]:
        import random

        return float(torch.rand(1)), float(np.random.normal()), random.gauss(0, 1)

    with untouched_rng(cpu):
        first = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] == first
    set_rng_state(state, cpu)
    assert [draw() for _ in range(3)] == first
