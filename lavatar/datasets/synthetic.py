"""Design section 4: synthetic subjects. A procedural 3D head with exact image, alpha, landmarks, pose and camera.

`render` casts one ray a pixel through the pinhole camera onto an implicit surface in head space
(synthetic_head.py) and paints what it meets (synthetic_paint.py). numpy only; the same arguments give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lavatar.contracts import Camera, HeadPose
from lavatar.datasets import synthetic_paint as paint
from lavatar.datasets.synthetic_head import (
    EYE_RADIUS,
    EYE_X,
    EYE_Y,
    MOUTH_Y,
    THICKEST,
    Array,
    Expression,
    Face,
    Identity,
    march,
    mouth_curves,
    surface,
)
from lavatar.datasets.synthetic_landmarks import landmarks

__all__ = ["Expression", "Identity", "default_camera", "default_pose", "project", "render", "rotation"]

Triple = tuple[float, float, float]
SCALE, DISTANCE, FOCAL = 0.125, 4.0, 5000.0
BLOCK = 9_000  # rays walked at a time


def default_camera(size: int) -> Camera:
    """The portrait camera: 5000 px at 512, principal point in the middle."""
    return Camera(FOCAL * size / 512, size / 2, size / 2, size)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Head-to-camera rotation in degrees; zeros face the camera. yaw > 0 turns to the right of the image."""
    a, b, c = np.radians((yaw, pitch, roll))
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    nod = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    tilt = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray(np.diag((1.0, -1.0, -1.0)) @ tilt @ turn @ nod)


def default_pose(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0, x: float = 0.0, y: float = 0.0) -> HeadPose:
    """A head in the middle of the portrait, turned by degrees and moved by metres."""
    r = rotation(yaw, pitch, roll)
    return HeadPose(tuple(tuple(map(float, row)) for row in r), (float(x), float(y), DISTANCE), SCALE)


def project(points_K3: np.ndarray, pose: HeadPose, camera: Camera) -> np.ndarray:
    """Head space → pixels, K×2."""
    cam = pose.scale * points_K3 @ np.array(pose.rotation).T + np.array(pose.translation)
    return np.asarray(cam[:, :2] / cam[:, 2:] * camera.focal + (camera.cx, camera.cy))


@dataclass(frozen=True)
class _Rays:
    """Rays through the middles of pixels, in head space: origin + t·direction, t = 0 near the middle of the head.

    Both are affine in the pixel, so they are kept as a part that goes with the column and one that goes with the row.
    t is in units to 0.3 % (directions are not normalised).
    """

    column: Array  # 6×size: of origin, of direction
    row: Array
    px: float  # width of a pixel at the head, in units
    size: int
    pose: HeadPose
    camera: Camera

    def at(self, pixels: Array) -> tuple[Array, Array]:
        """Origin and direction, 3×M each, of flat pixel numbers."""
        rows = pixels // self.size
        columns = pixels - rows * self.size
        both = self.column.take(columns, 1)
        both += self.row.take(rows, 1)
        return both[:3], both[3:]

    def window(self, centre: Triple, radius: float, hidden: Array | None = None) -> Array:
        """Pixels that a sphere can cover, without those known to be hidden."""
        (u, v), reach = project(np.array([centre]), self.pose, self.camera)[0], radius / self.px * 1.05 + 1
        first, last = np.clip((v - reach, u - reach), 0, self.size), np.clip((v + reach, u + reach), 0, self.size)
        rows, columns = (np.arange(int(a), int(np.ceil(b))) for a, b in zip(first, last, strict=True))
        pixels = np.add.outer(rows * self.size, columns).ravel()
        return np.asarray(pixels if hidden is None else pixels[~hidden[pixels]])


