"""The avatar's training task: its beginning, its batches, its losses, and that the code drives the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lavatar.cluster.bodies import avatar_plan
from lavatar.cluster.plans import Worker
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, StageKind, StageSpec
from lavatar.datasets.loader import FrameStore
from lavatar.errors import Interrupted
from lavatar.models.encoder_whitened import WhitenedEncoder
from lavatar.training.avatar import AvatarTask
from lavatar.training.emphasis import feature_weights
from lavatar.training.engine import TorchEngine
from lavatar.training.loop import train
from lavatar.training.optimizer import build_optimizer
from lavatar.training.tasks import TrainingTask
from lavatar.training.warmstart import density_planes, relief
from tests.unit.dataset_files import make_dataset

SMALL = [
    "avatar.image_size=32", "avatar.ray_size=8", "avatar.samples=6", "avatar.face_size=24", "avatar.code_dim=4",
    "avatar.encoder_widths=[4,8]", "avatar.basis_count=4", "avatar.triplane_size=16", "avatar.triplane_channels=6",
    "avatar.density_hidden=12", "avatar.feature_channels=6", "avatar.superresolution_capacity=2",
    "avatar_training.batch_size=4",
]  # fmt: skip


def small(*more: str) -> Recipe:
    return load_recipe("tiny", [*SMALL, *more])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    folder: Path = tmp_path_factory.mktemp("shards")
    make_dataset(folder)
    return FrameStore(folder, 32)


@pytest.fixture
def task(store: FrameStore) -> AvatarTask:
    return AvatarTask(small("avatar_learning.rate_pose=0.1"), store)


def test_the_task_keeps_the_protocol_and_groups_each_parameter_once(task: AvatarTask) -> None:
    assert isinstance(task, TrainingTask)
    groups = task.param_groups()
    assert [g["name"] for g in groups] == ["encoder", "planes", "basis", "decoder", "pose"]
    assert sum(len(g["params"]) for g in groups) == len(list(task.module.parameters()))
    assert groups[1]["lr"] == pytest.approx(4 * groups[3]["lr"])


def test_the_code_begins_white_over_the_training_frames(task: AvatarTask, store: FrameStore) -> None:
    frames = task.sampler.indices(0).tolist()
    for step in range(1, 128):
        frames += task.sampler.indices(step).tolist()
    with torch.no_grad():
        theta = task.avatar.encode(store.batch(frames).face_B3HW)
    covariance = torch.cov(theta.T)
    assert torch.allclose(theta.mean(0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(covariance, torch.eye(4), atol=2e-2)


def test_what_differs_between_subjects_is_no_part_of_the_beginning() -> None:
    torch.manual_seed(0)
    encoder = WhitenedEncoder(small().avatar)
    one, two = torch.rand(30, 3, 24, 24) * 0.3, torch.rand(30, 3, 24, 24) * 0.3 + 0.6
    encoder.begin_with(one, two)
    with torch.no_grad():
        within = encoder(one).std(0)
    assert float(within.min()) > 0.3


def test_batches_and_losses_are_functions_of_the_step(store: FrameStore) -> None:
    first, second = AvatarTask(small(), store), AvatarTask(small(), store)
    a, b = first.batches(7), second.batches(7)
    assert a.frames.keys == b.frames.keys
    assert torch.equal(a.input_B3HH, b.input_B3HH)
    assert not torch.equal(a.input_B3HH, first.batches(8).input_B3HH)
    torch.manual_seed(1)
    loss_a = first.losses(a, 7)["total"]
    torch.manual_seed(1)
    assert torch.equal(loss_a, second.losses(b, 7)["total"])


def test_training_lowers_the_loss_and_reaches_every_parameter(task: AvatarTask) -> None:
    optimizer = build_optimizer(task.param_groups(), task.module, task.training)
    totals = []
    for step in range(30):
        total = task.losses(task.batches(step), step)["total"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        totals.append(float(total))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in task.module.parameters())
    assert sum(totals[-5:]) < 0.95 * sum(totals[:5])  # pictures of noise: little can be learned in so few steps


def test_the_warm_start_already_draws_the_frames(store: FrameStore) -> None:
    batch = store.batch(range(len(store)))
    error = {}
    for planes in (4, 3):  # three channels have no room for density and colour: no warm start
        task = AvatarTask(small(f"avatar.triplane_channels={planes}"), store)
        task.module.eval()
        with torch.no_grad():
            theta = task.avatar.encode(batch.face_B3HW)
            drawn = task.avatar.render(theta, batch.rotation_B33, batch.translation_B3, batch.scale_B)
        error[planes] = float((drawn.I_hr - batch.image_B3HW).square().mean())
    assert error[4] < error[3]


def test_density_begins_as_an_ellipsoid_and_what_the_mask_adds() -> None:
    box = ((-1.5, 1.5), (-1.8, 1.8), (-1.9, 1.1))
    planes = density_planes(torch.zeros(9, 9), box)
    corner, middle = planes[0, 0, 0] + planes[1, 4, 0] + planes[2, 4, 0], planes[0, 4, 4]
    assert float(middle) > 3
    assert float(corner) <= -4
    assert float(density_planes(torch.ones(9, 9), box)[0, 0, 0]) == pytest.approx(4)
    assert float(relief(9, box)[4, 4, 2]) > float(relief(9, box)[4, 0, 2])  # the middle is nearer to the viewer


def test_a_pose_correction_turns_the_head_and_nothing_else(task: AvatarTask) -> None:
    correction = task.module.correction
    assert correction is not None
    with torch.no_grad():
        correction.values[3] = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0])
    identity, zero, one = torch.eye(3).expand(2, 3, 3), torch.zeros(2, 3), torch.ones(2)
    rotation, translation = correction(torch.tensor([0, 3]), identity, zero, one)
    assert torch.allclose(rotation[0], torch.eye(3))
    assert torch.allclose(translation, zero)
    assert float(rotation[1, 1, 0]) == pytest.approx(0.0998, abs=1e-3)


def test_eyes_and_mouth_weigh_more() -> None:
    landmarks = torch.full((1, 68, 2), 0.5)
    landmarks[0, 48:68, 0] = torch.linspace(0.4, 0.6, 20)
    landmarks[0, 48:68, 1] = 0.8
    weights = feature_weights(landmarks, 40, 8.0)
    assert weights.shape == (1, 1, 40, 40)
    assert float(weights[0, 0, 32, 20]) > 7
    assert float(weights[0, 0, 2, 2]) == pytest.approx(1, abs=0.05)


def test_the_published_networks_train_through_the_same_task(store: FrameStore) -> None:
    overrides = ["avatar.encoder=strided", "avatar.generator=stylegan", "avatar.superresolution=unet"]
    overrides += ["avatar.generator_capacity=4", "avatar.generator_max_channels=8", "avatar_learning.rate_pose=0"]
    task = AvatarTask(small(*overrides), store)
    assert [g["name"] for g in task.param_groups()] == ["encoder", "decoder"]
    terms = task.losses(task.batches(0), 0)
    assert set(terms) == {"l1", "lr", "mask", "total"}
    terms["total"].backward()


def test_pictures_show_truth_above_result(task: AvatarTask) -> None:
    picture = task.pictures(0)["truth_above_result"]
    assert picture.shape == (64, 128, 3)
    assert picture.dtype == "uint8"


def test_the_perceptual_term_of_eq4_reaches_the_avatar(
    store: FrameStore, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(weights))
    chosen = small("avatar_loss.lambda_vgg=0.1")
    (phase,) = avatar_plan(_spec(chosen, store), NullSink()).phases  # with VGG from the weights' file
    task = phase.build([], Worker())
    terms = task.losses(task.batches(0), 0)
    config = chosen.avatar_loss
    parts = terms["l1"] + config.lambda_lr * terms["lr"] + config.lambda_mask * terms["mask"] + 0.1 * terms["vgg"]
    assert float(terms["total"]) == pytest.approx(float(parts), rel=1e-5)
    assert 0 < float(terms["vgg"]) < 2
    gradient = torch.autograd.grad(terms["vgg"], task.avatar.generator.planes)[0]
    assert bool(gradient.isfinite().all())
    assert gradient.abs().max() > 0


def _spec(recipe: Recipe, store: FrameStore) -> StageSpec:
    """The avatar stage on the store's dataset."""
    dump, folder = recipe.model_dump(mode="json"), store.folder
    return StageSpec(StageKind.AVATAR, "avatar:ada", "k" * 64, folder, folder / "out", {"dataset": folder}, dump)


