"""``Runner``: runs an engine on whatever arrays the caller has.

How a call runs:

- Inputs on the GPU are read where they are and outputs are written straight into new arrays of the same library
  (nothing is copied), or into ``outputs=``.
- numpy inputs go through page-locked buffers in blocks, so that the copy into the buffer and the transfer overlap;
  :meth:`Runner.map` also overlaps the transfers of one request with the computation of another. Large numpy results are
  the page-locked memory that the GPU wrote (see _results.py).
- From the second call with the same shapes on, the launches are replayed as one CUDA graph (``graphs`` shapes are
  kept, the least recently used goes first). A graph has fixed addresses, so GPU inputs and outputs of up to 8 MB are
  copied on the device (a few µs); larger ones run without a graph, where launches do not count.
- Each thread has its own execution contexts, one per profile it uses; the engine's weights exist once.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from hwkern.tensorrt import _api, _cuda
from hwkern.tensorrt._arrays import ITEM_BYTES, Array, describe, new_device_array, numpy_dtype
from hwkern.tensorrt._results import Pool, Result
from hwkern.tensorrt.builder import Engine
from hwkern.tensorrt.plugin import gpu_problem, load_plugin
from hwkern.tensorrt.profiles import Profile, Shape

if TYPE_CHECKING:
    from typing_extensions import Self

Outputs = dict[str, Any]

_COPY_LIMIT = 8 << 20  # bytes that a call on GPU arrays may copy for the sake of a graph: 6 µs at 3 TB/s
_BLOCK = 4 << 20  # bytes of a host array that are staged at once


@dataclass(frozen=True)
class Tensor:
    """One input or output of the engine."""

    name: str
    dtype: str
    shape: Shape  # -1: dynamic
    is_input: bool
    on_host: bool  # a shape tensor: TensorRT reads its values on the host


class Closing:
    """What ``with`` closes at its end."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Runner(Closing):
    """Runs an engine: ``with Runner(engine) as run: outputs = run({"x": x})``.

    Args:
        engine: an :class:`Engine`, bytes, the path of an engine file, or a TensorRT ``ICudaEngine``.
        graphs: how many CUDA graphs each thread keeps (per profile and shapes); 0: none.
        trt: which TensorRT module; default: see ``load_plugin``.

    Calls may come from several threads at once. Everything runs on the GPU that is current when the Runner is made.

    Attributes:
        inputs, outputs: :class:`Tensor` by name. profiles: the engine's, as :class:`Profile`.
        metadata: what ``build`` noted.

    Raises:
        FileNotFoundError, ValueError: no engine there; it is truncated, or of another TensorRT or GPU.
        RuntimeError: no GPU, or hwkern's plugin cannot be loaded or run.
    """

    def __init__(
        self,
        engine: Engine | bytes | str | os.PathLike[str] | Any,
        *,
        graphs: int = 16,
        trt: ModuleType | str | None = None,
    ) -> None:
        if isinstance(engine, (str, os.PathLike)):
            engine = Engine.load(engine)
        elif isinstance(engine, (bytes, bytearray, memoryview)):
            engine = Engine(bytes(engine), {})
        self.api = _api.find(trt)
        self.metadata: dict[str, Any] = engine.metadata if isinstance(engine, Engine) else {}
        self.context = _cuda.Context()
        with self.context.current():
            self._runtime, self.engine = self._deserialize(engine)
        self._read_engine()
        self.graphs = graphs
        self._results = Pool(self.context)
        self._lanes = threading.local()
        self._all_lanes: list[_Lane] = []
        self._lock = threading.Lock()
        self._closed = False

    def _deserialize(self, engine: Any) -> tuple[Any, Any]:
        if not isinstance(engine, Engine):
            if not isinstance(engine, self.api.module.ICudaEngine):
                raise TypeError(
                    f"Runner takes an Engine, bytes, a path or an ICudaEngine, not {type(engine).__name__}."
                )
            return None, engine
        if self.metadata.get("plugin"):
            if (problem := gpu_problem(self.context.device_index())) is not None:
                raise RuntimeError(f"This engine has hwkern's plugin in it, which cannot run here: {problem}")
            if not self.metadata.get("plugin_embedded"):
                load_plugin(self.api.module)
        elif not self.metadata:
            _try_to_load_plugin(self.api)
        if not engine.data:
            raise ValueError("The engine is empty: build it again.")
        self.api.log.take()
        runtime = self.api.module.Runtime(self.api.log)
        if self.metadata.get("plugin_embedded"):
            runtime.engine_host_code_allowed = True
        made = runtime.deserialize_cuda_engine(engine.data)
        if made is None:
            built = self.metadata.get("tensorrt")
            gpu = (self.metadata.get("gpu") or {}).get("name")
            origin = f" It was built by {built} on {gpu or 'an unknown GPU'}; this is {self.api}." if built else ""
            raise ValueError(
                f"{self.api} does not take this engine: {self.api.log.take()}. It may be truncated, or of another "
                f"TensorRT version or GPU: build it here.{origin}"
            )
        return runtime, made

    def _read_engine(self) -> None:
        trt, engine = self.api.module, self.engine
        tensors = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            tensors.append(
                Tensor(
                    name,
                    _dtype_name(engine.get_tensor_dtype(name)),
                    tuple(engine.get_tensor_shape(name)),
                    engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                    engine.get_tensor_location(name) == trt.TensorLocation.HOST,
                )
            )
        self.inputs = {t.name: t for t in tensors if t.is_input}
        self.outputs = {t.name: t for t in tensors if not t.is_input}
        dynamic = [t.name for t in self.inputs.values() if -1 in t.shape and not t.on_host]
        self.profiles: list[Profile] = []
        for index in range(max(1, engine.num_optimization_profiles)):
            ranges = {name: [tuple(s) for s in engine.get_tensor_profile_shape(name, index)] for name in dynamic}
            low, best, high = ({name: r[i] for name, r in ranges.items()} for i in range(3))
            self.profiles.append(Profile(low, best, high))

    # ---- calling ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        inputs: Mapping[str, Any] | Sequence[Any] | Any,
        outputs: Mapping[str, Any] | None = None,
        stream: Any = None,
    ) -> Outputs:
        """Run once.

        Args:
            inputs: by name; or a sequence in the engine's order; or the one input itself. On the host or on the GPU,
                mixed as you like.
            outputs: arrays on the GPU to write into, by name; the rest is made new.
            stream: the CUDA stream whose earlier work the inputs wait for and whose later work the outputs are ready
                for: an int, or an object of torch, CuPy or pycuda. Default: torch's or CuPy's current stream for their
                arrays, else the default stream.

        Returns:
            Outputs by name: in the library of the first GPU input (enqueued, as with any GPU operation), or numpy
            arrays (finished) when all inputs are on the host.

        Raises:
            KeyError, TypeError, ValueError: names, dtypes or shapes do not fit; for a shape outside all profiles the
                message shows the nearest one.
        """
        lane = self._lane()
        with self.context.current():
            return lane.run(self._named(inputs), outputs, stream)

    def map(self, requests: Iterable[Mapping[str, Any] | Sequence[Any]], depth: int = 2) -> Iterator[Outputs]:
        """Run many host requests; results come in order, as numpy arrays.

        While the GPU works on one request the next one's inputs and the last one's outputs are on their way, so the
        transfers cost no time as long as they are shorter than the computation. ``depth``: requests in flight.
        """
        if depth < 1:
            raise ValueError(f"depth = {depth}: at least 1.")
        lane = self._lane()
        waiting: deque[_Flight] = deque()
        try:
            for number, request in enumerate(requests):
                if len(waiting) == depth:  # its buffers are free for this request afterwards
                    yield self._result(waiting.popleft())
                with self.context.current():
                    waiting.append(lane.start(self._named(request), slot=1 + number % depth))
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            while waiting:  # the caller stopped early, or a request failed
                self._result(waiting.popleft())

    def _result(self, flight: _Flight) -> Outputs:
        with self.context.current():
            return flight.result()

    def _named(self, inputs: Any) -> Mapping[str, Any]:
        if isinstance(inputs, Mapping):
            missing = [name for name in self.inputs if name not in inputs]
            unknown = [name for name in inputs if name not in self.inputs]
            if missing or unknown:
                what = f"lacks {', '.join(missing)}" if missing else f"has no input {', '.join(unknown)}"
                raise KeyError(f"The request {what}: the engine's inputs are {', '.join(self.inputs)}.")
            return inputs
        values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if len(values) != len(self.inputs):
            raise ValueError(f"{len(values)} inputs, but the engine has {len(self.inputs)}: {', '.join(self.inputs)}.")
        return dict(zip(self.inputs, values, strict=True))

    def choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Index of the profile that covers the shapes and is tuned nearest to them.

        Raises:
            ValueError: none covers them; the message shows the nearest.
        """
        for name, shape in shapes.items():
            known = self.inputs[name].shape
            if len(shape) != len(known) or any(k not in (-1, d) for k, d in zip(known, shape, strict=True)):
                raise ValueError(f"{name} has the shape {tuple(shape)}, but the engine takes {known}.")
        fitting = [i for i, profile in enumerate(self.profiles) if profile.covers(shapes)]
        if fitting:
            return min(fitting, key=lambda i: self.profiles[i].distance(shapes))
        nearest = min(range(len(self.profiles)), key=lambda i: self.profiles[i].gap(shapes))
        dynamic = {name: shape for name, shape in shapes.items() if name in self.profiles[nearest].min}
        given = ", ".join(f"{name}: {'x'.join(map(str, shape))}" for name, shape in dynamic.items())
        raise ValueError(
            f"No profile of this engine covers {given}. The nearest is number {nearest} (min … opt … max): "
            f"{self.profiles[nearest]}. Pad or split the request, or build with profiles_from() over your requests."
        )

    # ---- life ------------------------------------------------------------------------------------------------------

    def _lane(self) -> _Lane:
        if self._closed:
            raise RuntimeError("This Runner is closed.")
        lane: _Lane | None = getattr(self._lanes, "lane", None)
        if lane is None:
            with self.context.current():
                lane = _Lane(self)
            self._lanes.lane = lane
            with self._lock:
                self._all_lanes.append(lane)
        return lane

    def close(self) -> None:
        """Wait for all work and free everything but the arrays that were handed out. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with self.context.current():
            for lane in self._all_lanes:
                lane.free()
        self._all_lanes.clear()
        self._results.close()
        self.engine = self._runtime = None


