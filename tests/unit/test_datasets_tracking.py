"""Trackers: landmarks and measures on real frames, and the tables behind them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from lavatar.contracts import EXPRESSIONS, FrameMeta
from lavatar.datasets import tracking
from lavatar.datasets.meter import MediapipeMeter
from lavatar.errors import ConfigError, WeightsError
from tests.unit.video_files import clip_of


@pytest.fixture(scope="module")
def frames(videos: Path, weights: Path) -> list[np.ndarray]:
    """Eight different faces of one woman: gaze to both sides, mouth open and shut."""
    clip = clip_of(videos / "grimaces.mp4", 400)
    return clip[::50]


@pytest.fixture(scope="module")
def tracked(frames: list[np.ndarray]) -> list[tracking.Track]:
    tracker = tracking.open_tracker("mediapipe", mode="image")
    found = [tracker.track(frame, 0.0) for frame in frames]
    tracker.close()
    assert all(track is not None for track in found)
    return [track for track in found if track is not None]


def test_the_68_lie_where_the_scheme_says(tracked: list[tracking.Track]) -> None:
    for track in tracked:
        p = track.landmarks68
        assert p[0, 0] < p[36, 0] < p[39, 0] < p[27, 0] < p[42, 0] < p[45, 0] < p[16, 0]  # left to right in the image
        assert p[19, 1] < p[37, 1] < p[41, 1] < p[33, 1] < p[51, 1] < p[57, 1] < p[8, 1]  # down the face
        assert p[48, 0] < p[54, 0]
        assert p[62, 1] <= p[66, 1]
        assert np.all(np.diff(p[27:31, 1]) > 0)
        assert track.faces == 1
        for iris, eye in zip(track.irises, (p[36:42], p[42:48]), strict=True):
            assert (eye.min(0) < iris).all()
            assert (iris < eye.max(0)).all()
    assert len(set(tracking.LANDMARKS_68)) == 68


def test_measures_follow_the_face(tracked: list[tracking.Track]) -> None:
    for track in tracked:
        assert set(EXPRESSIONS) <= track.expression.keys()
        assert sum(name.startswith("mp.") for name in track.expression) == 51  # 52 with the neutral one
    jaw = [track.expression["jaw"] for track in tracked]
    gap = [np.linalg.norm(track.landmarks68[62] - track.landmarks68[66]) for track in tracked]
    assert np.corrcoef(jaw, gap)[0, 1] > 0.8


def test_gaze_is_positive_to_the_image_right(frames: list[np.ndarray], tracked: list[tracking.Track]) -> None:
    tracker = tracking.open_tracker("mediapipe", mode="image")
    mirrored = [tracker.track(np.ascontiguousarray(frame[:, ::-1]), 0.0) for frame in frames]
    gaze = [track.expression["gaze"] for track in tracked]
    assert np.corrcoef(gaze, [track.expression["gaze"] for track in mirrored if track])[0, 1] < -0.8
    irises = []
    for track in tracked:
        p = track.landmarks478[:, 0]
        irises.append((p[468] - p[33]) / (p[133] - p[33]) + (p[473] - p[362]) / (p[263] - p[362]))
    assert np.corrcoef(gaze, irises)[0, 1] > 0.8


def test_expression_measures_by_hand() -> None:
    raw = {"jawOpen": 0.5, "eyeBlinkLeft": 1.0, "mouthSmileRight": 0.4, "mouthPucker": 0.2, "browInnerUp": 0.9,
           "browDownLeft": 0.2, "eyeLookOutLeft": 0.6, "eyeLookInRight": 0.4, "_neutral": 1.0}  # fmt: skip
    got = tracking.expression_measures(raw)
    assert {name: round(got[name], 6) for name in EXPRESSIONS} == {
        "jaw": 0.5, "blink": 0.5, "smile": 0.2, "pucker": 0.2, "brows": 0.2, "gaze": 0.5,
    }  # fmt: skip
    assert "mp._neutral" not in got


def test_geometric_measures_from_points_alone(tracked: list[tracking.Track]) -> None:
    """What face_alignment's 68 points give agrees in direction with the coefficients."""
    jaw = [tracking.geometric_measures(track.landmarks68)["jaw"] for track in tracked]
    assert np.corrcoef(jaw, [track.expression["jaw"] for track in tracked])[0, 1] > 0.7


def test_face_alignment_tracker_takes_the_largest_face(tracked: list[tracking.Track]) -> None:
    """The network is a stand-in: its weights are downloaded at first use, which a closed machine cannot do."""
    large = tracked[0].landmarks68
    small = large * 0.2

    class Network:
        def get_landmarks_from_image(self, rgb: np.ndarray, **_: object) -> object:
            boxes = [np.array([0, 0, 20, 20, 0.9]), np.array([0, 0, 200, 220, 0.9])]
            return [small, large], [np.full(68, 0.5), np.full(68, 0.8)], boxes

    class Nothing:
        def get_landmarks_from_image(self, rgb: np.ndarray, **_: object) -> object:
            return None

    picture = np.zeros((64, 64, 3), np.uint8)
    track = tracking.FaceAlignmentTracker(network=Network()).track(picture, 0.0)
    assert track is not None
    assert np.array_equal(track.landmarks68, large)
    assert (track.faces, round(track.score, 3), track.landmarks478) == (1, 0.8, None)
    assert tracking.FaceAlignmentTracker(network=Nothing()).track(picture, 0.0) is None


def test_unknown_tracker_and_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no tracker 'eyes'"):
        tracking.open_tracker("eyes")
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match=r"face_landmarker\.task"):
        tracking.open_tracker("mediapipe")


def test_padded_rows_do_not_confuse_the_tracker(frames: list[np.ndarray], tracked: list[tracking.Track]) -> None:
    """A view into a wider array has padded rows; MediaPipe would read it skewed."""
    wide = np.zeros((frames[0].shape[0], frames[0].shape[1] + 7, 3), np.uint8)
    wide[:, :-7] = frames[0]
    tracker = tracking.open_tracker("mediapipe", mode="image")
    track = tracker.track(wide[:, :-7], 0.0)
    assert track is not None
    assert np.allclose(track.landmarks68, tracked[0].landmarks68)


def test_meter_works_on_small_portraits_before_white(frames: list[np.ndarray], tracked: list[tracking.Track]) -> None:
    meter = MediapipeMeter()
    small = np.stack([cv2.resize(frame, (128, 128), interpolation=cv2.INTER_AREA) for frame in frames])
    metas: list[FrameMeta] | None = None
    got = meter.measure(small, metas)
    assert list(got) == list(EXPRESSIONS)
    assert np.isfinite(got["jaw"]).all()
    for name in ("jaw", "gaze"):
        assert np.corrcoef(got[name], [track.expression[name] for track in tracked])[0, 1] > 0.9
    blank = meter.measure(np.full((1, 128, 128, 3), 255, np.uint8))
    assert all(np.isnan(values).all() for values in blank.values())
