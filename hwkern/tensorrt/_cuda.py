"""The few calls of the CUDA driver that the runner needs, by ctypes: no torch, pycuda or cuda-python is required.

The driver's current context decides whose memory this is: torch's and CuPy's (the device's primary context), pycuda's
own, or, when the thread has none, the primary context. TensorRT follows the same rule.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_CAPTURE_THREAD_LOCAL = 1


class CudaError(RuntimeError):
    """The driver refused a call."""


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"NVIDIA's driver is not on this machine ({error}): engines run on a GPU.") from error
    code = library.cuInit(0)
    if code:
        raise CudaError(f"The CUDA driver does not start (error {code}): check nvidia-smi.")
    return library


def attempt(name: str, *arguments: Any) -> int:
    """One driver call; its error code, 0 for success."""
    code: int = getattr(_library(), name)(*arguments)
    return code


def call(name: str, *arguments: Any) -> None:
    """One driver call.

    Raises:
        CudaError: with the driver's own text.
    """
    code = attempt(name, *arguments)
    if code:
        text = ctypes.c_char_p()
        attempt("cuGetErrorString", code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


Handle = ctypes.c_void_p


class Context:
    """The context that a runner lives in."""

    def __init__(self, device: int = 0) -> None:
        handle = Handle()
        call("cuCtxGetCurrent", ctypes.byref(handle))
        if not handle.value:
            ordinal = ctypes.c_int()
            call("cuDeviceGet", ctypes.byref(ordinal), device)
            call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), ordinal)
        self.handle = handle

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make it the calling thread's for a while; cheap (0.2 µs) when it already is."""
        now = Handle()
        call("cuCtxGetCurrent", ctypes.byref(now))
        if now.value == self.handle.value:
            yield
            return
        call("cuCtxPushCurrent_v2", self.handle)
        try:
            yield
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(Handle()))

    def device_index(self) -> int:
        ordinal = ctypes.c_int()
        with self.current():
            call("cuCtxGetDevice", ctypes.byref(ordinal))
        return ordinal.value


class Stream:
    """A stream that does not wait for the legacy default stream."""

    def __init__(self) -> None:
        handle = Handle()
        call("cuStreamCreate", ctypes.byref(handle), 1)
        self.value = int(handle.value or 0)

    def free(self) -> None:
        call("cuStreamDestroy_v2", Handle(self.value))


def synchronize(stream: int) -> None:
    call("cuStreamSynchronize", Handle(stream))


class Event:
    def __init__(self, timing: bool = False) -> None:
        self.handle = Handle()
        call("cuEventCreate", ctypes.byref(self.handle), 0 if timing else 2)

    def record(self, stream: int) -> None:
        call("cuEventRecord", self.handle, Handle(stream))

    def synchronize(self) -> None:
        call("cuEventSynchronize", self.handle)

    def done(self) -> bool:
        code = attempt("cuEventQuery", self.handle)
        if code not in (0, _NOT_READY):
            call("cuEventQuery", self.handle)
        return code == 0

    def holds_up(self, stream: int) -> None:
        """Later work on ``stream`` waits for the event."""
        call("cuStreamWaitEvent", Handle(stream), self.handle, 0)

    def milliseconds_since(self, start: Event) -> float:
        elapsed = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(elapsed), start.handle, self.handle)
        return elapsed.value

    def free(self) -> None:
        call("cuEventDestroy_v2", self.handle)


class DeviceBuffer:
    """Device memory."""

    def __init__(self, size: int) -> None:
        pointer = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        self.pointer, self.size = pointer.value, size

    def free(self) -> None:
        call("cuMemFree_v2", ctypes.c_uint64(self.pointer))


class PinnedBuffer:
    """Page-locked host memory; ``view`` is a ctypes array over it."""

    def __init__(self, size: int) -> None:
        pointer = Handle()
        call("cuMemAllocHost_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        self.pointer, self.size = int(pointer.value or 0), size
        self.view = (ctypes.c_uint8 * size).from_address(self.pointer)

    def free(self) -> None:
        call("cuMemFreeHost", Handle(self.pointer))


def to_device(target: int, source: int, size: int, stream: int) -> None:
    if size:
        call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target), Handle(source), ctypes.c_size_t(size), Handle(stream))


def to_host(target: int, source: int, size: int, stream: int) -> None:
    if size:
        call("cuMemcpyDtoHAsync_v2", Handle(target), ctypes.c_uint64(source), ctypes.c_size_t(size), Handle(stream))


def copy(target: int, source: int, size: int, stream: int) -> None:
    call(
        "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), Handle(stream)
    )


def clear(target: int, size: int, stream: int) -> None:
    if size:
        call("cuMemsetD8Async", ctypes.c_uint64(target), ctypes.c_ubyte(0), ctypes.c_size_t(size), Handle(stream))


def memory_info() -> tuple[int, int]:
    """(free, total) bytes of the device."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


class Graph:
    """A captured and instantiated CUDA graph."""

    def __init__(self, handle: Any) -> None:
        self.executable = Handle()
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(self.executable), handle, ctypes.c_uint64(0))
        finally:
            call("cuGraphDestroy", handle)

    def launch(self, stream: int) -> None:
        call("cuGraphLaunch", self.executable, Handle(stream))

    def free(self) -> None:
        call("cuGraphExecDestroy", self.executable)


def begin_capture(stream: int) -> None:
    call("cuStreamBeginCapture_v2", Handle(stream), _CAPTURE_THREAD_LOCAL)


def end_capture(stream: int) -> Graph:
    """
    Raises:
        CudaError: something in between cannot be captured; the stream works again.
    """
    handle = Handle()
    call("cuStreamEndCapture", Handle(stream), ctypes.byref(handle))
    if not handle.value:
        raise CudaError("the capture gave no graph")
    return Graph(handle)
