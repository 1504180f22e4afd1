"""Rows preprocess and reenact: from a video to shards, and from a video to an mp4."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets import matting, tracking, video
from lavatar.datasets.preprocess import preprocess as prepare
from lavatar.inference.encode_video import write_video
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.reenact import chunks, cross_codes, draw, reenact_video
from lavatar.inference.retarget import PoseStatistics, PoseTrack
from lavatar.models.avatar import LatentAvatar
from lavatar.models.mapping import build_mapping
from lavatar.models.ynet import YNetwork
from lavatar.platform.speed.material import FPS, SIDE
from lavatar.platform.speed.measure import Row, Run, Session, Times, forget_peak, peak_mb

T = TypeVar("T")
R = TypeVar("R")

FRAMES = 96
"""Of the video that is preprocessed."""
DRIVEN = 48
"""Of the video that is reenacted."""
WORKERS = (1, 2, 4)


def preprocess(session: Session) -> list[Row]:
    """By processes as Ray's workers are, each with one segment, for 1, 2 and 4 of them."""
    path = session.material.video(FRAMES)
    return [_preprocess(session, path, workers) for workers in WORKERS]


def _preprocess(session: Session, path: Path, workers: int) -> Row:
    cores = min(workers, len(os.sched_getaffinity(0)))
    name = "preprocess" if workers == 1 else f"preprocess {workers} workers"
    word = "worker" if workers == 1 else "workers"
    config = PreprocessConfig(segment_frames=-(-FRAMES // workers), min_frames=2)
    warm_up = round(config.warmup_frames * config.segment_frames / PreprocessConfig().segment_frames)
    config = config.model_copy(update={"warmup_frames": warm_up})  # in proportion to that of segments of usual length
    folder, source = session.material.folder / "prepared", VideoSource("drawn", path)
    with pool_of(workers) as pool:

        def spread(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
            return pool.map(function, items)

        def run() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            prepare(source, config, folder, parallel=spread, events=NullSink(), stage=name)

        row = Row(name, f"a frame, {SIDE}², {workers} {word}; beside it the parts alone on {cores} of the cores")
        times = session.alternate(name, run, lambda: parts_alone(path, config), least=2)
        peaks = [peak_mb(torch.device("cpu"), ["self", *(p.pid for p in pool._processes.values() if p.pid)])]
    spread_out = [seconds / cores for seconds in times.reference]
    return session.filled(row, Times(times.own, spread_out, peaks), FRAMES)


@contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that have done their imports."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_imported, range(4 * workers)))
        yield pool


def _imported(number: int) -> None:
    import lavatar.datasets.preprocess  # noqa: F401

    time.sleep(0.1)  # so that each process gets some


def parts_alone(path: Path, config: PreprocessConfig) -> None:
    """Decoding, tracker and matting of every frame, and nothing else."""
    tracker = tracking.open_tracker(config.tracker)
    matte = matting.open_matting(config.matting, config.matting_size)
    try:
        for _, seconds, rgb in video.read_frames(path):
            tracker.track(rgb, seconds)
            matte.alpha(rgb)
    finally:
        tracker.close()


def reenact(session: Session) -> list[Row]:
    """Untrained models of `tiny` (on a GPU `official`); the reference is the slowest of the parts on their own."""
    name = "official" if session.device.type == "cuda" else "tiny"
    recipe = load_recipe(name)
    path, out = session.material.video(DRIVEN), session.material.folder / "driven.mp4"
    avatar, pair = untrained(session, recipe)
    slowest = _slowest(session, recipe, avatar, pair, path)
    config = PreprocessConfig(min_frames=2)

    def run() -> None:
        reenact_video(avatar, pair, path, out, config, recipe.evaluation)

    times, beside, began = Times([], [], []), list[str](), time.perf_counter()
    run()
    while len(times.own) < 3 or time.perf_counter() - began < session.seconds:
        forget_peak(session.device)
        times.own.append(session.timed(run))
        times.peaks_mb.append(peak_mb(session.device))
        part, seconds = slowest()
        times.reference.append(seconds)
        beside.append(part)
    part = max(set(beside), key=beside.count)
    what = (
        f"a frame, {SIDE}² video to {recipe.evaluation.panel_size}² mp4 by `{name}`; beside it the slowest part: {part}"
    )
    return [session.filled(Row("reenact", what), times, DRIVEN)]


def untrained(session: Session, recipe: Recipe) -> tuple[Avatar, Pair]:
    """An avatar and a pair as a release would give them."""
    torch.manual_seed(0)
    device, store = session.device, session.material.store(recipe.avatar.image_size)
    poses = PoseStatistics.of(PoseTrack(store.rotation_N33, store.translation_N3, store.scale_N))
    head = LatentAvatar(recipe.avatar).eval().requires_grad_(False).to(device)
    ynet = YNetwork(recipe.ynet).eval().requires_grad_(False).to(device)
    mapping = build_mapping(recipe).eval().requires_grad_(False).to(device)
    return (
        Avatar(head, recipe.avatar, "drawn0", "", poses, device),
        Pair(ynet, mapping, recipe.avatar.code_dim, recipe.ynet.face_size, "drawn0", "drawn0", device),
    )


def _slowest(
    session: Session, recipe: Recipe, avatar: Avatar, pair: Pair, path: Path
) -> Callable[[], tuple[str, float]]:
    """Times decoding, tracking, drawing and encoding one after the other; the slowest, and its seconds."""
    frames = [rgb for _, _, rgb in video.read_frames(path)]
    store = session.material.store(recipe.avatar.image_size)
    chosen = np.arange(DRIVEN) % len(store)
    faces = np.stack([store.frame(int(i)).face for i in chosen])
    track = PoseTrack(store.rotation_N33, store.translation_N3, store.scale_N)[chosen]

    def decode() -> None:
        for _ in video.read_frames(path):
            pass

    def follow() -> None:
        tracker = tracking.open_tracker("mediapipe")
        for i, rgb in enumerate(frames):
            tracker.track(rgb, i / FPS)
        tracker.close()

    def render() -> None:
        for part in chunks(np.arange(DRIVEN), recipe.evaluation.batch_size):
            draw(avatar, cross_codes(pair, faces[part]), track[part])

    def encode() -> None:
        write_video(session.material.folder / "encoded.mp4", iter(frames), FPS)

    parts: dict[str, Run] = {"decoding": decode, "tracking": follow, "drawing": render, "encoding": encode}

    def slowest() -> tuple[str, float]:
        times = {name: session.timed(run) for name, run in parts.items()}
        name = max(times, key=times.__getitem__)
        return name, times[name]

    return slowest
