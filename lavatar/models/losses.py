"""Eq. 4-8, term by term. Pure functions of tensors and weights; each returns its terms unweighted, and their weighted
sum as "total".

‖·‖1 is the mean absolute error, ‖·‖2 the mean squared error, SSIM enters as 1 − SSIM.
Shapes: B batch, s image side, r ray side, H face side, D code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from lavatar.configs.avatar import AvatarLossConfig
from lavatar.configs.pair import YNetLossConfig
from lavatar.errors import ConfigError
from lavatar.models.avatar import Rendering
from lavatar.models.ssim import ssim

Terms = dict[str, Tensor]


def coarse(image_BCss: Tensor, side: int) -> Tensor:
    """Mean of each of side² equal cells: the target of the ray through the cell's centre."""
    return F.avg_pool2d(image_BCss, image_BCss.shape[-1] // side)


def l1(a_BCHH: Tensor, b_BCHH: Tensor, weight_B1HH: Tensor | None = None) -> Tensor:
    """Mean of |a − b|, each pixel times its weight if there are weights (weight 1 everywhere is the plain mean)."""
    difference = (a_BCHH - b_BCHH).abs()
    return (difference if weight_B1HH is None else difference * weight_B1HH).mean()


def eq4(
    rendering: Rendering,
    image_B3ss: Tensor,
    mask_B1ss: Tensor,
    config: AvatarLossConfig,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    weight_B1ss: Tensor | None = None,
) -> Terms:
    """Eq. 4: L = ‖I_hr − I_gt‖1 + λ_vgg·VGG(I_hr, I_gt) + λ_lr·‖I_lr − I_gt‖1 + λ_mask·‖M − M_gt‖2.

    `image` on white and `mask` in [0, 1] at the size of I_hr. `perceptual` gives B distances; needed where λ_vgg > 0.
    `weight` emphasises pixels in both L1 terms.
    """
    side = rendering.I_lr.shape[-1]
    weight_B1rr = None if weight_B1ss is None else coarse(weight_B1ss, side)
    terms = {
        "l1": l1(rendering.I_hr, image_B3ss, weight_B1ss),
        "lr": l1(rendering.I_lr, coarse(image_B3ss, side), weight_B1rr),
        "mask": F.mse_loss(rendering.M, coarse(mask_B1ss, side)),
    }
    total = terms["l1"] + config.lambda_lr * terms["lr"] + config.lambda_mask * terms["mask"]
    if config.lambda_vgg > 0:
        if perceptual is None:
            raise ConfigError(
                f"lambda_vgg is {config.lambda_vgg} but the VGG weights are not loaded",
                "Run `lavatar weights fetch`, or set avatar_loss.lambda_vgg=0.",
            )
        terms["vgg"] = perceptual(rendering.I_hr, image_B3ss).mean()
        total = total + config.lambda_vgg * terms["vgg"]
    return {**terms, "total": total}


def eq5(drawn_B3HH: Tensor, face_B3HH: Tensor, config: YNetLossConfig, weight_B1HH: Tensor | None = None) -> Terms:
    """Eq. 5: L_rec = ‖I' − I‖1 + λ_ssim·(1 − SSIM(I', I))."""
    terms = {"l1": l1(drawn_B3HH, face_B3HH, weight_B1HH), "ssim": 1 - ssim(drawn_B3HH, face_B3HH).mean()}
    return {**terms, "total": terms["l1"] + config.lambda_ssim * terms["ssim"]}


def eq6(
    cycled_B3HH: Tensor | None,
    face_B3HH: Tensor,
    cycled_code_BD: Tensor,
    code_BD: Tensor,
    config: YNetLossConfig,
    lambda_code: float,
    weight_B1HH: Tensor | None = None,
) -> Terms:
    """Eq. 6: L_cycle = ‖I* − I‖1 + λ_ssim·(1 − SSIM(I*, I)) + λ_code·‖γ* − γ‖2.

    `cycled` is I*, None where the image's cycle is left out (`image_cycle: false`). `lambda_code` is the subject's.
    """
    code = F.mse_loss(cycled_code_BD, code_BD)
    if cycled_B3HH is None:
        return {"code": code, "total": lambda_code * code}
    image = eq5(cycled_B3HH, face_B3HH, config, weight_B1HH)
    return {"l1": image["l1"], "ssim": image["ssim"], "code": code, "total": image["total"] + lambda_code * code}


def eq7(reconstruction: Mapping[str, Tensor], cycle: Mapping[str, Tensor], lambda_image: float = 1.0) -> Terms:
    """Eq. 7: L = L_rec + L_cycle; their terms under rec_ and cycle_. `lambda_image` weighs L_rec (1 in the paper)."""
    terms = {f"rec_{k}": v for k, v in reconstruction.items() if k != "total"}
    terms |= {f"cycle_{k}": v for k, v in cycle.items() if k != "total"}
    return {**terms, "total": lambda_image * reconstruction["total"] + cycle["total"]}


def eq8(mapped_BD: Tensor, theta_BD: Tensor) -> Terms:
    """Eq. 8: L = ‖E(I_ava) − Mapping(E_shared(I_ava))‖2; `theta` = E(I_ava), `mapped` = Mapping(E_shared(I_ava))."""
    loss = F.mse_loss(mapped_BD, theta_BD)
    return {"mapping": loss, "total": loss}
