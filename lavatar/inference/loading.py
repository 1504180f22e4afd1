"""Released models back from their folders: config.json and model.safetensors, nothing that can run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.pair import MappingConfig, YNetConfig
from lavatar.configs.recipe import describe
from lavatar.configs.yamltext import MOST_CHARACTERS
from lavatar.errors import DataError
from lavatar.inference.pictures import to_tensor
from lavatar.inference.retarget import PoseStatistics, PoseTrack
from lavatar.models.avatar import LatentAvatar
from lavatar.models.budget import Budget, TooLargeError
from lavatar.models.mapping import MappingMLP
from lavatar.models.nerface import NeRFace
from lavatar.models.ynet import YNetwork

FORMAT = 1
FIELDS: Mapping[str, type[LatentAvatar | NeRFace]] = {"triplane": LatentAvatar, "mlp": NeRFace}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HINT = "Run `lavatar submit` again: it trains what is missing and keeps the rest."


@dataclass(frozen=True)
class Avatar:
    """A trained latent head NeRF, ready to draw."""

    model: LatentAvatar | NeRFace
    config: AvatarConfig
    subject: str
    dataset: str  # digest of the dataset it was trained on
    poses: PoseStatistics
    device: torch.device

    def face_input(self, faces_BhW3: np.ndarray) -> Tensor:
        """Face crops, uint8, as the encoder takes them."""
        return as_input(faces_BhW3, self.config.face_size, self.device)


@dataclass(frozen=True)
class Pair:
    """A trained Y-network and mapping MLP: what drives one avatar by one actor."""

    ynet: YNetwork
    mapping: MappingMLP
    theta_dim: int  # of the avatar's code
    face_size: int
    avatar: str
    actor: str
    device: torch.device

    def face_input(self, faces_BhW3: np.ndarray) -> Tensor:
        """Face crops, uint8, as E_shared takes them."""
        return as_input(faces_BhW3, self.face_size, self.device)


def as_input(faces_BhW3: np.ndarray, size: int, device: torch.device) -> Tensor:
    """uint8 (B, h, h, 3) → float (B, 3, size, size) in [0, 1]; area average when it gets smaller."""
    faces = to_tensor(faces_BhW3, device)
    if faces.shape[-1] == size:
        return faces
    return F.interpolate(faces, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_avatar(release: Path, device: str | torch.device = "cpu") -> Avatar:
    """The avatar in a release folder. Raises DataError for a damaged, foreign or newer folder."""
    config = _read_config(release, "avatar")
    tensors = _read_tensors(release, config)
    architecture = _section(AvatarConfig, config, "avatar", release)
    poses = _training_poses(tensors, release)
    with _building(release, tensors):
        model = FIELDS[architecture.field](architecture)
    _fill(model, tensors, release)
    target = torch.device(device)
    return Avatar(
        model=model.eval().requires_grad_(False).to(target),
        config=architecture,
        subject=_text(config, release, "subject"),
        dataset=_text(config, release, "dataset"),
        poses=poses,
        device=target,
    )


def load_pair(release: Path, device: str | torch.device = "cpu") -> Pair:
    """The pair in a release folder. Raises DataError for a damaged, foreign or newer folder."""
    config = _read_config(release, "pair")
    tensors = _read_tensors(release, config)
    architecture = _section(YNetConfig, config, "ynet", release)
    mapper, theta_dim = _section(MappingConfig, config, "mapping", release), config.get("theta_dim")
    if not isinstance(theta_dim, int) or theta_dim < 1:
        raise DataError(f"{Path(release) / CONFIG} is damaged: theta_dim is {theta_dim!r:.40}", HINT)
    with _building(release, tensors):
        ynet = YNetwork(architecture)
        mapping = MappingMLP(mapper, architecture.code_dim, theta_dim, architecture.landmarks)
    _fill(nn.ModuleDict({"ynet": ynet, "mapping": mapping}), tensors, release)
    target = torch.device(device)
    return Pair(
        ynet=ynet.eval().requires_grad_(False).to(target),
        mapping=mapping.eval().requires_grad_(False).to(target),
        theta_dim=theta_dim,
        face_size=architecture.face_size,
        avatar=_text(config, release, "subjects", "avatar"),
        actor=_text(config, release, "subjects", "actor"),
        device=target,
    )


def _read_config(release: Path, kind: str) -> dict[str, Any]:
    """config.json of a release of the wanted kind."""
    path = Path(release) / CONFIG
    try:
        with path.open() as stream:
            config: dict[str, Any] = json.loads(stream.read(MOST_CHARACTERS))
        version, found = config["format"], config["kind"]
    except FileNotFoundError:
        raise DataError(f"{release} is no released model: it has no {CONFIG}", HINT) from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})", HINT) from None
    if version != FORMAT:
        raise DataError(
            f"{path} has format {version!r:.40}, this lavatar reads {FORMAT}",
            "Use the lavatar that wrote it, or submit again.",
        )
    if found != kind:
        raise DataError(f"{release} holds a model of kind {found!r:.40}, wanted {kind!r}", "Give the other folder.")
    return config


def _read_tensors(release: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of model.safetensors, after its SHA-256 was compared."""
    path = Path(release) / WEIGHTS
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        wanted = config["weights"]["sha256"]
        if digest != wanted:
            raise DataError(f"{path} is damaged: its SHA-256 is {digest[:12]}…, {CONFIG} says {wanted[:12]}…", HINT)
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{release} is incomplete: it has no {WEIGHTS}", HINT) from None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})", HINT) from None


