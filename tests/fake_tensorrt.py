"""A CUDA driver and a TensorRT in host memory, for the runner's own logic: shapes, profiles, copies, graphs, threads.

"Device" addresses are host addresses and every call is done at once; a capture records what is enqueued meanwhile.
The engine computes y = 2·x + 1 for float32 x [batch, length] and s = Σ over the length.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np


class Driver:
    """What hwkern.tensorrt._cuda asks of libcuda; put in the place of its `attempt`."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.log: list[str] = []
        self.next_handle = 1000
        self.capturing: dict[int, list[Any]] = {}  # stream → what was enqueued meanwhile
        self.graphs: dict[int, list[Any]] = {}
        self.lock = threading.RLock()
        self.fail_capture = False
        self.launches = 0

    def __call__(self, name: str, *arguments: Any) -> int:
        with self.lock:
            self.log.append(name)
            values = [a.value if hasattr(a, "value") else a for a in arguments]
            return getattr(self, name.removesuffix("_v2"), self._nothing)(arguments, values) or 0

    def _nothing(self, arguments: Any, values: Any) -> int:
        return 0

    def _new(self, target: Any) -> int:
        self.next_handle += 1
        target._obj.value = self.next_handle
        return self.next_handle

    def cuGetErrorString(self, arguments: Any, values: Any) -> None:  # noqa: N802
        arguments[1]._obj.value = b"the fake driver's error"

    def cuCtxGetCurrent(self, arguments: Any, values: Any) -> None:  # noqa: N802
        arguments[0]._obj.value = 7

    def cuStreamCreate(self, arguments: Any, values: Any) -> None:  # noqa: N802
        self._new(arguments[0])

    cuEventCreate = cuStreamCreate  # noqa: N815

    def cuEventElapsedTime(self, arguments: Any, values: Any) -> None:  # noqa: N802
        arguments[0]._obj.value = 1.0

    def cuMemAlloc(self, arguments: Any, values: Any) -> None:  # noqa: N802
        block = (ctypes.c_uint8 * values[1])()
        address = ctypes.addressof(block)
        self.memory[address] = block
        arguments[0]._obj.value = address

    cuMemAllocHost = cuMemAlloc  # noqa: N815

    def cuMemFree(self, arguments: Any, values: Any) -> None:  # noqa: N802
        del self.memory[values[0]]  # KeyError: freed twice

    cuMemFreeHost = cuMemFree  # noqa: N815

    def _copy(self, arguments: Any, values: Any) -> None:
        target, source, size, stream = values
        self._do(stream, lambda: ctypes.memmove(target, source, size))

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = _copy  # noqa: N815

    def cuMemsetD8Async(self, arguments: Any, values: Any) -> None:  # noqa: N802
        target, value, size, stream = values
        self._do(stream, lambda: ctypes.memset(target, value, size))

    def cuMemGetInfo(self, arguments: Any, values: Any) -> None:  # noqa: N802
        arguments[0]._obj.value, arguments[1]._obj.value = 1 << 30, 1 << 31

    def _do(self, stream: int | None, work: Any) -> None:
        if (stream or 0) in self.capturing:
            self.capturing[stream or 0].append(work)
        else:
            work()

    def cuStreamBeginCapture(self, arguments: Any, values: Any) -> None:  # noqa: N802
        self.capturing[values[0]] = []

    def cuStreamEndCapture(self, arguments: Any, values: Any) -> int:  # noqa: N802
        work = self.capturing.pop(values[0])
        if self.fail_capture:
            return 901
        self.graphs[self._new(arguments[1])] = work
        return 0

    def cuGraphInstantiateWithFlags(self, arguments: Any, values: Any) -> None:  # noqa: N802
        self.graphs[self._new(arguments[0])] = self.graphs[values[1]]

    def cuGraphLaunch(self, arguments: Any, values: Any) -> None:  # noqa: N802
        self.launches += 1
        for work in self.graphs[values[0]]:
            work()


class DataType(enum.Enum):
    FLOAT = 0


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ICudaEngine:
    num_io_tensors = 3

    def __init__(self, driver: Driver, profiles: list[tuple[tuple[int, ...], ...]]) -> None:
        self.driver, self.profiles = driver, profiles
        self.num_optimization_profiles = len(profiles)
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y", "s")[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if name == "s" else (-1, -1)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return list(self.profiles[index])

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.profile, self.shape = engine, 0, (0, 0)
        self.addresses: dict[str, int] = {}
        self.enqueued = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile]
        self.shape = shape
        return all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape[:1] if name == "s" else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.enqueued += 1
        shape, addresses = self.shape, dict(self.addresses)

        def work() -> None:
            def view(name: str, dims: tuple[int, ...]) -> Any:
                count = int(np.prod(dims))
                block = (ctypes.c_float * count).from_address(addresses[name])
                return np.frombuffer(block, np.float32).reshape(dims)

            x = view("x", shape)
            view("y", shape)[...] = 2 * x + 1
            view("s", shape[:1])[...] = x.sum(1)

        self.engine.driver._do(stream, work)
        return True


def module() -> Any:
    """As much of a TensorRT module as a Runner of an ICudaEngine needs."""
    return SimpleNamespace(
        __name__="tensorrt",
        __version__="10.9.0",
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ICudaEngine=ICudaEngine,
        ILogger=_Logger,
        Builder=object,
        get_plugin_registry=lambda: None,
    )


class _Logger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        VERBOSE = 4


class GpuArray:
    """A float32 array at a "device" address, for __cuda_array_interface__."""

    def __init__(self, values: Any, strides: tuple[int, ...] | None = None) -> None:
        self.values = np.ascontiguousarray(values, np.float32)
        self.__cuda_array_interface__ = {
            "shape": self.values.shape, "typestr": "<f4", "data": (self.values.ctypes.data, False),
            "strides": strides, "version": 3,
        }  # fmt: skip


def values_of(array: Any) -> Any:
    """The values behind a __cuda_array_interface__."""
    interface = array.__cuda_array_interface__
    count = int(np.prod(interface["shape"]))
    block = (ctypes.c_float * count).from_address(interface["data"][0])
    return np.frombuffer(block, np.float32).reshape(interface["shape"]).copy()
