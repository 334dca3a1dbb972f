"""Say which kernel a product of M, N and K takes on this GPU, and a whole layer; what else there is; why not that."""

from __future__ import annotations

import argparse
import json
import sys
import types
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hwkern import _choice, _native, hardware
from hwkern._choice import CHOOSE, EDGES, K_MAX, LAYER, PRODUCT
from hwkern._console import plain_table, print_table
from hwkern.tune import (
    NOISE,
    PEERS,
    cache_of,
    candidates,
    configs_of,
    ends_of,
    entry_name,
    layer_candidates,
    layer_configs,
    measure,
    model_choice,
    obstacle,
    product_configs,
    times_of,
)

if TYPE_CHECKING:
    import torch

#: What ``explain`` reckons with on a machine that has no GPU: an H100 SXM.
H100 = hardware.Gpu(
    index=0, name="NVIDIA H100 SXM (no GPU here: predictions only)", compute=90, sm_count=132, clock_mhz=1980.0,
    l2_bytes=50 << 20, memory_bytes=80 << 30, shared_bytes_per_sm=233_472, shared_bytes=232_448,
    bandwidth=3.352e12, int8_ops=2.141e15, fp16_flops=1.07e15,
)  # fmt: skip


@dataclass
class Candidate:
    """One config of the table, for one problem on one GPU."""

    id: int
    name: str
    predicted_us: float | None  #: the product, by the cost model, without launch overhead; None: it predicts none
    measured_us: float | None  #: the product, from the cache or measured now; None: it was not measured
    layer_us: float | None  #: the whole layer, quantize included: measured or None
    note: str  #: why it cannot run, or that it takes whole layers alone


@dataclass(repr=False)
class Explanation:
    """Which config ``ops`` takes for ``D [M, N] = A [M, K] · B [N, K]ᵀ``, and why. ``print(explanation)`` shows it.

    Of the product of two int8 matrices, and of a layer whose float input is quantized first.
    """

    m: int
    n: int
    k: int
    dtype: str
    gpu: str
    chosen: int
    reason: str
    layer_chosen: int
    layer_reason: str
    floor_us: float  #: the product's speed of light: see hwkern.hardware.speed_of_light
    candidates: list[Candidate]  #: fastest products first, then those for layers alone; those that cannot run last
    peers_us: dict[str, float]  #: stock paths, where ``tune(..., peers=True)`` measured them

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def _rows(self) -> list[list[str]]:
        def text(us: float | None) -> str:
            return "–" if us is None else f"{us:.2f}"

        rows = [
            [
                f"{'→' if c.id == self.chosen else ' '}{'⇒' if c.id == self.layer_chosen else ' '} {c.id} {c.name}",
                text(c.predicted_us),
                text(c.measured_us),
                text(c.layer_us),
                c.note,
            ]
            for c in self.candidates
        ]
        return rows + [[f"   torch: {name}", "–", text(us), "–", ""] for name, us in self.peers_us.items()]

    def _title(self) -> str:
        return (
            f"M, N, K = {self.m}, {self.n}, {self.k}, {self.dtype} out, on {self.gpu}\n"
            f"→ product: config {self.chosen}, {self.reason}\n"
            f"⇒ layer: config {self.layer_chosen}, {self.layer_reason}\n"
            f"speed of light {self.floor_us:.2f} µs"
        )

    def __str__(self) -> str:
        return plain_table(self._title(), _COLUMNS, self._rows())

    __repr__ = __str__


_COLUMNS = ["candidate", "predicted µs", "measured µs", "layer µs", ""]


