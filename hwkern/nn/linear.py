"""Int8Linear: ``nn.Linear`` with an int8 weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hwkern import ops
from hwkern.nn.pack import all_finite, dtype_name, nonfinite_rows, quantize_weight, row_chunks, weight_problem
from hwkern.reference import SCALE_MIN

if TYPE_CHECKING:
    from typing_extensions import Self

    from hwkern._originals import Original
    from hwkern.nn.merged import Part


class Int8Linear(nn.Module):
    """``y = x @ weight.T + bias`` with an int8 weight; ``x`` is quantized per token inside.

    Attributes:
        weight: ``[N, K16]`` int8 (K16: ``in_features`` rounded up to 16, zeros in the padding). A Parameter, so that
            a weight shared by several layers stays shared under ``.to()``; it never takes a gradient.
        weight_scale: ``[N]`` float32 buffer, one scale per output channel. Stays float32 under ``.half()`` and so on.
        bias: ``[N]`` of any float dtype, or None. May be trained.
        float_dtype: the dtype that a float weight would have in this layer's place: the original's, or that of the
            last ``.half()``, ``.to(dtype)`` …; :meth:`to_float` and ``hwkern.unpatch`` return it.

    ``x`` is ``[..., K]`` in float32, float16 or bfloat16; the output has x's dtype (autocast's under autocast).
    Gradients reach ``x`` and ``bias``. The constructor makes a layer of zeros, to be filled by ``load_state_dict``;
    ``load_state_dict`` takes int8 states and, quantizing on the way, float states of the original layer.
    """

    weight: nn.Parameter
    weight_scale: Tensor
    bias: nn.Parameter | None
    # hwkern.patch's handle on the float module; not a submodule, not in the state_dict.
    _original: Original | None
    # The layer's place among layers that are computed as one (hwkern.nn.merged); None: alone.
    _part: Part | None = None
    _transposed = False  # whether the float weight is [K, N]
    _scheme = "w8a8"
    # Buffers that .half() and so on leave in float32.
    _float32: tuple[str, ...] = ("weight_scale",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: that of the bias, and ``float_dtype``; torch's default dtype when None."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        problem = weight_problem(torch.empty(out_features, in_features, dtype=dtype, device="meta"))
        if problem is not None:
            raise ValueError(f"{type(self).__name__}({in_features}, {out_features}) is not possible: {problem}.")
        packed = torch.zeros(out_features, ops.padded(in_features), dtype=torch.int8, device=device)
        scale = torch.full((out_features,), SCALE_MIN, dtype=torch.float32, device=device)
        new_bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self._fill(in_features, nn.Parameter(packed, requires_grad=False), scale, new_bias, dtype)

    def _fill(
        self, in_features: int, weight: nn.Parameter, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = weight.shape[0]
        self.float_dtype = dtype
        self._original = None
        self._cell = ops.LaunchCell()
        self.weight = weight
        self.register_buffer("weight_scale", scale)
        self.register_parameter("bias", bias)

    @classmethod
    def _from_packed(
        cls, in_features: int, weight: nn.Parameter, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> Self:
        """A layer around tensors that already exist (no copies, no checks); ``dtype`` is the float weight's."""
        layer = cls.__new__(cls)
        layer._fill(in_features, weight, scale, bias, dtype)
        return layer

    @classmethod
    def from_float(cls, linear: nn.Module) -> Self:
        """The int8 layer for a float layer, on its device, with the very same bias Parameter. ``linear`` is untouched.

        Raises:
            TypeError: ``linear`` is not a layer of the kind this class replaces.
            ValueError: its weight cannot become int8; the message says why.
        """
        if not cls._replaces(linear):
            raise TypeError(f"{cls.__name__}.from_float takes {cls._float_name}, not {type(linear).__name__}.")
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        problem = weight_problem(weight, cls._transposed)
        if problem is not None or weight is None:
            raise ValueError(f"This {type(linear).__name__} cannot become {cls.__name__}: {problem}.")
        rows = cls._rows(weight.detach())
        packed, scale = quantize_weight(rows)
        if not all_finite(scale):
            raise ValueError(
                f"This {type(linear).__name__} cannot become {cls.__name__}: its weight has NaN or ±inf in "
                f"{nonfinite_rows(scale)}."
            )
        parameter = nn.Parameter(packed, requires_grad=False)
        return cls._from_packed(rows.shape[1], parameter, scale, bias, weight.dtype).train(linear.training)

    _float_name = "an nn.Linear"

    @staticmethod
    def _replaces(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @classmethod
    def _rows(cls, weight: Tensor) -> Tensor:
        """A float weight as ``[N, K]``, without a copy; its own inverse."""
        return weight.t() if cls._transposed else weight

    def _pack(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The tensors of this layer that follow from a float weight ``rows [N, K]``, by name, on ``device``."""
        weight, scale = quantize_weight(rows, device)
        return {"weight": weight, "weight_scale": scale}

    def _unpack(self, rows: slice) -> Tensor:
        """Rows of the dequantized weight as float32 ``[..., K]``."""
        return self.weight[rows, : self.in_features].float() * self.weight_scale[rows].unsqueeze(-1)

    @property
    def scheme(self) -> str:
        """How this layer computes: "w8a8" (dynamic scale per token), "w8a8-static", "w8a8-asymmetric", "w8a16", …"""
        return self._scheme

    def _options(self) -> dict[str, Any]:
        """What, beside sizes and dtypes, a layer of zeros needs to take this layer's state; plain data for JSON."""
        return {}

    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Turn a layer of zeros into one with these :meth:`_options`. KeyError, TypeError, ValueError for nonsense."""
        if options:
            raise ValueError(f"{type(self).__name__} has no options, but got {sorted(options)}")

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new float layer with the dequantized weight ``weight * weight_scale`` and a copy of the bias.

        ``dtype`` defaults to ``float_dtype``. This is the int8 weight in float, not the original weight: that one
        comes back with ``hwkern.unpatch``.
        """
        dtype = self.float_dtype if dtype is None else dtype
        linear = self._empty_float(dtype)
        with torch.no_grad():
            target = self._rows(linear.weight)
            for rows in row_chunks(self.out_features, self.in_features):
                target[rows] = self._unpack(rows)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def _empty_float(self, dtype: torch.dtype) -> Any:
        has_bias = self.bias is not None
        return nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, bias=has_bias, device=self.weight.device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` -> ``[..., N]`` in x's dtype."""
        if self._part is not None and x.shape[-1:] == (self._part.n,):  # the product of all parts: take mine
            return x[..., self._part.start : self._part.stop]
        # Straight from the dicts: nn.Module.__getattr__ costs 0.5 µs each time.
        parameters = self._parameters
        scale, bias = self._buffers["weight_scale"], parameters["bias"]
        return ops.eager_linear(x, parameters["weight"], scale, bias, self.in_features, self._cell)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """As nn.Linear's, plus the weight's dtype."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, weight=int8"

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezing works; asking for gradients is an error, because an int8 weight has none.

        Raises:
            RuntimeError: ``requires_grad`` is true.
        """
        if requires_grad:
            raise RuntimeError(
                "The weight of an Int8Linear is int8 and has no gradient, so the layer cannot be trained as a whole: "
                "train its bias (layer.bias.requires_grad_()), put an adapter (LoRA) on top, or hwkern.unpatch(model)."
            )
        return super().requires_grad_(False)

    # ---- .to(), .half(), .cuda(), to_empty() … ---------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the layer, but keep the weight int8 and its scale float32: together they are one format."""
        weight, scale = self.weight, self.weight_scale
        fixed = [weight, *(self._buffers[name] for name in self._float32)]

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if any(tensor is one for one in fixed):
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            return moved

        with torch.no_grad():
            dtype = fn(torch.empty(0, dtype=self.float_dtype, device=weight.device)).dtype
        super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]
        if dtype.is_floating_point:
            self.float_dtype = dtype
        moved_scale = self.weight_scale
        if moved_scale is not scale and self.weight is weight:
            # The weight moved in place, so layers that share it still do; let them share the scale too.
            scale.data = moved_scale
            self.weight_scale = scale
        if self._part is not None:
            self._part.moved()
        return self

    # ---- load_state_dict -------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads an int8 state, or a float state of the original layer, which is quantized on the way."""
        state = dict(state_dict)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        weight_key, scale_key = prefix + "weight", prefix + "weight_scale"
        weight = state.get(weight_key)
        problem = None
        if isinstance(weight, Tensor) and weight.is_floating_point() and scale_key not in state:
            problem = self._float_state_problem(weight)
            if problem is None:
                target = weight.device if assign or self.weight.is_meta else self.weight.device
                for name, tensor in self._pack(self._rows(weight.detach()), target).items():
                    state[prefix + name] = tensor
                problem = self._scale_problem(state[scale_key])
        elif weight_key in state or scale_key in state:
            problem = self._int8_state_problem(weight, state.get(scale_key))
        if problem is not None:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {problem}.")
            return
        same = self._same_weights(state.get(weight_key), state.get(scale_key))
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if assign and isinstance(weight, Tensor) and weight.is_floating_point():
            self.float_dtype = weight.dtype
        if self._part is not None:
            self._part.moved()
        if self._original is not None and not same:
            self._original.forget("other weights were loaded into it after hwkern.patch")

    def _float_state_problem(self, weight: Tensor) -> str | None:
        problem = weight_problem(weight, self._transposed)
        expected = (self.out_features, self.in_features)[:: -1 if self._transposed else 1]
        if problem is None and tuple(weight.shape) != expected:
            return f"the float weight has the shape {tuple(weight.shape)}, but this layer needs {expected}"
        return problem

    def _int8_state_problem(self, weight: Tensor | None, scale: Tensor | None) -> str | None:
        if weight is None or scale is None:
            there, absent = ("weight_scale", "weight") if weight is None else ("weight", "weight_scale")
            return (
                f"the state has {there} but no {absent}: an int8 weight and its scales belong together (the state_dict "
                "of a patched model holds both, that of a float model a float weight)"
            )
        if weight.dtype != torch.int8:
            return f"weight is {dtype_name(weight.dtype)} next to a weight_scale: it must be int8"
        expected = (self.out_features, ops.padded(self.in_features))
        if tuple(weight.shape) != expected:
            return f"the int8 weight has the shape {tuple(weight.shape)}, but this layer needs {expected}"
        if scale.dtype != torch.float32:
            return (
                f"weight_scale is {dtype_name(scale.dtype)}: it must be float32; something has cast the state, so take "
                "state_dict() again and leave its dtypes"
            )
        if tuple(scale.shape) != (self.out_features,):
            return f"weight_scale has the shape {tuple(scale.shape)}, but this layer needs ({self.out_features},)"
        return self._scale_problem(scale)

    @staticmethod
    def _scale_problem(scale: Tensor) -> str | None:
        return None if all_finite(scale) else f"the weight has NaN or ±inf in {nonfinite_rows(scale)}"

    def _same_weights(self, weight: Tensor | None, scale: Tensor | None) -> bool:
        if weight is None or scale is None:
            return True  # nothing of the weight is loaded
        if weight.is_meta or scale.is_meta or self.weight.is_meta:
            return False
        return torch.equal(self.weight, weight.to(self.weight.device)) and torch.equal(
            self.weight_scale, scale.to(self.weight.device)
        )
