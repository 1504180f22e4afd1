"""What every test can ask for: real footage, pretrained weights, a fresh LAVATAR_HOME."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, configuration, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a script's background: what is tested inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: two threads in each of two processes wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if shutil.which("nvidia-smi") is None:  # without a GPU Triton interprets its kernels; it asks once, when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same inputs at every run, and none of Hypothesis' files in the current folder. A busy machine is no failure.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"hypothesis-{os.getuid()}")
settings.register_profile(
    "lavatar", database=None, deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("lavatar")

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHT_FILES = (
    "face_landmarker.task",
    "rvm_mobilenetv3_fp32.onnx",
    "lpips_vgg16.safetensors",
    "lpips_alexnet.safetensors",
)


@pytest.fixture(scope="session", autouse=True)
def nothing_lands_in_the_current_folder() -> Iterator[None]:
    """lavatar writes into its home alone, whatever folder it is run in."""
    before = set(os.listdir())
    yield
    assert set(os.listdir()) - before <= {"__pycache__"}


@pytest.fixture(scope="session")
def videos() -> Path:
    """Folder of real portrait videos, kept beside a checkout and never in it."""
    folder = SHARED / "videos"
    if not (folder / "newsreader.mp4").exists():
        pytest.skip(f"no real footage at {folder}: this test runs where the project's test videos are")
    return folder


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder of pretrained weights (LAVATAR_WEIGHTS, else the user's cache)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lavatar" / "weights"
    folder = Path(os.environ.get("LAVATAR_WEIGHTS") or cache)
    missing = [name for name in WEIGHT_FILES if not (folder / name).exists()]
    if missing:
        pytest.skip(f"pretrained weights {', '.join(missing)} are not in {folder}: run 'lavatar weights fetch'")
    return folder


@pytest.fixture(scope="session")
def face_recognition() -> Path:
    """The network of the identity figures."""
    from lavatar.datasets.weights import find
    from lavatar.errors import WeightsError

    try:
        return find("face_recognition")
    except WeightsError as error:
        pytest.skip(f"{error.message}: run tests/face_recognition_weights.py, or {error.hint}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LAVATAR_HOME of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LAVATAR_HOME", str(folder))
    monkeypatch.delenv("LAVATAR_REGISTRY", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder
