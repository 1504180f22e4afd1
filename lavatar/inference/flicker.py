"""Sec. 5.2, what a still cannot show: flicker, the change from frame to frame that the truth does not have.

Pictures are uint8 RGB, BHW3; B frames in order of time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lavatar.inference.images import face_squares


@dataclass
class Flicker:
    """Collects mean |(R_t − R_{t−1}) − (T_t − T_{t−1})| of results R and truths T over the face square of frame t.

    In 255ths, one value for each two frames that are neighbours in the video; others say nothing.
    """

    values: list[float] = field(default_factory=list)
    _frame: int | None = None
    _error_HW3: np.ndarray | None = None

    def add(
        self,
        result_BHW3: np.ndarray,
        truth_BHW3: np.ndarray,
        landmarks_B68x2: np.ndarray,
        side: int,
        frame_B: np.ndarray,
    ) -> None:
        """The next batch. `frame_B`: numbers of the frames in the video; landmarks of the truth in [0, 1]."""
        error_BHW3 = result_BHW3.astype(np.int16) - truth_BHW3.astype(np.int16)
        for i, frame in enumerate(frame_B.tolist()):
            if self._error_HW3 is not None and self._frame is not None and frame == self._frame + 1:
                change = (error_BHW3[i] - self._error_HW3)[None]  # both in the square of frame t: pixels stay in place
                square = face_squares(change, landmarks_B68x2[i : i + 1], side)
                self.values.append(float(np.abs(square).mean()))
            self._frame, self._error_HW3 = frame, error_BHW3[i]

    def mean(self) -> float | None:
        """Over all pairs; None if there were none."""
        return float(np.mean(self.values)) if self.values else None

    def spread(self) -> float | None:
        """Standard deviation over the pairs."""
        return float(np.std(self.values)) if self.values else None
