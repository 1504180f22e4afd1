"""Released models: config.json and model.safetensors in a folder; no pickle. Read by lavatar.inference.loading.

config.json        format, kind ("avatar" or "pair"), subject(s), dataset digest(s), model configuration, SHA-256;
                   kind pair: also cold_errors, Eq. 5 over the steps of a training that began cold, to compare with
model.safetensors  kind avatar: state of LatentAvatar, and its training poses as poses.rotation / translation / scale
                   kind pair: state of the Y-network and the mapping MLP under ynet. and mapping.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.pair import YNetConfig
from lavatar.errors import CheckpointError
from lavatar.models.avatar import LatentAvatar
from lavatar.models.budget import Budget
from lavatar.models.mapping import MappingMLP
from lavatar.models.ynet import SUBJECTS, Subject, YNetwork
from lavatar.training.avatar import AvatarTask
from lavatar.training.checkpoint import file_digest, write_json
from lavatar.training.errorcurve import ErrorCurve
from lavatar.training.mapping import MappingTask
from lavatar.training.nerface import NeRFaceTask
from lavatar.training.warmpair import ColdErrors, WarmPair
from lavatar.training.ynet import YNetTask

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_POSES = 2000


def write_avatar_release(folder: Path, task: AvatarTask | NeRFaceTask) -> None:
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


def write_pair_release(
    folder: Path, ynet: YNetTask, mapping: MappingTask | None, pair: tuple[Subject, Subject] = SUBJECTS
) -> None:
    """The trained Y-network and mapping MLP. `mapping` is None where it was trained jointly, inside `ynet`.

    `pair`: which subjects of a network of many become avatar and actor.
    """
    bridge = mapping.module if mapping is not None else ynet.module.mapping
    assert bridge is not None
    tensors = {f"ynet.{name}": value for name, value in ynet_of_pair(ynet.ynet, pair).items()}
    tensors |= {f"mapping.{name}": value for name, value in mapping_of_pair(bridge, pair).items()}
    stores = {role: ynet.stores[subject] for role, subject in zip(SUBJECTS, pair, strict=True)}
    about = {
        "kind": "pair",
        "subjects": {role: store.manifest.subject for role, store in stores.items()},
        "datasets": {role: store.manifest.digest for role, store in stores.items()},
        "ynet": ynet.recipe.ynet.model_dump(mode="json"),
        "mapping": ynet.recipe.mapping.model_dump(mode="json"),
        "theta_dim": ynet.recipe.avatar.code_dim,
    }
    cold = cold_errors(ynet)
    if cold is not None:
        about["cold_errors"] = {"pair": cold.pair, **cold.curve.to_json()}
    _write(folder, tensors, about)


def write_shared_release(folder: Path, ynet: YNetTask, mappings: Iterable[MappingTask]) -> None:
    """A network of many subjects as releases of its pairs: folder/AVATAR/ACTOR, each complete."""
    for mapping in mappings:
        for actor in mapping.actors:
            own = folder / mapping.own / actor
            own.mkdir(parents=True)
            write_pair_release(own, ynet, mapping, (mapping.own, actor))


def ynet_of_pair(ynet: YNetwork, pair: tuple[Subject, Subject]) -> dict[str, Tensor]:
    """State of the Y-network of these two: the decoders of all others left out, these two's renamed."""
    roles = dict(zip(pair, SUBJECTS, strict=True))
    tensors = {}
    for name, value in ynet.state_dict().items():
        part, _, rest = name.partition(".")
        subject, _, inner = rest.partition(".")
        if part != "decoders":
            tensors[name] = value
        elif subject in roles:
            tensors[f"decoders.{roles[subject]}.{inner}"] = value
    return tensors


def mapping_of_pair(mapping: MappingMLP, pair: tuple[Subject, Subject]) -> dict[str, Tensor]:
    """State of the mapping MLP with the statistics of these two alone."""
    rows = [mapping.subjects.index(subject) for subject in pair]
    chosen = {"mean_2F": mapping.mean_2F[rows], "deviation_2F": mapping.deviation_2F[rows]}
    return {**mapping.state_dict(), **chosen}


def _write(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Weights, then the configuration that carries their checksum."""
    path = folder / WEIGHTS
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    write_json(folder / CONFIG, {"format": FORMAT, **about, "weights": {"file": WEIGHTS, "sha256": file_digest(path)}})


def cold_errors(ynet: YNetTask) -> ColdErrors | None:
    """A pair's own errors if it began cold, else those of the pair it began at: its own show what that one knew."""
    if ynet.warm is not None:
        return ynet.warm.cold
    names = {subject: store.manifest.subject for subject, store in ynet.stores.items()}
    return ColdErrors(pair_name(names), ynet.errors) if ynet.errors.steps and ynet.subjects == SUBJECTS else None


def pair_name(subjects: Mapping[Any, str]) -> str:
    """ "avatar<-actor"."""
    return f"{subjects['avatar']}<-{subjects['actor']}"


def read_frozen_avatar(folder: Path) -> LatentAvatar:
    """The avatar of a release, frozen, for what is trained against it (Eq. 8). Raises CheckpointError."""
    try:
        config, tensors = _read(folder)
        architecture = AvatarConfig.model_validate(config["avatar"])
        with Budget(tensors):
            avatar = LatentAvatar(architecture)
        avatar.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("poses.")})
    except READ_ERRORS as error:
        raise CheckpointError(
            f"the avatar in {folder} cannot be used: {error}", "Submit again: it is trained anew if it is damaged."
        ) from None
    return avatar.eval().requires_grad_(False)


def read_warm_pair(folder: Path) -> WarmPair:
    """The pair of a release, for another one to begin at. Raises CheckpointError."""
    try:
        config, tensors = _read(folder)
        state = {k.removeprefix("ynet."): v for k, v in tensors.items() if k.startswith("ynet.")}
        kept = config.get("cold_errors")
        cold = ColdErrors(str(kept["pair"]), ErrorCurve.from_json(kept)) if kept else None
        return WarmPair(pair_name(config["subjects"]), YNetConfig.model_validate(config["ynet"]), state, cold)
    except READ_ERRORS as error:
        raise CheckpointError(
            f"the pair in {folder} cannot be begun at: {error}", "Submit again, with --cold if this comes back."
        ) from None


READ_ERRORS = (
    OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError, safetensors.SafetensorError
)  # fmt: skip
"""What a damaged, incomplete or foreign release raises."""


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights, after the checksum was compared."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if config["weights"]["sha256"] != file_digest(folder / WEIGHTS):
        raise ValueError(f"{WEIGHTS} does not have its checksum")
    return config, safetensors.torch.load_file(folder / WEIGHTS)
