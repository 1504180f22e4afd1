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
from lavatar.training.avatar import PoseCorrection

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


def test_gradients_of_a_slab_in_closed_form() -> None:
    """I = c·(1 − e^(−σL)) + e^(−σL): dI/dσ = L·e^(−σL)·(c − 1), dI/dc = 1 − e^(−σL), dM/dσ = L·e^(−σL)."""
    sigma, color = torch.tensor(0.7, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    _, length = rendering.sample_depths(torch.tensor([[1.0]]), torch.tensor([[3.0]]), small(samples=9), False)
    weights = rendering.compositing_weights(sigma.expand(1, 1, 9), length)
    image, mask = rendering.composite(weights, color.expand(1, 1, 1, 9), opaque_far=False)
    passed = math.exp(-0.7 * 2)
    found = [*torch.autograd.grad(image.sum(), (sigma, color), retain_graph=True), *torch.autograd.grad(mask, sigma)]
    assert [g.item() for g in found] == pytest.approx([2 * passed * (0.2 - 1), 1 - passed, 2 * passed], rel=1e-5)


def test_what_is_dense_hides_what_is_behind_in_the_gradient_too() -> None:
    density = torch.tensor([[[0.0, 50.0, 1.0]]], requires_grad=True)
    color = torch.tensor([0.3, 0.4, 0.9]).view(1, 1, 1, 3).requires_grad_()
    weights = rendering.compositing_weights(density, torch.ones(1, 1, 3))
    image, _ = rendering.composite(weights, color, opaque_far=False)
    d_density, d_color = torch.autograd.grad(image.sum(), (density, color))
    # in front of the wall: fog of colour .3 over a wall of .4; the wall: opaque already; behind it: unseen
    assert d_density.flatten().tolist() == pytest.approx([0.3 - 0.4, 0.0, 0.0], abs=1e-6)
    assert d_color.flatten().tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)


class Flat(torch.nn.Module):
    """Stands for the tri-planes or the radiance MLP: one density and one colour everywhere."""

    def __init__(self, density: float, color: float) -> None:
        super().__init__()
        self.density, self.color = density, color

    def forward(self, feature_BCP: Tensor, direction_BR3: Tensor) -> tuple[Tensor, Tensor]:
        self.points, self.direction_BR3 = feature_BCP.shape[-1], direction_BR3
        B, R = direction_BR3.shape[:2]
        samples = feature_BCP.shape[-1] // R
        return torch.full((B, R, samples), self.density), torch.full((B, 8, R, samples), self.color)


def test_a_box_of_fog_has_its_optical_depth_in_head_units_at_any_scale() -> None:
    """Density 0.3 per head unit through a box 3 deep, seen straight: M = 1 − e^(−0.9), though metres are a tenth."""
    for scale in (0.1, 0.2):
        avatar = LatentAvatar(small(density_activation="relu", density_bias=0.0, density_scale=1.0))
        avatar.radiance = Flat(0.3, 0.25)
        drawn = avatar.render(torch.zeros(1, 12), *pose(scale=scale))
        middle = drawn.M[0, 0, 3:5, 3:5]
        torch.testing.assert_close(middle, torch.full((2, 2), 1 - math.exp(-0.9)), atol=2e-3, rtol=0)
        torch.testing.assert_close(drawn.I_lr[0, 0, 3:5, 3:5], 1 - 0.75 * middle)


@pytest.mark.parametrize("samples", [6, 64])
def test_so_many_points_are_sampled_along_each_ray(samples: int) -> None:
    """Sec. 5.1: "we sample 64 points along each ray", counted where density and colour are asked for."""
    avatar = LatentAvatar(small(samples=samples))
    avatar.radiance = Flat(0.0, 1.0)
    avatar.render(torch.zeros(1, 12), *pose())
    assert avatar.radiance.points == 8 * 8 * samples
    torch.testing.assert_close(avatar.radiance.direction_BR3.norm(dim=-1), torch.ones(1, 64))  # Eq. 3: d is a direction


