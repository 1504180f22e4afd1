"""`sample_triplane` on a CPU: a point's four texels of each plane are added as rows of C numbers, likewise gradients.

torch's sampler takes the planes channel by channel and reads single numbers. Here the three planes are one table of
rows (a texel's C channels side by side) with a rim of zeros, a point is a bag of 12 of its rows with weights, and torch
adds up bags of rows well. The gradient of a texel is again a weighted bag: of the rows of the points in its cell.

Shapes as in triplane.py: B batch, C channels of one plane, H side of the planes, P points; W = H + 3, a plane with its
rim: one texel before, two behind (a coordinate is clamped to the outermost of them, where nothing is read).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lavatar.models.triplane import PLANE_AXES

BLOCK = 2**14
"""Points at a time: their 12 rows' numbers and weights fit into the processor's cache."""


class Places(NamedTuple):
    """Of some points in one plane: the cell (its first corner's row in the plane's part of the table), and the weights
    of its corners: this one, the next column's, the next row's, that of both."""

    cell_P: Tensor
    weights: tuple[Tensor, Tensor, Tensor, Tensor]


def sample_rows(planes_3CHH: Tensor, points_P3: Tensor) -> Tensor:
    """The same as triplane.sample_triplane for one set of planes, as rows P×C. The points get no gradient."""
    rows_PC: Tensor = _SampleRows.apply(planes_3CHH, points_P3)
    return rows_PC


class Table:
    """The planes as rows, to be read several times; without a gradient."""

    def __init__(self, planes_3CHH: Tensor) -> None:
        _, C, self.H, _ = planes_3CHH.shape
        W = self.H + 3
        self._rows_TC = F.pad(planes_3CHH.permute(0, 2, 3, 1), (0, 0, 1, 2, 1, 2)).reshape(3 * W * W, C)
        self._corners = torch.tensor([0, 1, W, W + 1], dtype=torch.int32)

    def read(self, points_P3: Tensor) -> Tensor:
        """The sums of the three planes at the points: P×C."""
        W, P = self.H + 3, len(points_P3)
        rows_P12, weights_P12 = torch.empty(P, 12, dtype=torch.int32), points_P3.new_empty(P, 12)
        for i, (cell_P, weights) in enumerate(places(points_P3, self.H)):
            torch.add((cell_P + i * W * W)[:, None], self._corners, out=rows_P12[:, 4 * i : 4 * i + 4])
            for k, weight_P in enumerate(weights):
                weights_P12[:, 4 * i + k] = weight_P
        return F.embedding_bag(rows_P12, self._rows_TC, mode="sum", per_sample_weights=weights_P12)


class _SampleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, planes_3CHH: Tensor, points_P3: Tensor) -> Tensor:
        ctx.save_for_backward(points_P3)
        ctx.shape, table = planes_3CHH.shape, Table(planes_3CHH)
        return torch.cat([table.read(points) for points in points_P3.split(BLOCK)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """In each plane the points are sorted by their cells; a cell's four corners get one bag each."""
        (points_P3,), (gradient_PC,) = ctx.saved_tensors, gradients
        _, C, H, _ = ctx.shape
        W, gradient_PC = H + 3, gradient_PC.contiguous()
        total_3WWC = gradient_PC.new_zeros(3, W * W + W + 1, C)
        for plane, (cell_P, weights) in zip(total_3WWC, places(points_P3, H), strict=True):
            sorted_P, order_P = torch.sort(cell_P, stable=True)
            begins_T = torch.searchsorted(sorted_P, torch.arange(W * W, dtype=torch.int32))
            for shift, weight_P in zip((0, 1, W, W + 1), weights, strict=True):
                plane[shift : shift + W * W] += F.embedding_bag(
                    order_P, gradient_PC, begins_T, mode="sum", per_sample_weights=weight_P[order_P]
                )
        inner_3HHC = total_3WWC[:, : W * W].view(3, W, W, C)[:, 1 : H + 1, 1 : H + 1]
        return inner_3HHC.permute(0, 3, 1, 2).contiguous(), None


def places(points_P3: Tensor, H: int) -> Iterator[Places]:
    """Where the points (in [-1, 1]) lie in the planes xy, yz, xz."""
    W, axes = H + 3, []
    for axis_P in points_P3.unbind(dim=-1):
        texel_P = torch.add(axis_P.new_tensor((H - 1) / 2), axis_P, alpha=(H - 1) / 2).clamp_(-1, H)
        whole_P = texel_P.floor()
        share_P = texel_P.sub_(whole_P)
        axes.append((whole_P.to(torch.int32) + 1, share_P, 1 - share_P))
    for column, row in PLANE_AXES:
        (left_P, across, not_across), (top_P, down, not_down) = axes[column], axes[row]
        weights = (not_across * not_down, across * not_down, not_across * down, across * down)
        yield Places(torch.add(left_P, top_P, alpha=W), weights)
