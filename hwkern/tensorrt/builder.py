"""``build``: from ONNX to a TensorRT engine that knows what it was built from."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from onnx import ModelProto, TensorProto

import hwkern
from hwkern import _native
from hwkern.tensorrt import _api, einsums, graph, opdef
from hwkern.tensorrt._api import TensorRT
from hwkern.tensorrt.plugin import half_only, is_loaded, last_error, load_plugin, plugin_path
from hwkern.tensorrt.profiles import Profile

PRECISIONS = ("fp16", "bf16", "fp32")

# The two-line case: what a dynamic dimension may be when nobody says. The first dimension of an input is a batch.
DEFAULT_BATCH = (1, 8, 32)
DEFAULT_LENGTH = (1, 128, 512)

Progress = Callable[[str, int, int], None]


@dataclass
class Engine:
    """A serialized engine and what is known about it."""

    data: bytes = field(repr=False)
    metadata: dict[str, Any]
    path: Path | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the engine, and its metadata beside it as ``<path>.json``."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_bytes(self.data)
        part.replace(target)
        sidecar(target).write_text(json.dumps(self.metadata, indent=1) + "\n", encoding="utf-8")
        self.path = target
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Engine:
        """Read an engine file; without a ``.json`` beside it the metadata is empty."""
        source = Path(path)
        beside = sidecar(source)
        known = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return cls(source.read_bytes(), known, source)


def sidecar(path: Path) -> Path:
    """Where an engine's metadata lies."""
    return path.with_name(path.name + ".json")


def build_engine(onnx_path: str | os.PathLike[str]) -> Engine:
    """The two-line case: FP16, dynamic shapes from the model's dynamic axes; see :func:`build`."""
    return build(onnx_path)


