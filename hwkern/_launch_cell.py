"""What a launch needs of one layer's weight, scale and bias: read once, and good while they stay where they are."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from hwkern._checks import FLOATS, K_MAX, ROW_ALIGNMENT
from hwkern._cuda import extension
from hwkern._tensors import pointer


class LaunchCell:
    """What a launch needs of one layer's weight, scale and bias, read once and good while they stay where they are."""

    __slots__ = (
        "bias_dtype", "bias_pointer", "columns", "device", "linear", "n", "scale_pointer", "used", "weight_only",
        "weight_pointer",
    )  # fmt: skip

    def __init__(self) -> None:
        self.used = False  # whether a weight-only launch has read this weight: from then on it counts as constant
        self.weight_pointer = self.scale_pointer = self.bias_pointer = -1
        self.columns = self.device = -1
        self.bias_dtype: torch.dtype | None = None

    def __reduce__(self) -> tuple[type[LaunchCell], tuple[()]]:
        return LaunchCell, ()  # a copy of the layer has other addresses

    def holds(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the tensors that were read.

        The bias's dtype counts beside its address: two casts in a row (``.half().bfloat16()``) may bring it back to the
        address of the first. The layer keeps the dtypes and shapes of the other two.
        """
        return (
            self.weight_pointer == weight.data_ptr()
            and self.scale_pointer == weight_scale.data_ptr()
            and (
                self.bias_pointer == 0
                if bias is None
                else self.bias_pointer == bias.data_ptr() and self.bias_dtype is bias.dtype
            )
        )

    def read(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
        """False where the kernels cannot take the tensors as they are (or where ``check_linear`` would object)."""
        n, columns = weight.shape
        device = weight.get_device()
        ready = _is_readable(weight, weight_scale) and (
            bias is None or (is_vector(bias, n, device) and bias.dtype in FLOATS)
        )
        if ready:
            native = extension()
            self.n, self.columns, self.device = n, columns, device
            self.linear, self.weight_only, self.used = native.linear, native.weight_only_linear, False
            self.weight_pointer, self.scale_pointer = weight.data_ptr(), weight_scale.data_ptr()
            self.bias_pointer, self.bias_dtype = pointer(bias), None if bias is None else bias.dtype
        return ready


_cells: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor], LaunchCell]] = {}


def cell_for(x: Tensor, k: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> LaunchCell | None:
    """The cell of these tensors, if the kernels can take them with ``x [..., K]`` as they are; else None.

    None may still be right (copies help) or wrong: that is for the checks to tell, which write a sentence for each
    mistake. A compiled model calls the operators with what passed when it was traced, and half of such a call's host
    time went to those checks. The cell is remembered by the weight: the same tensors at the same addresses need no
    second look (a bias is looked at whenever it is there).
    """
    if x.dtype not in FLOATS or weight.dim() != 2 or not 0 < k <= K_MAX:
        return None
    known = _cells.get(id(weight))
    if known is not None and known[0]() is weight and known[1]() is weight_scale and bias is None:
        cell = known[2]
        found = (
            cell.holds(weight, weight_scale, None)
            and (cell.n, cell.columns) == weight.shape
            and cell.device == weight.get_device()
            and _is_readable(weight, weight_scale)
        )
    else:
        found = False
    if not found:
        cell = LaunchCell()
        if not cell.read(weight, weight_scale, bias):
            return None
        if bias is None:
            key = id(weight)
            _cells[key] = weakref.ref(weight, lambda _: _cells.pop(key, None)), weakref.ref(weight_scale), cell
    fits = cell.columns - ROW_ALIGNMENT < k <= cell.columns and x.get_device() == cell.device
    return cell if fits else None


def _is_readable(weight: Tensor, weight_scale: Tensor) -> bool:
    """Whether the kernels can read a weight ``[N, K16]`` and its scales as they are."""
    n, columns = weight.shape
    return (
        weight.dtype is torch.int8
        and columns % ROW_ALIGNMENT == 0
        and weight.is_contiguous()
        and weight.data_ptr() % ROW_ALIGNMENT == 0
        and weight_scale.dtype is torch.float32
        and is_vector(weight_scale, n, weight.get_device())
    )


def is_vector(t: Tensor, n: int, device: int) -> bool:
    """Whether ``t`` is a contiguous ``[n]`` on the device of this index."""
    return t.get_device() == device and tuple(t.shape) == (n,) and t.is_contiguous()
