"""Sec. 5.2, where the features are: distances between the landmarks that one meter finds on truth and result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

REGIONS = {"mouth": slice(48, 68), "eyes": slice(36, 48)}  # of the 68
OUTER_CORNERS = (36, 45)


@dataclass
class LandmarkErrors:
    """Collects, for mouth and eyes, the mean distance over the region's landmarks ÷ the truth's inter-ocular distance.

    Inter-ocular is from outer corner to outer corner, frame by frame. One value a frame in which both have a face.
    """

    values: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in REGIONS})

    def add(self, truth_B68x2: np.ndarray, result_B68x2: np.ndarray) -> None:
        """A batch; nan where no face was found."""
        left, right = OUTER_CORNERS
        between_B = np.linalg.norm(truth_B68x2[:, left] - truth_B68x2[:, right], axis=1)
        distance_B68 = np.linalg.norm(truth_B68x2 - result_B68x2, axis=2) / between_B[:, None]
        for name, region in REGIONS.items():
            error_B = distance_B68[:, region].mean(axis=1)
            self.values[name].append(error_B[np.isfinite(error_B)])

    def summary(self) -> dict[str, Any]:
        """The mean over the frames by region, and under "spread" the deviation; None where there is no frame."""
        known = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in self.values.items()}
        means = {name: float(errors.mean()) if len(errors) else None for name, errors in known.items()}
        spread = {name: float(errors.std()) if len(errors) else None for name, errors in known.items()}
        return {**means, "spread": spread}
