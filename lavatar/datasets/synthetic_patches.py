"""Patches of a synthetic head in head space, and the regression that reads them.

Around the eyes, the brows and the mouth the picture is sampled on a plane in head space, so that the pose of the head
is taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from lavatar.contracts import Camera, HeadPose
from lavatar.datasets.synthetic import project

SIDE = 128  # pictures are brought to this side before they are measured
WIDTH = 2.5  # of the kernel, in median distances


@dataclass(frozen=True)
class Region:
    """A rectangle in head space at depth z, sampled on a grid."""

    x: tuple[float, float]
    y: tuple[float, float]
    z: float
    grid: tuple[int, int]  # columns, rows


@dataclass(frozen=True)
class Group:
    """Regions from which the same measures and landmarks are read, and how firmly the regression of the measures is
    held."""

    regions: tuple[Region, ...]
    landmarks: tuple[tuple[int, ...], ...]  # of the 68, those that lie in each region
    names: tuple[str, ...]
    ridge: float


GROUPS = (
    Group(
        (
            Region((-0.62, -0.07), (-0.06, 0.30), 0.58, (22, 14)),
            Region((0.07, 0.62), (-0.06, 0.30), 0.58, (22, 14)),
        ),
        (tuple(range(36, 42)), tuple(range(42, 48))),
        ("blink", "gaze"),
        1e-2,
    ),
    Group(
        (
            Region((-0.66, -0.02), (0.26, 0.76), 0.66, (16, 20)),
            Region((0.02, 0.66), (0.26, 0.76), 0.66, (16, 20)),
        ),
        (tuple(range(17, 22)), tuple(range(22, 27))),
        ("brows",),
        2e-3,
    ),
    Group(
        (Region((-0.56, 0.56), (-1.34, -0.26), 0.66, (26, 26)),),
        (tuple(range(48, 68)),),
        ("jaw", "smile", "pucker"),
        3e-4,
    ),
)


@dataclass(frozen=True)
class Regression:
    """Kernel ridge: Σ_i k(x, x_i) w_i."""

    mean: np.ndarray
    samples_ND: np.ndarray
    weights_NK: np.ndarray
    gamma: float

    @staticmethod
    def fit(features_ND: np.ndarray, values_NK: np.ndarray, ridge: float) -> Regression:
        distances = _squared(features_ND, features_ND)
        gamma = 1.0 / (WIDTH**2 * float(np.median(distances)))
        kernel = np.exp(-gamma * distances)
        kernel[np.diag_indices_from(kernel)] += ridge
        mean = values_NK.mean(0)
        return Regression(mean, features_ND, np.linalg.solve(kernel, values_NK - mean), gamma)

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], prefix: str) -> Regression:
        """The inverse of `arrays`, whose names begin with `prefix`."""
        mean, samples, weights, gamma = (arrays[prefix + name] for name in ("mean", "samples", "weights", "gamma"))
        return Regression(mean, samples, weights, float(gamma[0]))

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it is, as arrays by name."""
        gamma = np.array([self.gamma])
        return {"mean": self.mean, "samples": self.samples_ND, "weights": self.weights_NK, "gamma": gamma}

    def __call__(self, features_BD: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-self.gamma * _squared(features_BD, self.samples_ND)) @ self.weights_NK + self.mean)


def _squared(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Squared distances, N×M."""
    squares = (a_ND**2).sum(1)[:, None] + (b_MD**2).sum(1)[None, :] - 2 * a_ND @ b_MD.T
    return np.maximum(squares, 0.0)


def scaled(camera: Camera) -> Camera:
    ratio = SIDE / camera.size
    return Camera(camera.focal * ratio, camera.cx * ratio, camera.cy * ratio, SIDE)


def bring(image_hwc: np.ndarray) -> np.ndarray:
    """uint8 of any side → float32 in [0, 1] of SIDE."""
    picture = image_hwc.astype(np.float32) / 255
    if picture.shape[0] == SIDE:
        return picture
    method = cv2.INTER_AREA if picture.shape[0] > SIDE else cv2.INTER_CUBIC
    return cv2.resize(picture, (SIDE, SIDE), interpolation=method)


def features(picture: np.ndarray, pose: HeadPose, camera: Camera, group: Group) -> np.ndarray:
    """The patches of a group as one row."""
    return np.concatenate([patch(picture, pose, camera, region).ravel() for region in group.regions])


def patch(picture: np.ndarray, pose: HeadPose, camera: Camera, region: Region) -> np.ndarray:
    """The picture sampled on the region's plane in head space: rows from its top, softened a little."""
    transform = to_grid(pose, camera, region)
    columns, rows = region.grid
    transform[:, 2] += transform[:, :2].sum(1) * 0.5 - 0.5  # OpenCV counts from pixel centres
    soft = cv2.GaussianBlur(picture, (0, 0), 0.7)
    return cv2.warpAffine(soft, transform, (columns, rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def to_grid(pose: HeadPose, camera: Camera, region: Region) -> np.ndarray:
    """2×3: pixels of the picture (continuous, first centre at 0.5) → columns and rows of the region's grid."""
    left, right, bottom, top = *region.x, *region.y
    corners = np.array(((left, top, region.z), (right, top, region.z), (left, bottom, region.z)))
    columns, rows = region.grid
    target = np.array(((0, 0), (columns, 0), (0, rows)), np.float32)
    return np.asarray(cv2.getAffineTransform(project(corners, pose, camera).astype(np.float32), target))
