"""One kind of result (the model's, or a trivial prediction) with everything that is measured of it against a truth.

Pictures are compared where they are drawn; what a meter sees on them is added apart, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lavatar.datasets.sight import Sight
from lavatar.inference.expression import ExpressionSeries, compare, error_spread, expression_error, faces_lost
from lavatar.inference.flicker import Flicker
from lavatar.inference.identity import Identity
from lavatar.inference.images import ImageScores, Truth
from lavatar.inference.landmarks import LandmarkErrors


@dataclass
class Candidate:
    """Its image metrics, flicker, expression, landmarks and identity. Batches are added in order of time."""

    scores: ImageScores
    flicker: Flicker = field(default_factory=Flicker)
    expression: ExpressionSeries = field(default_factory=ExpressionSeries)
    landmarks: LandmarkErrors = field(default_factory=LandmarkErrors)
    identity: Identity = field(default_factory=Identity)

    def add(self, result_BHW3: np.ndarray, truth: Truth, frame_B: np.ndarray) -> None:
        """Compare a batch of pictures, uint8. `frame_B`: numbers of the frames in the video."""
        self.scores.add(result_BHW3, truth)
        self.flicker.add(result_BHW3, truth.images_BHW3, truth.landmarks_B68x2, truth.side, frame_B)

    def add_sight(self, result: Sight, truth: Sight) -> None:
        """What one meter sees on a batch of results and on their truth."""
        self.expression.add(result.measures)
        self.landmarks.add(truth.landmarks_B68x2, result.landmarks_B68x2)

    def summary(self, truth: ExpressionSeries) -> dict[str, Any]:
        """A row of metrics.json; expressions against the measures of the truth, both by one meter."""
        figures = self.scores.summary()
        figures["flicker"] = self.flicker.mean()
        figures["spread"]["flicker"] = self.flicker.spread()
        compared = compare(truth, self.expression)
        figures |= {"expression": compared, "expression_error": expression_error(compared)}
        figures["spread"]["expression_error"] = error_spread(truth, self.expression)
        figures |= {"landmark_error": self.landmarks.summary(), "identity": self.identity.summary()}
        return {**figures, "frames": len(truth.found()), "no_face": faces_lost(truth, self.expression)}