@contextmanager
def _building(release: Path, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Around constructors: a configuration that does not belong to these weights must not fill the memory."""
    try:
        with Budget(tensors):
            yield
    except (TooLargeError, RuntimeError, OverflowError, TypeError) as error:
        raise DataError(
            f"{Path(release) / CONFIG} does not fit {WEIGHTS}: {str(error).splitlines()[0]}", HINT
        ) from None


def _text(config: Mapping[str, Any], release: Path, *keys: str) -> str:
    """A value of config.json that is text."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str):
        raise DataError(f"{Path(release) / CONFIG} is damaged: {'.'.join(keys)} is no text", HINT)
    return value


def _section(model: type[Any], config: Mapping[str, Any], key: str, release: Path) -> Any:
    """One section of config.json as its configuration class."""
    try:
        return model.model_validate(config[key])
    except KeyError:
        raise DataError(f"{Path(release) / CONFIG} is damaged: {key!r} is missing", HINT) from None
    except ValidationError as error:
        raise DataError(f"{Path(release) / CONFIG} does not fit this lavatar: {key}.{describe(error)}", HINT) from None


def _training_poses(tensors: dict[str, Tensor], release: Path) -> PoseStatistics:
    """Takes the training poses out of `tensors`."""
    try:
        rotation, translation, scale = (
            tensors.pop(f"poses.{name}").double().numpy() for name in ("rotation", "translation", "scale")
        )
    except KeyError as error:
        raise DataError(f"{release} holds no training poses ({error} is missing)", HINT) from None
    shapes, count = (rotation.shape, translation.shape, scale.shape), len(scale) if scale.ndim else 0
    if not count or shapes != ((count, 3, 3), (count, 3), (count,)):
        raise DataError(f"{release} holds training poses of shapes {', '.join(map(str, shapes))}", HINT)
    if not all(np.isfinite(values).all() for values in (rotation, translation, scale)):
        raise DataError(f"{release} holds training poses that are no numbers", HINT)
    return PoseStatistics.of(PoseTrack(rotation, translation, scale))


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], release: Path) -> None:
    """Load a state dict that must fit exactly."""
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise DataError(
            f"{Path(release) / WEIGHTS} does not fit {CONFIG}: {' '.join(line.strip() for line in reason[:3])}", HINT
        ) from None
