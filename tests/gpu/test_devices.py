"""Both models of each recipe take a step, on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavatar.configs.recipe import load_recipe
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.preprocess import preprocess
from lavatar.training.avatar import AvatarTask
from lavatar.training.batch import to_device
from lavatar.training.pair import YNetTask

SMALL = [
    "preprocess.portrait_size=64", "preprocess.face_size=32", "preprocess.synthetic_frames=40",
    "avatar.image_size=32", "avatar.ray_size=8", "avatar.samples=4", "avatar.face_size=32", "avatar.code_dim=8",
    "avatar.encoder_widths=[8, 8]", "avatar.triplane_size=16", "avatar.triplane_channels=6",
    "avatar.generator_capacity=9", "avatar.generator_max_channels=24", "avatar.density_hidden=8",
    "avatar.color_hidden=8", "avatar.feature_channels=8", "avatar.superresolution_capacity=4",
    "avatar_loss.lambda_vgg=0", "avatar_training.batch_size=2", "ynet.face_size=32", "ynet.code_dim=8",
    "ynet.encoder_widths=[8, 8]", "ynet.neck_width=8", "ynet.decoder_widths=[8, 8]", "ynet_training.batch_size=2",
    "mapping.hidden=[]", "resources.avatar.gpus=0",
]  # fmt: skip


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


@pytest.mark.parametrize("name", ["tiny", "paper", "official"])
def test_a_step_of_each_model(folders: list[Path], device: torch.device, name: str) -> None:
    recipe = load_recipe(name, [*SMALL, *(["avatar.encoder_mapping=[8, 8]"] if name == "official" else [])])
    stores = [FrameStore(folder, recipe.avatar.image_size) for folder in folders]
    avatar = AvatarTask(recipe, stores[0])
    pair = YNetTask(recipe, stores[0], stores[1], avatar.avatar.eval() if recipe.mapping.joint else None)
    for task in (avatar, pair):
        task.module.to(device)
        total = task.losses(to_device(task.batches(0), device), 0)["total"]  # type: ignore[attr-defined]
        total.backward()
        assert total.device.type == device.type
        assert bool(total.isfinite())
