"""Frames for the page of an evaluation: the best, the median and the worst, drawn again with the map of their error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.contracts import EXPRESSIONS, FrameMeta
from lavatar.datasets.loader import FrameStore
from lavatar.inference.chart import Curve, chart
from lavatar.inference.document import Html
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.measured import CACHE_MB, Evaluation, FrameFigures
from lavatar.inference.panels import choose_frames, curves, error_map
from lavatar.inference.reenact import driven_poses, poses_of, reenact_cross, reenact_self
from lavatar.inference.truth import TransferTruth

EACH = 3  # frames of each kind
APART = 12  # frames in a row look alike: so many lie between two of a kind, fewer in a short clip


@dataclass(frozen=True)
class Shown:
    """One frame: labelled pictures (uint8 RGB), and figures by name."""

    kind: str  # best, median, worst; empty where frames have no order
    meta: FrameMeta
    pictures: tuple[tuple[str, np.ndarray], ...]
    figures: dict[str, float]


def ranked(frames: FrameFigures, each: int = EACH) -> dict[str, list[int]]:
    """Positions of the best, median and worst frames by LPIPS, else by PSNR; none stands under two kinds."""
    by_lpips = "lpips" in frames.values
    badness_N = frames.values["lpips"] if by_lpips else -frames.values["psnr"]
    order = [int(i) for i in np.argsort(badness_N, kind="stable")]
    middle = len(order) // 2
    outwards = sorted(range(len(order)), key=lambda place: abs(place - middle))
    wanted = {"best": order, "worst": order[::-1], "median": [order[place] for place in outwards]}
    each = min(each, len(order) // len(wanted)) or 1
    chosen: dict[str, list[int]] = {}
    for kind, candidates in wanted.items():
        free = [i for i in candidates if all(i not in others for others in chosen.values())]
        chosen[kind] = _apart(free, frames.index_N, each)
    return {kind: chosen[kind] for kind in ("best", "median", "worst") if chosen[kind]}


def _apart(candidates: list[int], index_N: np.ndarray, count: int) -> list[int]:
    """The first `count` that keep their distance in the video, filled up with what comes first."""
    apart = min(APART, (int(index_N.max()) - int(index_N.min())) // (4 * count))
    chosen: list[int] = []
    for i in candidates:
        if len(chosen) < count and all(abs(index_N[i] - index_N[j]) > apart for j in chosen):
            chosen.append(i)
    chosen += [i for i in candidates if i not in chosen][: count - len(chosen)]
    return chosen


def self_frames(avatar: Avatar, dataset: Path, recipe: Recipe, own: Evaluation) -> list[Shown]:
    """Truth, result and error of self reenactment."""
    store = FrameStore(dataset, avatar.config.image_size, "eval", CACHE_MB)
    options, shown = recipe.evaluation, []
    for kind, positions in ranked(own.frames).items():
        index = own.frames.index_N[positions]
        drawn = reenact_self(avatar, store, index, options.batch_size, options.self_smoothing)
        results = [image for batch in drawn for image in batch.images_BHW3]
        for position, i, result in zip(positions, index.tolist(), results, strict=True):
            pictures = _with_error(store.frame(i).image, result)
            shown.append(Shown(kind, store.metas[i], pictures, own.frames.at(position)))
    store.close()
    return shown


def cross_frames(
    avatar: Avatar, pair: Pair, avatar_dataset: Path, actor_dataset: Path, recipe: Recipe, cross: Evaluation
) -> list[Shown]:
    """Actor and result; on synthetic pairs, ranked, with the true transfer and the error. Without a truth the frames
    cover the range of the actor's expression."""
    size, options = avatar.config.image_size, recipe.evaluation
    actor = FrameStore(actor_dataset, size, "eval", CACHE_MB)
    own = FrameStore(avatar_dataset, size, "eval", CACHE_MB)
    truth = TransferTruth.between(own, actor, size)
    if truth is not None:
        kinds = ranked(cross.frames)
    else:
        kinds = {"": choose_frames({n: cross.truth[n] for n in EXPRESSIONS}, 3 * EACH)}
    poses = driven_poses(avatar.poses, poses_of(actor), np.arange(len(actor)), options.pose_smoothing)
    shown = []
    for kind, positions in kinds.items():
        index = cross.frames.index_N[positions]
        drawn = reenact_cross(avatar, pair, actor, index, poses[index], options.batch_size)
        results = [image for batch in drawn for image in batch.images_BHW3]
        for position, i, result in zip(positions, index.tolist(), results, strict=True):
            pictures: tuple[tuple[str, np.ndarray], ...] = (("actor", actor.frame(i).image),)
            if truth is None:
                pictures += (("result", result),)
            else:
                pose = poses[np.array([i])].poses()[0]
                meta = replace(actor.metas[i], pose=pose, camera=own.metas[0].camera)
                pictures += _with_error(truth.draw([meta])[0][0], result)
            shown.append(Shown(kind, actor.metas[i], pictures, cross.frames.at(position)))
    for store in (actor, own):
        store.close()
    return shown


def _with_error(truth: np.ndarray, result: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    return ("ground truth", truth), ("result", result), ("error", error_map(result, truth))


def strips(own: Evaluation, cross: Evaluation | None) -> np.ndarray:
    """The expression over the held-out frames, truth (or actor) against result, as a picture: self above cross."""
    measures = list(_measures(own, cross))
    truth, result = ({title: both[i] for title, _, *both in measures} for i in (0, 1))
    return curves(truth, result, list(truth))


def strip_charts(own: Evaluation, cross: Evaluation | None) -> list[Html]:
    """The same for a page: a chart of each measure."""
    return [
        chart(
            title,
            [Curve(name, tuple(enumerate(map(float, v)))) for name, v in ((who, truth), ("result", result))],
            across="frame",
            ends=False,
        )
        for title, who, truth, result in _measures(own, cross)
    ]


def _measures(own: Evaluation, cross: Evaluation | None) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Of each measure its title, whom the result is held against, what that one does and what the result does."""
    evaluations = [("self", "truth", own)] + ([("cross", "actor", cross)] if cross is not None else [])
    for label, who, each in evaluations:
        for name, values in each.truth.items():
            yield f"{label} {name}", who, values, each.result[name]
