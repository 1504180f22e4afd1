"""Design section 4: the colours of a procedural head.

Everything is a function of points in head space, blended over the width of a pixel (`px`, in units) at its edges, so
pictures of any size agree. Colours are 3×M, one column a point.

The light stands still relative to the head, as when a camera moves around a sitter: with a matte skin a point then has
one colour from all sides, which makes multi-view consistency testable to the grey level.
"""

from __future__ import annotations

import numpy as np

from lavatar.datasets.synthetic_head import (
    BROW_Y,
    EYE_RADIUS,
    EYE_X,
    EYE_Y,
    EYE_Z,
    MOUTH_Y,
    Array,
    Colour,
    Face,
    beard_cover,
    gaze_direction,
    hair_depth,
    lid_curves,
    mouth_curves,
    smooth,
    turn,
)
from lavatar.datasets.synthetic_landmarks import brow_line

LIP_Z = 0.74  # about where the lips meet, closed
KEY, FILL = np.array((-0.52, 0.46, 0.72)), np.array((0.85, 0.05, 0.52))
KEY, FILL = KEY / np.linalg.norm(KEY), FILL / np.linalg.norm(FILL)


def column(colour: Colour) -> Array:
    """Colour → 3×1."""
    return np.array(colour, np.float32)[:, None]


def mix(base_3M: Array, paint: Array, weight_M: Array) -> None:
    """Lay `paint` (3×1 or 3×M) over `base_3M` with opacity `weight_M`, in place."""
    base_3M += (paint - base_3M) * weight_M


def edge(distance: Array, px: float) -> Array:
    """0 → 1 as a signed distance passes zero, over one pixel."""
    return np.minimum(np.maximum(distance * np.float32(1 / px) + 0.5, 0.0), 1.0)


def light(albedo_3M: Array, normal_3M: Array, shade: Array | float = 1.0, soft: float = 0.30) -> Array:
    """Key light from the upper left, cool fill from the right, sky from above; `soft` wraps light around the form."""
    x, y, z = normal_3M
    key = np.maximum((x * float(KEY[0]) + y * float(KEY[1]) + z * float(KEY[2]) + soft) * (1 / (1 + soft)), 0.0) * shade
    fill = np.maximum(x * float(FILL[0]) + y * float(FILL[1]) + z * float(FILL[2]), 0.0) * shade
    sky = 0.07 * y
    open_ = 0.35 + 0.65 * shade
    out = np.empty_like(albedo_3M)
    for c, (k, f, a) in enumerate(((0.74, 0.15, 0.33), (0.72, 0.16, 0.30), (0.68, 0.19, 0.30))):
        np.multiply(albedo_3M[c], key * k + fill * f + (sky + a) * open_, out=out[c])
    return out


def outside(face: Face, p_3M: Array, normal_3M: Array, px: float) -> Array:
    """The whole outside of the head, lit: skin where there is no hair, hair over it where there is."""
    line, _ = hair_depth(face.identity, *p_3M)
    cover = edge(line - 0.01, px + 0.012)
    colour = np.zeros_like(p_3M)
    bare, hairy = np.flatnonzero(cover < 1), np.flatnonzero(cover > 0)
    colour[:, bare] = _skin(face, p_3M.take(bare, 1), normal_3M.take(bare, 1), px)
    if hairy.size:
        over = _hair(face, p_3M.take(hairy, 1), normal_3M.take(hairy, 1), line.take(hairy))
        under = colour.take(hairy, 1)
        colour[:, hairy] = under + (over - under) * cover.take(hairy)
    return colour


def _skin(face: Face, p_3M: Array, normal_3M: Array, px: float) -> Array:
    """Skin, brows, lips and beard. Eyes and mouth come on top."""
    x, y, z = p_3M
    i = face.identity
    up, down, _ = mouth_curves(face, x)
    front = np.clip(z * 2.5, 0.0, 1.0)
    albedo = np.repeat(column(i.skin), x.size, axis=1)
    _blush(face, albedo, x, y, front)
    if i.beard:
        cover = beard_cover(face, x, y, z, up, down) * i.beard
        grain = 0.82 + 0.18 * np.sin(x * 71 + 3 * np.sin(y * 33)) * np.sin(y * 57 + 2 * np.sin(x * 41))
        mix(albedo, column(i.hair) * (0.9 + 0.25 * grain), cover * 0.93)
    shade = _creases(face, x, y, front, up, down)
    _lips(face, albedo, x, y, front, up, down, px)
    _brows(face, albedo, x, y, front, px)
    _lids(face, albedo, x, y, front, px)
    colour = light(albedo, normal_3M, shade)
    _gloss(face, colour, normal_3M, x, y, front, down)
    return colour


