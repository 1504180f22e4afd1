"""Quality against minutes: trains an avatar (and a pair) for a given time and measures held-out frames on the way.

    python benchmarks/curve.py DATASET [--actor DATASET] --recipe fast --minutes 2 -o FOLDER

DATASET is a folder that preprocessing wrote. In FOLDER: NAME.json with a row for each look (minutes and steps of
training, PSNR, SSIM, LPIPS of held-out frames; looks are no part of the minutes), and NAME-self.tar, NAME-cross.tar
with the pictures drawn at the end as KEY.jpg, KEY the frame they are driven by. `--recipe paper:key=value;key=value`
changes a recipe. Needs torch and the weights, none of Ray, MLflow, DeepSpeed; uses the GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavatar.cluster import bodies
from lavatar.cluster.plans import Phase, TrainingPlan, Worker, open_engine, release
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, StageKind, StageSpec
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.shards import encode_jpeg, sample_key
from lavatar.errors import Interrupted
from lavatar.inference.baselines import spread
from lavatar.inference.images import ImageScores, Truth, face_side, perceptual_metric
from lavatar.inference.loading import Avatar, best_device, load_avatar, load_pair
from lavatar.inference.reenact import Portraits, draw, driven_codes, driven_poses, poses_of, reenact_cross
from lavatar.inference.retarget import PoseStatistics, smoothed
from lavatar.platform.benchmark_budget import affordable, phase_seconds, with_steps
from lavatar.training.loop import train
from lavatar.training.optimizer import build_optimizer

GROWTH = 1.6  # each look so many times later than the one before
BATCH = 4
OFF = 10**9


class Look:
    """Figures of held-out frames, given the training task as it is now."""

    def __init__(self, held_out: FrameStore, recipe: Recipe, device: torch.device, frames: int) -> None:
        self.held_out, self.recipe, self.device = held_out, recipe, device
        self.indices = spread(len(held_out), frames)
        self.side = face_side(held_out.landmarks_N68x2, recipe.avatar.image_size)
        self.lpips, note = perceptual_metric(device)
        if note:
            print(note)

    def figures(self, task: Any) -> dict[str, Any]:
        """Whole portrait and face of the weights that would be released now."""
        model = copy.deepcopy(task.avatar)
        model.load_state_dict(task.released())
        poses = PoseStatistics.of(poses_of(task.store))
        subject = self.held_out.manifest
        return self.scores(
            Avatar(model.eval(), self.recipe.avatar, subject.subject, subject.digest, poses, self.device), self.indices
        )[0]

    def scores(self, avatar: Avatar, indices: np.ndarray) -> tuple[dict[str, Any], list[Portraits]]:
        """The figures, and the pictures they are of."""
        smoothing = self.recipe.evaluation.pose_smoothing
        scores, drawn = ImageScores(self.lpips), []
        poses = smoothed(poses_of(self.held_out), smoothing)
        for start in range(0, len(indices), BATCH):
            index_B = indices[start : start + BATCH]
            images = draw(avatar, driven_codes(avatar, self.held_out, index_B), poses[index_B])
            truth = np.stack([self.held_out.frame(int(i)).image for i in index_B])
            scores.add(images, Truth.of(truth, self.held_out.landmarks_N68x2[index_B], self.side, self.device))
            drawn.append(Portraits(index_B, images))
        return scores.summary(), drawn


class Watched:
    """Makes a task look at itself when it is due (training.tasks.MeasuredTask); keeps time without the looks."""

    def __init__(self, task: Any, look: Look, first: float, steps: set[int]) -> None:
        self.task, self.look, self.steps, self.done = task, look, steps, 0
        self.rows: list[dict[str, Any]] = []
        self.began, self.looked, self.due = 0.0, 0.0, first
        task.measure, task.figures = self.measure, dict

    def measure(self, done: int) -> dict[str, float]:
        self.done = done
        if done <= 1:  # the first step also sets up what later ones use
            synchronize()
            self.began, self.looked = time.monotonic(), 0.0
        if self.seconds() >= self.due:
            self.due = max(self.due, self.seconds()) * GROWTH
            self.add(done)
        elif done in self.steps:
            self.add(done)
        return {}

    def seconds(self) -> float:
        return time.monotonic() - self.began - self.looked

    def add(self, done: int) -> None:
        """One row of the curve; none where the last one stands already (a look that was due at the last step)."""
        if self.rows and self.rows[-1]["steps"] == done:
            return
        synchronize()
        seconds, start = self.seconds(), time.monotonic()
        figures = self.look.figures(self.task)
        self.rows.append({"seconds": round(seconds, 2), "steps": done, **figures})
        print(f"  {seconds:7.1f} s, {done:6d} steps: {told(figures)}", flush=True)
        synchronize()
        self.looked += time.monotonic() - start


def told(figures: dict[str, Any]) -> str:
    face = figures["face"]
    texts = [f"{figures['psnr']:.2f} dB, face {face['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}"]
    texts += [f"LPIPS {figures['lpips']:.4f}, face {face['lpips']:.4f}"] if figures["lpips"] is not None else []
    return ", ".join(texts)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stores:
    """The frames of each dataset, decoded once, in the place of the plans' own opening of them."""

    def __init__(self) -> None:
        self.open: dict[tuple[Path, int, str], FrameStore] = {}
        bodies._store = lambda folder, size, cache_mb, events, spec: self.get(folder, size, "train")

    def get(self, folder: Path, size: int, split: str) -> FrameStore:
        key = (Path(folder), size, split)
        if key not in self.open:
            store = FrameStore(folder, size, split, 10**6, max_bad=0)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(store.frame, range(len(store))))
            self.open[key] = store
        return self.open[key]


