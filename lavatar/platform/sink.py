"""The metric sink that training logs through: into one MLflow run, from whatever process it is made in.

Logging must never cost training anything: values are collected and a thread sends them in batches every few seconds,
failures are counted and tried again, pictures beyond a few waiting ones are dropped. Steps that an earlier attempt
logged already are skipped, so a curve that is taken up again has each step once.

While MLflow is away, the values that wait are written to a file at every checkpoint and at the end. Whoever opens the
run's next sink, the next worker or the driver that ends the run, sends them first.

A sink in the process that does a stage's work also says on which machine that is, and samples what the machine does.
Those values belong to no step: theirs are the seconds since the run began. Of a training over several nodes a worker of
each other node has a sink for that alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.errors import UNREADABLE
from lavatar.platform.machine import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
FLUSH_SECONDS = 3.0
CLOSE_SECONDS = 30.0
SILENT_SECONDS = 20.0
"""After so long without a word (a process that was stopped) the run may be another process's: ask anew what it has."""
CHECKPOINT_SECONDS = 5.0
"""How long a checkpoint waits for what is being sent, before it is written to the file instead."""
BATCH = 900  # MLflow takes at most 1000 metrics a call
_MOST_WAITING = 50_000
_MOST_PICTURES = 16
Value = tuple[str, float, int, int]
"""Name, value, Unix milliseconds, step."""
BY_TIME = -1
"""The step of a value whose step is the time: it is told when MLflow has said when the run began."""

_PICTURE_TAG = "lavatar.pictures"  # "name=step …": the newest step whose picture is logged


@dataclass(frozen=True)
class MlflowSinkFactory:
    """Picklable; calling it opens the sink in the process that calls, which does the work of the run."""

    tracking_uri: str = field(repr=False)  # may hold a password; Ray Train shows its arguments in the dashboard
    run_id: str
    unsent: Path | None = None

    def __call__(self, node: str = "") -> MlflowSink:
        return MlflowSink(self.tracking_uri, self.run_id, self.unsent, system=SystemMetrics(node))

    def beside(self, node: str) -> MlflowSink:
        """The file of what could not be sent is the first process's: what this one cannot send is lost with it."""
        return MlflowSink(self.tracking_uri, self.run_id, system=SystemMetrics(node, beside=True))


