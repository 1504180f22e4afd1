"""What the rows work on: two drawn subjects as datasets, and a video of one of them. Made when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import Event, EventSink, NullSink, VideoSource

if TYPE_CHECKING:
    from lavatar.datasets.loader import FrameStore

DRAWN = 24
"""Frames of each subject: a step's speed does not depend on how many there are."""
SIDE = 512
"""Of their portraits and of the video."""
FPS = 25.0


@dataclass
class Material:
    """Files below `folder`."""

    folder: Path
    events: EventSink

    @cached_property
    def subjects(self) -> tuple[Path, Path]:
        """The datasets of two drawn subjects."""
        return self._subject(0), self._subject(1)

    def store(self, image_size: int, which: int = 0) -> FrameStore:
        """The training frames of a subject."""
        from lavatar.datasets.loader import FrameStore

        return FrameStore(self.subjects[which], image_size)

    def video(self, frames: int) -> Path:
        """An mp4 of the first subject, its drawn frames there and back until there are enough."""
        from lavatar.inference.encode_video import write_video

        path = self.folder / f"{frames}.mp4"
        if not path.exists():
            write_video(path, self._there_and_back(frames), FPS)
        return path

    def _there_and_back(self, count: int) -> Iterator[np.ndarray]:
        store = self.store(SIDE)
        last = len(store) - 1
        for i in range(count):
            yield store.frame(last - abs(last - i % (2 * last))).image

    def _subject(self, seed: int) -> Path:
        from lavatar.datasets.preprocess import preprocess, serial

        folder = self.folder / f"subject{seed}"
        config = PreprocessConfig(synthetic_frames=DRAWN, portrait_size=SIDE)
        source = VideoSource(f"drawn{seed}", synthetic_seed=seed)
        self.events.emit(Event("material", f"drawing {DRAWN} frames"))
        preprocess(source, config, folder, parallel=serial, events=NullSink(), stage="material")
        return folder
