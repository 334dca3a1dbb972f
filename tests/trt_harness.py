"""trt_harness.cpp from Python: TensorRT's part in a plugin's life, with headers only.

NVIDIA's headers are in no wheel. The tests look for folders with NvInferRuntime.h in ``HWKERN_TENSORRT_HEADERS`` (a
list like PATH; each entry such a folder, or a folder of such folders), in ``HWKERN_TENSORRT_INCLUDE_DIR`` and in the
system's include folders. Where none of 10.1 is there, csrc/tensorrt/abi stands for it: the same checks of the plugin,
but none of our declarations.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: nvinfer1::DataType, nvinfer1::PluginFieldType and nvinfer1::TensorFormat
FLOAT, HALF, INT8, INT32, BOOL, BF16, INT64 = 0, 1, 2, 3, 4, 7, 8
FIELD_FLOAT32, FIELD_INT8, FIELD_INT32, FIELD_CHAR, FIELD_UNKNOWN, FIELD_INT64 = 1, 3, 5, 6, 8, 10
LINEAR, CHW4 = 0, 2

MAX_STATE = 4096


def plugin_library(name: str = "libhwkern_trt.so") -> Path | None:
    """The plugin beside ``hwkern._C``, when this build has it."""
    from hwkern import _native

    return _native.tensorrt_plugins().get(name)


def header_folders() -> dict[str, Path]:
    """TensorRT version, as "10.13", to a folder with its headers."""
    entries = [e for e in os.environ.get("HWKERN_TENSORRT_HEADERS", "").split(os.pathsep) if e]
    entries += [
        os.environ[e] for e in ("HWKERN_TENSORRT_INCLUDE_DIR", "HWKERN_TENSORRT8_INCLUDE_DIR") if e in os.environ
    ]
    entries += ["/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/local/include", str(ROOT / "csrc/tensorrt/abi")]
    found: dict[str, Path] = {}
    for entry in map(Path, entries):
        folders = (
            [entry]
            if (entry / "NvInferRuntime.h").is_file()
            else sorted(p.parent for p in entry.glob("*/NvInferRuntime.h"))
        )
        for folder in folders:
            text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
            parts = [
                re.search(rf"define (?:NV_TENSORRT|TRT)_{p}(?:_ENTERPRISE)?\s+(\d+)", text) for p in ("MAJOR", "MINOR")
            ]
            if all(parts):
                found.setdefault(".".join(p[1] for p in parts if p), folder)
    return found


def cuda_include() -> Path | None:
    """A folder with cuda_runtime_api.h, which NVIDIA's headers need."""
    nvcc = shutil.which("nvcc")
    roots = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    roots += [Path(nvcc).resolve().parent.parent] if nvcc else []
    roots += [Path("/usr/local/cuda"), *(Path(p) / "nvidia" / d for p in sys.path for d in ("cu13", "cuda_runtime"))]
    for root in roots:
        for folder in (root / "include", root / "targets/x86_64-linux/include"):
            if (folder / "cuda_runtime_api.h").is_file():
                return folder
    return None


def compile_command(headers: Path, cuda: Path, *arguments: str | Path) -> list[str]:
    """g++ for one source against NVIDIA's headers, warnings as errors."""
    return [
        *(os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror"),
        *("-Wno-deprecated-declarations", "-isystem", str(headers), "-isystem", str(cuda), f"-I{ROOT / 'csrc'}"),
        *map(str, arguments),
    ]


def compile_harness(headers: Path, cuda: Path, folder: Path) -> Path:
    target = folder / "trt_harness.so"
    command = compile_command(headers, cuda, "-shared", ROOT / "tests/trt_harness.cpp", "-o", target, "-ldl")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


class CTensor(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("rank", ctypes.c_int32), ("dims", ctypes.c_int64 * 8))


@dataclass(frozen=True)
class T:
    """A tensor's type and dimensions as TensorRT describes them; -1 for what is not known."""

    type: int
    dims: tuple[int, ...]

    def c(self) -> CTensor:
        return CTensor(self.type, len(self.dims), (ctypes.c_int64 * 8)(*self.dims))


def _tensors(tensors: Sequence[T]) -> Any:
    return (CTensor * len(tensors))(*(t.c() for t in tensors))


@dataclass(frozen=True)
class Field:
    """One PluginField; ``data`` None is a null pointer."""

    name: str
    data: bytes | None
    type: int
    length: int


def integer(name: str, value: int) -> Field:
    return Field(name, value.to_bytes(4, "little", signed=True), FIELD_INT32, 1)


def text(name: str, value: str, final_nul: bool = True) -> Field:
    data = value.encode() + b"\0" * final_nul
    return Field(name, data, FIELD_CHAR, len(data))


class Harness:
    """The compiled harness with one plugin library open."""

    def __init__(self, harness: Path, plugin: Path) -> None:
        self.lib = ctypes.CDLL(str(harness))
        pointer, string = ctypes.c_void_p, ctypes.c_char_p
        for name, result in {
            "h_load": pointer, "h_create": pointer, "h_create_without_fields": pointer, "h_clone": pointer,
            "h_attach": pointer, "h_creator_name": string, "h_creator_version": string, "h_creator_namespace": string,
            "h_field_name": string, "h_name": string, "h_cache_id": string, "h_workspace": ctypes.c_size_t,
        }.items():  # fmt: skip
            getattr(self.lib, name).restype = result
        found = self.lib.h_load(str(plugin).encode())
        assert found, f"{plugin} cannot be opened, or has no getCreators and setLoggerFinder"
        self.library = pointer(found)
        self.plugin = ctypes.CDLL(str(plugin))  # the same mapped library
        self.sentences: list[str] = []
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int, string)(lambda _, s: self.sentences.append(s.decode()))
        self.plugin.hwkern_trt_set_log(self._callback)

    def close(self) -> None:
        self.plugin.hwkern_trt_set_log(None)

    def creators(self) -> dict[str, int]:
        """Name to index."""
        return {
            self.lib.h_creator_name(self.library, i).decode(): i for i in range(self.lib.h_creator_count(self.library))
        }

    def field_names(self, op: str) -> list[str]:
        i = self.creators()[op]
        return [
            self.lib.h_field_name(self.library, i, f).decode() for f in range(self.lib.h_field_count(self.library, i))
        ]

    def create(self, op: str, *fields: Field, runtime: bool = False) -> Plugin | None:
        """createPlugin; None where it gave null. What it said is in ``sentences``."""
        self.sentences.clear()
        count = len(fields)
        buffers = [None if f.data is None else ctypes.create_string_buffer(f.data, max(1, len(f.data))) for f in fields]
        made = self.lib.h_create(
            self.library,
            self.creators()[op],
            int(runtime),
            count,
            (ctypes.c_char_p * count)(*(f.name.encode() for f in fields)),
            (ctypes.c_int32 * count)(*(f.type for f in fields)),
            (ctypes.c_void_p * count)(*(None if b is None else ctypes.addressof(b) for b in buffers)),
            (ctypes.c_int32 * count)(*(f.length for f in fields)),
        )
        return Plugin(self, made) if made else None

    def restore(self, op: str, state: bytes, name: str = "hwkern_state") -> Plugin | None:
        """createPlugin as when an engine is loaded."""
        return self.create(op, Field(name, state, FIELD_UNKNOWN, len(state)), runtime=True)

    def last_error(self) -> str:
        buffer = ctypes.create_string_buffer(1024)
        self.plugin.hwkern_trt_last_error(buffer, ctypes.c_size_t(1024))
        return buffer.value.decode()


