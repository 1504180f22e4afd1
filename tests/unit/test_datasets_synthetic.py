"""Synthetic subjects: deterministic, consistent in three dimensions, measurable."""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import EXPRESSIONS, Camera, FrameMeta, NullSink, VideoSource
from lavatar.datasets import shards, synthetic_meter
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.preprocess import preprocess
from lavatar.datasets.synthetic import default_camera, default_pose, project, render
from lavatar.datasets.synthetic_acting import performance
from lavatar.datasets.synthetic_head import Expression, Face, Identity
from lavatar.datasets.synthetic_landmarks import irises, landmarks
from lavatar.datasets.synthetic_meter import SyntheticMeter
from lavatar.errors import StorageError

ANNA, BEN = Identity.from_seed(1), Identity.from_seed(0)
CAMERA = default_camera(128)


def picture(identity: Identity, pose: Any = None, camera: Camera = CAMERA, **expression: float) -> np.ndarray:
    return render(identity, Expression(**expression), pose or default_pose(), camera)[0]


def test_the_same_arguments_give_the_same_bytes() -> None:
    pose = default_pose(9, -4, 3)
    first, second = (render(ANNA, Expression(jaw=0.4, gaze=-0.5, tongue=0.3), pose, CAMERA) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    assert Identity.from_seed(7) == Identity.from_seed(7) != Identity.from_seed(8)


def test_picture_is_white_outside_and_opaque_inside() -> None:
    rgb, alpha, points = render(ANNA, Expression(), default_pose(), CAMERA)
    assert rgb.shape == (128, 128, 3)
    assert (rgb[alpha == 0] == 1).all()
    assert 0 <= rgb.min() <= rgb.max() <= 1
    assert 0.4 < (alpha == 1).mean() < 0.8
    soft = (alpha > 0) & (alpha < 1)
    assert 0.002 < soft.mean() < 0.05  # edges are blended, over a pixel
    columns, rows = points.astype(int).T
    assert (alpha[rows, columns] == 1).mean() > 0.9  # contour points may lie on the rim


def test_identities_differ_more_than_expressions() -> None:
    def far(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).mean())

    faces = [picture(Identity.from_seed(seed), camera=default_camera(64)) for seed in range(5)]
    smiling = picture(Identity.from_seed(0), camera=default_camera(64), smile=1.0)
    assert min(far(a, b) for k, a in enumerate(faces) for b in faces[:k]) > 3 * far(faces[0], smiling)


@pytest.mark.parametrize("name", [*EXPRESSIONS, "gaze_up", "tongue"])
def test_each_expression_moves_its_part_of_the_face(name: str) -> None:
    jaw = 0.4 if name == "tongue" else 0.0
    rest, moved = picture(ANNA, jaw=jaw), picture(ANNA, **{"jaw": jaw, name: 1.0})
    change = np.abs(moved - rest).mean(2)
    centre = (change.sum(1) * np.arange(128)).sum() / change.sum()
    eyes, mouth = (project(np.array([[0, y, 0.6]]), default_pose(), CAMERA)[0, 1] for y in (0.15, -0.6))
    wanted = mouth if name in ("jaw", "smile", "pucker", "tongue") else eyes
    assert change.max() > 0.2
    assert abs(centre - wanted) < 18
    assert (change[:12] < 0.02).all()  # the hair stays


def test_landmarks_follow_the_face() -> None:
    def at(**expression: float) -> np.ndarray:
        return landmarks(Face.of(ANNA, Expression(**expression)))

    rest = at()
    assert rest.shape == (68, 3)
    assert at(jaw=1)[8, 1] < rest[8, 1] - 0.25  # the chin sinks
    assert at(jaw=1)[66, 1] < at(jaw=1)[62, 1] - 0.3  # the lips part
    assert at(blink=1)[37, 1] - at(blink=1)[41, 1] < 0.2 * (rest[37, 1] - rest[41, 1])
    assert at(brows=1)[19, 1] > rest[19, 1] + 0.1 > at(brows=-1)[19, 1] + 0.1
    assert np.ptp(at(smile=1)[[48, 54], 0]) > np.ptp(rest[[48, 54], 0]) > np.ptp(at(pucker=1)[[48, 54], 0])
    assert at(smile=1)[48, 1] > rest[48, 1] + 0.05
    assert np.abs(at(jaw=1, smile=1, blink=1, pucker=1)[[36, 39, 42, 45]] - rest[[36, 39, 42, 45]]).max() < 0.06
    mirrored = rest[[16, 15, 14], 0] + rest[[0, 1, 2], 0]
    assert np.abs(mirrored).max() < 0.02


