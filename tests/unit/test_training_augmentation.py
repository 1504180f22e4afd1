"""How the encoders' inputs are changed in training: the change in closed form, its deviation over many faces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lavatar.training.augmentation import generator_for, jitter, tint

SIDE = 33
AXIS = torch.linspace(-1, 1, SIDE) * (SIDE - 1) / SIDE  # centres of the pixels, in half sides


def test_jitter_moves_scales_and_turns_each_face_by_its_amount() -> None:
    """Of a face that is a ramp, value = x, a jittered one is a ramp too: its slopes and its middle tell the motion."""
    ramps = torch.stack([AXIS.expand(SIDE, SIDE), AXIS[:, None].expand(SIDE, SIDE), torch.zeros(SIDE, SIDE)])
    moved = jitter(ramps.expand(3000, 3, SIDE, SIDE), 0.02, generator_for(0, 1))
    middle, step = SIDE // 2, 2 / SIDE
    shift_B2 = moved[:, :2, middle, middle] / 2  # in sides
    right_B2 = (moved[:, :2, middle, middle + 1] - moved[:, :2, middle, middle]) / step
    down_B2 = (moved[:, :2, middle + 1, middle] - moved[:, :2, middle, middle]) / step
    torch.testing.assert_close(down_B2, torch.stack([-right_B2[:, 1], right_B2[:, 0]], 1), atol=1e-4, rtol=0)
    turn_B, scale_B = torch.atan2(right_B2[:, 1], right_B2[:, 0]), right_B2.norm(dim=1).log()
    for values in (*shift_B2.T, scale_B, turn_B):
        assert spread(values) == pytest.approx((0, 0.02), abs=0.001)
    four = torch.stack([*shift_B2.T, scale_B, turn_B])
    assert float((torch.corrcoef(four) - torch.eye(4)).abs().max()) < 0.06, "each is drawn for itself"


def test_tint_changes_brightness_contrast_and_channels_of_whole_faces() -> None:
    dark, bright = (torch.full((3000, 3, 8, 8), value) for value in (0.45, 0.55))
    low, high = (tint(face, 0.1, generator_for(0, 2)) for face in (dark, bright))
    assert torch.equal(low, low[..., :1, :1].expand_as(low)), "alike in all pixels"
    gain_B3 = ((high - low)[..., 0, 0] / 0.1).log()
    middle_B3 = ((high + low)[..., 0, 0]) / 2 - 0.5
    assert spread(gain_B3) == pytest.approx((0, 0.1 * (1 + 0.5**2) ** 0.5), abs=0.004)
    assert spread(middle_B3) == pytest.approx((0, 0.1 * (0.5**2 + 0.25**2) ** 0.5), abs=0.004)
    assert spread(gain_B3[:, 0] - gain_B3[:, 1]) == pytest.approx((0, 0.05 * 2**0.5), abs=0.004)


def test_nothing_is_changed_unless_asked_and_the_generator_decides() -> None:
    face = torch.rand(4, 3, 16, 16)
    assert jitter(face, 0.0, generator_for(0)) is face
    assert tint(face, 0.0, generator_for(0)) is face
    for change in (jitter, tint):
        first, again, other = (change(face, 0.05, generator_for(0, step)) for step in (7, 7, 8))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and deviation; what is drawn is cut off at 2.5 deviations, which takes 1 % of the deviation away."""
    return float(values.mean()), float(values.std())
