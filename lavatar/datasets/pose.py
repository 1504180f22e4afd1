"""Sec. 5.1 (camera pose): head poses from stable landmarks, one personal rigid shape and one camera for a whole video.

Legend: N frames, J stable landmarks. Head space: unit 10 cm, x to the image right, y up, z out of the face (towards the
viewer); a frontal head has rotation diag(1, -1, -1) into the OpenCV camera. x_cam = scale · R · x_head + t.
Only landmarks that neither mouth, jaw, lids nor brows move are used. The shape is fitted jointly with all poses (bundle
adjustment, the poses eliminated by a Schur complement), drawn weakly to the canonical face, and then turned, moved and
scaled onto it, so that head space means the same for everybody. The scale is one number a video: a head keeps its size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from lavatar.contracts import Camera, HeadPose
from lavatar.datasets.tracking import LANDMARKS_68

FRONTAL = np.diag([1.0, -1.0, -1.0])
# fmt: off
STABLE_478 = (
    168, 6, 197, 195, 5, 4,  # bridge of the nose
    122, 351, 188, 412, 174, 399, 196, 419, 193, 417, 245, 465,  # its sides
    133, 362, 33, 263, 130, 359,  # corners of the eyes
    10, 109, 338, 67, 297, 103, 332, 54, 284, 21, 251, 162, 389,  # edge of the forehead
    127, 356, 34, 264, 139, 368, 143, 372, 227, 447, 234, 454, 116, 345, 111, 340,  # temples and cheekbones
)
STABLE_68 = (0, 1, 15, 16, 27, 28, 29, 30, 36, 39, 42, 45, 31, 35)
# fmt: on
_PRIOR_SIGMA = 0.06  # head units (6 mm): how far a personal point may lie from the canonical one
_EFFECTIVE_FRAMES = 25.0  # neighbouring frames err alike: all frames together count as so many


@dataclass(frozen=True)
class PoseFit:
    """Poses of the frames given (None where there were no landmarks), mean reprojection error, personal shape J×3."""

    poses: list[HeadPose | None]
    reprojection_px: float
    shape: np.ndarray
    indices: tuple[int, ...]  # which landmarks the rows of `shape` are
    scale: float


@cache
def canonical_face() -> np.ndarray:
    """MediaPipe's canonical face in head units, 468×3; its axes are head space's."""
    text = (resources.files("lavatar.datasets") / "assets" / "canonical_face.json").read_text()
    vertices = np.asarray(json.loads(text)["vertices"], np.float64) / 10.0
    vertices.setflags(write=False)
    return vertices


def stable_points(landmarks: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Of one frame's 478 or 68 landmarks: the stable ones' image points J×2, their indices, and canonical J×3."""
    if len(landmarks) >= 468:
        return np.asarray(landmarks)[list(STABLE_478), :2], STABLE_478, canonical_face()[list(STABLE_478)]
    canonical = canonical_face()[[LANDMARKS_68[i] for i in STABLE_68]]
    return np.asarray(landmarks)[list(STABLE_68), :2], STABLE_68, canonical


def portrait_camera(size: int, focal: float = 5000.0) -> Camera:
    """The camera of the portrait crop; `focal` is for 512 pixels and scales with the size."""
    return Camera(focal=focal * size / 512.0, cx=size / 2.0, cy=size / 2.0, size=size)


