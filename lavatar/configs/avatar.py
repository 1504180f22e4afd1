"""The latent head NeRF (Sec. 3) and the weights of its loss (Eq. 4). Defaults are the paper's Sec. 5.1."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lavatar.configs.section import MOST, Section, Widths
from lavatar.contracts import COEFFICIENTS

Interval = tuple[float, float]


class AvatarConfig(Section):
    """Sizes and kinds of the parts of the latent head NeRF. Lengths are in head units (10 cm) unless said."""

    image_size: int = Field(512, ge=32, le=MOST, description="side of I_hr")
    ray_size: int = Field(128, ge=8, le=MOST, description="side of I_lr, I_F and M")
    samples: int = Field(64, ge=2, le=MOST, description="points along each ray")
    face_size: int = Field(128, ge=16, le=MOST, description="side of the encoder's input")
    code_dim: int = Field(128, ge=1, le=MOST, description="θ_p")

    # Encoder, Eq. 2
    encoder: Literal["strided", "whitened", "coefficients"] = Field(
        "strided", description="coefficients: no encoder, a template's expression coefficients are the code (Sec. 5.2)"
    )
    encoder_widths: Widths = Field((32, 64, 128, 256), min_length=1, description="one strided conv each")
    encoder_normalisation: Literal["deviation", "variance", "none"] = Field(
        "deviation", description="what the centred code of each sample is divided by"
    )
    encoder_mapping: Widths = Field(
        (), description="code and hidden widths of an MLP between the normalised code and θ_p; empty: the code is θ_p"
    )
    input_noise: float = Field(0.0, ge=0, description="deviation of the noise on the encoder's input in training")

    # Tri-plane generator, Sec. 3.2
    generator: Literal["stylegan", "basis"] = "stylegan"
    triplane_size: int = Field(128, ge=8, le=MOST)
    triplane_channels: int = Field(32, ge=1, le=MOST, description="of each of the three planes")
    generator_capacity: int = Field(
        48, ge=1, le=MOST, description="half the last block's width; doubled at each coarser one"
    )
    generator_max_channels: int = Field(256, ge=1, le=MOST)
    generator_gain: float = Field(
        2**0.5, gt=0, description="after each LeakyReLU; √2 (StyleGAN) keeps the scale of the map through the layers"
    )

    # Radiance MLP, Eq. 3
    radiance: Literal["joint", "separate"] = Field(
        "joint", description="one MLP for σ, c and F, or one for σ and one for c, F"
    )
    density_hidden: int = Field(128, ge=1, le=MOST)
    color_hidden: int = Field(128, ge=1, le=MOST, description="used by `separate`")
    view_frequencies: int = Field(
        4, ge=0, le=32, description="octaves of the view direction's encoding; 0: no view direction"
    )
    feature_channels: int = Field(32, ge=3, le=MOST, description="of I_F; the first three are I_lr")
    color_activation: Literal["none", "sigmoid"] = Field("none", description="of the first three channels")
    density_activation: Literal["relu", "softplus"] = "softplus"
    density_bias: float = Field(-1.0, description="added before the activation")
    density_scale: float = Field(10.0, gt=0, description="optical depth per head unit at density 1")

    # Volume rendering
    focal: float = Field(5000.0, gt=0, description="pixels at image size 512, scaled with the size")
    box: tuple[Interval, Interval, Interval] = ((-1.5, 1.5), (-1.8, 1.8), (-1.9, 1.1))
    missed_near_far: Interval | None = Field(
        None, description="camera depths between which a ray that misses the box is sampled; none: it stays white"
    )
    sampling: Literal["stratified", "regular"] = Field("stratified", description="of a ray's points, in training")
    density_noise: float = Field(0.0, ge=0, description="deviation of the noise on the density in training")
    compositing: Literal["finite", "opaque_far"] = Field(
        "finite", description="opaque_far: endless last interval, opaque white sample behind, so M is 1 everywhere"
    )

    # Super-resolution, Sec. 3.2
    superresolution: Literal["unet", "residual"] = "unet"
    superresolution_capacity: int = Field(32, ge=1, le=MOST)

    # Baseline NeRFace (Sec. 5.2)
    field: Literal["triplane", "mlp"] = Field("triplane", description="mlp: NeRFace, no tri-plane, no super-resolution")
    field_layers: int = Field(6, ge=2, le=64, description="of the MLP that gives the density")
    field_width: int = Field(256, ge=2, le=MOST)
    position_frequencies: int = Field(10, ge=0, le=32, description="octaves of the position's encoding")
    fine_samples: int = Field(
        64, ge=1, le=MOST, description="points along each ray beside `samples`, where there is something"
    )
    frame_code: int = Field(32, ge=0, le=MOST, description="width of the learned code of each training frame")

    # Generator `basis`
    basis_count: int = Field(32, ge=1, le=MOST, description="basis planes that the code blends")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        ratio, rest = divmod(self.image_size, self.ray_size)
        if rest or ratio < 1 or ratio & (ratio - 1):
            raise ValueError(f"image_size / ray_size must be a power of two, got {self.image_size} / {self.ray_size}")
        if self.generator == "stylegan" and self.triplane_size & (self.triplane_size - 1):
            raise ValueError(f"the stylegan generator needs triplane_size = 2^n, got {self.triplane_size}")
        if self.encoder == "strided" and self.face_size % 2 ** len(self.encoder_widths):
            raise ValueError(f"face_size {self.face_size} cannot be halved {len(self.encoder_widths)} times")
        if self.encoder == "coefficients" and self.code_dim != COEFFICIENTS:
            raise ValueError(f"encoder coefficients has code_dim {COEFFICIENTS}, got {self.code_dim}")
        if self.field == "mlp" and (self.encoder != "coefficients" or self.image_size != self.ray_size):
            raise ValueError("field mlp needs encoder coefficients and ray_size = image_size: every pixel is a ray")
        if any(low >= high for low, high in self.box):
            raise ValueError(f"box needs low < high on each axis, got {self.box}")
        return self


class AvatarLossConfig(Section):
    """Eq. 4: λ of each term beside the L1 of I_hr."""

    lambda_vgg: float = Field(0.1, ge=0)
    lambda_lr: float = Field(0.1, ge=0)
    lambda_mask: float = Field(0.1, ge=0)


class AvatarLearningConfig(Section):
    """What our short trainings do beyond Eq. 4. The defaults do nothing: that is the paper's training."""

    rate_planes: float = Field(1.0, gt=0, description="times the learning rate: static planes of the basis generator")
    rate_basis: float = Field(1.0, gt=0, description="times the learning rate: its basis planes")
    rate_encoder: float = Field(1.0, gt=0, description="times the learning rate")
    rate_pose: float = Field(0.0, ge=0, description="times the learning rate: correction of each frame's pose; 0: none")
    beta2: float = Field(0.999, gt=0, lt=1, description="of Adam: memory of the gradients' squares")
    epsilon: float = Field(1e-8, gt=0, description="of Adam: the gradient of one texel of a plane is itself near 1e-8")
    pose_penalty: float = Field(10.0, ge=0, description="weight of the mean square of the corrections")
    feature_weight: float = Field(1.0, ge=1, description="weight of eyes and mouth in the image losses; else 1")
    balance: bool = Field(False, description="draw frames evenly over jaw, blink and head turn, not time")
    crop: float = Field(0.0, ge=0, le=1, description="share of steps that see a square of half the side, on the face")
    progressive: float = Field(0.0, ge=0, lt=1, description="share of steps, at the beginning, at half the resolution")
    perceptual_every: int = Field(1, ge=1, description="steps between two that have the perceptual term of Eq. 4")
    perceptual_frames: int = Field(0, ge=0, description="frames of a batch that it sees; 0: all")
    average: float = Field(
        0.0, ge=0, lt=1, description="decay of the weights' running mean, which is released; 0: none"
    )
    ray_batch: int = Field(2048, ge=1, description="field mlp: rays of each frame of a batch")
    ray_face_share: float = Field(0.95, ge=0, le=1, description="field mlp: of these rays in the landmarks' box")
    frame_code_penalty: float = Field(1e-3, ge=0, description="field mlp: weight of the mean square of the frame codes")
    shift: float = Field(0.0, ge=0, description="encoder's input: deviation of shift, scale and turn, in sides")
    color: float = Field(0.0, ge=0, description="encoder's input: deviation of brightness, contrast and tint")
