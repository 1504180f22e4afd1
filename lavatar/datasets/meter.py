"""Design section 8: expression measured on pictures, so that a frozen face cannot win.

A meter looks at portraits alone (rendered or real, before white) and gives the six measures of `contracts.EXPRESSIONS`.
It must see result and truth alike: measure both with it, at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import cv2
import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import EXPRESSIONS, FrameMeta
from lavatar.datasets.shards import Manifest
from lavatar.datasets.tracking import enlarge, open_tracker
from lavatar.errors import WeightsError

SMALLEST = 512
"""Portraits are enlarged to this side: the landmark network crops its input from the picture it is given."""


class ExpressionMeter(Protocol):
    """Measures expression on portraits."""

    noise: Mapping[str, float]  # deviation of each measure over copies of one picture; a truth that moves less is still
    note: str  # why nothing is measured and which command mends it; empty where the meter measures

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        """uint8 RGB before white → one float array B for each of EXPRESSIONS; nan where no face is found.

        `metas` give pose and camera of each picture to meters that need them; the MediaPipe one does not.
        """
        ...


def meter_for(manifest: Manifest, config: PreprocessConfig) -> ExpressionMeter:
    """The meter of a subject: MediaPipe for real people, one calibrated on its own renders for a synthetic one.

    Without MediaPipe's file there is no refusal: the measures are nan, and the meter's note says why.
    """
    if manifest.kind == "synthetic":
        from lavatar.datasets.synthetic_head import Identity
        from lavatar.datasets.synthetic_meter import SyntheticMeter

        meter: ExpressionMeter = SyntheticMeter(Identity.from_seed(int(manifest.source["seed"])))
        return meter
    try:
        return MediapipeMeter()
    except WeightsError as error:
        return NoMeter(f"expression of real people is null: {error.message}. {error.hint}")


class MediapipeMeter:
    """MediaPipe's expression coefficients, each picture by itself. WeightsError where its file is missing."""

    note = ""
    # Medians over 42 portraits at 128 pixels, each moved by up to half a pixel, compressed and made noisy six times.
    noise: Mapping[str, float] = MappingProxyType(
        {"jaw": 0.0025, "blink": 0.0105, "smile": 0.0007, "pucker": 0.006, "brows": 0.021, "gaze": 0.027}
    )

    def __init__(self) -> None:
        self._tracker = open_tracker("mediapipe", mode="image")

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        rows = [self._measure_one(image) for image in images_BHW3]
        return {
            name: np.array([row[name] if row is not None else np.nan for row in rows], np.float64)
            for name in EXPRESSIONS
        }

    def _measure_one(self, image: np.ndarray) -> dict[str, float] | None:
        """White is added around it: the detector misses faces that fill the picture."""
        large, _ = enlarge(np.ascontiguousarray(image), SMALLEST)
        for share in (0.1, 0.4):
            border = round(share * large.shape[0])
            framed = cv2.copyMakeBorder(
                large, border, border, border, border, cv2.BORDER_CONSTANT, value=(255, 255, 255)
            )
            track = self._tracker.track(framed, 0.0)
            if track is not None:
                return track.expression
        return None

    def close(self) -> None:
        self._tracker.close()


class NoMeter:
    """Stands where a meter's weights are missing: every measure of every picture is nan."""

    def __init__(self, note: str) -> None:
        self.note = note
        self.noise: Mapping[str, float] = {}

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        return {name: np.full(len(images_BHW3), np.nan) for name in EXPRESSIONS}
