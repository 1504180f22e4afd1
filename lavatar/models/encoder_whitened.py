"""Our encoder: no instance normalisation, and a code whitened by fixed statistics of the training set (Eq. 2).

The published encoders remove what a convolution's channel has in common over the picture, and rescale each code by
itself: both throw away how far a mouth is open. Here the code keeps its size; fixed statistics of the training
set bring each of its dimensions to mean 0 and deviation 1 over the video.

Shapes: B batch, H face_size, D code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.pair import YNetConfig

SMALLEST_DEVIATION = 1e-2
CHUNK = 32


class Whitening(nn.Module):
    """x → (x − mean) / deviation per dimension. The statistics are those of the training set, fixed once by `fix`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, x_BD: Tensor) -> Tensor:
        return (x_BD - self.mean) / self.deviation

    @torch.no_grad()
    def fix(self, x_ND: Tensor) -> None:
        """Take the statistics of `x`; a dimension that hardly varies is not blown up."""
        deviation_D, self.mean = torch.std_mean(x_ND, dim=0)
        self.deviation = deviation_D.clamp(min=SMALLEST_DEVIATION * float(deviation_D.max()))


class PlainEncoder(nn.Module):
    """Strided convolutions with LeakyReLU and Kaiming initialisation: B×3×H×H in [0, 1] → B×code_dim, unbounded."""

    def __init__(self, face_size: int, widths: Sequence[int], code_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise((3, *widths))):
            side = 5 if i == 0 else 3
            layers += [nn.Conv2d(before, after, side, stride=2, padding=side // 2), nn.LeakyReLU(0.1)]
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1] * (face_size // 2 ** len(widths)) ** 2, code_dim)
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.1)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def features(self, face_B3HH: Tensor) -> Tensor:
        """What the linear layer reads: B×F."""
        map_BCHH: Tensor = self.convolutions((face_B3HH - 0.5) * 4)
        return map_BCHH.flatten(1)

    def forward(self, face_B3HH: Tensor) -> Tensor:
        code_BD: Tensor = self.linear(self.features(face_B3HH))
        return code_BD


class WhitenedEncoder(nn.Module):
    """Eq. 2, θ_p = E(I_face): B×3×H×H in [0, 1] → B×code_dim, each dimension of deviation 1 over the training set."""

    def __init__(self, config: AvatarConfig | YNetConfig) -> None:
        super().__init__()
        self.code = PlainEncoder(config.face_size, config.encoder_widths, config.code_dim)
        self.whitening = Whitening(config.code_dim)

    @torch.no_grad()
    def begin_with(self, *faces_N3HH: Tensor) -> None:
        """Before the first step: the code becomes the whitened principal components of these faces' features.

        The untrained convolutions already tell a closed eye from an open one; their principal components hand that to
        the decoder from the first step on, as uncorrelated dimensions of equal size. Each argument holds the faces of
        one subject: what differs between subjects is taken out first, so that γ is what varies within each of them.
        """
        features = [torch.cat([self.code.features(part) for part in faces.split(CHUNK)]) for faces in faces_N3HH]
        feature_NF = torch.cat([feature_nF - feature_nF.mean(0) for feature_nF in features])
        variance_N, left_NN = _descending(feature_NF @ feature_NF.T)
        kept = min(self.code.linear.out_features, int((variance_N > 1e-6 * variance_N[0]).sum()))
        self.code.linear.weight[:kept] = left_NN[:, :kept].T @ feature_NF / variance_N[:kept, None].sqrt()
        nn.init.zeros_(self.code.linear.bias)
        self.whitening.fix(self.code.linear(feature_NF))
        self.whitening.mean = self.code.linear(torch.stack([feature_nF.mean(0) for feature_nF in features])).mean(0)

    def forward(self, face_B3HH: Tensor) -> Tensor:
        theta_BD: Tensor = self.whitening(self.code(face_B3HH))
        return theta_BD


def _descending(gram_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (columns) of a symmetric matrix, largest first."""
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    return values_N.flip(0).clamp(min=0), vectors_NN.flip(1)
