"""Poses carried from an actor to an avatar: rotations, ranges, smoothing."""

from __future__ import annotations

import numpy as np
import pytest

from lavatar.contracts import HeadPose
from lavatar.inference.retarget import (
    PoseStatistics,
    PoseTrack,
    apply_motion,
    mean_pose,
    relative_motion,
    retarget,
    rotation_matrix,
    rotation_vector,
    smooth,
    smoothed,
    soft_clamp,
)

FRONTAL = HeadPose(((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)), (0.05, -0.02, 4.0), 0.1)
_TURN = np.array(FRONTAL.rotation) @ rotation_matrix(np.array([[0.1, 0.4, -0.2]]))[0]
TURNED = HeadPose(tuple(tuple(row) for row in _TURN.tolist()), (-0.1, 0.2, 4.0), 0.14)


def motion(count: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 7)) * (0.1, 0.2, 0.05, 0.2, 0.1, 0.1, 0.03)


def test_rotation_vectors_go_there_and_back() -> None:
    vectors = np.random.default_rng(1).uniform(-1.7, 1.7, (100, 3))  # angles below π
    matrices = rotation_matrix(vectors)
    assert np.allclose(matrices @ matrices.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(matrices), 1)
    assert np.allclose(rotation_vector(matrices), vectors, atol=1e-9)
    quarter = rotation_matrix(np.array([[0.0, np.pi / 2, 0.0]]))[0]
    assert np.allclose(quarter @ [0, 0, 1], [1, 0, 0])


def test_motion_goes_there_and_back() -> None:
    track = apply_motion(motion(), TURNED)
    assert np.allclose(relative_motion(track, TURNED), motion(), atol=1e-12)
    assert np.allclose(PoseTrack.of(track.poses()).rotation_N33, track.rotation_N33)


def test_mean_pose_is_the_middle() -> None:
    moves = motion()
    track = apply_motion(np.concatenate([moves, -moves]), TURNED)  # symmetrical about TURNED
    mean = mean_pose(track)
    assert np.allclose(mean.rotation, TURNED.rotation, atol=2e-3)
    assert np.allclose(mean.translation, TURNED.translation, atol=1e-12)
    assert mean.scale == pytest.approx(TURNED.scale)


def test_the_actors_motion_arrives_at_the_avatar() -> None:
    """Inside the trained range the same turn, and shifts in units of the avatar's head, not of the actor's picture."""
    statistics = PoseStatistics(FRONTAL, (-2.0,) * 7, (2.0,) * 7)
    moves = motion()
    driven = retarget(apply_motion(moves, TURNED), TURNED, statistics)
    assert np.allclose(relative_motion(driven, FRONTAL), moves, atol=1e-9)


def test_nothing_leaves_the_trained_range() -> None:
    statistics = PoseStatistics.of(apply_motion(motion() * 0.3, FRONTAL))
    driven = retarget(apply_motion(motion() * 5, TURNED), TURNED, statistics)
    moves = relative_motion(driven, statistics.mean)
    assert (moves <= np.array(statistics.high) + 1e-9).all()
    assert (moves >= np.array(statistics.low) - 1e-9).all()
    assert moves[:, 1].std() > 0.02  # and it still moves


def test_soft_clamp() -> None:
    values = np.linspace(-3, 3, 601)[:, None]
    low, high = np.array([-0.5]), np.array([1.0])
    bent = soft_clamp(values, low, high)
    inside = (values >= -0.35) & (values <= 0.7)
    assert np.allclose(bent[inside], values[inside])
    assert (np.diff(bent[:, 0]) >= 0).all()
    assert bent.min() >= -0.5
    assert bent.max() <= 1.0


def test_smoothing() -> None:
    steady = np.tile(np.arange(7.0), (20, 1))
    assert np.allclose(smooth(steady, 2.0), steady)
    noise = np.random.default_rng(0).normal(size=(200, 7))
    assert smooth(noise, 2.0).std() < 0.5 * noise.std()
    assert np.array_equal(smooth(noise[:1], 2.0), noise[:1])
    assert np.array_equal(smooth(noise, 0.0), noise)


def test_a_head_that_shakes_from_frame_to_frame_stands_still_when_smoothed() -> None:
    """An alternation stays one, times the kernel's sum with alternating signs: near exp(−π²σ²/2)."""
    sign = (-1.0) ** np.arange(40)
    shaking = apply_motion(sign[:, None] * np.array([0.0, 0.1, 0.0, 0.3, 0.0, 0.0, 0.02]), FRONTAL)
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2.0)
    left = (kernel * (-1.0) ** np.arange(-3, 4)).sum() / kernel.sum()
    found = relative_motion(smoothed(shaking, 1.0), FRONTAL)
    assert np.allclose(found, relative_motion(shaking, FRONTAL) * left, atol=1e-6)
    assert 0 < abs(left) < 0.02
    assert smoothed(shaking, 0.0) is shaking
