"""What a meter sees on pictures of a face."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sight:
    """Of B pictures: each of `contracts.EXPRESSIONS`, (B,), and the 68 landmarks in [0, 1] of the picture.

    nan where no face was found, or where the meter cannot see the measure.
    """

    measures: dict[str, np.ndarray]
    landmarks_B68x2: np.ndarray
