"""Stages as Ray tasks: real preprocessing, and training that is killed, cancelled and failed on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from cluster_specs import dataset_spec, run, small_recipe, watch
from train_toy import CurveFile, train_toy

from lavatar.cluster.logs import log_path
from lavatar.cluster.stages import FinishedHandle, StageHandle, StageRunner
from lavatar.configs.preprocess import PreprocessConfig
from lavatar.configs.recipe import Recipe
from lavatar.configs.resources import ResourcesConfig, StageResources
from lavatar.contracts import Event, StageKind, StageResult, StageSpec, VideoSource
from lavatar.errors import ConfigError, Interrupted, OutOfMemoryError, StageFailedError, TrainingError, VideoError
from lavatar.training.checkpoint import latest


def _pair_spec(home: Path, name: str, failures: int = 2, workers: int = 1) -> StageSpec:
    key = hashlib.sha256(name.encode()).hexdigest()
    resources = ResourcesConfig(pair=StageResources(cpus=1, workers=workers), max_failures=failures)
    dump = Recipe(name="test", resources=resources).model_dump(mode="json")
    return StageSpec(StageKind.PAIR, f"pair:{name}", key, home, home / "checkpoints" / key, {}, dump)


@pytest.fixture
def toy_runner(ray_session: object, tmp_path: Path) -> StageRunner:
    import toy_bodies

    toy_bodies.ship()
    return StageRunner(tmp_path, bodies=toy_bodies.BODIES)


def _steps(handle: StageHandle, step: int, seen: list[Event], seconds: float = 120) -> None:
    """Waits until the stage has shown `step`."""
    deadline = time.monotonic() + seconds
    while not any(event.done is not None and event.done >= step for event in seen):
        assert not handle.done(), seen
        assert time.monotonic() < deadline, seen
        seen += handle.poll()
        time.sleep(0.05)


def _trainer_pids(spec: StageSpec) -> list[int]:
    return [int(pid) for pid in re.findall(r"training worker.*begins \(process (\d+)\)", log_path(spec).read_text())]


def test_preprocessing_gives_the_same_bytes_on_ray_and_inline(ray_session: object, tmp_path: Path) -> None:
    recipe = small_recipe()
    with StageRunner(tmp_path / "ray") as runner:
        specs = [dataset_spec(runner.home, seed, recipe, f"s{seed}") for seed in (1, 2)]
        handles = [runner.start(spec) for spec in specs]  # side by side
        seen = [event for handle in handles for event in watch(handle)]
        results = [handle.result() for handle in handles]
        again = runner.start(specs[0])
    assert [result.metrics["frames"] for result in results] == [40, 40]
    assert {event.stage for event in seen if event.done is not None} == {"preprocess:s1", "preprocess:s2"}
    assert isinstance(again, FinishedHandle)
    assert again.result() == results[0]
    with StageRunner(tmp_path / "inline", backend="inline") as runner:
        spec = dataset_spec(runner.home, 1, recipe, "s1")
        inline, _ = run(runner, spec)
    assert inline.metrics == results[0].metrics
    tars = sorted(path.name for path in spec.out_dir.glob("*.tar"))
    assert len(tars) >= 4
    for name in tars:
        assert (spec.out_dir / name).read_bytes() == (specs[0].out_dir / name).read_bytes()


def test_a_video_that_is_none_fails_as_itself_and_leaves_nothing(ray_session: object, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    video.write_text("not a video")
    dump = Recipe(name="test", preprocess=PreprocessConfig(matting="alpha")).model_dump(mode="json")
    out = tmp_path / "home" / "shards" / "k"
    spec = StageSpec(
        StageKind.PREPROCESS,
        "preprocess:x",
        "k",
        tmp_path / "home",
        out,
        {},
        dump,
        {"subject": VideoSource("x", video)},
    )
    with StageRunner(tmp_path / "home") as runner:
        handle = runner.start(spec)
        watch(handle)
        with pytest.raises(VideoError, match=r"clip\.mp4"):
            handle.result()
    assert not list(out.glob("*"))


def test_a_cancelled_preprocessing_stops_without_a_manifest(ray_session: object, tmp_path: Path) -> None:
    with StageRunner(tmp_path) as runner:
        spec = dataset_spec(tmp_path, 3, small_recipe(frames=4000))
        handle = runner.start(spec)
        _steps(handle, 10, [])
        handle.cancel()
        watch(handle, 20)
        with pytest.raises(Interrupted):
            handle.result()
    assert not list(spec.out_dir.glob("*.json"))


def _node(item: int) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def test_nodes_that_share_no_disk_get_whole_preprocessings(
    ray_session: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage and all of its segments are bound to one node, which has the CPUs for them."""
    import ray

    from lavatar.cluster.parallel import RayMap
    from lavatar.cluster.resources import Share
    from lavatar.cluster.stages import _options

    spec = dataset_spec(tmp_path, 3, small_recipe())
    monkeypatch.delenv("LAVATAR_STORE", raising=False)
    assert "scheduling_strategy" not in _options(spec, Share(1.0))
    monkeypatch.setenv("LAVATAR_STORE", f"file://{tmp_path}/store")
    chosen = _options(spec, Share(1.0))["scheduling_strategy"]
    own = ray.get_runtime_context().get_node_id()
    assert chosen.node_id == own
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    bound = RayMap(1, tmp_path / "log", lambda: False, ahead=2, here=True)
    assert set(bound(_node, range(4))) == {own}
    assert (bound._where.node_id, bound._where.soft) == (own, False)


