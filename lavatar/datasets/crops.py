"""Sec. 5.1 (crops): the square portrait of the whole head, and the DeepFaceLab-like aligned face for the encoders.

Transforms are 2×3 affine maps between continuous pixel coordinates (pixel centres at +0.5): portrait_transform takes
source pixels to portrait pixels, face_transform portrait pixels to face-crop pixels. The portrait crop is one for the
whole video. The face crop follows bridge and base of the nose and the corners of the eyes, never the jaw: the
expression code is read from it, so an opening mouth must move inside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.datasets.pose import canonical_face
from lavatar.datasets.tracking import LANDMARKS_68

_ANCHORS = (27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45)  # of the 68
_ANCHOR_WEIGHTS = np.array([2, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2], np.float64)
_SIDE_ROOM, _HAIR_ROOM, _NECK_ROOM = 0.2, 0.62, 0.3
"""Room kept beside, above and below the box of the 68 landmarks, in sides of that box, at crop scale 2.15."""
_HULL_BITS = 4  # of a pixel's fraction in the corners of the hull
_FACE_TOP, _FACE_BOTTOM = 0.78, -1.24
"""Head-space y of the crop's upper and lower border: brows raised, and chin with the jaw fully open."""


def median_face_box(landmarks: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Centre (x, y) and side of the median landmark box over a video's frames, in pixels."""
    low = np.stack([np.asarray(points)[:, :2].min(0) for points in landmarks])
    high = np.stack([np.asarray(points)[:, :2].max(0) for points in landmarks])
    return np.median((low + high) / 2, axis=0), float(np.median((high - low).max(1)))


def portrait_transform(landmarks: Sequence[np.ndarray], size: int, crop_scale: float) -> np.ndarray:
    """One fixed square crop for a video: source → portrait pixels, 2×3.

    Its side is `crop_scale` times the median box of the 68 landmarks, more where the head moves so far that hair or
    chin would leave it (at 2.15 there is room for both; 1.5 shows the face alone). Hair reaches further above the brows
    than neck is wanted below the chin, so the centre lies above the box's. 1 % of the frames on each side may be cut.
    """
    centre, side = median_face_box(landmarks)
    low = np.quantile([np.asarray(points)[:, :2].min(0) for points in landmarks], 0.01, axis=0)
    high = np.quantile([np.asarray(points)[:, :2].max(0) for points in landmarks], 0.99, axis=0)
    room = max(0.0, 0.893 * crop_scale - 1.0) / (_HAIR_ROOM + _NECK_ROOM)  # a tighter crop gives up hair and neck
    low = low - np.array([_SIDE_ROOM, _HAIR_ROOM]) * side * min(1.0, room)
    high = high + np.array([_SIDE_ROOM, _NECK_ROOM]) * side * min(1.0, room)
    centre = (centre - [0.0, (_HAIR_ROOM - _NECK_ROOM) / 2 * side] + (low + high) / 2) / 2
    reach = float(np.maximum(high - centre, centre - low).max())
    factor = size / max(crop_scale * side, 2 * reach)
    return np.array([[factor, 0, size / 2 - factor * centre[0]], [0, factor, size / 2 - factor * centre[1]]])


def face_transform(landmarks68: np.ndarray, size: int) -> np.ndarray:
    """Similarity from the landmarks' pixels to an upright, aligned face crop of `size`, 2×3."""
    target = _template(size)
    return similarity(np.asarray(landmarks68, np.float64)[list(_ANCHORS)], target, _ANCHOR_WEIGHTS)


def _template(size: int) -> np.ndarray:
    """Where the anchors of a frontal canonical face lie in the crop, pixels."""
    points = canonical_face()[[LANDMARKS_68[i] for i in _ANCHORS]]
    unit = size / (_FACE_TOP - _FACE_BOTTOM)
    return np.stack([size / 2 + unit * points[:, 0], unit * (_FACE_TOP - points[:, 1])], axis=1)


def similarity(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least-squares similarity (turn, scale, shift) source → target, 2×3 (Umeyama)."""
    w = weights / weights.sum()
    a, b = source - w @ source, target - w @ target
    norm = float(w @ (a**2).sum(1)) or 1.0
    cos = float(w @ (a * b).sum(1)) / norm
    sin = float(w @ (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])) / norm
    linear = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([linear, (w @ target - linear @ (w @ source))[:, None]], axis=1)


def apply(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points …×2 through a 2×3 transform."""
    transform = np.asarray(transform, np.float64)
    return np.asarray(points, np.float64)[..., :2] @ transform[:, :2].T + transform[:, 2]


def compose(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The transform that does `first`, then `second`."""
    second, first = np.asarray(second, np.float64), np.asarray(first, np.float64)
    return np.concatenate([second[:, :2] @ first[:, :2], (second[:, :2] @ first[:, 2] + second[:, 2])[:, None]], axis=1)


def invert(transform: np.ndarray) -> np.ndarray:
    """The inverse 2×3 transform."""
    transform = np.asarray(transform, np.float64)
    linear = np.linalg.inv(transform[:, :2])
    return np.concatenate([linear, (-linear @ transform[:, 2])[:, None]], axis=1)


def warp(picture: np.ndarray, transform: np.ndarray, size: int, *, border: str = "replicate") -> np.ndarray:
    """`picture` seen through `transform` in a square of `size`; averaged first where it gets smaller.

    `border`: "replicate" repeats the edge (colours, to be hidden by a faded matte), "zero" is nothing (mattes).
    """
    transform = np.asarray(transform, np.float64)
    factor = float(np.sqrt(abs(np.linalg.det(transform[:, :2]))))
    if factor < 0.6:  # area-average by whole steps, so that warpAffine's four taps do not alias
        step = 1.0 / max(1, round(1.0 / factor))
        shape = (max(1, round(picture.shape[1] * step)), max(1, round(picture.shape[0] * step)))
        picture_small = cv2.resize(picture, shape, interpolation=cv2.INTER_AREA)
        grow = np.diag([picture.shape[1] / shape[0], picture.shape[0] / shape[1]])
        return warp(picture_small, np.concatenate([transform[:, :2] @ grow, transform[:, 2:]], 1), size, border=border)
    shift = np.full(2, 0.5)  # OpenCV counts from pixel centres
    centred = np.concatenate([transform[:, :2], (transform[:, 2] + transform[:, :2] @ shift - shift)[:, None]], axis=1)
    mode = cv2.BORDER_REPLICATE if border == "replicate" else cv2.BORDER_CONSTANT
    flags = cv2.INTER_CUBIC if factor > 1.2 else cv2.INTER_LINEAR
    return cv2.warpAffine(picture, centred, (size, size), flags=flags, borderMode=mode)


def face_crop(picture: np.ndarray, to_face: np.ndarray, config: PreprocessConfig, outline68: np.ndarray) -> np.ndarray:
    """The aligned face, uint8 side×side×3, from `picture` through `to_face`; `outline68`: landmarks in its pixels.

    With `face_mask: hull` it is black outside the landmarks' convex hull, as the released code's input is.
    """
    face = warp(picture, to_face, config.face_size)
    if config.face_mask == "none":
        return face
    fine = 1 << _HULL_BITS
    corners = cv2.convexHull(np.rint((apply(to_face, outline68) - 0.5) * fine).astype(np.int32))
    mask = cv2.fillConvexPoly(np.zeros(face.shape[:2], np.uint8), corners, 1, cv2.LINE_8, _HULL_BITS)
    return face * mask[..., None]


def as_rows(transform: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """A transform as the nested tuples of FrameMeta."""
    return tuple(tuple(float(v) for v in row) for row in np.asarray(transform))


def as_points(points_P2: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Points in pixels as the nested tuples of FrameMeta, to a thousandth of a pixel."""
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in points_P2)