def explain(
    m: int,
    n: int,
    k: int,
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: int | None = None,
    measure_now: bool = False,
) -> Explanation:
    """Every candidate for one GEMM with predicted and measured times, the choice, and the reason; and for the layer.

    ``dtype`` is the output's (and a layer's input's), ``device`` a GPU's index (the first by default); on a machine
    without a GPU an H100 is assumed and nothing is measured. ``measure_now`` times all candidates at this very M and
    keeps the times, which ``hwkern.tune`` then uses where M is an end of a step. Raises ValueError for sizes that no
    kernel takes.
    """
    if min(m, n, k) < 1 or k > K_MAX:
        raise ValueError(f"explain takes M and N of at least 1 and K of 1 … {K_MAX}, not {m}, {n}, {k}.")
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"explain takes float32, float16 and bfloat16, not {name}.")
    problem = _native.cuda_problem()
    if measure_now and problem is not None:
        raise RuntimeError(f"explain can measure only on a GPU: {problem}")
    gpu = H100 if problem is not None and device is None else hardware.gpu(device or 0)
    entries: dict[str, Any] = {}
    predicted = candidates(m, n, k, gpu)
    keys = {kind: entry_name(m, n, k, name, kind) for kind in (PRODUCT, LAYER)}
    if problem is None:
        cache = cache_of(gpu)
        if measure_now:
            import torch

            of_layers = [*predicted, *layer_candidates(k, gpu)]
            entries = {
                keys[kind]: measure(m, n, k, getattr(torch, name), configs, gpu, kind, PEERS[kind])
                for kind, configs in ((PRODUCT, list(predicted)), (LAYER, of_layers))
            }
            cache.update(entries)
        else:
            entries = cache.read()
    measured, of_layer = (configs_of(entries.get(key)) for key in keys.values())
    rows = [
        Candidate(
            row["id"], row["name"], predicted.get(row["id"]), measured.get(row["id"]), of_layer.get(row["id"]),
            obstacle(row, k, gpu) or note,
        )
        for table, note in ((product_configs(), ""), (layer_configs(), _ONLY_LAYERS))
        for row in table
    ]  # fmt: skip
    # Measured ones first, by their times; then the others by the prediction; those for layers alone; what cannot run.
    rows.sort(
        key=lambda c: (
            c.note not in ("", _ONLY_LAYERS), c.predicted_us is None, c.measured_us is None,
            c.measured_us or c.predicted_us or c.layer_us or 0,
        )
    )  # fmt: skip
    chosen, reason = _reason(m, n, k, name, gpu, PRODUCT, measured)
    layer_chosen, layer_reason = _reason(m, n, k, name, gpu, LAYER, of_layer)
    floor = hardware.speed_of_light(m, n, k, gpu, d_bytes=4 if name == "float32" else 2)
    return Explanation(
        m, n, k, name, gpu.name, chosen, reason, layer_chosen, layer_reason, floor.microseconds, rows,
        times_of(entries.get(keys[PRODUCT]), "peers"),
    )  # fmt: skip


_ONLY_LAYERS = "takes whole layers only"


def _reason(
    m: int, n: int, k: int, dtype: str, gpu: hardware.Gpu, kind: str, measured: Mapping[int, float]
) -> tuple[int, str]:
    if gpu.compute < hardware.MIN_COMPUTE:
        return CHOOSE, f"no kernel runs on this GPU: compute capability {hardware.MIN_COMPUTE / 10:.1f} is the least."
    _choice.load_pending()
    if _choice.tuned:  # so torch is there
        import torch

        chosen = _choice.config_for(gpu.index, m, n, k, getattr(torch, dtype), kind)
        if chosen != CHOOSE:
            return chosen, f"measured by hwkern.tune as the fastest for {_step(m)}."
    model = model_choice(m, n, k, gpu, dtype, kind)
    if kind == PRODUCT:
        reason = "the cost model predicts it to be the fastest"
    elif any(row["id"] == model for row in layer_configs()):
        reason = "the cost model takes it here, a config for whole layers alone"
    else:
        reason = "the cost model takes it after a launch that quantizes"
    if model in measured:
        best = min(measured, key=measured.__getitem__)
        lost = measured[model] / measured[best] - 1
        if best != model:
            reason += f"; config {best} was measured {lost:.1%} faster"
            reason += " (within the noise)" if lost < NOISE - 1 else f"; hwkern.tune takes what is over {_step(m)}"
        else:
            reason += ", and measured to be the fastest"
    return model, reason + "."


def _step(m: int) -> str:
    if m > EDGES[-1]:
        return f"M = 1 … {EDGES[-1]}"
    low, high = ends_of(bisect_left(EDGES, m))
    return f"M = {low} … {high}"


# ---- `hwkern explain M N K` ------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hwkern explain``."""
    for name, text in (("m", "tokens (rows of x)"), ("n", "output features"), ("k", "input features")):
        parser.add_argument(name, type=int, metavar=name.upper(), help=text)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the output")
    parser.add_argument("--device", type=int, help="index of the GPU (default: the first)")
    parser.add_argument("--measure", action="store_true", help="time all candidates now and keep the times")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    """Run ``hwkern explain``."""
    try:
        found = explain(
            arguments.m, arguments.n, arguments.k,
            dtype=arguments.dtype, device=arguments.device, measure_now=arguments.measure,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_table(found._title(), _COLUMNS, found._rows())
    return 0


class _CallableModule(types.ModuleType):
    """As in tune.py: the module may stand where the function is meant."""

    def __call__(self, *args: Any, **kwargs: Any) -> Explanation:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
