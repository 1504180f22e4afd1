"""Eq. 4-8 on tensors whose losses can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lavatar.configs.avatar import AvatarLossConfig
from lavatar.configs.pair import YNetLossConfig
from lavatar.errors import ConfigError
from lavatar.models.avatar import Rendering
from lavatar.models.losses import coarse, eq4, eq5, eq6, eq7, eq8, l1
from lavatar.models.ssim import C1, ssim

NO_VGG = AvatarLossConfig(lambda_vgg=0)


def flat(value: float, *shape: int) -> Tensor:
    return torch.full(shape, float(value))


def rendering(hr: float = 0.5, lr: float = 0.5, mask: float = 0.5) -> Rendering:
    return Rendering(flat(hr, 2, 3, 8, 8), flat(lr, 2, 3, 4, 4), flat(lr, 2, 5, 4, 4), flat(mask, 2, 1, 4, 4))


def test_eq4_term_by_term() -> None:
    """|.9−.6| + .1·7 + .1·|.8−.6| + .1·(.5−1)²"""
    terms = eq4(
        rendering(0.9, 0.8, 0.5), flat(0.6, 2, 3, 8, 8), flat(1, 2, 1, 8, 8), AvatarLossConfig(),
        perceptual=lambda a, b: flat(7.0, len(a)),
    )  # fmt: skip
    values = {k: v.item() for k, v in terms.items()}
    assert values == pytest.approx(
        {"l1": 0.3, "vgg": 7.0, "lr": 0.2, "mask": 0.25, "total": 0.3 + 0.7 + 0.02 + 0.025}, abs=1e-6
    )


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.1), (0.1, 2.0)])
def test_eq4_weights_come_from_the_configuration(weights: tuple[float, float]) -> None:
    config = AvatarLossConfig(lambda_vgg=0, lambda_lr=weights[0], lambda_mask=weights[1])
    total = eq4(rendering(1.0, 0.0, 0.0), flat(0.5, 2, 3, 8, 8), flat(1, 2, 1, 8, 8), config)["total"]
    assert total.item() == pytest.approx(0.5 + weights[0] * 0.5 + weights[1] * 1.0)


def test_eq4_without_vgg_weights_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        eq4(rendering(), flat(0.5, 2, 3, 8, 8), flat(1, 2, 1, 8, 8), AvatarLossConfig())
    assert "lavatar weights fetch" in caught.value.hint
    assert "vgg" not in eq4(rendering(), flat(0.5, 2, 3, 8, 8), flat(1, 2, 1, 8, 8), NO_VGG)


def test_eq4_weight_map_emphasises_pixels_in_both_sizes() -> None:
    """One ray cell (2×2 pixels of 8×8) of weight 9 has 1/16 of the area: the mean of the weights is 1.5."""
    weight = flat(1, 2, 1, 8, 8)
    weight[..., 2:4, 4:6] = 9
    image = flat(0.6, 2, 3, 8, 8)
    terms = eq4(rendering(0.9, 0.8), image, flat(0.5, 2, 1, 8, 8), NO_VGG, weight_B1ss=weight)
    assert terms["l1"].item() == pytest.approx(0.3 * 1.5)
    assert terms["lr"].item() == pytest.approx(0.2 * 1.5)
    plain = eq4(rendering(0.9, 0.8), image, flat(0.5, 2, 1, 8, 8), NO_VGG, weight_B1ss=flat(1, 2, 1, 8, 8))
    assert plain["l1"].item() == pytest.approx(0.3)


def test_coarse_target_is_the_mean_of_each_cell() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert coarse(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(coarse(image, 4), image)


def flat_ssim(a: float, b: float) -> float:
    """Of two flat images: only the luminance term differs from 1."""
    return (2 * a * b + C1) / (a * a + b * b + C1)


def test_eq5_term_by_term() -> None:
    terms = eq5(flat(0.4, 2, 3, 16, 16), flat(0.6, 2, 3, 16, 16), YNetLossConfig())
    assert terms["l1"].item() == pytest.approx(0.2)
    assert terms["ssim"].item() == pytest.approx(1 - flat_ssim(0.4, 0.6), abs=1e-4)
    assert terms["total"].item() == pytest.approx(0.2 + 0.1 * (1 - flat_ssim(0.4, 0.6)), abs=1e-5)


def test_eq6_term_by_term() -> None:
    """‖I*−I‖1 + .1·(1−SSIM) + λ·mean((3−1)²)"""
    face = flat(0.6, 2, 3, 16, 16)
    terms = eq6(flat(0.4, 2, 3, 16, 16), face, flat(3, 2, 8), flat(1, 2, 8), YNetLossConfig(), lambda_code=1e-2)
    assert terms["code"].item() == pytest.approx(4.0)
    assert terms["total"].item() == pytest.approx(0.2 + 0.1 * (1 - flat_ssim(0.4, 0.6)) + 0.04, abs=1e-5)


def test_eq6_of_the_code_alone() -> None:
    terms = eq6(None, flat(0.6, 1, 3, 16, 16), flat(3, 1, 8), flat(1, 1, 8), YNetLossConfig(), lambda_code=1e-5)
    assert set(terms) == {"code", "total"}
    assert terms["total"].item() == pytest.approx(4e-5)


def test_eq7_is_the_sum() -> None:
    config, face, code = YNetLossConfig(), torch.rand(1, 3, 16, 16), torch.rand(1, 8)
    rec, cycle = eq5(face * 0.5, face, config), eq6(face * 0.8, face, code + 1, code, config, 1e-4)
    terms = eq7(rec, cycle)
    assert set(terms) == {"rec_l1", "rec_ssim", "cycle_l1", "cycle_ssim", "cycle_code", "total"}
    torch.testing.assert_close(terms["total"], rec["total"] + cycle["total"])
    torch.testing.assert_close(eq7(rec, cycle, 0.1)["total"], 0.1 * rec["total"] + cycle["total"])


def test_eq8_is_the_mean_squared_error_of_codes() -> None:
    terms = eq8(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert terms["total"].item() == pytest.approx((4 + 4) / 4)


def test_equal_images_cost_nothing() -> None:
    face, code = torch.rand(2, 3, 32, 32), torch.rand(2, 8)
    assert eq5(face, face, YNetLossConfig())["total"].item() == pytest.approx(0, abs=1e-6)
    assert eq6(face, face, code, code, YNetLossConfig(), 1e-4)["total"].item() == pytest.approx(0, abs=1e-6)
    assert l1(face, face, torch.rand(2, 1, 32, 32)).item() == 0


def test_ssim_is_an_images_own_and_has_a_gradient() -> None:
    a, b = torch.rand(2, 3, 20, 24, requires_grad=True), torch.rand(2, 3, 20, 24)
    torch.testing.assert_close(ssim(a, b), torch.cat([ssim(a[:1], b[:1]), ssim(a[1:], b[1:])]))
    (1 - ssim(a, b)).mean().backward()
    assert a.grad is not None
    stepped = (a - 0.5 * a.grad / a.grad.abs().max()).detach()
    assert (ssim(stepped, b) > ssim(a, b)).all()


def test_eq4_counts_either_sign_and_squares_only_the_mask() -> None:
    """Half of the pixels .3 too bright, half .1 too dark: |·| is .2 on average, the square of the mask's .4 is .16."""
    image = flat(0.5, 2, 3, 8, 8)
    drawn = rendering(0.5, 0.5, 0.9)
    hr = drawn.I_hr.clone()
    hr[:, :, :4], hr[:, :, 4:] = 0.8, 0.4
    terms = eq4(drawn._replace(I_hr=hr), image, flat(0.5, 2, 1, 8, 8), NO_VGG)
    assert [terms[k].item() for k in ("l1", "lr", "mask")] == pytest.approx([0.2, 0.0, 0.16], abs=1e-6)


