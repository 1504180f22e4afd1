"""The metric sink that training logs through: into one MLflow run, from whatever process it is made in.

Logging must never cost training anything: values are collected and a thread sends them in batches every few seconds,
failures are counted and tried again, pictures beyond a few waiting ones are dropped. Steps that an earlier attempt
logged already are skipped, so a curve that is taken up again has each step once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
FLUSH_SECONDS = 3.0
CLOSE_SECONDS = 30.0
_BATCH = 900  # MLflow takes at most 1000 metrics a call
_MOST_WAITING = 50_000
_MOST_PICTURES = 16
_PICTURE_TAG = "lavatar.pictures"  # "name=step …": the newest step whose picture is logged


@dataclass(frozen=True)
class MlflowSinkFactory:
    """Picklable; calling it opens the sink in the process that calls."""

    tracking_uri: str = field(repr=False)  # may hold a password; Ray Train shows its arguments in the dashboard
    run_id: str

    def __call__(self) -> MlflowSink:
        return MlflowSink(self.tracking_uri, self.run_id)


class MlflowSink:
    """A `MetricSink` on one run. Every method returns at once and never raises; `close` waits for what is left."""

    def __init__(self, tracking_uri: str, run_id: str, flush_seconds: float = FLUSH_SECONDS) -> None:
        self._uri, self._run_id, self._every = tracking_uri, run_id, flush_seconds
        self._metrics: deque[tuple[str, float, int, int]] = deque(maxlen=_MOST_WAITING)
        self._pictures: deque[tuple[int, str, Any]] = deque(maxlen=_MOST_PICTURES)
        self._files: deque[tuple[Path, str]] = deque()
        self._params: dict[str, str] = {}
        self._known: set[str] = set()
        self._last: dict[str, int] | None = None  # newest logged step by curve; None until asked for
        self._last_picture: dict[str, int] = {}
        self._client: MlflowClient | None = None
        self.failures, self._trouble = 0, False
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake, self._closed = threading.Event(), False
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
        """Send what is waiting, for moments that a restart does not come by again (checkpoints).

        While the server does not answer nothing is waited for: the thread goes on trying.
        """
        if not self._trouble:
            with contextlib.suppress(Exception):
                self._send()

    def close(self) -> None:
        """Send what is left, for at most half a minute."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._every)
            with contextlib.suppress(Exception):
                self._send()
        for _ in range(3):
            with contextlib.suppress(Exception):
                self._send()
            if not (left := self._unsent()):
                return
            time.sleep(0.5)
        _log.warning("MLflow did not take %d items after %d failures: they are not in its run", left, self.failures)

    def _unsent(self) -> int:
        return len(self._metrics) + len(self._pictures) + len(self._files) + len(self._params)

    def _send(self) -> None:
        """One round; what fails stays in line for the next."""
        with self._sending:
            try:
                client = self._open()
                self._send_params(client)
                self._send_metrics(client)
                self._send_pictures(client)
                self._send_files(client)
                self._trouble = False
            except Exception:
                self.failures, self._trouble = self.failures + 1, True
                raise

    def _open(self) -> MlflowClient:
        if self._client is None or self._last is None:
            from lavatar.platform.tracking import quiet

            quiet()
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            run = client.get_run(self._run_id)
            self._last = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
            self._known = set(run.data.params)
            self._last_picture = _read_steps(run.data.tags.get(_PICTURE_TAG, ""))
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
                batch = [self._metrics.popleft() for _ in range(min(_BATCH, len(self._metrics)))]
            rows, last = [], dict(self._last)
            for raw_name, value, stamp, step in batch:
                name = metric_name(raw_name)
                if step > last.get(name, -1):
                    last[name] = step
                    rows.append(Metric(name, value, stamp, step))
            try:
                if rows:
                    client.log_batch(self._run_id, metrics=rows)
            except Exception:
                with self._lock:  # in line again, but never at the cost of newer ones
                    room = _MOST_WAITING - len(self._metrics)
                    self._metrics.extendleft(reversed(batch[-room:] if room else []))
                raise
            self._last = last

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

    def _sent(self, line: deque[Any], item: Any) -> None:
        """Out of the line, unless newer ones have pushed it out meanwhile."""
        with self._lock:
            if line and line[0] is item:
                line.popleft()


def _read_steps(text: str) -> dict[str, int]:
    pairs = (item.rpartition("=") for item in text.split("\n") if "=" in item)
    return {name: int(step) for name, _, step in pairs if step.isdecimal()}


def _write_steps(steps: Mapping[str, int]) -> str:
    return "\n".join(f"{name}={step}" for name, step in sorted(steps.items()))