def _try_to_load_plugin(api: _api.TensorRT) -> None:
    """An engine of unknown origin may need it; if it does and this fails, deserializing says so."""
    try:
        load_plugin(api.module)
    except (OSError, RuntimeError):
        return


def _dtype_name(dtype: Any) -> str:
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    return names.get(dtype.name, dtype.name.lower())


class _Block:
    """Device memory that is handed out with a result."""

    def __init__(self, context: _cuda.Context, size: int) -> None:
        self._context, self._buffer = context, _cuda.DeviceBuffer(size)
        self.pointer = self._buffer.pointer

    def release(self) -> None:
        with self._context.current():
            self._buffer.free()


@dataclass
class _Buffers:
    """Fixed memory for one profile and one set of shapes: the addresses of a graph, and staging for host arrays."""

    device: dict[str, _cuda.DeviceBuffer] = field(default_factory=dict)
    host: dict[str, _cuda.PinnedBuffer] = field(default_factory=dict)
    graph: _cuda.Graph | None = None
    calls: int = 0
    graph_failed: bool = False
    in_flight: bool = False  # a result is still to be read
    staged: _cuda.Event | None = None  # the inputs have left the page-locked buffers
    done: _cuda.Event | None = None  # the outputs of a host request are there

    def free(self) -> None:
        for device in self.device.values():
            device.free()
        for host in self.host.values():
            host.free()
        if self.graph is not None:
            self.graph.free()
        for event in (self.staged, self.done):
            if event is not None:
                event.free()


