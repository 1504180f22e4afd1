"""A training worker that runs out of memory: once more with smaller parts of the same batches, then a clear failure.

Nothing is pretended: allocations fail at a limit of the address space, the kernel kills a process of a memory group.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import hungry
from cluster_specs import avatar_spec, dataset_spec, run, small_recipe
from fault_files import (
    INTERVAL,
    Moment,
    Near,
    Story,
    new_home,
    nothing_left,
    same_as_undisturbed,
    small_job,
)
from fault_files import STEPS as JOB_STEPS
from hungry import Limit
from submit_files import Lavatar

from lavatar.cluster.logs import log_path
from lavatar.cluster.memory import PARTS, kernel_kills
from lavatar.cluster.stages import StageRunner
from lavatar.configs.recipe import Recipe
from lavatar.contracts import Event, StageResult, StageSpec
from lavatar.errors import OutOfMemoryError
from lavatar.platform import lookup
from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Event as Line
from lavatar.platform.tracking import connect

STEPS = 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return small_recipe(steps=STEPS, batch_size=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    home = tmp_path_factory.mktemp("dataset")
    with StageRunner(home, backend="inline") as runner:
        spec = dataset_spec(home, 1, recipe)
        run(runner, spec)
    return spec.out_dir


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, dataset: Path, recipe: Recipe) -> StageResult:
    home = tmp_path_factory.mktemp("untouched")
    with StageRunner(home, backend="inline") as runner:
        result, _ = run(runner, avatar_spec(home, dataset, recipe))
    return result


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory group of the kernel's, below that of this process."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":")[2] for line in lines if line.split(":")[1] == "memory"), None)
    folder = Path(f"/sys/fs/cgroup/memory{own}") / f"lavatar-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no memory group can be made here (needs root and cgroups): the kernel cannot be made to kill")
    yield folder
    deadline = time.monotonic() + 20
    while (folder / "cgroup.procs").read_text():
        assert time.monotonic() < deadline, "a training worker is left"
        time.sleep(0.1)
    folder.rmdir()


def trained(home: Path, spec: StageSpec, limit: Limit) -> tuple[StageResult, list[Event]]:
    hungry.ship()
    with StageRunner(home, bodies=hungry.bodies_of(limit)) as runner:
        return run(runner, spec)


def same_but_in_parts(result: StageResult, seen: list[Event], untouched: StageResult) -> None:
    """It went on from the last checkpoint with half the part, says so, and came to the same."""
    assert result.metrics[PARTS] == {"avatar": {"before": 4, "after": 2}}
    assert result.notes == (
        "memory ran out once: the rest was trained with each batch of avatar in parts of 2 samples, not 4",
    )
    assert [event.level for event in seen if "once more from the last checkpoint" in event.text] == ["warning"]
    assert [event.text for event in seen if "resumed" in event.text] == ["avatar: resumed at step 4 from step-00000004"]
    found, wanted = result.metrics["avatar"], untouched.metrics["avatar"]
    assert (found["steps"], found["first_step"]) == (STEPS, 4), "a checkpoint interval is four steps"
    # the sums of parts are rounded otherwise, and Adam's first steps magnify it: 1.5e-4 has been seen
    assert found["losses"] == pytest.approx(wanted["losses"], rel=5e-4)


def nothing_is_left(spec: StageSpec) -> None:
    assert not list((spec.home / "ray" / "train").glob("*"))
    assert not [path for path in spec.out_dir.rglob("*") if path.name.startswith(".")]


def test_an_allocation_that_fails_is_tried_once_more_in_smaller_parts(
    ray_session: object, tmp_path: Path, dataset: Path, recipe: Recipe, untouched: StageResult
) -> None:
    spec = avatar_spec(tmp_path, dataset, recipe)
    result, seen = trained(tmp_path, spec, Limit(samples=3))
    same_but_in_parts(result, seen, untouched)
    assert any("can't allocate memory" in event.text for event in seen)
    nothing_is_left(spec)


def test_a_worker_that_the_kernel_kills_is_replaced_by_one_with_smaller_parts(
    ray_session: object, tmp_path: Path, dataset: Path, recipe: Recipe, untouched: StageResult, group: Path
) -> None:
    spec, before = avatar_spec(tmp_path, dataset, recipe), kernel_kills()
    result, seen = trained(tmp_path, spec, Limit(samples=3, group=group))
    assert kernel_kills() == before + 1
    same_but_in_parts(result, seen, untouched)
    assert any("the kernel killed the training worker" in event.text for event in seen)
    nothing_is_left(spec)


MEAL = 2 * 2**30
"""Bytes of a sample where Ray watches: more than Ray's own processes, and what else begins on the machine, take."""


