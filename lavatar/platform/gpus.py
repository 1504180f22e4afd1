"""NVIDIA's GPUs as the driver's own library (NVML) sees them: it comes with every driver, and no package is needed."""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_NAME = 96  # bytes of NVML's texts


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class Gpus:
    """All of this machine, also those that CUDA_VISIBLE_DEVICES hides; none where there is no driver."""

    def __init__(self) -> None:
        self._handles: list[ctypes.c_void_p] = []
        try:
            self._nvml: Any = ctypes.CDLL(LIBRARY)
        except OSError:
            return
        count = ctypes.c_uint()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if not self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
                self._handles.append(handle)

    def describe(self) -> str:
        """Their names, and the driver's version."""
        if not self._handles:
            return "none"
        names = [self._text(self._nvml.nvmlDeviceGetName, handle) for handle in self._handles]
        return f"{', '.join(names)} (driver {self._text(self._nvml.nvmlSystemGetDriverVersion)})"

    def sample(self) -> dict[str, float]:
        """What each does now, under MLflow's names; what the driver does not tell is left out."""
        found: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            memory, busy, power = _Memory(), _Utilization(), ctypes.c_uint()
            if not self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
                found[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
                found[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            if not self._nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(busy)):
                found[f"gpu_{index}_utilization_percentage"] = float(busy.gpu)
            if not self._nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(power)):
                found[f"gpu_{index}_power_usage_watts"] = power.value / 1000
        return found

    def _text(self, ask: Any, *about: Any) -> str:
        text = ctypes.create_string_buffer(_NAME)
        return text.value.decode(errors="replace") if not ask(*about, text, _NAME) else "unknown"