def test_a_stopped_training_goes_on_as_if_it_had_never_stopped(store: FrameStore, tmp_path: Path) -> None:
    def run(folder: str, stop_after: int | None = None) -> dict[str, torch.Tensor]:
        config = small("avatar_training.steps=6", "avatar_training.checkpoint_every=2").avatar_training
        own = AvatarTask(small(), store)
        engine = TorchEngine(own.module, build_optimizer(own.param_groups(), own.module, config), config)
        calls = iter(range(100))
        train(own, config, engine, tmp_path / folder, stop=lambda: next(calls) + 1 == stop_after)
        return dict(own.module.state_dict())

    whole = run("whole")
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        run("parts", stop_after=3)
    for name, value in run("parts").items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("frames", [0, 1, 3])
def test_a_batch_in_parts_is_the_same_step(store: FrameStore, tmp_path: Path, parts: int, frames: int) -> None:
    """With points at random along the rays, noise on the density, and a perceptual term that sees some frames only."""

    def run(count: int) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        sets = ("avatar.sampling=stratified", "avatar.density_noise=0.5", "avatar_loss.lambda_vgg=0.3")
        recipe = small(*sets, f"avatar_learning.perceptual_frames={frames}", "avatar_training.steps=1")
        config = recipe.avatar_training.model_copy(update={"accumulation": count})
        own = AvatarTask(recipe, store, perceptual=lambda drawn, image: (drawn - image).square().mean((1, 2, 3)))
        engine = TorchEngine(own.module, build_optimizer(own.param_groups(), own.module, config), config)
        kept: list[torch.Tensor] = []
        own.avatar.generator.planes.register_hook(kept.append)
        found = train(own, config, engine, tmp_path / f"{parts} {count}").losses
        assert len(kept) == count
        return found, sum(kept, torch.zeros(())), torch.get_rng_state()

    (whole, gradient, state), (divided, sums, after) = run(1), run(parts)
    assert whole["vgg"] > 0
    assert divided == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(sums, gradient, rtol=1e-3, atol=1e-6)
    assert torch.equal(after, state), "and what is drawn next is the same"