def build(
    onnx: str | os.PathLike[str] | bytes | ModelProto,
    profiles: Sequence[Profile] | Profile | None = None,
    precision: str = "fp16",
    *,
    path: str | os.PathLike[str] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    progress: Progress | None = None,
    embed_plugin: bool = False,
    compute_capabilities: Sequence[str] = (),
    edit: Callable[[Any], object] | None = None,
    configure: Callable[[Any], object] | None = None,
    verbose: bool = False,
    einsum: bool = True,
    trt: ModuleType | str | None = None,
) -> Engine:
    """Build an engine from an ONNX model, with hwkern nodes or without.

    On TensorRT 8.6 the precision is a flag; on TensorRT ≥ 10 and TensorRT-RTX networks are strongly typed, so a float32
    model is converted to float16 or bfloat16 in memory first (inputs and outputs keep their types, scales float32).

    Args:
        onnx: path, bytes or ModelProto.
        profiles: what ``profiles_from`` gives, or one Profile, or several. Without: for each dynamic axis, batch (the
            first dimension) 1 … 8 … 32 and others 1 … 128 … 512, the middle one tuned for.
        precision: ``"fp16"``, ``"bf16"`` or ``"fp32"``, of everything but the int8 linears.
        path: where to write the engine (and ``<path>.json``).
        timing_cache: a file with TensorRT's timings; read when it is there, written afterwards. Not for TensorRT-RTX.
        workspace: most bytes of scratch memory that a layer may use; TensorRT's default: all there is.
        optimization_level: 0 (quick build) … 5 (fast engine); TensorRT's default is 3.
        progress: called as ``progress(phase, step, steps)`` while building (TensorRT ≥ 9); an exception in it stops the
            build and comes out here.
        embed_plugin: put the plugin library into the engine, so that it runs where hwkern is not installed (loading it
            takes ``runtime.engine_host_code_allowed = True``, which the Runner sets).
        compute_capabilities: TensorRT-RTX: e.g. ``("SM89", "SM120")``; default: the GPU that is here.
        edit: called with the parsed INetworkDefinition before anything is built, for changes of your own
            (``edit=ht.swap``); what it returns is kept until the engine is there.
        configure: called with the IBuilderConfig last of all, for settings that have no name here.
        verbose: print TensorRT's messages to stderr.
        einsum: TensorRT 8.6: have what lies between hwkern nodes compiled (see einsums.py). False: leave it as it is.
        trt: which TensorRT module; default: see ``load_plugin``.

    Raises:
        ImportError: no TensorRT. FileNotFoundError: no model or no plugin library.
        ValueError: an unknown precision, profiles that do not fit the model.
        RuntimeError: TensorRT cannot parse the model or build the engine; the message holds its reasons.
    """
    api = _api.find(trt)
    if api.lean:
        raise RuntimeError(f"{api} runs engines and cannot build them: {_api.INSTALL}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision = {precision!r}: it must be one of {', '.join(PRECISIONS)}.")
    if embed_plugin and not api.has_v3:
        raise ValueError(f"embed_plugin needs TensorRT 10 or newer, not {api}.")
    started = time.perf_counter()

    def serialized() -> Any:
        builder, network, _keep = _parsed(api, model, source)
        _held = edit(network) if edit is not None else None  # ht.swap's report owns weights that TensorRT points to
        config = _config(api, builder, precision, workspace, optimization_level, compute_capabilities)
        if not api.strongly_typed and any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            config.set_flag(api.module.BuilderFlag.INT8)  # or TensorRT 8.6 refuses the model's Q/DQ nodes
        chosen[:] = _add_profiles(builder, config, network, profiles)
        if embed_plugin and library is not None:
            config.plugins_to_serialize = [str(library)]
        monitor = _monitor(api, config, progress)
        cache = _timing_cache(api, config, timing_cache)
        if configure is not None:
            configure(config)
        plan = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.error is not None:
            raise monitor.error
        if plan is None:
            raise RuntimeError(f"{api} could not build the engine: {_reasons(api)}")
        if cache is not None:
            _write(Path(os.fspath(timing_cache or "")), bytes(config.get_timing_cache().serialize()))
        return plan

    chosen: list[Profile] = []
    with _verbosity(api, verbose):
        model, source = _prepared(onnx, api, precision)
        library = load_plugin(api.module) if opdef.hwkern_nodes(model) else None
        is_8 = api.version < (10,) and not api.rtx
        made = einsums.put(model) if einsum and is_8 else 0
        half = is_8 and precision == "fp16"
        try:
            with half_only() if half else contextlib.nullcontext():
                plan = serialized()
        except RuntimeError:
            if not made and not half:
                raise
            einsums.take_back(model)  # perhaps one of the products broadcasts, or something must be float32
            plan = serialized()
    engine = Engine(bytes(plan), {})
    engine.metadata = {
        "hwkern": hwkern.__version__,
        "tensorrt": f"{api.name} {api.module.__version__}",
        "precision": precision,
        "gpu": _gpu(),
        "platform": platform.machine(),
        "profiles": [profile.to_dict() for profile in chosen],
        "plugin": None if library is None else library.name,
        "plugin_embedded": bool(embed_plugin and library is not None),
        "model": "bytes" if source is None else source.name,
        "rewrite": opdef.metadata(model),
        "engine_bytes": len(engine.data),
        "build_seconds": round(time.perf_counter() - started, 1),
    }
    if path is not None:
        engine.save(path)
    return engine


@contextlib.contextmanager
def _verbosity(api: TensorRT, verbose: bool) -> Iterator[None]:
    before, api.log.verbose = api.log.verbose, verbose
    api.log.take()
    try:
        yield
    finally:
        api.log.verbose = before


# ---- the model -----------------------------------------------------------------------------------------------------


def _prepared(onnx: Any, api: TensorRT, precision: str) -> tuple[ModelProto, Path | None]:
    """The model as this TensorRT wants it, and the path that its outside data is beside."""
    if not isinstance(onnx, (bytes, ModelProto)):
        onnx = os.fspath(onnx)
    model, _ = graph.load(onnx)
    source = Path(onnx) if isinstance(onnx, str) else None
    if api.strongly_typed and precision != "fp32":
        from hwkern.tensorrt.precision import convert

        convert(model, TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16)
    if not api.takes_int8_constants:
        opdef.view_weights_as_int32(model)
    opdef.strip_functions(model)
    return model, source


