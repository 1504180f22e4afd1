"""The models of each recipe take steps, on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lavatar.cluster.memory import out_of_memory
from lavatar.configs.recipe import load_recipe, recipe_names
from lavatar.configs.training import TrainingConfig
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.preprocess import preprocess
from lavatar.models.ssim import ssim
from lavatar.training.avatar import AvatarTask
from lavatar.training.batch import to_device
from lavatar.training.engine import TorchEngine
from lavatar.training.mapping import MappingTask
from lavatar.training.optimizer import build_optimizer
from lavatar.training.prefetch import Prefetch
from lavatar.training.tasks import TrainingTask
from lavatar.training.ynet import YNetTask

SMALL = [
    "preprocess.portrait_size=64", "preprocess.face_size=32", "preprocess.synthetic_frames=40",
    "avatar.image_size=32", "avatar.ray_size=8", "avatar.samples=4", "avatar.face_size=32", "avatar.code_dim=8",
    "avatar.encoder_widths=[8, 8]", "avatar.triplane_size=16", "avatar.triplane_channels=6", "avatar.basis_count=4",
    "avatar.generator_capacity=9", "avatar.generator_max_channels=24", "avatar.density_hidden=8",
    "avatar.color_hidden=8", "avatar.feature_channels=8", "avatar.superresolution_capacity=4",
    "avatar_loss.lambda_vgg=0", "avatar_training.batch_size=2", "ynet.face_size=32", "ynet.code_dim=8",
    "ynet.encoder_widths=[8, 8]", "ynet.neck_width=8", "ynet.decoder_widths=[8, 8]", "ynet_training.batch_size=2",
    "mapping_training.batch_size=2", "mapping.hidden=[]", "resources.avatar.gpus=0",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The nets here are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for name, seed in (("ada", 1), ("ben", 2)):
        folder = tmp_path_factory.mktemp(name) / "shards"
        config = load_recipe("tiny", SMALL).preprocess
        preprocess(
            VideoSource(name, synthetic_seed=seed),
            config,
            folder,
            parallel=map,
            events=NullSink(),
            stage=name,  # type: ignore[arg-type]
        )
        made.append(folder)
    return made


@pytest.mark.parametrize("name", recipe_names())
def test_steps_of_each_model(folders: list[Path], device: torch.device, name: str) -> None:
    recipe = load_recipe(name, [*SMALL, *(["avatar.encoder_mapping=[8, 8]"] if name == "official" else [])])
    stores = [FrameStore(folder, recipe.avatar.image_size) for folder in folders]
    avatar = AvatarTask(recipe, stores[0])
    take_steps(avatar, recipe.avatar_training, device)
    head = avatar.avatar.eval().to("cpu")  # the pair reads it from a release
    pair = YNetTask(recipe, {"avatar": stores[0], "actor": stores[1]}, head if recipe.mapping.joint else None)
    take_steps(pair, recipe.ynet_training, device)
    if not recipe.mapping.joint:
        take_steps(MappingTask(recipe, pair, head), recipe.mapping_training, device)


def take_steps(task: TrainingTask, config: TrainingConfig, device: torch.device) -> None:
    """Three steps of the engine: every loss is a number on the device, and every group that was active has moved."""
    optimizer = build_optimizer(task.param_groups(), task.module, config)
    engine = TorchEngine(task.module, optimizer, config, device)
    before = {name: [p.detach().clone() for p in group] for name, group in optimizer.parameters_by_group().items()}
    moved = set()
    for step in range(3):
        active = task.active_groups(step)
        optimizer.activate(active)
        batch = to_device(task.batches(step), device)
        terms = engine.step(lambda _part, batch=batch, step=step: task.losses(batch, step))  # type: ignore[misc]
        task.after_step(step)
        moved |= active
        assert all(term.device.type == device.type for term in terms.values())
        assert all(bool(term.isfinite()) for term in terms.values())
    for name, group in optimizer.parameters_by_group().items():
        same = all(torch.equal(a.to(device), b) for a, b in zip(before[name], group, strict=True))
        assert same == (name not in moved), name


def test_figures_do_not_depend_on_how_products_are_rounded(device: torch.device) -> None:
    """SSIM with TF32 allowed, as on the CPU without."""
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(2, 3, 64, 64, generator=generator)
    b = 0.95 * a + 0.05 * torch.rand(2, 3, 64, 64, generator=generator)
    expected, before = ssim(a, b), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        torch.testing.assert_close(ssim(a.to(device), b.to(device)).cpu(), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_batches_made_ahead_are_those_of_their_steps(device: torch.device) -> None:
    """In any order of asking; what fails in the making is raised where the batch is wanted."""

    def make(step: int) -> dict[str, torch.Tensor]:
        if step == 5:
            raise ValueError("no batch 5")
        return {"x": torch.full((3,), float(step))}

    with contextlib.closing(Prefetch(make, device, 7)) as batches:
        for step in (0, 1, 2, 4, 6):
            found = batches.batch(step)["x"]
            assert found.device.type == device.type
            assert found.tolist() == [float(step)] * 3
        with pytest.raises(ValueError, match="no batch 5"):
            batches.batch(5)


def test_more_than_the_device_has_counts_as_out_of_memory(device: torch.device) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=device)
    assert out_of_memory(caught.value)
