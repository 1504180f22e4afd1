"""Design section 4: the shape of a procedural head, as one implicit surface in head space.

Head space: unit 10 cm, x to the image's right of a frontal face, y up, z out of the face. F(p) < 0 inside. Expressions
move the surface itself (jaw, lips, cheeks) and the curves painted on it (lids, brows, lips), so every view of a head is
a view of the same thing. Arrays are float32, one value a point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Colour = tuple[float, float, float]

EYE_X, EYE_Y, EYE_Z = 0.345, 0.12, 0.36
EYE_RADIUS = 0.235
LID = 0.03  # thickness of the lids over the eyeball
MOUTH_Y = -0.56
BROW_Y = 0.475
SKINS: tuple[Colour, ...] = (
    (0.96, 0.79, 0.69), (0.55, 0.36, 0.25), (0.89, 0.68, 0.53),
    (0.74, 0.53, 0.38), (0.98, 0.84, 0.76), (0.40, 0.26, 0.19),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (0.30, 0.17, 0.09), (0.07, 0.06, 0.07), (0.86, 0.67, 0.34),
    (0.16, 0.10, 0.07), (0.66, 0.27, 0.11), (0.62, 0.61, 0.62),
)  # fmt: skip
IRISES: tuple[Colour, ...] = ((0.22, 0.46, 0.70), (0.32, 0.18, 0.08), (0.28, 0.50, 0.26), (0.45, 0.32, 0.14))
SHIRTS: tuple[Colour, ...] = ((0.20, 0.34, 0.55), (0.72, 0.24, 0.22), (0.24, 0.48, 0.38), (0.88, 0.70, 0.28))
STYLES = ("short", "bob", "parted", "afro", "bald")
THICKEST = {"short": 0.32, "bob": 0.23, "parted": 0.30, "afro": 0.37, "bald": 0.0}  # hair, in units


@dataclass(frozen=True)
class Expression:
    """What a face does. jaw, smile, pucker, blink, tongue in [0, 1]; brows, gaze (to the right), gaze_up in [-1, 1]."""

    jaw: float = 0.0
    smile: float = 0.0
    pucker: float = 0.0
    brows: float = 0.0
    blink: float = 0.0
    gaze: float = 0.0
    gaze_up: float = 0.0
    tongue: float = 0.0


@dataclass(frozen=True)
class Identity:
    """Who a face is: all that stays when the expression changes."""

    seed: int
    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    shirt: Colour
    style: str
    beard: float  # 0: none
    width: float  # of the face, around 1
    length: float  # of the lower face
    chin: float
    nose: float
    nose_width: float
    eye: float  # opening of the lids at rest
    slant: float  # of the lid opening, radians
    brow_thickness: float
    brow_arch: float
    mouth: float  # width
    lip: float  # thickness
    cheeks: float
    blush: float

    @staticmethod
    def from_seed(seed: int) -> Identity:
        """The same seed is the same person, and neighbouring seeds differ in what a stranger notices first."""
        rng = np.random.default_rng((20230806, seed))

        def near(mean: float, spread: float) -> float:
            return float(mean + spread * rng.uniform(-1, 1))

        style = STYLES[seed % len(STYLES)]
        skin, hair = SKINS[(seed + seed // 6) % len(SKINS)], HAIRS[(seed + seed // 5) % len(HAIRS)]
        masculine = style in ("short", "bald") or (style == "parted" and seed % 2 == 0)
        redness = near(0.30, 0.08) + (0.0 if masculine else 0.22)
        lips = tuple(float(c) for c in np.array(skin) * (1 - redness) + np.array((0.70, 0.16, 0.20)) * redness)
        return Identity(
            seed=seed, skin=skin, hair=hair, iris=IRISES[(seed + seed // 4) % len(IRISES)],
            lips=(lips[0], lips[1] * 0.86, lips[2] * 0.90), shirt=SHIRTS[(seed + seed // 4) % len(SHIRTS)], style=style,
            beard=1.0 if masculine and (style == "bald" or seed % 3 == 2) else 0.0,
            width=near(1.05 if masculine else 0.96, 0.04), length=near(1.04 if masculine else 0.96, 0.03),
            chin=near(1.25 if masculine else 0.75, 0.15), nose=near(1.15 if masculine else 0.85, 0.12),
            nose_width=near(1.12 if masculine else 0.92, 0.10), eye=near(0.50 if masculine else 0.62, 0.04),
            slant=near(0.05, 0.06), brow_thickness=near(0.070 if masculine else 0.042, 0.008),
            brow_arch=near(0.03 if masculine else 0.07, 0.02), mouth=near(1.02, 0.07),
            lip=near(0.80 if masculine else 1.15, 0.10), cheeks=near(0.8 if masculine else 1.2, 0.15),
            blush=near(0.35 if masculine else 0.65, 0.1),
        )  # fmt: skip


@dataclass(frozen=True)
class Face:
    """One identity in one expression: the numbers from which the surface and its paint are computed."""

    identity: Identity
    expression: Expression
    mouth_w: float  # half width of the mouth
    lift: float  # of the corners of the mouth
    gap_up: float  # opening above and below the line of the mouth, at its middle
    gap_down: float
    drop: float  # of the chin
    lip_up: float  # thickness of the lips
    lip_down: float
    pout: float  # how far the lips stand out
    form: Form

    @staticmethod
    def of(identity: Identity, expression: Expression) -> Face:
        """Apply `expression` to `identity`."""
        e = expression
        parted = 0.07 * e.tongue * (1 - min(1.0, e.jaw * 2))
        gap_down = 0.36 * e.jaw + 0.030 * e.smile * (1 - 0.6 * e.pucker) + parted
        pout = 0.075 + 0.15 * e.pucker - 0.025 * e.smile
        return Face(
            identity=identity, expression=e,
            mouth_w=0.34 * identity.mouth * (1 + 0.32 * e.smile) * (1 - 0.42 * e.pucker),
            lift=0.02 + 0.125 * e.smile - 0.01 * e.pucker,
            gap_up=0.035 * e.jaw + 0.045 * e.smile * (1 - 0.6 * e.pucker) + 0.4 * parted,
            gap_down=gap_down,
            drop=0.34 * e.jaw,
            lip_up=0.085 * identity.lip * (1 - 0.25 * e.smile) * (1 + 0.75 * e.pucker),
            lip_down=0.115 * identity.lip * (1 - 0.20 * e.smile) * (1 + 0.65 * e.pucker),
            pout=pout, form=Form.of(identity, e, pout, gap_down),
        )  # fmt: skip


def smooth(x: Array) -> Array:
    """Smoothstep of x clipped to [0, 1]."""
    x = np.minimum(np.maximum(x, 0.0), 1.0)
    return x * x * (3.0 - 2.0 * x)


def mouth_curves(face: Face, x: Array) -> tuple[Array, Array, Array]:
    """Lower edge of the upper lip, upper edge of the lower lip (y at x), and 1 − (x/w)² across the mouth."""
    across = np.minimum(np.square(x * np.float32(1 / face.mouth_w)), 1.6)
    profile = np.maximum(1.0 - across, 0.0)
    line = MOUTH_Y + face.lift * across
    return line + face.gap_up * profile, line - face.gap_down * np.sqrt(profile) * (0.45 + 0.55 * profile), profile


def gaze_direction(expression: Expression) -> Array:
    """Unit vector in head space along which both eyes look."""
    yaw, pitch = 0.46 * expression.gaze, 0.30 * expression.gaze_up
    return np.array((np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)))


def lid_curves(face: Face, a: Array) -> tuple[Array, Array]:
    """Upper and lower edge of the lid opening over a ∈ [−1, 1] from the inner to the outer corner; in eye radii."""
    rise = np.maximum(1.0 - a * a, 0.0)
    slant = np.float32(face.identity.slant) * a
    low = -0.40 * rise * (1.0 - 0.22 * face.expression.smile) + slant
    open_ = face.identity.eye * 1.12 * rise * (1.0 - 0.25 * a * np.abs(a)) + slant
    closed = -0.36 * rise * (1.0 - 0.22 * face.expression.smile) + slant
    return open_ + (closed - open_) * face.expression.blink, low


def _ellipsoids(p_3M: Array, centres_K3: Array, radii_K3: Array) -> Array:
    """K×M, nearly the distance to each ellipsoid: k(k − 1)/|∇k²|·2, exact for a sphere."""
    inverse = (1 / radii_K3)[:, :, None]
    q = (p_3M - centres_K3[:, :, None]) * inverse
    k = np.sqrt((q * q).sum(1))
    q *= inverse
    return k * (k - 1) / np.sqrt((q * q).sum(1) + np.float32(1e-9))


def _bumps(x: Array, y: Array, table: Array) -> Array:
    """Σ height·exp(−((x − x0)/wx)² − ((y − y0)/wy)²) over the rows (height, x0, y0, wx, wy) of `table`."""
    height, x0, y0, wx, wy = table.T[:, :, None]
    a, b = x - x0, y - y0
    a *= 1 / wx
    b *= 1 / wy
    a *= a
    b *= b
    a += b
    np.negative(a, a)
    np.exp(a, a)
    a *= height
    return np.asarray(a.sum(0))


def _join(a: Array, b: Array, k: float) -> Array:
    """Smooth minimum over a band of width k."""
    h = np.maximum(k - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / k)


def _unjaw(face: Face, x: Array, y: Array) -> Array:
    """y of the point in the closed face that the jaw has brought to (x, y). Smooth, or the cheeks would crease."""
    ax = np.abs(x)
    up, _, profile = mouth_curves(face, x)
    opening = profile * profile  # as the mouth's, but running out softly at its corners
    start = up - (face.gap_up + face.gap_down) * opening + 0.28 * smooth((ax - 0.6 * face.mouth_w) * 1.8)
    below = smooth((start - y) * np.float32(1 / 0.66))
    opening *= face.gap_up + face.gap_down
    lip = np.minimum(opening, np.maximum(up - y, 0.0))
    chin = face.drop * smooth((1.15 - ax) * 1.3)
    return y + lip + (chin - lip) * below


def turn(x: Array, z: Array) -> Array:
    """Sine of the angle around the vertical axis of the skull: strands of hair run along it."""
    depth = z + 0.6
    return x / np.sqrt(x * x + depth * depth + 0.06)


def hair_depth(identity: Identity, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Signed distance from the hairline (> 0: hair grows here) and thickness of the hair."""
    if identity.style == "bald":
        return np.full_like(x, -1.0), np.zeros_like(x)
    angle = turn(x, z)
    if identity.style == "short":
        line = y - 0.93 - 1.05 * (z - 0.62) + 0.16 * np.cos(2.6 * x + 0.4) - 0.10 + 0.02 * np.sin(37 * angle + 6 * x)
        top = smooth((y - 0.45) * 1.5)
        thick = 0.055 + top * (0.14 + 0.10 * smooth((z + 0.1) * 1.2)) + 0.010 * top * np.sin(33 * angle + 5 * y)
    elif identity.style == "bob":
        fringe = 0.06 * np.cos(2.2 * x + 0.5) + 0.012 * np.sin(31 * angle)
        line = np.maximum(y - 0.80 - 0.55 * (z - 0.62) + fringe, (np.abs(x) - 0.72) * 1.2 - 0.55 * (z - 0.2))
        thick = 0.21 + 0.006 * np.sin(41 * angle + 3 * y)
    elif identity.style == "parted":
        off = x + 0.28
        line = y - 0.90 - 0.85 * (z - 0.62) + 0.22 * np.square(x - 0.30) - 0.10 * np.exp(off * off * -81.0)
        thick = 0.19 + 0.09 * smooth(off * 6) - 0.05 * np.exp(off * off * -144.0)
        thick += 0.007 * np.sin(38 * angle + 14 * y)
    else:  # afro
        line = y - 0.80 - 0.80 * (z - 0.62) + 0.05 * np.cos(4 * x) + 0.008 * np.sin(23 * angle)
        thick = 0.33 + 0.022 * np.sin(19 * x + 9 * y) * np.sin(17 * y - 8 * z)
        line = np.minimum(line, y + 0.35)
    return line, thick * smooth(line * np.float32(2.4 if identity.style == "afro" else 5.0))


