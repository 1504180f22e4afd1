"""Small synthetic subjects, untrained models and releases on disk, for the tests of inference."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.pair import MappingConfig, YNetConfig
from lavatar.configs.recipe import Recipe
from lavatar.contracts import EXPRESSIONS, FrameMeta, HeadPose
from lavatar.datasets import shards, synthetic
from lavatar.models.avatar import LatentAvatar
from lavatar.models.mapping import MappingMLP
from lavatar.models.ynet import YNetwork

SIZE, FACE = 64, 32

RECIPE = Recipe.model_validate(
    {
        "name": "test",
        "preprocess": {"portrait_size": SIZE, "face_size": FACE},
        "avatar": {
            "image_size": 32, "ray_size": 16, "samples": 4, "face_size": FACE, "code_dim": 8, "triplane_size": 8,
            "triplane_channels": 4, "generator_capacity": 4, "generator_max_channels": 8, "density_hidden": 8,
            "color_hidden": 8, "feature_channels": 4, "encoder_widths": [4, 8], "superresolution_capacity": 4,
        },
        "ynet": {
            "face_size": FACE, "code_dim": 16, "encoder_widths": [4, 8], "neck_width": 8, "decoder_widths": [8, 8],
        },
        "mapping": {"hidden": [16]},
        "evaluation": {"batch_size": 5, "panel_size": 64, "still_frames": 4},
        "resources": {"backend": "inline"},
    }
)  # fmt: skip


def wave(frame: int) -> dict[str, float]:
    """An expression that moves in all measures."""
    swing = {name: 0.5 + 0.5 * np.sin(frame * (0.31 + 0.17 * i)) for i, name in enumerate(EXPRESSIONS)}
    return {name: float(v) for name, v in swing.items()} | {"tongue": 0.0}


def turn(frame: int) -> HeadPose:
    return synthetic.default_pose(10 * np.sin(frame * 0.2), 4 * np.cos(frame * 0.15), 0.0, 0.01 * np.sin(frame * 0.1))


def make_subject(folder: Path, seed: int, frames: int = 30, held_out: int = 10, missing: tuple[int, ...] = ()) -> Path:
    """A dataset of synthetic frames; `missing` frames were dropped."""
    camera = synthetic.default_camera(SIZE)
    identity = synthetic.Identity.from_seed(seed)
    kept = [i for i in range(frames) if i not in missing]
    with shards.ShardWriter(folder / "00000.tar") as writer:
        for i in kept:
            values, pose = wave(i), turn(i)
            rgb, alpha, landmarks = synthetic.render(identity, synthetic.Expression(**values), pose, camera)
            image = (rgb * 255).round().astype(np.uint8)
            corner, side = landmarks.min(axis=0), float(np.ptp(landmarks, axis=0).max())
            transform = np.concatenate([np.eye(2), -corner[:, None]], axis=1) * FACE / side
            face = cv2.warpAffine(image, transform, (FACE, FACE), borderMode=cv2.BORDER_REPLICATE)
            meta = FrameMeta(
                i, i / 25, "eval" if i >= frames - held_out else "train", tuple(map(tuple, landmarks.tolist())), pose,
                camera, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), tuple(map(tuple, transform.tolist())), 1.0, values,
            )  # fmt: skip
            writer.write(meta, image, (alpha * 255).round().astype(np.uint8), face)
    train = sum(i < frames - held_out for i in kept)
    shards.write_manifest(
        folder,
        shards.Manifest(
            digest=f"digest{seed}", subject=f"synthetic{seed}", kind="synthetic", frames=len(kept), train=train,
            eval=len(kept) - train, fps=25.0, portrait_size=SIZE, face_size=FACE, tars=[writer.entry],
            source={"seed": seed},
        ),
    )  # fmt: skip
    return folder


def write_folder(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """A release: config.json and model.safetensors."""
    folder.mkdir(parents=True)
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    weights = {"file": "model.safetensors", "sha256": digest}
    (folder / "config.json").write_text(json.dumps({"format": 1, **config, "weights": weights}))
    return folder


def make_avatar_release(folder: Path, config: AvatarConfig = RECIPE.avatar) -> Path:
    torch.manual_seed(0)
    poses = [turn(i) for i in range(20)]
    tensors = {
        "poses.rotation": torch.tensor([p.rotation for p in poses]),
        "poses.translation": torch.tensor([p.translation for p in poses]),
        "poses.scale": torch.tensor([p.scale for p in poses]),
        **LatentAvatar(config).state_dict(),
    }
    return write_folder(
        folder,
        {"kind": "avatar", "subject": "ann", "dataset": "digest1", "avatar": config.model_dump(mode="json")},
        tensors,
    )


def make_pair_release(folder: Path, ynet: YNetConfig = RECIPE.ynet, mapping: MappingConfig = RECIPE.mapping) -> Path:
    torch.manual_seed(1)
    theta = RECIPE.avatar.code_dim
    tensors = {f"ynet.{k}": v for k, v in YNetwork(ynet).state_dict().items()}
    tensors |= {f"mapping.{k}": v for k, v in MappingMLP(mapping, ynet.code_dim, theta).state_dict().items()}
    return write_folder(
        folder,
        {
            "kind": "pair", "subjects": {"avatar": "ann", "actor": "bob"}, "theta_dim": theta,
            "ynet": ynet.model_dump(mode="json"), "mapping": mapping.model_dump(mode="json"),
        },
        tensors,
    )  # fmt: skip