def test_what_is_behind_the_camera_is_not_drawn() -> None:
    """The camera in the middle of the box: of 3 head units in depth it sees those in front of it."""
    rays = rendering.camera_rays(View(2, 2), 1e6, *pose(distance=0.0))
    near, far = rendering.box_depths(rays, small().box)
    torch.testing.assert_close(near, torch.zeros(1, 4))
    torch.testing.assert_close(far, torch.full((1, 4), 0.19))


def test_the_box_is_as_large_in_a_picture_of_any_size() -> None:
    """f = 5000 px at 512: the box's front, 3 × 3.6 head units at z = 4 − 0.11, covers 3·0.1/3.89·5000/512 of a side."""
    for size in (32, 128):
        avatar = LatentAvatar(small(image_size=size, ray_size=32, density_activation="relu", density_bias=1.0))
        avatar.radiance = Flat(1e3, 0.0)
        wide = avatar.render(torch.zeros(1, 12), *pose()).M[0, 0, 16].sum() / 32
        assert wide.item() == pytest.approx(0.3 / 3.89 * 5000 / 512, abs=1.1 / 16)


def test_released_depths_run_from_near_to_far_inclusive() -> None:
    depth, length = rendering.sample_depths(
        torch.tensor([[2.0]]), torch.tensor([[5.0]]), small(samples=4, compositing="opaque_far"), True
    )
    assert depth.flatten().tolist() == [2.0, 3.0, 4.0, 5.0]
    assert length.flatten().tolist() == [1.0, 1.0, 1.0, pytest.approx(1e10)]