def _blush(face: Face, albedo: Array, x: Array, y: Array, front: Array) -> None:
    """Redder cheeks, nose and eyelids."""
    ax, i = np.abs(x), face.identity
    rise = 0.05 * face.expression.smile
    cheek = np.exp(-np.square((ax - 0.46) * 4.6) - np.square((y + 0.20 - rise) * 5.5))
    nose = np.exp(-np.square(x * 6.5) - np.square((y + 0.22) * 6.5))
    weight = front * np.minimum(cheek * (0.8 + 0.5 * face.expression.smile) + 0.55 * nose, 1.0)
    warm = column((0.93, 0.42, 0.36)) * (0.35 + 0.65 * float(np.mean(i.skin)))
    mix(albedo, warm, weight * np.float32(0.36 * i.blush))


def _creases(face: Face, x: Array, y: Array, front: Array, up: Array, down: Array) -> Array:
    """1 in the light, darker where light does not get: eye sockets, beside and under the nose, around the mouth."""
    i, e, ax = face.identity, face.expression, np.abs(x)
    nose_y = y - 0.02 * e.smile
    under = np.exp(-np.square((x - 0.05) * 5.5 / i.nose_width) - np.square((nose_y + 0.385) * 11))
    nostril = np.exp(-np.square((ax - 0.068 * i.nose_width) * 24) - np.square((nose_y + 0.315) * 34))
    side = np.exp(-np.square((x - 0.17 - 0.10 * (0.2 - y)) * 9) - np.square((y + 0.02) * 3.6))
    socket = np.exp(-np.square((ax - 0.30) * 4.2) - np.square((y - 0.335 - 0.06 * e.brows) * 10))
    fold_x = 0.20 + 0.20 * np.clip(-0.27 - y, 0.0, 0.5) * (1 + 0.9 * e.smile) + 0.03 * e.smile
    fold = np.exp(-np.square((ax - fold_x) * 22)) * smooth((-0.27 - y) * 9) * smooth((y + 0.60) * 7)
    corner = np.exp(-np.square((ax - face.mouth_w * 1.02) * 17) - np.square((y - MOUTH_Y - face.lift) * 17))
    below = np.exp(-np.square(x * 4.5) - np.square((y - (down - face.lip_down - 0.055)) * 14))
    frown = np.exp(-np.square((ax - 0.055) * 30) - np.square((y - BROW_Y + 0.03) * 11)) * max(0.0, -e.brows)
    raised = sum(np.exp(-np.square((y - BROW_Y - h) * 34)) for h in (0.27, 0.37)) * smooth((0.5 - ax) * 4)
    dark = 0.40 * under + 0.75 * nostril + 0.13 * side + 0.22 * socket + (0.07 + 0.30 * e.smile) * fold
    dark = dark + 0.40 * corner + 0.22 * below + 0.35 * frown + 0.13 * raised * max(0.0, e.brows)
    return np.clip(1.0 - dark * front, 0.1, 1.0)


def _lips(face: Face, albedo: Array, x: Array, y: Array, front: Array, up: Array, down: Array, px: float) -> None:
    """Upper lip with a bow, lower lip, and the dark line between them."""
    across = np.clip(1.0 - np.square(x / face.mouth_w), 0.0, 1.0)
    bow = 1.0 - 0.30 * np.exp(-np.square(x * 15))
    blur = 1.6 * px + 0.008
    top = edge(up + face.lip_up * across * bow - y, blur) * edge(y - 0.5 * (up + down), px)
    bottom = edge(y - (down - face.lip_down * across), blur) * edge(0.5 * (up + down) - y, px)
    inside = edge((face.mouth_w - np.abs(x)) * 0.6, blur) * front
    lips = column(face.identity.lips)
    mix(albedo, lips * 0.90, top * inside)
    mix(albedo, lips, bottom * inside)
    gap = np.maximum(np.abs(y - 0.5 * (up + down)) - 0.5 * (up - down), 0.0)
    seam = edge(0.010 - gap, px + 0.006) * edge(face.mouth_w * 1.04 - np.abs(x), 2 * px) * front
    mix(albedo, lips * 0.35, seam * 0.9)


def _brows(face: Face, albedo: Array, x: Array, y: Array, front: Array, px: float) -> None:
    """Brows: thick inside, thin outside, with strokes of hair."""
    i, ax = face.identity, np.abs(x)
    a = np.clip((ax - 0.115) / 0.50, -0.2, 1.2)
    _, line = brow_line(face, np.clip(a, 0.0, 1.0))
    thick = i.brow_thickness * (1.05 - 0.65 * np.clip(a, 0.0, 1.0))
    stroke = 0.003 * np.sin(ax * 120 + 60 * (y - line)) + 0.002 * np.sin(ax * 71)
    off = np.abs(y - line) - thick + stroke
    ends = edge((ax - 0.115) * 0.6, 0.02 + px) * edge((0.615 - ax) * 0.6, 0.02 + px)
    dark = column(i.hair) * (0.62 if i.style != "bald" else 0.8)
    mix(albedo, dark, edge(-off, px + 0.012) * ends * front * 0.92)


