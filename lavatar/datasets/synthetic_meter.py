"""Design section 8: the expression of a synthetic subject, measured on a picture without access to the truth.

For one identity a few hundred renders with random expressions and poses are drawn, and kernel ridge regression learns
the six measures from patches around the eyes, the brows and the mouth (synthetic_patches). Three in four samples are
blurred, noisy and a little off in colour and place, as a neural rendering is, so that a soft picture is measured
fairly. The same identity gives the same meter. Gaze behind lids that are more than half closed cannot be seen: there
it is nan.

Landmarks are read from the same patches by regressions of their own, of samples that are off by up to two pixels: a
mouth in the wrong place must be seen there. Jaw line and nose are the head's at rest under the pose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from lavatar.contracts import EXPRESSIONS, Camera, FrameMeta, HeadPose
from lavatar.datasets import calibrations
from lavatar.datasets.crops import apply, invert
from lavatar.datasets.sight import Sight
from lavatar.datasets.synthetic import default_camera, default_pose, project, render
from lavatar.datasets.synthetic_head import Expression, Face, Identity
from lavatar.datasets.synthetic_landmarks import landmarks
from lavatar.datasets.synthetic_patches import GROUPS, SIDE, Group, Regression, bring, features, scaled, to_grid

RENDERS = 220
COPIES = 4  # of each render: one as it is, the others degraded
BLUR = (0.4, 1.6)  # of the degraded copies, deviation in pixels of SIDE
NUDGE = (0.8, 0.8, 0.4, 0.0008, 0.0008)  # deviation of their pose: degrees, metres

LANDMARK_COPIES = 6  # all degraded
LANDMARK_BLUR = (0.2, 1.6)
LANDMARK_SHIFT = 0.006  # metres at most: 1.9 pixels of SIDE to either side
LANDMARK_RIDGE = 1e-3


class SyntheticMeter:
    """ExpressionMeter of one synthetic identity; calibrated at the first use, once a user (calibrations)."""

    note = ""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        """uint8 RGB over white → each of EXPRESSIONS, B. Poses come from the metas, else they are estimated."""
        model = _calibrate(self.identity)
        return self._measures(model, self._views(model, images_BHW3, metas))

    def look(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> Sight:
        """The same measures, and the 68 landmarks."""
        model = _calibrate(self.identity)
        views = self._views(model, images_BHW3, metas)
        rest_68x3 = landmarks(Face.of(self.identity, Expression()))
        points_B68x2 = np.stack([project(rest_68x3, view.pose, view.camera) for view in views])
        for group, regression in zip(GROUPS, model.landmarks, strict=True):
            for points_68x2, view, values in zip(points_B68x2, views, regression(_rows(views, group)), strict=True):
                _from_grid(values, view, group, points_68x2)
        return Sight(self._measures(model, views), points_B68x2 / SIDE)

    @staticmethod
    def _views(model: _Model, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None) -> list[_View]:
        pictures = [bring(image) for image in images_BHW3]
        if metas is None:
            turns = model.pose(np.stack([_overview(picture) for picture in pictures]))
            camera = default_camera(SIDE)
            return [_View(p, _pose(*turn), camera) for p, turn in zip(pictures, turns, strict=True)]
        return [_View(p, meta.pose, scaled(meta.camera)) for p, meta in zip(pictures, metas, strict=True)]

    @staticmethod
    def _measures(model: _Model, views: Sequence[_View]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for group, regression in zip(GROUPS, model.groups, strict=True):
            found |= zip(group.names, regression(_rows(views, group)).T, strict=True)
        found["gaze"] = np.where(found["blink"] > 0.5, np.nan, found["gaze"])
        return {name: found[name] for name in EXPRESSIONS}


@dataclass(frozen=True)
class _View:
    """A picture of SIDE with the pose and the camera it is taken to have been drawn under."""

    picture: np.ndarray
    pose: HeadPose
    camera: Camera


@dataclass(frozen=True)
class _Drawn:
    """A render of the calibration: turn as `_pose` takes it, exact landmarks in pixels of SIDE, it and its copies."""

    expression: Expression
    turn: np.ndarray
    landmarks_68x2: np.ndarray
    views: tuple[_View, ...]


@dataclass(frozen=True)
class _Model:
    groups: tuple[Regression, ...]
    pose: Regression
    landmarks: tuple[Regression, ...]


def _rows(views: Sequence[_View], group: Group) -> np.ndarray:
    """The patches of a group, a row a view."""
    return np.stack([features(view.picture, view.pose, view.camera, group) for view in views])


@lru_cache(maxsize=8)
def _calibrate(identity: Identity) -> _Model:
    """The regressions of an identity, by way of the user's cache."""

    def fit() -> dict[str, np.ndarray]:
        drawn = tuple(_draw(identity))
        fitted = (*_fit_measures(drawn), *_fit_landmarks(identity, drawn))
        return {f"{k}.{part}": array for k, one in enumerate(fitted) for part, array in one.arrays().items()}

    arrays = calibrations.kept("meter", repr(identity), fit)
    *measures, pose = (Regression.of(arrays, f"{k}.") for k in range(len(GROUPS) + 1))
    points = (Regression.of(arrays, f"{k}.") for k in range(len(GROUPS) + 1, 2 * len(GROUPS) + 1))
    return _Model(tuple(measures), pose, tuple(points))


