"""Stages small enough to train in a test, of real parts: a synthetic subject of 40 frames, an avatar of 32 pixels."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from lavatar.cluster.stages import StageHandle, StageRunner
from lavatar.configs.avatar import AvatarConfig, AvatarLossConfig
from lavatar.configs.pair import YNetConfig
from lavatar.configs.preprocess import PreprocessConfig
from lavatar.configs.recipe import Recipe
from lavatar.configs.resources import ResourcesConfig, StageResources
from lavatar.configs.training import TrainingConfig
from lavatar.contracts import Event, StageKind, StageResult, StageSpec, VideoSource


def small_recipe(steps: int = 8, frames: int = 40, **training: Any) -> Recipe:
    """A few seconds of everything on one CPU."""
    settings = {"batch_size": 2, "log_every": 1, "checkpoint_every": 4, "picture_every": 100, "cache_mb": 64}
    return Recipe(
        name="test",
        preprocess=PreprocessConfig(portrait_size=64, face_size=32, segment_frames=10, synthetic_frames=frames),
        avatar=AvatarConfig(
            image_size=32, ray_size=16, samples=4, triplane_size=16, triplane_channels=4, face_size=32, code_dim=16
        ),
        ynet=YNetConfig(face_size=32),
        avatar_loss=AvatarLossConfig(lambda_vgg=0),
        avatar_training=TrainingConfig(steps=steps, **{**settings, **training}),
        resources=ResourcesConfig(preprocess=StageResources(cpus=1), avatar=StageResources(cpus=1)),
    )


def dataset_spec(home: Path, seed: int, recipe: Recipe, name: str = "anna") -> StageSpec:
    """Preprocessing of a synthetic subject."""
    key = hashlib.sha256(f"{seed}{recipe.preprocess}".encode()).hexdigest()
    source = VideoSource(name, synthetic_seed=seed)
    dump = recipe.model_dump(mode="json")
    kind = StageKind.PREPROCESS
    return StageSpec(kind, f"preprocess:{name}", key, home, home / "shards" / key, {}, dump, {"subject": source})


def avatar_spec(home: Path, dataset: Path, recipe: Recipe, name: str = "anna") -> StageSpec:
    """The avatar of a finished dataset."""
    key = hashlib.sha256(f"{dataset}{recipe.avatar_training}".encode()).hexdigest()
    dump, folder = recipe.model_dump(mode="json"), home / "checkpoints" / key
    return StageSpec(StageKind.AVATAR, f"avatar:{name}", key, home, folder, {"dataset": dataset}, dump)


def watch(handle: StageHandle, seconds: float = 120) -> list[Event]:
    """All events until the stage ended."""
    seen: list[Event] = []
    deadline = time.monotonic() + seconds
    while True:
        over = handle.done()
        seen += handle.poll()
        if over:
            return seen
        assert time.monotonic() < deadline, f"not done after {seconds} s: {seen[-3:]}"
        time.sleep(0.1)


def run(runner: StageRunner, spec: StageSpec) -> tuple[StageResult, list[Event]]:
    """The stage's result and all that it said."""
    handle = runner.start(spec)
    seen = watch(handle)
    return handle.result(), seen
