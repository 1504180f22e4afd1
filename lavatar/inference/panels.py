"""Pictures for people: labelled panels side by side, the still of eight frames, curves of the expression.

All pictures are uint8 RGB arrays (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

FONT = cv2.FONT_HERSHEY_SIMPLEX
ERROR_FULL = 64  # 255ths at which the colours of an error map end: one scale for all pages
TRUTH_COLOUR, RESULT_COLOUR = (40, 90, 200), (210, 70, 40)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Square picture of `size`: area average when it gets smaller, cubic when it gets larger."""
    if image.shape[:2] == (size, size):
        return image
    smaller = size < image.shape[0]
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def labelled(image: np.ndarray, text: str) -> np.ndarray:
    """A copy with `text` in the lower left corner on a light band that leaves the face free."""
    image = image.copy()
    size = image.shape[0]
    scale, weight = max(0.4, size / 800), max(1, round(size / 400))
    (width, height), base = cv2.getTextSize(text, FONT, scale, weight)
    pad = max(2, size // 90)
    top = size - height - base - 2 * pad
    band = image[top:, : width + 2 * pad].astype(np.float32)
    image[top:, : width + 2 * pad] = (band * 0.35 + 255 * 0.65).astype(np.uint8)
    cv2.putText(image, text, (pad, size - base - pad), FONT, scale, (30, 30, 30), weight, cv2.LINE_AA)
    return image


def side_by_side(images: Sequence[np.ndarray], labels: Sequence[str], size: int) -> np.ndarray:
    """Square pictures brought to `size`, labelled, left to right."""
    return np.concatenate([labelled(fit(i, size), t) for i, t in zip(images, labels, strict=True)], axis=1)


def sheet(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], size: int) -> np.ndarray:
    """One row of pictures a label, columns that belong together below each other; the label is on the first."""
    drawn = []
    for pictures, label in zip(rows, labels, strict=True):
        cells = [fit(p, size) for p in pictures]
        cells[0] = labelled(cells[0], label)
        drawn.append(np.concatenate(cells, axis=1))
    return np.concatenate(drawn, axis=0)


def error_map(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|result − truth|, the mean over the colours, from black (0) to light yellow (ERROR_FULL 255ths and more)."""
    error_HW = np.abs(result.astype(np.int16) - truth.astype(np.int16)).mean(axis=2)
    return _coloured(np.clip(error_HW / ERROR_FULL, 0, 1))


def error_scale(width: int = 256, height: int = 8) -> np.ndarray:
    """The colours of an error map from left (0) to right (ERROR_FULL)."""
    return _coloured(np.tile(np.linspace(0, 1, width), (height, 1)))


def _coloured(share_HW: np.ndarray) -> np.ndarray:
    bgr = cv2.applyColorMap((share_HW * 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(bgr[..., ::-1])


def choose_frames(measures: Mapping[str, np.ndarray], count: int) -> list[int]:
    """Positions of `count` frames that cover the range of expression, in order of time.

    In turn: the widest jaw, the most closed eyes, the strongest smile, pucker, brows, gaze to either side, and the
    frame nearest to the mean; then whatever lies farthest from everything chosen. Measures count in deviations.
    """
    names = [n for n in ("jaw", "blink", "smile", "pucker", "brows", "gaze") if n in measures]
    total = len(next(iter(measures.values()))) if measures else 0
    if not names or total <= count:
        return list(range(total))
    values_NM = np.stack([np.asarray(measures[n], float) for n in names], axis=1)
    known = np.isfinite(values_NM).all(axis=1)
    values_NM = np.where(np.isfinite(values_NM), values_NM, np.nanmean(np.where(known[:, None], values_NM, 0), axis=0))
    spread = values_NM.std(axis=0)
    z_NM = (values_NM - values_NM.mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)
    wanted = [int(np.argmax(z_NM[:, i])) for i in range(len(names))]
    wanted.insert(3, int(np.argmin((z_NM**2).sum(axis=1))))  # a neutral face among the first four
    chosen = list(dict.fromkeys(wanted))[:count]
    while len(chosen) < count:
        distance = np.linalg.norm(z_NM[:, None] - z_NM[None, chosen], axis=2).min(axis=1)
        distance[chosen] = -1
        chosen.append(int(np.argmax(distance)))
    return sorted(chosen)


def curves(truth: Mapping[str, np.ndarray], result: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Each expression measure over the frames, truth blue and result red, one strip a measure; gaps where no face."""
    width, height, margin = 900, 110, 90
    canvas = np.full((height * len(names), width + margin, 3), 255, np.uint8)
    for row, name in enumerate(names):
        both = np.concatenate([truth[name], result[name]])
        finite = both[np.isfinite(both)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        top = row * height
        labels = (name, (30, 30, 30)), ("truth", TRUTH_COLOUR), ("result", RESULT_COLOUR)
        for line, (text, colour) in enumerate(labels):
            cv2.putText(canvas, text, (8, top + 36 + 22 * line), FONT, 0.5, colour, 1, cv2.LINE_AA)
        cv2.line(canvas, (0, top + height - 1), (width + margin, top + height - 1), (220, 220, 220), 1)
        for series, colour in ((truth[name], TRUTH_COLOUR), (result[name], RESULT_COLOUR)):
            _draw_series(canvas, np.asarray(series), (margin, top + 6, width, height - 12), (low, high), colour)
    return canvas


def _draw_series(
    canvas: np.ndarray,
    series: np.ndarray,
    box: tuple[int, int, int, int],
    limits: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    left, top, width, height = box
    low, high = limits
    x = left + np.arange(len(series)) * (width / max(1, len(series) - 1))
    y = top + height - (series - low) / max(high - low, 1e-6) * height
    for i in range(len(series) - 1):
        if np.isfinite(y[i]) and np.isfinite(y[i + 1]):
            start, end = (int(x[i]), int(y[i])), (int(x[i + 1]), int(y[i + 1]))
            cv2.line(canvas, start, end, colour, 1, cv2.LINE_AA)