@dataclass
class _Plan:
    """What a set of input shapes means: the profile, and every output's shape."""

    profile: int
    outputs: dict[str, Shape]


class _Flight:
    """A host request on its way."""

    def __init__(
        self, lane: _Lane, buffers: _Buffers, plan: _Plan, handed: dict[str, Result], done: _cuda.Event
    ) -> None:
        self.lane, self.buffers, self.plan, self.handed, self.done = lane, buffers, plan, handed, done
        buffers.in_flight = True

    def result(self) -> Outputs:
        self.done.synchronize()
        found: Outputs = {}
        for name, shape in self.plan.outputs.items():
            dtype = numpy_dtype(self.lane.runner.outputs[name].dtype)
            if name in self.handed:
                found[name] = self.handed[name].array(dtype, shape)
                continue
            count = math.prod(shape)
            flat = np.frombuffer(memoryview(self.buffers.host[name].view), dtype, count)
            found[name] = flat.reshape(shape).copy()
        self.buffers.in_flight = False
        return found


class _Lane:
    """What one thread has of a Runner: contexts, streams, buffers, graphs."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.stream, self.copy_in, self.copy_out = _cuda.Stream(), _cuda.Stream(), _cuda.Stream()
        self.contexts: dict[int, Any] = {}
        self.shapes: dict[int, dict[str, Shape]] = {}  # what each context has been told last
        self.plans: OrderedDict[Any, _Plan] = OrderedDict()
        self.buffers: OrderedDict[Any, _Buffers] = OrderedDict()
        self.alive: deque[tuple[_cuda.Event, Any]] = deque()  # what the GPU may still be reading

    # ---- shapes ----------------------------------------------------------------------------------------------------

    def _execution_context(self, profile: int) -> Any:
        if profile not in self.contexts:
            with self.runner._lock:
                context = self.runner.engine.create_execution_context()
            if context is None:
                raise RuntimeError(f"TensorRT gives no execution context: {self.runner.api.log.take()}")
            if self.runner.engine.num_optimization_profiles > 1:
                if not context.set_optimization_profile_async(profile, self.stream.value):
                    raise RuntimeError(f"profile {profile} cannot be used: {self.runner.api.log.take()}")
                _cuda.synchronize(self.stream.value)
            self.contexts[profile] = context
        return self.contexts[profile]

    def _tell_shapes(self, profile: int, shapes: Mapping[str, Shape]) -> Any:
        context, told = self._execution_context(profile), self.shapes.setdefault(profile, {})
        for name, shape in shapes.items():
            if told.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    told.clear()
                    raise ValueError(f"{name}: TensorRT refuses {shape}: {self.runner.api.log.take()}")
                told[name] = shape
        return context

    def _plan(self, arrays: Mapping[str, Array]) -> _Plan:
        shapes = {name: a.shape for name, a in arrays.items() if not self.runner.inputs[name].on_host}
        values = {name: _host_values(a) for name, a in arrays.items() if self.runner.inputs[name].on_host}
        key = (tuple(shapes.values()), tuple(values.values()))
        plan = self.plans.get(key)
        if plan is None:
            profile = self.runner.choose_profile(shapes)
            context = self._tell_shapes(profile, shapes)
            for name in values:
                context.set_tensor_address(name, arrays[name].pointer)
            outputs = {name: tuple(context.get_tensor_shape(name)) for name in self.runner.outputs}
            for name, shape in outputs.items():
                if any(d < 0 for d in shape):
                    raise NotImplementedError(f"The shape of {name} depends on values ({shape}): not supported.")
            plan = self.plans[key] = _Plan(profile, outputs)
            if len(self.plans) > 1024:
                self.plans.popitem(last=False)
        return plan

    def _buffers(self, key: Any) -> _Buffers:
        found = self.buffers.get(key)
        if found is None:
            found = self.buffers[key] = _Buffers()
            idle = [k for k, b in self.buffers.items() if b is not found and not b.in_flight]
            if len(self.buffers) > max(4, self.runner.graphs) and idle:
                for stream in (self.copy_in, self.stream, self.copy_out):
                    _cuda.synchronize(stream.value)
                self.buffers.pop(idle[0]).free()
        else:
            self.buffers.move_to_end(key)
        return found

    def _device(self, buffers: _Buffers, name: str, size: int) -> int:
        if name not in buffers.device:
            buffers.device[name] = _cuda.DeviceBuffer(size)
        return buffers.device[name].pointer

    # ---- one call --------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None, stream: Any) -> Outputs:
        arrays = {name: describe(name, inputs[name], t.dtype) for name, t in self.runner.inputs.items()}
        leader = next((a for a in arrays.values() if a.on_device), None)
        given = self._given(outputs)
        if leader is None and not given:
            found = self.start(arrays, slot=0).result()
            return _as_torch(found) if any(a.kind == "torch" for a in arrays.values()) else found
        leader = leader or next(iter(given.values()))
        return self._run_on_device(arrays, given, leader, _caller_stream(stream, leader))

    def _given(self, outputs: Mapping[str, Any] | None) -> dict[str, Array]:
        given = {}
        for name, value in (outputs or {}).items():
            if name not in self.runner.outputs:
                raise KeyError(f"The engine has no output {name}: its outputs are {', '.join(self.runner.outputs)}.")
            given[name] = describe(name, value, self.runner.outputs[name].dtype)
            if not given[name].on_device:
                raise TypeError(f"outputs[{name!r}] is on the host: pass an array on the GPU, or none.")
            if given[name].owner is not value and given[name].kind == "torch" and not value.is_contiguous():
                raise ValueError(f"outputs[{name!r}] has gaps between its elements: pass a contiguous tensor.")
        return given

    def _run_on_device(self, arrays: dict[str, Array], given: dict[str, Array], leader: Array, caller: int) -> Outputs:
        runner = self.runner
        plan = self._plan(arrays)
        for name, array in given.items():
            if array.shape != plan.outputs[name]:
                raise ValueError(f"outputs[{name!r}] has the shape {array.shape}: it must be {plan.outputs[name]}.")
        results = dict(given)
        for name, shape in plan.outputs.items():
            if name not in results:
                dtype = runner.outputs[name].dtype
                results[name] = new_device_array(
                    leader.kind, leader.owner, shape, dtype, lambda size: _Block(runner.context, size)
                )
        stream = self.stream.value
        _order(caller, stream)  # our stream starts where the caller's is now
        bytes_moved = sum(a.nbytes for a in (*arrays.values(), *results.values()))
        if runner.graphs and bytes_moved <= _COPY_LIMIT:
            self._replay(arrays, results, plan, stream)
        else:
            held = {name: self._address(a, stream) for name, a in arrays.items()}
            addresses = {name: address for name, (address, _) in held.items()}
            self._enqueue(plan, arrays, {**addresses, **{n: a.pointer for n, a in results.items()}}, stream)
            self._keep([keep for _, keep in held.values()], stream)
        _order(stream, caller)
        self._keep((arrays, results), stream)
        return {name: results[name].owner for name in runner.outputs}

    def _address(self, array: Array, stream: int) -> tuple[int, Any]:
        """Where the engine reads an input: in place, or (from the host) in a new device buffer."""
        if array.on_device or array.nbytes == 0:
            return array.pointer, array
        block = _Block(self.runner.context, array.nbytes)
        _cuda.to_device(block.pointer, array.pointer, array.nbytes, stream)
        return block.pointer, _Release(block)

    def _replay(self, arrays: dict[str, Array], results: dict[str, Array], plan: _Plan, stream: int) -> None:
        buffers = self._buffers(("device", plan.profile, _key(arrays)))
        for name, a in arrays.items():
            if self.runner.inputs[name].on_host:
                continue
            address = self._device(buffers, name, a.nbytes)
            (_cuda.copy if a.on_device else _cuda.to_device)(address, a.pointer, a.nbytes, stream)
        for name, a in results.items():
            self._device(buffers, name, a.nbytes)
        self._launch(buffers, plan, arrays, stream)
        for name, a in results.items():
            _cuda.copy(a.pointer, buffers.device[name].pointer, a.nbytes, stream)

    def _launch(self, buffers: _Buffers, plan: _Plan, arrays: Mapping[str, Array], stream: int) -> None:
        """The engine on the buffers' own addresses: enqueued the first time, captured the second, then replayed."""
        buffers.calls += 1
        has_shape_inputs = any(t.on_host for t in self.runner.inputs.values())
        addresses = {name: buffer.pointer for name, buffer in buffers.device.items()}
        if buffers.graph is None and (
            buffers.calls == 1 or buffers.graph_failed or not self.runner.graphs or has_shape_inputs
        ):
            self._enqueue(plan, arrays, addresses, stream)
            return
        if buffers.graph is None:
            try:
                _cuda.begin_capture(stream)
                try:
                    self._enqueue(plan, arrays, addresses, stream)
                finally:
                    buffers.graph = _cuda.end_capture(stream)
            except (_cuda.CudaError, RuntimeError):
                # Some engines cannot be captured (loops, data-dependent shapes): they run launch by launch.
                buffers.graph, buffers.graph_failed = None, True
                self._enqueue(plan, arrays, addresses, stream)
                return
        buffers.graph.launch(stream)

    def _enqueue(self, plan: _Plan, arrays: Mapping[str, Array], addresses: Mapping[str, int], stream: int) -> None:
        shapes = {name: a.shape for name, a in arrays.items() if not self.runner.inputs[name].on_host}
        context = self._tell_shapes(plan.profile, shapes)
        for name, a in arrays.items():
            if self.runner.inputs[name].on_host:
                context.set_tensor_address(name, a.pointer)
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not run the engine: {self.runner.api.log.take()}")

    def _keep(self, what: Any, stream: int) -> None:
        """Hold ``what`` until the GPU is past this point of the stream."""
        while self.alive and self.alive[0][0].done():
            self.alive.popleft()[0].free()
        event = _cuda.Event()
        event.record(stream)
        self.alive.append((event, what))

    # ---- host requests ---------------------------------------------------------------------------------------------

    def start(self, inputs: Mapping[str, Any], slot: int) -> _Flight:
        """Stage, transfer, compute, transfer back; without waiting. ``slot``: requests of different slots overlap."""
        runner = self.runner
        arrays = (
            {name: describe(name, inputs[name], t.dtype) for name, t in runner.inputs.items()}
            if not all(isinstance(a, Array) for a in inputs.values())
            else dict(inputs)
        )
        if any(a.on_device for a in arrays.values()):
            raise TypeError("map takes arrays on the host; call the Runner itself with arrays on the GPU.")
        plan = self._plan(arrays)
        buffers = self._buffers(("host", slot, plan.profile, _key(arrays)))
        if buffers.staged is not None:
            buffers.staged.synchronize()
        # One request after the other needs one stream; requests in flight get their transfers on two more.
        copy_in = self.copy_in.value if slot else self.stream.value
        copy_out = self.copy_out.value if slot else self.stream.value
        for name, a in arrays.items():
            if not runner.inputs[name].on_host:
                self._stage(buffers, name, a, copy_in)
        if slot:  # else the result is waited for before the next request comes
            if buffers.staged is None:
                buffers.staged = _cuda.Event()
            buffers.staged.record(copy_in)
            buffers.staged.holds_up(self.stream.value)
        handed: dict[str, Result] = {}
        for name, shape in plan.outputs.items():
            size = math.prod(shape) * ITEM_BYTES[runner.outputs[name].dtype]
            self._device(buffers, name, size)
            if (result := runner._results.take(size)) is not None:
                handed[name] = result
            elif name not in buffers.host:
                buffers.host[name] = _cuda.PinnedBuffer(size)
        stream = self.stream.value
        self._launch(buffers, plan, arrays, stream)
        if slot:
            _order(stream, copy_out)
        for name in plan.outputs:
            device = buffers.device[name]
            host = handed[name].pointer if name in handed else buffers.host[name].pointer
            _cuda.to_host(host, device.pointer, device.size, copy_out)
        if buffers.done is None:
            buffers.done = _cuda.Event()
        buffers.done.record(copy_out)
        return _Flight(self, buffers, plan, handed, buffers.done)

    def _stage(self, buffers: _Buffers, name: str, array: Array, stream: int) -> None:
        size = array.nbytes
        if name not in buffers.host:
            buffers.host[name] = _cuda.PinnedBuffer(size)
        host, device = buffers.host[name], self._device(buffers, name, size)
        for start in range(0, size, _BLOCK):
            count = min(_BLOCK, size - start)
            ctypes.memmove(host.pointer + start, array.pointer + start, count)
            _cuda.to_device(device + start, host.pointer + start, count, stream)

    def free(self) -> None:
        for stream in (self.copy_in, self.stream, self.copy_out):
            _cuda.synchronize(stream.value)
        for event, _ in self.alive:
            event.free()
        self.alive.clear()
        for buffers in self.buffers.values():
            buffers.free()
        self.buffers.clear()
        self.plans.clear()
        self.contexts.clear()
        for stream in (self.copy_in, self.stream, self.copy_out):
            stream.free()