def _lids(face: Face, albedo: Array, x: Array, y: Array, front: Array, px: float) -> None:
    """Lashes along the edge of the upper lid, the crease above it, a faint line below, a touch of shadow on the lid."""
    ax = np.abs(x)
    a, b = (ax - EYE_X) / (0.95 * EYE_RADIUS), (y - EYE_Y) / EYE_RADIUS
    up, low = lid_curves(face, np.clip(a, -1.0, 1.0))
    near = edge((1.12 - np.abs(a)) * EYE_RADIUS, 0.02 + px) * front
    rest = face.identity.eye * 1.12 * np.maximum(1 - a * a, 0.0) + face.identity.slant * a
    feminine = float(np.clip((face.identity.eye - 0.5) * 8, 0, 1))
    mix(
        albedo,
        column(face.identity.skin) * 0.80,
        edge((rest + 0.20 - b) * EYE_RADIUS, 0.02) * edge(b - up, 0.1) * near * 0.55,
    )
    crease = np.abs(b - rest - 0.20) * EYE_RADIUS
    mix(albedo, column(face.identity.skin) * 0.45, edge(0.008 - crease, 0.010 + px) * near * 0.75)
    lash = edge((b - up) * EYE_RADIUS + 0.004, px) * edge(
        up * EYE_RADIUS + 0.022 + 0.020 * feminine * np.clip(a, 0, 1) - b * EYE_RADIUS, px
    )
    mix(albedo, np.array([[0.06], [0.04], [0.04]], np.float32), lash * near * 0.95)
    lower = edge((low - b) * EYE_RADIUS, px) * edge(0.012 - (low - b) * EYE_RADIUS, px + 0.004)
    mix(albedo, column(face.identity.skin) * 0.50, lower * near * 0.7)


def _gloss(face: Face, colour: Array, normal: Array, x: Array, y: Array, front: Array, down: Array) -> None:
    """Soft highlights on the skin, tighter ones on the lower lip."""
    half = KEY + np.array((0.0, 0.0, 1.0))
    half = half / np.linalg.norm(half)
    facing = np.clip(normal[0] * half[0] + normal[1] * half[1] + normal[2] * half[2], 0.0, 1.0)
    facing = facing * facing
    facing = facing * facing
    sharp = facing * facing
    sharp = sharp * sharp
    sharp = sharp * sharp
    lip = np.exp(-np.square((down - 0.45 * face.lip_down - y) * 30) - np.square((x + 0.06) * 9)) * front
    colour += 0.06 * facing + 0.05 * sharp + 0.14 * lip


def _hair(face: Face, p_3M: Array, normal: Array, line: Array) -> Array:
    """Hair with strands and a band of sheen."""
    i = face.identity
    x, y, z = p_3M
    angle = turn(x, z)
    if i.style == "afro":
        strand = 0.5 + 0.5 * np.sin(34 * x + 6 * np.sin(23 * y)) * np.sin(34 * y + 6 * np.sin(23 * z))
    else:
        strand = 0.5 + 0.3 * np.sin(74 * angle + 9 * np.sin(2.3 * y + 5 * angle)) + 0.2 * np.sin(159 * angle + 7 * y)
    sheen = np.exp(-np.square((normal[1] - 0.60 + 0.05 * strand) * 5)) * (0.10 + 0.14 * float(np.mean(i.hair)))
    albedo = column(i.hair) * (0.78 + 0.38 * strand)
    return light(albedo, normal, 0.55 + 0.45 * smooth(line * 7), soft=0.4) + sheen * (0.6 + 0.4 * strand)


def eyeball(face: Face, side: float, p_3M: Array, ray_3M: Array, px: float) -> tuple[Array, Array]:
    """Colour and opacity of one eye (side −1: image left) at points of the lids; the ray goes on to the eyeball."""
    x, y, z = p_3M
    ray_3M = ray_3M / np.sqrt((ray_3M * ray_3M).sum(0))
    centre = (side * EYE_X, EYE_Y, EYE_Z)
    qx, qy, qz = x - centre[0], y - centre[1], z - centre[2]
    along = qx * ray_3M[0] + qy * ray_3M[1] + qz * ray_3M[2]
    root = np.sqrt(np.maximum(along * along - (qx * qx + qy * qy + qz * qz - EYE_RADIUS**2), 0.0))
    step = -along - root
    n = np.stack([qx + ray_3M[0] * step, qy + ray_3M[1] * step, qz + ray_3M[2] * step]) / np.float32(EYE_RADIUS)
    a, b = side * qx / (0.95 * EYE_RADIUS), qy / EYE_RADIUS
    up, low = lid_curves(face, np.clip(a, -1.0, 1.0))
    opening = (
        edge((up - b) * EYE_RADIUS, px) * edge((b - low) * EYE_RADIUS, px) * edge((1 - np.abs(a)) * EYE_RADIUS, px)
    )
    albedo = _iris(face, n, px)
    depth_under_lid = smooth((up - n[1]) * 3.2)
    colour = light(albedo, n, 0.45 + 0.55 * depth_under_lid, soft=0.6) * (0.72 + 0.36 * depth_under_lid)
    glint = (np.array((-0.30, 0.34)) if side < 0 else np.array((-0.22, 0.34)))[:, None]
    away = np.sqrt(np.square(n[0] - glint[0]) + np.square(n[1] - glint[1])) * EYE_RADIUS
    mix(colour, np.ones((3, 1), np.float32), edge(0.030 - away, px) * 0.95)
    return colour, opening