def fit_poses(
    landmarks: Sequence[np.ndarray | None],
    camera: Camera,
    *,
    distance: float = 4.0,
    smoothing: float = 1.0,
    shape_frames: int = 400,
) -> PoseFit:
    """Joint fit of one shape and a pose a frame to landmarks (478 or 68, in pixels of `camera`).

    `smoothing` is the deviation, in frames, of a Gaussian over rotations and translations; gaps count as frames.
    """
    seen = [i for i, points in enumerate(landmarks) if points is not None]
    if not seen:
        return PoseFit([None] * len(landmarks), float("nan"), np.zeros((0, 3)), (), 1.0)
    first = stable_points(np.asarray(landmarks[seen[0]]))
    indices, canonical = first[1], first[2]
    points_NJ2 = np.stack([stable_points(np.asarray(landmarks[i]))[0] for i in seen]).astype(np.float64)
    rays_NJ2 = (points_NJ2 - [camera.cx, camera.cy]) / camera.focal

    rotation, translation, size = _start(rays_NJ2, canonical, distance)
    subset = np.unique(np.linspace(0, len(seen) - 1, min(shape_frames, len(seen))).round().astype(int))
    shape = _fit_shape(rays_NJ2[subset], canonical * size, rotation[subset], translation[subset], size, camera.focal)
    rotation, translation = _fit_frames(rays_NJ2, shape, rotation, translation, camera.focal)
    shape, rotation, translation, scale = _to_head_space(shape, canonical, rotation, translation, distance)
    rotation, translation = _smooth(np.asarray(seen, float), rotation, translation, smoothing)

    error = reprojection_error(points_NJ2, shape, rotation, translation, scale, camera)
    poses: list[HeadPose | None] = [None] * len(landmarks)
    for k, i in enumerate(seen):
        poses[i] = _pose(rotation[k], translation[k], scale)
    return PoseFit(poses, error, shape, indices, scale)


def project(points_head: np.ndarray, pose: HeadPose, camera: Camera) -> np.ndarray:
    """Head-space points (…×3) → pixels (…×2); also the test of every sign here."""
    moved = pose.scale * np.asarray(points_head) @ np.asarray(pose.rotation).T + np.asarray(pose.translation)
    return moved[..., :2] / moved[..., 2:] * camera.focal + [camera.cx, camera.cy]


def angles(pose: HeadPose) -> tuple[float, float, float]:
    """Yaw (to the image right), pitch (up), roll (clockwise in the image) in degrees; zeros for a frontal head."""
    r = FRONTAL @ np.asarray(pose.rotation)  # in head axes: columns are the head's axes seen by the viewer
    forward, side = r[:, 2], r[:, 0]
    yaw = np.degrees(np.arctan2(forward[0], forward[2]))
    pitch = np.degrees(np.arcsin(np.clip(forward[1], -1, 1)))
    roll = np.degrees(np.arctan2(-side[1], side[0]))
    return float(yaw), float(pitch), float(roll)


def reprojection_error(
    points_NJ2: np.ndarray,
    shape: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    scale: float,
    camera: Camera,
) -> float:
    """Mean distance in pixels between landmarks and the projected shape."""
    moved = scale * np.einsum("nij,kj->nki", rotation, shape) + translation[:, None]
    pixels = moved[..., :2] / moved[..., 2:] * camera.focal + [camera.cx, camera.cy]
    return float(np.linalg.norm(pixels - points_NJ2, axis=-1).mean())


def _pose(rotation: np.ndarray, translation: np.ndarray, scale: float) -> HeadPose:
    rows = tuple(tuple(float(v) for v in row) for row in rotation)
    return HeadPose(rows, (float(translation[0]), float(translation[1]), float(translation[2])), float(scale))


