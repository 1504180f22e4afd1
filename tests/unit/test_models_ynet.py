"""The Y-network and the mapping MLP: shapes, what is shared and what is not."""

from __future__ import annotations

import pytest
import torch

from lavatar.configs.pair import MappingConfig, YNetConfig
from lavatar.configs.recipe import load_recipe
from lavatar.models.mapping import MappingMLP
from lavatar.models.ynet import SUBJECTS, YNetwork

SMALL = {
    "face_size": 32, "code_dim": 16, "encoder_widths": (4, 8), "neck_width": 8, "decoder_widths": (8, 4),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_shapes_at_full_size(recipe: str) -> None:
    """Sec. 5.1: faces of 128², γ 256, θ 128."""
    sections = load_recipe(recipe)
    with torch.device("meta"):
        ynet, face = YNetwork(sections.ynet), torch.empty(16, 3, 128, 128)
        gamma = ynet.encode(face)
        assert gamma.shape == (16, 256)
        assert all(ynet.decode(gamma, s).shape == face.shape for s in SUBJECTS)
        assert MappingMLP(sections.mapping, 256, sections.avatar.code_dim)(gamma).shape == (16, 128)


@pytest.mark.parametrize("shared", [False, True])
def test_a_decoder_of_one_subject_leaves_the_other_alone(shared: bool) -> None:
    torch.manual_seed(0)
    ynet = YNetwork(YNetConfig(**SMALL, shared_neck=shared))
    ynet.decode(ynet.encode(torch.rand(2, 3, 32, 32)), "actor").square().mean().backward()
    learns = {n.split(".")[0] + "." + n.split(".")[1] for n, p in ynet.named_parameters() if p.grad is not None}
    assert "decoders.actor" in learns
    assert "decoders.avatar" not in learns
    assert any(n.startswith("encoder") for n in learns)
    assert any(n.startswith("neck") for n in learns) == shared


def test_the_two_decoders_draw_different_faces_in_range() -> None:
    ynet = YNetwork(YNetConfig(**SMALL))
    gamma = torch.randn(2, 16)
    a, b = (ynet.decode(gamma, s) for s in SUBJECTS)
    assert not torch.allclose(a, b)
    assert 0 < min(a.min(), b.min()) <= max(a.max(), b.max()) < 1


def test_a_shared_neck_saves_exactly_one_neck() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in YNetwork(YNetConfig(shared_neck=s)).parameters()) for s in (False, True)]
    neck = (256 + 1) * 512 * 8 * 8 + (512 * 9 + 1) * 4 * 512
    assert counts[0] - counts[1] == neck


def test_two_named_subjects_are_todays_network_and_more_add_a_decoder_each() -> None:
    networks = []
    for subjects in (SUBJECTS, ("a", "b"), ("a", "b", "c", "d")):
        torch.manual_seed(0)
        networks.append(YNetwork(YNetConfig(**SMALL), subjects))
    pair, named, many = (network.state_dict() for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(pair.values(), named.values(), strict=True))
    assert [name.replace(".avatar.", ".a.").replace(".actor.", ".b.") for name in pair] == list(named)
    assert all(torch.equal(value, many[name]) for name, value in named.items())
    size = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert size[2] - size[0] == 2 * sum(p.numel() for p in networks[0].decoders["actor"].parameters())


def test_mapping_mlp_is_256_256_256_128() -> None:
    mlp = MappingMLP(MappingConfig(), 256, 128)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(256, 256), (256,), (256, 256), (256,), (128, 256), (128,)]


def test_faces_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder_widths"):
        YNetConfig(face_size=40)
