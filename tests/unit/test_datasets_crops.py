"""Crops: transforms, pixel centres, and a face crop that the jaw does not move."""

from __future__ import annotations

import numpy as np
import pytest

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.datasets import crops, pose
from lavatar.datasets.tracking import LANDMARKS_68

FRONTAL = np.stack([200 + 100 * pose.canonical_face()[:, 0], 200 - 100 * pose.canonical_face()[:, 1]], 1)[
    list(LANDMARKS_68)
]


def test_similarity_is_recovered_exactly() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(11, 2)) * 30
    true = np.array([[0.8, -0.3, 5.0], [0.3, 0.8, -7.0]])
    assert np.allclose(crops.similarity(points, crops.apply(true, points), np.ones(11)), true)


def test_compose_and_invert() -> None:
    a = np.array([[2.0, 0.1, 3.0], [-0.2, 1.5, 4.0]])
    b = np.array([[0.5, 0.0, 1.0], [0.0, 0.5, -2.0]])
    points = np.array([[1.0, 2.0], [3.0, -4.0]])
    assert np.allclose(crops.apply(crops.compose(b, a), points), crops.apply(b, crops.apply(a, points)))
    assert np.allclose(crops.apply(crops.invert(a), crops.apply(a, points)), points)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 2.0])
def test_warp_keeps_pixel_centres(factor: float) -> None:
    """A soft dot at continuous (x, y) must arrive at transform(x, y), not half a pixel off."""
    y, x = np.mgrid[:128, :128] + 0.5
    picture = np.repeat((255 * np.exp(-((x - 40) ** 2 + (y - 60) ** 2) / 120))[..., None], 3, 2).astype(np.float32)
    transform = np.array([[factor, 0, 3.0], [0, factor, -15.0 * factor]])
    seen = crops.warp(picture, transform, 160, border="zero")[..., 0]
    v, u = np.mgrid[:160, :160] + 0.5
    centre = (float((u * seen).sum() / seen.sum()), float((v * seen).sum() / seen.sum()))
    assert centre == pytest.approx(tuple(crops.apply(transform, np.array([40.0, 60.0]))), abs=0.06)


def test_face_crop_holds_brows_to_open_chin_and_stays_put() -> None:
    rest = crops.face_transform(FRONTAL, 128)
    opened = FRONTAL.copy()
    opened[4:13, 1] += 26  # the jaw drops by 2.6 cm
    opened[55:60, 1] += 26
    opened[65:68, 1] += 25
    assert np.allclose(crops.face_transform(opened, 128), rest)
    seen = crops.apply(rest, opened)
    assert seen.min() > 2
    assert seen.max() < 127
    assert np.ptp(seen[:, 1]) > 100  # tightly
    assert seen[36, 1] == pytest.approx(seen[45, 1])


def test_face_crop_undoes_a_tilt() -> None:
    angle = np.radians(25)
    turn = np.array([[np.cos(angle), -np.sin(angle), 30.0], [np.sin(angle), np.cos(angle), -12.0]])
    tilted = crops.apply(turn, FRONTAL)
    straight = crops.apply(crops.face_transform(FRONTAL, 128), FRONTAL)
    assert np.allclose(crops.apply(crops.face_transform(tilted, 128), tilted), straight, atol=1e-6)


def test_portrait_crop_grows_with_the_movement() -> None:
    still = [FRONTAL + np.array([k % 2, 0]) for k in range(50)]
    tight = crops.portrait_transform(still, 512, 2.15)
    side = np.ptp(FRONTAL, axis=0).max()
    assert 512 / tight[0, 0] == pytest.approx(2.15 * side, rel=0.02)
    moving = [FRONTAL + np.array([3 * side * k / 50, 0]) for k in range(50)]
    wide = crops.portrait_transform(moving, 512, 2.15)
    for points in (moving[1], moving[-2]):
        inside = crops.apply(wide, points)
        assert inside.min() > 0
        assert inside.max() < 512
    assert crops.apply(tight, FRONTAL)[27, 1] > 200  # room for hair above


def test_a_hull_masked_crop_is_black_outside_the_landmarks_and_untouched_inside() -> None:
    picture = np.full((400, 400, 3), 200, np.uint8)
    to_face = crops.face_transform(FRONTAL, 64)
    plain = crops.face_crop(picture, to_face, PreprocessConfig(face_size=64), FRONTAL)
    masked = crops.face_crop(picture, to_face, PreprocessConfig(face_size=64, face_mask="hull"), FRONTAL)
    assert (plain == 200).all()
    assert set(np.unique(masked)) == {0, 200}
    inside = (masked == 200).all(2)
    points = crops.apply(to_face, FRONTAL)
    centre = points.mean(0)
    for shrink, wanted in ((0.9, True), (1.15, False)):  # the chin, the cheeks: on either side of the outline
        for x, y in centre + shrink * (points[[2, 5, 8, 11, 14]] - centre):
            if 0 <= x < 64 and 0 <= y < 64:
                assert inside[int(y), int(x)] == wanted
    rows, columns = np.nonzero(inside)
    assert rows.min() == pytest.approx(points[17:27, 1].min(), abs=1)  # it ends at the brows
    assert columns.min() == pytest.approx(max(0, points[:, 0].min()), abs=1)
