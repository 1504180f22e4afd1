"""Sec. 5.1, data in memory: random access to the frames of a dataset, and batches that are pure functions of a step.

Shapes: B batch, N frames of the split, H = W image_size, h = w face size.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from lavatar.contracts import Camera, Event, EventSink, FrameMeta, NullSink
from lavatar.datasets.shards import (
    ALPHA,
    FACE,
    IMAGE,
    META,
    REDO,
    Manifest,
    MemberSpan,
    decode_meta,
    decode_picture,
    index_tar,
    read_manifest,
)
from lavatar.errors import ConfigError, DataError, ShardError

BALANCED = ("jaw", "blink", "turn")
BINS = 8


@dataclass(frozen=True)
class Frame:
    """One decoded frame at the training size: image HW3 over white, mask HW, face hw3, all uint8."""

    image: np.ndarray
    mask: np.ndarray
    face: np.ndarray


@dataclass(frozen=True)
class FrameBatch:
    """A batch as the training wants it; floats in [0, 1], BCHW."""

    image_B3HW: Tensor  # over white
    mask_B1HW: Tensor
    face_B3HW: Tensor  # at the size it was cropped to
    rotation_B33: Tensor
    translation_B3: Tensor
    scale_B: Tensor
    landmarks_B68x2: Tensor  # in [0, 1] of the image
    index_B: Tensor  # 0..N-1, position in the split
    expression: dict[str, Tensor]  # name → B
    keys: tuple[str, ...]

    def to(self, device: torch.device | str) -> FrameBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("expression", "keys")
        }
        return replace(self, **moved, expression={k: v.to(device) for k, v in self.expression.items()})


@dataclass(frozen=True)
class _Entry:
    """Where one frame lies on disk."""

    tar: Path
    key: str
    spans: Mapping[str, MemberSpan]
    sums: Mapping[str, int]


class FrameStore:
    """Random access to the frames of one split, by index in the order of the video.

    A frame is decoded once to `image_size` (area average) and kept as uint8 while `cache_mb` lasts: all frames if they
    fit, else the most recently used ones. A sample that cannot be read is counted in `bad` (shard, key → reason) and
    replaced by the next readable frame; past `max_bad` of the split a ShardError names shard and key.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        split: str | None = "train",
        cache_mb: int = 4096,
        *,
        max_bad: float = 0.01,
        threads: int = 2,
        events: EventSink | None = None,
        stage: str = "",
    ) -> None:
        self.folder, self.image_size, self.split, self.max_bad = Path(folder), image_size, split, max_bad
        self.manifest: Manifest = read_manifest(self.folder)
        self.bad: dict[tuple[str, str], str] = {}
        self.metas: list[FrameMeta] = []
        self._entries: list[_Entry] = []
        self._events, self._stage, self._threads = events or NullSink(), stage, max(1, threads)
        self._start_runtime()
        self._total = {"train": self.manifest.train, "eval": self.manifest.eval}.get(split or "", self.manifest.frames)
        self._open_tars()
        if not self._entries:
            raise DataError(f"{self.folder} has no frames in split {split!r}", "Use a longer video.")
        self._tabulate()
        frame_bytes = image_size * image_size * 4 + self.manifest.face_size**2 * 3
        self._capacity = min(len(self), cache_mb * 2**20 // frame_bytes)

    # What lives in one process only -----------------------------------------------------------------------------

    def _start_runtime(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}
        self._cache: OrderedDict[int, Frame] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_lock", "_files", "_cache", "_pool")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_runtime()

    def close(self) -> None:
        """Stop the decoding threads, close the tars, forget the cache. The store can be used again afterwards."""
        with self._lock:
            pool, files = self._pool, self._files
            self._pool, self._files = None, {}
            self._cache.clear()
        if pool is not None:
            pool.shutdown()
        for descriptor in files.values():
            os.close(descriptor)

    # Opening ----------------------------------------------------------------------------------------------------

    def _open_tars(self) -> None:
        """Index every tar and read every meta; frames of the other split are skipped."""
        for tar in self.manifest.tars:
            path = self.folder / tar["name"]
            for key, spans in index_tar(path, tar["samples"]).items():
                try:
                    missing = [name for name in (IMAGE, ALPHA, FACE, META) if name not in spans]
                    if missing:
                        raise ShardError(f"{', '.join(missing)} is missing")
                    meta, sums = decode_meta(self._read(path, spans[META]))
                except ShardError as error:
                    self._count_bad(path, key, error.message)
                    continue
                if self.split is None or meta.split == self.split:
                    self._entries.append(_Entry(path, key, spans, sums))
                    self.metas.append(meta)

    def _tabulate(self) -> None:
        """Stack the metas into arrays over N frames."""
        self.keys = [entry.key for entry in self._entries]
        self.rotation_N33 = np.array([meta.pose.rotation for meta in self.metas], np.float32)
        self.translation_N3 = np.array([meta.pose.translation for meta in self.metas], np.float32)
        self.scale_N = np.array([meta.pose.scale for meta in self.metas], np.float32)
        size = float(self.metas[0].camera.size)
        self.landmarks_N68x2 = np.array([meta.landmarks for meta in self.metas], np.float32) / size
        names = sorted(set().union(*(meta.expression for meta in self.metas)))
        self.expression: dict[str, np.ndarray] = {
            name: np.array([meta.expression.get(name, np.nan) for meta in self.metas], np.float32) for name in names
        }
        camera, ratio = self.metas[0].camera, self.image_size / size
        self.camera = Camera(camera.focal * ratio, camera.cx * ratio, camera.cy * ratio, self.image_size)

    def __len__(self) -> int:
        return len(self._entries)

    # Frames -----------------------------------------------------------------------------------------------------

    def frame(self, index: int) -> Frame:
        """Frame `index`, decoded; the next readable one if it is damaged."""
        return self.resolve(index)[1]

    def resolve(self, index: int) -> tuple[int, Frame]:
        """The index really used, and its frame. Which frame stands in for a damaged one depends on the data alone."""
        for offset in range(len(self)):
            actual = (index + offset) % len(self)
            entry = self._entries[actual]
            if (entry.tar.name, entry.key) in self.bad:
                continue
            try:
                return actual, self._cached(actual)
            except ShardError as error:
                self._count_bad(entry.tar, entry.key, error.message)
        raise ShardError(f"{self.folder}: no readable frame in split {self.split!r}", REDO)

    def _cached(self, index: int) -> Frame:
        with self._lock:
            frame = self._cache.get(index)
            if frame is not None:
                self._cache.move_to_end(index)
                return frame
        frame = self._decode(self._entries[index])
        with self._lock:
            if self._capacity > 0:
                self._cache[index] = frame
                while len(self._cache) > self._capacity:
                    self._cache.popitem(last=False)
        return frame

    def _decode(self, entry: _Entry) -> Frame:
        """Read one sample, lay it over white and shrink it by area average."""
        portrait, crop = self.manifest.portrait_size, self.manifest.face_size
        image, alpha, face = (
            decode_picture(name, self._read(entry.tar, entry.spans[name]), entry.sums[name], side)
            for name, side in ((IMAGE, portrait), (ALPHA, portrait), (FACE, crop))
        )
        image = over_white(image, alpha)
        if image.shape[0] != self.image_size:
            side = (self.image_size, self.image_size)
            method = cv2.INTER_AREA if image.shape[0] > self.image_size else cv2.INTER_LINEAR
            image, alpha = cv2.resize(image, side, interpolation=method), cv2.resize(alpha, side, interpolation=method)
        return Frame(image, alpha, face)

    def _read(self, path: Path, span: MemberSpan) -> bytes:
        with self._lock:
            descriptor = self._files.get(path)
            if descriptor is None:
                descriptor = self._files[path] = os.open(path, os.O_RDONLY)
        return os.pread(descriptor, span[1], span[0])

    def _count_bad(self, tar: Path, key: str, reason: str) -> None:
        """Name a damaged sample once; fail when too many are."""
        with self._lock:
            if (tar.name, key) in self.bad:
                return
            self.bad[(tar.name, key)] = reason
            count = len(self.bad)
        text = f"{tar}, sample {key}: {reason}"
        self._events.emit(Event(self._stage, f"damaged sample left out: {text}", level="warning"))
        if count > self.max_bad * self._total:
            raise ShardError(f"{text}; {count} of {self._total} samples are damaged", REDO)

    def batch(self, indices: Sequence[int] | np.ndarray) -> FrameBatch:
        """The frames of `indices` as a batch, decoded by a few threads where they are not cached."""
        wanted = [int(i) for i in indices]
        if self._threads > 1 and any(i not in self._cache for i in wanted):
            with self._lock:  # pictures are made while another thread makes the next batch
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
            resolved = list(self._pool.map(self.resolve, wanted))
        else:
            resolved = [self.resolve(i) for i in wanted]
        index = np.array([i for i, _ in resolved], np.int64)
        frames = [frame for _, frame in resolved]
        return FrameBatch(
            image_B3HW=_to_float(np.stack([f.image for f in frames])),
            mask_B1HW=_to_float(np.stack([f.mask for f in frames])[..., None]),
            face_B3HW=_to_float(np.stack([f.face for f in frames])),
            rotation_B33=torch.from_numpy(self.rotation_N33[index]),
            translation_B3=torch.from_numpy(self.translation_N3[index]),
            scale_B=torch.from_numpy(self.scale_N[index]),
            landmarks_B68x2=torch.from_numpy(self.landmarks_N68x2[index]),
            index_B=torch.from_numpy(index),
            expression={name: torch.from_numpy(value[index]) for name, value in self.expression.items()},
            keys=tuple(self.keys[i] for i in index),
        )


def over_white(image_hwc: np.ndarray, alpha_hw: np.ndarray) -> np.ndarray:
    """image·α + white·(1 − α), uint8, rounded."""
    alpha = alpha_hw.astype(np.uint16)[..., None]
    return ((image_hwc * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _to_float(pictures_BHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).contiguous().float().div_(255.0)


def balance_weights(expression: Mapping[str, np.ndarray], count: int, floor: float = 0.02) -> np.ndarray:
    """Probability of each of N frames so that each of BALANCED is drawn evenly instead of as often as it occurs.

    One over the population of the frame's histogram bin, averaged over the measures and with the uniform weight. A bin
    counts as at least `floor`·N frames, so that a handful of odd frames is not shown all the time.
    """
    weights = [np.full(count, 1.0 / count)]
    for name in BALANCED:
        values = expression.get(name)
        if values is None or not np.isfinite(values).all():
            continue
        low, high = np.percentile(values, (1, 99))
        if high - low < 1e-6:
            continue
        bins = np.clip(((values - low) / (high - low) * BINS).astype(int), 0, BINS - 1)
        inverse = 1.0 / np.maximum(np.bincount(bins, minlength=BINS), floor * count)[bins]
        weights.append(inverse / inverse.sum())
    return np.asarray(np.mean(weights, axis=0))


def head_turn(rotation_N33: np.ndarray) -> np.ndarray:
    """How far each head is turned to a side (about the head's vertical axis, radians) from the mean pose, N."""
    u, _, vt = np.linalg.svd(rotation_N33.mean(axis=0))
    forward_N3 = rotation_N33[:, :, 2] @ (u @ vt)  # where the face looks, in the axes of the mean head
    return np.arctan2(forward_N3[:, 0], forward_N3[:, 2])


class BatchSampler:
    """Batches by step. A batch depends on (seed, step, rank, world) alone, so a resumed run sees what it would have
    seen, and the ranks of any world share out the same global batch in order."""

    def __init__(self, store: FrameStore, batch_size: int, seed: int, balance: bool = False) -> None:
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self._cumulative: np.ndarray | None = None
        if balance:
            measures = {**store.expression, "turn": head_turn(store.rotation_N33)}
            self._cumulative = np.cumsum(balance_weights(measures, len(store)))
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def indices(self, step: int) -> np.ndarray:
        """The frames of the global batch of `step`, B."""
        if self._cumulative is not None:
            return self._draw(step)
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        count = len(self.store)
        return np.array([self._permutation(p // count)[p % count] for p in positions], np.int64)

    def _draw(self, step: int) -> np.ndarray:
        """Weighted, with replacement, stratified in time (one frame from each B-th of the weight), shuffled."""
        assert self._cumulative is not None
        rng = np.random.default_rng((self.seed, 1, step))
        quantiles = (np.arange(self.batch_size) + rng.random(self.batch_size)) / self.batch_size
        found = np.searchsorted(self._cumulative, quantiles * self._cumulative[-1], side="right")
        return rng.permutation(np.minimum(found, len(self.store) - 1))

    def _permutation(self, epoch: int) -> np.ndarray:
        cached = self._epoch
        if cached[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            cached = self._epoch = (epoch, rng.permutation(len(self.store)))
        return cached[1]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> FrameBatch:
        """This rank's share of the global batch of `step`."""
        if self.batch_size % world:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be shared by {world} workers",
                "Set the training's batch_size to a multiple of the workers.",
            )
        share = self.batch_size // world
        return self.store.batch(self.indices(step)[rank * share : (rank + 1) * share])
