"""Design section 4: how a synthetic subject acts. Each part of the face follows pulses of its own, so that expressions
vary independently, each is seen often, and every stretch of about 40 frames shows all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lavatar.contracts import HeadPose
from lavatar.datasets.synthetic import default_pose
from lavatar.datasets.synthetic_head import Expression

FPS = 25.0


@dataclass(frozen=True)
class _Channel:
    """Pulses: mean length in frames, range of heights, shares of a pulse held at its height and at rest; signs."""

    period: float
    low: float = 0.45
    high: float = 1.0
    held: float = 0.25
    rest: float = 0.15
    both: bool = False


CHANNELS = {
    "jaw": _Channel(19.0),
    "smile": _Channel(27.0),
    "pucker": _Channel(31.0),
    "brows": _Channel(23.0, both=True),
    "blink": _Channel(23.0, low=1.0, held=0.28, rest=0.45),
    "gaze": _Channel(17.0, both=True, held=0.35),
    "gaze_up": _Channel(29.0, both=True, held=0.35),
    "tongue": _Channel(37.0),
    "yaw": _Channel(43.0, low=0.3, both=True, held=0.1),
    "pitch": _Channel(34.0, low=0.3, both=True, held=0.1),
    "roll": _Channel(53.0, low=0.3, both=True, held=0.1),
    "x": _Channel(61.0, low=0.3, both=True, held=0.1),
    "y": _Channel(47.0, low=0.3, both=True, held=0.1),
}
YAW, PITCH, ROLL, SHIFT = 15.0, 8.0, 6.0, 0.008  # degrees; metres


def performance(seed: int, n: int) -> list[tuple[Expression, HeadPose]]:
    """n frames at 25 a second. The same seed acts the same, and a longer performance begins like a shorter one."""
    curves = {
        name: _pulses(np.random.default_rng((seed, number, 7)), channel, n)
        for number, (name, channel) in enumerate(CHANNELS.items())
    }
    curves["tongue"] = curves["tongue"] * np.clip(0.25 + 1.5 * curves["jaw"], 0, 1)  # no tongue through closed teeth
    frames = []
    for k in range(n):
        at = {name: float(curve[k]) for name, curve in curves.items()}
        expression = Expression(**{name: at[name] for name in Expression.__dataclass_fields__})
        turn = YAW * at["yaw"], PITCH * at["pitch"], ROLL * at["roll"]
        frames.append((expression, default_pose(*turn, SHIFT * at["x"], SHIFT * at["y"])))
    return frames


def _pulses(rng: np.random.Generator, channel: _Channel, n: int) -> np.ndarray:
    """Raised-cosine pulses with a plateau, one after the other, of random length and height."""
    curve = np.zeros(n)
    start, sign = -rng.uniform(0, 1) * channel.period, 1.0
    while start < n:
        length, height = channel.period * rng.uniform(0.75, 1.25), rng.uniform(channel.low, channel.high)
        if channel.both:
            sign = -sign if rng.random() < 0.75 else sign
        first, last = max(0, int(np.ceil(start))), max(0, min(n, int(np.ceil(start + length))))
        phase = (np.arange(first, last) - start) / length
        curve[first:last] = sign * height * _shape(phase, channel.held, channel.rest)
        start += length
    return curve


def _shape(phase: np.ndarray, held: float, rest: float) -> np.ndarray:
    """0 at the ends of a pulse, 1 while it is held, half cosines between; at rest in its last part."""
    ramp = (1 - rest - held) / 2
    rise, fall = np.clip(phase / ramp, 0, 1), np.clip((1 - rest - phase) / ramp, 0, 1)
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * np.minimum(rise, fall)))
