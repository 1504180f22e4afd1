"""What self and cross evaluation share: the meter of a subject, its series, and how the figures are handed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.meter import ExpressionMeter, meter_for, noise_of
from lavatar.datasets.shards import Manifest
from lavatar.inference.baselines import spread
from lavatar.inference.expression import ExpressionSeries
from lavatar.inference.panels import fit

NOISE_FRAMES = 8  # true pictures that tell the meter's noise
CACHE_MB = 256  # decoded frames kept: a few batches, and the training frames that are nearest again and again


@dataclass(frozen=True)
class FrameFigures:
    """Which frames of the store were measured, in order, and the image metrics of each (none without a truth)."""

    index_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    values: Mapping[str, np.ndarray] = field(default_factory=dict)

    def at(self, position: int) -> dict[str, float]:
        """The figures of one frame by name."""
        return {name: float(values[position]) for name, values in self.values.items()}


@dataclass(frozen=True)
class Evaluation:
    """Figures as in metrics.json, the measures they come from (for the curves), sentences for the user, and figures
    frame by frame."""

    metrics: dict[str, Any]
    truth: dict[str, np.ndarray]
    result: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    frames: FrameFigures = field(default_factory=FrameFigures)


@contextmanager
def open_meter(manifest: Manifest, recipe: Recipe) -> Iterator[ExpressionMeter]:
    """The meter of a subject, closed at the end where it holds a network."""
    meter = meter_for(manifest, recipe.preprocess)
    try:
        yield meter
    finally:
        getattr(meter, "close", lambda: None)()


def series_of(store: FrameStore, meter: ExpressionMeter, size: int) -> ExpressionSeries:
    """An empty series for the true pictures of a store, with the meter's noise on them."""
    chosen = spread(len(store), NOISE_FRAMES)
    pictures = np.stack([fit(store.frame(int(i)).image, size) for i in chosen])
    return ExpressionSeries(noise_of(meter, pictures, [store.metas[int(i)] for i in chosen]))


def notes_of(what: str, figures: dict[str, Any], truth: ExpressionSeries, *meters: ExpressionMeter) -> tuple[str, ...]:
    """Sentences for the user: measures that are missing or still, and results in which no face was found."""
    notes = [meter.note for meter in meters if meter.note]
    if truth.still():
        notes.append(f"{what}: too still in these frames to be measured: {', '.join(truth.still())}")
    if figures["no_face"]:
        lost = f"{what}: no face was found in {figures['no_face']} of {figures['frames']} results"
        notes.append(f"{lost}; they do not count in r and amplitude")
    return tuple(dict.fromkeys(notes))
