"""The volume rendering of Sec. 3.2 on a CPU: some rays at a time, so that what lies between tri-plane and picture stays
in the processor's cache. The plain form is reference.PlainAvatar.volume.

The layer that gives colour and feature is linear and comes after the compositing: Σ w·(V h + c) = V Σ w·h + c Σ w, one
product a ray instead of one a sample. For the gradient a block is computed once more: cheaper than keeping it.

Shapes: B batch, R rays (N rays of a block), S samples a ray, C channels of H, K hidden channels, O feature_channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.models import rendering
from lavatar.models.radiance import RadianceMLP
from lavatar.models.triplane import normalise_points, sample_triplane
from lavatar.models.triplane_cpu import Table

POINTS = 2**13
"""Of a block: its hidden layer takes 4 MB at the paper's width."""


class Samples(NamedTuple):
    """Rays, and depths and lengths (along the depth) of their samples; of one frame, or with B before the letters.
    `added`: to the raw density, in training."""

    origin_13: Tensor
    direction_R3: Tensor
    depth_RS: Tensor
    length_RS: Tensor
    added_RS: Tensor | None

    def frame(self, b: int) -> Samples:
        """Those of one frame of a batch."""
        return Samples(self.origin_13[b], self.direction_R3[b], *(_at(part, b) for part in self[2:]))

    def rays(self, chosen: Tensor | slice) -> Samples:
        """Those of some rays of a frame."""
        return Samples(self.origin_13, self.direction_R3[chosen], *(_at(part, chosen) for part in self[2:]))


def _at(part: Tensor | None, chosen: Any) -> Any:
    return None if part is None else part[chosen]


def render_rays(
    mlp: RadianceMLP, planes_B3CHH: Tensor, samples: Samples, config: AvatarConfig
) -> tuple[Tensor, Tensor]:
    """I_F as B×O×R and M as B×R."""
    frames = [_render_frame(mlp, planes, samples.frame(b), config) for b, planes in enumerate(planes_B3CHH)]
    feature_BRO, mask_BR = (torch.stack(parts) for parts in zip(*frames, strict=True))
    return feature_BRO.mT, torch.ones_like(mask_BR) if config.compositing == "opaque_far" else mask_BR


def _render_frame(
    mlp: RadianceMLP, planes_3CHH: Tensor, samples: Samples, config: AvatarConfig
) -> tuple[Tensor, Tensor]:
    """I_F as R×O and Σ w as R. Rays of no length, which missed the box, are white and cost nothing (an endless last
    interval is a length)."""
    hit_R = (samples.length_RS > 0).any(dim=-1)
    if bool(hit_R.all()):
        return _render_hits(mlp, planes_3CHH, samples, config)
    index = hit_R.nonzero()[:, 0]
    feature_RO = planes_3CHH.new_ones(len(hit_R), config.feature_channels, dtype=samples.depth_RS.dtype)
    mask_R = torch.zeros_like(samples.depth_RS[:, 0])
    if len(index):
        feature_NO, mask_N = _render_hits(mlp, planes_3CHH, samples.rays(index), config)
        feature_RO, mask_R = feature_RO.index_copy(0, index, feature_NO), mask_R.index_copy(0, index, mask_N)
    return feature_RO, mask_R


