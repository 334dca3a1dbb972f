"""PackedLayer: what every layer around an int8 weight and its scales has, whatever it computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hwkern import ops
from hwkern.nn.pack import all_finite, dtype_name, nonfinite_rows, quantize_weight, weight_problem

if TYPE_CHECKING:
    from typing_extensions import Self

    from hwkern._originals import Original


class PackedLayer(nn.Module):
    """A packed int8 weight ``[N, K16]`` with one float32 scale a row, as a linear layer or an embedding holds it.

    Attributes:
        weight: int8 (K16: K rounded up to 16, zeros in the padding). A Parameter, so that a weight shared by several
            layers stays shared under ``.to()``; it never takes a gradient.
        weight_scale: ``[N]`` float32 buffer. Stays float32 under ``.half()`` and so on.
        float_dtype: the dtype that a float weight would have in this layer's place: the original's, or that of the
            last ``.half()``, ``.to(dtype)`` …
    """

    weight: nn.Parameter
    weight_scale: Tensor
    float_dtype: torch.dtype
    # hwkern.patch's handle on the float module; not a submodule, not in the state_dict.
    _original: Original | None
    _transposed = False  # whether the float weight is [K, N]
    _scheme = ""
    # Buffers that .half() and so on leave in float32.
    _float32: tuple[str, ...] = ("weight_scale",)

    def _hold(self, weight: nn.Parameter, scale: Tensor, dtype: torch.dtype) -> None:
        """The part of a constructor that all have."""
        nn.Module.__init__(self)
        self.float_dtype = dtype
        self._original = None
        self.weight = weight
        self.register_buffer("weight_scale", scale)

    def _size(self) -> tuple[int, int]:
        """``(N, K)``."""
        raise NotImplementedError

    @staticmethod
    def _replaces(module: nn.Module) -> bool:
        raise NotImplementedError

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new float layer with the dequantized weight; ``dtype`` defaults to ``float_dtype``."""
        raise NotImplementedError

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
        return self.weight[rows, : self._size()[1]].float() * self.weight_scale[rows].unsqueeze(-1)

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

    def _incomplete(self) -> RuntimeError:
        """What a call raises once the weight or its scales are None."""
        what = "weight" if self.weight is None else "weight_scale"
        return RuntimeError(
            f"{type(self).__name__}({self.extra_repr()}) cannot be called: its {what} is None. Assign the one that "
            "belongs to this layer again."
        )

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
        if self._original is not None and not same:
            self._original.forget("other weights were loaded into it after hwkern.patch")

    def _float_state_problem(self, weight: Tensor) -> str | None:
        problem = weight_problem(weight, self._transposed)
        expected = self._size()[:: -1 if self._transposed else 1]
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
        n, k = self._size()
        expected = (n, ops.padded(k))
        if tuple(weight.shape) != expected:
            return f"the int8 weight has the shape {tuple(weight.shape)}, but this layer needs {expected}"
        if scale.dtype != torch.float32:
            return (
                f"weight_scale is {dtype_name(scale.dtype)}: it must be float32; something has cast the state, so take "
                "state_dict() again and leave its dtypes"
            )
        if tuple(scale.shape) != (n,):
            return f"weight_scale has the shape {tuple(scale.shape)}, but this layer needs ({n},)"
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
