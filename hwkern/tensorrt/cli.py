"""Models for TensorRT: rewrite, plan, export, build, run, bench, inspect; what hwkern.tensorrt does in Python.

With TensorRT-RTX, `build` and `plan` run in a process of their own with LD_LIBRARY_PATH set (docs/tensorrt.md: why).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hwkern.tensorrt as ht
from hwkern._console import print_table

_RESTARTED = "HWKERN_TRT_RESTARTED"


class UsageError(Exception):
    """Shown without a traceback; exit code 2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    def action(name: str, text: str, call: Any) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(action=call)
        return sub

    sub = action("rewrite", "matrix multiplies of an ONNX model become int8 nodes", _rewrite)
    sub.add_argument("source", type=Path)
    sub.add_argument("target", type=Path)
    sub.add_argument("--include", action="append", metavar="PATTERN", help="node names to take (fnmatch); repeatable")
    sub.add_argument("--exclude", action="append", metavar="PATTERN", help="node names to leave; repeatable")
    sub.add_argument("--plan", type=Path, help="JSON: node name → scheme or float (see `plan`)")
    sub.add_argument("--scheme", default="w8a8_dynamic", choices=("w8a8_dynamic", "w8a16"))
    sub.add_argument("--fuse-residual", action="store_true", help="additions of the same shape go into the node")
    sub.add_argument(
        "--fuse-norm", action="store_true", default=None, help="LayerNormalizations and RMS norms before it, too"
    )
    sub.add_argument(
        "--fuse-attention", action="store_true", default=None, help="attention between int8 products is a node, too"
    )
    sub.add_argument("--no-merge", action="store_true", help="keep products of the same input apart")
    sub.add_argument("--no-functions", action="store_true", help="leave out the bodies for ONNX Runtime")
    sub.add_argument("--int32-weights", action="store_true", help="for trtexec of TensorRT 8.6 or 10.0")
    sub.add_argument("--json", type=Path, help="write the report here")

    sub = action("plan", "measure on this GPU which linears gain from int8", _plan)
    sub.add_argument("source", type=Path)
    sub.add_argument("target", type=Path, help="the plan, JSON")
    sub.add_argument("--quick", action="store_true", help="all linears or none: three builds")
    sub.add_argument("--seconds", type=float, help="start no build that would end later")
    _build_arguments(sub)

    sub = action(
        "export", "MODULE:FUNCTION gives (model, example inputs[, dynamic shapes]); export it with torch", _export
    )
    sub.add_argument("factory", metavar="MODULE:FUNCTION")
    sub.add_argument("target", type=Path)
    sub.add_argument("--float", action="store_true", help="do not patch the model before")

    sub = action("build", "build an engine from an ONNX model", _build)
    sub.add_argument("source", type=Path)
    sub.add_argument("target", type=Path)
    sub.add_argument("--embed-plugin", action="store_true", help="put the plugin library into the engine")
    sub.add_argument(
        "--compute-capability", action="append", default=[], metavar="SM89", help="TensorRT-RTX; repeatable"
    )
    _build_arguments(sub)

    sub = action("run", "run an engine on arrays from an .npz file, or on random ones", _run)
    sub.add_argument("engine", type=Path)
    sub.add_argument("--inputs", type=Path, metavar="NPZ")
    sub.add_argument("--outputs", type=Path, metavar="NPZ", help="write the outputs here")
    sub.add_argument("--shapes", metavar="x:1x128,y:1x128", help="for random inputs; default: the first profile's opt")

    sub = action("bench", "latency of an engine at each profile's opt", _bench)
    sub.add_argument("engine", type=Path)
    sub.add_argument("--json", type=Path)

    sub = action("inspect", "what is in an ONNX model or an engine", _inspect)
    sub.add_argument("path", type=Path)

    sub = action("plugin-path", "print the plugin library's path, for trtexec --dynamicPlugins", _plugin_path)
    sub.add_argument("--tensorrt", type=int, metavar="MAJOR", help="8, 10 or 11; default: the one that is installed")


