"""What the 68 landmarks say of an expression, in numbers that mean the same on two faces.

Mouth and eyes about their own centres, irises about the middles of their eyes' corners, brows about the eyes, the mouth
about the nose; all over the distance between the eyes, so that neither where the face is nor how large it is remains.

Shapes: N frames, L = SHAPE_DIM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNIT = 0.05
"""One unit of the shape, in distances between the eyes: about the deviation of a mouth's landmark in speech."""

EYES, BROWS, NOSE, MOUTH = (slice(36, 42), slice(42, 48)), slice(17, 27), slice(27, 36), slice(48, 68)
CORNERS = ((36, 39), (42, 45))
EYE_GAIN = 3.0  # lids move a third as far as lips
IRIS_GAIN = 3.0  # and so do irises
JITTER = 0.3  # of a tracked expression, in UNITs
SHAPE_DIM = 2 * (20 + 6 + 6 + 10 + 1 + 2)
LOWER_LIP, UPPER_LIP = 2 * (66 - 48) + 1, 2 * (62 - 48) + 1
"""Columns of the shape: heights of the inner lips' middles; their difference is the opening of the mouth."""


def expression_shape(landmarks_N68x2: np.ndarray, irises_N2x2: np.ndarray | None = None) -> np.ndarray:
    """N×68×2 and N×2×2 in one unit, whichever → N×L in UNITs. Without irises their columns are 0."""
    points = np.asarray(landmarks_N68x2, np.float64)
    left, right = (points[:, eye] for eye in EYES)
    between = points[:, 36:48].mean(1, keepdims=True)
    distance = np.linalg.norm(left.mean(1) - right.mean(1), axis=-1)[:, None, None]
    mouth = points[:, MOUTH]
    centre = mouth.mean(1, keepdims=True)
    sockets = points[:, CORNERS].mean(2)  # lids move with blinks, corners do not
    parts = [
        mouth - centre,
        EYE_GAIN * (left - left.mean(1, keepdims=True)),
        EYE_GAIN * (right - right.mean(1, keepdims=True)),
        points[:, BROWS] - between,
        centre - points[:, NOSE].mean(1, keepdims=True),
        np.zeros((len(points), 2, 2)) if irises_N2x2 is None else IRIS_GAIN * (irises_N2x2 - sockets),
    ]
    shape_N45x2 = np.concatenate(parts, axis=1) / (distance * UNIT)
    return np.asarray(shape_N45x2.reshape(len(points), -1), np.float32)


def whitening(shapes: Sequence[np.ndarray]) -> np.ndarray:
    """L×L: after it, errors of each way in which these subjects' shapes vary (N×L each, about their own means) weigh
    alike, and the error of each subject's mean shape sums to 1. A smile's corners move a tenth as far as an open jaw.

    What varies by less than JITTER is the tracker's noise and gains no weight.
    """
    about = np.concatenate([shape_NL - shape_NL.mean(0) for shape_NL in shapes]).astype(np.float64)
    variance_L, ways_LL = np.linalg.eigh(about.T @ about / len(about))
    gain_L = 1 / np.sqrt(np.maximum(variance_L, 0) + JITTER**2)
    return np.asarray(ways_LL * gain_L / np.sqrt((variance_L * gain_L**2).sum()), np.float32)
