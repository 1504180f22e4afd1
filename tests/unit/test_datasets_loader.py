"""Loader: batches are pure functions of the step, damaged samples are counted and named."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lavatar.datasets.loader import (
    BatchSampler,
    FrameBatch,
    FrameStore,
    balance_weights,
    over_white,
)
from lavatar.errors import ConfigError, ShardError

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import FACE, SIZE, flip_bytes, make_dataset, make_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset")
    make_dataset(path, frames=40, held_out=4)
    return path


def assert_same(a: FrameBatch, b: FrameBatch) -> None:
    assert a.keys == b.keys
    for name in ("image_B3HW", "mask_B1HW", "face_B3HW", "rotation_B33", "landmarks_B68x2", "index_B"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert all(torch.equal(a.expression[k], b.expression[k]) for k in a.expression)


def test_batch_holds_what_was_written(folder: Path) -> None:
    store = FrameStore(folder, 16, "train")
    batch = store.batch([3, 30])
    assert len(store) == 36
    assert batch.keys == ("00000003", "00000030")
    assert batch.image_B3HW.shape == (2, 3, 16, 16)
    assert batch.mask_B1HW.shape == (2, 1, 16, 16)
    assert batch.face_B3HW.shape == (2, 3, FACE, FACE)
    assert batch.landmarks_B68x2.shape == (2, 68, 2)
    assert batch.index_B.tolist() == [3, 30]
    assert batch.expression["jaw"].tolist() == [0.0, 1.0]
    assert torch.allclose(batch.landmarks_B68x2[0, 10], torch.tensor([10 / SIZE, 3 / SIZE]))
    image, alpha, _ = make_pictures(30)
    wanted = cv2.resize(over_white(image, alpha), (16, 16), interpolation=cv2.INTER_AREA)
    got = batch.image_B3HW[1].permute(1, 2, 0).numpy() * 255
    assert np.abs(got - wanted).mean() < 1.5
    assert store.camera.size == 16
    assert store.camera.cx == 8
    assert store.camera.focal == pytest.approx(5000 * 16 / 512)
    assert len(FrameStore(folder, 16, "eval")) == 4
    assert len(FrameStore(folder, 16, None)) == 40


def test_over_white_is_exact_at_the_ends() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    assert over_white(image, np.array([[0, 128, 255]], np.uint8))[0, :, 0].tolist() == [255, 177, 100]


@pytest.mark.parametrize("balance", [False, True])
def test_two_ranks_share_the_batch_of_one(folder: Path, balance: bool) -> None:
    one = BatchSampler(FrameStore(folder, 16), 4, seed=5, balance=balance)
    two = BatchSampler(FrameStore(folder, 16), 4, seed=5, balance=balance)
    for step in (0, 1, 7, 25):
        whole = one.batch(step)
        shares = [two.batch(step, rank, 2) for rank in (0, 1)]
        assert whole.keys == shares[0].keys + shares[1].keys
        assert torch.equal(whole.image_B3HW, torch.cat([s.image_B3HW for s in shares]))
    with pytest.raises(ConfigError, match="3 workers"):
        one.batch(0, 0, 3)


@pytest.mark.parametrize("balance", [False, True])
def test_resume_sees_what_an_uninterrupted_run_sees(folder: Path, balance: bool) -> None:
    sampler = BatchSampler(FrameStore(folder, 16), 4, seed=1, balance=balance)
    straight = [sampler.batch(step) for step in range(24)]
    resumed = BatchSampler(FrameStore(folder, 16, cache_mb=0), 4, seed=1, balance=balance)
    for step in range(15, 24):
        assert_same(straight[step], resumed.batch(step))
    other = BatchSampler(FrameStore(folder, 16), 4, seed=2, balance=balance)
    assert any(straight[s].keys != other.batch(s).keys for s in range(4))


def test_unbalanced_epoch_shows_each_frame_once(folder: Path) -> None:
    sampler = BatchSampler(FrameStore(folder, 16), 4, seed=0)
    for epoch in (0, 1):
        shown = np.concatenate([sampler.indices(epoch * 9 + s) for s in range(9)])
        assert sorted(shown.tolist()) == list(range(36))


def test_balanced_drawing_evens_out_jaw_and_blink(folder: Path) -> None:
    store = FrameStore(folder, 16)
    sampler = BatchSampler(store, 4, seed=0, balance=True)
    drawn = np.concatenate([sampler.indices(s) for s in range(500)])
    assert store.expression["jaw"].mean() < 0.12
    assert 0.2 < store.expression["jaw"][drawn].mean() < 0.6
    assert 0.2 < store.expression["blink"][drawn].mean() < 0.6
    weights = balance_weights(store.expression, len(store))
    frequency = np.bincount(drawn, minlength=len(store)) / len(drawn)
    assert np.abs(frequency - weights).max() < 0.02
    assert weights.min() > 0.25 / len(store)
    assert np.allclose(balance_weights({}, 10), 0.1)


def test_small_cache_and_pickling_change_nothing(folder: Path) -> None:
    full, none = FrameStore(folder, 16), FrameStore(folder, 16, cache_mb=0, threads=1)
    indices = [5, 1, 35, 5]
    assert_same(full.batch(indices), none.batch(indices))
    assert len(full._cache) == 3
    assert not none._cache
    small = FrameStore(folder, 16)
    small._capacity = 2
    assert_same(small.batch(indices), full.batch(indices))
    assert len(small._cache) == 2
    assert_same(pickle.loads(pickle.dumps(full)).batch(indices), full.batch(indices))
    full.close()
    assert_same(full.batch(indices), none.batch(indices))


def test_damaged_samples_are_counted_named_and_replaced(tmp_path: Path) -> None:
    make_dataset(tmp_path, frames=40, held_out=4)
    flip_bytes(tmp_path / "shard-00001.tar", "00000010.image.jpg")
    flip_bytes(tmp_path / "shard-00000.tar", "00000002.meta.json")
    store = FrameStore(tmp_path, 16, max_bad=0.1)
    assert len(store) == 35
    assert list(store.bad) == [("shard-00000.tar", "00000002")]
    at = store.keys.index("00000010")
    assert store.batch([at, at + 1]).keys == ("00000011", "00000011")
    assert "checksum" in store.bad[("shard-00001.tar", "00000010")]
    assert len(store.bad) == 2
    store.batch([at])
    assert len(store.bad) == 2  # counted once
    strict = FrameStore(tmp_path, 16, max_bad=0.03)
    with pytest.raises(ShardError, match=r"shard-00001\.tar, sample 00000010.*2 of 36"):
        strict.batch([at])