def _iris(face: Face, n: Array, px: float) -> Array:
    """Sclera, iris with fibres and a dark ring, pupil; turned by the gaze."""
    e, i = face.expression, face.identity
    g = gaze_direction(e).astype(np.float32)
    off = np.sqrt(np.maximum(2 - 2 * (n[0] * g[0] + n[1] * g[1] + n[2] * g[2]), 0.0)) * EYE_RADIUS
    turn = np.arctan2(n[1] - g[1], n[0] - g[0])
    albedo = np.repeat(column((0.97, 0.96, 0.95)), n.shape[1], axis=1)
    fibre = 0.82 + 0.18 * np.sin(turn * 23 + 3 * np.sin(turn * 7)) + 1.6 * (off - 0.06)
    mix(albedo, column(i.iris) * fibre, edge(0.122 - off, px))
    mix(albedo, column(i.iris) * 0.30, edge(0.122 - off, px) * edge(off - 0.108, px))
    mix(albedo, column((0.03, 0.03, 0.04)), edge(0.054 - off, px))
    return albedo


def mouth(face: Face, p_3M: Array, ray_3M: Array, px: float) -> tuple[Array, Array]:
    """Colour and opacity of what shows between the lips: teeth on their arch, tongue, darkness."""
    x, y, z = p_3M
    up, down, _ = mouth_curves(face, x)
    opening = edge(up - y, px) * edge(y - down, px) * edge(face.mouth_w - np.abs(x), px) * np.clip(z * 2.5, 0.0, 1.0)
    colour = np.repeat(column((0.20, 0.05, 0.06)), x.size, axis=1)
    tx, ty = _arch(face, p_3M, ray_3M, 0.10)
    low = MOUTH_Y - 0.92 * face.gap_down
    tongue = np.square(tx / 0.24) + np.square((ty - low - 0.02) / (0.12 + 0.05 * face.expression.tongue))
    mix(
        colour, column((0.78, 0.36, 0.38)) * (0.75 + 0.4 * smooth((ty - low) * 5)), edge((1 - tongue) * 0.10, px + 0.01)
    )
    for edge_y, sign, length in (
        (MOUTH_Y - 0.050, 1.0, 0.15),
        (MOUTH_Y - 0.045 - 0.80 * face.gap_down - 0.06, -1.0, 0.13),
    ):
        width = np.float32(0.080 if sign > 0 else 0.062)
        into = np.abs(np.mod(tx / width, 1.0) - 0.5 if sign < 0 else np.mod(tx / width + 0.5, 1.0) - 0.5)
        tooth = sign * (ty - edge_y) - 0.02 * np.square(into * 2) - 0.10 * tx * tx
        bone = edge(tooth, px) * edge(length - tooth, px) * edge(0.33 - np.abs(tx), px)
        gap = smooth((into - 0.42) * 12)
        ivory = column((0.96, 0.94, 0.88)) * (1 - 0.28 * gap) * (1.0 - 1.1 * np.square(tx))
        mix(colour, ivory if sign > 0 else ivory * 0.92, bone)
        mix(colour, column((0.72, 0.34, 0.34)), edge(tooth - length, px) * edge(0.33 - np.abs(tx), px) * (sign > 0))
    ceiling = smooth((up - y) / max(0.10, 0.35 * face.gap_down)) * 0.45 + 0.55
    rim = smooth((1 - np.abs(x) / face.mouth_w) * 3.0) * 0.5 + 0.5
    return colour * ceiling * rim, opening


def _arch(face: Face, p_3M: Array, ray_3M: Array, back: float) -> tuple[Array, Array]:
    """x and y where the ray meets the dental arch z = z_lips − back − 0.55x²: the mouth has depth."""
    x, y, z = p_3M
    tx, ty = x, y
    for _ in range(2):
        step = (LIP_Z - back - 0.55 * tx * tx - z) / ray_3M[2]
        tx, ty = x + ray_3M[0] * step, y + ray_3M[1] * step
    return tx, ty
