"""A pair that begins at another one: what it takes over, and how its steps are compared. Tiny networks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.preprocess import preprocess
from lavatar.errors import CheckpointError
from lavatar.models.losses import eq5
from lavatar.models.mapping import build_mapping
from lavatar.models.ynet import YNetwork
from lavatar.training.engine import TorchEngine
from lavatar.training.errorcurve import ErrorCurve, saving, savings, warm_note
from lavatar.training.loop import train
from lavatar.training.optimizer import build_optimizer
from lavatar.training.release import read_warm_pair, write_pair_release
from lavatar.training.shape import SHAPE_DIM
from lavatar.training.warmpair import begin_warm
from lavatar.training.ynet import YNetTask

SMALL = [
    "preprocess.portrait_size=64", "preprocess.face_size=32", "preprocess.synthetic_frames=30",
    "preprocess.min_frames=10", "avatar.image_size=32", "avatar.face_size=32",
    "ynet.face_size=32", "ynet.code_dim=8", "ynet.encoder_widths=[8, 8]", "ynet.neck_width=8",
    "ynet.encoder=whitened", "ynet.shared_neck=true", f"ynet.landmarks={SHAPE_DIM}", "ynet.decoder_widths=[8, 4]",
    "ynet_training.batch_size=4", "ynet_training.engine=torch", "ynet_training.steps=10",
    "ynet_training.checkpoint_every=5", "pair_learning.error_every=4", "pair_learning.error_frames=7",
    "mapping.hidden=[8]", "avatar.ray_size=16",
]  # fmt: skip


class Curves(NullSink):
    """What was logged of the error."""

    def __init__(self) -> None:
        self.errors: dict[int, float] = {}

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if "error/mean" in metrics:
            self.errors[step] = metrics["error/mean"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("paper", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrameStore, ...]:
    """An avatar and two actors."""
    found = []
    for name, seed in (("ada", 1), ("bruno", 2), ("cleo", 3)):
        folder = tmp_path_factory.mktemp("shards") / name
        source = VideoSource(name, synthetic_seed=seed)
        preprocess(source, recipe().preprocess, folder, parallel=map, events=NullSink(), stage=name)  # type: ignore[arg-type]
        found.append(FrameStore(folder, 32))
    return tuple(found)


def run(task: YNetTask, folder: Path, steps: int = 10) -> Curves:
    config, curves = task.training.model_copy(update={"steps": steps}), Curves()
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    train(task, config, engine, folder, curves)
    return curves


def release(task: YNetTask, folder: Path) -> Path:
    """The Y-network with a mapping nobody trained."""
    task.module.mapping = build_mapping(task.recipe)
    folder.mkdir(parents=True)
    write_pair_release(folder, task, None)
    return folder


def cold(stores: tuple[FrameStore, ...], chosen: Recipe) -> YNetTask:
    return YNetTask(chosen, {"avatar": stores[0], "actor": stores[1]})


def third(stores: tuple[FrameStore, ...]) -> dict[str, FrameStore]:
    """The avatar and another actor."""
    return {"avatar": stores[0], "actor": stores[2]}


def test_all_but_the_actors_decoder_is_taken_over(stores: tuple[FrameStore, ...], tmp_path: Path) -> None:
    source = cold(stores, recipe())
    run(source, tmp_path / "run")
    warm = read_warm_pair(release(source, tmp_path / "release"))
    assert warm.name == "ada<-bruno"
    begun = YNetTask(source.recipe, third(stores), warm=warm).ynet
    untrained = YNetTask(source.recipe, third(stores)).ynet.state_dict()
    before = source.ynet.state_dict()
    new = {name for name, value in begun.state_dict().items() if not torch.equal(value, before[name])}
    assert new == {name for name in before if name.startswith("decoders.actor.")}
    assert all(torch.equal(begun.state_dict()[name], untrained[name]) for name in new), "begins as in a cold start"
    assert {name.split(".")[0] for name in before} == {"encoder", "neck", "decoders", "readout"}
    assert any("deviation" in name for name in before), "with the statistics that whiten the code"


def test_another_architecture_is_refused(stores: tuple[FrameStore, ...], tmp_path: Path) -> None:
    folder = release(cold(stores, recipe()), tmp_path / "release")
    with pytest.raises(CheckpointError, match="another Y-network"):
        begin_warm(YNetwork(recipe("ynet.code_dim=16").ynet), read_warm_pair(folder))
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="checksum"):
        read_warm_pair(folder)


def test_the_error_is_eq_5_on_frames_that_stay_the_same(stores: tuple[FrameStore, ...], tmp_path: Path) -> None:
    task = cold(stores, recipe())
    face = task.sources["actor"].faces(np.linspace(0, len(stores[1]) - 1, 7).round().astype(int))
    with torch.no_grad():
        wanted = eq5(task.ynet.decode(task.ynet.encode(face), "actor"), face, task.loss)["total"]
    assert task.reconstruction_error("actor") == pytest.approx(float(wanted), abs=1e-6)
    curves = run(task, tmp_path / "run")
    assert task.errors.steps == [0, 4, 8, 10], "at the beginning, every four steps and at the end"
    assert task.errors.errors["actor"][0] == pytest.approx(float(wanted), abs=1e-6)
    assert curves.errors == dict(zip(task.errors.steps, task.errors.mean, strict=True))
    assert task.errors.mean[-1] < task.errors.mean[0]
    assert task.figures() == {"error": task.errors.to_json()}


def test_measuring_changes_no_training_and_a_resume_keeps_the_curve(
    stores: tuple[FrameStore, ...], tmp_path: Path
) -> None:
    often, never = cold(stores, recipe("pair_learning.error_every=1")), cold(stores, recipe())
    run(often, tmp_path / "often")
    never.measure = lambda done: {}  # type: ignore[method-assign]
    run(never, tmp_path / "never")
    trained = often.module.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in never.module.state_dict().items())

    first, second = cold(stores, recipe()), cold(stores, recipe())
    run(first, tmp_path / "resumed", steps=5)
    run(second, tmp_path / "resumed")
    whole = cold(stores, recipe())
    run(whole, tmp_path / "whole")
    assert second.errors == whole.errors


def test_a_release_hands_on_the_errors_of_the_last_cold_training(
    stores: tuple[FrameStore, ...], tmp_path: Path
) -> None:
    first = cold(stores, recipe())
    run(first, tmp_path / "1")
    once = YNetTask(first.recipe, third(stores), warm=read_warm_pair(release(first, tmp_path / "r1")))
    run(once, tmp_path / "2")
    figures = once.figures()["warm"]
    assert (figures["source"], figures["cold"]) == ("ada<-bruno", "ada<-bruno")
    assert figures["avatar"]["error"] == first.errors.errors["avatar"][-1]
    assert (figures["avatar"]["warm_step"], figures["avatar"]["saved"]) == (0, 10), "its decoder is trained already"
    json.dumps(figures)
    again = read_warm_pair(release(once, tmp_path / "r2"))
    assert again.name == "ada<-cleo"
    assert again.cold is not None
    assert (again.cold.pair, again.cold.curve) == ("ada<-bruno", first.errors)
    untold = release(cold(stores, recipe()), tmp_path / "r3")
    assert read_warm_pair(untold).cold is None
    bare = YNetTask(first.recipe, third(stores), warm=read_warm_pair(untold))
    assert bare.figures()["warm"] == {"source": "ada<-bruno", "cold": None}


def test_steps_saved_in_closed_form() -> None:
    before, steps = [0.9, 0.5, 0.3, 0.31, 0.3], [0, 25, 50, 75, 100]
    faster = saving(steps, before, [0, 25, 50], [0.6, 0.3, 0.2])
    assert (faster.error, faster.cold_step, faster.warm_step, faster.saved) == (0.3, 50, 25, 25)
    assert faster.text() == "0.3000 (step 50) reached at step 25: 25 steps saved"
    never = saving(steps, before, [0, 25, 50], [0.6, 0.5, 0.4])
    assert (never.warm_step, never.saved, never.to_json()["saved"]) == (None, None, None)
    assert never.text() == "0.3000 (step 50) not reached; 0.4000 at the end"
    slower = saving(steps, before, [0, 50, 100], [0.6, 0.5, 0.3])
    assert slower.saved == -50
    assert slower.text().endswith("step 100: 50 steps more")


def test_the_note_says_both_and_the_avatars_own_part() -> None:
    source = ErrorCurve([0, 400, 700], {"avatar": [0.5, 0.05, 0.029], "actor": [0.5, 0.05, 0.033]})
    began = ErrorCurve([0, 220, 700], {"avatar": [0.028, 0.028, 0.02], "actor": [0.5, 0.03, 0.02]})
    found = savings(source, began)
    assert warm_note("a<-c", "a<-b", found) == (
        "began at the shared encoder of a<-c; final error of a<-b: 0.0310 (step 700) reached at step 220: 480 steps "
        "saved; the avatar's own part 0.0290 (step 700) reached at step 0: 700 steps saved"
    )
    assert "no errors to compare with" in warm_note("a<-c", None, {})


def test_a_warm_recipe_trains_the_shared_network_for_a_part_of_the_steps() -> None:
    half = load_recipe("tiny", ["pair_learning.warm_steps=0.5"])
    assert half.warm().ynet_training.steps == half.ynet_training.steps // 2
    assert half.warm().mapping_training == half.mapping_training
    on = {name: load_recipe(name).pair_learning.warm for name in ("paper", "official", "tiny", "fast")}
    assert on == {"paper": False, "official": False, "tiny": True, "fast": True}
