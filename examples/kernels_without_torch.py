"""One INT8 linear layer on CuPy's or pycuda's arrays, without torch: y = x · Wᵀ + b in float16.

    python examples/kernels_without_torch.py [--m 16] [--n 512] [--k 256]

The kernels take addresses and a stream, so any library's arrays will do. On a machine without a GPU the same formula
runs in numpy, and the example says which kernel an H100 would take.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from hwkern import _native
from hwkern.tensorrt.packing import padded, quantize_weight

FLOAT16 = 1  # hwkern.h's DType
CHOOSE = -1  # let the cost model choose


def in_numpy(x: Any, packed: Any, scale: Any, bias: Any) -> Any:
    """What the kernels compute: a scale per row of x, the exact int32 product, both scales, the bias, one rounding."""
    x = x.astype(np.float32)
    row = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    q = np.clip(np.rint(x * (np.float32(1) / row)), -127, 127).astype(np.int32)
    product = q @ packed[:, : x.shape[1]].astype(np.int32).T
    return (product.astype(np.float32) * row * scale + bias.astype(np.float32)).astype(np.float16)


def on_the_gpu(x: Any, packed: Any, scale: Any, bias: Any) -> tuple[str, Any]:
    """(library, y). ImportError when neither CuPy nor pycuda is there."""
    native = _native.extension()
    (m, k), n = x.shape, packed.shape[0]
    size = int(native.linear_workspace_bytes(m, k))
    try:
        import cupy

        arrays = [cupy.asarray(a) for a in (x, packed, scale, bias)]
        y, scratch = cupy.empty((m, n), np.float16), cupy.empty(size, np.uint8)
        addresses = [a.data.ptr for a in (*arrays, y, scratch)]
        stream, library, fetch = cupy.cuda.get_current_stream().ptr, "CuPy", lambda: cupy.asnumpy(y)
    except ImportError:
        from pycuda import gpuarray

        arrays = [gpuarray.to_gpu(a) for a in (x, packed, scale, bias)]
        y, scratch = gpuarray.empty((m, n), np.float16), gpuarray.empty(size, np.uint8)
        addresses = [int(a.gpudata) for a in (*arrays, y, scratch)]
        stream, library, fetch = 0, "pycuda", lambda: y.get()
    x_at, weight_at, scale_at, bias_at, y_at, scratch_at = addresses
    native.linear(
        x_at,
        FLOAT16,
        k,
        weight_at,
        padded(k),
        scale_at,
        bias_at,
        FLOAT16,
        y_at,
        n,
        FLOAT16,
        m,
        n,
        k,
        CHOOSE,
        scratch_at,
        size,
        stream,
        0,
        0,
        0,
        0,
    )  # fmt: skip  (the zeros: no activation, no residual)
    return library, fetch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("m", 16), ("n", 512), ("k", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    m, n, k = arguments.m, arguments.n, arguments.k
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, k)).astype(np.float16)
    weight, bias = rng.standard_normal((n, k)) * 0.05, rng.standard_normal(n).astype(np.float16)
    packed, scale = quantize_weight(weight.astype(np.float32))
    wanted = in_numpy(x, packed, scale, bias)
    exact = x.astype(np.float64) @ weight.T + bias
    error = np.linalg.norm(wanted - exact) / np.linalg.norm(exact)
    print(f"INT8 against float64: relative error {error:.2%}")
    if (problem := _native.cuda_problem()) is not None:
        native = _native.extension()
        config = native.gemm_choose(m, n, k, 132, 90, 232_448) if native.built_with_cuda else None
        print(f"computed in numpy: {problem}")
        print(f"an H100 would take the kernel with config {config}")
        return
    library, y = on_the_gpu(x, packed, scale, bias)
    worst = np.abs(y.astype(np.float32) - wanted.astype(np.float32)).max()
    print(f"{library}: largest difference to numpy {worst:.2e}, one rounding to float16 at most")


if __name__ == "__main__":
    main()
