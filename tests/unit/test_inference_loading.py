"""Released models come back whole, or with an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lavatar.errors import DataError
from lavatar.inference.loading import as_input, load_avatar, load_pair
from lavatar.inference.reenact import cross_codes, draw, self_codes
from lavatar.inference.retarget import PoseTrack
from lavatar.models.avatar import LatentAvatar
from tests.unit.inference_files import FACE, RECIPE, make_avatar_release, make_pair_release, turn


def faces(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, FACE, FACE, 3), dtype=np.uint8)


def test_avatar_comes_back_as_it_was(tmp_path: Path) -> None:
    avatar = load_avatar(make_avatar_release(tmp_path / "release"))
    torch.manual_seed(0)
    original = LatentAvatar(RECIPE.avatar).eval()
    assert (avatar.subject, avatar.dataset) == ("ann", "digest1")
    assert not avatar.model.training
    assert not any(p.requires_grad for p in avatar.model.parameters())
    assert avatar.poses.mean.scale == pytest.approx(turn(0).scale, rel=1e-3)
    with torch.inference_mode():
        wanted = original.encode(as_input(faces(3), FACE, torch.device("cpu")))
    assert torch.equal(self_codes(avatar, faces(3)), wanted)
    drawn = draw(avatar, wanted, PoseTrack.of([turn(i) for i in range(3)]))
    assert drawn.shape == (3, 32, 32, 3)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn[1:2], draw(avatar, wanted[1:2], PoseTrack.of([turn(1)])))  # a batch changes nothing


def test_pair_comes_back(tmp_path: Path) -> None:
    pair = load_pair(make_pair_release(tmp_path / "release"))
    assert (pair.avatar, pair.actor) == ("ann", "bob")
    assert cross_codes(pair, faces(2)).shape == (2, RECIPE.avatar.code_dim)


def test_larger_faces_are_averaged_down() -> None:
    checker = (np.indices((4 * FACE, 4 * FACE)).sum(0) % 2 * 255).astype(np.uint8)
    small = as_input(checker[None, :, :, None].repeat(3, 3), FACE, torch.device("cpu"))
    assert small.shape == (1, 3, FACE, FACE)
    assert (small - 0.5).abs().max() < 0.02


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    path.write_bytes(bytes(content))


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _resize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    _edit(folder, avatar={**config["avatar"], "code_dim": 9})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "SHA-256"),
        (_flip, "SHA-256"),
        (_resize, "does not fit config.json"),
        (lambda f: _edit(f, format=99), "format 99"),
        (lambda f: _edit(f, kind="pair"), "kind 'pair'"),
        (lambda f: _edit(f, avatar={"image_size": "large"}), "image_size"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: (f / "config.json").unlink(), "no released model"),
        (lambda f: (f / "model.safetensors").unlink(), "incomplete"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: object, message: str) -> None:
    folder = make_avatar_release(tmp_path / "release")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        load_avatar(folder)
    assert str(folder) in caught.value.message
    assert caught.value.hint


def test_the_other_kind_of_release(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="kind 'avatar', wanted 'pair'"):
        load_pair(make_avatar_release(tmp_path / "release"))
