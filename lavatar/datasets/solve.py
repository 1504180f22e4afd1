"""Sec. 5.1 (input): between the two passes over a video. One crop, one camera and one personal shape for the whole of
it, a head pose a frame, the split in time: everything of a sample but its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import EXPRESSIONS, Camera, FrameMeta, HeadPose, Split
from lavatar.datasets import crops, pose, tracks
from lavatar.datasets.tracking import Track
from lavatar.datasets.tracks import TrackedVideo


@dataclass(frozen=True)
class FrameJob:
    """What one frame becomes, but for its pixels."""

    meta: FrameMeta
    source_to_face: tuple[tuple[float, ...], ...]

    @property
    def source_landmarks(self) -> np.ndarray:
        """The 68 landmarks in pixels of the source frame."""
        return crops.apply(crops.invert(np.asarray(self.meta.portrait_transform)), np.asarray(self.meta.landmarks))


@dataclass(frozen=True)
class Solved:
    """Between the passes: crop, camera, poses, and every usable frame's meta."""

    jobs: tuple[FrameJob, ...]
    dropped: tuple[tuple[int, str], ...]
    portrait_transform: np.ndarray
    camera: Camera
    reprojection_px: float
    shape: np.ndarray


def solve(found: TrackedVideo, config: PreprocessConfig) -> Solved:
    """One crop and one camera for the video, a pose a frame, the split in time."""
    camera = pose.portrait_camera(config.portrait_size, config.focal)
    outlines = [t.landmarks68 for t in found.tracks]
    transform = crops.portrait_transform(outlines, config.portrait_size, config.crop_scale)
    points = [crops.apply(transform, _points(t)) for t in found.tracks]
    # The time axis has gaps where frames were dropped: smoothing must not reach across them as if they were not there.
    spread: list[np.ndarray | None] = [None] * (found.frames[-1] + 1)
    for frame, landmarks in zip(found.frames, points, strict=True):
        spread[frame] = landmarks
    fit = pose.fit_poses(spread, camera, distance=config.distance, smoothing=config.smoothing)
    errors = _frame_errors(fit, found.frames, points, camera)
    misfit = tracks.drop_misfits(found.path, errors, config.portrait_size)
    if misfit.any():
        for frame, bad in zip(found.frames, misfit, strict=True):
            spread[frame] = None if bad else spread[frame]
        fit = pose.fit_poses(spread, camera, distance=config.distance, smoothing=config.smoothing)
    bad_frames = {frame: tracks.BAD_FIT for frame, bad in zip(found.frames, misfit, strict=True) if bad}
    dropped = {**dict(found.dropped), **bad_frames}
    tracks.check_dropped(found.path, dropped, found.index.frames, config)
    kept = [k for k, bad in enumerate(misfit) if not bad]
    jobs = tuple(
        _frame_job(found, k, split_of(place, len(kept), config), fit.poses[found.frames[k]], transform, camera, config)
        for place, k in enumerate(kept)
    )
    return Solved(jobs, tuple(sorted(dropped.items())), transform, camera, round(fit.reprojection_px, 4), fit.shape)


def split_of(place: int, count: int, config: PreprocessConfig) -> str:
    """Sec. 5.1: the last (or first) 10 % in time are held out. `place` counts usable frames."""
    held_out = min(count - 1, max(1, round(config.held_out_fraction * count)))
    is_eval = place >= count - held_out if config.held_out == "last" else place < held_out
    return str(Split.EVAL if is_eval else Split.TRAIN)


def _points(track: Track) -> np.ndarray:
    return track.landmarks478 if track.landmarks478 is not None else track.landmarks68


def _frame_errors(fit: pose.PoseFit, frames: Sequence[int], points: Sequence[np.ndarray], camera: Camera) -> np.ndarray:
    """Mean reprojection error of each frame, pixels."""
    errors = []
    for frame, landmarks in zip(frames, points, strict=True):
        head = fit.poses[frame]
        stable = pose.stable_points(landmarks)[0]
        errors.append(np.linalg.norm(pose.project(fit.shape, head, camera) - stable, axis=1).mean() if head else np.inf)
    return np.asarray(errors)


def _frame_job(
    found: TrackedVideo,
    k: int,
    split: str,
    head: HeadPose | None,
    transform: np.ndarray,
    camera: Camera,
    config: PreprocessConfig,
) -> FrameJob:
    track, frame = found.tracks[k], found.frames[k]
    assert head is not None  # a usable frame has landmarks, so it has a pose
    landmarks68 = crops.apply(transform, track.landmarks68)
    to_face = crops.face_transform(landmarks68, config.face_size)
    meta = FrameMeta(
        frame=frame,
        time=round(found.index.time(frame), 6),
        split=split,
        landmarks=crops.as_points(landmarks68),
        irises=crops.as_points(crops.apply(transform, track.irises)),
        pose=head,
        camera=camera,
        portrait_transform=crops.as_rows(transform),
        face_transform=crops.as_rows(to_face),
        score=round(track.score, 4),
        expression={name: round(value, 5) for name, value in track.expression.items()},
    )
    return FrameJob(meta, crops.as_rows(crops.compose(to_face, transform)))


def statistics(solved: Solved) -> dict[str, Any]:
    """Ranges that people and training want to see: expressions, turns of the head, and how the picture is stored."""
    metas = [job.meta for job in solved.jobs]
    figures: dict[str, Any] = {}
    for name in EXPRESSIONS:
        values = np.array([m.expression[name] for m in metas if name in m.expression])
        if len(values):
            low, high = np.quantile(values, [0.01, 0.99])
            figures[name] = {"mean": round(float(values.mean()), 5), "std": round(float(values.std()), 5),
                             "low": round(float(low), 5), "high": round(float(high), 5)}  # fmt: skip
    angles = np.array([pose.angles(m.pose) for m in metas])
    turns = {
        name: [round(float(v), 2) for v in (angles[:, i].min(), angles[:, i].max())]
        for i, name in enumerate(("yaw", "pitch", "roll"))
    }
    return {
        "expression": figures,
        "degrees": turns,
        "scale": round(metas[0].pose.scale, 6),
        "picture": "foreground colour, not multiplied by alpha; white where alpha is 0",
        "shape": [[round(float(v), 4) for v in point] for point in solved.shape],
    }
