"""Volume rendering of Sec. 3.2: rays of the camera in head space, points along them, compositing on white.

A ray is o + t·d in head space with t the camera depth (z of the camera), so d is not of unit length.
Shapes: B batch, R rays, S samples a ray, O channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.models.parts import drawn

Noise = bool | Generator
"""False: none, the same picture every time; True: from torch's own generator; or from the generator given."""

ENDLESS = 1e10
"""Length of the last interval of `opaque_far`: any density there is opaque."""


class View(NamedTuple):
    """The part of the picture that is drawn: a square of `side`² cells out of ray_size², its first cell a sample.

    `corner_B2` are rows and columns of that cell; None: the square begins at the picture's own corner.
    """

    ray_size: int
    side: int
    corner_B2: Tensor | None = None


class Rays(NamedTuple):
    """Origins B×1×3 and directions B×R×3 in head space; t is the camera depth."""

    origin_B13: Tensor
    direction_BR3: Tensor


def cell_offsets(view: View, like: Tensor) -> Tensor:
    """Rows and columns of the centres of a view's cells, from the picture's middle, in sides of the picture: B×2×r
    (B is 1 where all frames are seen alike)."""
    cells = torch.arange(view.side, device=like.device, dtype=like.dtype)
    corner_B2 = cells.new_zeros(1, 2) if view.corner_B2 is None else view.corner_B2.to(cells)
    return (corner_B2[..., None] + cells + 0.5) / view.ray_size - 0.5


def camera_rays(view: View, focal: float, rotation_B33: Tensor, translation_B3: Tensor, scale_B: Tensor) -> Rays:
    """Rays through the centres of the view's cells of the image, row by row, moved into head space.

    `focal` is in sides of the image (5000 / 512). With x_cam = scale·R·x_head + t and the camera at the origin, a ray
    of the camera o = 0, d = (u, v, 1) becomes o = −Rᵀt / scale, d = Rᵀd / scale.
    """
    offset_B2r = cell_offsets(view, rotation_B33) / focal
    v_Br1, u_B1r = offset_B2r[:, 0, :, None], offset_B2r[:, 1, None, :]
    offset_BR2 = torch.stack(torch.broadcast_tensors(v_Br1, u_B1r), dim=-1).flatten(1, 2)
    return rays_through(offset_BR2, rotation_B33, translation_B3, scale_B)


def rays_through(offset_BR2: Tensor, rotation_B33: Tensor, translation_B3: Tensor, scale_B: Tensor) -> Rays:
    """Rays through any points of the image plane at depth 1 (v, u: down and right of the middle), in head space."""
    v_BR, u_BR = offset_BR2.unbind(-1)
    direction_BR3 = torch.stack([u_BR, v_BR, torch.ones_like(u_BR)], dim=-1)
    to_head_B33 = rotation_B33 / scale_B[:, None, None]  # row vectors times R are Rᵀ times columns
    return Rays(-multiplied(translation_B3[:, None], to_head_B33), multiplied(direction_BR3, to_head_B33))


def multiplied(rows_BN3: Tensor, matrix_B33: Tensor) -> Tensor:
    """rows @ matrix without a matrix product: in bf16 (autocast) or TF32 a ray would be off by pixels."""
    return (rows_BN3[..., None] * matrix_B33[:, None]).sum(dim=-2)


def box_depths(rays: Rays, box: tuple[tuple[float, float], ...]) -> tuple[Tensor, Tensor]:
    """Depths t at which each ray enters and leaves the box, B×R each; where it misses, near ≥ far."""
    origin, direction = rays
    tiny = torch.full_like(direction, 1e-9)
    safe = torch.where(direction.abs() < 1e-9, torch.copysign(tiny, direction), direction)
    low = (origin.new_tensor([a for a, _ in box]) - origin) / safe
    high = (origin.new_tensor([b for _, b in box]) - origin) / safe
    near = torch.minimum(low, high).amax(dim=-1).clamp(min=0)
    far = torch.maximum(low, high).amin(dim=-1)
    return near, far


def ray_bounds(rays: Rays, config: AvatarConfig) -> tuple[Tensor, Tensor]:
    """Near and far depth of each ray: from the box, else `missed_near_far`, else an interval of no length (white)."""
    near, far = box_depths(rays, config.box)
    missed = near >= far
    if config.missed_near_far is None:
        return near, torch.where(missed, near, far)
    low, high = config.missed_near_far
    return near.masked_fill(missed, low), far.masked_fill(missed, high)


