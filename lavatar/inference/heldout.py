"""A few held-out frames, measured again and again while a model trains: what the trials of a sweep are compared by.

The figures and their names are those of the evaluation (docs/CONVENTIONS.md), flat: "lpips", "face/psnr",
"expression/jaw/error". All portraits are compared at one size, whatever the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.sight import Sight
from lavatar.inference.baselines import spread
from lavatar.inference.candidates import Candidate
from lavatar.inference.evaluate import evaluate_cross
from lavatar.inference.expression import ExpressionSeries
from lavatar.inference.figures import flat, rounded
from lavatar.inference.images import METRICS, ImageScores, Truth, face_side, perceptual_metric
from lavatar.inference.loading import load_avatar, load_pair
from lavatar.inference.measured import CACHE_MB, open_meter, series_of
from lavatar.inference.panels import fit
from lavatar.inference.reenact import reenact_self

FRAMES = 16
"""How many, where the recipe does not say (evaluation.max_frames)."""
LEFT_OUT = ("spread", "identity")


class HeldOut(Protocol):
    """Measures releases of one kind of model. A context manager."""

    def measure(self, release: Path) -> dict[str, float]:
        """Figures by name; what could not be measured is left out."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_held_out(kind: StageKind, inputs: Mapping[str, Path], recipe: Recipe, device: str) -> HeldOut:
    """For a stage of that kind with these inputs. `recipe` is the sweep's, the same for all of its trials."""
    options = recipe.evaluation.model_copy(update={"max_frames": recipe.evaluation.max_frames or FRAMES})
    recipe = recipe.model_copy(update={"evaluation": options})
    if kind is StageKind.AVATAR:
        return HeldOutAvatar(inputs["dataset"], recipe, device)
    return HeldOutPair(inputs, recipe, device)


class HeldOutAvatar:
    """Self reenactment. What does not change is looked at once: the true frames, their measures, the meter's noise."""

    def __init__(self, dataset: Path, recipe: Recipe, device: str) -> None:
        self.recipe, self.device, self.size = recipe, device, recipe.avatar.image_size
        self.store = FrameStore(dataset, self.size, "eval", CACHE_MB)
        self.indices = spread(len(self.store), recipe.evaluation.max_frames)
        self.side = face_side(self.store.landmarks_N68x2, self.size)
        self.lpips, _ = perceptual_metric(device)
        self.stack = ExitStack()
        self.meter = self.stack.enter_context(open_meter(self.store.manifest, recipe))
        self.noise = series_of(self.store, self.meter, self.size).noise
        self.seen: dict[int, Sight] = {}  # of the true frames, by the first of a batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        self.store.close()

    def measure(self, release: Path) -> dict[str, float]:
        avatar, options = load_avatar(release, self.device), self.recipe.evaluation
        candidate, truth = Candidate(ImageScores(self.lpips)), ExpressionSeries(self.noise)
        for batch in reenact_self(avatar, self.store, self.indices, options.batch_size, options.self_smoothing):
            self._add(batch.index_B, batch.images_BHW3, candidate, truth)
        return as_figures(candidate.summary(truth))

    def _add(self, index_B: np.ndarray, images_BHW3: np.ndarray, candidate: Candidate, truth: ExpressionSeries) -> None:
        frames = np.stack([self.store.frame(int(i)).image for i in index_B])
        metas = [self.store.metas[int(i)] for i in index_B]
        first = int(index_B[0])
        if first not in self.seen:
            self.seen[first] = self.meter.look(frames, metas)
        drawn = np.stack([fit(image, self.size) for image in images_BHW3])
        compared = Truth.of(frames, self.store.landmarks_N68x2[index_B], self.side, self.device)
        candidate.add(drawn, compared, np.array([meta.frame for meta in metas]))
        candidate.add_sight(self.meter.look(drawn, metas), self.seen[first])
        truth.add(self.seen[first].measures)


class HeldOutPair:
    """Cross reenactment of the actor's held-out frames with the avatar that the pair is trained for."""

    def __init__(self, inputs: Mapping[str, Path], recipe: Recipe, device: str) -> None:
        options = recipe.evaluation.model_copy(update={"identity_frames": 1})
        self.inputs, self.recipe = inputs, recipe.model_copy(update={"evaluation": options})
        self.avatar = load_avatar(inputs["avatar"], device)
        self.lpips, _ = perceptual_metric(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, release: Path) -> dict[str, float]:
        pair = load_pair(release, self.avatar.device)
        data = (self.inputs["avatar_dataset"], self.inputs["actor_dataset"])
        found = evaluate_cross(self.avatar, pair, *data, self.recipe, lpips=self.lpips)
        figures = dict(found.metrics["cross"])
        truth = figures.pop("truth", None)
        if truth is not None:  # of two synthetic subjects: its portraits too have something to be compared with
            figures |= {name: truth[name] for name in (*METRICS, "face", "landmark_error")}
        return as_figures(figures)


def as_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.json flat, without what says nothing of a few frames."""
    kept = {name: value for name, value in row.items() if name not in LEFT_OUT}
    return {name: value for name, value in flat(rounded(kept)).items() if "/spread/" not in name}
