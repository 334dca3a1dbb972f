"""Weight packing in numpy: the bits of ``hwkern.nn.pack.quantize_weight``, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QMAX = np.float32(127)
#: As in ``hwkern.reference``: the smallest normal float32.
SCALE_MIN = np.finfo(np.float32).tiny
K_MAX = 2**17 - 1
ROW_ALIGNMENT = 16

# Elements that are quantized at once: float32 temporaries of 4 MB stay in the caches.
_CHUNK = 2**20


def padded(k: int) -> int:
    """K rounded up to a multiple of 16, the width of a packed weight row."""
    return -(-k // ROW_ALIGNMENT) * ROW_ALIGNMENT


def quantize_weight(weight: NDArray[Any], factor: float = 1.0) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize ``weight [N, K] * factor`` per output channel and pack it.

    Args:
        weight: float32, float16, bfloat16 or float64, any strides.
        factor: multiplied in as float32 (Gemm's alpha).

    Returns:
        ``[N, K16]`` int8 with zeros in the padding, and the float32 scale ``[N]`` = ``max(absmax / 127, 2**-126)``. A
        row with NaN or ±inf has scale NaN.
    """
    n, k = weight.shape
    packed = np.zeros((n, padded(k)), np.int8)
    scale = np.empty(n, np.float32)
    step = max(1, _CHUNK // max(1, k))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            w = weight[rows].astype(np.float32)
            if factor != 1.0:
                w *= np.float32(factor)
            absmax = np.abs(w).max(axis=1)
            scale[rows] = np.where(np.isfinite(absmax), np.maximum(absmax / QMAX, SCALE_MIN), np.float32(np.nan))
            w *= (np.float32(1) / scale[rows])[:, None]
            np.rint(w, out=w)
            np.clip(w, -QMAX, QMAX, out=w)
            packed[rows, :k] = np.where(np.isnan(w), np.float32(0), w)
    return packed, scale


def pack(q: NDArray[np.int8]) -> NDArray[np.int8]:
    """``[N, K]`` int8 → ``[N, K16]`` with zeros in the padding."""
    n, k = q.shape
    if padded(k) == k:
        return np.ascontiguousarray(q)
    packed = np.zeros((n, padded(k)), np.int8)
    packed[:, :k] = q
    return packed


def as_int32(packed: NDArray[np.int8]) -> NDArray[np.int32]:
    """The same bytes as INT32 ``[N, K16 / 4]``: TensorRT before 10.1 takes no INT8 constant as a plugin's input."""
    return np.ascontiguousarray(packed).view(np.int32)
