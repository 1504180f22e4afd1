"""Weights of the image losses: eyes and mouth are a twentieth of a portrait and most of an expression.

Shapes: B batch, H side of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

EYES_AND_MOUTH: tuple[tuple[slice, float, float], ...] = (
    (slice(36, 42), 0.75, 0.75),  # (points of the 68, half width and half height in widths of the feature)
    (slice(42, 48), 0.75, 0.75),
    (slice(48, 68), 0.70, 0.50),
)
SHARPNESS = 6.0


def feature_weights(landmarks_B68x2: Tensor, side: int, weight: float) -> Tensor:
    """B×1×H×H: `weight` on both eyes and the mouth, 1 elsewhere, with a soft edge. Landmarks are in [0, 1].

    The mouth's ellipse is at least as high as its landmarks, so that a wide open mouth is all inside.
    """
    centres = (torch.arange(side, device=landmarks_B68x2.device) + 0.5) / side
    inside = torch.zeros(landmarks_B68x2.shape[0], side, side, device=landmarks_B68x2.device)
    for points, half_width, half_height in EYES_AND_MOUTH:
        low, high = landmarks_B68x2[:, points].amin(1), landmarks_B68x2[:, points].amax(1)
        middle, extent = (low + high) / 2, high - low
        width = extent[:, 0].clamp(min=1e-3)
        radius_x, radius_y = half_width * width, torch.maximum(half_height * width, 0.75 * extent[:, 1])
        x = (centres - middle[:, :1]) / radius_x[:, None]
        y = (centres - middle[:, 1:]) / radius_y[:, None]
        distance_BHH = (x[:, None, :].square() + y[:, :, None].square()).sqrt()
        inside = torch.maximum(inside, torch.sigmoid(SHARPNESS * (1 - distance_BHH) * 2))
    return (1 + (weight - 1) * inside)[:, None]
