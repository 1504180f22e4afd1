"""A small dataset on disk, for the tests of shards and loader."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from lavatar.contracts import Camera, FrameMeta, HeadPose
from lavatar.datasets import shards

SIZE, FACE = 48, 24


def make_meta(frame: int, split: str = "train", **expression: float) -> FrameMeta:
    identity = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
    affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    landmarks = tuple((float(i % SIZE), float(i // 3)) for i in range(68))
    camera = Camera(5000.0 * SIZE / 512, SIZE / 2, SIZE / 2, SIZE)
    pose = HeadPose(identity, (0.0, 0.0, 4.0), 0.1)
    return FrameMeta(frame, frame / 25, split, landmarks, pose, camera, affine, affine, 1.0, expression)


def make_pictures(frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(frame)
    image = cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (SIZE, SIZE))
    alpha = cv2.resize(rng.integers(0, 256, (4, 4), dtype=np.uint8), (SIZE, SIZE))
    return image, alpha, cv2.resize(image, (FACE, FACE))


def make_dataset(folder: Path, frames: int = 20, held_out: int = 4, per_tar: int = 8) -> shards.Manifest:
    tars = []
    for start in range(0, frames, per_tar):
        with shards.ShardWriter(folder / f"shard-{start // per_tar:05d}.tar") as writer:
            for i in range(start, min(start + per_tar, frames)):
                split = "eval" if i >= frames - held_out else "train"
                meta = make_meta(i, split, jaw=float(i % 10 == 0), blink=float(i % 7 == 0))
                writer.write(meta, *make_pictures(i))
        tars.append(writer.entry)
    manifest = shards.Manifest(
        digest="d", subject="s", kind="video", frames=frames, train=frames - held_out, eval=held_out, fps=25.0,
        portrait_size=SIZE, face_size=FACE, tars=tars, dropped=[{"frame": 99, "reason": "no face"}],
    )  # fmt: skip
    shards.write_manifest(folder, manifest)
    return manifest


def flip_bytes(path: Path, member: str, count: int = 8) -> None:
    """Damage the middle of one member of a tar, really, in the file."""
    key, _, name = member.partition(".")
    offset, size = shards.index_tar(path)[key][name]
    content = bytearray(path.read_bytes())
    for i in range(offset + size // 2, offset + size // 2 + count):
        content[i] ^= 0xFF
    path.write_bytes(bytes(content))
