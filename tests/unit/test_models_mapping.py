"""Sec. 4.2: where our linear mapping begins, in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavatar.configs.pair import MappingConfig
from lavatar.models.mapping import READOUT_NOISE, MappingMLP, SubjectFrames
from lavatar.models.regression import begin_at_regression, unseen_covariance


def frames(gamma: torch.Tensor, shape: torch.Tensor | None = None, rest: torch.Tensor | None = None) -> SubjectFrames:
    everything = torch.ones(len(gamma), dtype=torch.bool)
    return SubjectFrames(gamma, gamma if shape is None else shape, everything if rest is None else rest)


def identity_readout(mapping: MappingMLP) -> None:
    readout = nn.Linear(2, 2)
    nn.init.eye_(readout.weight)
    nn.init.zeros_(readout.bias)
    mapping.read_through(readout)


def test_noise_shrinks_a_regression_as_damping_does() -> None:
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    layer = nn.Linear(1, 1)
    begin_at_regression(layer, x, 3 * x + 1, 0.0)
    assert layer.weight.item() == pytest.approx(3)
    assert layer.bias.item() == pytest.approx(1)
    begin_at_regression(layer, x, 3 * x + 1, 0.0, torch.tensor([[0.5]]))  # variance 1 and noise ½: 3 / 1.5
    assert layer.weight.item() == pytest.approx(2)
    assert layer.bias.item() == pytest.approx(1)


def test_unseen_is_what_varies_in_the_other_alone() -> None:
    own = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])  # variances 4 and 0, mean 2: of the first 4 / (4 + 2) is seen
    other = torch.tensor([[3.0, 5.0], [-3.0, 5.0], [3.0, -5.0], [-3.0, -5.0]])
    expected = torch.tensor([[9.0 / 9, 0.0], [0.0, 25.0]])
    assert torch.allclose(unseen_covariance(own, other).float(), expected, atol=1e-5)


def test_an_actor_does_what_the_avatar_never_did_and_does_not_drive_it_by_that() -> None:
    """The avatar hardly purses its lips (second number), but when it did it happened to open its jaw (θ) too."""
    generator = torch.Generator().manual_seed(0)
    jaw, pursed = torch.randn(400, generator=generator), 0.02 * torch.randn(400, generator=generator)
    own, theta = torch.stack([jaw, pursed], 1), (jaw + 10 * pursed)[:, None]
    actor = torch.stack([torch.randn(400, generator=generator), torch.randn(400, generator=generator)], 1)
    driven = {}
    for unseen in (0.0, 1.0):
        config = MappingConfig(hidden=(), ridge=1e-4, unseen=unseen)
        mapping = MappingMLP(config, 2, 1)
        mapping.begin_with({"avatar": frames(own), "actor": frames(actor)}, theta, config)
        with torch.no_grad():
            driven[unseen] = mapping(actor)[:, 0]
            assert float(mapping(own, "avatar").var()) == pytest.approx(float(theta.var()), rel=0.01)
    r = {unseen: float(torch.corrcoef(torch.stack([actor[:, 0], theta_]))[0, 1]) for unseen, theta_ in driven.items()}
    assert r[0.0] < 0.3, "without it the lips open the jaw"
    assert r[1.0] > 0.95


def test_landmarks_that_stand_still_are_not_blown_up() -> None:
    config = MappingConfig(hidden=(), reads="landmarks", align="mean")
    mapping = MappingMLP(config, 2, 1, landmark_dim=2)
    identity_readout(mapping)
    gamma = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([4.0, 0.01])
    mapping.align({"avatar": frames(gamma), "actor": frames(gamma)})
    deviation = mapping.deviation_2F[0]
    assert deviation[0] == pytest.approx(float(gamma[:, 0].std()), rel=0.01)
    assert deviation[1] == pytest.approx(READOUT_NOISE, rel=0.01)


@pytest.mark.parametrize("align", ["mean", "rest"])
def test_a_readout_that_overstates_an_actor_is_brought_to_the_size_of_its_landmarks(align: str) -> None:
    """Both move their landmarks alike; γ says so of the avatar, and 1.5 and .5 times as much of the actor."""
    mapping = MappingMLP(MappingConfig(hidden=(), reads="landmarks", align=align), 2, 1, landmark_dim=2)  # type: ignore[arg-type]
    identity_readout(mapping)
    shape = 50 * torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    said, rest = 3 + shape * torch.tensor([1.5, 0.5]), shape[:, 0] < 0
    mapping.align({"avatar": frames(shape, shape, rest), "actor": frames(said, shape, rest)})
    own, driven = (mapping.aligned(gamma, subject) for gamma, subject in ((shape, "avatar"), (said, "actor")))
    assert torch.allclose(own[:, :2], driven[:, :2], atol=1e-3)
    assert not torch.allclose(own[:, 2:], driven[:, 2:], atol=0.1), "γ itself has no true size"
    larger = MappingMLP(MappingConfig(hidden=(), reads="landmarks", align=align), 2, 1, landmark_dim=2)  # type: ignore[arg-type]
    identity_readout(larger)
    larger.align({"avatar": frames(shape, shape, rest), "actor": frames(2 * shape, 2 * shape, rest)})
    assert torch.allclose(2 * own[:, :2], larger.aligned(2 * shape, "actor")[:, :2], atol=1e-3), (
        "who moves more drives more"
    )


def test_faces_at_rest_meet_and_the_deviation_is_the_avatars() -> None:
    """align rest: however much an actor acts, its face at rest drives the avatar's, in the avatar's deviations."""
    generator = torch.Generator().manual_seed(2)
    mapping = MappingMLP(MappingConfig(hidden=(), align="rest"), 2, 1)
    own, rest = 3 * torch.randn(400, 2, generator=generator), torch.arange(400) < 100
    acting = torch.where(rest[:, None], torch.tensor([5.0, -1.0]), torch.tensor([9.0, 4.0]))  # rests a quarter of it
    mapping.align({"avatar": frames(own, rest=rest), "actor": frames(acting, rest=rest)})
    assert torch.allclose(mapping.aligned(acting[:1], "actor"), torch.zeros(1, 2), atol=1e-5)
    assert torch.allclose(mapping.aligned(own[rest], "avatar").mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(mapping.aligned(acting[-1:], "actor"), torch.tensor([[4.0, 5.0]]) / own.std(0), atol=1e-3)


def test_code_share_weakens_the_code_beside_the_landmarks() -> None:
    config = MappingConfig(hidden=(), reads="landmarks", code_share=0.1)
    mapping = MappingMLP(config, 3, 1, landmark_dim=1)
    readout = nn.Linear(3, 1)
    mapping.read_through(readout)
    gamma = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    expected = torch.cat([readout(gamma), 0.1 * gamma], 1)
    torch.testing.assert_close(mapping.aligned(gamma, "avatar"), expected)


def test_gain_exaggerates_about_the_mean() -> None:
    """θ of twice the deviation, about the same mean."""
    generator = torch.Generator().manual_seed(4)
    own = torch.randn(300, 2, generator=generator)
    theta = own @ torch.randn(2, 3, generator=generator) + 5 + 0.3 * torch.randn(300, 3, generator=generator)
    driven = []
    for gain in (1.0, 2.0):
        config = MappingConfig(hidden=(), gain=gain)
        mapping = MappingMLP(config, 2, 3)
        mapping.begin_with({"avatar": frames(own)}, theta, config)
        driven.append(mapping(own, "avatar").detach())
    torch.testing.assert_close(driven[1] - theta.mean(0), 2 * (driven[0] - theta.mean(0)), atol=1e-4, rtol=0)
    assert float(driven[0].var(0).sum()) == pytest.approx(float(theta.var(0).sum()), rel=1e-4)


@pytest.mark.parametrize("blind", ["avatar", "actor"])
def test_landmarks_that_were_not_tracked_have_no_true_size(blind: str) -> None:
    """Irises may be missing in one of the videos: their columns are 0 there, and say nothing of what γ overstates."""
    mapping = MappingMLP(MappingConfig(hidden=(), reads="landmarks", align="mean"), 2, 1, landmark_dim=2)
    identity_readout(mapping)
    shape = 50 * torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    seen = {name: shape * torch.tensor([1.0, 0.0 if name == blind else 1.0]) for name in ("avatar", "actor")}
    mapping.align({"avatar": frames(shape, seen["avatar"]), "actor": frames(2 * shape, seen["actor"])})
    own, actor = mapping.deviation_2F[:, :2]
    assert actor[0] == pytest.approx(2 * float(own[0]), rel=1e-3)
    assert actor[1] == pytest.approx(float(own[1]))
