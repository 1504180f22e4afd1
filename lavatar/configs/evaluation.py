"""Evaluation and preview."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lavatar.configs.section import Section

HIGHER = ("psnr", "ssim", "r")
"""Figures of which more is better; of all others less is."""


class EvaluationConfig(Section):
    """What the last stage measures and draws."""

    batch_size: int = Field(8, ge=1, description="frames rendered at a time")
    max_frames: int = Field(0, ge=0, description="held-out frames measured, spread evenly; 0: all")
    video_seconds: float = Field(0.0, ge=0, description="length of the cross reenactment's mp4; 0: all held-out frames")
    still_frames: int = Field(8, ge=1)
    panel_size: int = Field(512, ge=64, description="height of one panel of the mp4 in pixels (even)")
    nearest_pool: int = Field(2000, ge=1, description="training frames searched for the nearest-frame baseline")
    pose_smoothing: float = Field(1.0, ge=0, description="Gaussian smoothing of a driven head's pose, frames")
    self_smoothing: float = Field(0.0, ge=0, description="the same of the held-out poses in self reenactment")
    identity_frames: int = Field(16, ge=1, description="frames whose face is compared for identity, spread evenly")
    crf: int = Field(18, ge=0, le=40, description="H.264 quality: 0 lossless, 18 looks like the original")
    champion_avatar: Literal["lpips", "psnr", "ssim", "mse", "expression_error"] = Field(
        "lpips", description="figure of self reenactment by which an avatar's version is better than another"
    )
    champion_pair: Literal["expression_error", "identity/distance", "truth/lpips", "truth/psnr", "truth/ssim"] = Field(
        "expression_error", description="the same of cross reenactment, for a pair; truth: of synthetic pairs alone"
    )
    promote: Literal["always", "better", "never"] = Field(
        "better", description="when a new version becomes the champion of its model"
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.panel_size % 2:
            raise ValueError(f"panel_size must be even for H.264, got {self.panel_size}")
        return self
