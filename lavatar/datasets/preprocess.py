"""Sec. 5.1 (input): from a video to shards, in two passes.

Segments are tracked in parallel; then one crop, one camera, one personal shape and all poses are fitted (solve.py);
then segments are matted, cropped and written in parallel, one tar each. Segments come from the configuration, and each
starts its recurrent parts a fixed number of frames early, so the bytes do not depend on what ran them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import Event, EventSink, ParallelMap, Split, VideoSource
from lavatar.datasets import crops, matting, shards, tracks, video, weights
from lavatar.datasets.digest import dataset_digest, file_digest, matting_weights
from lavatar.datasets.solve import FrameJob, Solved, solve, statistics
from lavatar.datasets.tracks import Segment, TrackedVideo
from lavatar.errors import ConfigError, Interrupted, ShardError, StorageError

WORK = ".work"
"""Folder inside a dataset's in which tars are made until all are whole; beside each whole one stands its entry."""
DIGEST = "digest"


@dataclass(frozen=True)
class WriteJob:
    """What a worker needs to write one segment's tar."""

    path: Path
    index: video.FrameIndex
    segment: Segment
    frames: tuple[FrameJob, ...]
    source_size: tuple[int, int]
    portrait_transform: tuple[tuple[float, ...], ...]
    out_dir: Path
    config: PreprocessConfig


def preprocess(
    source: VideoSource,
    config: PreprocessConfig,
    out_dir: Path,
    *,
    parallel: ParallelMap,
    events: EventSink,
    stage: str,
) -> shards.Manifest:
    """Make the dataset of `source` in `out_dir`; a finished one with the same digest is returned as it is.

    After an error nothing is left. After an interruption (or a kill) the whole segments stay, and are taken up.
    """
    out_dir = Path(out_dir)
    digest = dataset_digest(source, config)
    done = finished(out_dir, digest)
    if done is not None:
        return done
    if not _interrupted(out_dir, digest):
        clean_folder(out_dir)
    try:
        if source.path is None:
            return _synthetic(source, config, out_dir, digest, parallel, events, stage)
        return _preprocess_video(source, source.path, config, out_dir, digest, parallel, events, stage)
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException:
        clean_folder(out_dir)
        raise


def finished(out_dir: Path, digest: str) -> shards.Manifest | None:
    """The manifest in `out_dir` if it is whole and has this digest."""
    try:
        manifest = shards.read_manifest(out_dir)
    except ShardError:
        return None
    whole = all((out_dir / tar["name"]).is_file() for tar in manifest.tars)
    return manifest if whole and manifest.digest == digest else None


def _interrupted(out_dir: Path, digest: str) -> bool:
    """Whether an interrupted attempt at this very dataset left its work."""
    try:
        return (out_dir / WORK / DIGEST).read_text() == digest
    except OSError:
        return False


def clean_folder(out_dir: Path) -> None:
    """Remove what an attempt without a manifest left; the folder itself too if nothing else is in it."""
    if not out_dir.is_dir():
        return
    with shards.storage_errors(out_dir):
        shutil.rmtree(out_dir / WORK, ignore_errors=True)
        for pattern in (shards.MANIFEST, "*.tar", ".*.part"):
            for path in out_dir.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(out_dir.iterdir()):
            out_dir.rmdir()


def _synthetic(
    source: VideoSource,
    config: PreprocessConfig,
    out_dir: Path,
    digest: str,
    parallel: ParallelMap,
    events: EventSink,
    stage: str,
) -> shards.Manifest:
    from lavatar.datasets.synthetic_dataset import preprocess_synthetic

    if source.synthetic_seed is None:
        raise ConfigError(f"subject {source.name!r} has neither a video nor a seed", "Add it again.")
    return preprocess_synthetic(source, config, out_dir, digest=digest, parallel=parallel, events=events, stage=stage)