def prepared(recipe: str, overrides: list[str]) -> Recipe:
    """RECIPE or RECIPE:key=value;key=value, with an engine and intervals for a training that nobody takes up."""
    name, _, changes = recipe.partition(":")
    sections = ("avatar_training", "ynet_training", "mapping_training")
    own = [
        f"{s}.{key}" for s in sections for key in ("engine=torch", f"checkpoint_every={OFF}", f"picture_every={OFF}")
    ]
    return load_recipe(name, [*own, *overrides, *(text for text in changes.split(";") if text.strip())])


def spec_of(kind: StageKind, recipe: Recipe, out: Path, inputs: dict[str, Path]) -> StageSpec:
    return StageSpec(kind, kind.value, "", out, out / kind.value, inputs, recipe.model_dump(mode="json"))


def with_affordable(recipe: Recipe, which: str, plan: TrainingPlan, worker: Worker, seconds: float) -> Recipe:
    """The recipe with as many steps as the time allows."""
    each = phase_seconds(plan, worker)
    steps = affordable(seconds, each[0], sum(each[1:]), recipe.mapping_training.steps)
    print(f"  {which}: {', '.join(f'{1000 * s:.1f} ms' for s in each)} a step, {steps} steps", flush=True)
    return with_steps(recipe, which, steps)


def train_phase(
    phase: Phase, before: list[Any], worker: Worker, out: Path, watch: Any = None, limit: float = 0.0
) -> Any:
    """One training of a plan to its end."""
    task = phase.build(before, worker)
    watched = watch(task) if watch else None
    engine = open_engine(
        task.module, build_optimizer(task.param_groups(), task.module, phase.config), phase.config, worker
    )
    began, stop = time.monotonic(), (lambda: watched.seconds() > limit) if watched and limit else (lambda: False)
    with contextlib.suppress(Interrupted):
        train(task, phase.config, engine, out / phase.label, stop=stop)
    synchronize()
    print(f"  {phase.label}: {time.monotonic() - began:.1f} s with the looks", flush=True)
    if watched:
        watched.add(watched.done)
    engine.close()
    return task, watched


