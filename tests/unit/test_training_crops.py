"""Which part of the pictures a step draws, and that drawing a part is drawing the whole and cutting it out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lavatar.configs.recipe import load_recipe
from lavatar.datasets.loader import FrameStore
from lavatar.models.losses import coarse
from lavatar.models.rendering import View
from lavatar.training.augmentation import generator_for
from lavatar.training.avatar import AvatarTask
from lavatar.training.average import WeightAverage
from lavatar.training.crops import SeenFrames, draw_view, seen_through
from tests.unit.dataset_files import make_dataset
from tests.unit.test_training_avatar import small


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    folder: Path = tmp_path_factory.mktemp("shards")
    make_dataset(folder)
    return FrameStore(folder, 32)


def drawn(task: AvatarTask, store: FrameStore, view: View | None) -> Tensor:
    batch = store.batch([0, 1])
    task.module.eval()
    with torch.no_grad():
        theta = task.avatar.encode(batch.face_B3HW)
        return task.avatar.render(theta, batch.rotation_B33, batch.translation_B3, batch.scale_B, view=view).I_F


def test_a_square_is_cut_out_of_the_whole_picture(store: FrameStore) -> None:
    task = AvatarTask(small(), store)
    whole = drawn(task, store, None)
    part = drawn(task, store, View(8, 4, torch.tensor([[1, 3], [4, 0]])))
    assert torch.allclose(part[0], whole[0, :, 1:5, 3:7], atol=1e-5)
    assert torch.allclose(part[1], whole[1, :, 4:8, 0:4], atol=1e-5)
    assert not torch.allclose(part[0], whole[0, :, 3:7, 1:5], atol=1e-5)


def test_the_truth_is_seen_through_the_same_square(store: FrameStore) -> None:
    config = small().avatar
    image = store.batch([0, 1]).image_B3HW
    seen = seen_through(View(8, 4, torch.tensor([[1, 3], [4, 0]])), config, SeenFrames(image, image[:, :1], None))
    assert torch.equal(seen.image_B3ss[0], image[0, :, 4:20, 12:28])
    assert torch.equal(seen.mask_B1ss[1], image[1, :1, 16:32, 0:16])
    assert torch.equal(coarse(seen.image_B3ss, 4)[0], coarse(image, 8)[0, :, 1:5, 3:7])


def test_half_the_resolution_is_the_mean_of_four_pixels(store: FrameStore) -> None:
    image = store.batch([0]).image_B3HW
    seen = seen_through(View(4, 4), small().avatar, SeenFrames(image, image[:, :1], image[:, :1]))
    assert torch.allclose(seen.image_B3ss[0, :, 0, 0], image[0, :, :2, :2].mean((1, 2)))
    assert seen.weight_B1ss is not None
    assert seen.weight_B1ss.shape == (1, 1, 16, 16)


def test_views_follow_the_recipe_and_repeat() -> None:
    recipe = load_recipe(
        "tiny", ["avatar_learning.crop=0.75", "avatar_learning.progressive=0.25", "avatar_training.steps=400"]
    )
    marks = torch.full((4, 68, 2), 0.1)  # a face at the picture's corner: squares are kept inside
    views = [draw_view(step, marks, recipe, generator_for(0, step)) for step in range(400)]
    assert all(view == View(32, 32) for view in views[:100])
    squares = [view for view in views[100:] if view.corner_B2 is not None]
    assert 0.65 < len(squares) / 300 < 0.85
    assert all(view.side == 32 and bool((view.corner_B2 >= 0).all()) for view in squares)
    again = draw_view(399, marks, recipe, generator_for(0, 399))
    assert again.side == views[399].side
    assert (again.corner_B2 is None) == (views[399].corner_B2 is None)


def test_squares_lie_on_the_face() -> None:
    recipe = load_recipe("tiny", ["avatar_learning.crop=1", "avatar_learning.progressive=0"])
    marks = torch.full((64, 68, 2), 0.5)
    corner = draw_view(5, marks, recipe, generator_for(0, 5)).corner_B2
    assert corner is not None
    centre = (corner.float() + 16) / 64
    assert float((centre - 0.5).abs().max()) <= 0.14
    assert float(centre.std()) > 0.03


def test_training_on_squares_lowers_the_loss_of_whole_pictures(store: FrameStore) -> None:
    task = AvatarTask(small("avatar_learning.crop=1", "avatar_learning.progressive=0.01"), store)
    terms = task.losses(task.batches(900), 900)
    assert task.batches(900).view.side == 4
    terms["total"].backward()
    assert all(p.grad is not None for p in task.avatar.parameters())


def test_the_running_mean_of_weights_is_what_its_formula_says_and_is_released(store: FrameStore) -> None:
    task = AvatarTask(small("avatar_learning.average=0.9"), store)
    assert task.average is not None
    name, parameter = next(iter(task.avatar.named_parameters()))
    expected = parameter.detach().clone()
    for step in range(30):
        with torch.no_grad():
            parameter.add_(1.0)
        task.after_step(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    assert torch.allclose(task.released()[name], expected, atol=1e-4)
    assert not torch.allclose(task.released()[name], parameter)
    other = WeightAverage(task.avatar, 0.9)
    other.take(task.state())
    assert torch.equal(other.values[name], task.released()[name])


def test_the_perceptual_term_is_seen_at_some_steps_and_on_some_frames(store: FrameStore) -> None:
    recipe = small(
        "avatar_loss.lambda_vgg=0.1", "avatar_learning.perceptual_every=4", "avatar_learning.perceptual_frames=1"
    )
    seen: list[int] = []

    def perceptual(drawn: Tensor, image: Tensor) -> Tensor:
        seen.append(len(drawn))
        return (drawn - image).square().mean((1, 2, 3))

    task = AvatarTask(recipe, store, perceptual=perceptual)
    terms = [task.losses(task.batches(step), step) for step in range(9)]
    assert seen == [1, 1, 1]
    assert ["vgg" in t for t in terms] == [step % 4 == 0 for step in range(9)]