def _build_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--precision", default="fp16", choices=("fp16", "bf16", "fp32"))
    shapes = 'JSON lines, one request each: {"input": [1, 128]}; profiles are made to fit them'
    sub.add_argument("--requests", type=Path, help=shapes)
    sub.add_argument("--max-profiles", type=int, default=4)
    sub.add_argument("--min", metavar="x:1x1", help="shapes of one profile, with --opt and --max")
    sub.add_argument("--opt", metavar="x:8x128")
    sub.add_argument("--max", metavar="x:32x512")
    sub.add_argument("--timing-cache", type=Path)
    sub.add_argument("--workspace", type=int, metavar="BYTES")
    sub.add_argument("--verbose", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    try:
        code: int = arguments.action(arguments) or 0
    except UsageError as error:
        print(f"hwkern trt: {error}", file=sys.stderr)
        return 2
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        print(f"hwkern trt: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    return code


def _in_new_process(arguments: argparse.Namespace) -> int | None:
    """Run this command again where TensorRT-RTX's parser finds the library that it opens by another name.

    Returns its exit code, or None where that is not needed.
    """
    from hwkern.tensorrt import _api
    from hwkern.tensorrt.plugin import rtx_library_folder

    if os.environ.get(_RESTARTED) or _api.rtx_problem(_api.find()) is None:
        return None
    paths = [str(rtx_library_folder()), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)), _RESTARTED: "1"}
    sys.stdout.flush()
    return subprocess.run(
        [sys.executable, "-m", "hwkern.cli", *arguments.argv], env=environment, check=False
    ).returncode


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """``"x:1x128,y:4"`` → ``{"x": (1, 128), "y": (4,)}``."""
    found = {}
    for part in text.split(","):
        name, separator, dims = part.rpartition(":")
        try:
            found[name] = tuple(int(d) for d in dims.split("x"))
        except ValueError:
            separator = ""
        if not (separator and name):
            raise UsageError(f"{part!r} is no shape: write NAME:1x128, several with commas between.")
    return found


def _profiles(arguments: argparse.Namespace) -> Any:
    ranges = (arguments.min, arguments.opt, arguments.max)
    if arguments.requests is not None:
        if any(ranges):
            raise UsageError("--requests makes the profiles: leave out --min, --opt and --max.")
        lines = arguments.requests.read_text(encoding="utf-8").splitlines()
        made = ht.profiles_from([json.loads(line) for line in lines if line.strip()], arguments.max_profiles)
        print(made)
        return made
    if not any(ranges):
        return None
    if not all(ranges):
        raise UsageError("--min, --opt and --max go together.")
    return ht.Profile(*map(parse_shapes, ranges))


def _rewrite(arguments: argparse.Namespace) -> None:
    report = ht.rewrite(
        arguments.source,
        arguments.target,
        include=arguments.include,
        exclude=arguments.exclude,
        plan=arguments.plan,
        scheme=arguments.scheme,
        fuse_residual=arguments.fuse_residual,
        fuse_norm=arguments.fuse_norm,
        fuse_attention=arguments.fuse_attention,
        merge=False if arguments.no_merge else None,
        functions=not arguments.no_functions,
        int32_weights=arguments.int32_weights,
    )
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json() + "\n", encoding="utf-8")


