"""Int8Conv1D: transformers' ``Conv1D`` (GPT-2's linear layer, with a ``[K, N]`` weight) with an int8 weight."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from hwkern.nn.linear import Int8Linear


def conv1d_class() -> type[nn.Module] | None:
    """transformers' ``Conv1D``, or None while nobody has imported it (so no model can hold one)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


class Int8Conv1D(Int8Linear):
    """``y = x @ W + bias`` for a float ``W [K, N]``; inside it is an :class:`Int8Linear` with ``weight [N, K16]``.

    Attributes:
        nf: output features, as in transformers' Conv1D.
        nx: input features.
    """

    _transposed = True
    _float_name = "a transformers Conv1D"

    @property
    def nf(self) -> int:
        return self.out_features

    @property
    def nx(self) -> int:
        return self.in_features

    @staticmethod
    def _replaces(module: nn.Module) -> bool:
        cls = conv1d_class()
        return cls is not None and isinstance(module, cls)

    def _empty_float(self, dtype: torch.dtype) -> Any:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(self.nf, self.nx)
        return layer.to_empty(device=self.weight.device).to(dtype)