def _rays(pose: HeadPose, camera: Camera, stride: int = 1) -> _Rays:
    """Rays through the middles of blocks of stride×stride pixels; the last block may reach over the edge."""
    size = -(-camera.size // stride)
    grid = Camera(camera.focal / stride, camera.cx / stride, camera.cy / stride, size)
    u = (np.arange(size) + 0.5 - grid.cx) / grid.focal
    v = (np.arange(size) + 0.5 - grid.cy) / grid.focal
    rot, t = np.array(pose.rotation), np.array(pose.translation)
    back, reach = (rot.T @ t)[:, None], t[2] / pose.scale
    across, along = rot[0][:, None] * u, rot[1][:, None] * v + rot[2][:, None]
    column = np.concatenate([across * reach, across]).astype(np.float32)
    row = np.concatenate([along * reach - back / pose.scale, along]).astype(np.float32)
    return _Rays(column, row, float(t[2] / (grid.focal * pose.scale)), size, pose, grid)


def render(
    identity: Identity, expression: Expression, pose: HeadPose, camera: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The picture of a head: rgb float32 HW3 over white, alpha float32 HW, 68 landmarks in pixels (68×2)."""
    face = Face.of(identity, expression)
    rays, coarse = _rays(pose, camera), _rays(pose, camera, 2)
    count = camera.size * camera.size
    rgb, alpha = np.ones((3, count), np.float32), np.zeros(count, np.float32)
    where, point, normal, cover = _geometry(face, rays, coarse)
    hidden = np.zeros(count, bool)
    hidden[where] = cover >= 1
    for layer in (_back_hair, _shirt, _neck, _ears):
        layer(face, rays, hidden, rgb, alpha)
    for part in _blocks(where.size):
        colour = _colour(face, point[:, part], normal[:, part], rays.at(where[part])[1], rays.px)
        _over(rgb, alpha, where[part], colour, cover[part])
    if expression.tongue > 0:
        _tongue(face, rays, where, point, rgb)
    image = np.ascontiguousarray(rgb.T)
    points = project(landmarks(face), pose, camera)
    return image.reshape(camera.size, camera.size, 3), alpha.reshape(camera.size, camera.size), points


def _over(rgb: Array, alpha: Array, where: Array, colour: Array, cover: Array) -> None:
    """Lay a layer over what is there; `where` are the pixels it may touch."""
    under = rgb.take(where, 1)
    rgb[:, where] = under + (np.minimum(np.maximum(colour, 0.0), 1.0) - under) * cover
    alpha[where] += (1.0 - alpha[where]) * cover


# The head ---------------------------------------------------------------------------------------------------------


def _colour(face: Face, point: Array, normal: Array, direction: Array, px: float) -> Array:
    """The outside of the head, with the eyes and the mouth where they are open."""
    colour = paint.outside(face, point, normal, px)
    x, y, z = point
    for side in (-1.0, 1.0):
        box = (np.abs(x - side * EYE_X) < EYE_RADIUS * 1.1) & (np.abs(y - EYE_Y) < EYE_RADIUS) & (z > 0)
        near = np.flatnonzero(box)
        if near.size:
            eye, opening = paint.eyeball(face, side, point.take(near, 1), direction.take(near, 1), px)
            colour[:, near] += (eye - colour[:, near]) * opening
    box = (np.abs(x) < face.mouth_w + 0.05) & (y > -0.66 - face.gap_down) & (y < -0.30) & (z > 0)
    near = np.flatnonzero(box)
    if near.size:
        inside, opening = paint.mouth(face, point.take(near, 1), direction.take(near, 1), px)
        colour[:, near] += (inside - colour[:, near]) * opening
    return colour


def _tongue(face: Face, rays: _Rays, where: Array, point: Array, rgb: Array) -> None:
    """The tip of the tongue, between the lips and over the lower one."""
    out = face.expression.tongue
    centre = (0.0, MOUTH_Y - 0.80 * face.gap_down - 0.015 - 0.055 * out, 0.56 + 0.22 * out)
    pixels, tip, normal, cover = _solid(rays, centre, (0.17, 0.095, 0.30), rays.window(centre, 0.31))
    behind = np.full(rays.size * rays.size, -9.0, np.float32)
    behind[where] = point[2]
    origin, direction = rays.at(pixels)
    head = origin + direction * ((behind[pixels] - origin[2]) / direction[2])
    up, down, _ = mouth_curves(face, head[0])
    between = paint.edge(up - head[1], rays.px) * paint.edge(face.mouth_w - np.abs(head[0]), rays.px)
    seen = np.maximum(paint.edge(tip[2] - head[2], 2 * rays.px), paint.edge(head[1] - down, rays.px)) * between * cover
    albedo = np.repeat(paint.column((0.90, 0.43, 0.45)), pixels.size, axis=1)
    paint.mix(albedo, paint.column((0.70, 0.28, 0.31)), paint.edge(0.006 - np.abs(tip[0]), rays.px) * 0.5)
    colour = np.minimum(paint.light(albedo, normal), 1.0)
    rgb[:, pixels] += (colour - rgb[:, pixels]) * seen


def _geometry(face: Face, rays: _Rays, coarse: _Rays) -> tuple[Array, Array, Array, Array]:
    """Where the head is seen: pixels, points, normals, coverage.

    Every second ray each way is walked to the surface; between four that meet one smooth piece of it, depth and normal
    are interpolated (the error is a thousandth of a unit); at every edge the pixel's own ray is walked.
    """
    t, miss, corner = _coarse(face, coarse)
    if not t.size:
        return (
            np.empty(0, np.int64),
            np.empty((3, 0), np.float32),
            np.empty((3, 0), np.float32),
            np.empty(0, np.float32),
        )
    low = _grow(np.where(miss < 1.5 * coarse.px, t, 9.0), np.minimum)
    spread = _grow(np.where(miss == 0, t, 99.0), np.maximum) - low
    beside = np.repeat(np.repeat(miss < 1.8 * coarse.px, 2, 0), 2, 1)  # a pixel farther off is not covered
    rows, columns = (np.arange(2 * n) + 2 * c for n, c in zip(t.shape, corner, strict=True))
    beside &= (rows[:, None] < rays.size) & (columns < rays.size)
    flat = np.add.outer(rows * rays.size, columns).ravel()
    smooth = ((spread < 6.0 * coarse.px) & beside).ravel()
    inside, rim = np.flatnonzero(smooth), np.flatnonzero(~smooth & ((low < 8.0) & beside).ravel())
    planes = _enlarge(_enlarge(np.concatenate([t[None], _slopes(coarse, t, miss, corner)])).transpose(0, 2, 1))
    between = planes.transpose(0, 2, 1).reshape(4, -1).take(inside, 1)
    origin, direction = rays.at(flat[inside])
    point = origin + direction * between[0]
    origin, direction = rays.at(flat[rim])
    t_rim, miss_rim = march(face, origin, direction, low.ravel()[rim] - coarse.px, rays.px, rounds=14)
    cover = np.maximum(1.0 - miss_rim / rays.px, 0.0)
    kept = np.flatnonzero(cover > 0)
    point_rim = origin.take(kept, 1) + direction.take(kept, 1) * t_rim[kept]
    normals = np.concatenate([between[1:], _normal(face, point_rim, rays.px)], 1)
    normals /= np.sqrt((normals * normals).sum(0) + 1e-12)
    cover = np.concatenate([np.ones(inside.size, np.float32), cover[kept]])
    return flat[np.concatenate([inside, rim[kept]])], np.concatenate([point, point_rim], 1), normals, cover


def _coarse(face: Face, rays: _Rays) -> tuple[Array, Array, tuple[int, int]]:
    """t and distance by which the ray misses, over the rectangle of rays that come near; its first row and column."""
    side = rays.size
    t, miss = np.zeros(side * side, np.float32), np.full(side * side, 9.0, np.float32)
    where, start = _enter(face, rays)
    for part in _blocks(where.size):
        at = where[part]
        t[at], miss[at] = march(face, *rays.at(at), start[part], rays.px)
    t_grid, miss_grid = t.reshape(side, side), miss.reshape(side, side)
    near = miss_grid < 2 * rays.px
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    if not rows.size:
        return t_grid[:0, :0], miss_grid[:0, :0], (0, 0)
    first = max(0, int(rows[0]) - 1), max(0, int(columns[0]) - 1)
    box = slice(first[0], int(rows[-1]) + 2), slice(first[1], int(columns[-1]) + 2)
    return t_grid[box], miss_grid[box], first


def _blocks(count: int) -> list[slice]:
    """Pieces of `count` whose arrays stay in the processor's cache."""
    pieces = max(1, -(-count // BLOCK))
    size = -(-count // pieces)
    return [slice(k, min(k + size, count)) for k in range(0, count, size)] if count else []


def _slopes(rays: _Rays, t: Array, miss: Array, corner: tuple[int, int]) -> Array:
    """3×H×W: normal of the surface at each ray that meets it, from its neighbours on the same piece of surface."""
    rows, columns = (np.arange(n) + c for n, c in zip(t.shape, corner, strict=True))
    both = rays.column[:, None, columns] + rays.row[:, rows, None]
    point = both[:3] + both[3:] * t
    off = np.where(miss == 0, t, np.float32(99.0))
    across, down = (_difference(point, off, axis, rays.px) for axis in (1, 0))
    normal = np.stack([down[k - 2] * across[k - 1] - down[k - 1] * across[k - 2] for k in range(3)])
    return np.asarray(normal / np.sqrt((normal * normal).sum(0) + 1e-20))


def _difference(point_3HW: Array, t: Array, axis: int, px: float) -> Array:
    """Change of the point from ray to ray: both neighbours weighted by how near in depth they are."""
    step, jump = np.diff(point_3HW, axis=axis + 1), np.diff(t, axis=axis)
    weight = 1 / (jump * jump + np.float32(px * px))
    step *= weight
    shape = [(0, 0), (0, 0), (0, 0)]
    shape[axis + 1] = (1, 1)
    step, weight = np.pad(step, shape), np.pad(weight, shape[1:])
    before, after = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
    total = weight[before] + weight[after]
    return np.asarray((step[(slice(None), *before)] + step[(slice(None), *after)]) / total)


def _enter(face: Face, rays: _Rays) -> tuple[Array, Array]:
    """Rays that may meet the head, and where they enter a wide envelope of two ellipsoids around it, by 2×2 rays."""
    drop, grow = 0.5 * face.drop, THICKEST[face.identity.style] + 0.05
    four = _rays(rays.pose, rays.camera, 2)
    start = np.full(four.size * four.size, 9.0, np.float32)
    for centre, radii in (
        ((0.0, 0.33, -0.30), (0.90 + grow, 0.92 + grow, 0.98 + 0.7 * grow)),
        ((0.0, -0.28 - drop, 0.08), (0.92, 0.98 + drop, 0.90)),
    ):
        where, t, inside = _quadric(four, centre, radii, four.window(centre, max(radii)))
        start[where] = np.minimum(start[where], t + 0.7 * grow * inside)
    grid = np.repeat(np.repeat(start.reshape(four.size, four.size), 2, 0), 2, 1)
    start = grid[: rays.size, : rays.size].ravel()
    where = np.flatnonzero(start < 8.0)
    return where, start[where]


def _grow(grid: Array, reduce: np.ufunc) -> Array:
    """HW → 2H×2W: for each full pixel, `reduce` of the four coarse ones around it."""
    for _ in range(2):
        padded = np.concatenate([grid[:1], grid, grid[-1:]])
        grid = np.repeat(reduce(padded[:-1], padded[1:]), 2, 0)[1:-1].T
    return grid


def _enlarge(grid: Array) -> Array:
    """CHW → C2HW: linear interpolation of rows to the middles of the pixels."""
    padded = np.concatenate([grid[:, :1], grid, grid[:, -1:]], 1)
    upper, middle, lower = padded[:, :-2], 0.75 * padded[:, 1:-1], padded[:, 2:]
    out = np.empty((grid.shape[0], 2 * grid.shape[1], grid.shape[2]), np.float32)
    out[:, 0::2] = middle + 0.25 * upper
    out[:, 1::2] = middle + 0.25 * lower
    return out


def _normal(face: Face, point: Array, px: float) -> Array:
    """Gradient of F over about half a pixel, normalised."""
    eps = np.float32(max(0.5 * px, 0.003))
    count = point.shape[1]
    moved = np.tile(point, 4)
    for k in range(3):
        moved[k, (k + 1) * count : (k + 2) * count] += eps
    f = surface(face, moved).reshape(4, count)
    grad = f[1:] - f[0]
    return np.asarray(grad / np.sqrt((grad * grad).sum(0) + 1e-12))


# What is behind it ------------------------------------------------------------------------------------------------


def _quadric(rays: _Rays, centre: Triple, radii: Triple, window: Array) -> tuple[Array, Array, Array]:
    """Rays of `window` against an ellipsoid (radius inf: a cylinder): pixels, t, coverage."""
    inverse = np.array([0.0 if np.isinf(r) else 1 / r for r in radii], np.float32)[:, None]
    o, d = rays.at(window)
    o -= np.array(centre, np.float32)[:, None]
    o, d = o * inverse, d * inverse
    a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0)
    away = c - b * b / a  # squared distance of the ray from the centre, in radii
    width = rays.px / min(radii)
    near = np.flatnonzero(away < 1 + width)
    a, b, away = a[near], b[near], away[near]
    t = (-b - np.sqrt(np.maximum(a * (1 - away), 0.0))) / a
    return window[near], t, np.clip((1 - np.sqrt(np.maximum(away, 0.0))) / width + 0.5, 0.0, 1.0)


def _solid(rays: _Rays, centre: Triple, radii: Triple, window: Array) -> tuple[Array, Array, Array, Array]:
    """Pixels, points, normals and coverage of an ellipsoid."""
    where, t, cover = _quadric(rays, centre, radii, window)
    origin, direction = rays.at(where)
    point = origin + direction * t
    inverse = np.array([0.0 if np.isinf(r) else 1 / (r * r) for r in radii], np.float32)[:, None]
    normal = (point - np.array(centre, np.float32)[:, None]) * inverse
    return where, point, normal / np.sqrt((normal * normal).sum(0) + 1e-9), cover


def _back_hair(face: Face, rays: _Rays, hidden: Array, rgb: Array, alpha: Array) -> None:
    if face.identity.style != "bob":
        return
    where, point, normal, cover = _solid(
        rays, (0.0, 0.02, -0.45), (1.16, 1.18, 0.72), rays.window((0.0, 0.0, -0.45), 1.25, hidden)
    )
    angle = np.arctan2(point[0], point[2] + 1.3)
    strand = 0.5 + 0.3 * np.sin(70 * angle + 3 * np.sin(3 * point[1])) + 0.2 * np.sin(151 * angle + 2 * point[1])
    albedo = paint.column(face.identity.hair) * (0.70 + 0.42 * strand)
    hem = paint.edge(point[1] + 1.02 - 0.03 * np.sin(38 * angle), rays.px)
    shade = 0.45 + 0.55 * paint.smooth((np.abs(point[0]) - 0.62) * 3)
    _over(rgb, alpha, where, paint.light(albedo, normal, shade, soft=0.4), cover * hem)


def _shirt(face: Face, rays: _Rays, hidden: Array, rgb: Array, alpha: Array) -> None:
    where, point, normal, cover = _solid(
        rays, (0.0, -2.20, -0.45), (1.42, 0.92, 0.78), rays.window((0.0, -2.4, -0.45), 1.45, hidden)
    )
    albedo = np.repeat(paint.column(face.identity.shirt), where.size, axis=1)
    paint.mix(albedo, paint.column(face.identity.shirt) * 0.75, paint.smooth(np.sin(point[1] * 26) * 2) * 0.25)
    _over(rgb, alpha, where, paint.light(albedo, normal), cover)


def _neck(face: Face, rays: _Rays, hidden: Array, rgb: Array, alpha: Array) -> None:
    wide = 0.46 * face.identity.width
    where, point, normal, cover = _solid(
        rays, (0.0, 0.0, -0.38), (wide, float("inf"), 0.44), rays.window((0.0, -1.1, -0.38), 0.8, hidden)
    )
    chin = -1.0 * face.identity.length - face.drop
    shadow = 0.35 + 0.65 * paint.smooth((chin - 0.10 - point[1] - 0.25 * point[0]) * 2.2)
    collar = paint.edge(-1.36 - 0.10 * np.square(point[0] / wide) * -1.0 - point[1], rays.px)
    albedo = np.repeat(paint.column(face.identity.skin), where.size, axis=1)
    paint.mix(albedo, paint.column(face.identity.shirt) * 0.85, collar)
    _over(rgb, alpha, where, paint.light(albedo, normal, shadow), cover * (point[1] < -0.1))


def _ears(face: Face, rays: _Rays, hidden: Array, rgb: Array, alpha: Array) -> None:
    wide = 0.90 * (0.5 + 0.5 * face.identity.width)
    for side in (-1.0, 1.0):
        where, point, normal, cover = _solid(
            rays,
            (side * wide, 0.05, -0.26),
            (0.115, 0.235, 0.15),
            rays.window((side * wide, 0.05, -0.26), 0.24, hidden),
        )
        albedo = np.repeat(paint.column(face.identity.skin), where.size, axis=1)
        hollow = paint.smooth(1.2 - np.hypot((point[0] - side * wide) / 0.075, (point[1] - 0.06) / 0.16)) * (
            point[2] > -0.26
        )
        paint.mix(albedo, paint.column(face.identity.skin) * paint.column((0.72, 0.50, 0.46)), hollow)
        _over(rgb, alpha, where, paint.light(albedo, normal), cover)