def _short_of_memory(item: tuple[Path, int]) -> int:
    """Says what Ray says of a task that it killed, as often as the number."""
    import ray

    folder, times = item
    mark = folder / f"{times}-{len(list(folder.glob(f'{times}-*')))}"
    if len(list(folder.glob(f"{times}-*"))) < times:
        mark.touch()
        raise ray.exceptions.OutOfMemoryError("killed")
    return times


def test_an_item_that_ray_killed_for_want_of_memory_is_tried_again(
    ray_session: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others keep their places; what is killed again and again ends as a clear error."""
    import ray

    from lavatar.cluster import parallel

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(parallel, "MEMORY_TRIES", 2)
    items = [(tmp_path, times) for times in (0, 2, 1)]
    mapped = parallel.RayMap(1, tmp_path / "log", lambda: False, ahead=2)
    assert list(mapped(_short_of_memory, items)) == [0, 2, 1]
    with pytest.raises(OutOfMemoryError, match="Ray killed"):
        list(mapped(_short_of_memory, [(tmp_path, 3)]))


def _linger(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def test_a_process_whose_work_was_cancelled_is_not_used_again(ray_session: object, tmp_path: Path) -> None:
    """It may have been stopped in the middle of an import, which leaves torch broken for the next stage."""
    import ray

    from lavatar.cluster.parallel import RayMap

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    begun = lambda: [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]  # noqa: E731
    parallel = RayMap(1, tmp_path / "log", lambda: len(begun()) > 0, ahead=1)
    with pytest.raises(Interrupted):
        list(parallel(_linger, [tmp_path]))
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in begun()):
        assert time.monotonic() < deadline, begun()
        time.sleep(0.1)


def test_a_killed_worker_is_restarted_and_the_curve_goes_on_bit_by_bit(toy_runner: StageRunner, tmp_path: Path) -> None:
    import toy_bodies

    spec, curve = _pair_spec(tmp_path, "slow"), tmp_path / "curve.jsonl"
    with toy_runner as runner:
        handle = runner.start(spec, toy_bodies.SinkFactory(curve))
        seen: list[Event] = []
        _steps(handle, 8, seen)
        (pid,) = _trainer_pids(spec)
        os.kill(pid, signal.SIGKILL)
        seen += watch(handle)
        result = handle.result()
    assert len(_trainer_pids(spec)) == 2
    (resumed,) = [int(found[1]) for event in seen if (found := re.search(r"resumed at step (\d+)", event.text))]
    assert resumed in (5, 10, 15, 20), "a checkpoint every five steps; the kill comes a little after the eighth"
    assert seen[-1].done == seen[-1].total == 40
    assert result.metrics["mapping"]["steps"] == 20
    assert (spec.out_dir / "release" / "config.json").read_text() == '{"tasks": 2}'

    whole = CurveFile(tmp_path / "whole.jsonl")
    train_toy(tmp_path / "whole", toy_bodies.CONFIG, whole)
    found = CurveFile(curve).curve()
    for step, terms in whole.curve().items():
        assert {name: found[step][f"mapping/{name}"] for name in ("image", "code", "total")} == {
            name: terms[name] for name in ("image", "code", "total")
        }
    lines = curve.read_text().splitlines()
    assert len({line for line in lines if '"ynet/total"' in line}) == 20, "steps done twice must give the same numbers"


def test_workers_of_one_machine_meet_on_loopback_alone(toy_runner: StageRunner, tmp_path: Path) -> None:
    """Two of them; also what Ray has them listen for, and what Gloo does."""
    import toy_bodies

    told = tmp_path / "told"
    spec = _pair_spec(tmp_path, f"heard {told}", workers=2)
    with toy_runner as runner:
        handle = runner.start(spec, toy_bodies.SinkFactory(tmp_path / "curve.jsonl"))
        watch(handle)
        assert handle.result().metrics["mapping"]["steps"] == 20
    found = [json.loads(told.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    assert [len(each) >= 2 for each in found] == [True, True], found
    assert {ip.removeprefix("::ffff:") for each in found for ip in each} == {"127.0.0.1"}


def test_a_bad_loss_comes_back_as_itself_without_a_restart(toy_runner: StageRunner, tmp_path: Path) -> None:
    spec = _pair_spec(tmp_path, "nan")
    with toy_runner as runner:
        handle = runner.start(spec)
        watch(handle)
        with pytest.raises(TrainingError, match=r"code = nan.* at step 7 \(samples: s7-0") as caught:
            handle.result()
    assert type(caught.value) is TrainingError
    assert len(_trainer_pids(spec)) == 1
    assert "TrainingError" in log_path(spec).read_text()
    assert not (spec.out_dir / "release").exists()


def test_a_cancel_keeps_a_checkpoint_and_a_worker_that_dies_too_often_is_an_error(
    toy_runner: StageRunner, tmp_path: Path
) -> None:
    spec = _pair_spec(tmp_path, "slow again", failures=0)
    with toy_runner as runner:
        handle = runner.start(spec)
        _steps(handle, 8, [])
        handle.cancel()
        watch(handle, 30)
        with pytest.raises(Interrupted, match="a checkpoint was written"):
            handle.result()
        kept, _ = latest(spec.out_dir / "ynet")
        assert kept is not None
        stopped = int(kept.name.removeprefix("step-"))
        assert stopped >= 8

        handle, seen = runner.start(spec), []
        _steps(handle, stopped + 1, seen)
        assert any(f"resumed at step {stopped}" in event.text for event in seen)
        os.kill(_trainer_pids(spec)[-1], signal.SIGKILL)
        watch(handle)
        with pytest.raises(TrainingError, match="died 1 times") as caught:
            handle.result()
        assert str(log_path(spec)) in caught.value.hint


def test_inline_stages_train_fail_and_stop(tmp_path: Path) -> None:
    import toy_bodies

    with StageRunner(tmp_path, backend="inline", bodies=toy_bodies.BODIES) as runner:
        result, seen = run(runner, _pair_spec(tmp_path, "plain"))
        assert isinstance(result, StageResult)
        assert seen[-1].done == 40

        spec = _pair_spec(tmp_path, "broken")
        handle = runner.start(spec)
        watch(handle)
        with pytest.raises(StageFailedError, match="KeyError: 'no such thing'") as caught:
            handle.result()
        assert str(log_path(spec)) in caught.value.hint
        assert "Traceback" in log_path(spec).read_text()

        handle = runner.start(_pair_spec(tmp_path, "slow"))
        _steps(handle, 8, [])
        handle.cancel()
        watch(handle, 20)
        with pytest.raises(Interrupted):
            handle.result()


def test_an_unknown_backend_and_a_closed_runner_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no backend 'slurm'"):
        StageRunner(tmp_path, backend="slurm")
    with pytest.raises(StageFailedError, match="not open"):
        StageRunner(tmp_path).start(_pair_spec(tmp_path, "x"))
