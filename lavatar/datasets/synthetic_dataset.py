"""Design section 4: a synthetic subject as a dataset, with ground truth in place of tracking and matting.

Portraits are drawn at `portrait_size` itself: edges are blended over a pixel, so a larger drawing would add nothing.
Below 256 they are drawn larger and averaged, so that the face crop has something to show.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import (
    EXPRESSIONS,
    Camera,
    Event,
    EventSink,
    FrameMeta,
    HeadPose,
    ParallelMap,
    Split,
    VideoSource,
)
from lavatar.datasets import crops, shards, tracks
from lavatar.datasets.solve import split_of
from lavatar.datasets.synthetic import default_camera, project, render
from lavatar.datasets.synthetic_acting import FPS, performance
from lavatar.datasets.synthetic_head import Expression, Face, Identity
from lavatar.datasets.synthetic_landmarks import irises, landmarks
from lavatar.errors import ConfigError

SMALLEST = 256
STABLE = (27, 28, 36, 39, 42, 45)  # of the 68: bridge of the nose, corners of the eyes
IDENTITY_ROWS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class RenderJob:
    """What a worker needs to draw one segment."""

    number: int
    start: int
    stop: int
    frames: int
    seed: int
    out_dir: Path
    config: PreprocessConfig


def preprocess_synthetic(
    source: VideoSource,
    config: PreprocessConfig,
    out_dir: Path,
    *,
    digest: str,
    parallel: ParallelMap,
    events: EventSink,
    stage: str,
) -> shards.Manifest:
    """The dataset of a synthetic subject: its performance, drawn in segments. Same bytes whatever drew them."""
    if source.synthetic_seed is None:
        raise ConfigError(f"subject {source.name!r} has no seed", "Add it again with --synthetic SEED.")
    count = min(config.synthetic_frames, config.max_frames or config.synthetic_frames)
    jobs = [
        RenderJob(cut.number, cut.start, cut.stop, count, source.synthetic_seed, Path(out_dir), config)
        for cut in tracks.segments(count, config)
    ]
    entries, errors, drawn = [], [], 0
    for entry, error in parallel(render_segment, jobs):
        entries.append(entry)
        errors.append(error * entry["samples"])
        drawn += entry["samples"]
        events.emit(Event(stage, text="drawing", done=drawn, total=count, unit="frames"))
    acted = performance(source.synthetic_seed, count)
    held_out = sum(split_of(k, count, config) == Split.EVAL for k in range(count))
    manifest = shards.Manifest(
        digest=digest, subject=source.name, kind="synthetic", frames=count, train=count - held_out, eval=held_out,
        fps=FPS, portrait_size=config.portrait_size, face_size=config.face_size, tars=entries,
        reprojection_px=round(sum(errors) / count, 4), has_audio=False,
        source={"seed": source.synthetic_seed, "frames": count},
        statistics=_statistics([expression for expression, _ in acted], acted[0][1].scale),
    )  # fmt: skip
    shards.write_manifest(Path(out_dir), manifest)
    return manifest


def render_segment(job: RenderJob) -> tuple[dict[str, Any], float]:
    """Draw one segment in a worker and write its tar: the manifest's entry, mean reprojection error in pixels."""
    identity, config, errors = Identity.from_seed(job.seed), job.config, []
    rigid = landmarks(Face.of(identity, Expression()))[list(STABLE)]
    acted = performance(job.seed, job.frames)
    with shards.ShardWriter(job.out_dir / f"{job.number:05d}.tar", config.jpeg_quality) as writer:
        for frame in range(job.start, job.stop):
            expression, pose = acted[frame]
            picture = draw(identity, expression, pose, config)
            camera = default_camera_of(config)
            to_face = crops.face_transform(picture.landmarks, config.face_size)
            errors.append(np.linalg.norm(project(rigid, pose, camera) - picture.landmarks[list(STABLE)], axis=1).mean())
            meta = FrameMeta(
                frame=frame,
                time=round(frame / FPS, 6),
                split=split_of(frame, job.frames, config),
                landmarks=crops.as_points(picture.landmarks),
                irises=crops.as_points(project(irises(Face.of(identity, expression)), pose, camera)),
                pose=pose,
                camera=camera,
                portrait_transform=IDENTITY_ROWS,
                face_transform=crops.as_rows(to_face),
                score=1.0,
                expression={name: round(value, 5) for name, value in asdict(expression).items()},
            )
            grow = picture.large.shape[0] / config.portrait_size
            large_to_face = np.array(to_face) * np.array([[1 / grow, 1 / grow, 1.0]])
            face = crops.face_crop(picture.large, large_to_face, config, picture.landmarks * grow)
            writer.write(meta, picture.colour, picture.alpha, face)
    return writer.entry, float(np.mean(errors))


