"""Sec. 5.2: is it still the same person? Distances between face descriptors of results and of true frames.

The network is dlib's ResNet, trained so that two pictures of one person are nearer than 0.6. E is its width, 128.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lavatar.datasets import weights
from lavatar.datasets.crops import similarity, warp
from lavatar.errors import WeightsError

WEIGHTS = "face_recognition"
WIDTH = 128
CHIP, PADDING = 150, 0.25  # side in pixels of the aligned face, and the room around the template as a share of it
POINTS = (45, 42, 36, 39, 33)  # of the 68: the corners of the eyes, image right first, and the base of the nose
TEMPLATE = np.array(
    [
        (0.8595674595992, 0.2134981538014), (0.6460604764104, 0.2289674387677), (0.1205750620789, 0.2137274526848),
        (0.3340850613712, 0.2290642403242), (0.4901123135679, 0.6277975316475),
    ]
)  # fmt: skip
"""Where dlib puts those five in the unit square when it aligns faces for this network."""


class FaceDescriptor:
    """dlib's face descriptor of pictures whose landmarks are known."""

    def __init__(self, path: Path) -> None:
        import dlib

        self._network = dlib.face_recognition_model_v1(str(path))

    def __call__(self, images_BHW3: np.ndarray, landmarks_B68x2: np.ndarray) -> np.ndarray:
        """uint8 pictures, landmarks in [0, 1] of them → descriptors (B, E); nan where there are no landmarks."""
        descriptors_BE = np.full((len(images_BHW3), WIDTH), np.nan)
        for i, (image, landmarks_68x2) in enumerate(zip(images_BHW3, landmarks_B68x2, strict=True)):
            if np.isfinite(landmarks_68x2[list(POINTS)]).all():
                descriptors_BE[i] = self._network.compute_face_descriptor(face_chip(image, landmarks_68x2))
        return descriptors_BE


def face_chip(image_HW3: np.ndarray, landmarks_68x2: np.ndarray) -> np.ndarray:
    """The aligned face as the network wants it, uint8 (150, 150, 3); landmarks in [0, 1] of the picture."""
    points = landmarks_68x2[list(POINTS)] * image_HW3.shape[0]
    target = (TEMPLATE + PADDING) / (1 + 2 * PADDING) * CHIP
    return np.ascontiguousarray(warp(image_HW3, similarity(points, target, np.ones(len(POINTS))), CHIP))


def face_descriptor() -> tuple[FaceDescriptor | None, str]:
    """The descriptor, or None and the sentence that says which command gets its weights."""
    try:
        return _open(weights.find(WEIGHTS)), ""
    except WeightsError as error:
        return None, f"identity is null: {error.message}. {error.hint}"


@lru_cache(maxsize=1)
def _open(path: Path) -> FaceDescriptor:
    return FaceDescriptor(path)


@dataclass
class Identity:
    """Collects descriptors of results, and of the true frames that they are compared with.

    In self reenactment each result has its own true frame; in cross reenactment (`mean_of_truth`) all are compared with
    the mean descriptor of true frames of the avatar.
    """

    mean_of_truth: bool = False
    truth: list[np.ndarray] = field(default_factory=list)
    result: list[np.ndarray] = field(default_factory=list)

    def add_truth(self, descriptors_BE: np.ndarray) -> None:
        self.truth.append(descriptors_BE)

    def add(self, descriptors_BE: np.ndarray) -> None:
        self.result.append(descriptors_BE)

    def summary(self) -> dict[str, Any]:
        """distance, similarity (cosine), their "spread", and under "reference" the same among the true frames.

        The reference is what no result can be asked to beat: each true frame against all others, or against the mean
        of all others. None where nothing could be compared.
        """
        nothing = np.empty((0, WIDTH))
        truth_NE = np.concatenate([nothing, *self.truth])
        result_ME = np.concatenate([nothing, *self.result])
        if self.mean_of_truth:
            truth_NE = truth_NE[np.isfinite(truth_NE).all(axis=1)]
            compared = _compared(result_ME, truth_NE.mean(axis=0, keepdims=True)) if len(truth_NE) else nothing[:, :2]
        else:
            compared = _compared(result_ME, truth_NE)
            truth_NE = truth_NE[np.isfinite(truth_NE).all(axis=1)]
        reference = _among(truth_NE, self.mean_of_truth)
        means, spread = _named(compared, np.mean), _named(compared, np.std)
        return {**means, "spread": spread, "reference": _named(reference, np.mean)}


def _compared(a_NE: np.ndarray, b_NE: np.ndarray) -> np.ndarray:
    """(N, 2) distances and cosines, row by row (a single row of `b` with each of `a`); rows without a face left out."""
    distance_N = np.linalg.norm(a_NE - b_NE, axis=1)
    norms_N = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
    both_N2 = np.stack([distance_N, (a_NE * b_NE).sum(axis=1) / norms_N], axis=1)
    return np.asarray(both_N2[np.isfinite(both_N2).all(axis=1)])


def _among(truth_NE: np.ndarray, against_mean: bool) -> np.ndarray:
    """(…, 2) distances and cosines of each true frame to all others, or to their mean."""
    count = len(truth_NE)
    if count < 2:
        return np.empty((0, 2))
    if against_mean:
        return _compared(truth_NE, (truth_NE.sum(axis=0) - truth_NE) / (count - 1))
    first, second = np.triu_indices(count, 1)
    return _compared(truth_NE[first], truth_NE[second])


def _named(values_N2: np.ndarray, reduce: Any) -> dict[str, float | None]:
    known = len(values_N2) > 0
    return {
        name: float(reduce(values_N2[:, i])) if known else None for i, name in enumerate(("distance", "similarity"))
    }