def write_pictures(path: Path, store: FrameStore, drawn: list[Portraits]) -> None:
    """The portraits as JPEGs by key."""
    with tarfile.open(path, "w") as tar:
        for part in drawn:
            for index, image in zip(part.index_B, part.images_BHW3, strict=True):
                data = encode_jpeg(image, 92)
                member = tarfile.TarInfo(f"{sample_key(store.metas[int(index)].frame)}.jpg")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--actor", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--name")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--pair-minutes", type=float, default=0.5)
    parser.add_argument("--stop", action="store_true", help="the recipe's own steps, cut off after --minutes")
    parser.add_argument("--first-look", type=float, default=5.0, help="seconds of training")
    parser.add_argument("--look-frames", type=int, default=24)
    parser.add_argument("--look-steps", type=int, nargs="*", default=[], help="looks after so many steps, too")
    parser.add_argument("--avatar", type=Path, help="a release, instead of training one")
    parser.add_argument("--frames", type=int, default=60, help="pictures that are kept")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    name = args.name or args.recipe
    work = args.out / f".{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    device = torch.device(best_device())
    worker, stores = Worker(device=device.type), Stores()
    recipe = prepared(args.recipe, args.set)
    size = recipe.avatar.image_size
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} on {where}", flush=True)
    began = time.monotonic()
    stores.get(args.dataset, size, "train")
    held_out = stores.get(args.dataset, size, "eval")
    look = Look(held_out, recipe, device, args.look_frames)
    print(f"  {len(held_out)} held-out frames; opened in {time.monotonic() - began:.1f} s", flush=True)
    result: dict[str, Any] = {"name": name, "device": where, "recipe": args.recipe, "rows": []}
    trained = args.avatar
    if trained is None:
        inputs = {"dataset": args.dataset}
        plan = bodies.avatar_plan(spec_of(StageKind.AVATAR, recipe, work, inputs), NullSink())
        if not args.stop:
            recipe = with_affordable(recipe, "avatar", plan, worker, 60 * args.minutes)
        spec = spec_of(StageKind.AVATAR, recipe, work, inputs)
        plan = bodies.avatar_plan(spec, NullSink())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        limit = 60 * args.minutes if args.stop else 0.0

        def watch(task: Any) -> Watched:
            return Watched(task, look, args.first_look, set(args.look_steps))

        task, watched = train_phase(plan.phases[0], [], worker, work, watch, limit)
        if device.type == "cuda":
            result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["rows"] = watched.rows
        release(spec.out_dir, lambda folder: plan.write_release(folder, [task]))
        trained = spec.out_dir / "release"
    avatar = load_avatar(trained, device)
    result["self"], drawn = look.scores(avatar, spread(len(held_out), args.frames))
    print(f"  self, {args.frames} frames: {told(result['self'])}", flush=True)
    write_pictures(args.out / f"{name}-self.tar", held_out, drawn)
    if args.actor:
        cross(args, recipe, avatar, trained, stores, worker, work, name)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work / "avatar" / "avatar", ignore_errors=True)


def cross(
    args: argparse.Namespace, recipe: Recipe, avatar: Avatar, trained: Path, stores: Stores, worker: Worker,
    work: Path, name: str,
) -> None:  # fmt: skip
    """Trains the pair and draws the avatar driven by the actor's held-out frames; coefficients drive without one."""
    pair = None
    if recipe.avatar.encoder != "coefficients":
        inputs = {"avatar": trained, "avatar_dataset": args.dataset, "actor_dataset": args.actor}
        plan = bodies.pair_plan(spec_of(StageKind.PAIR, recipe, work, inputs), NullSink())
        recipe = with_affordable(recipe, "ynet", plan, worker, 60 * args.pair_minutes)
        spec = spec_of(StageKind.PAIR, recipe, work, inputs)
        plan = bodies.pair_plan(spec, NullSink())
        tasks: list[Any] = []
        for phase in plan.phases:
            tasks.append(train_phase(phase, tasks, worker, work)[0])
        release(spec.out_dir, lambda folder: plan.write_release(folder, tasks))
        pair = load_pair(spec.out_dir / "release", avatar.device)
    actor = stores.get(args.actor, recipe.avatar.image_size, "eval")
    indices = spread(len(actor), args.frames)
    poses = driven_poses(avatar.poses, poses_of(actor), indices, recipe.evaluation.pose_smoothing)
    write_pictures(
        args.out / f"{name}-cross.tar", actor, list(reenact_cross(avatar, pair, actor, indices, poses, BATCH))
    )


if __name__ == "__main__":
    main()
