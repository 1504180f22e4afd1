"""Image metrics of sets of pictures, the face square, and the two trivial predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lavatar.datasets.loader import FrameStore
from lavatar.inference.baselines import NearestFrame, mean_frame, spread
from lavatar.inference.flicker import Flicker
from lavatar.inference.images import ImageScores, Truth, face_side, face_squares, perceptual_metric
from lavatar.models.perceptual import LPIPS
from tests.unit.dataset_files import make_dataset


def test_figures_in_closed_form() -> None:
    truth = np.full((3, 64, 64, 3), 100, np.uint8)
    result = truth.copy()
    result[:2] += 51  # 0.2 off in two of three
    landmarks = np.random.default_rng(0).uniform(0.3, 0.7, (3, 68, 2))
    scores = ImageScores(None)
    scores.add(result[:1], Truth.of(truth[:1], landmarks[:1], 24))
    scores.add(result[1:], Truth.of(truth[1:], landmarks[1:], 24))
    figures = scores.summary()
    assert figures["mse"] == pytest.approx(0.04 * 2 / 3, rel=1e-5)
    assert figures["psnr"] == pytest.approx((2 * 13.9794 + 100) / 3, rel=1e-4)  # equal pictures count as 100 dB
    assert figures["lpips"] is None
    assert figures["face"]["mse"] == pytest.approx(figures["mse"], rel=1e-5)
    third = np.sqrt(2) / 3  # deviation of two ones and a nought
    assert figures["spread"]["mse"] == pytest.approx(0.04 * third, rel=1e-5)
    assert figures["spread"]["psnr"] == pytest.approx((100 - 13.9794) * third, rel=1e-4)
    assert figures["face"]["spread"]["lpips"] is None
    assert scores.frames()["mse"] == pytest.approx([0.04, 0.04, 0], rel=1e-5)


def test_flicker_is_the_change_that_the_truth_does_not_have() -> None:
    """The truth moves, the result moves with it and jumps by 6 once, inside the face square and outside."""
    truth = np.stack([np.full((40, 40, 3), 100 + 5 * t, np.uint8) for t in range(6)])
    result = truth + 20  # a constant error does not flicker
    result[3:] -= 6
    landmarks = np.full((6, 68, 2), 0.5)
    for cuts in ((6,), (3, 6), (1, 4, 6)):  # however the batches fall
        flicker, start = Flicker(), 0
        for end in cuts:
            part = slice(start, end)
            flicker.add(result[part], truth[part], landmarks[part], 16, np.arange(10, 16)[part])
            start = end
        assert flicker.values == [0, 0, 6, 0, 0]
        assert flicker.mean() == pytest.approx(1.2)
        assert flicker.spread() == pytest.approx(2.4)


def test_flicker_sees_neighbours_in_the_video_and_the_face_only() -> None:
    truth = np.full((4, 40, 40, 3), 100, np.uint8)
    result = truth.copy()
    result[1, :10] = 0  # far from the square
    result[2] += 50
    landmarks = np.full((4, 68, 2), 0.6)
    flicker = Flicker()
    flicker.add(result, truth, landmarks, 16, np.array([0, 1, 3, 4]))  # 2 was dropped
    assert flicker.values == [0, 50]
    subsampled = Flicker()
    subsampled.add(result, truth, landmarks, 16, np.array([0, 3, 6, 9]))
    assert subsampled.mean() is None
    assert subsampled.spread() is None


def test_face_figures_see_the_face_only() -> None:
    truth = np.full((1, 64, 64, 3), 200, np.uint8)
    landmarks = np.random.default_rng(0).uniform(0.4, 0.6, (1, 68, 2))
    side = face_side(landmarks, 64)
    wrong_outside = truth.copy()
    wrong_outside[:, :10] = 0
    scores = ImageScores(None)
    scores.add(wrong_outside, Truth.of(truth, landmarks, side))
    figures = scores.summary()
    assert figures["face"]["mse"] == 0
    assert figures["mse"] > 0.05


def test_face_squares_stay_inside() -> None:
    images = np.arange(2 * 40 * 40 * 3).reshape(2, 40, 40, 3).astype(np.uint8)
    corner = np.full((1, 68, 2), 0.01)
    squares = face_squares(images[:1], corner, 16)
    assert np.array_equal(squares[0], images[0, :16, :16])
    assert face_side(np.full((1, 68, 2), 0.5), 40) == 16
    assert face_side(np.array([[[0.0, 0.0], [1.0, 1.0]]]), 40) == 40


def test_lpips_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    metric, note = perceptual_metric()
    assert metric is None
    assert "lavatar weights fetch" in note


def test_lpips_grows_with_the_difference(weights: Path) -> None:
    metric, note = perceptual_metric()
    assert note == ""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    near = np.clip(truth.astype(int) + rng.integers(-5, 6, truth.shape), 0, 255).astype(np.uint8)
    landmarks = rng.uniform(0.3, 0.7, (2, 68, 2))
    figures = {}
    for name, result in (("same", truth), ("near", near), ("far", 255 - truth)):
        scores = ImageScores(metric)
        scores.add(result, Truth.of(truth, landmarks, 32))  # a face smaller than AlexNet takes
        figures[name] = scores.summary()
    assert figures["same"]["lpips"] == pytest.approx(0, abs=1e-6)
    assert 0 < figures["near"]["lpips"] < figures["far"]["lpips"]
    assert 0 < figures["near"]["face"]["lpips"] < figures["far"]["face"]["lpips"]


def test_features_of_the_truth_are_computed_once(weights: Path) -> None:
    metric, _ = perceptual_metric()
    assert metric is not None
    plain = LPIPS(load_file(weights / "lpips_alexnet.safetensors"), "alex")
    a, b, c = torch.rand(3, 2, 3, 64, 64)
    assert torch.equal(metric(a, b), plain(a, b))
    first = metric.features(a)
    assert torch.equal(metric(a, c), plain(a, c))
    assert metric.features(a) is first
    assert len(metric.seen) <= 3


def test_spread() -> None:
    assert spread(5, 0).tolist() == [0, 1, 2, 3, 4]
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 3).tolist() == [0, 50, 100]


def test_trivial_predictions(tmp_path: Path) -> None:
    make_dataset(tmp_path, frames=20, held_out=4)
    train = FrameStore(tmp_path, 48, "train")
    images = np.stack([train.frame(i).image for i in range(len(train))]).astype(float)
    assert np.abs(mean_frame(train) - images.mean(axis=0)).max() <= 0.5
    rng = np.random.default_rng(0)
    train.landmarks_N68x2 = rng.uniform(0, 1, (len(train), 68, 2)).astype(np.float32)
    nearest = NearestFrame.over(train, 100)
    wanted = np.array([3, 11, 0])
    noisy = train.landmarks_N68x2[wanted] + rng.normal(size=(3, 68, 2)) * 0.01
    assert nearest.find(noisy).tolist() == wanted.tolist()
    assert np.array_equal(nearest.images(noisy)[1], train.frame(11).image)
    assert set(NearestFrame.over(train, 4).find(noisy)) <= {0, 5, 10, 15}