def _render_hits(
    mlp: RadianceMLP, planes_3CHH: Tensor, samples: Samples, config: AvatarConfig
) -> tuple[Tensor, Tensor]:
    """The same of rays that all have a length, block by block."""
    R, S = samples.depth_RS.shape
    count, planes_3CHH = max(1, POINTS // S), planes_3CHH.to(samples.depth_RS.dtype)
    stretch_R1 = samples.direction_R3.norm(dim=-1, keepdim=True)  # head units per unit of depth
    view_RK = mlp.seen_from(samples.direction_R3 / stretch_R1)
    rest = (_split(view_RK, count), _split(samples.length_RS * stretch_R1, count), _split(samples.added_RS, count))
    if torch.is_grad_enabled():
        feature_RSC = sample_triplane(planes_3CHH[None], points(samples, config)[None])[0].mT.reshape(R, S, -1)
        blocks = zip(feature_RSC.split(count), *rest, strict=False)
        parts = [_Recomputed.apply(mlp, config, *block, *mlp.parameters()) for block in blocks]
    else:
        table, starts = Table(planes_3CHH), range(0, R, count)
        read = (table.read(points(samples.rays(slice(i, i + count)), config)).unflatten(0, (-1, S)) for i in starts)
        parts = [shade(mlp, config, *block) for block in zip(read, *rest, strict=False)]
    feature_RO, mask_R = (torch.cat(each) for each in zip(*parts, strict=True))
    return feature_RO, mask_R


def _split(part_R: Tensor | None, count: int) -> Iterable[Any]:
    """Blocks of rays (split, not sliced: a slice's gradient is as large as the whole); of nothing None for each."""
    return itertools.repeat(None) if part_R is None else part_R.split(count)


def points(samples: Samples, config: AvatarConfig) -> Tensor:
    """The samples' places in [-1, 1] of the box, P×3, each coordinate in one piece of memory."""
    origin_13 = normalise_points(samples.origin_13, config.box)
    middle_13 = normalise_points(torch.zeros_like(samples.origin_13), config.box)
    direction_R3 = normalise_points(samples.direction_R3, config.box) - middle_13
    return torch.addcmul(origin_13.T[..., None], direction_R3.T[..., None], samples.depth_RS).flatten(1).T


class _Recomputed(torch.autograd.Function):
    """`shade`, which keeps nothing for the gradient but its arguments (…, the MLP's parameters)."""

    @staticmethod
    def forward(ctx: Any, mlp: RadianceMLP, config: AvatarConfig, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.mlp, ctx.config, ctx.bf16 = mlp, config, torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(*tensors)
        return shade(mlp, config, *tensors[:ARGUMENTS])  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
        given: list[Any] = [
            None if t is None else t.detach().requires_grad_(w) for t, w in zip(saved, wanted, strict=True)
        ]
        given[ARGUMENTS:] = saved[ARGUMENTS:]  # the parameters themselves, as the MLP uses them
        with torch.enable_grad(), torch.autocast("cpu", enabled=ctx.bf16):
            results = shade(ctx.mlp, ctx.config, *given[:ARGUMENTS])
        sought = [t for t, w in zip(given, wanted, strict=True) if w]
        found = iter(torch.autograd.grad(results, sought, gradients, allow_unused=True))
        return None, None, *(next(found) if w else None for w in wanted)


ARGUMENTS = 4
"""Tensors that `shade` takes."""


def shade(
    mlp: RadianceMLP,
    config: AvatarConfig,
    feature_NSC: Tensor,
    view_NK: Tensor | None,
    length_NS: Tensor,
    added_NS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Eq. 3, composited: I_F (N×O) on white and Σ w (N) of N rays. `length` in head units."""
    (N, S), feature_PC = feature_NSC.shape[:2], feature_NSC.flatten(0, 1)
    hidden_PK = F.leaky_relu_(mlp.density_in.rows(feature_PC))
    density_NS = mlp.density_out.rows(hidden_PK).view(N, S).to(length_NS.dtype)
    if added_NS is not None:
        density_NS = density_NS + added_NS
    weights_NS = rendering.compositing_weights(rendering.activated(density_NS, config), length_NS)
    if mlp.separate:
        hidden_PK = mlp.color_in.rows(feature_PC)
        if view_NK is not None:
            hidden_PK = (hidden_PK.view(N, S, -1) + view_NK[:, None]).flatten(0, 1)
        hidden_PK = F.leaky_relu(hidden_PK)
    hidden_NSK = hidden_PK.view(N, S, -1)
    mask_N1 = weights_NS.sum(dim=-1, keepdim=True)
    with torch.autocast("cpu", enabled=False):
        sum_NK = (weights_NS[:, None] @ hidden_NSK.to(weights_NS.dtype))[:, 0]
        color_NO = sum_NK @ mlp.color_out.weight.T + mask_N1 * mlp.color_out.bias
        if view_NK is not None and not mlp.separate:
            color_NO = color_NO + mask_N1 * view_NK
    return color_NO + (1 - mask_N1), mask_N1[:, 0]
