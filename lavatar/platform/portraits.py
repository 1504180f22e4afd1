"""What the models in the registry have in common: pictures in, portraits of the avatar out.

A picture as large as the preprocessing's face crop (128×128 by default) is one; others are whole frames of one video,
in which the face is found and cropped as `lavatar reenact` does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
TAKES = (
    "uint8 RGB pictures of shape (N, height, width, 3): whole frames of one video, or face crops of the size that it "
    "was trained on"
)
Codes = Callable[[np.ndarray], Any]


def portraits(avatar: Any, codes: Codes, pictures_NhW3: Any, about: str | None = None) -> np.ndarray:
    """Fig. 4: uint8 RGB pictures (N, h, w, 3) → uint8 RGB portraits (N, H, W, 3), a few at a time.

    `codes` turns faces into θ: the avatar's own encoder, or E_shared and the mapping MLP. `about` is the model's
    about.json; without, as models of earlier versions call this, every picture is a face crop. Raises ValueError for
    what are no pictures.
    """
    from lavatar.inference.retarget import apply_motion

    pictures = _pictures(pictures_NhW3)
    recipe = _recipe(about) if about else None
    if recipe is not None and len(pictures) and pictures.shape[1:3] != (recipe.preprocess.face_size,) * 2:
        return _of_frames(avatar, codes, pictures, recipe)
    return _drawn(avatar, codes, pictures, apply_motion(np.zeros((len(pictures), 7)), avatar.poses.mean))


def _pictures(given: Any) -> np.ndarray:
    """What was sent, as pictures. Raises ValueError for anything else."""
    try:
        pictures = np.asarray(given)
    except ValueError:  # lists of different lengths
        raise ValueError(f"the model takes {TAKES}; got a {type(given).__name__} that is no array") from None
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8 or 0 in pictures.shape[1:3]:
        raise ValueError(f"the model takes {TAKES}; got {pictures.dtype} {pictures.shape}")
    return pictures


def _of_frames(avatar: Any, codes: Codes, frames_NHW3: np.ndarray, recipe: Any) -> np.ndarray:
    """Whole frames: faces found, head motion carried over; a frame without a face has the portrait before it."""
    from lavatar.datasets.driver import track_pictures
    from lavatar.inference.reenact import driven_poses
    from lavatar.inference.retarget import PoseTrack

    clip = track_pictures(frames_NHW3, recipe.preprocess)
    track = PoseTrack.of(clip.poses)
    poses = driven_poses(avatar.poses, track, np.arange(len(track)), recipe.evaluation.pose_smoothing)
    drawn = _drawn(avatar, codes, clip.faces_NHW3, poses)
    before = np.searchsorted(clip.indices, np.arange(len(frames_NHW3)), side="right") - 1
    return np.asarray(drawn[np.maximum(before, 0)])


def _drawn(avatar: Any, codes: Codes, faces_NhW3: np.ndarray, poses: Any) -> np.ndarray:
    """Portraits of faces, each in its pose."""
    from lavatar.inference.reenact import draw

    size = avatar.config.image_size
    out = np.zeros((len(faces_NhW3), size, size, 3), np.uint8)
    for start in range(0, len(faces_NhW3), BATCH):
        part = slice(start, start + BATCH)
        out[part] = draw(avatar, codes(faces_NhW3[part]), poses[part])
    return out


def _recipe(about: str) -> Any:
    from lavatar.platform.about import read_about

    return read_about(Path(about)).read_recipe()
