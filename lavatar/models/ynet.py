"""Sec. 4.1: the Y-shaped network, one shared encoder and a decoder for each of two subjects, or of more.

Shapes: B batch, H face_size, C channels, D code (γ).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lavatar.configs.pair import YNetConfig
from lavatar.models.encoder import StridedEncoder
from lavatar.models.encoder_whitened import WhitenedEncoder

Subject = str
"""A subject of the network: "avatar" or "actor" in a pair, any name without dots in a network of more."""

SUBJECTS: tuple[Subject, Subject] = ("avatar", "actor")


def _encoder(config: YNetConfig) -> nn.Module:
    """E_shared: B×3×H×H → B×G."""
    if config.encoder == "whitened":
        return WhitenedEncoder(config)
    return StridedEncoder(config.face_size, config.encoder_widths, config.code_dim, config.encoder_normalisation)


def _enlarging_conv(before: int, after: int) -> list[nn.Module]:
    """3×3 convolution to four times the channels, normalised, then spread into twice the side."""
    return [
        nn.Conv2d(before, 4 * after, 3, padding=1),
        nn.InstanceNorm2d(4 * after),
        nn.LeakyReLU(),
        nn.PixelShuffle(2),
    ]


def _neck(config: YNetConfig) -> nn.Sequential:
    """γ → B×neck_width at twice the smallest side."""
    side = config.face_size // 2 ** (len(config.decoder_widths) + 1)
    return nn.Sequential(
        nn.Linear(config.code_dim, config.neck_width * side**2),
        nn.Unflatten(1, (config.neck_width, side, side)),
        *_enlarging_conv(config.neck_width, config.neck_width),
    )


def _body(config: YNetConfig) -> nn.Sequential:
    """The neck's map → face in [0, 1]; each width doubles the side."""
    layers: list[nn.Module] = []
    for before, after in pairwise((config.neck_width, *config.decoder_widths)):
        layers += _enlarging_conv(before, after)
        for _ in range(2):
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.InstanceNorm2d(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(config.decoder_widths[-1], 3, 1), nn.Sigmoid())


def _decoder(config: YNetConfig) -> nn.Sequential:
    """What one subject has for itself."""
    return _body(config) if config.shared_neck else nn.Sequential(_neck(config), _body(config))


class YNetwork(nn.Module):
    """Sec. 4.1: E_shared, D_ava, D_act; a decoder for each of `subjects` where these are not the two of a pair.

    With `shared_neck` the first layers of all decoders are one module, `neck`.
    """

    def __init__(self, config: YNetConfig, subjects: Sequence[Subject] = SUBJECTS) -> None:
        super().__init__()
        self.config, self.subjects = config, tuple(subjects)
        self.encoder = _encoder(config)
        self.neck = _neck(config) if config.shared_neck else nn.Identity()
        self.decoders = nn.ModuleDict({s: _decoder(config) for s in self.subjects})
        self.readout = nn.Linear(config.code_dim, config.landmarks) if config.landmarks else None

    def encode(self, face_B3HH: Tensor) -> Tensor:
        """γ = E_shared(I): B×3×H×H in [0, 1] → B×D."""
        gamma_BD: Tensor = self.encoder(face_B3HH)
        return gamma_BD

    def decode(self, gamma_BD: Tensor, subject: Subject) -> Tensor:
        """D_ava(γ) or D_act(γ), the decoder of `subject`: B×D → B×3×H×H in [0, 1]."""
        face_B3HH: Tensor = self.decoders[subject](self.neck(gamma_BD))
        return face_B3HH
