"""The ground truth of cross reenactment, which exists on synthetic pairs only: the actor's expression drawn on the
avatar's identity, at the pose that the result was drawn under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from lavatar.contracts import Camera, FrameMeta
from lavatar.datasets.loader import FrameStore, over_white
from lavatar.datasets.shards import Manifest
from lavatar.datasets.synthetic import Expression, Identity, render
from lavatar.inference.panels import fit

OVERSAMPLING = 2  # drawn larger and averaged, as the dataset's portraits are


@dataclass(frozen=True)
class TransferTruth:
    """Draws the truth of frames of one synthetic pair."""

    identity: Identity
    camera: Camera  # of the truth as it is drawn, before the average
    size: int

    @staticmethod
    def between(avatar: FrameStore, actor: FrameStore, size: int) -> TransferTruth | None:
        """None unless both subjects are synthetic."""
        seed = synthetic_seed(avatar.manifest)
        if seed is None or synthetic_seed(actor.manifest) is None:
            return None
        own = avatar.metas[0].camera
        ratio = min(own.size, OVERSAMPLING * size) / own.size
        side = round(own.size * ratio)
        camera = Camera(own.focal * ratio, own.cx * ratio, own.cy * ratio, side)
        return TransferTruth(Identity.from_seed(seed), camera, size)

    def draw(self, metas: Sequence[FrameMeta]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (B, H, W, 3) uint8 over white, and their landmarks (B, 68, 2) in [0, 1] of the picture.

        `metas`: the actor's expression with the pose that the avatar was drawn under.
        """
        images, landmarks = [], []
        for meta in metas:
            rgb, alpha, points = render(self.identity, expression_of(meta), meta.pose, self.camera)
            image = over_white((rgb * 255).round().astype(np.uint8), (alpha * 255).round().astype(np.uint8))
            images.append(fit(image, self.size))
            landmarks.append(points / self.camera.size)
        return np.stack(images), np.stack(landmarks)


def synthetic_seed(manifest: Manifest) -> int | None:
    """The seed of a synthetic subject's identity; None for a video."""
    if manifest.kind != "synthetic":
        return None
    seed = manifest.source.get("seed")
    return None if seed is None else int(seed)


def expression_of(meta: FrameMeta) -> Expression:
    """The parameters a synthetic frame was drawn with."""
    names = {f.name for f in fields(Expression)}
    return Expression(**{name: float(value) for name, value in meta.expression.items() if name in names})
