"""Volume rendering against closed forms. The camera looks along +z; the frontal head is diag(1, −1, −1)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.models import rendering
from lavatar.models.avatar import LatentAvatar
from lavatar.models.rendering import View

FOCAL = 5000 / 512  # in image sides
FRONTAL = torch.diag(torch.tensor([1.0, -1.0, -1.0]))


def small(**changes: object) -> AvatarConfig:
    sizes = {
        "image_size": 32,
        "ray_size": 8,
        "samples": 6,
        "face_size": 32,
        "triplane_size": 16,
        "triplane_channels": 4,
    }
    narrow = {
        "generator_capacity": 6,
        "generator_max_channels": 16,
        "superresolution_capacity": 4,
        "feature_channels": 8,
    }
    return AvatarConfig.model_validate({**sizes, **narrow, "encoder_widths": (8, 16), "code_dim": 12, **changes})


def pose(batch: int = 1, distance: float = 4.0, scale: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    translation = torch.tensor([0.0, 0.0, distance]).expand(batch, 3)
    return FRONTAL.expand(batch, 3, 3), translation, torch.full((batch,), scale)


def random_rotation(seed: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q * torch.linalg.det(q)


def test_rays_pass_through_the_points_that_project_on_cell_centres() -> None:
    rotation, scale = random_rotation(3), torch.tensor([0.13], dtype=torch.float64)
    translation = torch.tensor([[0.02, -0.05, 4.2]], dtype=torch.float64)
    rays = rendering.camera_rays(View(16, 16), FOCAL, rotation[None], translation, scale)
    depth = 3.9
    points = rays.origin_B13 + depth * rays.direction_BR3
    camera = scale * points[0] @ rotation.T + translation[0]
    torch.testing.assert_close(camera[:, 2], torch.full((256,), depth, dtype=torch.float64))
    pixel = camera[:, :2] / camera[:, 2:] * FOCAL * 512 + 256  # u = f·x/z + cx at 512
    centre = (torch.arange(16, dtype=torch.float64) + 0.5) * 32
    torch.testing.assert_close(pixel[:, 0].view(16, 16), centre.expand(16, 16))  # columns
    torch.testing.assert_close(pixel[:, 1].view(16, 16), centre[:, None].expand(16, 16))  # rows


def test_box_depths_of_a_frontal_ray_are_the_faces_of_the_box() -> None:
    rays = rendering.camera_rays(View(2, 2), 1e6, *pose())  # so long a lens that the rays are parallel
    near, far = rendering.box_depths(rays, small().box)
    # z_head = (4 − depth) / 0.1 enters at the front face z = 1.1 and leaves at z = −1.9
    torch.testing.assert_close(near, torch.full((1, 4), 4 - 0.11))
    torch.testing.assert_close(far, torch.full((1, 4), 4 + 0.19))


def test_box_depths_of_oblique_rays_lie_on_the_box() -> None:
    rays = rendering.camera_rays(View(9, 9), FOCAL, random_rotation(1)[None].float(), *pose()[1:])
    box = torch.tensor(small().box)
    near, far = rendering.box_depths(rays, small().box)
    hit = near < far
    assert 20 < hit.sum() <= 81
    for depth in (near, far):
        points = (rays.origin_B13 + depth[..., None] * rays.direction_BR3)[hit]
        inside = (points > box[:, 0] - 1e-3).all() and (points < box[:, 1] + 1e-3).all()
        on_a_face = torch.minimum((points - box[:, 0]).abs(), (points - box[:, 1]).abs()).amin(dim=-1)
        assert inside
        assert on_a_face.max() < 1e-3


def test_a_ray_beside_the_box_stays_white_or_takes_the_given_depths() -> None:
    rotation, _, scale = pose()
    rays = rendering.camera_rays(View(4, 4), FOCAL, rotation, torch.tensor([[3.0, 0.0, 4.0]]), scale)
    near, far = rendering.ray_bounds(rays, small())
    assert torch.equal(near, far)
    near, far = rendering.ray_bounds(rays, small(missed_near_far=(3.5, 4.5)))
    assert near.unique().tolist() == [3.5]
    assert far.unique().tolist() == [4.5]


@pytest.mark.parametrize("samples", [2, 7, 64])
@pytest.mark.parametrize("density", [0.01, 0.7, 4.0])
def test_constant_density_slab(samples: int, density: float) -> None:
    """M = 1 − exp(−σL) and I = c·M + 1 − M, whatever the number of samples; centred or jittered ones alike."""
    config = small(samples=samples)
    near, far = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.5]])
    color = torch.tensor([0.2, 0.9, -1.0])
    for noise in (False, torch.Generator().manual_seed(0)):
        _, length = rendering.sample_depths(near, far, config, noise)
        weights = rendering.compositing_weights(torch.full((1, 2, samples), density), length)
        image, mask = rendering.composite(
            weights, color[None, :, None, None].expand(1, 3, 2, samples), opaque_far=False
        )
        expected = 1 - torch.exp(-density * (far - near))
        torch.testing.assert_close(mask, expected)
        torch.testing.assert_close(image, color[None, :, None] * expected[:, None] + 1 - expected[:, None])


def test_opaque_slab_shows_only_its_front() -> None:
    density = torch.tensor([[[0.0, 0.0, 1e4, 1e4, 1e4]]])
    color = torch.tensor([5.0, 5.0, 0.25, 9.0, 9.0]).expand(1, 3, 1, 5)
    image, mask = rendering.composite(
        rendering.compositing_weights(density, torch.full((1, 1, 5), 0.1)), color, opaque_far=False
    )
    torch.testing.assert_close(mask, torch.ones(1, 1))
    torch.testing.assert_close(image, torch.full((1, 3, 1), 0.25))


def test_two_half_transparent_slabs() -> None:
    thickness = torch.full((1, 1, 2), math.log(2.0))  # each lets half of the light through
    color = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
    weights = rendering.compositing_weights(thickness, torch.ones(1, 1, 2))
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.25]]]))
    image, mask = rendering.composite(weights, color, opaque_far=False)
    torch.testing.assert_close(image.item(), 0.5 + 0.0 + 0.25)  # front + back + white
    torch.testing.assert_close(mask.item(), 0.75)


def test_empty_space_is_white_in_both_compositings() -> None:
    for compositing in ("finite", "opaque_far"):
        avatar = LatentAvatar(small(density_bias=-1e4, compositing=compositing, density_activation="relu"))
        drawn = avatar.render(torch.randn(1, 12), *pose())
        torch.testing.assert_close(drawn.I_F, torch.ones(1, 8, 8, 8))
        torch.testing.assert_close(drawn.M, torch.full((1, 1, 8, 8), float(compositing == "opaque_far")))


def test_last_interval_is_finite_in_paper_and_endless_in_official() -> None:
    density = torch.tensor([[[0.0, 0.0, 0.0, 1e-3]]])  # next to nothing, and only in the last sample
    near, far, color = torch.tensor([[3.0]]), torch.tensor([[5.0]]), torch.zeros(1, 3, 1, 4)

    def draw(compositing: str) -> tuple[float, float]:
        config = small(samples=4, compositing=compositing)
        _, length = rendering.sample_depths(near, far, config, False)
        weights = rendering.compositing_weights(density, length)
        image, mask = rendering.composite(weights, color, opaque_far=compositing == "opaque_far")
        return image.mean().item(), mask.item()

    image, mask = draw("finite")
    assert mask == pytest.approx(1 - math.exp(-0.5e-3), rel=1e-3)
    assert image == pytest.approx(1 - mask, abs=1e-6)
    assert draw("opaque_far") == (0.0, 1.0)


def test_the_mask_learns_only_where_it_is_active() -> None:
    for compositing, learns in (("finite", True), ("opaque_far", False)):
        torch.manual_seed(0)
        avatar = LatentAvatar(small(compositing=compositing))
        mask = avatar.render(torch.randn(1, 12), *pose()).M
        assert mask.requires_grad == learns
        assert (mask.detach() == 1).all() != learns


def test_samples_are_bin_centres_without_noise_and_lie_in_their_bins_with_it() -> None:
    near, far = torch.zeros(1, 3), torch.full((1, 3), 6.0)
    depth, length = rendering.sample_depths(near, far, small(), False)
    torch.testing.assert_close(depth[0, 0], torch.arange(6) + 0.5)
    torch.testing.assert_close(length, torch.ones(1, 3, 6))
    jittered = [rendering.sample_depths(near, far, small(), torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(jittered[0], jittered[1])
    assert not torch.equal(jittered[0], jittered[2])
    assert torch.equal(jittered[0].floor()[0, 0], torch.arange(6.0))
    regular, _ = rendering.sample_depths(near, far, small(sampling="regular"), True)
    torch.testing.assert_close(regular, depth)


def test_density_is_activated_scaled_and_noisy_only_when_asked() -> None:
    raw = torch.tensor([[[-2.0, 0.0, 3.0]]])
    relu = small(density_activation="relu", density_bias=1.0, density_scale=10.0, density_noise=0.5)
    torch.testing.assert_close(rendering.activate_density(raw, relu, False), torch.tensor([[[0.0, 10.0, 40.0]]]))
    assert not torch.equal(rendering.activate_density(raw, relu, True)[..., 2:], torch.tensor([[[40.0]]]))
    softplus = small(density_activation="softplus", density_bias=0.0, density_scale=1.0)
    expected = torch.log1p(torch.exp(raw))
    torch.testing.assert_close(rendering.activate_density(raw, softplus, False), expected)


def test_a_head_twice_as_large_and_as_far_looks_the_same() -> None:
    torch.manual_seed(0)
    avatar, theta = LatentAvatar(small()), torch.randn(1, 12)
    near = avatar.render(theta, *pose(distance=4.0, scale=0.1))
    far = avatar.render(theta, *pose(distance=8.0, scale=0.2))
    torch.testing.assert_close(near.I_F, far.I_F, atol=1e-4, rtol=1e-4)