def test_density_noise_has_the_deviation_asked_for() -> None:
    config = small(density_activation="relu", density_bias=5.0, density_scale=1.0, density_noise=0.01)
    drawn = rendering.activate_density(torch.zeros(1, 50, 200), config, torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(0.01, rel=0.05)
    assert drawn.mean().item() == pytest.approx(5.0, abs=1e-3)
    assert torch.equal(rendering.activate_density(torch.zeros(3), config, False), torch.full((3,), 5.0))


def test_pose_gradient_equals_finite_differences_through_the_whole_render() -> None:
    """Rays, box, points, tri-planes, radiance and compositing, in float64: what pose refinement learns by."""
    torch.manual_seed(0)
    avatar = LatentAvatar(small(samples=8)).double().eval()
    # clouds as smooth as bilinear planes can be, so that a small step crosses few kinks
    planes = torch.nn.functional.interpolate(torch.randn(3, 4, 4, 4, dtype=torch.float64), size=16, mode="bicubic")
    weight = torch.randn(8, 64, dtype=torch.float64)
    frontal, translation, scale = (t.double() for t in pose())

    def drawn(change_6: Tensor) -> Tensor:
        x, y, z = change_6[:3]
        zero = torch.zeros_like(x)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
        rotation = torch.linalg.matrix_exp(skew)[None] @ frontal
        rays = rendering.camera_rays(View(8, 8), FOCAL, rotation, translation + 0.1 * change_6[3:], scale)
        feature, mask = avatar.volume(planes[None], rays)
        return (feature[0] * weight).sum() + mask.sum()

    at = torch.tensor([0.05, -0.1, 0.03, 0.2, -0.1, 0.3], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(drawn(at), at)[0]
    step = 1e-6
    axes = step * torch.eye(6, dtype=torch.float64)
    differences = torch.stack([(drawn(at + axis) - drawn(at - axis)) / (2 * step) for axis in axes])
    torch.testing.assert_close(gradient, differences.detach(), rtol=2e-4, atol=1e-5)
    assert gradient.abs().min() > 1e-2


def test_gradient_of_empty_space() -> None:
    """At σ = 0: dM/dσ_i = δ_i and dI/dσ_i = δ_i·(c_i − 1), each sample as if it were alone before the white."""
    density = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    length = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64)
    color = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    weights = rendering.compositing_weights(density, length)
    image, mask = rendering.composite(weights, color.expand(1, 1, 1, 4), opaque_far=False)
    torch.testing.assert_close(torch.autograd.grad(mask.sum(), density, retain_graph=True)[0], length)
    torch.testing.assert_close(torch.autograd.grad(image.sum(), density)[0], length * (color - 1))


def test_compositing_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    density, length, color = (
        torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 5), (2, 3, 5), (2, 4, 3, 5))
    )

    def draw(density: Tensor, length: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
        return rendering.composite(rendering.compositing_weights(density, length), color, opaque_far=False)

    assert torch.autograd.gradcheck(draw, (density, length, color))


def hazy(**changes: object) -> LatentAvatar:
    """An avatar of one density everywhere: σ = softplus(0)·0.5 per head unit."""
    avatar = LatentAvatar(small(density_bias=0.0, density_scale=0.5, samples=8, **changes)).double()
    torch.nn.init.zeros_(avatar.radiance.density_out.weight)
    torch.nn.init.zeros_(avatar.radiance.density_out.bias)
    return avatar


def test_a_box_of_constant_density_seen_from_near_at_a_slant() -> None:
    """M = 1 − exp(−σ·|chord|) in head units, the chord counted along 20,000 points of each ray.

    So near (4 head units) and so wide a lens that rays are up to 1.2 times longer than their depth.
    """
    avatar, turn = hazy(focal=500.0), random_rotation(1)
    translation, scale = torch.tensor([[0.0, 0.0, 0.5]]).double(), torch.tensor([0.1]).double()
    theta, turn_133 = torch.randn(1, 12).double(), turn[None]
    drawn = avatar.render(theta, turn_133, translation, scale)
    steps = torch.linspace(0, 10, 20_001, dtype=torch.float64)[1:]  # along the unit ray of the camera, head units
    cell = ((torch.arange(8, dtype=torch.float64) + 0.5) / 8 - 0.5) / (500 / 512)
    box = torch.tensor(avatar.config.box, dtype=torch.float64)
    for row, column in ((0, 0), (3, 4), (2, 7), (7, 1), (5, 5)):
        direction = torch.stack([cell[column], cell[row], torch.ones_like(cell[0])])
        head = (0.1 * steps[:, None] * direction / direction.norm() - translation) @ turn / 0.1  # Rᵀ(x − t)/s
        chord = ((head > box[:, 0]) & (head < box[:, 1])).all(1).double().sum() * 10 / 20_000
        expected = 1 - math.exp(-0.5 * math.log(2) * chord.item())
        assert drawn.M[0, 0, row, column].item() == pytest.approx(expected, abs=1e-3)
    assert 0.3 < drawn.M.max() < 0.9


@pytest.mark.parametrize("changes", [{}, {"compositing": "opaque_far", "missed_near_far": (0.3, 0.5)}])
def test_gradient_of_a_frames_pose_equals_finite_differences_through_the_whole_render(
    changes: dict[str, object],
) -> None:
    """Six numbers of PoseCorrection, through rays, box, tri-planes, MLP, compositing and super-resolution."""
    torch.manual_seed(3)
    avatar = LatentAvatar(small(density_bias=0.5, density_scale=1.0, superresolution="residual", **changes)).double()
    torch.nn.init.normal_(avatar.superresolution.out.weight, std=0.3)
    correction, index = PoseCorrection(2).double(), torch.tensor([1])
    theta, (rotation, translation, scale) = torch.randn(1, 12).double(), (t.double() for t in pose(1))
    like = avatar.render(theta, rotation, translation, scale)
    into_hr, into_mask = torch.randn_like(like.I_hr), torch.randn_like(like.M)
    into_mask = into_mask if like.M.requires_grad else torch.zeros_like(into_mask)
    start = 0.05 * torch.randn(2, 6).double()

    def loss(values: Tensor) -> Tensor:
        moved = torch.func.functional_call(correction, {"values": values}, (index, rotation, translation, scale))
        drawn = avatar.render(theta, *moved, scale)
        return (drawn.I_hr * into_hr).sum() + (drawn.M * into_mask).sum() + drawn.I_lr.square().sum()

    values = start.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(values), values)
    expected, step = torch.zeros_like(found), 1e-6
    with torch.no_grad():
        for k in range(6, 12):
            change = torch.zeros(12, dtype=torch.float64).index_fill_(0, torch.tensor(k), step).view(2, 6)
            expected.view(-1)[k] = (loss(start + change) - loss(start - change)) / (2 * step)
    assert found[1].abs().min() > 1e-4
    assert found[0].abs().max() == 0, "a frame that is not in the batch"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
