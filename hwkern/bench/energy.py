"""Energy of a stretch of time, from the GPU's own counter (NVML through ``nvidia-ml-py``, optional)."""

from __future__ import annotations

import time
from typing import Any

#: The counter moves in steps of about 0.1 s; a shorter stretch says nothing.
LEAST_SECONDS = 0.5
INSTALL = "pip install nvidia-ml-py"


class Meter:
    """The energy counter of one GPU, found by its UUID as torch gives it.

    Attributes:
        problem: why there is none, as a sentence; None when it works.
    """

    def __init__(self, uuid: str | None) -> None:
        self.problem: str | None = None
        self._nvml: Any = None
        self._gpu: Any = None
        if uuid is None:
            self.problem = "energy is measured on NVIDIA GPUs only"
            return
        try:
            import pynvml
        except ImportError:
            self.problem = f"no nvidia-ml-py: {INSTALL}"
            return
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        except pynvml.NVMLError as error:
            self.problem = f"NVML has no energy counter here ({error})"
            return
        self._nvml = pynvml

    def read(self) -> tuple[float, float] | None:
        """``(seconds, joules)`` since some moment; None without a counter."""
        if self._nvml is None:
            return None
        return time.perf_counter(), self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1e3

    def clocks(self) -> dict[str, int]:
        """SM and memory clock in MHz and the power limit in W at this moment; empty without NVML."""
        if self._nvml is None:
            return {}
        nvml, gpu = self._nvml, self._gpu
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) // 1000,
        }


class Account:
    """Sums the energy of the stretches between ``start`` and ``stop``."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._from: tuple[float, float] | None = None
        self.seconds = 0.0
        self.joules = 0.0

    def start(self) -> None:
        self._from = self._meter.read()

    def stop(self) -> None:
        now = self._meter.read()
        if now is not None and self._from is not None and now[0] - self._from[0] >= LEAST_SECONDS / 2:
            self.seconds += now[0] - self._from[0]
            self.joules += now[1] - self._from[1]
        self._from = None

    @property
    def watts(self) -> float | None:
        """Mean power; None when too little was seen."""
        return self.joules / self.seconds if self.seconds >= LEAST_SECONDS else None
