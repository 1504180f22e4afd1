"""Head poses for a driven avatar: the actor's motion about its own mean pose, carried over to the avatar's mean pose.

A head pose is x_cam = scale · R · x_head + translation (OpenCV camera, metres). Rotations are (..., 3, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lavatar.contracts import HeadPose


@dataclass(frozen=True)
class PoseTrack:
    """Poses of N frames."""

    rotation_N33: np.ndarray
    translation_N3: np.ndarray
    scale_N: np.ndarray

    def __len__(self) -> int:
        return len(self.scale_N)

    def __getitem__(self, index: slice | np.ndarray) -> PoseTrack:
        return PoseTrack(self.rotation_N33[index], self.translation_N3[index], self.scale_N[index])

    @staticmethod
    def of(poses: Sequence[HeadPose]) -> PoseTrack:
        return PoseTrack(
            np.array([p.rotation for p in poses], float).reshape(-1, 3, 3),
            np.array([p.translation for p in poses], float).reshape(-1, 3),
            np.array([p.scale for p in poses], float),
        )

    def poses(self) -> list[HeadPose]:
        return [
            HeadPose(tuple(tuple(map(float, row)) for row in r), (float(t[0]), float(t[1]), float(t[2])), float(s))
            for r, t, s in zip(self.rotation_N33, self.translation_N3, self.scale_N, strict=True)
        ]


@dataclass(frozen=True)
class PoseStatistics:
    """Where an avatar's head was in training: the mean pose and the range of the motion about it.

    `low` and `high` bound seven numbers of the relative motion: rotation vector in head axes (3, radians),
    translation divided by the mean scale (3, head units), log of scale over mean scale.
    """

    mean: HeadPose
    low: tuple[float, ...]
    high: tuple[float, ...]

    @staticmethod
    def of(track: PoseTrack, percentile: float = 1.0) -> PoseStatistics:
        """Mean and range of a track; the outermost `percentile` % at either end count as outliers."""
        mean = mean_pose(track)
        motion_N7 = relative_motion(track, mean)
        low, high = np.percentile(motion_N7, [percentile, 100 - percentile], axis=0)
        return PoseStatistics(mean, tuple(map(float, low)), tuple(map(float, high)))


def mean_pose(track: PoseTrack) -> HeadPose:
    """Chordal mean of the rotations (nearest rotation to their average), mean translation, geometric mean scale."""
    u, _, vt = np.linalg.svd(track.rotation_N33.mean(axis=0))
    rotation = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    scale = float(np.exp(np.log(track.scale_N).mean()))
    return PoseTrack(rotation[None], track.translation_N3.mean(axis=0)[None], np.array([scale])).poses()[0]


def relative_motion(track: PoseTrack, mean: HeadPose) -> np.ndarray:
    """(N, 7) motion about `mean`, in the terms of PoseStatistics: free of the size of the head in the picture."""
    rotation = np.asarray(mean.rotation, float)
    vector_N3 = rotation_vector(np.einsum("ji,njk->nik", rotation, track.rotation_N33))
    shift_N3 = (track.translation_N3 - np.asarray(mean.translation)) / mean.scale
    size_N1 = np.log(track.scale_N / mean.scale)[:, None]
    return np.concatenate([vector_N3, shift_N3, size_N1], axis=1)


def apply_motion(motion_N7: np.ndarray, mean: HeadPose) -> PoseTrack:
    """The inverse of `relative_motion`, about another mean pose."""
    rotation_N33 = np.asarray(mean.rotation, float) @ rotation_matrix(motion_N7[:, :3])
    translation_N3 = np.asarray(mean.translation) + motion_N7[:, 3:6] * mean.scale
    return PoseTrack(rotation_N33, translation_N3, mean.scale * np.exp(motion_N7[:, 6]))


def retarget(actor: PoseTrack, actor_mean: HeadPose, avatar: PoseStatistics, smoothing: float = 0.0) -> PoseTrack:
    """Fig. 4: poses for the avatar. Smoothed in time (Gaussian, `smoothing` frames), kept in the trained range."""
    motion_N7 = smooth(relative_motion(actor, actor_mean), smoothing)
    return apply_motion(soft_clamp(motion_N7, np.asarray(avatar.low), np.asarray(avatar.high)), avatar.mean)


def smoothed(track: PoseTrack, sigma: float) -> PoseTrack:
    """The track without its jitter: each number of the motion about the mean pose, Gaussian smoothed in time."""
    if sigma <= 0:
        return track
    mean = mean_pose(track)
    return apply_motion(smooth(relative_motion(track, mean), sigma), mean)


def smooth(values_NK: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian smoothing over the frames; the ends are mirrored."""
    radius = min(int(np.ceil(3 * sigma)), len(values_NK) - 1)
    if sigma <= 0 or radius < 1:
        return values_NK
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(values_NK, ((radius, radius), (0, 0)), mode="reflect")
    return np.stack([np.convolve(padded[:, k], kernel / kernel.sum(), "valid") for k in range(values_NK.shape[1])], 1)


def soft_clamp(values_NK: np.ndarray, low_K: np.ndarray, high_K: np.ndarray, knee: float = 0.7) -> np.ndarray:
    """Unchanged within `knee` of the range, then bent towards its end, which is never passed.

    A hard clamp would freeze the head at the end of the range; the bend (tanh) keeps a little motion.
    """
    low_K, high_K = np.minimum(low_K, 0.0), np.maximum(high_K, 0.0)
    limit = np.where(values_NK >= 0, high_K, -low_K)
    start = knee * limit
    room = np.maximum(limit - start, 1e-9)
    size = np.abs(values_NK)
    bent = start + room * np.tanh(np.maximum(size - start, 0) / room)
    return np.sign(values_NK) * np.where(size <= start, size, bent)


def rotation_vector(rotation_N33: np.ndarray) -> np.ndarray:
    """Axis times angle (radians) of rotations up to π."""
    trace = np.einsum("nii->n", rotation_N33)
    angle = np.arccos(np.clip((trace - 1) / 2, -1.0, 1.0))
    skew = np.stack(
        [
            rotation_N33[:, 2, 1] - rotation_N33[:, 1, 2],
            rotation_N33[:, 0, 2] - rotation_N33[:, 2, 0],
            rotation_N33[:, 1, 0] - rotation_N33[:, 0, 1],
        ],
        axis=1,
    )
    sine = np.sin(angle)
    factor = np.where(sine > 1e-6, angle / np.maximum(2 * sine, 1e-9), 0.5)
    return skew * factor[:, None]


def rotation_matrix(vector_N3: np.ndarray) -> np.ndarray:
    """Rodrigues' formula."""
    angle = np.linalg.norm(vector_N3, axis=1)[:, None, None]
    axis = vector_N3 / np.maximum(angle[:, :, 0], 1e-12)
    cross = np.zeros((len(vector_N3), 3, 3))
    cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -axis[:, 2], axis[:, 1], -axis[:, 0]
    cross -= cross.transpose(0, 2, 1)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
