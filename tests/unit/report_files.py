"""A home with jobs whose stages are small functions, but whose videos, pictures, pages and curves are real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from platform_fakes import METRICS, FakeHandle, FakeRunner, finish, fresh, make_plan, make_plan_of, no_models, office
from platform_fakes import use_plain_digest as plain_digests

from lavatar.contracts import EXPRESSIONS, Camera, FrameMeta, HeadPose, StageKind, StageResult
from lavatar.errors import FaceError, StageFailedError
from lavatar.inference.chart import Curve, chart
from lavatar.inference.encode_video import write_video
from lavatar.inference.page import Section, page
from lavatar.inference.panels import sheet
from lavatar.inference.showcase import Shown
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry

HOSTILE = '"><script>alert(1)</script><img src="http://127.0.0.1:9/x" onerror="alert(2)">&amp;</style></title>'
STEPS = 40
ROW = {
    "mse": 0.00123, "psnr": 28.41, "ssim": 0.931, "lpips": 0.0421, "flicker": 1.22, "expression_error": 0.41,
    "spread": {"mse": 0.0004, "psnr": 1.32, "ssim": 0.011, "lpips": 0.009, "flicker": 0.5, "expression_error": 0.2},
    "face": {"psnr": 26.1, "ssim": 0.911, "lpips": 0.051, "spread": {"psnr": 1.1, "ssim": 0.02, "lpips": 0.01}},
    "landmark_error": {"mouth": 0.021, "eyes": 0.015, "spread": {"mouth": 0.01, "eyes": 0.007}},
    "identity": {"distance": 0.24, "spread": {"distance": 0.04}, "reference": {"distance": 0.21}},
    "expression": {name: {"r": 0.88, "amplitude": 1.04, "error": 0.42} for name in EXPRESSIONS},
}  # fmt: skip
FULL = {"self": ROW, "mean_frame": ROW, "nearest_frame": ROW, "cross": {**ROW, "truth": ROW}}
"""The widest tables."""


class World:
    """Jobs by what they are for: plain, changed (of another recipe, failed once), full (every figure there is), many (a
    pair failed), hostile."""

    def __init__(self, home: Home, registry: Registry) -> None:
        self.home, self.registry = home, registry
        self.plain, self.changed = make_plan(home), make_plan(home, "A", "B", "avatar_training.steps=7")
        self.full = make_plan(home, "A", "B", "avatar_training.steps=8")
        self.many = make_plan_of(home, "AB AC DB")
        self.hostile = make_plan(home, "H" + HOSTILE, "B")
        self.run(self.plain)
        self.fail(self.changed, "avatar", "the face is lost for 3.2 s")
        self.run(self.changed)
        self.run(self.full, preview=partial(preview, figures=FULL))
        self.fail(self.many, "preview:A<-C", "the disk is full")
        self.fail(self.hostile, "pair", HOSTILE)

    def run(self, plan: Plan, **bodies: Callable[[FakeHandle], StageResult]) -> None:
        named = {"avatar": train, "pair": train, "preview": preview, **bodies}
        run_job(office(self.home, self.registry, FakeRunner(named)), plan)

    def fail(self, plan: Plan, stage: str, message: str) -> None:
        """Run a job of which a stage fails."""

        def broken(handle: FakeHandle) -> StageResult:
            raise FaceError(message, "Look at the video.")

        with suppress(StageFailedError):
            self.run(plan, **{stage: broken})


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """MLflow is the real one, on SQLite; nothing is registered in it."""
    with pytest.MonkeyPatch.context() as patch:
        plain_digests(patch)
        for name in ("LAVATAR_REGISTRY", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.setenv("LAVATAR_HOME", str(folder))
        no_models(patch)
        patch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
        yield World(*fresh(folder))


def train(handle: FakeHandle) -> StageResult:
    """Two terms that fall over orders of magnitude, their total and a rate, in the stage's run."""
    assert handle.factory is not None
    sink = handle.factory()
    for step in range(1, STEPS + 1):
        terms = {"l1": 0.5 / step, "mask": 0.1 / step**2}
        values = {**terms, "total": sum(terms.values()), "rate/planes": 1e-3, "timing/samples_per_second": 7.0}
        sink.log_metrics(step, {f"{handle.spec.kind.value}/{name}": value for name, value in values.items()})
    sink.close()
    return finish(handle)


def preview(handle: FakeHandle, figures: Mapping[str, Any] = METRICS) -> StageResult:
    """A film of two seconds, two stills and the page of an evaluation."""
    folder = handle.spec.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    moments = [np.full((64, 64, 3), 20 + 9 * i, np.uint8) for i in range(8)]
    film = (np.concatenate([moments[i % 8], moments[0]], axis=1) for i in range(50))
    write_video(folder / "preview.mp4", film, 25.0)
    _write_png(folder / "still.png", sheet([moments, moments], ["actor", "avatar"], 64))
    _write_png(folder / "self.png", sheet([moments, moments], ["truth", "result"], 64))
    text = page(
        "evaluation", figures, [], [_section(moments)], [chart("self jaw", [Curve("truth", ((0, 0.1), (1, 0.4)))])]
    )
    (folder / "index.html").write_text(text)
    names = {"video": "preview.mp4", "still": "still.png", "self_still": "self.png", "page": "index.html"}
    assert handle.spec.kind is StageKind.PREVIEW
    return StageResult({name: folder / file for name, file in names.items()}, figures, ("a note of the preview",))


def _section(moments: list[np.ndarray]) -> Section:
    pose = HeadPose(((1, 0, 0), (0, 1, 0), (0, 0, 1)), (0, 0, 4), 0.1)
    affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    shown = []
    for i, kind in enumerate(("best", "best", "median", "worst")):
        meta = FrameMeta(i, i / 25, "eval", (), pose, Camera(1, 1, 1, 32), affine, affine, 1.0)
        shown.append(Shown(kind, meta, (("ground truth", moments[i]), ("result", moments[i])), {"psnr": 30.0 - i}))
    return Section("Self reenactment", "text", shown, True)


def _write_png(path: Path, picture: np.ndarray) -> None:
    import cv2

    assert cv2.imwrite(str(path), picture[..., ::-1])
