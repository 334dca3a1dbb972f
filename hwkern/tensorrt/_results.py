"""Host results in page-locked memory: the GPU writes them where the caller reads them.

Copied out of a staging buffer into new memory, a result costs page faults and two more passes over memory: 6.3 MB,
MiniLM's for 32 requests of 128 tokens, took 652 µs from the GPU to a numpy array on an H100, and 127 µs where it is
handed out as it arrived. Its memory is used again when the caller lets go of it.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from hwkern.tensorrt import _cuda
from hwkern.tensorrt.profiles import Shape

_LEAST = 64 << 10  # bytes; smaller results are copied in microseconds and would hold a page each
_MOST_HELD = 256 << 20  # bytes that callers may hold: page-locked memory is taken from everybody
_MOST_IDLE = 64 << 20  # bytes that are kept for later results


class Pool:
    """Page-locked memory of one Runner's results. Safe for threads, and for results that die in the midst of a call."""

    def __init__(self, context: _cuda.Context) -> None:
        self._context = context
        self._idle: dict[int, list[_cuda.PinnedBuffer]] = {}
        self._lock = threading.RLock()  # a result may die, and come back, while its own thread is in here
        self._held = self._kept = 0
        self._closed = False

    def take(self, size: int) -> Result | None:
        """Memory for a result of ``size`` bytes; None where it is better copied. The context is current."""
        with self._lock:
            if size < _LEAST or self._held + size > _MOST_HELD:
                return None
            self._held += size
            idle = self._idle.get(size)
            if idle:
                self._kept -= size
                return Result(self, idle.pop())
        try:
            return Result(self, _cuda.PinnedBuffer(size))
        except _cuda.CudaError:  # no page-locked memory left
            with self._lock:
                self._held -= size
            return None

    def give_back(self, buffer: _cuda.PinnedBuffer) -> None:
        with self._lock:
            self._held -= buffer.size
            if not self._closed and self._kept + buffer.size <= _MOST_IDLE:
                self._idle.setdefault(buffer.size, []).append(buffer)
                self._kept += buffer.size
                return
        with self._context.current():
            buffer.free()

    def close(self) -> None:
        """Free what nobody holds; the rest goes when its holders do."""
        with self._lock:
            self._closed = True
            buffers = [buffer for idle in self._idle.values() for buffer in idle]
            self._idle.clear()
        with self._context.current():
            for buffer in buffers:
                buffer.free()


class Result:
    """Keeps one result's memory while an array of it is alive."""

    def __init__(self, pool: Pool, buffer: _cuda.PinnedBuffer) -> None:
        self._pool, self._buffer = pool, buffer
        self.pointer = buffer.pointer
        self.__array_interface__ = {
            "shape": (buffer.size,), "typestr": "|u1", "data": (buffer.pointer, False), "version": 3,
        }  # fmt: skip

    def array(self, dtype: Any, shape: Shape) -> Any:
        """The memory as an array that keeps it."""
        return np.asarray(self).view(dtype).reshape(shape)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the process ends: so does its memory, and perhaps the driver is gone
            self._pool.give_back(self._buffer)