def test_irises_lie_where_the_pupils_are_drawn() -> None:
    camera, pose = default_camera(256), default_pose(yaw=8.0, pitch=-4.0)
    for gaze in (-0.8, 0.0, 0.8):
        face = Face.of(ANNA, Expression(gaze=gaze))
        rgb, _, _ = render(ANNA, face.expression, pose, camera)
        for u, v in project(irises(face), pose, camera):
            patch = rgb[round(v) - 6 : round(v) + 6, round(u) - 6 : round(u) + 6].mean(2)
            rows, columns = np.nonzero(patch < 0.12)  # the pupil is the darkest there is
            assert rows.size > 8
            assert abs(columns.mean() + 0.5 - 6 - (u - round(u))) < 1.2
            assert abs(rows.mean() + 0.5 - 6 - (v - round(v))) < 1.2


def test_turned_heads_show_the_same_points_in_the_same_colours() -> None:
    """Points of the surface seen from two sides have one colour: geometry and paint live on one 3D head."""
    camera, expression = default_camera(256), Expression(smile=0.6, brows=0.5)
    x, y = (g.ravel() for g in np.meshgrid(np.linspace(-0.5, 0.5, 25), np.linspace(-0.85, 0.6, 33)))
    from lavatar.datasets.synthetic_head import march

    origin = np.stack([x, y, np.full_like(x, 1.05)]).astype(np.float32)
    ahead = np.repeat(np.array([[0.0], [0.0], [-1.0]], np.float32), x.size, 1)
    face = Face.of(ANNA, expression)
    t, miss = march(face, origin, ahead, np.zeros(x.size, np.float32), 0.01, rounds=20)
    points = (origin + ahead * t).T[miss == 0]
    blurred, seen = [], []
    for pose in (default_pose(), default_pose(12, 5, -4)):
        rgb = render(ANNA, expression, pose, camera)[0]
        pixels = project(points, pose, camera)
        soft = cv2.GaussianBlur(rgb, (0, 0), 1.0)
        at = pixels.astype(np.float32) - 0.5
        blurred.append(cv2.remap(soft, at[:, 0], at[:, 1], cv2.INTER_LINEAR)[:, 0])
        seen.append(pixels)
    difference = np.abs(blurred[0] - blurred[1]).mean(1)
    assert np.abs(seen[0] - seen[1]).mean() > 6  # the points did move
    assert np.median(difference) < 0.02
    assert np.mean(difference < 0.08) > 0.9


