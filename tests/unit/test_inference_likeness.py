"""Landmark errors and identity: closed forms, dlib's own alignment, and real people."""

from __future__ import annotations

from pathlib import Path

import dlib
import numpy as np
import pytest

from lavatar.datasets.crops import apply, similarity
from lavatar.datasets.tracking import open_tracker
from lavatar.inference.identity import CHIP, PADDING, POINTS, TEMPLATE, Identity, face_chip, face_descriptor
from lavatar.inference.landmarks import LandmarkErrors
from tests.unit.video_files import clip_of


def test_landmark_errors_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.2, 0.8, (3, 68, 2))
    truth[:, 36], truth[:, 45] = (0.3, 0.4), (0.7, 0.4)  # inter-ocular distance 0.4
    result = truth.copy()
    result[0, 48:68] += (0.03, 0.04)  # the whole mouth, 0.05 away
    result[1, 36:42] += (0.02, 0.0)  # one eye of two
    result[2] = np.nan
    errors = LandmarkErrors()
    errors.add(truth[:1], result[:1])
    errors.add(truth[1:], result[1:])
    figures = errors.summary()
    assert figures["mouth"] == pytest.approx(0.125 / 2)
    assert figures["spread"]["mouth"] == pytest.approx(0.125 / 2)
    assert figures["eyes"] == pytest.approx(0.05 / 2 / 2)
    assert LandmarkErrors().summary() == {"mouth": None, "eyes": None, "spread": {"mouth": None, "eyes": None}}


def unit(*degrees: float) -> np.ndarray:
    """Descriptors of length 1 in a plane."""
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle), *[np.zeros(len(degrees))] * 126], axis=1)


def test_identity_of_self_compares_frame_by_frame() -> None:
    identity = Identity()
    for truth, result in ((unit(0, 60), unit(60, 60)), (unit(120), np.full((1, 128), np.nan))):
        identity.add_truth(truth)
        identity.add(result)
    figures = identity.summary()
    assert figures["distance"] == pytest.approx(0.5)  # 1 and 0; a chord of 60° is 1
    assert figures["similarity"] == pytest.approx(0.75)
    assert figures["spread"]["distance"] == pytest.approx(0.5)
    assert figures["reference"]["distance"] == pytest.approx((1 + 1 + np.sqrt(3)) / 3)
    assert figures["reference"]["similarity"] == pytest.approx((0.5 + 0.5 - 0.5) / 3)


def test_identity_of_cross_compares_with_the_mean_of_the_true_frames() -> None:
    identity = Identity(mean_of_truth=True)
    identity.add_truth(np.concatenate([unit(30, -30), np.full((1, 128), np.nan)]))
    identity.add(unit(0, 0, 90))
    figures = identity.summary()
    middle = np.cos(np.radians(30))
    assert figures["distance"] == pytest.approx((2 * (1 - middle) + np.hypot(1, middle)) / 3)
    assert figures["similarity"] == pytest.approx(2 / 3)
    assert figures["reference"]["distance"] == pytest.approx(1)  # each against the other
    nothing = Identity().summary()
    assert nothing["distance"] is None
    assert nothing["reference"] == {"distance": None, "similarity": None}


def test_the_chip_is_dlibs() -> None:
    """dlib's own alignment of five landmarks, as a rotated rectangle, against our transform."""
    points = np.array([(210, 118), (172, 122), (88, 131), (125, 129), (152, 190)], float)
    parts = [dlib.point(int(x), int(y)) for x, y in points]
    found = dlib.full_object_detection(dlib.rectangle(60, 60, 240, 240), parts)
    details = dlib.get_face_chip_details(found, CHIP, PADDING)
    to_chip = similarity(points, (TEMPLATE + PADDING) / (1 + 2 * PADDING) * CHIP, np.ones(5))
    box, turn = details.rect, details.angle
    centre = np.array([box.left() + box.right(), box.top() + box.bottom()]) / 2
    assert apply(to_chip, centre) == pytest.approx([CHIP / 2, CHIP / 2], abs=1.0)
    assert CHIP / box.width() == pytest.approx(np.hypot(*to_chip[0, :2]), rel=0.01)
    assert np.arctan2(to_chip[1, 0], to_chip[0, 0]) == pytest.approx(-turn, abs=0.01)


def test_the_chip_is_upright_and_the_picture_is_where_the_landmarks_are() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    landmarks = np.full((68, 2), 0.5)
    landmarks[list(POINTS)] = np.array([(150, 80), (120, 82), (50, 80), (80, 82), (100, 130)]) / 200
    image[125:135, 95:105] = 255  # the base of the nose
    chip = face_chip(image, landmarks)
    assert chip.shape == (150, 150, 3)
    y, x = (axis.mean() for axis in np.nonzero(chip[..., 0] > 127))
    assert (x, y) == pytest.approx(tuple((TEMPLATE[4] + PADDING) / (1 + 2 * PADDING) * CHIP), abs=4)


def test_one_person_is_nearer_than_two(videos: Path, weights: Path, face_recognition: Path) -> None:
    descriptor, note = face_descriptor()
    assert descriptor is not None
    assert note == ""
    tracker = open_tracker("mediapipe", mode="image")
    described = {}
    for name in ("grimaces", "newsreader"):
        frames = clip_of(videos / f"{name}.mp4", 240)[::120]
        tracks = [tracker.track(frame, 0.0) for frame in frames]
        square = [frame[: min(frame.shape[:2]), : min(frame.shape[:2])] for frame in frames]
        landmarks = np.stack([t.landmarks68 / s.shape[0] for t, s in zip(tracks, square, strict=True) if t])
        described[name] = descriptor(np.stack(square), landmarks)
    tracker.close()
    one, other = described["grimaces"], described["newsreader"]
    for person in (one, other):
        assert np.linalg.norm(person[0] - person[1]) < 0.6
    assert np.linalg.norm(one[:, None] - other[None], axis=2).min() > 0.6
    assert np.isnan(descriptor(np.stack(square[:1]), np.full((1, 68, 2), np.nan))).all()


def test_identity_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    descriptor, note = face_descriptor()
    assert descriptor is None
    assert "lavatar weights fetch face_recognition" in note
