"""Sec. 5.1 (background removal): alpha mattes of portrait crops, and what is faded out of them.

Alpha is float32 in [0,1], H×W. What is stored as the picture is the foreground's own colour, not multiplied by alpha:
where alpha is below one it is taken from the opaque neighbourhood, so that no rim of the old background is left when
the loader lays it over white; where alpha is zero it is white.
"""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np

from lavatar.contracts import Camera, HeadPose
from lavatar.datasets import weights
from lavatar.errors import ConfigError, WeightsError

NETWORK_INPUT = 384
"""Largest side that the matting network gets; its guided filter brings the edges back from `matting_size`."""
_NECK_PLANE = -0.35  # head-space z of the plane in which the fade is drawn: through the neck
_NECK_FADE = (-1.72, -1.35)  # head-space y: nothing below, everything above
_SIDE_FADE = (1.5, 1.3)  # head-space |x|, only below the chin: shoulders leave the rendered volume here
_CHIN = (-1.2, -0.95)  # head-space y between which the fade at the sides sets in


class Matting(Protocol):
    """Frames in order of time; `reset` before another sequence."""

    def alpha(self, rgb: np.ndarray) -> np.ndarray:
        """uint8 HWC → alpha float32 HW in [0,1]."""
        ...

    def reset(self) -> None: ...


def open_matting(name: str, size: int = 192, threads: int = 1) -> Matting:
    """A matting by its name in the configuration. WeightsError where its file is missing.

    `size` is the side at which the network looks. `threads` are those of one network; their number shows in the last
    bits of the result, so preprocessing keeps to one and takes its speed from segments.
    """
    if name == "rvm":
        return RobustVideoMatting(size, threads)
    if name == "mediapipe":
        return MediapipeMatting()
    if name == "alpha":
        return GivenAlpha()
    raise ConfigError(f"there is no matting {name!r}", "Use preprocess.matting rvm, mediapipe or alpha.")


class RobustVideoMatting:
    """Robust Video Matting (Lin et al. 2022) by onnxruntime: recurrent, so it wants a few frames to settle."""

    def __init__(self, size: int = 192, threads: int = 1) -> None:
        import onnxruntime

        path = weights.find("rvm")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, threads)
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public root
            hint = f"Delete it and run: {weights.FETCH} rvm"
            raise WeightsError(f"{path}: onnxruntime cannot load it ({error})", hint) from error
        self._size = size
        self.reset()

    def reset(self) -> None:
        self._state: list[Any] = [np.zeros((1, 1, 1, 1), np.float32)] * 4

    def alpha(self, rgb: np.ndarray) -> np.ndarray:
        height, width = rgb.shape[:2]
        side = max(height, width)
        shape = (round(width * min(1.0, NETWORK_INPUT / side)), round(height * min(1.0, NETWORK_INPUT / side)))
        small = rgb if side <= NETWORK_INPUT else cv2.resize(rgb, shape, interpolation=cv2.INTER_AREA)
        inputs = {f"r{i + 1}i": state for i, state in enumerate(self._state)}
        inputs["src"] = np.ascontiguousarray(small.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(255)
        inputs["downsample_ratio"] = np.array([min(1.0, self._size / max(shape))], np.float32)
        alpha, *self._state = self._session.run(["pha", "r1o", "r2o", "r3o", "r4o"], inputs)
        full = cv2.resize(alpha[0, 0], (width, height), interpolation=cv2.INTER_LINEAR)
        return np.clip(full, 0.0, 1.0)


class MediapipeMatting:
    """MediaPipe's selfie segmenter: coarser than RVM, each frame by itself."""

    def __init__(self) -> None:
        from mediapipe.tasks.python import BaseOptions, vision

        path = weights.find("selfie_segmenter")
        self._segmenter = vision.ImageSegmenter.create_from_options(
            vision.ImageSegmenterOptions(
                base_options=BaseOptions(model_asset_path=str(path)), output_confidence_masks=True
            )
        )

    def reset(self) -> None: ...

    def alpha(self, rgb: np.ndarray) -> np.ndarray:
        import mediapipe

        image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(rgb))
        mask = self._segmenter.segment(image).confidence_masks[-1].numpy_view()
        return np.clip(mask.reshape(rgb.shape[:2]), 0.0, 1.0).astype(np.float32)


