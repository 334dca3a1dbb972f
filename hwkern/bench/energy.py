"""Energy of a stretch of time, from the GPU's own counter (NVML through ``nvidia-ml-py``, optional)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Length of a stretch. The counter moves in steps of up to 0.1 s: stretches begin and end at a step.
LEAST_SECONDS = 0.3
#: A counter that has not moved for so long is broken, or the stretch has calls of seconds.
MOST_SECONDS = 3.0
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


@dataclass(frozen=True)
class Stretch:
    """Energy of some seconds of back-to-back calls, which did so many units (tokens) of work."""

    seconds: float
    joules: float
    units: float

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


def stretch(meter: Meter, run: Callable[[], float], least: float = LEAST_SECONDS) -> Stretch | None:
    """Call ``run``, which gives the units of work that it did, from one step of the counter to another at least so many
    seconds later. None without a counter, or when it does not move."""
    begin = last = meter.read()
    start: tuple[float, float] | None = None
    units = 0.0
    while last is not None and begin is not None and last[0] - begin[0] < least + MOST_SECONDS:
        done = run()
        now = meter.read()
        assert now is not None
        units += done
        if now[1] != last[1]:
            if start is None:
                start, units = now, 0.0
            elif now[0] - start[0] >= least:
                return Stretch(now[0] - start[0], now[1] - start[1], units)
        last = now
    return None