def sample_depths(near_BR: Tensor, far_BR: Tensor, config: AvatarConfig, noise: Noise) -> tuple[Tensor, Tensor]:
    """Depths of the samples and lengths of their intervals along the depth, B×R×S each.

    finite: S equal bins, a sample at each one's centre or, stratified and with noise, anywhere in it.
    opaque_far: S depths from near to far inclusive, intervals between neighbours, the last one endless.
    """
    S, span_BR1 = config.samples, (far_BR - near_BR)[..., None]
    steps = torch.arange(S, device=near_BR.device, dtype=near_BR.dtype)
    if config.compositing == "opaque_far":
        depth = near_BR[..., None] + span_BR1 * (steps / (S - 1))
        length = (span_BR1 / (S - 1)).expand(depth.shape).clone()
        length[..., -1] = ENDLESS
        return depth, length
    within: Tensor | float = 0.5
    if noise is not False and config.sampling == "stratified":
        within = _random(torch.rand, (*near_BR.shape, S), near_BR, noise)
    return near_BR[..., None] + span_BR1 * ((steps + within) / S), (span_BR1 / S).expand(*near_BR.shape, S)


def density_noise(like_BRS: Tensor, config: AvatarConfig, noise: Noise) -> Tensor | None:
    """What is added to the raw density in training; None where nothing is."""
    if noise is False or not config.density_noise:
        return None
    return config.density_noise * _random(torch.randn, like_BRS.shape, like_BRS, noise)


def activate_density(density_BRS: Tensor, config: AvatarConfig, noise: Noise) -> Tensor:
    """Raw output of the MLP → σ ≥ 0, per head unit."""
    added = density_noise(density_BRS, config, noise)
    return activated(density_BRS if added is None else density_BRS + added, config)


def activated(density_BRS: Tensor, config: AvatarConfig) -> Tensor:
    """Raw density, noise added → σ."""
    shifted = density_BRS + config.density_bias
    active = F.relu(shifted) if config.density_activation == "relu" else F.softplus(shifted)
    return active * config.density_scale


def importance_depths(near_BR: Tensor, far_BR: Tensor, weights_BRS: Tensor, count: int, noise: Noise) -> Tensor:
    """Depths distributed as the compositing weights of S equal bins between near and far say, B×R×count, ascending.

    Inverse transform sampling: at even quantiles, or with noise at one random quantile in each of `count` equal parts.
    """
    share_BRS = weights_BRS + 1e-5
    share_BRS = share_BRS / share_BRS.sum(dim=-1, keepdim=True)
    total_BRS = F.pad(share_BRS.cumsum(dim=-1), (1, 0))
    steps = torch.arange(count, device=near_BR.device, dtype=near_BR.dtype)
    within = 0.5 if noise is False else _random(torch.rand, (*near_BR.shape, count), near_BR, noise)
    quantile = ((steps + within) / count).expand(*near_BR.shape, count).contiguous()
    S = weights_BRS.shape[-1]
    bin_ = (torch.searchsorted(total_BRS.contiguous(), quantile, right=True) - 1).clamp(0, S - 1)
    rest = (quantile - total_BRS.gather(-1, bin_)) / share_BRS.gather(-1, bin_)
    return near_BR[..., None] + (far_BR - near_BR)[..., None] * ((bin_ + rest.clamp(0, 1)) / S)


def compositing_weights(density_BRS: Tensor, length_BRS: Tensor) -> Tensor:
    """w_i = T_i (1 − exp(−σ_i δ_i)) with T_i = exp(−Σ_{j<i} σ_j δ_j): exact where σ is constant in each interval."""
    thickness = density_BRS * length_BRS
    before = torch.cumsum(thickness, dim=-1)
    before = torch.cat([torch.zeros_like(before[..., :1]), before[..., :-1]], dim=-1)
    return torch.exp(-before) * -torch.expm1(-thickness)


def composite(weights_BRS: Tensor, color_BORS: Tensor, *, opaque_far: bool) -> tuple[Tensor, Tensor]:
    """I_F (B×O×R) and M (B×R): Σ w·F over white, and Σ w.

    opaque_far: the white behind is a sample like the others and counts in M, so that M is 1 everywhere.
    """
    mask_BR = weights_BRS.sum(dim=-1)
    feature_BOR = (weights_BRS[:, None] * color_BORS).sum(dim=-1) + (1 - mask_BR)[:, None]
    return feature_BOR, torch.ones_like(mask_BR) if opaque_far else mask_BR


def _random(draw: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, noise: Noise) -> Tensor:
    return drawn(draw, shape, like, noise if isinstance(noise, Generator) else None)
