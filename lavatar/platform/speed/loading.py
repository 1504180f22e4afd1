"""Row loader: frames from the tars against what a step of training takes for them."""

from __future__ import annotations

import numpy as np

from lavatar.configs.recipe import load_recipe
from lavatar.platform.speed.material import SIDE
from lavatar.platform.speed.measure import Row, Session
from lavatar.platform.speed.models import stepping, vgg
from lavatar.training.avatar import AvatarTask
from lavatar.training.optimizer import build_optimizer


def loader(session: Session) -> list[Row]:
    """All frames once, decoded, and once more out of the cache; a step of `tiny` (on a GPU `official`) beside them."""
    name = "official" if session.device.type == "cuda" else "tiny"
    recipe = load_recipe(name, ["avatar_learning.progressive=0"])
    config, size = recipe.avatar_training, recipe.avatar.image_size
    perceptual = vgg(session.device) if recipe.avatar_loss.lambda_vgg > 0 else None
    store = session.material.store(size)
    task = AvatarTask(recipe, session.material.store(size), perceptual=perceptual)
    step = stepping(session, task, config, lambda task: build_optimizer(task.param_groups(), task.module, config))
    count = len(store)
    parts = [np.arange(i, min(i + config.batch_size, count)) for i in range(0, count, config.batch_size)]

    def load() -> None:
        for part in parts:
            store.batch(part)

    def decode() -> None:
        store.close()
        load()

    def consume() -> None:
        for _ in parts:
            step()

    seen = f"a sample, {SIDE}² to {size}², a step of `{name}` takes {config.batch_size}"
    rows = [
        session.row(Row("loader", f"{seen}; decoded"), decode, consume, units=count),
        session.row(Row("loader cached", f"{seen}; in memory"), load, consume, units=count),
    ]
    store.close()
    return rows