def _parsed(api: TensorRT, model: ModelProto, source: Path | None) -> tuple[Any, Any, Any]:
    trt = api.module
    if opdef.hwkern_nodes(model) and (problem := _api.rtx_problem(api)) is not None:
        raise RuntimeError(problem)
    builder = _new_builder(api)
    network = builder.create_network(_network_flags(api))
    parser = trt.OnnxParser(network, api.log)
    data = model.SerializeToString()
    ok = parser.parse(data, str(source)) if source is not None else parser.parse(data)
    if not ok:
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"{api} cannot parse the model: {errors or _reasons(api)}{_plugin_remedy(api, model)}")
    if network.num_outputs == 0:
        raise RuntimeError("The model has no outputs.")
    return builder, network, parser  # the network points into the parser's weights


_kept = threading.local()


@contextlib.contextmanager
def keep_builder() -> Iterator[None]:
    """Builds of this thread inside it share one IBuilder: making one loads all of TensorRT's kernels (8.6: 1 GB).

    They share their timing caches in memory too: 8.6 refuses to read back what it wrote about compiled regions.
    """
    if getattr(_kept, "builders", None) is not None:
        yield
        return
    _kept.builders, _kept.caches = {}, {}
    try:
        yield
    finally:
        _kept.builders = _kept.caches = None


def _new_builder(api: TensorRT) -> Any:
    builders = getattr(_kept, "builders", None)
    if builders is None:
        return _make_builder(api)
    if api.name not in builders:
        builders[api.name] = _make_builder(api)
    return builders[api.name]


def _make_builder(api: TensorRT) -> Any:
    try:
        builder = api.module.Builder(api.log)
    except TypeError as error:  # pybind's word for a null pointer
        raise RuntimeError(f"{api} cannot start its builder: {_reasons(api)} (is there an NVIDIA GPU?)") from error
    return builder


def _network_flags(api: TensorRT) -> int:
    flags = api.module.NetworkDefinitionCreationFlag
    if api.version < (10,) and not api.rtx:
        return 1 << int(flags.EXPLICIT_BATCH)
    return 1 << int(flags.STRONGLY_TYPED)


def _plugin_remedy(api: TensorRT, model: ModelProto) -> str:
    if opdef.hwkern_nodes(model) and not is_loaded(api):
        return ". hwkern's plugin is not in TensorRT's registry: call hwkern.tensorrt.load_plugin() first."
    return ""


def _reasons(api: TensorRT) -> str:
    text = api.log.take()
    with contextlib.suppress(Exception):
        text += f"; {own}" if (own := last_error(plugin_path(api.module))) else ""
    return text


# ---- the configuration ---------------------------------------------------------------------------------------------


