"""Safetensors files as one checked set: written whole or not at all, read only when every byte is as it was written.

Each file's header says to which save it belongs (an id), which part of how many it is, and a CRC-32 for each tensor;
so a file that was cut, damaged, exchanged or left over from another save is found before anything is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Of the layout that this version writes, and the newest that it reads.
FORMAT_VERSION = 1
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_KEY = "hwkern"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TORCH = {code: dtype for dtype, code in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; nothing of it was loaded."""


# ---- writing --------------------------------------------------------------------------------------------------------


def split(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Names in order, in groups of at most ``most`` bytes (a larger tensor goes alone)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    max_shard_bytes: int,
    plain: bool = False,
) -> list[Path]:
    """Write the tensors and what ``manifest`` says of them; the files get their names when all of them are complete.

    ``manifest`` is JSON data; the first file holds it. ``plain``: without manifest, id and checksums, for others to
    read. TypeError for a dtype that safetensors has no name for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name!r} is {tensor.dtype}, which a safetensors file cannot hold.")
    groups = split(tensors, max_shard_bytes)
    count, save = len(groups), uuid.uuid4().hex
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    stale = set(_present(directory))
    partial = [directory / f".{name}.{save}" for name in names]
    index = directory / f".{INDEX}.{save}"
    try:
        for i, (group, path) in enumerate(zip(groups, partial, strict=True)):
            own: dict[str, Any] = {"format_version": FORMAT_VERSION, "save": save, "part": i, "parts": count}
            if i == 0:
                own |= manifest
            _write_file(path, {name: tensors[name] for name in group}, None if plain else own)
        if count > 1:
            where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
        for name, path in zip(names, partial, strict=True):
            os.replace(path, directory / name)
        if count > 1:
            os.replace(index, directory / INDEX)
    finally:
        for path in (*partial, index):
            path.unlink(missing_ok=True)
    for name in stale - set(names) - ({INDEX} if count > 1 else set()):
        (directory / name).unlink(missing_ok=True)  # of an earlier save with other parts
    return [directory / name for name in names]


def _present(directory: Path) -> Iterator[str]:
    for path in directory.glob("model*.safetensors*"):
        if path.name in (SINGLE, INDEX) or path.name.startswith("model-"):
            yield path.name


def _write_file(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any] | None) -> None:
    """One safetensors file: 8 bytes of header length, the JSON header, the tensors' bytes one after the other.

    Written by hand, because the library wants all tensors in host memory at once; this needs the largest of them. The
    checksums are only known after the bytes, so the header is written twice, at the same length.
    """
    header: dict[str, Any] = {"__metadata__": {}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size

    def encoded(sums: Mapping[str, str]) -> bytes:
        header["__metadata__"] = {"format": "pt"}
        if manifest is not None:
            header["__metadata__"][_KEY] = json.dumps({**manifest, "crc32": sums}, separators=(",", ":"))
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    sums = dict.fromkeys(tensors, "0" * 8)
    with open(path, "wb") as file:
        start = len(encoded(sums))
        file.seek(start)
        for name, tensor in tensors.items():
            host = tensor.detach().cpu().contiguous()  # NOTE: named, because the view does not keep it alive
            data = view(host)
            sums[name] = f"{zlib.crc32(data):08x}"
            file.write(data)
        file.flush()
        final = encoded(sums)
        assert len(final) == start
        file.seek(0)
        file.write(final)
        file.flush()
        os.fsync(file.fileno())


def view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy; alive no longer than the tensor."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


# ---- reading --------------------------------------------------------------------------------------------------------


class Entry:
    """Where one tensor lies: file, dtype, shape, first byte, number of bytes, checksum (None: the file has none)."""

    __slots__ = ("crc32", "dtype", "offset", "path", "shape", "size")

    def __init__(
        self, path: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int, size: int, crc32: str | None
    ) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape
        self.offset, self.size, self.crc32 = offset, size, crc32


class Shards:
    """All files of one checkpoint folder with their headers checked; tensors are read on demand.

    Attributes:
        entries: name → :class:`Entry`, over all files.
        manifest: what :func:`write` was given; empty for files of another program.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        self.manifest: dict[str, Any] = {}
        parts: dict[int, tuple[Path, dict[str, Any]]] = {}
        for path in _files(directory):
            found, own = _read_header(path)
            for name, entry in found.items():
                if name in self.entries:
                    raise CheckpointError(f"{path} and {self.entries[name].path} both hold {name!r}.")
                self.entries[name] = entry
            if own:
                parts[own["part"]] = (path, own)
        if parts:
            self._check_parts(parts)
            self.manifest = parts[0][1]

    def _check_parts(self, parts: Mapping[int, tuple[Path, dict[str, Any]]]) -> None:
        first = next(iter(parts.values()))
        for path, own in parts.values():
            if own["save"] != first[1]["save"]:
                raise CheckpointError(f"{path.name} and {first[0].name} come from different saves: save again.")
        absent = [i for i in range(first[1]["parts"]) if i not in parts]
        if absent:
            raise CheckpointError(f"{self.directory} lacks part {absent[0] + 1} of {first[1]['parts']}.")

    def read(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Each tensor on ``device``, its bytes checked. CheckpointError for damage."""
        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name in names:
                entry = self.entries[name]
                if entry.path not in files:
                    files[entry.path] = stack.enter_context(open(entry.path, "rb", buffering=0))
                yield name, _read_tensor(files[entry.path], name, entry, device)


def _files(directory: Path) -> Sequence[Path]:
    """What the index names, or the single file."""
    index = directory / INDEX
    if index.exists():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}).") from error
        absent = [name for name in named if Path(name).name != name or not (directory / name).is_file()]
        if absent:
            raise CheckpointError(f"{index} names {absent[0]!r}, which is not in the folder.")
        return [directory / name for name in named]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    what = f"has neither {SINGLE} nor {INDEX}" if directory.is_dir() else "is not a folder"
    raise CheckpointError(f"{directory} {what}: there is no checkpoint to load.")


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header should have {length} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        own = json.loads(metadata[_KEY]) if _KEY in metadata else {}
        if own:
            check_version(own.get("format_version"), path)
        sums = own.get("crc32", {})
        start = 8 + length
        entries = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            dtype, shape = _TORCH[entry["dtype"]], tuple(entry["shape"])
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name!r} has offsets {begin} … {stop} that do not fit its shape {shape}")
            entries[name] = Entry(path, dtype, shape, start + begin, stop - begin, sums.get(name))
            end = stop
        if own and set(sums) != set(entries):
            raise ValueError("its checksums name other tensors than its header")
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    if start + end != size:
        kind = "cut short" if size < start + end else "longer than its header says"
        raise CheckpointError(f"{path} is {kind}: {size} bytes instead of {start + end}.")
    return entries, own


def check_version(version: object, where: object) -> None:
    """CheckpointError for a format that this hwkern does not know."""
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where} has the format version {version!r}, which never was.")
    if version > FORMAT_VERSION:
        import hwkern

        raise CheckpointError(
            f"{where} has the format version {version}; hwkern {hwkern.__version__} reads up to {FORMAT_VERSION}: "
            "update hwkern (pip install -U hwkern)."
        )


def _read_tensor(file: Any, name: str, entry: Entry, device: torch.device) -> Tensor:
    # Read, not mapped: a mapped file that is replaced later would change or end under the model.
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    data, done = view(tensor), 0
    file.seek(entry.offset)
    while done < entry.size:
        count = file.readinto(data[done:])
        if not count:
            raise CheckpointError(f"{entry.path} ends within {name!r}.")
        done += count
    if entry.crc32 is not None and f"{zlib.crc32(data):08x}" != entry.crc32:
        raise CheckpointError(f"{entry.path}: {name!r} is damaged (its checksum differs).")
    return tensor.to(device)
