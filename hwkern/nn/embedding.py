"""Int8Embedding: ``nn.Embedding`` with an int8 table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hwkern import ops
from hwkern.nn.pack import all_finite, nonfinite_rows, quantize_weight, row_chunks, weight_problem
from hwkern.nn.packed import PackedLayer
from hwkern.reference import SCALE_MIN

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Embedding(PackedLayer):
    """``y = (weight * weight_scale[:, None])[indices]``: rows of an int8 table, widened as they are read.

    Attributes:
        weight: ``[V, H16]`` int8 (H16: ``embedding_dim`` rounded up to 16, zeros in the padding), a Parameter without a
            gradient. An int8 linear takes the same tensor: an output head that shares its weight shares this one.
        weight_scale: ``[V]`` float32 buffer, one scale a row, which is one an output channel of such a head.
        num_embeddings, embedding_dim, padding_idx: as nn.Embedding's. A row of zeros stays a row of zeros.
        float_dtype: of the output: that of the float table, or of the last ``.half()``, ``.to(dtype)`` …

    ``indices`` are int64 or int32 of any shape. The table is frozen. The constructor makes a table of zeros, to be
    filled by ``load_state_dict``, which takes int8 states and, quantizing on the way, those of an nn.Embedding.
    """

    _scheme = "int8"
    # What transformers and others ask of an nn.Embedding; `problem` says why only these values.
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: ``float_dtype``; torch's default dtype when None."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        problem = weight_problem(torch.empty(num_embeddings, embedding_dim, dtype=dtype, device="meta"))
        if problem is not None:
            raise ValueError(f"Int8Embedding({num_embeddings}, {embedding_dim}) is not possible: {problem}.")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx = {padding_idx} is no row of {num_embeddings}.")
        packed = torch.zeros(num_embeddings, ops.padded(embedding_dim), dtype=torch.int8, device=device)
        scale = torch.full((num_embeddings,), SCALE_MIN, dtype=torch.float32, device=device)
        self._fill(embedding_dim, nn.Parameter(packed, requires_grad=False), scale, dtype, padding_idx)

    def _fill(
        self, embedding_dim: int, weight: nn.Parameter, scale: Tensor, dtype: torch.dtype, padding_idx: int | None
    ) -> None:
        self._hold(weight, scale, dtype)
        self._cell = ops.TableCell()
        self.num_embeddings = weight.shape[0]
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % self.num_embeddings  # as nn.Embedding has it

    def _size(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @staticmethod
    def _replaces(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def _around(cls, embedding: nn.Module, weight: nn.Parameter, scale: Tensor) -> Self:
        """The layer in the place of a float one, on tensors that exist (no copies, no checks)."""
        float_one: Any = embedding
        layer = cls.__new__(cls)
        layer._fill(float_one.embedding_dim, weight, scale, float_one.weight.dtype, float_one.padding_idx)
        return layer.train(embedding.training)

    @classmethod
    def from_float(cls, embedding: nn.Module) -> Self:
        """The int8 table of an nn.Embedding, on its device. ``embedding`` is untouched.

        Raises:
            TypeError: ``embedding`` is no nn.Embedding.
            ValueError: it cannot become int8; the message says why.
        """
        if not cls._replaces(embedding):
            raise TypeError(f"Int8Embedding.from_float takes an nn.Embedding, not {type(embedding).__name__}.")
        weight = embedding._parameters.get("weight")
        problem = embedding_problem(embedding) or weight_problem(weight)
        if problem or weight is None:
            raise ValueError(f"This {type(embedding).__name__} cannot become Int8Embedding: {problem}.")
        packed, scale = quantize_weight(weight.detach())
        if not all_finite(scale):
            bad = nonfinite_rows(scale, "rows")
            raise ValueError(f"This {type(embedding).__name__} cannot become Int8Embedding: NaN or ±inf in {bad}.")
        return cls._around(embedding, nn.Parameter(packed, requires_grad=False), scale)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A new nn.Embedding with the dequantized table; ``dtype`` defaults to ``float_dtype``."""
        dtype = self.float_dtype if dtype is None else dtype
        made = nn.utils.skip_init(
            nn.Embedding, self.num_embeddings, self.embedding_dim, self.padding_idx, device=self.weight.device,
            dtype=dtype,
        )  # fmt: skip
        with torch.no_grad():
            for rows in row_chunks(self.num_embeddings, self.embedding_dim):
                made.weight[rows] = self._unpack(rows)
        found: nn.Embedding = made.train(self.training)
        return found

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Embedding's name, for calls by keyword
        """``indices [...]`` -> ``[..., H]`` in ``float_dtype``."""
        weight, scale = self._parameters["weight"], self._buffers["weight_scale"]
        if weight is None or scale is None:
            raise self._incomplete()
        return ops.eager_embedding(input, weight, scale, self.float_dtype, self.embedding_dim, self._cell)

    def extra_repr(self) -> str:
        """As nn.Embedding's, plus the table's dtype."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, weight=int8"

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezing works; asking for gradients is an error, because an int8 table has none."""
        if requires_grad:
            raise RuntimeError(
                "The weight of an Int8Embedding is int8 and has no gradient: freeze it, or hwkern.unpatch(model) and "
                "train the float table."
            )
        return super().requires_grad_(False)


def embedding_problem(module: nn.Module) -> str:
    """Why an nn.Embedding's options keep it from becoming int8, as a part of a sentence; empty when they do not."""
    options: Any = module
    if options.max_norm is not None:
        return f"it has max_norm = {options.max_norm}, which rewrites rows of the table in every call"
    if options.sparse or options.scale_grad_by_freq:
        which = "sparse" if options.sparse else "scale_grad_by_freq"
        return f"it has {which} = True: it is there to be trained, and an int8 table has no gradient"
    return ""