def _start(rays_NJ2: np.ndarray, shape: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Scaled orthographic poses by linear least squares: R N×3×3, t N×3, and the size that puts them at `distance`."""
    centre = shape.mean(0)
    affine_N23 = np.einsum("njc,jk->nck", rays_NJ2 - rays_NJ2.mean(1, keepdims=True), np.linalg.pinv(shape - centre).T)
    u, s, vt = np.linalg.svd(affine_N23, full_matrices=False)
    rows = u @ vt  # nearest pair of orthonormal rows
    rotation = np.concatenate([rows, np.cross(rows[:, 0], rows[:, 1])[:, None]], axis=1)
    apparent = s.mean(1)  # scale / depth
    size = float(np.median(apparent)) * distance
    depth = size / apparent
    translation = np.concatenate([rays_NJ2.mean(1) * depth[:, None], depth[:, None]], axis=1)
    return rotation, translation - size * rotation @ centre, size


def _residuals(
    rays: np.ndarray, shape: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals N×J×2 (in rays) and Jacobians to the camera-space point, N×J×2×3; also the turned shape N×J×3."""
    turned = np.einsum("nij,kj->nki", rotation, shape)
    x, y, z = np.moveaxis(turned + translation[:, None], -1, 0)
    residual = np.stack([x / z, y / z], -1) - rays
    zero = np.zeros_like(z)
    to_point = np.stack([np.stack([1 / z, zero, -x / z**2], -1), np.stack([zero, 1 / z, -y / z**2], -1)], -2)
    return residual, to_point, turned


def _pose_jacobian(to_point: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """N×J×2×6: a small turn w (left of R: d(Rx) = w × Rx) and a shift."""
    a, b, c = np.moveaxis(turned, -1, 0)
    zero = np.zeros_like(a)
    cross = np.stack([np.stack([zero, c, -b], -1), np.stack([-c, zero, a], -1), np.stack([b, -a, zero], -1)], -2)
    return np.concatenate([to_point @ cross, to_point], axis=-1)


def _robust(residual: np.ndarray, focal: float) -> np.ndarray:
    """Huber weights at 2 pixels, N×J."""
    pixels = np.linalg.norm(residual, axis=-1) * focal
    return 1.0 / np.maximum(1.0, pixels / 2.0)


def _turn(rotation: np.ndarray, w: np.ndarray) -> np.ndarray:
    return exp_so3(w) @ rotation


def exp_so3(w: np.ndarray) -> np.ndarray:
    """Rotation vectors …×3 → matrices …×3×3 (Rodrigues)."""
    angle = np.linalg.norm(w, axis=-1)[..., None, None]
    zero = np.zeros_like(w[..., 0])
    k = np.stack([zero, -w[..., 2], w[..., 1], w[..., 2], zero, -w[..., 0], -w[..., 1], w[..., 0], zero], -1)
    k = k.reshape(*w.shape[:-1], 3, 3)
    safe = np.where(angle < 1e-8, 1.0, angle)
    first = np.where(angle < 1e-8, 1.0, np.sin(safe) / safe)
    second = np.where(angle < 1e-8, 0.5, (1 - np.cos(safe)) / safe**2)
    return np.eye(3) + first * k + second * (k @ k)


def _fit_frames(
    rays: np.ndarray, shape: np.ndarray, rotation: np.ndarray, translation: np.ndarray, focal: float, rounds: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Newton on every frame's pose at once, the shape fixed."""
    for _ in range(rounds):
        residual, to_point, turned = _residuals(rays, shape, rotation, translation)
        jacobian = _pose_jacobian(to_point, turned)
        weight = _robust(residual, focal)
        normal = np.einsum("njab,nj,njac->nbc", jacobian, weight, jacobian)
        gradient = np.einsum("njab,nj,nja->nb", jacobian, weight, residual)
        normal += 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(6)
        step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
        rotation = _turn(rotation, step[:, :3])
        translation = translation + step[:, 3:]
    return rotation, translation


def _fit_shape(
    rays: np.ndarray,
    shape: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    size: float,
    focal: float,
    rounds: int = 12,
) -> np.ndarray:
    """Bundle adjustment: shape J×3 (in camera units) and poses together; only the shape is returned."""
    prior, count = shape, len(shape)
    rotation, translation = _fit_frames(rays, shape, rotation, translation, focal)
    per_frame = focal**2 * min(1.0, _EFFECTIVE_FRAMES / len(rays))  # residuals in pixels, σ = 1
    stiffness = 1.0 / (_PRIOR_SIGMA * size) ** 2
    for _ in range(rounds):
        residual, to_point, turned = _residuals(rays, shape, rotation, translation)
        pose_J = _pose_jacobian(to_point, turned)  # N J 2 6
        shape_J = to_point @ rotation[:, None]  # N J 2 3
        weight = _robust(residual, focal) * per_frame
        h_pp = np.einsum("njab,nj,njac->nbc", pose_J, weight, pose_J)
        h_pp += 1e-6 * np.trace(h_pp, axis1=1, axis2=2)[:, None, None] * np.eye(6)
        h_ss = np.einsum("njab,nj,njac->jbc", shape_J, weight, shape_J) + stiffness * np.eye(3)
        h_sp = np.einsum("njab,nj,njac->njbc", shape_J, weight, pose_J).reshape(len(rays), 3 * count, 6)
        g_p = np.einsum("njab,nj,nja->nb", pose_J, weight, residual)
        g_s = np.einsum("njab,nj,nja->jb", shape_J, weight, residual) + stiffness * (shape - prior)
        coupled = np.concatenate([np.swapaxes(h_sp, 1, 2), g_p[..., None]], axis=-1)  # N 6 (3J+1)
        eliminated = np.linalg.solve(h_pp, coupled)
        reduced = np.einsum("nab,nbc->ac", h_sp, eliminated)
        full = np.zeros((3 * count, 3 * count))
        for j in range(count):
            full[3 * j : 3 * j + 3, 3 * j : 3 * j + 3] = h_ss[j]
        step = -np.linalg.solve(full - reduced[:, :-1], g_s.reshape(-1) - reduced[:, -1])
        shape = shape + step.reshape(count, 3)
        pose_step = -eliminated[..., -1] - np.einsum("nab,b->na", eliminated[..., :-1], step)
        rotation = _turn(rotation, pose_step[:, :3])
        translation = translation + pose_step[:, 3:]
    return shape


def _to_head_space(
    shape: np.ndarray, canonical: np.ndarray, rotation: np.ndarray, translation: np.ndarray, distance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Turn, move and scale the shape onto the canonical face, and carry the poses along.

    The mean depth becomes `distance`: the camera cannot tell a small near head from a large far one.
    """
    a, b = shape - shape.mean(0), canonical - canonical.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    q = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt  # canonical ≈ k q shape + m
    k = float((s * [1.0, 1.0, np.sign(np.linalg.det(u @ vt))]).sum() / (a**2).sum())
    m = canonical.mean(0) - k * q @ shape.mean(0)
    head = k * shape @ q.T + m
    # x_cam = R shape + t,  shape = qᵀ (head - m) / k
    new_rotation = rotation @ q.T
    scale = 1.0 / k
    new_translation = translation - scale * (new_rotation @ m)
    ratio = distance / float(new_translation[:, 2].mean())
    return head, new_rotation, new_translation * ratio, scale * ratio


def _smooth(
    times: np.ndarray, rotation: np.ndarray, translation: np.ndarray, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian means over time of translations and of rotations (chordal mean, back to SO(3) by SVD)."""
    if sigma <= 0 or len(times) < 2:
        return rotation, translation
    reach = int(np.ceil(3 * sigma))
    total = np.zeros(len(times))
    turn, shift = np.zeros_like(rotation), np.zeros_like(translation)
    order = np.arange(len(times))
    for offset in range(-reach, reach + 1):
        other = order + offset
        inside = (other >= 0) & (other < len(times))
        other = other.clip(0, len(times) - 1)
        weight = np.where(inside, np.exp(-0.5 * ((times[other] - times) / sigma) ** 2), 0.0)
        total += weight
        turn += weight[:, None, None] * rotation[other]
        shift += weight[:, None] * translation[other]
    u, _, vt = np.linalg.svd(turn / total[:, None, None])
    sign = np.ones((len(times), 3))
    sign[:, 2] = np.linalg.det(u @ vt)
    return (u * sign[:, None, :]) @ vt, shift / total[:, None]
