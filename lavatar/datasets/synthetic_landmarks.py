"""Sec. 5.1: the 68 landmarks of a procedural head, on its surface in head space, in the usual order."""

from __future__ import annotations

import numpy as np

from lavatar.datasets.synthetic_head import (
    BROW_Y,
    EYE_RADIUS,
    EYE_X,
    EYE_Y,
    EYE_Z,
    Face,
    gaze_direction,
    lid_curves,
    march,
    mouth_curves,
)


def brow_line(face: Face, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle line of a brow, a ∈ [0, 1] from its inner end outwards: |x| and y."""
    brows, arch = face.expression.brows, face.identity.brow_arch
    x = 0.115 + 0.50 * a + 0.02 * min(brows, 0.0) * (1 - a)
    rise = 0.125 * brows * (1.15 - 0.55 * a if brows < 0 else 1.0)
    return x, BROW_Y + rise + arch * np.sin(np.pi * (0.15 + 0.72 * a)) - 0.055 * a * a


def landmarks(face: Face) -> np.ndarray:
    """68×3 points in head space; they follow jaw, lids, brows and mouth.

    0..16, the edge of the face, are met on the way in from outside; the others on the way in from the front.
    """
    angle = np.radians(np.linspace(186.0, 354.0, 17))
    outward = np.stack([np.cos(angle), np.sin(angle), np.full(17, 0.12)])
    outward /= np.sqrt((outward * outward).sum(0))
    parts = [*_brows(face), *_nose(face), *_eyes(face), *_lips(face)]
    x, y = np.array(parts).T
    origin = np.concatenate(
        [outward * 1.6 + np.array([[0.0], [0.05], [-0.05]]), np.stack([x, y, np.full(51, 1.05)])], 1
    )
    direction = np.concatenate([-outward, np.repeat([[0.0], [0.0], [-1.0]], 51, 1)], 1)
    origin, direction = origin.astype(np.float32), direction.astype(np.float32)
    t, _ = march(face, origin, direction, np.zeros(68, np.float32), 0.01, hair=False, rounds=10)
    return (origin + direction * t).T.astype(np.float64)


def irises(face: Face) -> np.ndarray:
    """Middles of the irises on the eyeballs in head space, 2×3, image left first; they follow the gaze under the lids
    too."""
    return np.array([(side * EYE_X, EYE_Y, EYE_Z) for side in (-1, 1)]) + EYE_RADIUS * gaze_direction(face.expression)


def _brows(face: Face) -> list[tuple[float, float]]:
    x, y = brow_line(face, np.linspace(0.0, 1.0, 5))
    left = [(-float(a), float(b)) for a, b in zip(x[::-1], y[::-1], strict=True)]
    return left + [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def _nose(face: Face) -> list[tuple[float, float]]:
    up, wide = 0.02 * face.expression.smile, 0.125 * face.identity.nose_width
    bridge = [(0.0, y + up) for y in (0.17, 0.05, -0.08, -0.20)]
    return bridge + [(a * wide, -0.31 + up + 0.02 * abs(a)) for a in (-1.3, -0.65, 0.0, 0.65, 1.3)]


def _eyes(face: Face) -> list[tuple[float, float]]:
    a = np.array((-1.0, -0.36, 0.36, 1.0))  # inner corner → outer corner
    up, low = lid_curves(face, a)
    x = EYE_X + 0.95 * EYE_RADIUS * a
    top, bottom = EYE_Y + EYE_RADIUS * up, EYE_Y + EYE_RADIUS * low
    order = ((3, top), (2, top), (1, top), (0, top), (1, bottom), (2, bottom))  # from the outer corner over the top
    image_left = [(-float(x[k]), float(y[k])) for k, y in order]
    order = ((0, top), (1, top), (2, top), (3, top), (2, bottom), (1, bottom))
    return image_left + [(float(x[k]), float(y[k])) for k, y in order]


def _lips(face: Face) -> list[tuple[float, float]]:
    w = face.mouth_w

    def at(a: float) -> tuple[float, float, float, float]:
        """x, lower edge of the upper lip, upper edge of the lower lip, and 1 − a²."""
        up, down, profile = mouth_curves(face, np.array([a * w], np.float32))
        return a * w, float(up[0]), float(down[0]), float(profile[0])

    outer, inner = (-0.66, -0.28, 0.0, 0.28, 0.66), (-0.5, 0.0, 0.5)
    points = [(at(-1.0)[0], at(-1.0)[1])]
    points += [(x, up + face.lip_up * profile) for x, up, _, profile in map(at, outer)]
    points += [(at(1.0)[0], at(1.0)[1])]
    points += [(x, down - face.lip_down * profile) for x, _, down, profile in map(at, outer[::-1])]
    points += [(at(-0.9)[0], at(-0.9)[1])] + [(x, up) for x, up, _, _ in map(at, inner)]
    points += [(at(0.9)[0], at(0.9)[1])] + [(x, down) for x, _, down, _ in map(at, inner[::-1])]
    return points