def test_a_larger_picture_is_the_same_picture() -> None:
    small = picture(BEN, jaw=0.5)
    large = cv2.resize(picture(BEN, camera=default_camera(256), jaw=0.5), (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(small - large).mean() < 0.012


def test_acting_is_varied_and_independent_and_the_end_shows_everything() -> None:
    for seed in (0, 1, 5, 12):
        frames = performance(seed, 400)
        assert frames[:50] == performance(seed, 50)
        table = np.array([list(asdict(expression).values()) for expression, _ in frames])
        names = list(asdict(frames[0][0]))
        six = [names.index(name) for name in EXPRESSIONS]
        mixed = np.corrcoef(table[:, six].T) - np.eye(6)
        assert np.abs(mixed).max() < 0.45
        for part in (table[:360], table[360:]):
            assert (np.ptp(part[:, six], axis=0) > 0.4).all(), seed
        closed = table[:, names.index("blink")] > 0.95
        assert 0.15 < closed[:360].mean() < 0.5
        assert closed[360:].sum() >= 4
        assert np.abs(np.diff(table, axis=0)).max() < 0.7


def yardstick() -> float:
    """Seconds of CPU time of a fixed piece of the renderer's kind of work: gathers and arithmetic on 20,000 numbers."""
    values = np.random.default_rng(0).random(20_000, dtype=np.float32)
    order = np.random.default_rng(1).integers(0, 20_000, 20_000)
    start, curve = time.process_time(), values
    for _ in range(60):
        curve = np.clip(curve[order] * 1.1 - 0.05, 0, 1)
        curve = curve * curve * (3 - 2 * curve) + np.exp(-curve * curve) * 0.1
    return time.process_time() - start


def test_twenty_frames_a_second() -> None:
    """
    On one core at 256², in CPU time. A core that is shared is slower than the yardstick's 6 ms and is let off by as
    much; one that is faster at the yardstick owes no more frames for it.
    """
    camera, took, unit = default_camera(256), [], []
    for number, (expression, pose) in enumerate(performance(3, 60)[::2]):
        unit.append(yardstick())
        start = time.process_time()
        render(Identity.from_seed(number % 5), expression, pose, camera)
        took.append(time.process_time() - start)
    rate = max(1, np.median(unit) / 0.006) / np.median(took)
    assert rate > 20, f"{rate:.1f} frames/s ({np.median(took):.3f} s a frame, yardstick {np.median(unit):.4f} s)"


def small_config(**changes: Any) -> PreprocessConfig:
    values = {"portrait_size": 64, "face_size": 48, "synthetic_frames": 24, "segment_frames": 10}
    return PreprocessConfig(**{**values, **changes})


def make(folder: Path, parallel: Any, name: str = "anna") -> shards.Manifest:
    source = VideoSource(name, synthetic_seed=1)
    return preprocess(source, small_config(), folder, parallel=parallel, events=NullSink(), stage="preprocess")


def test_dataset_is_byte_identical_for_any_number_of_workers(tmp_path: Path) -> None:
    one = make(tmp_path / "one", map)
    with ThreadPoolExecutor(3) as pool:
        three = make(tmp_path / "three", pool.map)
    assert one == three == shards.verify(tmp_path / "three")
    assert (one.frames, one.train, one.eval, len(one.tars)) == (24, 22, 2, 3)
    assert one.kind == "synthetic"
    assert one.source["seed"] == 1
    assert 0 <= one.reprojection_px < 0.5


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """No file of this process may grow past 16 KiB: writing more fails in the kernel, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, old[1]))
    try:
        with pytest.raises(StorageError, match="d") as caught:
            make(tmp_path / "d", map)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "space" in caught.value.hint
    assert not (tmp_path / "d").exists()
    assert make(tmp_path / "d", map).frames == 24


def test_dataset_holds_the_truth(tmp_path: Path) -> None:
    make(tmp_path, map)
    store = FrameStore(tmp_path, 64, None)
    meta: FrameMeta = store.metas[7]
    expression, pose = performance(1, 24)[7]
    assert meta.pose == pose
    assert meta.expression["gaze_up"] == pytest.approx(expression.gaze_up, abs=1e-5)
    rgb, _, points = render(ANNA, expression, pose, Camera(2500.0, 128.0, 128.0, 256))
    wanted = cv2.resize(rgb, (64, 64), interpolation=cv2.INTER_AREA) * 255
    assert np.abs(store.frame(7).image - wanted).mean() < 3  # JPEG
    assert np.abs(np.array(meta.landmarks) - points / 4).max() < 0.01
    pupils = project(irises(Face.of(ANNA, expression)), pose, Camera(2500.0, 128.0, 128.0, 256))
    assert np.abs(np.array(meta.irises) - pupils / 4).max() < 0.01
    eyes = np.array(meta.face_transform)[:, :2] @ np.array(meta.landmarks)[[36, 45]].T
    assert store.frame(7).face.shape == (48, 48, 3)
    assert abs(eyes[1, 0] - eyes[1, 1]) < 2  # the face crop is upright


def test_meter_reads_all_six_from_sharp_and_soft_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = default_camera(256)
    acted = performance(77, 240)[::4]
    base = [np.rint(render(BEN, e, p, camera)[0] * 255).astype(np.uint8) for e, p in acted]
    affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    blank = FrameMeta(0, 0.0, "eval", (), acted[0][1], camera, affine, affine, 1.0)
    metas = [replace(blank, pose=pose) for _, pose in acted]
    small = [cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA) for image in base]
    soft = [cv2.GaussianBlur(image, (0, 0), 1.0) for image in small]
    open_ = np.array([e.blink < 0.5 for e, _ in acted])
    meter = SyntheticMeter(BEN)
    for images, least in ((base, 0.97), (small, 0.97), (soft, 0.97)):
        measured = meter.measure(np.stack(images), metas)
        for name in EXPRESSIONS:
            truth = np.array([getattr(e, name) for e, _ in acted])
            use = np.isfinite(measured[name])
            seen = open_ if name == "gaze" else np.full(len(acted), True)  # the gaze of closed eyes cannot be seen
            assert (use == seen).mean() > 0.95, name
            a, b = measured[name][use], truth[use]
            assert np.corrcoef(a, b)[0, 1] > least, name
            assert 0.9 < a.std() / b.std() < 1.1, name
    guessed = meter.measure(np.stack(small), None)
    assert np.corrcoef(guessed["jaw"], [e.jaw for e, _ in acted])[0, 1] > 0.95
    synthetic_meter._calibrate.cache_clear()
    monkeypatch.setattr(synthetic_meter, "render", None)  # another process calibrates nothing
    again = SyntheticMeter(BEN).measure(np.stack(small), None)
    assert {name: values.tobytes() for name, values in again.items()} == {n: v.tobytes() for n, v in guessed.items()}


def test_meter_finds_the_landmarks_of_mouth_and_eyes_where_they_are() -> None:
    """Sharp, soft, and moved by two pixels of 128 against the pose that the meter is told."""
    camera = default_camera(256)
    affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    images, metas, truth = [], [], []
    for expression, pose in performance(77, 240)[::6]:
        rgb, _, points = render(BEN, expression, pose, camera)
        images.append(cv2.resize(np.rint(rgb * 255).astype(np.uint8), (128, 128), interpolation=cv2.INTER_AREA))
        metas.append(FrameMeta(0, 0.0, "eval", (), pose, camera, affine, affine, 1.0))
        truth.append(points / 256)
    truth_B68x2 = np.stack(truth)
    between_B1 = np.linalg.norm(truth_B68x2[:, 36] - truth_B68x2[:, 45], axis=1)[:, None]
    meter = SyntheticMeter(BEN)
    for blur, shift in ((0.0, (0, 0)), (1.0, (0, 0)), (0.7, (2, 0)), (0.7, (0, 2)), (0.7, (-2, -2))):
        move = np.array([[1.0, 0.0, shift[0]], [0.0, 1.0, shift[1]]])
        moved = [cv2.warpAffine(i, move, (128, 128), borderMode=cv2.BORDER_REPLICATE) for i in images]
        soft = [cv2.GaussianBlur(i, (0, 0), blur) if blur else i for i in moved]
        sight = meter.look(np.stack(soft), metas)
        off = (sight.landmarks_B68x2 - truth_B68x2 - np.array(shift) / 128) / between_B1[..., None]
        error = np.linalg.norm(off, axis=2)
        assert error[:, 36:48].mean() < 0.008, (blur, shift)
        assert error[:, 48:68].mean() < 0.012, (blur, shift)
        found = (sight.landmarks_B68x2 - truth_B68x2)[:, 36:68].mean((0, 1)) * 128
        assert np.abs(found - shift).max() < 0.3  # pixels
    measured = meter.measure(np.stack(soft), metas)
    assert all(np.array_equal(measured[name], sight.measures[name], equal_nan=True) for name in EXPRESSIONS)


def test_meter_sees_a_mouth_that_is_in_the_wrong_place() -> None:
    """Only the mouth is moved: its landmarks say so, and those of the eyes stay."""
    camera, pose = default_camera(128), default_pose(0, 0, 0)
    rgb, _, points = render(BEN, Expression(jaw=0.4, smile=0.3), pose, camera)
    image = np.rint(rgb * 255).astype(np.uint8)
    affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    meta = FrameMeta(0, 0.0, "eval", (), pose, camera, affine, affine, 1.0)
    x, y = points[48:68].mean(0)
    inside = np.hypot(*(np.indices((128, 128))[::-1] + 0.5 - np.array([x, y])[:, None, None]))
    weight = np.clip((26 - inside) / 6, 0, 1)[..., None]  # a disc around the mouth, faded over six pixels
    moved = (weight * np.roll(image, 2, axis=1) + (1 - weight) * image).round().astype(np.uint8)
    sight = SyntheticMeter(BEN).look(np.stack([image, moved]), [meta, meta])
    step = (sight.landmarks_B68x2[1] - sight.landmarks_B68x2[0]) * 128
    assert step[48:68].mean(0) == pytest.approx([2, 0], abs=0.4)
    assert np.abs(step[36:48]).max() < 0.4
