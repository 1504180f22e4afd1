"""The content address of a dataset, known without making it: what a command needs to plan a job, and nothing heavier.

No video or picture library is imported here, so that handing a job over stays quick.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import VideoSource
from lavatar.datasets import weights
from lavatar.errors import VideoError

SCHEMA = 2
"""Of a dataset's files (lavatar.datasets.shards)."""
VERSION = 2
"""Raised when the same video and configuration would give other samples than before."""


def dataset_digest(source: VideoSource, config: PreprocessConfig) -> str:
    """Content address: video bytes (or seed), configuration, weights, schema. The subject's name does not enter."""
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "source": file_digest(source.path) if source.path is not None else f"synthetic:{source.synthetic_seed}",
        "config": config.model_dump(mode="json"),
        "weights": weights.digests(preprocess_weights(source, config)),
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a video's bytes, hex. VideoError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror}", "Check the path and its permissions.") from error


def preprocess_weights(source: VideoSource, config: PreprocessConfig) -> tuple[str, ...]:
    """Names of the pretrained files that the samples depend on: none where nothing is tracked."""
    return () if source.path is None else (*tracker_weights(config.tracker), *matting_weights(config.matting))


def tracker_weights(name: str) -> tuple[str, ...]:
    """Those that a tracker's result depends on."""
    return {"mediapipe": ("face_landmarker",), "face_alignment": ("fan_2d", "s3fd")}.get(name, ())


def matting_weights(name: str) -> tuple[str, ...]:
    """Those that a matting's result depends on."""
    return {"rvm": ("rvm",), "mediapipe": ("selfie_segmenter",)}.get(name, ())