def test_every_group_has_its_factor_of_the_rate_and_the_recipes_adam(store: FrameStore) -> None:
    changes = ["rate_planes=4", "rate_basis=3", "rate_encoder=0.5", "rate_pose=0.1", "beta2=0.97", "epsilon=1e-15"]
    task = AvatarTask(small("avatar_training.learning_rate=0.01", *(f"avatar_learning.{c}" for c in changes)), store)
    optimizer = build_optimizer(task.param_groups(), task.module, task.training)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"encoder": 0.005, "planes": 0.04, "basis": 0.03, "decoder": 0.01, "pose": 0.001})
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.97), 1e-15)}
    of_group = {g["name"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    assert of_group["planes"] == {id(task.avatar.generator.planes)}
    assert of_group["basis"] == {id(task.avatar.generator.basis)}
    assert of_group["encoder"] == {id(p) for p in task.avatar.encoder.parameters()}


def test_the_encoders_input_is_noisy_and_the_portrait_it_is_held_to_is_not(store: FrameStore) -> None:
    """Released: noise of deviation 0.05 on the encoder's input."""
    chosen = small("avatar.input_noise=0.05", "avatar_learning.shift=0", "avatar_learning.color=0")
    task = AvatarTask(chosen, store)
    batch = task.batches(2)
    noise = batch.input_B3HH - batch.frames.face_B3HW
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0, abs=0.003)
    assert torch.equal(batch.frames.image_B3HW, store.batch(task.sampler.indices(2)).image_B3HW)


def test_training_places_the_samples_of_a_ray_at_random(task: AvatarTask) -> None:
    batch = task.batches(0)
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        totals.append(task.losses(batch, 0)["total"].item())
    assert totals[0] == totals[1] != totals[2]


def test_a_correction_moves_along_the_cameras_axes_in_head_units_and_is_held_small(task: AvatarTask) -> None:
    """R' = exp(ω)·R and t' = t + scale·v; ω about the camera's z takes the camera's x to its y."""
    correction = task.module.correction
    assert correction is not None
    with torch.no_grad():
        correction.values[2] = torch.tensor([0.0, 0.0, torch.pi / 2, 0.5, -1.0, 2.0])
    frontal = torch.diag(torch.tensor([1.0, -1.0, -1.0]))[None]
    rotation, translation = correction(torch.tensor([2]), frontal, torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([0.1]))
    expected = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]])  # columns: head's x, y, z
    torch.testing.assert_close(rotation, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(translation, torch.tensor([[0.05, -0.1, 4.2]]))
    terms = task.losses(task.batches(0), 0)
    config, weight = task.recipe.avatar_loss, task.learning.pose_penalty
    parts = terms["l1"] + config.lambda_lr * terms["lr"] + config.lambda_mask * terms["mask"] + weight * terms["pose"]
    drawn = task.batches(0).frames.index_B
    assert terms["pose"].item() == pytest.approx(correction.values[drawn].square().mean().item())
    assert terms["total"].item() == pytest.approx(parts.item(), rel=1e-6)


def published(store: FrameStore, *more: str) -> AvatarTask:
    """The paper's networks and losses, small, with the noise of training."""
    sizes = [s for s in SMALL if not s.startswith("avatar.basis")]
    sizes += ["avatar.generator_capacity=4", "avatar.generator_max_channels=8", "avatar_loss.lambda_vgg=0"]
    return AvatarTask(load_recipe("paper", [*sizes, *more]), store)


def test_the_avatars_step_is_eq4_on_a_noisy_rendering_of_the_noisy_input(store: FrameStore) -> None:
    task = published(store, "avatar.input_noise=0.05", "avatar_loss.lambda_lr=0.3", "avatar_loss.lambda_mask=0.7")
    batch = task.batches(3)
    frames, avatar = batch.frames, task.avatar
    clean = frames.face_B3HW
    assert batch.input_B3HH.shape == clean.shape
    assert float((batch.input_B3HH - clean).std()) == pytest.approx(0.05, rel=0.05)
    torch.manual_seed(5)
    found = task.losses(batch, 3)
    torch.manual_seed(5)
    pose = (frames.rotation_B33, frames.translation_B3, frames.scale_B)
    drawn = avatar.render(avatar.encode(batch.input_B3HH), *pose, noise=True)
    image, mask = frames.image_B3HW, frames.mask_B1HW
    cells = [F.avg_pool2d(x, image.shape[-1] // drawn.M.shape[-1]) for x in (image, mask)]
    l1, lr = (drawn.I_hr - image).abs().mean(), (drawn.I_lr - cells[0]).abs().mean()
    torch.testing.assert_close(found["total"], l1 + 0.3 * lr + 0.7 * (drawn.M - cells[1]).square().mean())
    torch.manual_seed(6)
    assert not torch.equal(found["total"], task.losses(batch, 3)["total"]), "points along the rays are drawn anew"


def test_the_perceptual_term_is_in_every_step_of_the_paper(store: FrameStore) -> None:
    task = published(store, "avatar_loss.lambda_vgg=0.1")
    task.perceptual = lambda drawn, _image: drawn.new_full((len(drawn),), 2.0)
    for step in range(3):
        terms = task.losses(task.batches(step), step)
        rest = terms["l1"] + 0.1 * terms["lr"] + 0.1 * terms["mask"]
        assert float(terms["total"] - rest) == pytest.approx(0.2, abs=1e-5)
