"""The radiance MLP against the same MLP written plainly, point by point."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lavatar.configs.avatar import AvatarConfig
from lavatar.models import reference
from lavatar.models.radiance import PointLinear, RadianceMLP, encode_direction


def test_direction_encoding_is_direction_then_octaves() -> None:
    d = torch.tensor([[[0.0, 0.6, -0.8]]])
    code = encode_direction(d, 4)
    assert code.shape == (1, 1, 27)  # the released model's "4 frequencies = 27"
    torch.testing.assert_close(code[0, 0, :3], d[0, 0])
    torch.testing.assert_close(code[0, 0, -6:], torch.cat([torch.sin(8 * d[0, 0]), torch.cos(8 * d[0, 0])]))


def test_point_linear_is_a_linear_layer_on_channels() -> None:
    layer, x = PointLinear(5, 3), torch.randn(2, 5, 11)
    torch.testing.assert_close(layer(x), F.linear(x.transpose(1, 2), layer.weight, layer.bias).transpose(1, 2))


@pytest.mark.parametrize("radiance", ["joint", "separate"])
@pytest.mark.parametrize("frequencies", [0, 4])
def test_equals_the_plain_mlp_on_concatenated_inputs(radiance: str, frequencies: int) -> None:
    torch.manual_seed(0)
    config = AvatarConfig(radiance=radiance, view_frequencies=frequencies, triplane_channels=6)
    mlp, (B, R, S) = RadianceMLP(config), (2, 3, 4)
    feature, direction = torch.randn(B, 6, R * S), F.normalize(torch.randn(B, R, 3), dim=-1)
    density, color = mlp(feature, direction)
    assert density.shape == (B, R, S)
    assert color.shape == (B, 32, R, S)

    h = feature.view(B, 6, R, S).permute(0, 2, 3, 1)
    view = encode_direction(direction, frequencies)[:, :, None].expand(B, R, S, -1)
    hidden = F.leaky_relu(F.linear(h, mlp.density_in.weight, mlp.density_in.bias))
    into = (h, mlp.color_in) if radiance == "separate" else (hidden, mlp.color_out)
    plain = F.linear(into[0], into[1].weight, into[1].bias)
    if frequencies:  # the view columns of one weight matrix [feature | view]
        both = torch.cat([into[1].weight, mlp.view.weight], dim=1)
        plain = F.linear(torch.cat([into[0], view], dim=-1), both, into[1].bias)
    if radiance == "separate":
        plain = F.linear(F.leaky_relu(plain), mlp.color_out.weight, mlp.color_out.bias)
    torch.testing.assert_close(color.permute(0, 2, 3, 1), plain, atol=1e-5, rtol=1e-5)
    expected = F.linear(hidden, mlp.density_out.weight, mlp.density_out.bias).squeeze(-1)
    torch.testing.assert_close(density, expected, atol=1e-5, rtol=1e-5)
    for found, wanted in zip(reference.plain(mlp)(feature, direction), (density, color), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_released_layer_sizes() -> None:
    """Density MLP 32→128→1; colour MLP 32 + 27 → 128 → 32."""
    mlp = RadianceMLP(AvatarConfig(radiance="separate"))
    assert mlp.density_in.weight.shape == (128, 32)
    assert mlp.density_out.weight.shape == (1, 128)
    assert mlp.color_in.weight.shape[1] + mlp.view.weight.shape[1] == 32 + 27
    assert mlp.color_in.weight.shape[0] == 128
    assert mlp.color_out.weight.shape == (32, 128)


def test_sigmoid_colour_is_bounded_and_features_are_not() -> None:
    mlp = RadianceMLP(AvatarConfig(color_activation="sigmoid", triplane_channels=4))
    _, color = mlp(100 * torch.randn(1, 4, 6), torch.randn(1, 2, 3))
    assert color[:, :3].min() >= 0
    assert color[:, :3].max() <= 1
    assert color[:, 3:].abs().max() > 1


def test_density_ignores_the_view_and_colour_sees_it() -> None:
    mlp, feature = RadianceMLP(AvatarConfig(triplane_channels=4)), torch.randn(1, 4, 6)
    (a, c), (b, d) = mlp(feature, torch.zeros(1, 2, 3)), mlp(feature, torch.ones(1, 2, 3))
    assert torch.equal(a, b)
    assert not torch.allclose(c, d)