class MlflowSink:
    """A `MetricSink` on one run. Every method returns at once and never raises; `close` waits for what is left.

    `unsent` is the file of what could not be sent; None: it is lost with this process. `system`: of the machine that
    the run is worked on; None: nothing is said of this one.
    """

    def __init__(
        self,
        tracking_uri: str,
        run_id: str,
        unsent: Path | None = None,
        flush_seconds: float = FLUSH_SECONDS,
        system: SystemMetrics | None = None,
    ) -> None:
        self._uri, self._run_id, self._file, self._every = tracking_uri, run_id, unsent, flush_seconds
        self._system = system
        kept = read_values(unsent) if unsent else []
        self._kept = bool(kept)  # whether something is in the file
        self._metrics: deque[Value] = deque(kept, maxlen=_MOST_WAITING)
        self._pictures: deque[tuple[int, str, Any]] = deque(maxlen=_MOST_PICTURES)
        self._files: deque[tuple[Path, str]] = deque()
        self._params: dict[str, str] = {}
        self._known: set[str] = set()
        self._last: dict[str, int] | None = None  # newest logged step by curve; None until asked for
        self._began = 0  # of the run, Unix milliseconds
        self._last_picture: dict[str, int] = {}
        self._client: MlflowClient | None = None
        self._sent_at = time.time()
        self.failures, self._trouble = 0, False
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake, self._round, self._closed = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="mlflow-sink", daemon=True)
        self._thread.start()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters that the run has already keep their value."""
        with self._lock:
            self._params.update({str(k): str(v)[:500] for k, v in params.items()})

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        stamp = int(time.time() * 1000)
        with contextlib.suppress(Exception), self._lock:
            self._metrics.extend((str(name), float(value), stamp, int(step)) for name, value in metrics.items())

    def log_picture(self, step: int, name: str, image_hwc: Any) -> None:
        with contextlib.suppress(Exception), self._lock:
            self._pictures.append((int(step), name, image_hwc.copy()))  # the caller may draw into it again

    def log_file(self, path: Path, folder: str = "") -> None:
        with self._lock:
            self._files.append((Path(path), folder))

    def flush(self) -> None:
        """What waits is sent or in the file, for moments that a restart does not come by again (checkpoints).

        While the server does not answer it is not waited for: the thread goes on trying.
        """
        self._round.clear()
        self._wake.set()
        if not self._trouble and not self._round.wait(CHECKPOINT_SECONDS):
            self._trouble = True
        self._keep()

    def close(self) -> None:
        """Send what is left, for at most half a minute; what then still waits goes to the file."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        self._keep()
        if left := self._unsent():
            where = f": they are in {self._file} until it answers" if self._kept else ""
            _log.warning("MLflow did not take %d items after %d failures%s", left, self.failures, where)

    def _run(self) -> None:
        if self._system is not None:
            self._system.begin()
        while not self._closed:
            self._wake.wait(self._every)
            self._wake.clear()
            self._sample()
            with contextlib.suppress(Exception):
                self._send()
            self._round.set()
        for _ in range(3):
            with contextlib.suppress(Exception):
                self._send()
            if not self._unsent():
                return
            time.sleep(0.5)

    def _sample(self) -> None:
        """What the machine does, where it is time to look."""
        if self._system is not None:
            with contextlib.suppress(Exception):
                self.log_metrics(BY_TIME, self._system.sample())

    def _unsent(self) -> int:
        return len(self._metrics) + len(self._pictures) + len(self._files) + len(self._params)

    def _send(self) -> None:
        """One round; what fails stays in line for the next."""
        with self._sending:
            try:
                if abs(time.time() - self._sent_at) > SILENT_SECONDS:
                    self._last = None
                client = self._open()
                self._send_params(client)
                self._send_metrics(client)
                self._send_pictures(client)
                self._send_files(client)
                self._trouble, self._sent_at = False, time.time()
                if self._kept:
                    self._keep()
            except Exception:
                self.failures, self._trouble = self.failures + 1, True
                raise

    def _open(self) -> MlflowClient:
        if self._client is None or self._last is None:
            from lavatar.platform.tracking import quiet

            quiet()
            from mlflow import MlflowClient
            from mlflow.entities import RunTag

            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            run = client.get_run(self._run_id)
            self._last = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
            self._known = set(run.data.params)
            self._last_picture = _read_steps(run.data.tags.get(_PICTURE_TAG, ""))
            self._began = int(run.info.start_time)
            if self._system is not None and self._client is None:
                client.log_batch(
                    self._run_id, tags=[RunTag(name, value) for name, value in self._system.tags().items()]
                )
            self._client = client
        return self._client

    def _send_params(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        with self._lock:
            fresh = {k: v for k, v in self._params.items() if k not in self._known}
        rows = [Param(k, v) for k, v in fresh.items()]
        for i in range(0, len(rows), 100):
            client.log_batch(self._run_id, params=rows[i : i + 100])
        self._known.update(fresh)
        with self._lock:
            self._params = {k: v for k, v in self._params.items() if k not in self._known}

    def _send_metrics(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        from lavatar.platform.tracking import metric_name

        assert self._last is not None
        while self._metrics:
            with self._lock:
                batch = list(islice(self._metrics, BATCH))  # they stay in line until they are there
            rows, last = [], dict(self._last)
            for raw_name, value, stamp, step in batch:
                name = metric_name(raw_name)
                step = step if step != BY_TIME else max(0, stamp - self._began) // 1000
                if step > last.get(name, -1):
                    last[name] = step
                    rows.append(Metric(name, value, stamp, step))
            if rows:
                client.log_batch(self._run_id, metrics=rows)  # values that are there already are not doubled
            self._last = last
            for waiting in batch:
                self._sent(self._metrics, waiting)

    def _send_pictures(self, client: MlflowClient) -> None:
        while self._pictures:
            step, name, image = first = self._pictures[0]
            if step > self._last_picture.get(name, -1):
                client.log_image(self._run_id, image, key=name, step=step)
                self._last_picture[name] = step
                client.set_tag(self._run_id, _PICTURE_TAG, _write_steps(self._last_picture))
            self._sent(self._pictures, first)

    def _send_files(self, client: MlflowClient) -> None:
        while self._files:
            path, folder = first = self._files[0]
            if path.exists():
                client.log_artifact(self._run_id, str(path), folder or None)
            else:
                _log.warning("%s was gone before it could be logged to MLflow", path)
            self._sent(self._files, first)

    def _keep(self) -> None:
        """The values that wait are in the file, and no others."""
        if self._file is None:
            return
        with contextlib.suppress(OSError), self._lock:
            if self._metrics:
                _write_values(self._file, self._metrics)
            else:
                self._file.unlink(missing_ok=True)
            self._kept = bool(self._metrics)

    def _sent(self, line: deque[Any], item: Any) -> None:
        """Out of the line, unless newer ones have pushed it out meanwhile."""
        with self._lock:
            if line and line[0] is item:
                line.popleft()


def read_values(path: Path) -> list[Value]:
    """Those of an earlier sink; none where there is no file, or another one."""
    try:
        return [
            (str(n), float(v), int(t), int(step)) for n, v, t, step in map(json.loads, path.read_text().splitlines())
        ]
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        _log.warning("%s is not readable (%s): the values in it are not in MLflow", path, error)
        return []


def _write_values(path: Path, values: Iterable[Value]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(value) + "\n" for value in values))
    os.replace(part, path)


def _read_steps(text: str) -> dict[str, int]:
    pairs = (item.rpartition("=") for item in text.split("\n") if "=" in item)
    return {name: int(step) for name, _, step in pairs if step.isdecimal()}


def _write_steps(steps: Mapping[str, int]) -> str:
    return "\n".join(f"{name}={step}" for name, step in sorted(steps.items()))
