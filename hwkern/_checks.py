"""What the operators accept: the contract's constants, and for all else a sentence with the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hwkern._choice import CHOOSE as CHOOSE
from hwkern._choice import K_MAX as K_MAX

ROW_ALIGNMENT = 16  # bytes; hwkern.h kRowAlignment
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.int32: 4}  # hwkern.h DType
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # hwkern.h Activation


def padded(k: int) -> int:
    """K rounded up to a multiple of 16, the width of a packed weight row."""
    return -(-k // ROW_ALIGNMENT) * ROW_ALIGNMENT


def check(condition: bool, sentence: Callable[[], str], error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(sentence())


def check_float(x: Tensor) -> None:
    check(x.dtype in FLOATS, lambda: f"x is {x.dtype}: hwkern takes float32, float16 or bfloat16.", TypeError)
    check(x.dim() >= 1, lambda: "x is a scalar: hwkern needs at least one dimension, [..., K].")


def check_int8(name: str, q: Tensor) -> None:
    check(q.dtype == torch.int8, lambda: f"{name} is {q.dtype}: it must be int8.", TypeError)
    check(q.dim() >= 1, lambda: f"{name} is a scalar: it must be at least [K].")


def check_k(k: int) -> None:
    check(k >= 1, lambda: "the last dimension is empty: K must be at least 1.")
    check(
        k <= K_MAX,
        lambda: f"K = {k}: an int32 sum is exact only below 2**17 = {K_MAX + 1}; split the layer along K.",
    )


def check_same_device(**tensors: Tensor | None) -> None:
    present = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(present.values()))
    if any(device != first for device in present.values()):
        where = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"hwkern needs all tensors on one device, but got {where}: move them with .to(...).")


def check_scale(scale: Tensor, shape: Sequence[int], what: str) -> None:
    check(scale.dtype == torch.float32, lambda: f"{what} is {scale.dtype}: scales are float32.", TypeError)
    check(
        tuple(scale.shape) == tuple(shape),
        lambda: f"{what} has shape {tuple(scale.shape)}, but {tuple(shape)} is needed.",
    )


def check_static_scale(x: Tensor, scale: Tensor, axis: int) -> None:
    check(axis in (0, -1), lambda: f"axis = {axis}: 0 (one scale per row) or -1 (one per column).")
    check_same_device(x=x, scale=scale)
    if scale.numel() == 1:
        check(scale.dtype == torch.float32, lambda: f"scale is {scale.dtype}: scales are float32.", TypeError)
    else:
        check_scale(scale, x.shape[:-1] if axis == 0 else x.shape[-1:], f"scale (axis={axis})")


def check_bias(bias: Tensor | None, n: int) -> None:
    if bias is not None:
        check(bias.dtype in FLOATS, lambda: f"bias is {bias.dtype}: float32, float16 or bfloat16.", TypeError)
        check(tuple(bias.shape) == (n,), lambda: f"bias has shape {tuple(bias.shape)}, but ({n},) is needed.")


def check_out_dtype(dtype: torch.dtype, also: Sequence[torch.dtype] = ()) -> None:
    check(
        dtype in FLOATS or dtype in also,
        lambda: f"out_dtype = {dtype}: hwkern writes {', '.join(str(d) for d in (*FLOATS, *also))}.",
        TypeError,
    )


def check_options(activation: str, residual: Tensor | None, shape: Sequence[int]) -> None:
    """``activation`` and ``residual`` of an output of ``shape``."""
    check(
        activation in ACTIVATIONS,
        lambda: f"activation = {activation!r}: hwkern knows {', '.join(map(repr, ACTIVATIONS))}.",
    )
    if residual is not None:
        dtype = residual.dtype
        check(dtype in FLOATS, lambda: f"residual is {dtype}: float32, float16 or bfloat16.", TypeError)
        check(
            tuple(residual.shape) == tuple(shape),
            lambda: f"residual has shape {tuple(residual.shape)}, but the output's {tuple(shape)} is needed.",
        )


def check_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> torch.dtype:
    check_int8("a", a)
    check_int8("b", b)
    check(b.dim() == 2, lambda: f"b has shape {tuple(b.shape)}: it must be [N, K].")
    check(
        a.shape[-1] == b.shape[1],
        lambda: f"a has K = {a.shape[-1]} but b has K = {b.shape[1]}: a is [..., K] and b is [N, K].",
    )
    check_k(b.shape[1])
    check_same_device(a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias, residual=residual, out_scale=out_scale)
    check_options(activation, residual, (*a.shape[:-1], b.shape[0]))
    raw = scale_a is None and scale_b is None and bias is None and activation == "none" and residual is None
    dtype = out_dtype or (torch.int32 if raw else torch.float32)
    check_out_dtype(dtype, (torch.int8, torch.int32))
    check(
        raw or dtype != torch.int32,
        lambda: "out_dtype = torch.int32 is the raw sum: it takes no scale, bias, activation or residual.",
    )
    check(
        (dtype == torch.int8) == (out_scale is not None),
        lambda: f"out_dtype = {dtype} and out_scale = {out_scale}: out_scale comes with torch.int8 and only with it.",
    )
    if out_scale is not None:
        check(out_scale.dtype == torch.float32, lambda: f"out_scale is {out_scale.dtype}: float32.", TypeError)
        check(out_scale.numel() == 1, lambda: f"out_scale has {out_scale.numel()} elements: one is needed.")
    if scale_a is not None:
        check_scale(scale_a, a.shape[:-1], "scale_a")
    if scale_b is not None:
        check_scale(scale_b, b.shape[:1], "scale_b")
    check_bias(bias, b.shape[0])
    return dtype


def check_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> torch.dtype:
    check_float(x)
    check_int8("weight", weight)
    check(weight.dim() == 2, lambda: f"weight has shape {tuple(weight.shape)}: it must be [N, K16].")
    k = x.shape[-1]
    check_k(k)
    check(
        weight.shape[1] == padded(k),
        lambda: (
            f"x has K = {k} features, which needs a weight of {padded(k)} columns (K rounded up to 16), but the weight "
            f"has {weight.shape[1]}: check x's last dimension, or pack the weight with hwkern.ops.pad_weight."
        ),
    )
    check_same_device(x=x, weight=weight, weight_scale=weight_scale, bias=bias, residual=residual)
    check_options(activation, residual, (*x.shape[:-1], weight.shape[0]))
    check_scale(weight_scale, weight.shape[:1], "weight_scale")
    check_bias(bias, weight.shape[0])
    dtype = out_dtype or x.dtype
    check_out_dtype(dtype)
    return dtype
