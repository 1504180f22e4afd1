"""Design section 8: the expression of a synthetic subject, measured on a picture without access to the truth.

For one identity a few hundred renders with random expressions and poses are drawn. Around the eyes, the brows and the
mouth, patches are sampled on a plane in head space, so that the pose of the head is taken out, and kernel ridge
regression learns the six measures from the patches. Three in four samples are blurred, noisy and a little off in colour
and place, as a neural rendering is, so that a soft picture is measured fairly. The same identity gives the same meter.
Gaze behind lids that are more than half closed cannot be seen: there it is nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from lavatar.contracts import EXPRESSIONS, Camera, FrameMeta, HeadPose
from lavatar.datasets.synthetic import default_camera, default_pose, project, render
from lavatar.datasets.synthetic_head import Expression, Identity

SIDE = 128  # pictures are brought to this side before they are measured
RENDERS = 220
COPIES = 4  # of each render: one as it is, the others degraded
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
    """Regions from which the same measures are read, and how firmly the regression is held."""

    regions: tuple[Region, ...]
    names: tuple[str, ...]
    ridge: float


GROUPS = (
    Group(
        (
            Region((-0.62, -0.07), (-0.06, 0.30), 0.58, (22, 14)),
            Region((0.07, 0.62), (-0.06, 0.30), 0.58, (22, 14)),
        ),
        ("blink", "gaze"),
        1e-2,
    ),
    Group(
        (
            Region((-0.66, -0.02), (0.26, 0.76), 0.66, (16, 20)),
            Region((0.02, 0.66), (0.26, 0.76), 0.66, (16, 20)),
        ),
        ("brows",),
        2e-3,
    ),
    Group((Region((-0.56, 0.56), (-1.34, -0.26), 0.66, (26, 26)),), ("jaw", "smile", "pucker"), 3e-4),
)


@dataclass(frozen=True)
class _Regression:
    """Kernel ridge: Σ_i k(x, x_i) w_i."""

    mean: np.ndarray
    samples_ND: np.ndarray
    weights_NK: np.ndarray
    gamma: float

    @staticmethod
    def fit(features_ND: np.ndarray, values_NK: np.ndarray, ridge: float) -> _Regression:
        distances = _squared(features_ND, features_ND)
        gamma = 1.0 / (WIDTH**2 * float(np.median(distances)))
        kernel = np.exp(-gamma * distances)
        kernel[np.diag_indices_from(kernel)] += ridge
        mean = values_NK.mean(0)
        return _Regression(mean, features_ND, np.linalg.solve(kernel, values_NK - mean), gamma)

    def __call__(self, features_BD: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-self.gamma * _squared(features_BD, self.samples_ND)) @ self.weights_NK + self.mean)


def _squared(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Squared distances, N×M."""
    squares = (a_ND**2).sum(1)[:, None] + (b_MD**2).sum(1)[None, :] - 2 * a_ND @ b_MD.T
    return np.maximum(squares, 0.0)


class SyntheticMeter:
    """ExpressionMeter of one synthetic identity; calibrated at the first use, once a process."""

    note = ""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        """uint8 RGB over white → each of EXPRESSIONS, B. Poses come from the metas, else they are estimated."""
        model = _calibrate(self.identity)
        pictures = [_bring(image) for image in images_BHW3]
        if metas is None:
            poses = [_pose(*values) for values in model.pose(np.stack([_overview(p) for p in pictures]))]
            cameras = [default_camera(SIDE)] * len(poses)
        else:
            poses = [meta.pose for meta in metas]
            cameras = [_scaled(meta.camera) for meta in metas]
        found: dict[str, np.ndarray] = {}
        for group, regression in zip(GROUPS, model.groups, strict=True):
            features = [_features(*item, group) for item in zip(pictures, poses, cameras, strict=True)]
            for name, values in zip(group.names, regression(np.stack(features)).T, strict=True):
                found[name] = values
        found["gaze"] = np.where(found["blink"] > 0.5, np.nan, found["gaze"])
        return {name: found[name] for name in EXPRESSIONS}


@dataclass(frozen=True)
class _Model:
    groups: tuple[_Regression, ...]
    pose: _Regression


