"""Registered models as somebody uses them who knows of MLflow alone: in clean processes, and over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from submit_files import LIMIT

from lavatar.platform.commands import ui

PYTHON = os.environ.get("LAVATAR_TEST_PYTHON", sys.executable)
"""Whose lavatar predicts and serves: another environment's, where it is installed and nothing of a checkout is."""

PREDICT = """
import sys, mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2])))
"""


def clean(tracking_uri: str) -> dict[str, str]:
    """The environment of somebody who knows of MLflow alone: nothing of a home, a registry, a store or its secrets."""
    no = ("LAVATAR_", "MLFLOW_", "AWS_", *(["PYTHONPATH", "VIRTUAL_ENV"] if sys.executable != PYTHON else []))
    ours = {k: v for k, v in os.environ.items() if not k.startswith(no)}
    cache = {k: v for k, v in os.environ.items() if k == "LAVATAR_WEIGHTS"}
    return {**ours, **cache, "MLFLOW_TRACKING_URI": tracking_uri, "OMP_NUM_THREADS": "1"}


def predicted(
    tracking_uri: str, model: str, pictures: np.ndarray, folder: Path, *, before: tuple[str, ...] = ()
) -> np.ndarray:
    """What the model makes of them in a process of its own; `before`: what that is started through."""
    np.save(folder / "in.npy", pictures)
    words = (model, str(folder / "in.npy"), str(folder / "out.npy"))
    done = subprocess.run(
        [*before, PYTHON, "-c", PREDICT, *words], env=clean(tracking_uri), cwd=folder, capture_output=True,
        text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(folder / "out.npy")
    (folder / "out.npy").unlink()
    return np.asarray(found)


@contextmanager
def served(tracking_uri: str, model: str, folder: Path) -> Iterator[str]:
    """`mlflow models serve` of a model; its address."""
    port = ui._free_port(5400)
    command = [PYTHON, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)], env=clean(tracking_uri), cwd=folder, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + LIMIT
            while not _answers(f"http://127.0.0.1:{port}/ping"):
                assert process.poll() is None, (folder / "serve.log").read_text()
                assert time.monotonic() < deadline, (folder / "serve.log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            ui._stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
