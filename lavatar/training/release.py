"""Released models: config.json and model.safetensors in a folder; no pickle. Read by lavatar.inference.loading.

config.json        format, kind ("avatar" or "pair"), subject(s), dataset digest(s), model configuration, SHA-256
model.safetensors  kind avatar: state of LatentAvatar, and its training poses as poses.rotation / translation / scale
                   kind pair: state of the Y-network and the mapping MLP under ynet. and mapping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.errors import CheckpointError
from lavatar.models.avatar import LatentAvatar
from lavatar.training.avatar import AvatarTask
from lavatar.training.checkpoint import file_digest, write_json
from lavatar.training.pair import MappingTask, YNetTask

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_POSES = 2000


def write_avatar_release(folder: Path, task: AvatarTask) -> None:
    """The trained latent head NeRF, and the head poses it was trained on (at most 2,000, evenly spread)."""
    store = task.store
    rows = np.unique(np.linspace(0, len(store) - 1, min(len(store), MOST_POSES)).round().astype(int))
    poses = {"rotation": store.rotation_N33, "translation": store.translation_N3, "scale": store.scale_N}
    tensors = task.released()
    tensors |= {f"poses.{name}": torch.from_numpy(np.ascontiguousarray(value[rows])) for name, value in poses.items()}
    about = {
        "kind": "avatar",
        "subject": store.manifest.subject,
        "dataset": store.manifest.digest,
        "avatar": task.recipe.avatar.model_dump(mode="json"),
    }
    _write(folder, tensors, about)


def write_pair_release(folder: Path, ynet: YNetTask, mapping: MappingTask | None) -> None:
    """The trained Y-network and mapping MLP. `mapping` is None where it was trained jointly, inside `ynet`."""
    bridge = mapping.module if mapping is not None else ynet.module.mapping
    assert bridge is not None
    tensors = {f"ynet.{name}": value for name, value in ynet.module.ynet.state_dict().items()}
    tensors |= {f"mapping.{name}": value for name, value in bridge.state_dict().items()}
    stores = ynet.stores
    about = {
        "kind": "pair",
        "subjects": {role: store.manifest.subject for role, store in stores.items()},
        "datasets": {role: store.manifest.digest for role, store in stores.items()},
        "ynet": ynet.recipe.ynet.model_dump(mode="json"),
        "mapping": ynet.recipe.mapping.model_dump(mode="json"),
        "theta_dim": ynet.recipe.avatar.code_dim,
    }
    _write(folder, tensors, about)


def _write(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Weights, then the configuration that carries their checksum."""
    path = folder / WEIGHTS
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    write_json(folder / CONFIG, {"format": FORMAT, **about, "weights": {"file": WEIGHTS, "sha256": file_digest(path)}})


def read_frozen_avatar(folder: Path) -> LatentAvatar:
    """The avatar of a release, frozen, for what is trained against it (Eq. 8). Raises CheckpointError."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config["weights"]["sha256"] != file_digest(folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} does not have its checksum")
        avatar = LatentAvatar(AvatarConfig.model_validate(config["avatar"]))
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        avatar.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("poses.")})
    except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"the avatar in {folder} cannot be used: {error}", "Submit again: it is trained anew if it is damaged."
        ) from None
    return avatar.eval().requires_grad_(False)
