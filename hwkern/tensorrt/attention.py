"""Finds attention in a graph: what lies between the products that give q, k and v and the one that reads the heads.

Exporters agree on the whole (scores, scale, mask, softmax, context) and differ in the parts: where the scale stands,
how keys are transposed, whether heads share keys and values, rotary embeddings. So each part is optional here, and
whatever is not understood leaves the attention as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from hwkern.tensorrt.graph import Array, Constants, Scope, attribute

Types = Mapping[str, tuple[int, "tuple[int | str | None, ...] | None"]]
DIMS = (32, 64, 128)  # of a head, that the kernel has
_HIDDEN = -1e4  # what exporters add to a score that is not to be seen, or less


@dataclass
class Attention:
    """One attention: ``y = softmax(scale · rotated(q) · rotated(k)ᵀ + mask) · v``."""

    q: str = ""
    k: str = ""
    v: str = ""
    y: str = ""
    heads: int = 0
    kv_heads: int = 0
    dim: int = 0
    scale: float = 1.0
    causal: bool = False
    mask: str = ""
    cosine: str = ""
    sine: str = ""
    nodes: list[NodeProto] = field(default_factory=list)  # the last one, in the graph's order, gives y


class _Other(Exception):  # noqa: N818
    """This is no attention that the kernel knows."""


class Finder:
    """Attention in one graph."""

    def __init__(
        self, scope: Scope, types: Types, constants: Constants, only_consumer: Callable[[str], NodeProto | None],
        private: Callable[[list[NodeProto], str], bool],
    ) -> None:  # fmt: skip
        """``only_consumer``: the one node that reads a tensor. ``private``: whether nodes' results are read by these
        nodes alone, but for the one that is named."""
        self.scope, self.types, self.constants = scope, types, constants
        self.only_consumer, self.private = only_consumer, private

    def find(self) -> list[Attention]:
        found = []
        for node in self.scope.graph.node:
            if node.op_type == "Softmax" and node.domain in ("", "ai.onnx"):
                try:
                    found.append(self._attention(node))
                except _Other:
                    continue
        return found

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _attention(self, softmax: NodeProto) -> Attention:
        found = Attention(nodes=[softmax])
        rank = len(self._dims(softmax.output[0]))
        if rank != 4 or attribute(softmax, "axis", -1) not in (-1, 3):
            raise _Other
        context = self._next(found, softmax, "MatMul", "Einsum")
        if context.input[0] != softmax.output[0]:
            raise _Other
        joined = self._next(found, self._next(found, context, "Transpose", perm=[0, 2, 1, 3]), "Reshape")
        found.y = joined.output[0]

        scores = self._mask(found, softmax.input[0])
        product = self._by(found, self._scaled(found, scores), "MatMul", "Einsum")
        q, rotary_q, found.q = self._heads(found, product.input[0], transposed=False)
        k, rotary_k, found.k = self._heads(found, product.input[1], transposed=True)
        scale = found.scale
        v, rotary_v, found.v = self._heads(found, context.input[1], transposed=False)
        if found.scale != scale:  # of the values: it is not the softmax's
            raise _Other
        if q[1] != k[1] or k != v or rotary_q != rotary_k or rotary_v is not None or q[0] % k[0] or q[1] not in DIMS:
            raise _Other
        (found.heads, found.dim), found.kv_heads = q, k[0]
        found.cosine, found.sine = rotary_q or ("", "")
        wide, columns = self._dims(found.y), found.heads * found.dim
        if len(wide) != 3 or wide[:2] != self._dims(found.q)[:2] or wide[2] not in (columns, *_unknown(wide[2])):
            raise _Other
        if not found.scale > 0:
            raise _Other
        found.nodes = list({id(node): node for node in found.nodes}.values())
        if not self.private(found.nodes, found.y):
            raise _Other
        return found

    def _mask(self, found: Attention, scores: str) -> str:
        """The scores before a mask was added."""
        node = self._maybe(scores, "Add")
        if node is None:
            return scores
        of_scores = [self._is_scores(name) for name in node.input]
        if sum(of_scores) != 1:
            raise _Other
        found.nodes.append(node)
        before, mask = node.input if of_scores[0] else (node.input[1], node.input[0])
        shape, whole = self._dims(mask), self._dims(scores)
        constant = self.constants.find(mask, self.scope)
        if constant is not None and self._is_causal(np.asarray(constant.load()), whole):
            found.causal = True
        elif not shape or len(shape) > 4 or shape[-1] == 1:
            raise _Other
        else:
            found.mask = mask
        return before

    def _is_scores(self, name: str) -> bool:
        """Whether a product gives it, scaled perhaps."""
        for _ in range(2):
            node = self.scope.producers.get(name)
            if node is None or node.op_type in ("MatMul", "Einsum"):
                return node is not None
            if node.op_type not in ("Mul", "Div"):
                return False
            name = next((each for each in node.input if self.constants.find(each, self.scope) is None), "")
        return False

    @staticmethod
    def _is_causal(mask: Array, scores: tuple[int | str | None, ...]) -> bool:
        length = mask.shape[-1] if mask.ndim >= 2 else 0
        if mask.shape[-2:] != (length, length) or mask.size != length**2 or tuple(scores[-2:]) != (length, length):
            return False
        seen = np.tri(length, dtype=bool)
        mask = mask.reshape(length, length)
        return bool((mask[seen] == 0).all() and (mask[~seen] <= _HIDDEN).all())

    def _scaled(self, found: Attention, name: str) -> str:
        """The tensor before it was multiplied with a number."""
        while (node := self._maybe(name, "Mul", "Div")) is not None:
            numbers = [self.constants.scalar(each, self.scope) for each in node.input]
            if node.op_type == "Div" and numbers[1]:
                factor, name = 1 / numbers[1], node.input[0]
            elif node.op_type == "Mul" and (numbers[0] is None) != (numbers[1] is None):
                at = 0 if numbers[0] is not None else 1
                factor, name = numbers[at] or 0.0, node.input[1 - at]
            else:
                break
            found.scale *= factor
            found.nodes.append(node)
        return name

    def _heads(
        self, found: Attention, name: str, transposed: bool
    ) -> tuple[tuple[int, int], tuple[str, str] | None, str]:
        """((heads, dim), (cosine, sine) of a rotary embedding, the product's result) of one operand [B, H, L, D]."""
        name = self._scaled(found, name)
        is_split = False  # by a Transpose that swaps the last two dimensions as well
        if transposed:
            node = self._by(found, name, "Transpose")
            if attribute(node, "perm", None) == [0, 2, 3, 1]:
                name, is_split = node.input[0], True
            elif attribute(node, "perm", None) == [0, 1, 3, 2]:
                name = self._scaled(found, node.input[0])
            else:
                raise _Other
        rotary = None
        if not is_split:
            name = self._repeated(found, name)
            if (added := self._maybe(name, "Add")) is not None:
                rotary, name = self._rotary(found, added)
            name = self._by(found, self._scaled(found, name), "Transpose", perm=[0, 2, 1, 3]).input[0]
        node = self._by(found, name, "Reshape")
        dims, wide = self._dims(name), self._dims(node.input[0])
        if len(dims) != 4 or len(wide) != 3 or dims[:2] != wide[:2]:
            raise _Other
        dim, columns = dims[3], wide[2]
        if not isinstance(dim, int) or not isinstance(columns, int) or columns % dim:
            raise _Other
        heads = columns // dim
        if dims[2] not in (heads, *_unknown(dims[2])):
            raise _Other
        return (heads, dim), rotary, node.input[0]

    def _repeated(self, found: Attention, name: str) -> str:
        """The heads before each was repeated for a group of queries: [B, H, L, D] → [B, H, R, L, D] →
        [B, H·R, L, D]."""
        node = self._maybe(name, "Reshape")
        if node is None:
            return name
        expand = self._by(found, node.input[0], "Expand")
        unsqueeze = self._by(found, expand.input[0], "Unsqueeze")
        before, after = self._dims(unsqueeze.output[0]), self._dims(expand.output[0])
        whole = self._dims(name)
        if len(before) != 5 or before[2] != 1 or after[:2] + after[3:] != before[:2] + before[3:] or len(whole) != 4:
            raise _Other
        if not (isinstance(after[1], int) and isinstance(after[2], int)) or whole[1] != after[1] * after[2]:
            raise _Other
        found.nodes.append(node)
        return unsqueeze.input[0]

    def _rotary(self, found: Attention, add: NodeProto) -> tuple[tuple[str, str], str]:
        """x · cosine + concat(-x[…, D/2:], x[…, :D/2]) · sine → ((cosine, sine), x)."""
        found.nodes.append(add)
        products = [self._by(found, name, "Mul") for name in add.input]
        for straight, crossed in (products, products[::-1]):
            for i in (0, 1):
                concat = self._maybe(crossed.input[i], "Concat")
                if concat is None or attribute(concat, "axis", 0) not in (-1, 3) or len(concat.input) != 2:
                    continue
                negated = self._by(found, concat.input[0], "Neg")
                high, low = self._by(found, negated.input[0], "Slice"), self._by(found, concat.input[1], "Slice")
                x = low.input[0]
                half = self._dims(x)[-1]
                if x not in straight.input or high.input[0] != x or not isinstance(half, int):
                    raise _Other
                if self._range(low, half) != (0, half // 2) or self._range(high, half) != (half // 2, half):
                    raise _Other
                cosine, sine = next(name for name in straight.input if name != x), crossed.input[1 - i]
                for dims in (self._dims(cosine), self._dims(sine)):  # [L, D], after dimensions of 1
                    one_for_all = len(dims) < 2 or (dims[-2] == 1 and self._dims(x)[-2] != 1)
                    if one_for_all or dims[-1] != half or any(d != 1 for d in dims[:-2]):
                        raise _Other
                found.nodes.append(concat)
                return (cosine, sine), x
        raise _Other

    def _range(self, node: NodeProto, size: int) -> tuple[int, int] | None:
        """(start, end) of a Slice with step 1 along the last dimension."""
        values = [self.constants.scalar(name, self.scope) for name in node.input[1:]]
        if len(values) < 3 or None in values or values[2] not in (-1, 3) or values[3:] not in ([], [1]):
            return None
        start, end = int(values[0] or 0), int(values[1] or 0)
        return start, min(end, size) if end >= 0 else end + size

    # ---- nodes -----------------------------------------------------------------------------------------------------

    def _dims(self, name: str) -> tuple[int | str | None, ...]:
        dims = self.types.get(name, (0, None))[1]
        if dims is None:
            raise _Other
        return dims

    def _maybe(self, name: str, *ops: str) -> NodeProto | None:
        """The node that gives ``name``, if it is one of these."""
        node = self.scope.producers.get(name)
        return node if node is not None and node.op_type in ops and node.domain in ("", "ai.onnx") else None

    def _by(self, found: Attention, name: str, *ops: str, perm: list[int] | None = None) -> NodeProto:
        node = self._maybe(name, *ops)
        return self._kept(found, node, perm)

    def _next(self, found: Attention, node: NodeProto, *ops: str, perm: list[int] | None = None) -> NodeProto:
        after = self.only_consumer(node.output[0])
        return self._kept(found, after if after is not None and after.op_type in ops else None, perm)

    @staticmethod
    def _kept(found: Attention, node: NodeProto | None, perm: list[int] | None) -> NodeProto:
        if node is None or (perm is not None and attribute(node, "perm", None) != perm):
            raise _Other
        if node.op_type == "Einsum" and not _is_product(attribute(node, "equation", b"").decode()):
            raise _Other
        found.nodes.append(node)
        return node


def _unknown(size: int | str | None) -> tuple[str | None, ...]:
    """The size, where it is not known: a Reshape to -1 through computed shapes."""
    return () if isinstance(size, int) else (size,)


def _is_product(equation: str) -> bool:
    """Whether an Einsum is a MatMul with leading dimensions."""
    inputs, _, y = equation.replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    same = len(a) == len(b) == len(y) > 1 and a[:-2] == b[:-2] == y[:-2] and a[-1] == b[-2]
    return same and y[-2:] == a[-2] + b[-1] and len(set(a + b[-1])) == len(a) + 1
