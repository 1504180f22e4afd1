"""Does the expression follow? Correlation, amplitude and error of each expression measure, result against truth.

A picture can score well with a frozen face, so these stand beside the image metrics everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lavatar.contracts import EXPRESSIONS

LEAST_SPREAD = 1e-4  # a deviation below this is a measure that stands still, whatever the meter
LEAST_FRAMES = 3


@dataclass
class ExpressionSeries:
    """Measures of one set of pictures, frame after frame; nan where the meter found no face.

    `noise` is the meter's on these pictures (datasets.meter.noise_of).
    """

    noise: Mapping[str, float] = field(default_factory=dict)
    parts: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in EXPRESSIONS})

    def add(self, measures: Mapping[str, np.ndarray]) -> None:
        """Append the measures of a batch, each (B,); a measure the meter does not give counts as not found."""
        count = len(next(iter(measures.values())))
        for name in EXPRESSIONS:
            values = measures.get(name)
            self.parts[name].append(np.full(count, np.nan) if values is None else np.asarray(values, float))

    def series(self) -> dict[str, np.ndarray]:
        """Each measure over all frames, (N,)."""
        return {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in self.parts.items()}

    def least(self, name: str) -> float:
        """The deviation below which a measure says nothing."""
        return max(LEAST_SPREAD, self.noise.get(name, 0.0))

    def still(self) -> list[str]:
        """Names of the measures that are known and do not move."""
        known = {name: values[np.isfinite(values)] for name, values in self.series().items()}
        return [name for name, v in known.items() if len(v) >= LEAST_FRAMES and v.std() < self.least(name)]

    def found(self) -> np.ndarray:
        """(N,) whether a face was found: at least one measure is a number."""
        return np.isfinite(np.stack(list(self.series().values()))).any(axis=0)


Agreement = dict[str, float | None]


def agreement(
    truth_N: np.ndarray, result_N: np.ndarray, least: float = LEAST_SPREAD, *, centred: bool = False
) -> Agreement:
    """r: Pearson's correlation; amplitude: deviation of the result over deviation of the truth; error: the RMS
    difference over the deviation of the truth (1: no better than the truth's mean; `centred`: each less its own mean).

    All over the frames where both are known; None where undefined: too few frames, a truth whose deviation is below
    `least`. A result that stands still has amplitude 0 and an error, and no r.
    """
    known = np.isfinite(truth_N) & np.isfinite(result_N)
    truth, result = truth_N[known], result_N[known]
    if len(truth) < LEAST_FRAMES or truth.std() < least:
        return {"r": None, "amplitude": None, "error": None}
    difference = result - truth
    if centred:
        difference = difference - difference.mean()
    return {
        "r": float(np.corrcoef(truth, result)[0, 1]) if result.std() >= LEAST_SPREAD else None,
        "amplitude": float(result.std() / truth.std()),
        "error": float(np.sqrt((difference**2).mean()) / truth.std()),
    }


def compare(truth: ExpressionSeries, result: ExpressionSeries, *, centred: bool = False) -> dict[str, Agreement]:
    """`agreement` for each measure by name. `centred` for two people: their faces differ at rest already."""
    expected, got = truth.series(), result.series()
    return {n: agreement(expected[n], got[n], truth.least(n), centred=centred) for n in EXPRESSIONS}


def expression_error(compared: Mapping[str, Agreement]) -> float | None:
    """The mean error over the measures that have one."""
    errors = [figures["error"] for figures in compared.values() if figures["error"] is not None]
    return float(np.mean(errors)) if errors else None


def error_spread(truth: ExpressionSeries, result: ExpressionSeries, *, centred: bool = False) -> float | None:
    """Deviation over the frames of a frame's error: mean over the measures of |result − truth| ÷ the truth's deviation.

    Of the measures and frames that count in `expression_error`; None where none do.
    """
    expected, got = truth.series(), result.series()
    parts = []
    for name, figures in compare(truth, result, centred=centred).items():
        if figures["error"] is not None:
            difference_N = got[name] - expected[name]
            known_N = np.isfinite(difference_N)
            middle = difference_N[known_N].mean() if centred else 0.0
            parts.append(np.abs(difference_N - middle) / expected[name][known_N].std())
    error_MN = np.stack(parts) if parts else np.empty((0, 0))
    error_MN = error_MN[:, np.isfinite(error_MN).any(axis=0)]
    return float(np.nanmean(error_MN, axis=0).std()) if error_MN.size else None


def faces_lost(truth: ExpressionSeries, result: ExpressionSeries) -> int:
    """Frames whose truth shows a face to the meter and whose result does not."""
    return int((truth.found() & ~result.found()).sum())
