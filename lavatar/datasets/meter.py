"""Design section 8: expression measured on pictures, so that a frozen face cannot win; and landmarks on the same pass.

A meter looks at portraits alone (rendered or real, before white) and gives the six measures of `contracts.EXPRESSIONS`
and the 68 landmarks.
It must see result and truth alike: measure both with it, at the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import EXPRESSIONS, FrameMeta
from lavatar.datasets.shards import Manifest
from lavatar.datasets.sight import Sight
from lavatar.datasets.tracking import enlarge, open_tracker
from lavatar.errors import WeightsError

SMALLEST = 512
"""Portraits are enlarged to this side: the landmark network crops its input from the picture it is given."""

COPIES = 6
SHIFT, JPEG_QUALITY, PIXEL_NOISE = 0.5, (80, 95), 1.0
"""Of the copies that tell a meter's noise: pixels at most, quality, deviation in 255ths."""


class ExpressionMeter(Protocol):
    """Measures expression on portraits."""

    note: str  # why nothing is measured and which command mends it; empty where the meter measures

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        """uint8 RGB before white → one float array B for each of EXPRESSIONS; nan where no face is found.

        `metas` give pose and camera of each picture to meters that need them; the MediaPipe one does not.
        """
        ...

    def look(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> Sight:
        """The measures and the landmarks of the same pictures, for the price of one look."""
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
        return NoMeter(f"expression, landmarks and identity of real people are null: {error.message}. {error.hint}")


class MediapipeMeter:
    """MediaPipe's expression coefficients, each picture by itself. WeightsError where its file is missing."""

    note = ""

    def __init__(self) -> None:
        self._tracker = open_tracker("mediapipe", mode="image")

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        return self.look(images_BHW3, metas).measures

    def look(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> Sight:
        found = [self._look_at(image) for image in images_BHW3]
        measures = {
            name: np.array([one[0][name] if one is not None else np.nan for one in found], np.float64)
            for name in EXPRESSIONS
        }
        nowhere = np.full((68, 2), np.nan)
        return Sight(measures, np.stack([one[1] if one is not None else nowhere for one in found]))

    def _look_at(self, image: np.ndarray) -> tuple[dict[str, float], np.ndarray] | None:
        """White is added around it: the detector misses faces that fill the picture."""
        large, _ = enlarge(np.ascontiguousarray(image), SMALLEST)
        for share in (0.1, 0.4):
            border = round(share * large.shape[0])
            framed = cv2.copyMakeBorder(
                large, border, border, border, border, cv2.BORDER_CONSTANT, value=(255, 255, 255)
            )
            track = self._tracker.track(framed, 0.0)
            if track is not None:
                return track.expression, (track.landmarks68 - border) / large.shape[0]
        return None

    def close(self) -> None:
        self._tracker.close()


class NoMeter:
    """Stands where a meter's weights are missing: every measure and landmark of every picture is nan."""

    def __init__(self, note: str) -> None:
        self.note = note

    def measure(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> dict[str, np.ndarray]:
        return self.look(images_BHW3, metas).measures

    def look(self, images_BHW3: np.ndarray, metas: Sequence[FrameMeta] | None = None) -> Sight:
        count = len(images_BHW3)
        return Sight({n: np.full(count, np.nan) for n in EXPRESSIONS}, np.full((count, 68, 2), np.nan))


def noise_of(meter: ExpressionMeter, images_BHW3: np.ndarray, metas: Sequence[FrameMeta]) -> dict[str, float]:
    """How far each measure scatters between copies of one picture that differ in nothing that matters.

    The copies are moved by a part of a pixel, compressed and made a little noisy. The median over the pictures of the
    deviation between the copies; 0 for a measure that the meter does not give. A face that moves less than that
    stands still as far as the meter can see: its noise differs tenfold between two people.
    """
    copies = [meter.measure(np.stack([_copy(image, k) for image in images_BHW3]), metas) for k in range(COPIES)]
    noise = {}
    for name in EXPRESSIONS:
        values_CB = np.stack([np.asarray(copy.get(name, np.full(len(images_BHW3), np.nan))) for copy in copies])
        deviation_B = values_CB.std(axis=0)
        known_B = deviation_B[np.isfinite(deviation_B)]
        noise[name] = float(np.median(known_B)) if len(known_B) else 0.0
    return noise


def _copy(image_HW3: np.ndarray, number: int) -> np.ndarray:
    """Copy `number` of a picture, the same whenever it is made."""
    rng = np.random.default_rng(number)
    x, y = rng.uniform(-SHIFT, SHIFT, 2)
    size = image_HW3.shape[1::-1]
    moved = cv2.warpAffine(image_HW3, np.array([[1, 0, x], [0, 1, y]]), size, borderMode=cv2.BORDER_REPLICATE)
    noisy = np.clip(moved + rng.normal(0, PIXEL_NOISE, moved.shape), 0, 255).round().astype(np.uint8)
    quality = int(rng.integers(*JPEG_QUALITY))
    _, packed = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR), np.uint8)