@dataclass(frozen=True)
class Form:
    """The tables of a face's shape, computed once a picture."""

    centres: Array
    radii: Array
    moved: Array  # bumps that move with the jaw
    still: Array  # bumps that do not

    @staticmethod
    def of(i: Identity, e: Expression, pout: float, gap_down: float) -> Form:
        def table(*rows: tuple[float, ...]) -> Array:
            return np.array(rows, np.float32)

        up = 0.02 * e.smile
        return Form(
            centres=table((0.0, 0.33, -0.30), (0.0, -0.30 * i.length, 0.05)),
            radii=table((0.88 * (0.5 + 0.5 * i.width), 0.92, 0.98), (0.685 * i.width, 0.74 * i.length, 0.62)),
            moved=table(
                (0.235 * i.nose, 0.0, up - 0.20, 0.125 * i.nose_width, 0.135),  # tip of the nose
                (0.13 * i.nose, 0.0, up + 0.06, 0.085, 0.28),  # its bridge
                (0.085 * i.nose_width, 0.125 * i.nose_width, up - 0.235, 0.065, 0.075),  # its wings
                (0.085 * i.chin, 0.0, -0.93 * i.length, 0.17, 0.12),
            ),
            still=table(
                (-0.13, EYE_X, EYE_Y + 0.02, 0.24, 0.17),  # eye sockets
                (0.045, 0.30, BROW_Y + 0.10 * e.brows - 0.04, 0.26, 0.09),
                (0.045 * i.cheeks + 0.075 * e.smile, 0.46, -0.24 + 0.07 * e.smile, 0.20, 0.17),
                (0.5 * pout, 0.0, MOUTH_Y - 0.5 * gap_down, 0.30, 0.30),
            ),
        )