class Plugin:
    """One IPluginV3; every method is the call of that name."""

    def __init__(self, harness: Harness, address: int) -> None:
        self.harness, self.lib, self.this = harness, harness.lib, ctypes.c_void_p(address)

    def destroy(self) -> None:
        self.lib.h_destroy(self.this)

    def clone(self) -> Plugin:
        return Plugin(self.harness, self.lib.h_clone(self.this))

    def attach(self) -> Plugin:
        return Plugin(self.harness, self.lib.h_attach(self.this))

    @property
    def outputs(self) -> int:
        return int(self.lib.h_output_count(self.this))

    @property
    def cache_id(self) -> str:
        return str(self.lib.h_cache_id(self.this).decode())

    def output_types(self, types: Sequence[int]) -> list[int] | None:
        out = (ctypes.c_int32 * self.outputs)()
        code = self.lib.h_output_types(self.this, (ctypes.c_int32 * len(types))(*types), len(types), out, self.outputs)
        return list(out) if code == 0 else None

    def output_shapes(self, inputs: Sequence[T]) -> list[tuple[int, ...]] | None:
        out = (CTensor * self.outputs)()
        code = self.lib.h_output_shapes(self.this, _tensors(inputs), len(inputs), out, self.outputs)
        return [tuple(t.dims[: t.rank]) for t in out] if code == 0 else None

    def supports(self, index: int, tensors: Sequence[T], layout: int = LINEAR) -> bool:
        """``tensors``: inputs and outputs; those after ``index`` do not matter."""
        inputs = len(tensors) - self.outputs
        return bool(self.lib.h_supports(self.this, index, _tensors(tensors), inputs, self.outputs, layout))

    def configure(self, descs: Sequence[T], low: Sequence[T], opt: Sequence[T], high: Sequence[T]) -> bool:
        arrays = [_tensors(t) for t in (descs, low, opt, high)]
        return int(self.lib.h_configure(self.this, *arrays, len(descs) - self.outputs, self.outputs)) == 0

    def workspace(self, high: Sequence[T]) -> int:
        arrays = [_tensors(high)] * 4
        return int(self.lib.h_workspace(self.this, *arrays, len(high) - self.outputs, self.outputs))

    def tactics(self) -> list[int]:
        out = (ctypes.c_int32 * 256)()
        count = self.lib.h_tactics(self.this, out, 256)
        assert count >= 0
        return list(out[:count])

    def set_tactic(self, tactic: int) -> None:
        assert self.lib.h_set_tactic(self.this, tactic) == 0

    def on_shape_change(self, tensors: Sequence[T]) -> bool:
        inputs = len(tensors) - self.outputs
        return int(self.lib.h_on_shape_change(self.this, _tensors(tensors), inputs, self.outputs)) == 0

    def enqueue(
        self, tensors: Sequence[T], inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> bool:
        """``inputs`` and ``outputs``: device addresses."""
        code = self.lib.h_enqueue(
            self.this, _tensors(tensors), len(inputs), len(outputs), (ctypes.c_void_p * len(inputs))(*inputs),
            (ctypes.c_void_p * len(outputs))(*outputs), ctypes.c_void_p(workspace), ctypes.c_void_p(stream),
        )  # fmt: skip
        return int(code) == 0

    def serialize(self) -> tuple[str, bytes]:
        """Name and bytes of the one field."""
        name, data = ctypes.create_string_buffer(256), ctypes.create_string_buffer(MAX_STATE)
        count = self.lib.h_serialize(self.this, name, data, MAX_STATE)
        assert count >= 0
        return name.value.decode(), data.raw[:count]
