"""Head poses: signs, the joint fit against a known answer, smoothing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lavatar.contracts import Camera, HeadPose
from lavatar.datasets import pose
from lavatar.datasets.tracking import LANDMARKS_68


def turned(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Degrees; yaw to the image right, pitch up, roll clockwise as seen."""
    a, b, c = np.radians([yaw, -pitch, -roll])
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return pose.FRONTAL @ about_z @ about_y @ about_x


def as_pose(rotation: np.ndarray, translation: tuple[float, float, float], scale: float) -> HeadPose:
    return HeadPose(tuple(tuple(row) for row in rotation), translation, scale)


def performance(count: int, size: int, noise: float, personal: float, points: str) -> tuple[list, list, np.ndarray]:
    """Landmarks of a made-up person: true poses, a true shape, exact projection, noise in pixels."""
    rng = np.random.default_rng(3)
    shape = pose.canonical_face() + rng.normal(0, personal, (468, 3))
    camera = pose.portrait_camera(size)
    poses, landmarks = [], []
    for k in range(count):
        t = k / 25
        rotation = turned(20 * np.sin(t), 12 * np.sin(1.7 * t + 1), 8 * np.sin(0.6 * t))
        poses.append(as_pose(rotation, (0.02 * np.sin(t), 0.01 * np.cos(t), 4.0 + 0.1 * np.sin(0.8 * t)), 0.11))
        pixels = pose.project(shape, poses[-1], camera) + rng.normal(0, noise, (468, 2))
        landmarks.append(pixels if points == "478" else pixels[list(LANDMARKS_68)])
    return landmarks, poses, shape


def opencv_pose(shape: np.ndarray, points: np.ndarray, camera: Camera, distance: float) -> HeadPose:
    """A rigid fit of one frame; `distance` is where it begins, in the units of `shape`."""
    matrix = np.array([[camera.focal, 0, camera.cx], [0, camera.focal, camera.cy], [0, 0, 1]])
    start = np.array([np.pi, 0.0, 0.0]), np.array([0.0, 0.0, distance])
    found, turn, place = cv2.solvePnP(shape, points.astype(float), matrix, None, *start, True)
    assert found
    return as_pose(cv2.Rodrigues(turn)[0], place[:, 0], 1.0)


def test_frontal_head_projects_upright() -> None:
    """x to the image right, y up, z towards the viewer, at f = 5000 px and 4 m."""
    camera = pose.portrait_camera(512)
    frontal = as_pose(pose.FRONTAL, (0.0, 0.0, 4.0), 0.1)
    centre, right, up, front = pose.project(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1.0]]), frontal, camera)
    assert centre == pytest.approx([256, 256])
    assert right == pytest.approx([256 + 125, 256])
    assert up == pytest.approx([256, 256 - 125])
    assert front[0] > right[0]  # nearer is larger
    face = pose.project(pose.canonical_face(), frontal, camera)
    assert face[152, 1] > face[10, 1]  # the chin is below the forehead
    assert face[263, 0] > face[33, 0]  # the person's left eye is on the image's right


@pytest.mark.parametrize("points", ["478", "68"])
def test_joint_fit_finds_shape_and_poses(points: str) -> None:
    landmarks, poses, shape = performance(90, 512, noise=0.4, personal=0.03, points=points)
    fit = pose.fit_poses(landmarks, pose.portrait_camera(512), smoothing=0.0)
    assert fit.reprojection_px < 0.6
    index = list(fit.indices) if points == "478" else [LANDMARKS_68[i] for i in fit.indices]
    canonical = pose.canonical_face()[index]
    assert np.abs(fit.shape - shape[index]).mean() < 0.5 * np.abs(canonical - shape[index]).mean() + 0.01
    relative = np.array([np.array(a.rotation) @ np.array(b.rotation).T for a, b in zip(fit.poses, poses, strict=True)])
    angle = np.degrees(np.arccos(np.clip((np.trace(relative, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert angle.max() < 3.0
    assert len({p.scale for p in fit.poses}) == 1
    found = np.array([pose.angles(p) for p in fit.poses])
    true = np.array([pose.angles(p) for p in poses])
    for axis in range(3):
        assert np.corrcoef(found[:, axis], true[:, axis])[0, 1] > 0.99


def test_a_personal_shape_beats_the_canonical_face() -> None:
    landmarks, _, _ = performance(60, 512, noise=0.3, personal=0.05, points="478")
    camera = pose.portrait_camera(512)
    joint = pose.fit_poses(landmarks, camera, smoothing=0.0).reprojection_px
    alone = []
    for points in landmarks:
        stable, _, canonical = pose.stable_points(points)
        single = opencv_pose(canonical, stable, camera, 40.0)
        alone.append(np.linalg.norm(pose.project(canonical, single, camera) - stable, axis=1).mean())
    assert joint < 0.5
    assert np.mean(alone) > 4 * joint


def test_each_frames_pose_is_opencvs_of_the_shape_that_was_found() -> None:
    landmarks, _, _ = performance(40, 256, noise=0.0, personal=0.03, points="478")
    camera = pose.portrait_camera(256)
    fit = pose.fit_poses(landmarks, camera, smoothing=0.0)
    for frame in (7, 31):
        single = opencv_pose(fit.scale * fit.shape, pose.stable_points(landmarks[frame])[0], camera, 4.0)
        assert np.allclose(single.rotation, fit.poses[frame].rotation, atol=1e-3)
        assert np.allclose(single.translation, fit.poses[frame].translation, atol=5e-3)


def test_angles_have_the_documented_signs() -> None:
    for wanted in ((15.0, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, 7.0)):
        assert pose.angles(as_pose(turned(*wanted), (0, 0, 4), 0.1)) == pytest.approx(wanted, abs=1e-6)
    camera = pose.portrait_camera(512)
    nose = np.array([[0.0, 0.0, 1.0]])
    assert pose.project(nose, as_pose(turned(20, 0, 0), (0, 0, 4), 0.1), camera)[0, 0] > 270
    assert pose.project(nose, as_pose(turned(0, 20, 0), (0, 0, 4), 0.1), camera)[0, 1] < 240


def test_smoothing_quiets_jitter_and_keeps_gaps_apart() -> None:
    landmarks, poses, _ = performance(80, 512, noise=1.5, personal=0.0, points="68")
    landmarks[30:40] = [None] * 10
    camera = pose.portrait_camera(512)
    rough = pose.fit_poses(landmarks, camera, smoothing=0.0)
    smooth = pose.fit_poses(landmarks, camera, smoothing=1.5)
    assert rough.poses[35] is None
    kept = [i for i in range(80) if not 30 <= i < 40]

    def error(fit: pose.PoseFit) -> float:
        return float(np.mean([np.abs(np.subtract(fit.poses[i].rotation, poses[i].rotation)).mean() for i in kept]))

    assert error(smooth) < 0.75 * error(rough)
    for p in (smooth.poses[0], smooth.poses[29], smooth.poses[40]):
        assert np.allclose(np.array(p.rotation) @ np.array(p.rotation).T, np.eye(3), atol=1e-9)


def test_no_landmarks_no_poses() -> None:
    fit = pose.fit_poses([None, None], pose.portrait_camera(64))
    assert fit.poses == [None, None]
    assert np.isnan(fit.reprojection_px)
