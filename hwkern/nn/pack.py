"""From a float weight to the packed int8 weight: what can be packed, and the quantization itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from hwkern import ops

# Elements that are quantized at once: on the CPU 4 MB of float32, small enough for the caches; on a GPU 64 MB, because
# each step costs the host 0.1 ms.
_CHUNK, _CUDA_CHUNK = 2**20, 2**24
# A chunk is also at most this share of its weight, so that packing never needs more memory than the weight itself; on a
# GPU 4 MB are always allowed, for the host's sake: 768 × 768 weights in 16 chunks took it 1 ms.
_CHUNKS_PER_WEIGHT = 16


def weight_problem(weight: Tensor | None, transposed: bool = False) -> str | None:
    """Why ``weight`` cannot become int8, as a part of a sentence; None when it can.

    ``weight`` is ``[N, K]``, or ``[K, N]`` when ``transposed``. Its values are not looked at.
    """
    if weight is None:
        return "it has no weight"
    if isinstance(weight, UninitializedParameter):
        return "its weight is not initialised yet (a lazy module): run the model once, then patch"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.layout != torch.strided:
        return f"its weight has the layout {weight.layout}: hwkern packs dense weights"
    if weight.dtype not in ops.FLOATS:
        kind = "not a float weight" if not weight.is_floating_point() else "not a dtype that hwkern quantizes"
        return f"its weight is {dtype_name(weight.dtype)}: {kind} (float32, float16 or bfloat16)"
    if weight.dim() != 2:
        return f"its weight has the shape {tuple(weight.shape)}, not two dimensions"
    n, k = weight.shape[::-1] if transposed else weight.shape
    if n == 0 or k == 0:
        return f"its weight is empty ({n} outputs, {k} inputs)"
    if k > ops.K_MAX:
        return f"K = {k} inputs: an int32 sum is exact only below 2**17 = {ops.K_MAX + 1}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def quantize_weight(weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Quantize ``weight [N, K]`` per output channel and pack it.

    Args:
        weight: float32, float16 or bfloat16, any strides, any device (``meta`` gives ``meta`` results).
        device: where the results go and where the work is done; ``weight``'s device by default.

    Returns:
        ``[N, K16]`` int8 (K16: K rounded up to 16, zeros in the padding) and the float32 scale ``[N]``, equal to
        ``reference.quantize(weight)``. A row with NaN or ±inf has scale NaN.
    """
    n, k = weight.shape
    device = weight.device if device is None else device
    packed = torch.empty(n, ops.padded(k), dtype=torch.int8, device=device)
    scale = torch.empty(n, dtype=torch.float32, device=device)
    if packed.is_meta or weight.is_meta:
        return packed, scale
    packed[:, k:] = 0
    for rows in row_chunks(n, k, device):  # because quantizing makes float32 copies of its input
        packed[rows, :k], scale[rows] = ops.quantize(weight[rows].to(device))
    return packed, scale


def row_chunks(n: int, k: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices that cover the rows of an ``[n, k]`` tensor on ``device``, each small against the whole."""
    share = -(-n // _CHUNKS_PER_WEIGHT)
    if device is not None and device.type == "cuda":
        step = min(max(share, _CHUNK // k), _CUDA_CHUNK // k)
    else:
        step = min(share, _CHUNK // k)
    step = max(1, step)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def all_finite(scale: Tensor) -> bool:
    """Whether every row was quantized from finite values (always true on ``meta``)."""
    return scale.is_meta or bool(scale.isfinite().all())


def nonfinite_rows(scale: Tensor, rows: str = "output channels") -> str:
    """``"3 of 64 output channels"``: how many rows hold NaN or ±inf."""
    return f"{int((~scale.isfinite()).sum())} of {scale.numel()} {rows}"