@dataclass(frozen=True)
class Picture:
    """One frame as it is stored: colour of the head alone, alpha, landmarks in pixels; and the drawing over white."""

    colour: np.ndarray
    alpha: np.ndarray
    landmarks: np.ndarray
    large: np.ndarray


def default_camera_of(config: PreprocessConfig) -> Camera:
    """The portrait camera, with the configured focal length."""
    size = config.portrait_size
    return Camera(config.focal * size / 512, size / 2, size / 2, size)


def draw(identity: Identity, expression: Expression, pose: HeadPose, config: PreprocessConfig) -> Picture:
    """Draw a frame. Over white, colour and alpha give the rendered picture back, to rounding."""
    size = config.portrait_size
    grow = -(-SMALLEST // size) if size < SMALLEST else 1
    base = default_camera_of(config)
    camera = Camera(base.focal * grow, base.cx * grow, base.cy * grow, size * grow)
    rgb, alpha, points = render(identity, expression, pose, camera)
    large = np.rint(rgb * 255).astype(np.uint8)
    if grow > 1:
        rgb, alpha = (cv2.resize(p, (size, size), interpolation=cv2.INTER_AREA) for p in (rgb, alpha))
    alpha8 = np.rint(alpha * 255).astype(np.uint8)
    opacity = np.maximum(alpha8, 1).astype(np.float32)[..., None] / 255
    colour = np.clip((rgb - (1 - opacity)) / opacity, 0, 1)
    colour[alpha8 == 0] = 1
    return Picture(np.rint(colour * 255).astype(np.uint8), alpha8, points / grow, large)


def _statistics(acted: list[Expression], scale: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in EXPRESSIONS:
        values = np.array([getattr(expression, name) for expression in acted])
        low, high = np.quantile(values, [0.01, 0.99])
        figures[name] = {"mean": round(float(values.mean()), 5), "std": round(float(values.std()), 5),
                         "low": round(float(low), 5), "high": round(float(high), 5)}  # fmt: skip
    picture = "foreground colour, not multiplied by alpha; white where alpha is 0"
    return {"expression": figures, "scale": scale, "picture": picture}


def contact_sheet(seeds: tuple[int, ...] = (0, 1), size: int = 224) -> np.ndarray:
    """What synthetic subjects look like: a row for each seed, six labelled expressions and four views, uint8 HW3 RGB.
    docs/synthetic.png is made of it (docs/CONVENTIONS.md: how)."""
    looks = {
        "rest": Expression(), "jaw": Expression(jaw=0.9), "smile": Expression(smile=1.0, jaw=0.12),
        "pout": Expression(pucker=1.0), "brows, gaze": Expression(brows=1.0, gaze=0.9),
        "blink, tongue": Expression(blink=1.0, jaw=0.55, tongue=1.0, brows=-0.6),
    }  # fmt: skip
    from lavatar.datasets.synthetic import default_pose

    rows = []
    for seed in seeds:
        row = []
        for k, (label, expression) in enumerate(looks.items()):
            pose = default_pose(*((0, 0, 0), (0, 0, 0), (-12, 3, -3), (14, 0, 0), (0, 0, 0), (8, -6, 4))[k])
            rgb, _, _ = render(Identity.from_seed(seed), expression, pose, default_camera(2 * size))
            cell = cv2.resize(np.rint(rgb * 255).astype(np.uint8), (size, size), interpolation=cv2.INTER_AREA)
            cell = cv2.copyMakeBorder(cell, 0, 24, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            text = f"{label}" if k else f"seed {seed}: {label}"
            cv2.putText(cell, text, (10, size + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.46, (40, 40, 40), 1, cv2.LINE_AA)
            row.append(cell)
        rows.append(np.hstack(row))
    return np.vstack(rows)