def _preprocess_video(
    source: VideoSource,
    path: Path,
    config: PreprocessConfig,
    out_dir: Path,
    digest: str,
    parallel: ParallelMap,
    events: EventSink,
    stage: str,
) -> shards.Manifest:
    """The two passes and what lies between them."""
    for name in matting_weights(config.matting):
        weights.find(name)  # before the long first pass, not after it
    found = tracks.track_video(path, config, parallel=parallel, events=events, stage=stage)
    solved = solve(found, config)
    dropped = [{"frame": i, "reason": reason} for i, reason in solved.dropped]
    note = f", {len(dropped)} dropped" if dropped else ""
    text = f"{len(solved.jobs)} frames, reprojection error {solved.reprojection_px:.2f} px{note}"
    events.emit(Event(stage, text=text))
    work = out_dir / WORK  # workers still busy when another has failed find it gone, and leave nothing
    with shards.storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        (work / DIGEST).write_text(digest)
    entries, written = [], 0
    for entry in parallel(write_segment, list(_write_jobs(found, solved, out_dir, config))):
        written += int(entry["samples"])
        if entry["samples"]:
            entries.append(entry)
        events.emit(Event(stage, text="matting and writing", done=written, total=len(solved.jobs), unit="frames"))
    with shards.storage_errors(out_dir):
        for entry in entries:
            os.replace(work / entry["name"], out_dir / entry["name"])
        shutil.rmtree(work)
    info = video.probe(path)
    manifest = shards.Manifest(
        digest=digest,
        subject=source.name,
        kind="video",
        frames=written,
        train=sum(job.meta.split == Split.TRAIN for job in solved.jobs),
        eval=sum(job.meta.split == Split.EVAL for job in solved.jobs),
        fps=round(found.index.fps, 6),
        portrait_size=config.portrait_size,
        face_size=config.face_size,
        tars=entries,
        dropped=dropped,
        reprojection_px=solved.reprojection_px,
        has_audio=info.has_audio,
        source={
            "file": path.name, "sha256": file_digest(path), "width": info.width, "height": info.height,
            "codec": info.codec, "rotation": info.rotation, "frames": found.index.frames,
        },
        statistics=statistics(solved),
    )  # fmt: skip
    shards.write_manifest(out_dir, manifest)
    return manifest


def _write_jobs(found: TrackedVideo, solved: Solved, out_dir: Path, config: PreprocessConfig) -> Iterator[WriteJob]:
    for cut in tracks.segments(found.index.frames, config):
        inside = tuple(job for job in solved.jobs if cut.start <= job.meta.frame < cut.stop)
        yield WriteJob(
            found.path, found.index, cut, inside, (found.width, found.height), crops.as_rows(solved.portrait_transform),
            out_dir, config,
        )  # fmt: skip


def write_segment(job: WriteJob) -> dict[str, Any]:
    """One segment in a worker: matte, crop, write its tar. Returns the tar's manifest entry."""
    cut, config = job.segment, job.config
    wanted = {frame.meta.frame: frame for frame in job.frames}
    if not wanted:
        return {"name": "", "sha256": "", "samples": 0}
    work = job.out_dir / WORK
    if not work.is_dir():
        raise StorageError(f"{work} is gone", "Another segment failed first: see its error.")
    kept = kept_segment(work, f"{cut.number:05d}")
    if kept is not None:
        return kept
    matte = matting.open_matting(config.matting, config.matting_size)
    transform = np.asarray(job.portrait_transform)
    with shards.ShardWriter(work / f"{cut.number:05d}.tar", config.jpeg_quality) as writer:
        for i, _, rgb in video.read_frames(job.path, cut.start - cut.warmup, max(wanted) + 1, job.index):
            portrait = crops.warp(rgb, transform, config.portrait_size)
            alpha = matte.alpha(portrait)  # every frame, used or not: the network remembers
            frame = wanted.get(i)
            if frame is None:
                continue
            meta = frame.meta
            colour = matting.foreground(portrait, alpha)
            faded = matting.fade(alpha, meta.pose, meta.camera, transform, job.source_size)
            colour[faded <= 0] = 255
            face = crops.face_crop(rgb, np.asarray(frame.source_to_face), config, frame.source_landmarks)
            writer.write(meta, colour, np.rint(faded * 255).astype(np.uint8), face)
    with shards.storage_errors(work):
        part = work / f".{cut.number:05d}.json.part"
        part.write_text(json.dumps(writer.entry))
        os.replace(part, work / f"{cut.number:05d}.json")
    return writer.entry


def kept_segment(work: Path, name: str) -> dict[str, Any] | None:
    """The entry of a segment that an interrupted attempt finished, if its tar is still the same."""
    try:
        entry: dict[str, Any] = json.loads((work / f"{name}.json").read_text())
        with (work / f"{name}.tar").open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        return entry if whole and entry["name"] == f"{name}.tar" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def serial(function: Any, items: Sequence[Any]) -> Iterator[Any]:
    """The ParallelMap that is not parallel."""
    return map(function, items)
