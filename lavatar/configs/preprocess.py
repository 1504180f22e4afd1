"""Preprocessing: from a video to shards (design: data)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lavatar.configs.section import Section


class PreprocessConfig(Section):
    """Everything a dataset's digest depends on besides the video and the pretrained weights."""

    tracker: Literal["mediapipe", "face_alignment", "synthetic"] = "mediapipe"
    matting: Literal["rvm", "mediapipe", "alpha"] = "rvm"
    matting_size: int = Field(192, ge=64, le=512, description="side at which the matting network sees the portrait")
    portrait_size: int = Field(512, ge=64, le=2048)
    face_size: int = Field(128, ge=32, le=512)
    face_mask: Literal["none", "hull"] = Field(
        "none", description="hull: the face crop is black outside the convex hull of the 68 landmarks"
    )
    focal: float = Field(5000.0, gt=0, description="pixels at portrait size 512, scaled with the size")
    distance: float = Field(4.0, gt=0, description="metres from camera to the head's mean position")
    crop_scale: float = Field(2.15, gt=1, description="least portrait side over the median landmark box")
    segment_frames: int = Field(250, ge=10)
    warmup_frames: int = Field(8, ge=0, description="frames before a segment that settle the recurrent matting")
    max_frames: int = Field(0, ge=0, description="0: all; else the first so many")
    min_frames: int = Field(40, ge=2)
    max_dropped: float = Field(0.2, ge=0, le=1)
    held_out: Literal["last", "first"] = "last"
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    smoothing: float = Field(1.0, ge=0, description="Gaussian smoothing of the pose in time, frames")
    jpeg_quality: int = Field(95, ge=50, le=100)
    synthetic_frames: int = Field(1000, ge=20, description="length of a synthetic subject's video")
