"""The Y-shaped network (Sec. 4.1) and the mapping MLP (Sec. 4.2). Defaults are the paper's Sec. 5.1."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lavatar.configs.section import MOST, Section, Widths

SHAPE_DIM = 90
"""Numbers that say a face's expression (lavatar/training/shape.py makes them; a test compares)."""


class YNetConfig(Section):
    """E_shared, D_ava and D_act."""

    face_size: int = Field(128, ge=16, le=MOST, description="side of the face crops read and drawn")
    code_dim: int = Field(256, ge=1, le=MOST, description="γ")
    encoder: Literal["strided", "whitened"] = Field("strided", description="as published, or as in the avatar's")
    encoder_widths: Widths = Field((32, 64, 128, 256), min_length=1, description="one strided conv each")
    encoder_normalisation: Literal["deviation", "variance", "none"] = Field(
        "deviation", description="what the centred code of each sample is divided by (encoder strided)"
    )
    landmarks: int = Field(0, ge=0, description="numbers read linearly off γ and held to the face's landmarks; 0: none")
    neck_width: int = Field(512, ge=1, le=MOST, description="channels of the map that the code is spread into")
    decoder_widths: Widths = Field((256, 128, 64), min_length=1, description="each doubles the side")
    shared_neck: bool = Field(False, description="the first layers of both decoders are one")
    input_noise: float = Field(0.0, ge=0, description="deviation of the noise on the encoder's input in training")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.landmarks not in (0, SHAPE_DIM):
            raise ValueError(f"landmarks is {self.landmarks}. Set it to {SHAPE_DIM}, a shape's numbers, or to 0")
        halvings_by_name = {"encoder_widths": len(self.encoder_widths), "decoder_widths": len(self.decoder_widths) + 1}
        for name, halvings in halvings_by_name.items():
            if self.face_size % 2**halvings:
                raise ValueError(f"face_size {self.face_size} cannot be halved {halvings} times, as {name} asks")
        return self


class YNetLossConfig(Section):
    """Eq. 5-7, and how a step is made of them.

    With `subjects: one` a step is the paper's: one subject drawn at random, the other's decoder frozen.
    With `subjects: both` each step adds both subjects' losses.
    """

    lambda_image: tuple[float, float] = Field((1.0, 1.0), description="weight of Eq. 5 (avatar, actor)")
    lambda_ssim: float = Field(0.1, ge=0)
    lambda_code: tuple[float, float] = Field((1e-4, 1e-4), description="weight of the code's cycle (avatar, actor)")
    subjects: Literal["one", "both"] = "one"
    image_cycle: bool = Field(True, description="the two image terms of Eq. 6")
    cross_gradient: bool = Field(True, description="the gradient of Eq. 6 passes through the other subject's decoder")


class MappingConfig(Section):
    """Mapping(γ) → θ (Eq. 8)."""

    hidden: Widths = Field((256, 256), description="widths of the hidden layers; empty: one linear map")
    align: Literal["none", "mean", "rest", "deviation"] = Field(
        "none", description="what of each subject's distribution of γ is taken out before the MLP"
    )
    reads: Literal["code", "landmarks"] = Field("code", description="landmarks: what γ says of them, beside γ")
    code_share: float = Field(1.0, ge=0, description="weight of γ beside what it says of the landmarks")
    gain: float = Field(1.0, gt=0, description="of what a linear mapping begins with; above 1 it exaggerates")
    ridge: float = Field(0.003, gt=0, description="damping of the regression that a linear mapping begins at")
    unseen: float = Field(
        0.0, ge=0, description="how much that regression shuns what varies in the actor's γ and not in the avatar's"
    )
    joint: bool = Field(False, description="trained with the Y-network, its gradient reaching E_shared, not after it")
    lambda_mapping: float = Field(1.0, ge=0, description="weight of Eq. 8 where it is trained jointly")


class PairLearningConfig(Section):
    """What our short trainings do beyond Eq. 5-8. The defaults do nothing: that is the paper's training."""

    balance: bool = Field(False, description="draw frames evenly over jaw, blink and head turn, not time")
    shift: float = Field(0.0, ge=0, description="E_shared's input: deviation of shift, scale and turn, in sides")
    color: float = Field(0.0, ge=0, description="E_shared's input: deviation of brightness, contrast and tint")
    feature_weight: float = Field(1.0, ge=1, description="weight of eyes and mouth in the image losses; else 1")
    landmark_weight: float = Field(0.0, ge=0, description="weight of the landmarks read off γ (ynet.landmarks)")
    swapped: float = Field(0.0, ge=0, description="weight of Eq. 8 on the actor's frames as the Y-network swaps them")
    align_frames: int = Field(1024, ge=16, description="frames that mapping.align and regression take")
    regression: bool = Field(False, description="a mapping without hidden layers begins at the regression of θ on γ")
    warm: bool = Field(False, description="begin at the best finished pair of the same avatar, if there is one")
    warm_steps: float = Field(1.0, gt=0, le=1, description="steps of the Y-network then, of ynet_training.steps")
    error_every: int = Field(100, ge=1, description="steps between two measurements of Eq. 5; changes no training")
    error_frames: int = Field(32, ge=1, description="training frames of each subject that it is measured on")
