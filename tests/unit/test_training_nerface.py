"""The baselines of Sec. 5.2 in training: Coeff+Tri-plane as an AvatarTask, NeRFace as its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lavatar.contracts import COEFFICIENTS, EXPRESSIONS
from lavatar.datasets import shards
from lavatar.datasets.coefficients import coefficients
from lavatar.datasets.loader import FrameStore
from lavatar.errors import DataError
from lavatar.inference.loading import load_avatar
from lavatar.inference.reenact import driven_codes, reenact_self
from lavatar.training.augmentation import generator_for
from lavatar.training.avatar import AvatarTask
from lavatar.training.nerface import BOX_MARGIN, NeRFaceTask, draw_pixels
from lavatar.training.optimizer import build_optimizer
from lavatar.training.release import write_avatar_release
from lavatar.training.tasks import TrainingTask
from tests.unit.dataset_files import make_dataset, make_meta, make_pictures
from tests.unit.test_training_avatar import small

DRIVEN = ("avatar.encoder=coefficients", f"avatar.code_dim={COEFFICIENTS}")
MLP = (
    *DRIVEN, "avatar.field=mlp", "avatar.ray_size=32", "avatar.field_width=16", "avatar.field_layers=4",
    "avatar.fine_samples=6", "avatar.position_frequencies=3", "avatar.frame_code=2", "avatar_learning.ray_batch=64",
    "avatar.density_bias=0.0", "avatar_training.learning_rate=5e-3",
)  # fmt: skip


def make_tracked(folder: Path, names: int = COEFFICIENTS, frames: int = 16, held_out: int = 4) -> None:
    """A dataset whose frames have `names` coefficients."""
    with shards.ShardWriter(folder / "shard-00000.tar") as writer:
        for i in range(frames):
            values = {f"mp.{k:02d}": float(np.sin(i * (k + 1))) for k in range(names)}
            meta = make_meta(
                i, "eval" if i >= frames - held_out else "train", **values, **dict.fromkeys(EXPRESSIONS, 0.1)
            )
            writer.write(meta, *make_pictures(i))
    manifest = make_dataset_manifest(writer.entry, frames, held_out)
    shards.write_manifest(folder, manifest)


def make_dataset_manifest(entry: dict[str, object], frames: int, held_out: int) -> shards.Manifest:
    return shards.Manifest(
        digest="t", subject="s", kind="video", frames=frames, train=frames - held_out, eval=held_out, fps=25.0,
        portrait_size=48, face_size=24, tars=[entry], dropped=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tracked")
    make_tracked(made)
    return made


def trained(task: AvatarTask | NeRFaceTask, steps: int) -> list[float]:
    optimizer = build_optimizer(task.param_groups(), task.module, task.training)
    totals = []
    torch.manual_seed(0)
    for step in range(steps):
        total = task.losses(task.batches(step), step)["total"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    return totals


def test_coefficients_are_the_trackers_in_order(folder: Path) -> None:
    store = FrameStore(folder, 32)
    values = coefficients(store)
    assert values.shape == (len(store), COEFFICIENTS)
    assert values[3] == pytest.approx([np.sin(3 * (k + 1)) for k in range(COEFFICIENTS)], abs=1e-6)


def test_another_number_of_coefficients_is_an_error(tmp_path: Path) -> None:
    make_tracked(tmp_path, names=7)
    with pytest.raises(DataError, match="7 expression coefficients, wanted 51"):
        coefficients(FrameStore(tmp_path, 32))


def test_a_face_that_is_not_found_is_an_error(tmp_path: Path, weights: Path) -> None:
    make_dataset(tmp_path)  # noise, and no coefficients: tracked, without success
    with pytest.raises(DataError, match="found a face in 0 of 16"):
        coefficients(FrameStore(tmp_path, 32))


@pytest.mark.parametrize("kind", ["coeff-triplane", "nerface"])
def test_a_baseline_trains_is_released_and_is_driven_by_the_same_numbers(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    store = FrameStore(folder, 32)
    task: AvatarTask | NeRFaceTask
    task = AvatarTask(small(*DRIVEN), store) if kind == "coeff-triplane" else NeRFaceTask(small(*MLP), store)
    assert isinstance(task, TrainingTask)
    assert "encoder" not in {g["name"] for g in task.param_groups()}
    losses = trained(task, 40)
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])
    task.module.eval()
    write_avatar_release(tmp_path, task)
    avatar = load_avatar(tmp_path)
    held_out = FrameStore(folder, 32, "eval")
    with torch.no_grad():
        expected = task.avatar.encode(torch.from_numpy(coefficients(held_out)))
    assert torch.allclose(driven_codes(avatar, held_out, np.arange(4)), expected, atol=1e-6)
    (batch,) = reenact_self(avatar, held_out, np.arange(4), 8)
    assert batch.images_BHW3.shape == (4, 32, 32, 3)


def test_the_coefficients_drive_the_picture(folder: Path) -> None:
    store = FrameStore(folder, 32)
    task = AvatarTask(small(*DRIVEN), store)
    trained(task, 5)
    batch = store.batch([0, 1])
    task.module.eval()
    with torch.no_grad():
        pose = (batch.rotation_B33, batch.translation_B3, batch.scale_B)
        one = task.avatar.render(task.avatar.encode(task.coefficients_NK[[0, 1]]), *pose).I_hr
        two = task.avatar.render(task.avatar.encode(task.coefficients_NK[[5, 9]]), *pose).I_hr
    assert float((one - two).abs().max()) > 0.02


def test_most_rays_are_on_the_face() -> None:
    marks = torch.rand(3, 68, 2, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    pixels = draw_pixels(marks, 100, 1000, 0.9, generator_for(0, 1))
    inside = ((pixels >= 32) & (pixels < 68)).all(-1).float().mean(1)
    assert pixels.shape == (3, 1000, 2)
    assert bool(((inside > 0.88) & (inside < 0.96)).all())
    again = draw_pixels(marks, 100, 1000, 0.9, generator_for(0, 1))
    assert torch.equal(pixels, again)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_recipe_says_how_many_rays_are_on_the_face(share: float, folder: Path) -> None:
    """The others are anywhere: the face has its share of them too."""
    store = FrameStore(folder, 32)
    marks = np.random.default_rng(0).uniform(0.375, 0.625, store.landmarks_N68x2.shape)
    marks[:, 0], marks[:, 1] = 0.375, 0.625
    store.landmarks_N68x2 = marks.astype(np.float32)
    sizes = f"avatar_learning.ray_face_share={share}", "avatar_learning.ray_batch=2000"
    pixels = NeRFaceTask(small(*MLP, *sizes), store).batches(0).pixel_BR2
    low, high = (int(32 * (end + out * BOX_MARGIN * 0.25)) for end, out in ((0.375, -1), (0.625, 1)))
    inside = ((pixels >= low) & (pixels <= high)).all(-1).float().mean(1)
    assert inside.tolist() == pytest.approx([share + (1 - share) * ((high - low + 1) / 32) ** 2] * 4, abs=0.03)


def test_codes_of_the_frames_are_kept_small_by_their_penalty(folder: Path) -> None:
    """The codes enter less their mean; what the penalty weighs is their mean square, and its gradient shrinks them."""
    task = NeRFaceTask(small(*MLP, "avatar_learning.frame_code_penalty=0.5"), FrameStore(folder, 32))
    codes = task.module.codes_NL
    with torch.no_grad():
        codes.copy_(torch.randn(codes.shape, generator=torch.Generator().manual_seed(0)) + 3)
    batch = task.batches(0)
    terms = task.losses(batch, 0)
    centred = codes - codes.mean(0)
    expected = centred[batch.frames.index_B].square().mean()
    torch.testing.assert_close(terms["codes"], expected)
    torch.testing.assert_close(terms["total"], terms["coarse"] + terms["fine"] + 0.5 * expected)


def test_rays_meet_the_pixels_they_are_compared_with(folder: Path) -> None:
    """A field of one colour has the loss of that colour against the pixels drawn, and nothing else."""
    task = NeRFaceTask(
        small(*MLP, "avatar.density_bias=50", "avatar.missed_near_far=[3.5, 4.5]"), FrameStore(folder, 32)
    )
    with torch.no_grad():
        for field in (task.avatar.coarse, task.avatar.fine):
            torch.nn.init.zeros_(field.out.weight)
            field.out.bias.copy_(torch.tensor([20.0, -20.0, 0.0]))
    batch = task.batches(0)
    image, (rows, columns) = batch.frames.image_B3HW, batch.pixel_BR2.unbind(-1)
    seen = torch.stack([p[:, r, c] for p, r, c in zip(image, rows, columns, strict=True)])
    color = torch.tensor([1.0, 0.0, 0.5])[None, :, None]
    terms = task.losses(batch, 0)
    assert float(terms["fine"]) == pytest.approx(float((seen - color).square().mean()), rel=1e-3)