def _draw(identity: Identity) -> Iterator[_Drawn]:
    """The renders of the calibration, each with its degraded copies."""
    rng = np.random.default_rng((identity.seed, 81))
    camera = default_camera(SIDE)
    for _ in range(RENDERS):
        expression, turn = _random_expression(rng), rng.uniform(-1, 1, 5) * (17.0, 9.5, 7.0, 0.010, 0.010)
        pose = _pose(*turn)
        rgb, _, points = render(identity, expression, pose, camera)
        copies = [_View(*_degrade(rgb, turn, rng), camera) for _ in range(1, COPIES)]
        yield _Drawn(expression, turn, points, (_View(rgb, pose, camera), *copies))


def _fit_measures(drawn: Sequence[_Drawn]) -> tuple[Regression, ...]:
    """One regression a group, then the pose's."""
    views = [view for each in drawn for view in each.views]
    table = np.array([[getattr(each.expression, name) for name in EXPRESSIONS] for each in drawn for _ in each.views])
    groups = [
        Regression.fit(_rows(views, group), table[:, [EXPRESSIONS.index(n) for n in group.names]], group.ridge)
        for group in GROUPS
    ]
    overviews = np.stack([_overview(view.picture) for view in views])
    turns = np.stack([each.turn for each in drawn for _ in each.views])
    return (*groups, Regression.fit(overviews, turns, 2e-3))


def _fit_landmarks(identity: Identity, drawn: Sequence[_Drawn]) -> tuple[Regression, ...]:
    """For each group, of the places of its landmarks on the grids of its regions; from the same renders."""
    rng = np.random.default_rng((identity.seed, 82))
    camera = default_camera(SIDE)
    views: list[_View] = []
    places: list[list[np.ndarray]] = [[] for _ in GROUPS]
    for each in drawn:
        rgb = (each.views[0].picture * 255).round().astype(np.uint8).astype(np.float32) / 255
        for _ in range(LANDMARK_COPIES):
            turn = each.turn + np.append(np.zeros(3), rng.uniform(-LANDMARK_SHIFT, LANDMARK_SHIFT, 2))
            view = _View(*_degrade(rgb, turn, rng, LANDMARK_BLUR), camera)
            views.append(view)
            for group, rows in zip(GROUPS, places, strict=True):
                rows.append(_on_grid(each.landmarks_68x2, view, group))
    return tuple(
        Regression.fit(_rows(views, group), np.stack(rows), LANDMARK_RIDGE)
        for group, rows in zip(GROUPS, places, strict=True)
    )


def _on_grid(points_68x2: np.ndarray, view: _View, group: Group) -> np.ndarray:
    """A group's landmarks in columns and rows of their regions' grids, as one row."""
    parts = zip(group.regions, group.landmarks, strict=True)
    grids = [apply(to_grid(view.pose, view.camera, region), points_68x2[list(own)]) for region, own in parts]
    return np.concatenate(grids).ravel()


def _from_grid(values: np.ndarray, view: _View, group: Group, points_68x2: np.ndarray) -> None:
    """The inverse of `_on_grid`, written into `points_68x2`."""
    places, start = values.reshape(-1, 2), 0
    for region, own in zip(group.regions, group.landmarks, strict=True):
        part = places[start : start + len(own)]
        points_68x2[list(own)] = apply(invert(to_grid(view.pose, view.camera, region)), part)
        start += len(own)


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
    rgb: np.ndarray, turn: np.ndarray, rng: np.random.Generator, blur: tuple[float, float] = BLUR
) -> tuple[np.ndarray, HeadPose]:
    """A softer, noisier picture whose colours and pose are a little off, as a neural rendering's are."""
    soft = cv2.GaussianBlur(rgb, (0, 0), float(rng.uniform(*blur)))
    gain, offset = rng.uniform(0.95, 1.05, 3), rng.uniform(-0.03, 0.03, 3)
    noisy = soft * gain + offset + rng.normal(0, rng.uniform(0, 0.02), rgb.shape)
    nudged = _pose(*(turn + rng.normal(0, 1, 5) * NUDGE))
    return np.clip(noisy, 0, 1).astype(np.float32), nudged


def _pose(yaw: float, pitch: float, roll: float, x: float, y: float) -> HeadPose:
    return default_pose(float(yaw), float(pitch), float(roll), float(x), float(y))


def _overview(picture: np.ndarray) -> np.ndarray:
    """The whole picture, small: enough to see how the head is turned."""
    return cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA).mean(2).ravel()
