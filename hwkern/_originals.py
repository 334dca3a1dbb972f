"""Where the float weights stay while a model is patched, and how they come back bit for bit.

``Spool`` holds bytes (in host memory or in a temporary file), ``FloatWeight`` is one weight Parameter that lives in a
spool, and ``Original`` is the float module of one patched layer, without its weight.
"""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Place = Literal["host", "disk", "device"]

# Bytes that go to or come from the file at once.
_CHUNK_BYTES = 2**22


def spool_directory() -> str:
    """The folder for the temporary file: ``$TMPDIR``, else /var/tmp (on many systems /tmp is memory), else /tmp."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK | os.X_OK):
        return "/var/tmp"
    return tempfile.gettempdir()


def free_disk() -> int:
    """Bytes that the temporary file may take; 0 when there is no folder for it."""
    try:
        return shutil.disk_usage(spool_directory()).free
    except OSError:
        return 0


def free_memory() -> int:
    """Bytes of host memory that this process may still take: the kernel's estimate, and the control group's limit."""
    free = _number("/proc/meminfo", "MemAvailable:", 1024)
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = limit - used if free is None else min(free, limit - used)
    return 0 if free is None else max(0, free)


def room_beside(weights: Sequence[Tensor]) -> bool:
    """Whether these float weights are on a GPU that has room for their int8 forms at the same time."""
    if not weights or not all(weight.is_cuda for weight in weights):
        return False
    need: dict[torch.device, int] = {}
    for weight in weights:
        # int8 is at most half of the weights; a quarter more for what quantizing and running take.
        need[weight.device] = need.get(weight.device, 0) + weight.numel() * weight.element_size() * 3 // 4
    return all(free_on(device) > size for device, size in need.items())


def free_on(device: torch.device) -> int:
    """Bytes of a GPU that this process's tensors may still take: what is free there and what torch's allocator holds
    unused, within the share of the GPU that ``torch.cuda.set_per_process_memory_fraction`` leaves it."""
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - taken
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older versions set it and do not tell
    return free if share is None else min(free, int(share(device) * total) - taken)


def _number(path: str, key: str = "", unit: int = 1) -> int | None:
    """The number after ``key`` in a small text file, times ``unit``; None when there is none."""
    try:
        words = Path(path).read_text().split()
        return int(words[words.index(key) + 1 if key else 0]) * unit
    except (OSError, ValueError, IndexError):
        return None


class Spool:
    """Keeps weights of one ``patch`` call: as host tensors, or in an unlinked temporary file.

    The file has no name, so it vanishes with the last weight in it, even when the process is killed. It is written and
    read with plain calls: mapping it would count as the process's memory.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.bytes = 0
        self._end = 0
        self._file: int | None = None  # a file descriptor

    def put(self, weight: Tensor) -> Stored:
        """Keep a copy of ``weight``. OSError when the disk is full."""
        if weight.is_meta:
            return Stored(weight)
        self.bytes += weight.numel() * weight.element_size()
        if not _is_dense(weight):  # a view with gaps or overlaps: its memory belongs to something larger anyway
            return Stored(weight)
        if self.place == "device":
            return Stored(weight)
        if self.place == "host":
            return Stored(weight.cpu())  # of a host tensor that is the tensor itself: nothing copied, nothing freed
        if self._file is None:
            with tempfile.TemporaryFile(dir=spool_directory(), prefix="hwkern-", buffering=0) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        offset = self._end
        for rows in _rows(weight):
            chunk = weight[rows].cpu().contiguous()
            self._transfer(os.pwritev, chunk, self._end)
            self._end += chunk.numel() * chunk.element_size()
        return Stored(None, self, offset)

    def read(self, target: Tensor, offset: int) -> None:
        """Fill ``target`` (any device, any dense strides) with the bytes at ``offset``."""
        for rows in _rows(target):
            chunk = torch.empty(target[rows].shape, dtype=target.dtype, device="cpu")
            self._transfer(os.preadv, chunk, offset)
            target[rows] = chunk
            offset += chunk.numel() * chunk.element_size()

    def _transfer(self, call: Any, chunk: Tensor, offset: int) -> None:
        size = chunk.numel() * chunk.element_size()
        buffer = memoryview((ctypes.c_char * size).from_address(chunk.data_ptr())).cast("B")
        done = 0
        while done < size:  # a signal or a full disk may cut a transfer short
            count = call(self._file, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(f"hwkern's temporary file in {spool_directory()} ends {size - done} bytes too early.")
            done += count


class Stored:
    """One weight in a spool: a tensor, or a place in the file."""

    def __init__(self, tensor: Tensor | None, spool: Spool | None = None, offset: int = 0) -> None:
        self.tensor, self.spool, self.offset = tensor, spool, offset
        self.shared = False  # whether models that were copied from each other both may ask for it

    def load(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight on ``device``, with the given strides."""
        if self.tensor is not None:
            tensor = self.tensor
            self.keep_apart(device)
            return tensor.to(device)
        weight = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        cast(Spool, self.spool).read(weight, self.offset)
        return weight

    def keep_apart(self, device: torch.device) -> None:
        """Before one of several models gets this very tensor, and may train it, set a copy aside for the others."""
        if self.shared and self.tensor is not None and self.tensor.device == device:
            self.tensor = self.tensor.clone()


def is_alone(tensor: Tensor | None) -> bool:
    """Whether nothing else is in the tensor's memory."""
    return tensor is not None and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _rows(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    return (slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))


def _is_dense(weight: Tensor) -> bool:
    """Whether the 2-D ``weight`` fills its memory without gaps or overlaps, in either order of its dimensions."""
    n, k = weight.shape
    return weight.is_contiguous() or (weight.stride(0) == 1 and weight.stride(1) == n) or n * k == 0


class FloatWeight:
    """The weight Parameter of one or several (tied) float layers, kept in a spool.

    While somebody else holds the Parameter (an optimizer, an embedding tied to it), that very object comes back.
    """

    def __init__(self, weight: nn.Parameter, spool: Spool) -> None:
        self._alive: weakref.ref[nn.Parameter] | None = weakref.ref(weight)
        self._stored = spool.put(weight.detach())
        self._shape, self._stride = weight.shape, weight.stride()
        self.dtype = weight.dtype
        self._requires_grad = weight.requires_grad
        self._grad = weight.grad
        self._attributes = dict(weight.__dict__)
        self.gone = ""  #: why it is not to come back, where one of the tied layers has let it go

    @property
    def is_meta(self) -> bool:
        """Whether there never were any values: the model was patched on the meta device."""
        return self._stored.tensor is not None and self._stored.tensor.is_meta

    def restore(self, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        """The Parameter, on ``device`` and in ``dtype``. The stored bytes stay."""
        weight = None if self._alive is None else self._alive()
        if weight is None:
            data = self._stored.load(self._shape, self._stride, self.dtype, device)
            with torch.inference_mode(data.is_inference()):  # else such a tensor takes no requires_grad
                weight = nn.Parameter(data.to(dtype), self._requires_grad)
            weight.__dict__.update(self._attributes)
            if self._grad is not None:
                weight.grad = self._grad.to(device, dtype)
            self._alive = weakref.ref(weight)
            return weight
        self._stored.keep_apart(device)
        if weight.device != device or weight.dtype != dtype:
            weight.data = weight.data.to(device, dtype)  # in place, as nn.Module.to does
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> FloatWeight:
        # The bytes are shared. A Parameter that is alive belongs to the model that is being copied: follow its copy.
        twin = copy.copy(self)
        memo[id(self)] = twin
        self._stored.shared = True
        weight = None if self._alive is None else self._alive()
        twin._alive = None if weight is None else weakref.ref(copy.deepcopy(weight, memo))
        return twin


class Original:
    """The float module of one patched layer: everything but its weight, which is a FloatWeight.

    ``copy.deepcopy`` of a patched model copies it, sharing the stored bytes; a pickle leaves it out.

    Attributes:
        bias_alone: whether the bias had memory of its own. Fusing lays the biases of layers that run as one product
            side by side; a layer that goes back takes its bias out again.
    """

    def __init__(
        self, module: nn.Module | None, weight: FloatWeight | None, gone: str = "", bias_alone: bool = False
    ) -> None:
        self.module, self.weight, self.gone, self.bias_alone = module, weight, gone, bias_alone

    def forget(self, why: str) -> None:
        """Let the float weight go; ``why`` says what happened, for the error of a later unpatch."""
        if self.weight is not None:
            self.weight.gone = why  # for the layers that are tied to this one: their int8 weight is another now too
        self.weight, self.gone = None, why

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        module, weight = copy.deepcopy(self.module, memo), copy.deepcopy(self.weight, memo)
        return Original(module, weight, self.gone, self.bias_alone)

    def __reduce__(self) -> tuple[Any, ...]:
        return Original, (None, None, self.gone or "the model came out of a pickle, which leaves the float weights out")
