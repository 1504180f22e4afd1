"""Sec. 5.2, self reenactment: the held-out frames against their truth, and the trivial predictions beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import FrameStore
from lavatar.inference import trivial
from lavatar.inference.background import Background
from lavatar.inference.baselines import spread
from lavatar.inference.candidates import Candidate
from lavatar.inference.identity import face_descriptor
from lavatar.inference.images import ImageScores, Truth, face_side
from lavatar.inference.loading import Avatar
from lavatar.inference.measured import Evaluation, FrameFigures, notes_of, open_meter, series_of
from lavatar.inference.reenact import Portraits
from lavatar.models.perceptual import LPIPS

PREDICTIONS = ("self", *trivial.NAMES)


class SelfEvaluation:
    """Measured while it streams by: pictures where they are drawn, meters and descriptors in the background."""

    def __init__(
        self, avatar: Avatar, held_out: FrameStore, train: FrameStore, recipe: Recipe, lpips: LPIPS | None
    ) -> None:
        self.held_out, self.device = held_out, avatar.device
        size, options = avatar.config.image_size, recipe.evaluation
        self.side = face_side(held_out.landmarks_N68x2, size)
        self.indices = spread(len(held_out), options.max_frames)
        self.portrayed = self.indices[spread(len(self.indices), options.identity_frames)]
        self.candidates = {name: Candidate(ImageScores(lpips)) for name in PREDICTIONS}
        self.descriptor, self.identity_note = face_descriptor()
        self.mean_face: np.ndarray | None = None
        self.stack = ExitStack()
        self.meter = self.stack.enter_context(open_meter(held_out.manifest, recipe))
        self.truth = series_of(held_out, self.meter, size)
        self.trivial = trivial.Trivial.over(train, options.nearest_pool, self.meter)

    def __enter__(self) -> SelfEvaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, batch: Portraits, background: Background) -> None:
        """Measure a batch, in order of time."""
        truth = np.stack([self.held_out.frame(int(i)).image for i in batch.index_B])
        landmarks = self.held_out.landmarks_N68x2[batch.index_B]
        images = {"self": batch.images_BHW3, **self.trivial.images(landmarks)}
        background.run(self._look, batch.index_B, truth, landmarks, images)
        compared = Truth.of(truth, landmarks, self.side, self.device)
        numbers = np.array([self.held_out.metas[int(i)].frame for i in batch.index_B])
        for name, candidate in self.candidates.items():
            candidate.add(images[name], compared, numbers)

    def _look(
        self, index_B: np.ndarray, truth: np.ndarray, landmarks: np.ndarray, images: dict[str, np.ndarray]
    ) -> None:
        metas = [self.held_out.metas[int(i)] for i in index_B]
        seen = self.meter.look(truth, metas)
        self.truth.add(seen.measures)
        sights = {"self": self.meter.look(images["self"], metas), **self.trivial.look(landmarks)}
        for name, candidate in self.candidates.items():
            candidate.add_sight(sights[name], seen)
        inside = np.isin(index_B, self.portrayed)
        if self.descriptor is None or not inside.any():
            return
        true = self.descriptor(truth[inside], seen.landmarks_B68x2[inside])
        for name, candidate in self.candidates.items():
            candidate.identity.add_truth(true)
            candidate.identity.add(self._described(name, images[name][inside], sights[name].landmarks_B68x2[inside]))

    def _described(self, name: str, images_BHW3: np.ndarray, landmarks_B68x2: np.ndarray) -> np.ndarray:
        """Descriptors of a prediction; the mean frame is the same for all frames and looked at once."""
        assert self.descriptor is not None
        if name != "mean_frame":
            return self.descriptor(images_BHW3, landmarks_B68x2)
        if self.mean_face is None:
            self.mean_face = self.descriptor(images_BHW3[:1], landmarks_B68x2[:1])
        return np.repeat(self.mean_face, len(images_BHW3), axis=0)

    def finish(self) -> Evaluation:
        """The figures of everything added: a row for each prediction."""
        metrics = {name: candidate.summary(self.truth) for name, candidate in self.candidates.items()}
        own = self.candidates["self"]
        notes = notes_of("self", metrics["self"], self.truth, self.meter)
        notes += (self.identity_note,) if self.identity_note else self._faceless(metrics)
        frames = FrameFigures(self.indices, own.scores.frames())
        return Evaluation(metrics, self.truth.series(), own.expression.series(), notes, frames)

    def _faceless(self, metrics: Mapping[str, Any]) -> tuple[str, ...]:
        """Why a row has no identity although the weights are there: a mean of many frames may show nobody."""
        if self.meter.note:  # it sees no landmarks at all and says so itself
            return ()
        lost = [name.replace("_", " ") for name, row in metrics.items() if row["identity"]["distance"] is None]
        return (f"identity of {', '.join(lost)} is null: no face was found in it",) if lost else ()
