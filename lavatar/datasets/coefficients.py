"""Sec. 5.2, what the baselines are driven by: expression coefficients of a face template, tracked in each frame.

They are MediaPipe's 52, less the neutral one. The dataset of a video holds them already. That of a synthetic subject
holds the parameters that it was drawn with, which no tracker knows: its portraits are tracked like anybody else's.

Shapes: N frames, K = COEFFICIENTS.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from lavatar.contracts import COEFFICIENTS
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.tracking import enlarge, open_tracker
from lavatar.errors import DataError

PREFIX = "mp."
TRACKED_SIDE = 512  # portraits are enlarged to this before they are tracked
MOST_LOST = 0.05


def coefficients(store: FrameStore) -> np.ndarray:
    """N×K float32 for all frames of a store, in the order of the coefficients' names.

    Raises WeightsError where a synthetic subject has to be tracked and MediaPipe's file is missing.
    """
    names = sorted(name for name in store.expression if name.startswith(PREFIX))
    if not names:
        return _tracked(store.folder, store.split)
    if len(names) != COEFFICIENTS:
        raise DataError(
            f"{store.folder} has {len(names)} expression coefficients, wanted {COEFFICIENTS}", "Submit again."
        )
    return np.stack([store.expression[name] for name in names], axis=1)


@lru_cache(maxsize=4)
def _tracked(folder: Path, split: str | None) -> np.ndarray:
    """Tracked on the portraits, once a process (30 ms a frame). A frame whose face is lost repeats the one before."""
    store = FrameStore(folder, TRACKED_SIDE, split, cache_mb=0)
    tracker = open_tracker("mediapipe", mode="image")
    rows: list[np.ndarray | None] = []
    try:
        for i in range(len(store)):
            large, _ = enlarge(np.ascontiguousarray(store.frame(i).image), TRACKED_SIDE)
            track = tracker.track(large, 0.0)
            names = sorted(n for n in track.expression if n.startswith(PREFIX)) if track else []
            rows.append(np.array([track.expression[n] for n in names], np.float32) if track else None)
    finally:
        tracker.close()
        store.close()
    found = [row for row in rows if row is not None]
    if len(rows) - len(found) > MOST_LOST * len(rows):
        raise DataError(
            f"{folder}: the tracker found a face in {len(found)} of {len(rows)} frames", "Use another subject."
        )
    last = found[0]
    return np.stack([last := row if row is not None else last for row in rows])