@lru_cache(maxsize=8)
def _calibrate(identity: Identity) -> _Model:
    """Draw the renders, degrade copies, fit a regression for each group of regions and one for the pose."""
    rng = np.random.default_rng((identity.seed, 81))
    camera = default_camera(SIDE)
    values: list[list[float]] = []
    turns: list[np.ndarray] = []
    features: list[list[np.ndarray]] = [[] for _ in GROUPS]
    overviews: list[np.ndarray] = []
    for _ in range(RENDERS):
        expression, turn = _random_expression(rng), rng.uniform(-1, 1, 5) * (17.0, 9.5, 7.0, 0.010, 0.010)
        pose = _pose(*turn)
        rgb, _, _ = render(identity, expression, pose, camera)
        for copy in range(COPIES):
            picture, seen = _degrade(rgb, pose, turn, rng) if copy else (rgb, pose)
            values.append([getattr(expression, name) for name in EXPRESSIONS])
            turns.append(turn)
            overviews.append(_overview(picture))
            for group, rows in zip(GROUPS, features, strict=True):
                rows.append(_features(picture, seen, camera, group))
    table = np.array(values)
    groups = tuple(
        _Regression.fit(np.stack(rows), table[:, [EXPRESSIONS.index(name) for name in group.names]], group.ridge)
        for group, rows in zip(GROUPS, features, strict=True)
    )
    return _Model(groups, _Regression.fit(np.stack(overviews), np.stack(turns), 2e-3))


def _random_expression(rng: np.random.Generator) -> Expression:
    """Independent parts; extremes more often than chance would have them, since regressions shrink there."""

    def one(low: float = 0.0) -> float:
        kind = rng.random()
        return 1.0 if kind < 0.12 else 0.0 if kind < 0.24 else float(rng.uniform(low, 1.0))

    def both() -> float:
        return float(np.clip(rng.uniform(-1.15, 1.15), -1, 1))

    jaw = one()
    blink = 1.0 if (kind := rng.random()) < 0.15 else 0.0 if kind < 0.55 else float(rng.uniform(0, 1))
    tongue = one() * min(1.0, 0.25 + 1.5 * jaw) if rng.random() < 0.6 else 0.0
    return Expression(jaw, one(), one(), both(), blink, both(), both(), tongue)


def _degrade(
    rgb: np.ndarray, pose: HeadPose, turn: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, HeadPose]:
    """A softer, noisier picture whose colours and pose are a little off, as a neural rendering's are."""
    soft = cv2.GaussianBlur(rgb, (0, 0), float(rng.uniform(0.4, 1.6)))
    gain, offset = rng.uniform(0.95, 1.05, 3), rng.uniform(-0.03, 0.03, 3)
    noisy = soft * gain + offset + rng.normal(0, rng.uniform(0, 0.02), rgb.shape)
    nudged = _pose(*(turn + rng.normal(0, 1, 5) * (0.8, 0.8, 0.4, 0.0008, 0.0008)))
    return np.clip(noisy, 0, 1).astype(np.float32), nudged


def _pose(yaw: float, pitch: float, roll: float, x: float, y: float) -> HeadPose:
    return default_pose(float(yaw), float(pitch), float(roll), float(x), float(y))


def _scaled(camera: Camera) -> Camera:
    ratio = SIDE / camera.size
    return Camera(camera.focal * ratio, camera.cx * ratio, camera.cy * ratio, SIDE)


def _bring(image_hwc: np.ndarray) -> np.ndarray:
    """uint8 of any side → float32 in [0, 1] of SIDE."""
    picture = image_hwc.astype(np.float32) / 255
    if picture.shape[0] == SIDE:
        return picture
    method = cv2.INTER_AREA if picture.shape[0] > SIDE else cv2.INTER_CUBIC
    return cv2.resize(picture, (SIDE, SIDE), interpolation=method)


def _overview(picture: np.ndarray) -> np.ndarray:
    """The whole picture, small: enough to see how the head is turned."""
    return cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA).mean(2).ravel()


def _features(picture: np.ndarray, pose: HeadPose, camera: Camera, group: Group) -> np.ndarray:
    """The patches of a group as one row."""
    return np.concatenate([_patch(picture, pose, camera, region).ravel() for region in group.regions])


def _patch(picture: np.ndarray, pose: HeadPose, camera: Camera, region: Region) -> np.ndarray:
    """The picture sampled on the region's plane in head space: rows from its top, softened a little."""
    left, right, bottom, top = *region.x, *region.y
    corners = np.array(((left, top, region.z), (right, top, region.z), (left, bottom, region.z)))
    columns, rows = region.grid
    target = np.array(((0, 0), (columns, 0), (0, rows)), np.float32)
    transform = cv2.getAffineTransform(project(corners, pose, camera).astype(np.float32), target)
    transform[:, 2] += transform[:, :2].sum(1) * 0.5 - 0.5  # OpenCV counts from pixel centres
    soft = cv2.GaussianBlur(picture, (0, 0), 0.7)
    return cv2.warpAffine(soft, transform, (columns, rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
