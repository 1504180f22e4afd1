"""Sec. 5.2, cross reenactment: does the avatar do what the actor does?"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from lavatar.configs.evaluation import EvaluationConfig
from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.sight import Sight
from lavatar.inference.baselines import spread
from lavatar.inference.candidates import Candidate
from lavatar.inference.expression import ExpressionSeries, compare, error_spread, expression_error, faces_lost
from lavatar.inference.identity import WIDTH, Identity, face_descriptor
from lavatar.inference.images import ImageScores, Truth, face_side
from lavatar.inference.loading import Avatar
from lavatar.inference.measured import Evaluation, FrameFigures, notes_of, open_meter, series_of
from lavatar.inference.panels import fit
from lavatar.inference.retarget import PoseTrack
from lavatar.inference.truth import TransferTruth
from lavatar.models.perceptual import LPIPS


class CrossEvaluation:
    """Cross reenactment, measured while it streams by: the actor's portraits against the results.

    On synthetic pairs also against the truth that only they have: the actor's expression drawn on the avatar's
    identity at the pose used.
    """

    def __init__(
        self, avatar: Avatar, avatar_store: FrameStore, actor: FrameStore, recipe: Recipe, lpips: LPIPS | None
    ) -> None:
        self.size, self.actor = avatar.config.image_size, actor
        self.camera = avatar_store.metas[0].camera
        self.stack = ExitStack()
        self.avatar_meter = self.stack.enter_context(open_meter(avatar_store.manifest, recipe))
        self.actor_meter = self.stack.enter_context(open_meter(actor.manifest, recipe))
        self.driver, self.result = series_of(actor, self.actor_meter, self.size), ExpressionSeries()
        self.truth = TransferTruth.between(avatar_store, actor, self.size)
        self.side, self.device = face_side(avatar_store.landmarks_N68x2, self.size), avatar.device
        self.against_truth = Candidate(ImageScores(lpips))
        self.truth_series = ExpressionSeries()
        self.added: list[np.ndarray] = []
        self._open_identity(avatar_store, recipe.evaluation)

    def __enter__(self) -> CrossEvaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _open_identity(self, avatar: FrameStore, options: EvaluationConfig) -> None:
        """The avatar's own true frames, with which the results are compared."""
        self.identity = Identity(mean_of_truth=True)
        measured = spread(len(self.actor), options.max_frames)
        self.portrayed = measured[spread(len(measured), options.identity_frames)]
        self.descriptor, self.identity_note = face_descriptor()
        if self.descriptor is not None:
            own = [int(i) for i in spread(len(avatar), options.identity_frames)]
            images = np.stack([avatar.frame(i).image for i in own])
            sight = self.avatar_meter.look(images, [avatar.metas[i] for i in own])
            self.identity.add_truth(self.descriptor(images, sight.landmarks_B68x2))

    def add(self, index_B: np.ndarray, results_BHW3: np.ndarray, poses: PoseTrack) -> None:
        """Measure a batch: frames of the actor, the avatar's portraits and the poses they were drawn under."""
        self.added.append(index_B)
        metas = [self.actor.metas[int(i)] for i in index_B]
        portraits = np.stack([fit(self.actor.frame(int(i)).image, self.size) for i in index_B])
        self.driver.add(self.actor_meter.measure(portraits, metas))
        drawn = [replace(m, pose=p, camera=self.camera) for m, p in zip(metas, poses.poses(), strict=True)]
        seen = self.avatar_meter.look(results_BHW3, drawn)
        self.result.add(seen.measures)
        inside = np.isin(index_B, self.portrayed)
        found = self._described(results_BHW3, seen, inside)
        self.identity.add(found)
        if self.truth is not None:
            images, landmarks = self.truth.draw(drawn)
            truth = Truth.of(images, landmarks, self.side, self.device)
            self.against_truth.add(results_BHW3, truth, np.array([meta.frame for meta in metas]))
            wanted = self.avatar_meter.look(images, drawn)
            self.truth_series.add(wanted.measures)
            self.against_truth.add_sight(seen, wanted)
            self.against_truth.identity.add_truth(self._described(images, wanted, inside))
            self.against_truth.identity.add(found)

    def _described(self, images_BHW3: np.ndarray, sight: Sight, inside_B: np.ndarray) -> np.ndarray:
        """Descriptors of the pictures that are chosen for them."""
        if self.descriptor is None:
            return np.empty((0, WIDTH))
        return self.descriptor(images_BHW3[inside_B], sight.landmarks_B68x2[inside_B])

    def finish(self) -> Evaluation:
        """The figures of everything added."""
        compared = compare(self.driver, self.result, centred=True)
        figures: dict[str, Any] = {
            "expression": compared,
            "expression_error": expression_error(compared),
            "spread": {"expression_error": error_spread(self.driver, self.result, centred=True)},
            "identity": self.identity.summary(),
            "frames": len(self.driver.found()),
            "no_face": faces_lost(self.driver, self.result),
        }
        if self.truth is not None:
            figures["truth"] = self.against_truth.summary(self.truth_series)
        notes = notes_of("cross", figures, self.driver, self.avatar_meter, self.actor_meter)
        notes += (self.identity_note,) if self.identity_note else ()
        index = np.concatenate(self.added) if self.added else np.empty(0, np.int64)
        frames = FrameFigures(index, self.against_truth.scores.frames())
        return Evaluation({"cross": figures}, self.driver.series(), self.result.series(), notes, frames)
