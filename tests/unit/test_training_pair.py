"""Sec. 4 in training: who moves when, and that the steps learn. Shards of two synthetic subjects, tiny networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.preprocess import preprocess
from lavatar.errors import ConfigError
from lavatar.inference.loading import load_avatar, load_pair
from lavatar.models.mapping import READOUT_NOISE
from lavatar.models.ssim import ssim
from lavatar.models.ynet import SUBJECTS
from lavatar.training.avatar import AvatarTask
from lavatar.training.engine import TorchEngine
from lavatar.training.faces import FaceBatch, in_face_crop, theta_of
from lavatar.training.loop import train
from lavatar.training.mapping import AT_REST, MappingTask
from lavatar.training.optimizer import build_optimizer
from lavatar.training.release import (
    read_frozen_avatar,
    write_avatar_release,
    write_pair_release,
    write_shared_release,
)
from lavatar.training.shape import LOWER_LIP, SHAPE_DIM, UPPER_LIP, expression_shape, whitening
from lavatar.training.ynet import YNetTask

SMALL = [
    "preprocess.portrait_size=64", "preprocess.face_size=32", "preprocess.synthetic_frames=40",
    "preprocess.min_frames=10", "avatar.image_size=32", "avatar.ray_size=16", "avatar.samples=6",
    "avatar.face_size=32", "avatar.code_dim=8", "avatar.encoder_widths=[8, 8]", "avatar.generator=basis",
    "avatar.encoder=whitened", "avatar.basis_count=6", "avatar.triplane_size=16", "avatar.triplane_channels=4",
    "avatar.density_hidden=8", "avatar.feature_channels=4", "avatar.superresolution=residual",
    "avatar.superresolution_capacity=4", "avatar_loss.lambda_vgg=0", "avatar_learning.rate_pose=0.1",
    "avatar_training.steps=4", "avatar_training.engine=torch", "avatar_training.batch_size=2",
    "ynet.face_size=32", "ynet.code_dim=8", "ynet.encoder_widths=[8, 8]", "ynet.neck_width=8",
    "ynet.decoder_widths=[8, 4]", "ynet_training.batch_size=4", "ynet_training.engine=torch",
    "ynet_training.learning_rate=0.005", "mapping_training.batch_size=4", "mapping_training.engine=torch",
    "mapping.hidden=[8]", "mapping_training.learning_rate=0.01",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("paper", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrameStore, FrameStore]:
    found = []
    for name, seed in (("ada", 1), ("bruno", 2)):
        folder = tmp_path_factory.mktemp("shards") / name
        source = VideoSource(name, synthetic_seed=seed)
        preprocess(source, recipe().preprocess, folder, parallel=map, events=NullSink(), stage=name)  # type: ignore[arg-type]
        found.append(FrameStore(folder, 32))
    return found[0], found[1]


def roles(stores: tuple[FrameStore, ...]) -> dict[str, FrameStore]:
    return dict(zip(SUBJECTS, stores, strict=True))


def run(task: YNetTask | MappingTask, config, folder: Path) -> None:  # type: ignore[no-untyped-def]
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    train(task, config, engine, folder)  # type: ignore[arg-type]


def test_landmarks_lie_in_the_face_crop(stores: tuple[FrameStore, FrameStore]) -> None:
    landmarks = in_face_crop(stores[0], [meta.landmarks for meta in stores[0].metas])
    assert landmarks.shape == (len(stores[0]), 68, 2)
    eyes, mouth = landmarks[:, 36:48].mean((0, 1)), landmarks[:, 48:68].mean((0, 1))
    assert 0.2 < eyes[1] < mouth[1] < 0.95
    assert abs(mouth[0] - 0.5) < 0.1


def test_each_step_draws_one_subject_and_both_come_up(stores: tuple[FrameStore, FrameStore]) -> None:
    task = YNetTask(recipe(), roles(stores))
    drawn = [task.chosen(step) for step in range(200)]
    assert {len(subjects) for subjects in drawn} == {1}
    assert 70 < sum(subjects == ("actor",) for subjects in drawn) < 130
    second = YNetTask(recipe(), roles(stores), rank=1, world=2)
    assert drawn == [second.chosen(step) for step in range(200)]
    assert YNetTask(recipe("ynet_loss.subjects=both"), roles(stores)).chosen(0) == SUBJECTS


def test_the_other_decoder_stays_bit_identical(stores: tuple[FrameStore, FrameStore]) -> None:
    task = YNetTask(recipe(), roles(stores))
    config = task.training
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    engine.module.train()
    moved = set()
    for step in range(12):
        before = {k: v.clone() for k, v in task.module.state_dict().items()}
        engine.optimizer.activate(task.active_groups(step))
        engine.step(lambda part, step=step: task.losses(task.batches(step), step))  # type: ignore[misc]
        (subject,) = task.chosen(step)
        for name, value in task.module.state_dict().items():
            same = torch.equal(before[name], value)
            if f"decoders.{'actor' if subject == 'avatar' else 'avatar'}." in name:
                assert same, f"{name} moved in a step of the {subject}"
            elif not same:
                moved.add((subject, name.split(".")[1]))
    assert moved >= {("avatar", "encoder"), ("actor", "encoder"), ("avatar", "decoders"), ("actor", "decoders")}


def test_the_cycle_goes_through_the_other_decoder(stores: tuple[FrameStore, FrameStore]) -> None:
    task = YNetTask(recipe(), roles(stores))
    batch = task.sources["actor"].batch(0)
    terms = task.subject_losses(batch, task.ynet.encode(batch.input_B3HH), "actor", "avatar")
    gradient = torch.autograd.grad(terms["cycle_l1"], next(task.ynet.decoders["avatar"].parameters()))[0]
    assert gradient.abs().max() > 0
    swapped = task.ynet.decode(task.ynet.encode(batch.input_B3HH), "avatar")
    cycled = task.ynet.decode(task.ynet.encode(swapped), "actor")
    assert torch.allclose(terms["cycle_l1"], (cycled - batch.face_B3HH).abs().mean(), atol=1e-6)
    official = YNetTask(recipe("ynet_loss.image_cycle=false", "ynet_loss.cross_gradient=false"), roles(stores))
    terms = official.subject_losses(batch, official.ynet.encode(batch.input_B3HH), "actor", "avatar")
    assert "cycle_l1" not in terms
    terms["cycle_code"].backward()
    assert all(p.grad is None for p in official.ynet.decoders["avatar"].parameters())


def test_a_pair_trains_is_released_and_read_back(stores: tuple[FrameStore, FrameStore], tmp_path: Path) -> None:
    chosen = recipe("ynet_training.steps=60", "mapping_training.steps=400", "mapping.align=deviation",
                    "ynet.encoder=whitened", "ynet.code_dim=16", "mapping.hidden=[32]", "pair_learning.shift=0.01",
                    "pair_learning.color=0.05", "pair_learning.feature_weight=4")  # fmt: skip
    head = AvatarTask(chosen, stores[0])
    (tmp_path / "avatar").mkdir()
    write_avatar_release(tmp_path / "avatar", head)
    avatar = read_frozen_avatar(tmp_path / "avatar")
    ynet = YNetTask(chosen, roles(stores))
    first = float(ynet.losses(ynet.batches(0), 0)["total"])
    run(ynet, chosen.ynet_training, tmp_path / "ynet")
    last = np.mean([float(ynet.losses(ynet.batches(step), step)["total"]) for step in range(60, 64)])
    assert last < 0.8 * first
    frozen = {k: v.clone() for k, v in {**ynet.ynet.state_dict(), **avatar.state_dict()}.items()}
    mapping = MappingTask(chosen, ynet, avatar)
    first = float(mapping.losses(mapping.batches(0), 0)["mapping"])
    run(mapping, chosen.mapping_training, tmp_path / "mapping")
    assert float(mapping.losses(mapping.batches(0), 0)["mapping"]) < 0.6 * first
    after = {**ynet.ynet.state_dict(), **avatar.state_dict()}
    assert all(torch.equal(frozen[name], after[name]) for name in frozen), "the mapping step moved a frozen network"

    (tmp_path / "pair").mkdir()
    write_pair_release(tmp_path / "pair", ynet, mapping)
    pair, head_again = load_pair(tmp_path / "pair"), load_avatar(tmp_path / "avatar")
    assert (pair.avatar, pair.actor, head_again.subject) == ("ada", "bruno", "ada")
    face = mapping.sources["actor"].faces(np.arange(3))
    with torch.no_grad():
        wanted = mapping.module(ynet.ynet.encode(face), "actor")
        assert torch.allclose(pair.mapping(pair.ynet.encode(face), "actor"), wanted, atol=1e-6)
        assert torch.allclose(head_again.model.encode(face), avatar.encode(face), atol=1e-6)


def test_many_subjects_are_drawn_alike_and_cycle_through_each_other(stores: tuple[FrameStore, FrameStore]) -> None:
    four = dict(zip("abcd", stores * 2, strict=True))
    task = YNetTask(recipe(), four, avatars=("b",))
    drawn = [task.chosen(step)[0] for step in range(400)]
    assert all(70 < drawn.count(subject) < 140 for subject in four)
    rivals = [task.rival("b", step) for step in range(300)]
    assert all(70 < rivals.count(subject) < 130 for subject in "acd")
    elsewhere = YNetTask(recipe(), four, rank=1, world=2)
    assert rivals == [elsewhere.rival("b", step) for step in range(300)]
    step = next(s for s in range(99) if task.chosen(s) == ("d",) and task.rival("d", s) == "a")
    terms = task.losses(task.batches(step), step)
    faces = task.batches(step)["d"]
    gamma = task.ynet.encode(faces.input_B3HH)
    cycled = task.ynet.decode(task.ynet.encode(task.ynet.decode(gamma, "a")), "d")
    assert torch.allclose(terms["d_cycle_l1"], (cycled - faces.face_B3HH).abs().mean(), atol=1e-6)
    config = task.training
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    before = {k: v.clone() for k, v in task.module.state_dict().items()}
    for _ in range(2):
        engine.optimizer.activate(task.active_groups(step))
        engine.step(lambda part: task.losses(task.batches(step), step))
    moved = {
        k.split(".")[2]
        for k, v in task.module.state_dict().items()
        if ".decoders." in k and not torch.equal(before[k], v)
    }
    assert moved == {"d"}, "the three other decoders are frozen, that of the cycle too"


def test_a_network_under_two_other_names_trains_as_a_pair_does(stores: tuple[FrameStore, FrameStore]) -> None:
    pair, named = (
        YNetTask(recipe(), roles(stores)),
        YNetTask(recipe(), dict(zip("xy", stores, strict=True)), avatars="x"),
    )
    for step in range(6):
        terms = [list(task.losses(task.batches(step), step).values()) for task in (pair, named)]
        assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))


def test_a_network_of_many_is_released_as_its_pairs(stores: tuple[FrameStore, FrameStore], tmp_path: Path) -> None:
    chosen = recipe("ynet.encoder=whitened", f"ynet.landmarks={SHAPE_DIM}", "mapping.hidden=[]",
                    "mapping.reads=landmarks", "mapping.align=deviation", "pair_learning.regression=true",
                    "mapping.unseen=1", "pair_learning.swapped=0.5", "pair_learning.align_frames=40")  # fmt: skip
    ynet = YNetTask(chosen, {"a": stores[0], "b": stores[1], "c": stores[1]}, avatars=("a",))
    mapping = MappingTask(chosen, ynet, AvatarTask(chosen, stores[0]).avatar, subjects=("a", "b", "c"))
    assert {mapping.batches(step).driver for step in range(20)} == {"b", "c"}
    mapping.losses(mapping.batches(0), 0)["total"].backward()
    write_shared_release(tmp_path, ynet, [mapping])
    face = mapping.sources["c"].faces(np.arange(3))
    for actor in ("b", "c"):
        pair = load_pair(tmp_path / "a" / actor)
        assert (pair.avatar, pair.actor) == ("ada", "bruno")
        with torch.no_grad():
            gamma = ynet.ynet.encode(face)
            assert torch.equal(pair.ynet.encode(face), gamma)
            assert torch.equal(pair.mapping(gamma, "actor"), mapping.module(gamma, actor))
            assert torch.equal(pair.mapping(gamma, "avatar"), mapping.module(gamma, "a"))
            assert torch.equal(pair.ynet.decode(gamma, "actor"), ynet.ynet.decode(gamma, actor))
            assert torch.equal(pair.ynet.decode(gamma, "avatar"), ynet.ynet.decode(gamma, "a"))
    b, c = (load_pair(tmp_path / "a" / actor).mapping.mean_2F for actor in "bc")
    assert torch.equal(b[0], c[0])
    assert not torch.equal(b[1], c[1]), "other frames are drawn for the other subject"


def test_joint_mapping_reaches_the_shared_encoder(stores: tuple[FrameStore, FrameStore], tmp_path: Path) -> None:
    chosen = recipe("mapping.joint=true", "ynet_loss.subjects=both", "ynet.shared_neck=true")
    avatar = AvatarTask(chosen, stores[0]).avatar
    task = YNetTask(chosen, roles(stores), avatar=avatar)
    terms = task.losses(task.batches(0), 0)
    assert {"avatar_mapping", "avatar_rec_l1", "actor_rec_l1"} <= set(terms)
    gradient = torch.autograd.grad(terms["avatar_mapping"], next(task.ynet.encoder.parameters()))[0]
    assert gradient.abs().max() > 0
    write_pair_release(tmp_path, task, None)
    assert load_pair(tmp_path).ynet.config.shared_neck


def test_alignment_gives_both_subjects_one_distribution(stores: tuple[FrameStore, FrameStore]) -> None:
    chosen = recipe("mapping.align=deviation", "mapping.hidden=[]")
    ynet = YNetTask(chosen, roles(stores))
    mapping = MappingTask(chosen, ynet, AvatarTask(chosen, stores[0]).avatar)
    for subject in SUBJECTS:
        gamma = ynet.ynet.encode(mapping.sources[subject].drawn(chosen.pair_learning.align_frames)[0])
        which = SUBJECTS.index(subject)
        aligned = (gamma - mapping.module.mean_2F[which]) / mapping.module.deviation_2F[which]
        assert aligned.mean(0).abs().max() < 1e-3
        assert (aligned.std(0) - 1).abs().max() < 1e-2


def test_swapped_faces_teach_the_mapping_about_the_actor(stores: tuple[FrameStore, FrameStore]) -> None:
    chosen = recipe("pair_learning.swapped=0.5")
    mapping = MappingTask(chosen, YNetTask(chosen, roles(stores)), AvatarTask(chosen, stores[0]).avatar)
    terms = mapping.losses(mapping.batches(0), 0)
    assert torch.allclose(terms["total"], terms["mapping"] + 0.5 * terms["swapped"])
    gradient = torch.autograd.grad(terms["swapped"], next(mapping.module.parameters()))[0]
    assert gradient.abs().max() > 0


def test_the_shared_code_says_where_the_landmarks_are_and_the_mapping_reads_it(
    stores: tuple[FrameStore, FrameStore],
) -> None:
    chosen = recipe("ynet.encoder=whitened", "ynet.code_dim=16", f"ynet.landmarks={SHAPE_DIM}", "mapping.hidden=[]",
                    "mapping.reads=landmarks", "mapping.align=rest", "pair_learning.landmark_weight=0.3",
                    "pair_learning.regression=true", "mapping.code_share=0.1")  # fmt: skip
    ynet = YNetTask(chosen, roles(stores))
    terms = ynet.losses(ynet.batches(0), 0)
    (subject,) = ynet.chosen(0)
    shape = ynet.sources[subject].drawn(64)[1]
    assert float(terms[f"{subject}_landmarks"]) < 0.6 * float(shape.var(0).mean()), "begins at the regression"
    avatar = AvatarTask(chosen, stores[0]).avatar
    mapping = MappingTask(chosen, ynet, avatar)
    theta = theta_of(avatar, mapping.sources["avatar"].drawn(64)[0])
    mapped = mapping.module(ynet.ynet.encode(mapping.sources["avatar"].drawn(1024)[0]), "avatar")
    assert 0.7 < float(mapped.var(0).sum() / theta.var(0).sum()) < 1.3, "the driven code varies as much as θ does"
    with pytest.raises(ConfigError, match=f"Set it to {SHAPE_DIM}"):
        YNetTask(recipe("ynet.landmarks=50"), roles(stores))


def test_whitening_weighs_small_and_large_movements_alike() -> None:
    rng = np.random.default_rng(0)
    ways = np.linalg.qr(rng.normal(size=(SHAPE_DIM, 2)))[0].T  # an open jaw and, a tenth as far, a smile
    shapes = [rng.normal(size=(400, 2)) * (20.0, 2.0) @ ways + offset for offset in (0.0, 30.0)]
    matrix = whitening([shape.astype(np.float32) for shape in shapes])
    missed = [np.square((ways[k] * size) @ matrix).sum() for k, size in enumerate((20.0, 2.0))]
    assert missed[0] == pytest.approx(missed[1], rel=0.1)
    about = np.concatenate([shape - shape.mean(0) for shape in shapes])
    assert np.square(about @ matrix).sum(1).mean() == pytest.approx(1, rel=1e-3), "the mean shape misses everything"
    noise = np.square(0.01 * rng.normal(size=(50, SHAPE_DIM)) @ matrix).sum(1).mean()
    assert noise < 0.1, "the tracker's noise gains no weight"


def test_the_shape_does_not_depend_on_where_and_how_large_a_face_is(stores: tuple[FrameStore, FrameStore]) -> None:
    metas = stores[0].metas
    landmarks, irises = (in_face_crop(stores[0], [getattr(m, n) for m in metas]) for n in ("landmarks", "irises"))
    shape, offset = expression_shape(landmarks, irises), np.array([5.0, -2.0], np.float32)
    assert shape.shape == (len(metas), SHAPE_DIM)
    assert np.abs(expression_shape(landmarks * 3.0 + offset, irises * 3.0 + offset) - shape).max() < 0.02
    gap = shape[:, LOWER_LIP] - shape[:, UPPER_LIP]
    assert np.corrcoef(gap, stores[0].expression["jaw"])[0, 1] > 0.8
    assert np.corrcoef(shape[:, -4] + shape[:, -2], stores[0].expression["gaze"])[0, 1] > 0.8
    assert not expression_shape(landmarks)[:, -4:].any(), "nothing is said of irises that were not seen"


NOISY = ["ynet_loss.subjects=both", "ynet.input_noise=0.05", "ynet_loss.lambda_image=[0.1,0.7]",
         "ynet_loss.lambda_ssim=0.3", "ynet_loss.lambda_code=[2.0,3.0]"]  # fmt: skip


def traced(task: YNetTask, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the Y-network's parts from now on, each written with what it was given."""
    calls: list[str] = []
    made: list[tuple[torch.Tensor, str]] = []
    encode, decode = task.ynet.encode, task.ynet.decode

    def note(result: torch.Tensor, part: str, given: torch.Tensor) -> torch.Tensor:
        inside = next((name for tensor, name in made if tensor is given), "I")
        made.append((result, f"{part}({inside})"))
        calls.append(made[-1][1])
        return result

    monkeypatch.setattr(task.ynet, "encode", lambda face: note(encode(face), "E", face))
    monkeypatch.setattr(task.ynet, "decode", lambda code, s: note(decode(code, s), f"D_{s}", code))
    return calls