def surface(face: Face, p_3M: Array, hair: bool = True) -> Array:
    """F(p): about the distance to the head in units, negative inside. Mouth and lid openings are closed over."""
    i, form = face.identity, face.form
    x, y, z = p_3M
    below = np.flatnonzero(y < (0.30 if i.beard else -0.05)) if face.drop or i.beard else np.empty(0, np.int64)
    q_3M, low = p_3M, p_3M.take(below, 1)
    if below.size and face.drop:
        q_3M = p_3M.copy()
        q_3M[1, below] = _unjaw(face, low[0], low[1])
    skull, jaw = _ellipsoids(q_3M, form.centres, form.radii)
    f = _join(skull, jaw, 0.34)
    front = np.flatnonzero((z > 0) & (y < 0.78) & (np.abs(x) < 0.95))
    if front.size:
        f[front] = _features(face, f.take(front), p_3M.take(front, 1), q_3M[1].take(front))
    if i.beard and below.size:
        up, down, _ = mouth_curves(face, low[0])
        f[below] -= 0.035 * i.beard * beard_cover(face, low[0], low[1], low[2], up, down)
    if hair and i.style != "bald":
        f -= hair_depth(i, x, y, z)[1]
    return f


def _features(face: Face, f: Array, p_3M: Array, rest: Array) -> Array:
    """Nose, eye sockets, brow ridge, cheeks, chin, lips and lids, added to the smooth head `f`."""
    x, y, z = p_3M
    ax = np.abs(x)
    up, down, profile = mouth_curves(face, x)
    relief = _bumps(ax, rest, face.form.moved) + _bumps(ax, y, face.form.still)
    lips = np.empty((2, x.size), np.float32)
    np.subtract(y, up, out=lips[0])
    np.subtract(down, y, out=lips[1])
    lips *= np.array([[1 / face.lip_up], [1 / face.lip_down]], np.float32)
    lips -= np.float32(0.45)
    lips *= lips
    lips *= np.float32(-2.2)
    np.exp(lips, lips)
    relief += face.pout * profile * np.sqrt(profile) * np.minimum(lips[0] + lips[1], 1.1)
    f = f - relief * np.minimum(z * 2.5, 1.0)
    a, b, c = ax - EYE_X, y - EYE_Y, z - EYE_Z
    lids = np.sqrt(a * a + b * b + c * c) - (EYE_RADIUS + LID)
    return _join(f, lids, 0.07)


