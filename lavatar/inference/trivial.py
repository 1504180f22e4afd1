"""The two trivial predictions as they are measured: pictures for each held-out frame, and what a meter sees on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lavatar.contracts import EXPRESSIONS
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.meter import ExpressionMeter
from lavatar.datasets.sight import Sight
from lavatar.inference.baselines import NearestFrame, mean_frame

NAMES = ("mean_frame", "nearest_frame")


@dataclass
class Trivial:
    """The mean and the nearest training frame; each training frame is looked at once."""

    train: FrameStore
    nearest: NearestFrame
    meter: ExpressionMeter
    mean: np.ndarray
    seen: dict[int, Sight] = field(default_factory=dict)  # by training frame; the mean frame under −1

    @staticmethod
    def over(train: FrameStore, pool: int, meter: ExpressionMeter) -> Trivial:
        """Search among at most `pool` training frames."""
        mean = mean_frame(train)
        seen = {-1: meter.look(mean[None], train.metas[:1])}
        return Trivial(train, NearestFrame.over(train, pool), meter, mean, seen)

    def images(self, landmarks_B68x2: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (B, H, W, 3) by the name of the prediction, for frames with these landmarks in [0, 1]."""
        count = len(landmarks_B68x2)
        repeated = np.broadcast_to(self.mean, (count, *self.mean.shape))
        return dict(zip(NAMES, (repeated, self.nearest.images(landmarks_B68x2)), strict=True))

    def look(self, landmarks_B68x2: np.ndarray) -> dict[str, Sight]:
        """What the meter sees on those pictures."""
        found = [int(i) for i in self.nearest.find(landmarks_B68x2)]
        new = sorted(set(found) - set(self.seen))
        if new:
            sight = self.meter.look(
                np.stack([self.train.frame(i).image for i in new]), [self.train.metas[i] for i in new]
            )
            self.seen |= {i: _part(sight, [position]) for position, i in enumerate(new)}
        return {"mean_frame": self._joined([-1] * len(found)), "nearest_frame": self._joined(found)}

    def _joined(self, frames: list[int]) -> Sight:
        sights = [self.seen[i] for i in frames]
        measures = {name: np.concatenate([s.measures[name] for s in sights]) for name in sights[0].measures}
        return Sight(measures, np.concatenate([s.landmarks_B68x2 for s in sights]))


def _part(sight: Sight, positions: list[int]) -> Sight:
    measures = {name: values[positions] for name, values in sight.measures.items() if name in EXPRESSIONS}
    return Sight(measures, sight.landmarks_B68x2[positions])
