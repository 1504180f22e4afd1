"""What every process of lavatar is told before it imports anything else: to write nowhere but into the home, and to
report to nobody. The command line tells itself, Ray's processes inherit it."""

from __future__ import annotations

import os
from pathlib import Path

UNREPORTED = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # DeepSpeed imports MLflow too; it would write ~/.config/mlflow
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime would write ~/.cache/Microsoft, as soon as it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
}


def contained(home: Path) -> dict[str, str]:
    """The variables, for this home."""
    folder = Path(home).absolute() / "cache"
    return {
        **UNREPORTED,
        "MPLCONFIGDIR": str(folder / "matplotlib"),  # MediaPipe imports matplotlib
        "TRITON_HOME": str(folder / "triton"),  # DeepSpeed and torch use Triton where there is a GPU
    }


def contain(home: Path) -> None:
    """Set them here, but for what the user has set. Before the libraries are imported."""
    for name, value in contained(home).items():
        os.environ.setdefault(name, value)
