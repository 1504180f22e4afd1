"""Training in Ray Train workers: DeepSpeed in each, restarted from the last checkpoint when one dies.

Our checkpoints are on the shared home, so Ray Train only starts, watches and restarts processes. An error that a
restart would not mend (ours, or any on a single worker) is posted and ends the run; a dead process is restarted. Where
memory ran out, the run begins once more with smaller parts of a batch (memory.py).
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from lavatar.cluster.logs import log_path, note, noted, redirected
from lavatar.cluster.mailbox import Post
from lavatar.cluster.meeting import process_group
from lavatar.cluster.memory import (
    batch_too_large,
    kernel_kills,
    killed,
    killed_by_ray,
    out_of_memory,
    train_within_memory,
)
from lavatar.cluster.parallel import limit_threads
from lavatar.cluster.plans import PlanFactory, Worker, run_plan
from lavatar.cluster.resources import Share, ray_options
from lavatar.contracts import Event, MetricSink, MetricSinkFactory, NullSink, StageSpec
from lavatar.errors import LavatarError, StageFailedError, TrainingError

RAY_KILLED = "Ray killed the training worker"
UNUSED = {
    "DatasetsCallback",  # Ray Data: we read our own shards
    "PlacementGroupCleanerCallback",  # for controllers that die: ours ends with the task that started it
}


def train_on_workers(
    plan: PlanFactory,
    spec: StageSpec,
    share: Share,
    max_failures: int,
    metrics: MetricSinkFactory | None,
    mailbox: Any,
    ran_out: bool = False,
) -> dict[str, Any]:
    """Runs `plan` in `share.workers` Ray Train workers; returns their figures. Blocks; for a coordinating task.

    `ran_out`: an earlier such task was killed for want of memory.
    """
    import ray

    def fit(one: StageSpec) -> dict[str, Any]:
        ray.get(mailbox.forgive.remote(spec.key))
        figures = None
        while figures is None:  # once; or again from the last checkpoint, which tells them anew
            figures = _fit(plan, one, share, max_failures, metrics, mailbox)
        return figures

    def say(text: str) -> None:
        ray.get(mailbox.post.remote(spec.key, [Event(spec.name, text, level="warning")]))

    return train_within_memory(spec, share.workers, fit, say, ran_out=ran_out)


def _fit(
    plan: PlanFactory,
    spec: StageSpec,
    share: Share,
    max_failures: int,
    metrics: MetricSinkFactory | None,
    mailbox: Any,
) -> dict[str, Any] | None:
    """One run of Ray Train; its figures, None where they were lost with the mailbox."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    run = f"{spec.key[:16]}-{time.time_ns() // 1_000_000}"
    storage = spec.home / "ray" / "train"
    for left in storage.glob(f"{spec.key[:16]}-*"):  # by an attempt that was killed
        shutil.rmtree(left, ignore_errors=True)
    options = {
        "train_loop_config": {
            "plan": plan, "spec": spec, "share": share, "metrics": metrics, "mailbox": mailbox,
        },
        "scaling_config": ScalingConfig(
            num_workers=share.workers,
            use_gpu=share.gpus > 0,
            resources_per_worker=ray_options(share),
        ),
        "run_config": RunConfig(
            name=run, storage_path=str(storage), failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[_memory_watch(mailbox, spec.key)],
        ),
    }  # fmt: skip
    try:
        _trainer(share)(train_worker, **options).fit()
    except TrainingFailedError as error:
        posted = ray.get(mailbox.failure.remote(spec.key))
        if posted is not None:
            raise posted from error
        if ray.get(mailbox.starved.remote(spec.key)):
            raise killed(RAY_KILLED) from error
        raise TrainingError(
            f"the training worker died {max_failures + 1} times: {_reason(error)}",
            f"What it printed is in {log_path(spec)}. A repeated submit goes on from the last checkpoint.",
        ) from error
    finally:
        shutil.rmtree(storage / run, ignore_errors=True)
    posted = ray.get(mailbox.failure.remote(spec.key))
    if posted is not None:
        raise posted
    figures: dict[str, Any] | None = ray.get(mailbox.figures.remote(spec.key))
    return figures


def _memory_watch(mailbox: Any, key: str) -> Any:
    """A callback of Ray Train's controller: it alone is told that Ray killed a worker for want of memory."""
    import ray
    from ray.train import UserCallback

    class MemoryWatch(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(killed_by_ray(error) for error in worker_exceptions.values()):
                ray.get(mailbox.starve.remote(key))

    return MemoryWatch()


def _trainer(share: Share) -> Callable[..., Any]:
    """Ray Train's trainer without a process group of its own: workers make it themselves (meeting.py).

    TorchTrainer would make two more processes import torch. Helpers of Ray Train that we have no use for are left out
    too: each is one more process that imports half of Ray. Together: 16 s of CPU time a start instead of 26.
    """
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Sharing(Backend):
        share_cuda_visible_devices = True  # NCCL hands memory to the other GPUs of a node that it sees

    class SharingConfig(BackendConfig):
        backend_cls = Sharing

    class LeanTrainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in UNUSED]

    return partial(LeanTrainer, backend_config=SharingConfig() if share.workers > 1 else None)


def train_worker(config: dict[str, Any]) -> None:
    """The body of one Ray Train worker."""
    import ray
    from ray.train import get_context

    spec: StageSpec = config["spec"]
    mailbox, log = config["mailbox"], log_path(spec)
    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    if ray.get(mailbox.failure.remote(spec.key)) is not None:
        return  # a worker beside this one failed for good; the restart is Ray Train's, not ours
    ray.get(mailbox.started.remote(spec.key, heeds=True))  # it stops at its first step if it was cancelled before
    name = f"training worker {rank} of {world}"
    with redirected(log), Post(mailbox, spec.key) as post:
        try:
            with noted(log, name):
                _heed_kills(spec, mailbox)
                figures = _train(config, rank, world, post)
            if rank == 0:
                ray.get(mailbox.finish.remote(spec.key, figures))
        except LavatarError as error:
            ray.get(mailbox.fail.remote(spec.key, error))
            if world > 1:
                raise  # the others wait in a collective call: only a torn-down group frees them
        except Exception as error:
            if out_of_memory(error):
                ray.get(mailbox.fail.remote(spec.key, _failed(error, spec)))
            if world > 1:
                raise  # may be the echo of another worker's death: Ray Train restarts the group
            ray.get(mailbox.fail.remote(spec.key, _failed(error, spec)))


def _heed_kills(spec: StageSpec, mailbox: Any) -> None:
    """Raises OutOfMemoryError in a worker that replaces one that Ray or the kernel has killed for want of memory."""
    import ray

    if ray.get(mailbox.starved.remote(spec.key)):
        raise killed(RAY_KILLED)
    node = ray.get_runtime_context().get_node_id()
    if ray.get(mailbox.killed.remote(spec.key, node, kernel_kills())):
        raise killed("the kernel killed the training worker")


def _train(config: dict[str, Any], rank: int, world: int, post: Post) -> dict[str, Any]:
    spec, share = config["spec"], config["share"]
    post.emit(Event(spec.name, f"training process {rank + 1} of {world} started"))
    limit_threads(share.cpus)
    import torch
    from ray.train import get_context

    torch.set_num_threads(max(1, int(share.cpus)))
    device = "cpu"
    if share.gpus and torch.cuda.is_available():
        from ray.train.torch import get_device

        device = str(get_device())
    with process_group(device), ExitStack() as stack:
        metrics = open_metrics(config["metrics"], get_context(), stack)
        plan = config["plan"](spec, post)
        return run_plan(plan, spec, Worker(rank, world, device), metrics, post, post.cancelled)


def open_metrics(factory: MetricSinkFactory | None, context: Any, stack: ExitStack) -> MetricSink:
    """Where this worker logs: the first one of all into the stage's run, the others nowhere. Over several nodes the
    first worker of each says what its node does: by a thread of its own, so that no worker waits for it. `context`:
    Ray Train's; a sink is closed with `stack`."""
    if factory is None or context.get_local_rank() > 0:
        return NullSink()
    several = context.get_local_world_size() < context.get_world_size()
    node = f"node{context.get_node_rank()}" if several else ""
    first = context.get_world_rank() == 0
    sink = factory(node) if first else factory.beside(node)
    stack.callback(sink.close)
    return sink if first else NullSink()


def _failed(error: Exception, spec: StageSpec) -> LavatarError:
    """An error that is not ours, as one that says where to look."""
    log = log_path(spec)
    note(log, traceback.format_exc())
    if out_of_memory(error):
        return batch_too_large(error)
    text = str(error).strip().splitlines()
    return StageFailedError(
        f"{type(error).__name__}: {text[0] if text else 'no message'}", f"What its processes printed is in {log}."
    )


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    text = str(next(iter(failures.values()))).strip().splitlines()
    return text[0] if text else type(error).__name__