def _config(
    api: TensorRT,
    builder: Any,
    precision: str,
    workspace: int | None,
    level: int | None,
    compute_capabilities: Sequence[str],
) -> Any:
    trt = api.module
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace))
    if level is not None:
        config.builder_optimization_level = level
    if api.version < (10,) and not api.rtx:
        if precision == "bf16":
            raise ValueError(f"{api} has no bfloat16: precision='fp16' or 'fp32', or TensorRT 10.")
        if precision == "fp16":
            config.set_flag(trt.BuilderFlag.FP16)
        # Contexts of several threads may use the same profile; always so from TensorRT 10 on.
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        # Without cuBLAS and cuDNN, which this TensorRT links and need not be there; NVIDIA's own advice for 8.6 too.
        sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(s) for s in sources))
    if compute_capabilities:
        if not hasattr(config, "num_compute_capabilities"):
            raise ValueError(f"compute_capabilities is for TensorRT-RTX, not {api}.")
        config.num_compute_capabilities = len(compute_capabilities)
        for index, name in enumerate(compute_capabilities):
            known = getattr(trt.ComputeCapability, name.upper(), None)
            if known is None:
                have = ", ".join(n for n in dir(trt.ComputeCapability) if n.startswith("SM"))
                raise ValueError(f"{api} does not know {name!r}; it builds for {have}.")
            config.set_compute_capability(known, index)
    return config


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _add_profiles(
    builder: Any, config: Any, network: Any, profiles: Sequence[Profile] | Profile | None
) -> list[Profile]:
    """Add the profiles (or the default one) to the config; returns them, complete with static inputs left out."""
    dynamic = {t.name: tuple(t.shape) for t in _inputs(network) if -1 in tuple(t.shape)}
    every = {t.name for t in _inputs(network)}
    if not dynamic:
        return []
    if profiles is None:
        profiles = [default_profile(dynamic)]
    elif isinstance(profiles, Profile):
        profiles = [profiles]
    if not profiles:
        raise ValueError(f"The model has dynamic inputs ({', '.join(dynamic)}), but profiles is empty.")
    for number, profile in enumerate(profiles):
        _check_profile(number, profile, dynamic, every)
        made = builder.create_optimization_profile()
        for name in dynamic:
            made.set_shape(name, tuple(profile.min[name]), tuple(profile.opt[name]), tuple(profile.max[name]))
        if config.add_optimization_profile(made) < 0:
            raise ValueError(f"TensorRT refuses profile {number}: {profile}")
    return list(profiles)


def _check_profile(number: int, profile: Profile, dynamic: Mapping[str, tuple[int, ...]], every: set[str]) -> None:
    for name in profile.opt:
        if name not in every:
            raise ValueError(f"profile {number} names {name!r}, but the model's inputs are {', '.join(sorted(every))}.")
    for name, shape in dynamic.items():
        if name not in profile.opt:
            raise ValueError(f"profile {number} says nothing about the dynamic input {name!r} {shape}.")
        for kind in (profile.min, profile.opt, profile.max):
            if len(kind[name]) != len(shape) or any(d not in (-1, p) for d, p in zip(shape, kind[name], strict=True)):
                raise ValueError(
                    f"profile {number} gives {name!r} the shape {tuple(kind[name])}, but the model has {shape}."
                )


def default_profile(dynamic: Mapping[str, tuple[int, ...]]) -> Profile:
    """min, opt and max for shapes with -1: a batch in the first dimension, lengths in the others."""

    def pick(which: int) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(
                (DEFAULT_BATCH if axis == 0 else DEFAULT_LENGTH)[which] if d == -1 else d
                for axis, d in enumerate(shape)
            )
            for name, shape in dynamic.items()
        }

    return Profile(pick(0), pick(1), pick(2))


def _timing_cache(api: TensorRT, config: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is None:
        return None
    if api.rtx:
        raise ValueError("TensorRT-RTX tunes on the GPU that runs the engine: it has no timing cache.")
    file = Path(path)
    caches = getattr(_kept, "caches", None)
    key = (api.name, str(file.absolute()))
    if caches is not None and key in caches and config.set_timing_cache(caches[key], False):
        return caches[key]
    old = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(old)
    # A cache of another GPU or TensorRT is refused: start a new one.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    if caches is not None:
        caches[key] = cache
    api.log.take()
    return cache


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def _monitor(api: TensorRT, config: Any, progress: Progress | None) -> Any:
    if progress is None or not hasattr(api.module, "IProgressMonitor"):
        return None
    report: Progress = progress

    class Monitor(api.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                report(phase, step + 1, self.steps.get(phase, 0))
            except BaseException as error:  # must not pass through C++
                self.error = error
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def _gpu() -> dict[str, Any] | None:
    """Name and compute capability of the GPU that built the engine; None without one."""
    if _native.cuda_problem() is not None:
        return None
    properties = _native.extension().device_properties(0)
    return {"name": properties["name"], "compute": properties["compute"]}
