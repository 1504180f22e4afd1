"""Sec. 5.2, cross reenactment: does the avatar do what the actor does?"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import FrameStore
from lavatar.inference.candidates import Candidate
from lavatar.inference.expression import ExpressionSeries, compare, expression_error, faces_lost
from lavatar.inference.images import ImageScores, Truth, face_side
from lavatar.inference.loading import Avatar
from lavatar.inference.measured import Evaluation, notes_of, open_meter, series_of
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

    def __enter__(self) -> CrossEvaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, index_B: np.ndarray, results_BHW3: np.ndarray, poses: PoseTrack) -> None:
        """Measure a batch: frames of the actor, the avatar's portraits and the poses they were drawn under."""
        metas = [self.actor.metas[int(i)] for i in index_B]
        portraits = np.stack([fit(self.actor.frame(int(i)).image, self.size) for i in index_B])
        self.driver.add(self.actor_meter.measure(portraits, metas))
        drawn = [replace(m, pose=p, camera=self.camera) for m, p in zip(metas, poses.poses(), strict=True)]
        measured = self.avatar_meter.measure(results_BHW3, drawn)
        self.result.add(measured)
        if self.truth is not None:
            images, landmarks = self.truth.draw(drawn)
            truth = Truth.of(images, landmarks, self.side, self.device)
            self.against_truth.add(results_BHW3, truth, np.array([meta.frame for meta in metas]))
            self.against_truth.expression.add(measured)
            self.truth_series.add(self.avatar_meter.measure(images, drawn))

    def finish(self) -> Evaluation:
        """The figures of everything added."""
        compared = compare(self.driver, self.result, centred=True)
        figures: dict[str, Any] = {
            "expression": compared,
            "expression_error": expression_error(compared),
            "frames": len(self.driver.found()),
            "no_face": faces_lost(self.driver, self.result),
        }
        if self.truth is not None:
            figures["truth"] = self.against_truth.summary(self.truth_series)
        notes = notes_of("cross", figures, self.driver, self.avatar_meter, self.actor_meter)
        return Evaluation({"cross": figures}, self.driver.series(), self.result.series(), notes)