@pytest.mark.parametrize("name", ["paper", "official"])
def test_the_path_of_eq5_and_eq6_in_both_recipes(
    name: str, stores: tuple[FrameStore, FrameStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """I → γ → I'; γ → I* of the other → γ* (→ back to the own face in `paper` alone), for whoever's turn it is."""
    sizes = [item for item in SMALL if not item.startswith(("avatar.encoder=", "avatar.generator="))]
    chosen = load_recipe(name, sizes)
    task = YNetTask(chosen, roles(stores), AvatarTask(chosen, stores[0]).avatar)
    calls = traced(task, monkeypatch)
    for step in range(8):
        calls.clear()
        task.losses(task.batches(step), step)
        paths = [
            [f"D_{own}(E(I))", f"D_{other}(E(I))", f"E(D_{other}(E(I)))"]
            + ([f"D_{own}(E(D_{other}(E(I))))"] if name == "paper" else [])
            for own, other in (("avatar", "actor"), ("actor", "avatar"))
        ]
        turns = {"official": [0, 1], "paper": [SUBJECTS.index(task.chosen(step)[0])]}[name]
        assert calls == [call for turn in turns for call in ("E(I)", *paths[turn])]


def test_without_cycle_consistency_nothing_is_computed_for_a_cycle(
    stores: tuple[FrameStore, FrameStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sec. 5.2.3: else the comparison at equal time would charge it for what it does not use."""
    task = YNetTask(recipe("ynet_loss.image_cycle=false", "ynet_loss.lambda_code=[0,0]"), roles(stores))
    calls = traced(task, monkeypatch)
    terms = task.losses(task.batches(0), 0)
    (own,) = task.chosen(0)
    assert calls == ["E(I)", f"D_{own}(E(I))"]
    expected = terms[f"{own}_rec_l1"] + task.loss.lambda_ssim * terms[f"{own}_rec_ssim"]
    assert torch.allclose(terms["total"], expected)


def test_the_mapping_takes_the_true_sizes_from_the_tracked_landmarks(stores: tuple[FrameStore, FrameStore]) -> None:
    chosen = recipe("ynet.encoder=whitened", "ynet.code_dim=16", f"ynet.landmarks={SHAPE_DIM}", "mapping.hidden=[]",
                    "mapping.reads=landmarks", "mapping.align=rest", "pair_learning.align_frames=64")  # fmt: skip
    ynet = YNetTask(chosen, roles(stores))
    with torch.no_grad():
        ynet.ynet.readout.weight.mul_(1.3)  # type: ignore[union-attr]
    mapping = MappingTask(chosen, ynet, AvatarTask(chosen, stores[0]).avatar)
    said, tracked = [], []
    for subject in SUBJECTS:
        faces, shape = mapping.sources[subject].drawn(64)
        gap = shape[:, LOWER_LIP] - shape[:, UPPER_LIP]
        gamma = ynet.ynet.encode(faces)
        read = ynet.ynet.readout(gamma).detach()  # type: ignore[misc]
        said.append((read.var(0) + READOUT_NOISE**2).sqrt())
        tracked.append((shape.var(0) + READOUT_NOISE**2).sqrt())
        rest = read[gap <= gap.quantile(AT_REST)].mean(0)
        assert torch.allclose(mapping.module.mean_2F[SUBJECTS.index(subject), :SHAPE_DIM], rest, atol=1e-4)
    own, actor = mapping.module.deviation_2F[:, :SHAPE_DIM]
    assert torch.allclose(own, said[0], rtol=1e-4)
    moving = tracked[1] > 1.01 * READOUT_NOISE
    assert torch.allclose(actor[moving], (said[1] * tracked[0] / tracked[1])[moving], rtol=1e-3)


def test_the_total_is_eq7_of_each_subject_with_its_own_weights(stores: tuple[FrameStore, FrameStore]) -> None:
    task = YNetTask(recipe(*NOISY), roles(stores))
    terms = {k: v.item() for k, v in task.losses(task.batches(0), 0).items()}
    expected = sum(
        image * (terms[f"{s}_rec_l1"] + 0.3 * terms[f"{s}_rec_ssim"])
        + terms[f"{s}_cycle_l1"] + 0.3 * terms[f"{s}_cycle_ssim"] + code * terms[f"{s}_cycle_code"]
        for s, image, code in (("avatar", 0.1, 2.0), ("actor", 0.7, 3.0))
    )  # fmt: skip
    assert terms["total"] == pytest.approx(expected, rel=1e-5)


def test_the_encoder_sees_noise_and_the_decoder_is_compared_with_the_clean_face(
    stores: tuple[FrameStore, FrameStore],
) -> None:
    task = YNetTask(recipe(*NOISY), roles(stores))
    batch = task.batches(0)["actor"]
    assert float((batch.input_B3HH - batch.face_B3HH).std()) == pytest.approx(0.05, rel=0.03)
    assert torch.equal(batch.face_B3HH, task.sources["actor"].faces(task.sources["actor"].sampler.indices(0)))
    gamma = task.ynet.encode(batch.input_B3HH)
    terms = task.subject_losses(batch, gamma, "actor", "avatar")
    own = task.ynet.decode(gamma, "actor")
    back = task.ynet.encode(task.ynet.decode(gamma, "avatar"))
    for term, wanted in (
        ("rec_l1", (own - batch.face_B3HH).abs().mean()),
        ("cycle_l1", (task.ynet.decode(back, "actor") - batch.face_B3HH).abs().mean()),
        ("cycle_code", (back - gamma).square().mean()),
    ):
        assert float(terms[term]) == pytest.approx(float(wanted), rel=1e-5)


def test_the_joint_mapping_is_weighted_and_learns_from_the_avatars_own_faces(
    stores: tuple[FrameStore, FrameStore],
) -> None:
    totals = []
    for weight in (0.0, 3.0):
        chosen = recipe(*NOISY, "mapping.joint=true", f"mapping.lambda_mapping={weight}")
        avatar = AvatarTask(chosen, stores[0]).avatar
        task = YNetTask(chosen, roles(stores), avatar)
        batches = task.batches(0)
        terms = task.losses(batches, 0)
        totals.append(float(terms["total"]))
    assert task.module.mapping is not None
    gamma = task.ynet.encode(batches["avatar"].input_B3HH)
    wanted = (task.module.mapping(gamma) - avatar.encode(batches["avatar"].face_B3HH)).square().mean()
    assert float(terms["avatar_mapping"]) == pytest.approx(float(wanted), rel=1e-5)
    assert totals[1] - totals[0] == pytest.approx(3 * float(wanted), rel=1e-3)


def test_eq8_is_of_the_avatars_frames_with_a_clean_theta(stores: tuple[FrameStore, FrameStore]) -> None:
    chosen = recipe("ynet.input_noise=0.05")
    avatar = AvatarTask(chosen, stores[0]).avatar
    task = MappingTask(chosen, YNetTask(chosen, roles(stores)), avatar)
    batch = task.batches(3)
    face = task.sources["avatar"].faces(task.sources["avatar"].sampler.indices(3))
    assert torch.equal(batch.avatar.face_B3HH, face)
    with torch.no_grad():
        mapped = task.module(task.ynet.encode(batch.avatar.input_B3HH), "avatar")
        wanted = (mapped - avatar.encode(face)).square().mean()
    assert float(task.losses(batch, 3)["total"]) == pytest.approx(float(wanted), rel=1e-5)


def test_a_frozen_decoder_has_moments_and_does_not_move(stores: tuple[FrameStore, FrameStore]) -> None:
    """Adam would go on by its moments where the gradient is zero: values, moments and counts stay to the bit."""
    task = YNetTask(recipe(), roles(stores))
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, task.training), task.training)
    seen: set[str] = set()
    checked = 0
    for step in range(12):
        (subject,) = task.chosen(step)
        frozen = "avatar" if subject == "actor" else "actor"
        parameters = list(task.ynet.decoders[frozen].parameters())
        before = [(p.detach().clone(), *(t.clone() for t in engine.optimizer.state[p].values())) for p in parameters]
        engine.optimizer.activate(task.active_groups(step))
        engine.step(lambda part, step=step: task.losses(task.batches(step), step))  # type: ignore[misc]
        for parameter, kept in zip(parameters, before, strict=True):
            now = (parameter, *engine.optimizer.state[parameter].values())
            assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
        if frozen in seen:
            moments = max(float(engine.optimizer.state[p]["exp_avg"].abs().max()) for p in parameters)
            assert moments > 0
            checked += 1
        seen.add(subject)
    assert checked > 6


def test_the_mapping_step_moves_the_mapping_and_nothing_else(stores: tuple[FrameStore, FrameStore]) -> None:
    """Also what an earlier training left moments for: none of it is in a group, none takes a gradient."""
    chosen = recipe("ynet.input_noise=0.05")
    head, ynet = AvatarTask(chosen, stores[0]), YNetTask(chosen, roles(stores))
    for earlier in (head, ynet):
        adam = TorchEngine(
            earlier.module, build_optimizer(earlier.param_groups(), earlier.module, earlier.training), earlier.training
        )
        adam.step(lambda _part, task=earlier: task.losses(task.batches(0), 0))  # type: ignore[misc]
    task = MappingTask(chosen, ynet, head.avatar)
    everything = {**ynet.module.state_dict(), **head.module.state_dict()}
    before = {name: value.clone() for name, value in everything.items()}
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, task.training), task.training)
    grouped = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in task.module.parameters()}
    moved = {name: value.clone() for name, value in task.module.named_parameters()}
    for step in range(4):
        engine.step(lambda _part, step=step: task.losses(task.batches(step), step))  # type: ignore[misc]
    assert all(torch.equal(before[name], value) for name, value in everything.items())
    assert not any(torch.equal(moved[name], value) for name, value in task.module.named_parameters())
    frozen = [*ynet.ynet.parameters(), *head.avatar.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


PUBLISHED = [item for item in SMALL if not item.startswith(("avatar_training", "ynet_training", "mapping_training"))]


@pytest.mark.parametrize("name", ["paper", "official"])
def test_section_5_1_read_off_the_built_tasks_and_optimizers(name: str, stores: tuple[FrameStore, FrameStore]) -> None:
    """ "Adam ... the learning rate is set to 1×10^-4 for all learnable parameters"; batches of 2 and 16."""
    chosen = load_recipe(name, [item for item in PUBLISHED if "rate_pose" not in item])
    head = AvatarTask(chosen, stores[0])
    ynet = YNetTask(chosen, roles(stores), head.avatar)
    stages = [(head, chosen.avatar_training, 2), (ynet, chosen.ynet_training, 16)]
    stages += [(MappingTask(chosen, ynet, head.avatar), chosen.mapping_training, 16)] if name == "paper" else []
    for task, config, frames in stages:
        optimizer = build_optimizer(task.param_groups(), task.module, config)
        assert isinstance(optimizer, torch.optim.Adam)
        for group in optimizer.param_groups:
            adam = [group[k] for k in ("lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay")]
            assert adam == [1e-4, (0.9, 0.999), 1e-8, 0, False, False]
        batch = task.batches(0)
        faces = {AvatarTask: lambda b: b.input_B3HH, MappingTask: lambda b: b.avatar.input_B3HH}
        drawn = faces[type(task)](batch) if type(task) in faces else next(iter(batch.values())).input_B3HH
        assert len(drawn) == frames
        assert config.schedule == "constant"
        assert config.warmup_steps == 0


PATHS = {
    "paper": ["ynet_loss.lambda_image=[1.0,1.0]", "ynet_loss.lambda_ssim=0.3"],
    "no gradient across": ["ynet_loss.cross_gradient=false"],
    "codes only": ["ynet_loss.image_cycle=false"],
    "official": ["ynet_loss.image_cycle=false", "ynet_loss.cross_gradient=false", "ynet.shared_neck=true",
                 "ynet_loss.lambda_image=[0.2,0.9]", "ynet_loss.lambda_ssim=1.0"],
}  # fmt: skip
"""Variants of the cycle; codes weigh much and differently in each, so that no term is lost beside another."""


def written_out(task: YNetTask, faces: FaceBatch, subject: str) -> Tensor:
    """Eq. 5-7 of one subject as the text says them, its decoder and the other's called by name."""
    ynet, loss, which = task.ynet, task.loss, SUBJECTS.index(subject)
    neck, own, other = ynet.neck, ynet.decoders[subject], ynet.decoders[SUBJECTS[1 - which]]
    gamma = ynet.encoder(faces.input_B3HH)
    drawn, swapped = own(neck(gamma)), other(neck(gamma))
    star = ynet.encoder(swapped if loss.cross_gradient else swapped.detach())
    cycled = own(neck(star))

    def image(a: Tensor) -> Tensor:
        return (a - faces.face_B3HH).abs().mean() + loss.lambda_ssim * (1 - ssim(a, faces.face_B3HH)).mean()

    total = loss.lambda_image[which] * image(drawn) + loss.lambda_code[which] * (star - gamma).square().mean()
    return total + image(cycled) if loss.image_cycle else total


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("variant", PATHS)
def test_the_step_and_all_its_gradients_are_the_equations_written_out(
    stores: tuple[FrameStore, FrameStore], variant: str, subject: str
) -> None:
    weights = ["ynet_loss.lambda_code=[30.0,70.0]", "ynet.input_noise=0.05"]
    task = YNetTask(recipe(*weights, *PATHS[variant]), roles(stores))
    faces = task.sources[subject].batch(0)
    assert float((faces.input_B3HH - faces.face_B3HH).std()) == pytest.approx(0.05, rel=0.05)
    parameters = dict(task.module.named_parameters())
    expected = written_out(task, faces, subject)
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    total = task.losses({subject: faces}, 0)["total"]
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(total, expected)
    for name, a, b in zip(parameters, found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    other = SUBJECTS[1 - SUBJECTS.index(subject)]
    across = [a is not None for name, a in zip(parameters, found, strict=True) if f"decoders.{other}." in name]
    assert all(across) if task.loss.cross_gradient else not any(across)


def test_the_mapping_step_moves_the_mlp_alone_running_statistics_included(
    stores: tuple[FrameStore, FrameStore],
) -> None:
    chosen = recipe("mapping.align=deviation", "avatar_learning.rate_pose=0")
    ynet, avatar = YNetTask(chosen, roles(stores)), AvatarTask(chosen, stores[0]).avatar
    statistics = (torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3))  # what a network in training mode would change
    ynet.ynet.encoder = torch.nn.Sequential(statistics[0], ynet.ynet.encoder)
    avatar.encoder = torch.nn.Sequential(statistics[1], avatar.encoder)
    for network in (ynet.module, avatar):
        network.train()
    mapping = MappingTask(chosen, ynet, avatar)
    config = mapping.training
    engine = TorchEngine(mapping.module, build_optimizer(mapping.param_groups(), mapping.module, config), config)
    engine.module.train()
    networks = {"ynet": ynet.module, "avatar": avatar}
    before = {f"{n}.{k}": v.clone() for n, network in networks.items() for k, v in network.state_dict().items()}
    own = {k: v.clone() for k, v in mapping.module.state_dict().items()}
    for step in range(6):
        engine.step(lambda _part, step=step: mapping.losses(mapping.batches(step), step))  # type: ignore[misc]
    after = {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}
    assert sum("running_mean" in name for name in before) == 2
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    moved = {name for name, value in mapping.module.state_dict().items() if not torch.equal(value, own[name])}
    assert moved == {name for name, _ in mapping.module.named_parameters()}
    frozen = [*ynet.module.parameters(), *avatar.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