def ray_watches(spec: StageSpec, samples: int) -> dict[str, Any]:
    """The stage's end where Ray lets the machine have four samples' bytes more than it has now, of which its own
    processes take one at most. A part of more than `samples` samples waits for what Ray does."""
    memory = psutil.virtual_memory()
    if memory.available < 6 * MEAL:
        pytest.skip(f"{6 * MEAL >> 30} GB of free memory are needed")
    threshold = (memory.total - memory.available + 4 * MEAL) / memory.total
    own = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    command = [sys.executable, str(Path(__file__).with_name("run_hungry.py")), str(spec.home)]
    command += [str(spec.inputs["dataset"]), str(samples), str(MEAL)]
    done = subprocess.run(
        command,
        input=json.dumps(spec.recipe).encode(),
        env={**os.environ, **own},
        capture_output=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return answer


def test_what_ray_kills_before_the_kernel_would_is_tried_once_more_in_smaller_parts(
    tmp_path: Path, dataset: Path, recipe: Recipe, untouched: StageResult
) -> None:
    spec = avatar_spec(tmp_path, dataset, recipe)
    answer = ray_watches(spec, samples=2)
    assert "seen" in answer, answer
    seen = [Event(**event) for event in answer["seen"]]
    assert any("Ray killed" in event.text for event in seen)
    same_but_in_parts(StageResult({}, answer["metrics"], tuple(answer["notes"])), seen, untouched)
    nothing_is_left(spec)


def test_what_ray_kills_again_is_a_clear_failure(tmp_path: Path, dataset: Path, recipe: Recipe) -> None:
    small = recipe.model_copy(update={"avatar_training": recipe.avatar_training.model_copy(update={"batch_size": 8})})
    spec = avatar_spec(tmp_path, dataset, small)
    answer = ray_watches(spec, samples=2)
    assert answer["error"] == "OutOfMemoryError"
    assert "Ray killed" in answer["message"]
    assert "batch_size" in answer["hint"]
    assert log_path(spec).read_text().count("training worker 0 of 1: begins") == 2
    nothing_is_left(spec)


def test_memory_that_runs_out_again_is_a_clear_failure(
    ray_session: object, tmp_path: Path, dataset: Path, recipe: Recipe
) -> None:
    spec = avatar_spec(tmp_path, dataset, recipe)
    with pytest.raises(OutOfMemoryError) as caught:
        trained(tmp_path, spec, Limit(samples=1))
    assert re.search(r"does not fit into memory .*, also each batch of avatar in parts of 2", caught.value.message)
    assert "batch_size" in caught.value.hint
    assert log_path(spec).read_text().count("training worker 0 of 1: begins") == 2
    nothing_is_left(spec)
    assert [path.name for path in (spec.out_dir / "avatar").iterdir()] == ["step-00000004"]


LAST = JOB_STEPS - 2 * INTERVAL
"""The step of the last checkpoint before memory runs out."""
ROUNDED = Near(
    files=(
        "avatar:ann/", "pair:ann<-bob/mapping/", "pair:ann<-bob/release/", "pair:ann<-bob/result.json",
        "preview:ann<-bob/",
    ),
    curves={"avatar:ann/": LAST, "pair:ann<-bob/mapping": 0, "preview:ann<-bob/": 0},
    relative=1e-4,  # 1.2e-6 has been seen, in the loss of the mapping
    absolute=1e-4,
)  # fmt: skip
"""What follows from twenty steps in smaller parts. Both datasets, the first hundred steps of the avatar and the
Y-network, which does not know the avatar, are the same to the last bit."""


def hungry_home(folder: Path, samples: int, step: int) -> Lavatar:
    """A home whose avatars' trainings have the memory of so many samples from a step on."""
    lavatar = new_home(folder)
    lavatar.script = (str(Path(__file__).with_name("run_hungry_job.py")), str(samples), str(step))
    return lavatar


def told_of_memory(lavatar: Lavatar) -> Line:
    """The line that says that the training is tried once more; there is one."""
    registry = open_registry(Home(lavatar.home))
    (job,) = lookup.list_jobs(registry)
    (told,) = [line for line in lookup.events(registry, job.id) if "once more from the last checkpoint" in line.text]
    registry.close()
    assert (told.stage, told.level) == ("avatar:ann", "warning")
    assert "each batch of avatar in parts of 1 samples, not 2" in told.text
    return told


def test_a_job_whose_worker_runs_out_of_memory_ends_as_it_should(tmp_path: Path, undisturbed: Story) -> None:
    lavatar = hungry_home(tmp_path, samples=1, step=LAST + 6)
    try:
        code, out = lavatar(*small_job(lavatar))
    finally:
        lavatar.kill_what_runs()
    assert code == 0, lavatar.errors()
    assert json.loads(out)["state"] == "finished"
    told = told_of_memory(lavatar)
    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert (row.attempts, row.metrics[PARTS]) == (1, {"avatar": {"before": 2, "after": 1}})
    same_as_undisturbed(lavatar, undisturbed, Moment(LAST, told.time), ROUNDED)


def test_a_job_whose_memory_is_too_small_fails_clearly_and_goes_on_with_more(
    tmp_path: Path, undisturbed: Story
) -> None:
    """What was tried in smaller parts left no checkpoint: with enough memory the end is that of an undisturbed job."""
    last = 2 * INTERVAL
    lavatar = hungry_home(tmp_path, samples=0, step=last + 6)
    try:
        code, out = lavatar(*small_job(lavatar))
    finally:
        lavatar.kill_what_runs()
    assert code == 1
    report = json.loads(out)
    assert report["state"] == "failed"
    assert re.search(
        r"does not fit into memory .*, also each batch of avatar in parts of 1", report["error"]["message"]
    )
    assert "batch_size" in report["error"]["hint"]
    told, row = told_of_memory(lavatar), lavatar.stage("avatar:ann")
    assert row is not None
    assert (row.state, row.owner, row.mlflow_open) == ("failed", None, False)
    assert connect(Home(lavatar.home)).get_run(row.mlflow_run_id).info.status == "FAILED"
    nothing_left(lavatar.home)

    code, _ = Lavatar(lavatar.home, lavatar.environment)("jobs", "retry", report["job"])
    assert code == 0, lavatar.errors()
    same_as_undisturbed(lavatar, undisturbed, Moment(last, told.time))
