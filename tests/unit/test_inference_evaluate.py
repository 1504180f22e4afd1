"""The whole of the evaluation against models whose quality is known: an oracle, a frozen face, and an untrained net."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lavatar.contracts import EXPRESSIONS, Event, HeadPose, NullSink, StageKind, StageResult, StageSpec
from lavatar.datasets import synthetic
from lavatar.datasets.loader import FrameStore, over_white
from lavatar.datasets.sight import Sight
from lavatar.errors import DataError
from lavatar.inference.baselines import spread
from lavatar.inference.evaluate import evaluate_both, evaluate_cross, evaluate_self
from lavatar.inference.loading import Avatar, Pair, load_avatar, load_pair
from lavatar.inference.preview import make_preview
from lavatar.inference.reenact import poses_of
from lavatar.inference.retarget import PoseStatistics, PoseTrack, smoothed
from lavatar.inference.trivial import Trivial
from lavatar.inference.write_evaluation import write_evaluation
from lavatar.models.avatar import Rendering
from tests.unit.inference_files import RECIPE, SIZE, make_avatar_release, make_pair_release, make_subject, turn, wave

Run = tuple[StageSpec, StageResult, "Sink"]
MEASURED = ("jaw", "blink", "smile", "gaze")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The nets here are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Avatar and actor: two synthetic people who act alike; the actor lost two frames."""
    folder = tmp_path_factory.mktemp("subjects")
    return make_subject(folder / "1", 1), make_subject(folder / "2", 2, missing=(23, 24))