class GivenAlpha:
    """`alpha`: the video shows the person before white already; all that is not white is the person."""

    def reset(self) -> None: ...

    def alpha(self, rgb: np.ndarray) -> np.ndarray:
        away = (255 - rgb.min(axis=2)).astype(np.float32)
        return np.clip((away - 8.0) / 24.0, 0.0, 1.0)


def foreground(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The person's own colour, uint8 HWC: `rgb` where opaque, the opaque neighbourhood's at the rim, else white."""
    height, width = alpha.shape
    small_size = (max(1, width // 4), max(1, height // 4))
    small = cv2.resize(rgb, small_size, interpolation=cv2.INTER_AREA).astype(np.float32)
    solid = np.clip((cv2.resize(alpha, small_size, interpolation=cv2.INTER_AREA) - 0.9) / 0.1, 0, 1)
    near = np.full_like(small, 255.0)
    for share in (8, 32):  # the wide neighbourhood first, the close one over it
        reach = max(3, small_size[0] // share) | 1
        weight = cv2.blur(solid, (reach, reach), borderType=cv2.BORDER_REPLICATE)[..., None]
        spread = cv2.blur(small * solid[..., None], (reach, reach), borderType=cv2.BORDER_REPLICATE)
        near = np.where(weight > 1e-3, spread / np.maximum(weight, 1e-3), near)
    wide = cv2.resize(np.clip(near, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    colour = rgb.copy()
    rim = alpha < 0.98
    keep = np.clip((alpha[rim] - 0.85) / 0.13, 0, 1)[:, None]
    colour[rim] = np.rint(keep * rgb[rim] + (1 - keep) * wide[rim])
    colour[alpha <= 0] = 255
    return colour


def fade(
    alpha: np.ndarray, pose: HeadPose, camera: Camera, portrait_transform: np.ndarray, source_size: tuple[int, int]
) -> np.ndarray:
    """Alpha with everything faded out that a head in its box cannot explain.

    First where the crop leaves the source frame (`source_size` is its width, height): that cut stands still while the
    head moves. Then below the neck and beside it, in head space: shoulders leave the rendered volume there.
    """
    size = camera.size
    faded = alpha * frame_fade(portrait_transform, source_size, size)
    to_head = _plane_to_head(pose, camera)
    to_head = to_head.astype(np.float32)
    columns = rows = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x = to_head[0, 0] * columns[None, :] + to_head[0, 1] * rows[:, None] + to_head[0, 2]
    y = to_head[1, 0] * columns[None, :] + to_head[1, 1] * rows[:, None] + to_head[1, 2]
    neck = _ramp(y, *_NECK_FADE)
    beside = 1 - _ramp(-np.abs(x), -_SIDE_FADE[0], -_SIDE_FADE[1])
    side = 1 - beside * (1 - _ramp(y, *_CHIN))
    return (faded * neck * side).astype(np.float32)


def frame_fade(portrait_transform: np.ndarray, source_size: tuple[int, int], size: int) -> np.ndarray:
    """0 outside the source frame, rising to 1 within 8 % of the crop inside those borders that the crop crosses."""
    transform = np.asarray(portrait_transform, np.float64)
    left, top = transform[:, 2]
    right, bottom = transform[0, 0] * source_size[0] + left, transform[1, 1] * source_size[1] + top
    width = 0.08 * size
    centres = np.arange(size) + 0.5
    across, down = np.ones(size), np.ones(size)
    if left > 0:
        across *= _ramp(centres, left, left + width)
    if right < size:
        across *= _ramp(-centres, -right, -(right - width))
    if top > 0:
        down *= _ramp(centres, top, top + width)
    if bottom < size:
        down *= _ramp(-centres, -bottom, -(bottom - width))
    return (down[:, None] * across[None, :]).astype(np.float32)


def _ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _plane_to_head(pose: HeadPose, camera: Camera) -> np.ndarray:
    """Affine map 2×3 from pixels to head-space (x, y) on the neck's plane; exact up to the weak perspective there."""
    corners = np.array([[0.0, 0.0, _NECK_PLANE], [1.0, 0.0, _NECK_PLANE], [0.0, -1.5, _NECK_PLANE]])
    moved = pose.scale * corners @ np.asarray(pose.rotation).T + np.asarray(pose.translation)
    pixels = moved[:, :2] / moved[:, 2:] * camera.focal + [camera.cx, camera.cy]
    system = np.concatenate([pixels, np.ones((3, 1))], axis=1)
    return np.linalg.solve(system, corners[:, :2]).T
