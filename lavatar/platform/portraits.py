"""What the models in the registry have in common: face crops in, portraits in the avatar's mean training pose out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BATCH = 8


def portraits(avatar: Any, codes: Callable[[np.ndarray], Any], faces_NhW3: Any) -> np.ndarray:
    """Fig. 4: uint8 RGB faces (N, 128, 128, 3) → uint8 RGB portraits (N, H, W, 3), a few at a time.

    `codes` turns faces into θ: the avatar's own encoder, or E_shared and the mapping MLP.
    """
    from lavatar.inference.reenact import draw
    from lavatar.inference.retarget import apply_motion

    faces = np.asarray(faces_NhW3)
    if faces.ndim != 4 or faces.shape[-1] != 3 or faces.dtype != np.uint8:
        raise ValueError(f"faces must be uint8 of shape (N, 128, 128, 3), got {faces.dtype} {faces.shape}")
    size = avatar.config.image_size
    out = np.zeros((len(faces), size, size, 3), np.uint8)
    for start in range(0, len(faces), BATCH):
        part = faces[start : start + BATCH]
        still = apply_motion(np.zeros((len(part), 7)), avatar.poses.mean)
        out[start : start + len(part)] = draw(avatar, codes(part), still)
    return out