def _plan(arguments: argparse.Namespace) -> int | None:
    profiles = _profiles(arguments)
    if profiles is None:
        raise UsageError("a plan needs --requests, or --min, --opt and --max: the sizes to measure.")
    if (code := _in_new_process(arguments)) is not None:
        return code
    plan = ht.make_plan(
        arguments.source,
        [profiles] if isinstance(profiles, ht.Profile) else profiles,
        arguments.precision,
        timing_cache=arguments.timing_cache,
        workspace=arguments.workspace,
        quick=arguments.quick,
        seconds=arguments.seconds,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    plan.save(arguments.target)
    print(plan)
    return None


def _export(arguments: argparse.Namespace) -> None:
    module, separator, name = arguments.factory.partition(":")
    if not separator:
        raise UsageError(f"{arguments.factory!r}: write MODULE:FUNCTION.")
    sys.path.insert(0, os.getcwd())
    made = getattr(importlib.import_module(module), name)()
    model, inputs, shapes = (*made, None)[:3]
    if not arguments.float:
        from hwkern.patch import patch

        print(patch(model))
    print(ht.export(model, inputs, arguments.target, shapes))


def _build(arguments: argparse.Namespace) -> int | None:
    profiles = _profiles(arguments)
    if (code := _in_new_process(arguments)) is not None:
        return code
    engine = ht.build(
        arguments.source,
        profiles,
        arguments.precision,
        path=arguments.target,
        timing_cache=arguments.timing_cache,
        workspace=arguments.workspace,
        embed_plugin=arguments.embed_plugin,
        compute_capabilities=arguments.compute_capability,
        verbose=arguments.verbose,
    )
    seconds = engine.metadata["build_seconds"]
    print(f"{arguments.target}: {len(engine.data) / 1e6:.1f} MB in {seconds} s, {engine.metadata['tensorrt']}")
    return None


def _random_inputs(runner: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    import numpy as np

    from hwkern.tensorrt._arrays import numpy_dtype

    rng = np.random.default_rng(0)
    made = {}
    for name, tensor in runner.inputs.items():
        shape = shapes.get(name) or runner.profiles[0].opt.get(name) or tensor.shape
        dtype = numpy_dtype(tensor.dtype)
        is_float = "float" in tensor.dtype
        made[name] = rng.standard_normal(shape).astype(dtype) if is_float else np.ones(shape, dtype)
    return made


def _run(arguments: argparse.Namespace) -> None:
    import numpy as np

    with ht.Runner(arguments.engine) as runner:
        if arguments.inputs is not None:
            inputs = dict(np.load(arguments.inputs))
        else:
            inputs = _random_inputs(runner, parse_shapes(arguments.shapes) if arguments.shapes else {})
        outputs = runner(inputs)
        rows = [
            (name, str(array.dtype), "x".join(map(str, array.shape)), f"{array.astype(np.float64).mean():.6g}")
            for name, array in outputs.items()
        ]
        print_table(str(arguments.engine), ("output", "dtype", "shape", "mean"), rows)
        if arguments.outputs is not None:
            np.savez(arguments.outputs, **outputs)


def _bench(arguments: argparse.Namespace) -> None:
    import time

    from hwkern.tensorrt import measure

    rows, found = [], []
    engine = ht.Engine.load(arguments.engine)
    with ht.Runner(engine) as runner:
        for profile in runner.profiles:
            feed = _random_inputs(runner, dict(profile.opt))
            for _ in range(3):
                runner(feed)
            samples = []
            until = time.perf_counter() + 1.0
            while time.perf_counter() < until:
                start = time.perf_counter()
                runner(feed)
                samples.append((time.perf_counter() - start) * 1e6)
            host = measure.summary(samples)
            gpu = measure.engine_us(engine, [{n: tuple(a.shape) for n, a in feed.items()}], copies=1)[0]
            found.append({"profile": profile.to_dict(), "gpu_us": gpu, "latency_us": host})
            times = (f"{host[k]:.0f}" for k in ("p50", "p95", "p99"))
            rows.append(
                (", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in profile.opt.items()), f"{gpu:.0f}", *times)
            )
    print_table(f"{arguments.engine}, us", ("shapes", "GPU", "numpy p50", "p95", "p99"), rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _inspect(arguments: argparse.Namespace) -> None:
    from hwkern.tensorrt.builder import sidecar

    if arguments.path.suffix == ".onnx":
        from hwkern.tensorrt import graph, opdef

        model, _ = graph.load(arguments.path)
        rows = []
        for node in opdef.hwkern_nodes(model):
            a = opdef.attributes(node)
            extra = ["bias"] * a["has_bias"] + [a["activation"]] * (a["activation"] != "none")
            rows.append((node.name, f"{a['in_features']} x {a['out_features']}", a["scheme"], ", ".join(extra)))
        print_table(
            f"{arguments.path}: opset {opdef.opset_version(model)}", ("node", "in x out", "scheme", "with"), rows, 4
        )
        return
    if sidecar(arguments.path).is_file():
        print(json.dumps(ht.Engine.load(arguments.path).metadata, indent=1))
        return
    with ht.Runner(arguments.path) as runner:
        tensors = [*runner.inputs.values(), *runner.outputs.values()]
        table = [(t.name, "input" if t.is_input else "output", t.dtype, str(t.shape)) for t in tensors]
        print_table(str(arguments.path), ("tensor", "kind", "dtype", "shape"), table, 4)
        print(*(f"profile {i}: {p}" for i, p in enumerate(runner.profiles)), sep="\n")


def _plugin_path(arguments: argparse.Namespace) -> None:
    print(ht.plugin_path(version=arguments.tensorrt))
