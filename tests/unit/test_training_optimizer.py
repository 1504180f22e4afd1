"""GroupAdam: frozen means bit-identical; active means torch's Adam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavatar.configs.training import TrainingConfig
from lavatar.errors import ConfigError
from lavatar.training.optimizer import GroupAdam, build_optimizer


def _groups(*modules: nn.Module) -> list[dict[str, object]]:
    return [{"name": f"g{i}", "params": list(m.parameters()), "lr": 1e-2} for i, m in enumerate(modules)]


def _state(optimizer: GroupAdam, module: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for p in module.parameters() for t in (p.detach(), *optimizer.state[p].values())]


@pytest.mark.parametrize("fused", [True, False])
def test_an_inactive_group_keeps_values_moments_and_counts_to_the_bit(fused: bool) -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = GroupAdam(_groups(a, b), fused=fused)
    optimizer.make_state()
    for step in range(6):
        optimizer.activate({"g0"} if step % 2 else {"g0", "g1"})
        for parameter in (*a.parameters(), *b.parameters()):
            parameter.grad = torch.randn_like(parameter)
        before_a, before_b = _state(optimizer, a), _state(optimizer, b)
        optimizer.step()
        assert not any(torch.equal(x, y) for x, y in zip(before_a, _state(optimizer, a), strict=True))
        if step % 2:
            assert all(torch.equal(x, y) for x, y in zip(before_b, _state(optimizer, b), strict=True))
    assert float(optimizer.state[b.weight]["step"]) == 3
    assert float(optimizer.state[a.weight]["step"]) == 6


def test_all_groups_active_is_torchs_adam() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer, reference = GroupAdam(_groups(ours)), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    optimizer.make_state()
    for _ in range(10):
        x = torch.randn(8, 4)
        for module, adam in ((ours, optimizer), (theirs, reference)):
            adam.zero_grad()
            module(x).square().mean().backward()
            adam.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-7)


def test_the_rate_is_a_factor_of_each_groups_own_peak() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = _groups(a, b)
    groups[1]["lr"] = 1.0
    optimizer = GroupAdam(groups)
    optimizer.scale_rate(0.5)
    optimizer.scale_rate(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.25]


def test_wrong_groups_are_refused() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    module, config = nn.ModuleList([a]), TrainingConfig()
    with pytest.raises(ConfigError, match="not in the task's module"):
        build_optimizer(_groups(b), module, config)
    with pytest.raises(ConfigError, match="in two groups"):
        build_optimizer(_groups(a, a), module, config)
    with pytest.raises(ConfigError, match="names of their own"):
        build_optimizer([{"name": "g", "params": [a.weight]}, {"name": "g", "params": [a.bias]}], module, config)
    with pytest.raises(ConfigError, match="no parameter group is called g7"):
        build_optimizer(_groups(a), module, config).activate({"g7"})


def test_parameters_in_no_group_take_no_gradient() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    build_optimizer(_groups(a), nn.ModuleList([a, b]), TrainingConfig())
    assert a.weight.requires_grad
    assert not b.weight.requires_grad
