"""Image metrics of a set of results, collected batch by batch: the whole portrait, and the face alone.

Results and truth are compared at the avatar's own training resolution; the truth is brought to it by area average.
Pictures are uint8 RGB, BHW3. Each figure is the mean over the frames of that frame's figure (Sec. 5.2), its spread
their standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lavatar.datasets import weights
from lavatar.errors import WeightsError
from lavatar.inference.pictures import to_tensor
from lavatar.models.metrics import image_metrics
from lavatar.models.perceptual import LPIPS

METRICS = ("mse", "psnr", "ssim", "lpips")
MOST_DB = 100.0  # PSNR of equal pictures, which is infinite and no number in JSON
FACE_MARGIN = 1.25
LEAST_FACE = 16  # pixels; the window of SSIM must fit
PERCEPTUAL_FACE = 64  # AlexNet needs this much of a picture


class RememberingLPIPS(LPIPS):
    """LPIPS that computes the features of the pictures it has just seen only once: three predictions, one truth."""

    seen: tuple[tuple[Tensor, list[Tensor]], ...] = ()

    def features(self, image_B3HW: Tensor) -> list[Tensor]:
        """The same as LPIPS.features; small pictures are enlarged to what AlexNet takes."""
        for picture, features in self.seen:
            if picture is image_B3HW:
                return features
        enlarged = image_B3HW
        if min(image_B3HW.shape[-2:]) < PERCEPTUAL_FACE:
            enlarged = F.interpolate(image_B3HW, size=(PERCEPTUAL_FACE,) * 2, mode="bilinear")
        features = super().features(enlarged)
        self.seen = (*self.seen[-2:], (image_B3HW, features))
        return features


def perceptual_metric(device: torch.device | str = "cpu") -> tuple[LPIPS | None, str]:
    """LPIPS with the AlexNet trunk, or None and the sentence that says which command gets its weights."""
    try:
        return RememberingLPIPS(load_file(weights.find("lpips_alexnet")), "alex").to(device), ""
    except WeightsError as error:
        return None, f"lpips is null: {error.message}. {error.hint}"


def face_side(landmarks_N68x2: np.ndarray, size: int) -> int:
    """Side in pixels of the face square of a dataset: the median landmark box and a margin, the same for all frames."""
    extent_N = (landmarks_N68x2.max(axis=1) - landmarks_N68x2.min(axis=1)).max(axis=1)
    side = round(float(np.median(extent_N)) * FACE_MARGIN * size)
    return min(size, max(LEAST_FACE, side))


def face_squares(images_BHW3: np.ndarray, landmarks_B68x2: np.ndarray, side: int) -> np.ndarray:
    """Squares of `side` around the middle of each frame's landmarks, moved inside the picture where they reach out."""
    size = images_BHW3.shape[1]
    middle_B2 = (landmarks_B68x2.max(axis=1) + landmarks_B68x2.min(axis=1)) / 2 * size
    corner_B2 = np.clip((middle_B2 - side / 2).round().astype(int), 0, size - side)
    return np.stack([im[y : y + side, x : x + side] for im, (x, y) in zip(images_BHW3, corner_B2, strict=True)])


@dataclass(frozen=True)
class Truth:
    """A batch of true pictures, ready to be compared with several kinds of result."""

    images_BHW3: np.ndarray
    whole_B3HW: Tensor
    face_B3SS: Tensor
    landmarks_B68x2: np.ndarray
    side: int

    @staticmethod
    def of(truth_BHW3: np.ndarray, landmarks_B68x2: np.ndarray, side: int, device: torch.device | str = "cpu") -> Truth:
        """Landmarks in [0, 1] of the picture; `side` of the face square."""
        face = face_squares(truth_BHW3, landmarks_B68x2, side)
        return Truth(truth_BHW3, to_tensor(truth_BHW3, device), to_tensor(face, device), landmarks_B68x2, side)


@dataclass
class ImageScores:
    """Collects the metrics of one kind of result against the truth."""

    lpips: LPIPS | None
    whole: dict[str, list[Tensor]] = field(default_factory=dict)
    face: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, result_BHW3: np.ndarray, truth: Truth) -> None:
        """Compare a batch."""
        device = truth.whole_B3HW.device
        self._compare(self.whole, to_tensor(result_BHW3, device), truth.whole_B3HW)
        face = face_squares(result_BHW3, truth.landmarks_B68x2, truth.side)
        self._compare(self.face, to_tensor(face, device), truth.face_B3SS)

    @torch.inference_mode()
    def _compare(self, into: dict[str, list[Tensor]], result_B3HW: Tensor, truth_B3HW: Tensor) -> None:
        values = image_metrics(result_B3HW, truth_B3HW)
        if self.lpips is not None:
            values["lpips"] = self.lpips(truth_B3HW, result_B3HW)
        for name, value in values.items():
            into.setdefault(name, []).append(value.float().cpu().clamp(max=MOST_DB))

    def frames(self) -> dict[str, np.ndarray]:
        """The figures of the whole portrait frame by frame, (N,) each, in the order added."""
        return {name: torch.cat(values).numpy() for name, values in self.whole.items()}

    def summary(self) -> dict[str, Any]:
        """mse, psnr, ssim, lpips of the whole portrait with their "spread", and the same under "face".

        None where there are no weights.
        """
        return {**_figures(self.whole), "face": _figures(self.face)}


def _figures(values: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Mean over the frames by name, and under "spread" the standard deviation."""
    known = {name: torch.cat(parts).double() for name, parts in values.items()}
    means = {name: float(known[name].mean()) if name in known else None for name in METRICS}
    spread = {name: float(known[name].std(correction=0)) if name in known else None for name in METRICS}
    return {**means, "spread": spread}