class Oracle(nn.Module):
    """Knows every face it was shown: θ is the number of the frame, the portrait is drawn as the dataset's are."""

    def __init__(self, known: FrameStore, seed: int, frozen: bool = False) -> None:
        super().__init__()
        self.numbers = {known.frame(i).face.tobytes(): m.frame for i, m in enumerate(known.metas)}
        self.identity, self.frozen = synthetic.Identity.from_seed(seed), frozen

    def encode(self, face_B3HH: Tensor) -> Tensor:
        faces = (face_B3HH * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return torch.tensor([[float(self.numbers[f.tobytes()])] for f in faces])

    def render(self, codes: Tensor, rotation: Tensor, translation: Tensor, scale: Tensor, noise: bool) -> Rendering:
        camera, images = synthetic.default_camera(SIZE), []
        parts = (codes[:, 0], rotation.tolist(), translation.tolist(), scale.tolist())
        for code, r, t, s in zip(*parts, strict=True):
            values = wave(0 if self.frozen else int(code))
            pose = HeadPose(tuple(map(tuple, r)), tuple(t), s)
            rgb, alpha, _ = synthetic.render(self.identity, synthetic.Expression(**values), pose, camera)
            image = over_white((rgb * 255).round().astype(np.uint8), (alpha * 255).round().astype(np.uint8))
            images.append(cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        drawn = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return Rendering(drawn, drawn, drawn, drawn[:, :1])


def oracle(dataset: Path, frozen: bool = False) -> Avatar:
    config = RECIPE.avatar.model_copy(update={"image_size": SIZE, "face_size": 32})
    poses = PoseStatistics.of(PoseTrack.of([turn(i) for i in range(30)]))
    model: Any = Oracle(FrameStore(dataset, SIZE, None), 1, frozen)
    return Avatar(model, config, "ann", "digest1", poses, torch.device("cpu"))


class Mapping(nn.Module):
    """The oracles' codes are the same."""

    def forward(self, gamma: Tensor, subject: str) -> Tensor:
        assert subject == "actor"
        return gamma


def oracle_pair(actor: Path) -> Pair:
    seen: Any = Oracle(FrameStore(actor, SIZE, None), 2)
    mapping: Any = Mapping()
    return Pair(seen, mapping, 6, 32, "ann", "bob", torch.device("cpu"))


def test_an_oracle_is_perfect_and_beats_the_trivial(subjects: tuple[Path, Path]) -> None:
    metrics = evaluate_self(oracle(subjects[0]), subjects[0], RECIPE).metrics
    assert metrics["self"]["psnr"] > 35
    assert metrics["self"]["ssim"] > 0.98
    assert metrics["self"]["frames"] == 10
    assert metrics["self"]["no_face"] == 0
    for name in MEASURED:
        assert metrics["self"]["expression"][name]["r"] > 0.97
        assert metrics["self"]["expression"][name]["amplitude"] == pytest.approx(1, abs=0.1)
        assert metrics["self"]["expression"][name]["error"] < 0.3
    assert metrics["self"]["expression_error"] < 0.3
    assert 0 < metrics["self"]["spread"]["psnr"] < 5
    assert 0 < metrics["self"]["spread"]["expression_error"] < metrics["nearest_frame"]["spread"]["expression_error"]
    for region in ("mouth", "eyes"):
        assert metrics["self"]["landmark_error"][region] < 0.02
        assert metrics["nearest_frame"]["landmark_error"][region] > metrics["self"]["landmark_error"][region]
    assert metrics["self"]["flicker"] < metrics["mean_frame"]["flicker"] / 3  # what is left is JPEG's
    for trivial in ("mean_frame", "nearest_frame"):
        assert metrics[trivial]["psnr"] < metrics["self"]["psnr"] - 5
        assert metrics[trivial]["face"]["mse"] > metrics["self"]["face"]["mse"]
    assert metrics["mean_frame"]["expression"]["jaw"]["r"] is None
    assert metrics["nearest_frame"]["expression"]["jaw"]["amplitude"] > 0


def test_a_frozen_face_is_seen(subjects: tuple[Path, Path]) -> None:
    """Same pictures but for the expression: good PSNR, no correlation, no amplitude."""
    metrics = evaluate_self(oracle(subjects[0], frozen=True), subjects[0], RECIPE).metrics["self"]
    for name in MEASURED:
        assert metrics["expression"][name]["amplitude"] < 0.5  # half-closed lids make gaze uncertain
        assert metrics["expression"][name]["error"] > 0.9
    assert metrics["psnr"] > 15


def test_cross_oracle_meets_the_truth_of_a_synthetic_pair(subjects: tuple[Path, Path]) -> None:
    avatar, pair = oracle(subjects[0]), oracle_pair(subjects[1])
    evaluation = evaluate_cross(avatar, pair, *subjects, RECIPE)
    cross = evaluation.metrics["cross"]
    assert cross["frames"] == 8
    for name in MEASURED:
        assert cross["expression"][name]["r"] > 0.8  # two meters, eight frames of 64²
        assert cross["truth"]["expression"][name]["r"] > 0.97
    assert cross["truth"]["psnr"] > 30
    assert cross["truth"]["expression_error"] < 0.3
    assert cross["truth"]["flicker"] < 3
    assert cross["truth"]["landmark_error"]["mouth"] < 0.02
    assert "flicker" not in cross  # two people have no common truth
    assert "landmark_error" not in cross
    assert set(evaluation.truth) == set(EXPRESSIONS)


def test_identity_of_the_result_is_that_of_the_truth(subjects: tuple[Path, Path], face_recognition: Path) -> None:
    metrics = evaluate_both(oracle(subjects[0]), subjects[0], RECIPE, oracle_pair(subjects[1]), subjects[1]).metrics
    for row in (metrics["self"], metrics["cross"]["truth"]):
        assert row["identity"]["distance"] < 0.15
        assert row["identity"]["distance"] < row["identity"]["reference"]["distance"]
    assert metrics["cross"]["identity"]["distance"] == pytest.approx(
        metrics["cross"]["identity"]["reference"]["distance"], abs=0.1
    )
    own, nearest, mean = (metrics[row]["identity"]["distance"] for row in ("self", "nearest_frame", "mean_frame"))
    assert own < nearest < 0.6, "a true frame, with another expression"
    assert own < mean
    assert metrics["mean_frame"]["identity"]["reference"] == metrics["self"]["identity"]["reference"]


def test_a_mean_frame_without_a_face_has_no_identity_and_the_note_says_why(
    subjects: tuple[Path, Path], face_recognition: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Trivial.look

    def blurred(self: Trivial, landmarks_B68x2: np.ndarray) -> dict[str, Sight]:
        """As a head that turns about leaves it."""
        seen = look(self, landmarks_B68x2)
        mean = seen["mean_frame"]
        return {**seen, "mean_frame": Sight(mean.measures, np.full_like(mean.landmarks_B68x2, np.nan))}

    monkeypatch.setattr(Trivial, "look", blurred)
    recipe = RECIPE.model_copy(update={"evaluation": RECIPE.evaluation.model_copy(update={"max_frames": 3})})
    evaluation = evaluate_self(oracle(subjects[0]), subjects[0], recipe)
    assert evaluation.metrics["mean_frame"]["identity"]["distance"] is None
    assert evaluation.metrics["nearest_frame"]["identity"]["distance"] > 0
    assert "identity of mean frame is null: no face was found in it" in evaluation.notes


def test_held_out_poses_are_smoothed_where_the_recipe_says_so(subjects: tuple[Path, Path]) -> None:
    """evaluation.self_smoothing: the frames measured are drawn under the smoothed track of all held-out poses."""
    options = RECIPE.evaluation.model_copy(update={"max_frames": 3, "self_smoothing": 2.0})
    avatar, store = oracle(subjects[0]), FrameStore(subjects[0], SIZE, "eval")
    render, drawn = avatar.model.render, []

    def watched(codes: Tensor, rotation: Tensor, translation: Tensor, scale: Tensor, noise: bool) -> Rendering:
        drawn.append(rotation)
        return render(codes, rotation, translation, scale, noise)

    avatar.model.render = watched
    evaluate_self(avatar, subjects[0], RECIPE.model_copy(update={"evaluation": options}))
    chosen = spread(len(store), 3)
    wanted = smoothed(poses_of(store), 2.0)[chosen].rotation_N33
    assert np.allclose(torch.cat(drawn).numpy(), wanted, atol=1e-6)
    assert np.abs(wanted - store.rotation_N33[chosen]).max() > 0.01


def test_max_frames_are_spread(subjects: tuple[Path, Path]) -> None:
    recipe = RECIPE.model_copy(update={"evaluation": RECIPE.evaluation.model_copy(update={"max_frames": 3})})
    metrics = evaluate_both(oracle(subjects[0]), subjects[0], recipe).metrics
    assert list(metrics) == ["self", "mean_frame", "nearest_frame"]
    assert metrics["self"]["frames"] == 3
    assert metrics["self"]["flicker"] is None
    json.dumps(metrics, allow_nan=False)


class Sink(NullSink):
    """Remembers what was logged."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pictures: list[str] = []
        self.metrics: dict[str, float] = {}

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def log_picture(self, step: int, name: str, image_hwc: Any) -> None:
        assert image_hwc.dtype == np.uint8
        self.pictures.append(name)

    def log_metrics(self, step: int, metrics: Any) -> None:
        self.metrics.update(metrics)


@pytest.fixture(scope="module")
def preview(subjects: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The stage run once with untrained models."""
    folder = tmp_path_factory.mktemp("job")
    inputs = {
        "avatar": make_avatar_release(folder / "a"), "pair": make_pair_release(folder / "p"),
        "avatar_dataset": subjects[0], "actor_dataset": subjects[1],
    }  # fmt: skip
    out, recipe = folder / "outputs" / "key", RECIPE.model_dump(mode="json")
    spec = StageSpec(StageKind.PREVIEW, "preview:ann:bob", "key", folder, out, inputs, recipe)
    sink = Sink()
    return spec, make_preview(spec, sink, sink), sink


def test_preview_leaves_the_files_of_the_issue(preview: Run) -> None:
    spec, result, sink = preview
    assert {p.name for p in spec.out_dir.iterdir()} == {p.name for p in result.artefacts.values()}
    assert [p.name for p in spec.out_dir.parent.iterdir()] == ["key"]
    metrics = json.loads(result.artefacts["metrics"].read_text())
    assert metrics == result.metrics
    assert list(metrics) == ["self", "cross", "mean_frame", "nearest_frame"]
    for row in ("self", "mean_frame", "nearest_frame"):
        assert {"mse", "psnr", "ssim", "lpips", "expression"} <= set(metrics[row])
    for row in metrics.values():
        assert tuple(row["expression"]) == EXPRESSIONS
        assert all(set(figure) == {"r", "amplitude", "error"} for figure in row["expression"].values())
    assert {"still", "self", "expression"} <= set(sink.pictures)
    assert sink.metrics["self/psnr"] == pytest.approx(metrics["self"]["psnr"])
    assert any(e.done == e.total for e in sink.events if e.total)


def test_a_job_and_evaluate_give_the_same_figures(preview: Run, tmp_path: Path) -> None:
    """The panels of the film have another size than the pictures that are measured."""
    spec, result, _ = preview
    data = spec.inputs["avatar_dataset"], RECIPE, load_pair(spec.inputs["pair"]), spec.inputs["actor_dataset"]
    avatar = load_avatar(spec.inputs["avatar"])
    both = evaluate_both(avatar, *data)
    assert both.metrics == result.metrics
    files = write_evaluation(tmp_path / "page", both, avatar, *data)
    for name, path in files.items():
        assert path.name == result.artefacts[name].name
    assert files["metrics"].read_bytes() == result.artefacts["metrics"].read_bytes()


def test_the_page_needs_nothing_else(preview: Run) -> None:
    text = preview[1].artefacts["page"].read_text()
    assert text.count("data:image/jpeg") == 9 * 3 + 6 * 4  # ten frames of the avatar, eight of the actor
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    shown = re.findall(r"LPIPS\u00a0<b>([\d.]+)|PSNR\u00a0<b>([\d.]+)", text)
    assert len(shown) >= 15
    assert text.count("<title>truth</title>") == text.count("<title>actor</title>") > 0
    for word in (
        "ann driven by bob",
        "ground truth",
        "error",
        "best",
        "median",
        "worst",
        "cross against truth",
        "64 of 255",
    ):
        assert word in text
    assert "cross against truth" in preview[1].artefacts["table"].read_text()


def test_preview_shows_actor_and_result(preview: Run, subjects: tuple[Path, Path]) -> None:
    _, result, _ = preview
    with av.open(str(result.artefacts["video"])) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 25
    assert len(frames) == 10  # eight frames and the two dropped ones, held
    assert frames[0].shape == (64, 128, 3)
    actor = FrameStore(subjects[1], 64, "eval").frame(0).image
    assert np.abs(frames[0][:50, :64].astype(int) - actor[:50]).mean() < 6
    still = cv2.imread(str(result.artefacts["still"]))
    assert still.shape == (128, 4 * 64, 3)


def without_weights(subjects: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same frames as if they were of real people, on a machine without any pretrained file."""
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(folder / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for place, subject in zip((folder / "a", folder / "b"), subjects, strict=True):
        shutil.copytree(subject, place)
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").write_text(json.dumps({**manifest, "kind": "video", "source": {}}))
    return folder / "a", folder / "b"


def test_expression_without_weights_is_null_and_told(
    subjects: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = without_weights(subjects, tmp_path, monkeypatch)
    both = evaluate_both(oracle(people[0]), people[0], RECIPE, oracle_pair(people[1]), people[1])
    metrics, notes = both.metrics, both.notes
    assert metrics["self"]["psnr"] > 35
    for row in metrics.values():
        assert row["expression"] == {name: {"r": None, "amplitude": None, "error": None} for name in EXPRESSIONS}
        assert row["no_face"] == 0
        assert row["identity"]["distance"] is None
    assert metrics["self"]["landmark_error"]["mouth"] is None
    assert [note for note in notes if "lavatar weights fetch face_landmarker" in note] == [notes[1]]
    assert "lavatar weights fetch face_recognition" in notes[2]
    assert len(notes) == 3  # lpips, expression, identity: each told once
    json.dumps(metrics, allow_nan=False)


def test_preview_without_weights_shows_everything_else(
    preview: Run, subjects: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = without_weights(subjects, tmp_path, monkeypatch)
    spec = preview[0]
    inputs = {**spec.inputs, "avatar_dataset": people[0], "actor_dataset": people[1]}
    result = make_preview(replace(spec, out_dir=tmp_path / "out", inputs=inputs))
    assert all(path.is_file() for path in result.artefacts.values())
    assert result.metrics["cross"]["expression"]["jaw"] == {"r": None, "amplitude": None, "error": None}
    assert sum("lavatar weights fetch face_landmarker" in note for note in result.notes) == 1


def test_a_failed_preview_leaves_what_was_there(preview: Run, tmp_path: Path) -> None:
    spec, _, _ = preview
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("old")
    (tmp_path / ".out.1.part").mkdir()  # by a process that was killed
    with pytest.raises(DataError, match="no released model"):
        make_preview(replace(spec, out_dir=out, inputs={**spec.inputs, "pair": tmp_path / "nowhere"}))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "metrics.json").read_text() == "old"