class _Release:
    """Frees a block when nobody holds it any more."""

    def __init__(self, block: _Block) -> None:
        self._block = block

    def __del__(self) -> None:
        self._block.release()


def _key(arrays: Mapping[str, Array]) -> tuple[Any, ...]:
    return tuple(a.shape for a in arrays.values())


def _host_values(array: Array) -> tuple[Any, ...]:
    """The values of a shape tensor, which decide about output shapes."""
    if array.on_device:
        raise TypeError("A shape tensor is read on the host: pass it as a numpy array.")
    values = np.frombuffer(ctypes.string_at(array.pointer, array.nbytes), numpy_dtype(array.dtype))
    return tuple(values.tolist())


def _order(first: int, then: int) -> None:
    """Later work on ``then`` waits for what is on ``first`` now."""
    event = _cuda.Event()
    event.record(first)
    event.holds_up(then)
    event.free()  # the driver frees it once it has happened


def _caller_stream(stream: Any, leader: Array) -> int:
    if stream is not None:
        if isinstance(stream, int):
            return stream
        for name in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, pycuda
            if hasattr(stream, name):
                return int(getattr(stream, name))
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        raise TypeError(f"stream is a {type(stream).__name__}: pass an int or a stream of torch, CuPy or pycuda.")
    if leader.kind == "torch":
        import torch

        return int(torch.cuda.current_stream(leader.owner.device).cuda_stream)
    if leader.kind == "cupy":
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)
    return 0


def _as_torch(outputs: Outputs) -> Outputs:
    """numpy results as CPU tensors, for callers that passed CPU tensors."""
    import torch

    made = {}
    for name, value in outputs.items():
        is_bfloat16 = value.dtype.name == "bfloat16"
        tensor = torch.from_numpy(value.view(np.uint16) if is_bfloat16 else value)
        made[name] = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
    return made
