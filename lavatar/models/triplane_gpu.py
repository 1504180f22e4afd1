"""`sample_triplane` on a GPU: one Triton kernel that reads the three planes and sums, one for its gradients.

cuDNN's sampler takes the planes channel by channel: every point gathers, and in the gradient scatters, single numbers.
Here a point's C channels lie side by side, so that its corners are read and added to as whole runs of memory.
Shapes as in triplane.py: B batch, C channels of one plane, H side of the planes, P points.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

POINTS = 32
"""Points that one program reads."""


@triton.jit
def _place(x, y, z, PLANE: tl.constexpr, H):
    """Column and row of points in the plane: whole part (float) and fraction of each. Planes xy, yz, xz."""
    u = y if PLANE == 1 else x
    v = y if PLANE == 0 else z
    column = (u + 1) * 0.5 * (H - 1)
    row = (v + 1) * 0.5 * (H - 1)
    left = tl.floor(column)
    top = tl.floor(row)
    return left, column - left, top, row - top


@triton.jit
def _read(planes, points, out, P, H, C: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDE)
    inside = p < P
    at = points + (b * P + p) * 3
    x = tl.load(at, mask=inside, other=0.0)
    y = tl.load(at + 1, mask=inside, other=0.0)
    z = tl.load(at + 2, mask=inside, other=0.0)
    total = tl.zeros((BLOCK, WIDE), tl.float32)
    for plane in tl.static_range(3):
        left, right_share, top, low_share = _place(x, y, z, plane, H)
        for corner in tl.static_range(4):
            column = left.to(tl.int32) + corner % 2
            row = top.to(tl.int32) + corner // 2
            weight = (right_share if corner % 2 else 1 - right_share) * (low_share if corner // 2 else 1 - low_share)
            hit = inside & (column >= 0) & (column < H) & (row >= 0) & (row < H)
            cell = (b * 3 + plane) * H * H + row * H + column
            value = tl.load(planes + cell[:, None] * C + c[None, :], mask=hit[:, None] & (c < C)[None, :], other=0.0)
            total += value.to(tl.float32) * weight[:, None]
    tl.store(out + (b * P + p)[:, None] * C + c[None, :], total, mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _spread(
    planes, points, gradient, step_b, step_c, step_p, to_planes, to_points, P, H,
    C: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, WANTS_POINTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDE)
    inside = p < P
    at = (b * P + p) * 3
    x = tl.load(points + at, mask=inside, other=0.0)
    y = tl.load(points + at + 1, mask=inside, other=0.0)
    z = tl.load(points + at + 2, mask=inside, other=0.0)
    known = inside[:, None] & (c < C)[None, :]
    given = tl.load(
        gradient + b * step_b + p.to(tl.int64)[:, None] * step_p + c[None, :] * step_c, mask=known, other=0.0
    )
    given = given.to(tl.float32)
    to_x = tl.zeros((BLOCK,), tl.float32)
    to_y = tl.zeros((BLOCK,), tl.float32)
    to_z = tl.zeros((BLOCK,), tl.float32)
    for plane in tl.static_range(3):
        left, right_share, top, low_share = _place(x, y, z, plane, H)
        to_u = tl.zeros((BLOCK,), tl.float32)
        to_v = tl.zeros((BLOCK,), tl.float32)
        for corner in tl.static_range(4):
            column = left.to(tl.int32) + corner % 2
            row = top.to(tl.int32) + corner // 2
            across = right_share if corner % 2 else 1 - right_share
            down = low_share if corner // 2 else 1 - low_share
            hit = inside & (column >= 0) & (column < H) & (row >= 0) & (row < H)
            cell = ((b * 3 + plane) * H * H + row * H + column)[:, None] * C + c[None, :]
            mask = hit[:, None] & (c < C)[None, :]
            tl.atomic_add(to_planes + cell, given * (across * down)[:, None], mask=mask, sem="relaxed")
            if WANTS_POINTS:
                value = tl.load(planes + cell, mask=mask, other=0.0).to(tl.float32)
                along = tl.sum(value * given, axis=1)
                to_u += along * down if corner % 2 else -along * down
                to_v += along * across if corner // 2 else -along * across
        if WANTS_POINTS:
            if plane == 1:
                to_y += to_u
            else:
                to_x += to_u
            if plane == 0:
                to_y += to_v
            else:
                to_z += to_v
    if WANTS_POINTS:
        scale = 0.5 * (H - 1)
        tl.store(to_points + at, to_x * scale, mask=inside)
        tl.store(to_points + at + 1, to_y * scale, mask=inside)
        tl.store(to_points + at + 2, to_z * scale, mask=inside)


class _SampleTriplane(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, planes_B3HHC: Tensor, points_BP3: Tensor) -> Tensor:
        B, _, H, _, C = planes_B3HHC.shape
        P = points_BP3.shape[1]
        out_BPC = points_BP3.new_empty(B, P, C)
        grid = (triton.cdiv(P, POINTS), B)
        _read[grid](planes_B3HHC, points_BP3, out_BPC, P, H, C, triton.next_power_of_2(C), POINTS)
        ctx.save_for_backward(planes_B3HHC, points_BP3)
        return out_BPC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        planes_B3HHC, points_BP3 = ctx.saved_tensors
        (gradient_BPC,) = gradients
        B, _, H, _, C = planes_B3HHC.shape
        P = points_BP3.shape[1]
        wants_points = ctx.needs_input_grad[1]
        to_planes = torch.zeros(planes_B3HHC.shape, device=planes_B3HHC.device, dtype=torch.float32)
        to_points = torch.empty_like(points_BP3) if wants_points else points_BP3
        step_b, step_p, step_c = gradient_BPC.stride()
        grid = (triton.cdiv(P, POINTS), B)
        _spread[grid](
            planes_B3HHC, points_BP3, gradient_BPC, step_b, step_c, step_p, to_planes, to_points, P, H,
            C, triton.next_power_of_2(C), POINTS, wants_points,
        )  # fmt: skip
        return to_planes, to_points if wants_points else None


def sample_triplane_gpu(planes_B3CHH: Tensor, points_BP3: Tensor) -> Tensor:
    """The same as triplane.sample_triplane, B×C×P, points in fp32. The gradient of the planes is summed in no fixed
    order, so its last bits differ from run to run, as they do with cuDNN."""
    planes_B3HHC = planes_B3CHH.permute(0, 1, 3, 4, 2).contiguous()
    out_BPC: Tensor = _SampleTriplane.apply(planes_B3HHC, points_BP3.contiguous())
    return out_BPC.transpose(1, 2)