def test_eq4_compares_the_mean_of_each_cell_with_the_ray() -> None:
    """Cells of 2×2 pixels 0, 0, 0, 1: the ray of colour .25 is right, the portrait of .25 misses by 3·.25 + .75."""
    cell = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    image = cell.repeat(4, 4).expand(2, 3, 8, 8)
    terms = eq4(rendering(0.25, 0.25), image, image[:, :1], NO_VGG)
    assert terms["lr"].item() == pytest.approx(0.0)
    assert terms["l1"].item() == pytest.approx((3 * 0.25 + 0.75) / 4)
    assert terms["mask"].item() == pytest.approx((0.5 - 0.25) ** 2)


def test_eq4_perceptual_term_sees_the_portrait_and_is_a_mean_over_the_batch() -> None:
    seen: list[Tensor] = []

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((a, b))
        return torch.tensor([1.0, 4.0])

    drawn, image = rendering(), flat(0.5, 2, 3, 8, 8)
    terms = eq4(drawn, image, flat(0.5, 2, 1, 8, 8), AvatarLossConfig(), perceptual)
    assert terms["vgg"].item() == 2.5
    assert seen[0] is drawn.I_hr
    assert seen[1] is image


def test_eq6_pulls_both_codes_towards_each_other() -> None:
    """‖γ* − γ‖2 has a gradient through γ* and through γ: ±2·(γ* − γ)/n."""
    cycled, code = torch.tensor([[3.0, 1.0]], requires_grad=True), torch.tensor([[1.0, 2.0]], requires_grad=True)
    total = eq6(None, flat(0.5, 1, 3, 16, 16), cycled, code, YNetLossConfig(), lambda_code=0.5)["total"]
    found = torch.autograd.grad(total, (cycled, code))
    assert [g.tolist() for g in found] == [[[1.0, -0.5]], [[-1.0, 0.5]]]  # ½ · (4 + 1)/2, by its parts


def test_weights_of_pixels_count_in_reconstruction_and_cycle_alike() -> None:
    """A quarter of the pixels of weight 5: the mean weight is 2."""
    weight = flat(1, 2, 1, 16, 16)
    weight[..., :8, :8] = 5
    face, drawn, code = flat(0.6, 2, 3, 16, 16), flat(0.4, 2, 3, 16, 16), flat(1, 2, 8)
    cycle = eq6(drawn, face, code, code, YNetLossConfig(), 1.0, weight)
    for terms in (eq5(drawn, face, YNetLossConfig(), weight), cycle):
        assert terms["l1"].item() == pytest.approx(0.4)