def beard_cover(face: Face, x: Array, y: Array, z: Array, up: Array, down: Array) -> Array:
    """0..1: where a beard grows, around the mouth and along the jaw."""
    ax = np.abs(x)
    edge = -0.42 - 0.06 * np.cos(5.0 * ax) + 0.55 * smooth((ax - 0.46) * 2.6)
    area = smooth((edge - y) * 9.0)
    lips = smooth((y - up - face.lip_up) * 14.0) + smooth((down - face.lip_down * 0.95 - y) * 14.0)
    wide = smooth((ax - face.mouth_w) * 14.0)
    return area * np.clip(lips + wide, 0.0, 1.0) * smooth((z + 0.42) * 3.0)


def march(
    face: Face, origin_3M: Array, direction_3M: Array, start_M: Array, px: float, hair: bool = True, rounds: int = 9
) -> tuple[Array, Array]:
    """Walk rays to F = 0: t, and how far outside the ray passes at best (0: it hits). Rays that are done drop out."""
    t, miss, where = start_M.copy(), np.full(start_M.size, 9.0, np.float32), np.arange(start_M.size)
    now, before, step = start_M, start_M, start_M  # the last two are set in the first round
    close = np.float32(0.15 * px)
    o, d, far = origin_3M, direction_3M, start_M + 1.1
    for k in range(rounds):
        f = surface(face, o + d * now, hair)
        if k == 0:
            slope: Array | np.float32 = np.float32(1.15)
        else:  # secant: how much F fell on the last step, within what F's slope can be
            slope = np.minimum(np.maximum((before - f) / (step + np.float32(1e-12)), 0.5), 2.2)
        step = f / slope
        size = np.abs(f)
        nearer = np.flatnonzero(size < miss[where])
        hits = where[nearer]
        miss[hits] = size[nearer]
        t[hits] = now[nearer] + np.where(size[nearer] < close, step[nearer], 0.0)
        keep = np.flatnonzero((size > close) & (now < far))
        if not keep.size:
            break
        step, before = step[keep], f[keep]
        now, far, where, o, d = now[keep] + step, far[keep], where[keep], o.take(keep, 1), d.take(keep, 1)
    return t, np.where(miss > close, miss, 0.0)
