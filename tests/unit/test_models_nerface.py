"""The baseline NeRFace and its coefficients: closed forms of its sampling, its condition, its interface."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.contracts import COEFFICIENTS
from lavatar.models import rendering
from lavatar.models.encoder_coefficients import CoefficientEncoder
from lavatar.models.nerface import NeRFace
from lavatar.models.rendering import View

POSE = (
    torch.diag(torch.tensor([1.0, -1.0, -1.0])).repeat(2, 1, 1),
    torch.tensor([[0.0, 0.0, 4.0]]).repeat(2, 1),
    torch.full((2,), 0.1),
)


def config(**more: object) -> AvatarConfig:
    values = {
        "image_size": 32, "ray_size": 32, "samples": 4, "fine_samples": 6, "encoder": "coefficients", "field": "mlp",
        "code_dim": COEFFICIENTS, "field_width": 8, "field_layers": 4, "position_frequencies": 2, "frame_code": 3,
        "view_frequencies": 2,
    }  # fmt: skip
    return AvatarConfig.model_validate({**values, **more})


def test_fine_depths_lie_where_the_weight_is() -> None:
    near, far = torch.zeros(1, 1), torch.full((1, 1), 8.0)
    weights = torch.tensor([[[0.0, 0.0, 1.0, 0.0]]])  # all of it between depths 4 and 6
    depth = rendering.importance_depths(near, far, weights, 4, noise=False)
    assert torch.allclose(depth[0, 0], torch.tensor([4.25, 4.75, 5.25, 5.75]), atol=1e-2)
    drawn = rendering.importance_depths(near, far, weights, 64, noise=torch.Generator().manual_seed(0))
    assert float(drawn.min()) > 3.9
    assert float(drawn.max()) < 6.1
    assert bool((drawn.diff(dim=-1) >= 0).all())


def test_even_weights_give_even_depths() -> None:
    depth = rendering.importance_depths(torch.ones(1, 1), torch.full((1, 1), 3.0), torch.ones(1, 1, 5), 10, False)
    assert torch.allclose(depth[0, 0], 1 + 0.2 * (torch.arange(10) + 0.5), atol=1e-5)


def test_coefficients_are_standardised_and_still_ones_left_out() -> None:
    encoder = CoefficientEncoder(config())
    values = torch.zeros(50, COEFFICIENTS)
    values[:, 0] = torch.arange(50.0)
    values[:, 1] = 0.5 + 1e-5 * torch.arange(50.0)
    encoder.fix(values)
    theta = encoder(values)
    assert torch.allclose(theta[:, 0].mean(), torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(theta[:, 0].std(), torch.tensor(1.0), atol=1e-5)
    assert not theta[:, 1:].any()
    far = encoder(torch.full((1, COEFFICIENTS), 1e6))[0]
    assert (float(far[0]), float(far[1:].abs().max())) == (5.0, 0.0)


def test_an_empty_field_is_white_and_a_full_one_is_not() -> None:
    for bias, empty in ((-60.0, True), (60.0, False)):
        torch.manual_seed(0)
        model = NeRFace(config(density_activation="softplus", density_bias=bias))
        with torch.no_grad():
            drawn = model.render(torch.zeros(2, COEFFICIENTS), *POSE)
        assert drawn.I_hr.shape == (2, 3, 32, 32)
        assert torch.allclose(drawn.I_hr, torch.ones(()), atol=1e-4) is empty
        assert float(drawn.M[:, :, 16, 16].mean()) == pytest.approx(0.0 if empty else 1.0, abs=1e-4)


def test_the_condition_and_the_frame_code_reach_the_colours() -> None:
    torch.manual_seed(0)
    model = NeRFace(config(density_bias=1.0))
    rays = rendering.camera_rays(View(32, 4, torch.tensor([[14, 14], [14, 14]])), 5000 / 512, *POSE)

    def shade(theta: Tensor, code: Tensor) -> Tensor:
        return model.shade(theta, rays, code_BL=code).fine_B3R

    zero, code = torch.zeros(2, COEFFICIENTS), torch.zeros(2, 3)
    base = shade(zero, code)
    assert not torch.allclose(base, shade(zero + 1, code), atol=1e-4)
    assert not torch.allclose(base, shade(zero, code + 30), atol=1e-4)
    assert torch.allclose(base, model.shade(zero, rays).fine_B3R)


def test_what_is_rendered_in_parts_is_what_is_shaded_at_once() -> None:
    torch.manual_seed(0)
    model = NeRFace(config(density_bias=1.0))
    theta = torch.randn(2, COEFFICIENTS)
    with torch.no_grad():
        whole = model.shade(theta, rendering.camera_rays(View(32, 32), 5000 / 512, *POSE)).fine_B3R
        drawn = model.render(theta, *POSE).I_hr.flatten(2)
    assert torch.allclose(whole, drawn, atol=1e-5)


def test_a_constant_field_has_the_opacity_of_its_length() -> None:
    """Coarse and fine samples together still make up the whole interval."""
    model = NeRFace(config(density_activation="relu", density_bias=0.7, density_scale=1.0))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    rays = rendering.camera_rays(View(32, 1, torch.tensor([[16, 16], [16, 16]])), 5000 / 512, *POSE)
    near, far = rendering.ray_bounds(rays, model.config)
    shaded = model.shade(torch.zeros(2, COEFFICIENTS), rays)
    length = float(((far - near) * rays.direction_BR3.norm(dim=-1))[0, 0])
    first = length / (2 * model.config.samples)  # before the first sample there is none
    assert float(shaded.mask_BR[0, 0].detach()) == pytest.approx(1 - math.exp(-0.7 * (length - first)), abs=0.06)


def test_the_configuration_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=f"code_dim {COEFFICIENTS}"):
        config(code_dim=8)
    with pytest.raises(ValueError, match="ray_size = image_size"):
        config(ray_size=16)
