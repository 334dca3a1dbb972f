"""How far a path's outputs are from float32's, on the same inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwkern import _batches, metrics
from hwkern.bench.models import Model

#: A path whose outputs have a lower mean cosine with float32's computes something else: it is not timed.
WRONG = 0.9


def compare(exact: Tensor, found: Tensor, logits: bool) -> dict[str, float]:
    """Cosine of the last dimension's vectors (mean and least); of logits also the KL divergence and top-1 agreement.

    ``kl``: Σ p ln(p / q) in nats, p from float32, mean over all positions.
    """
    if exact.shape != found.shape:
        raise ValueError(f"The outputs have shape {tuple(found.shape)}, float32's {tuple(exact.shape)}.")
    exact, found = exact.float().flatten(0, -2), found.float().flatten(0, -2)
    cosine = F.cosine_similarity(exact.double(), found.double(), dim=-1)
    result = {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min()), "vectors": len(cosine)}
    if logits:
        p, q = F.log_softmax(exact, -1), F.log_softmax(found, -1)
        result["kl"] = float((p.exp() * (p - q)).sum(-1).mean())
        result["top1"] = float((exact.argmax(-1) == found.argmax(-1)).float().mean())
    return {name: round(value, 7) for name, value in result.items()}


class Judge:
    """Keeps float32's outputs on a check batch, and holds other versions of the model against them."""

    def __init__(self, model: Model, exact: nn.Module, seed: int, device: str) -> None:
        self.model = model
        self.logits = model.kind != "encoder"
        self.inputs = model.check_inputs(seed, device)
        self.exact = self._output(exact).cpu()
        self.metrics: list[metrics.Metric] = []
        self.values: dict[str, float] = {}
        if model.real:
            self.metrics = [metrics.perplexity()] if model.kind == "decoder" else [metrics.neighbours()]
            for metric in self.metrics:
                if metric.prepare is not None:
                    metric.prepare(exact, [self.inputs])
                self.values[metric.name] = metric(exact, [self.inputs])

    def _output(self, module: nn.Module) -> Tensor:
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        with torch.inference_mode():
            return _batches.main_output(module(**cast)).float()

    def accuracy(self, module: nn.Module) -> dict[str, Any]:
        """Of one version of the model, eager."""
        found: dict[str, Any] = compare(self.exact, self._output(module).cpu(), self.logits)
        for metric in self.metrics:
            key = metric.name.replace(" ", "_")
            found[key] = round(metric(module, [self.inputs]), 5)
            found[f"{key}_fp32"] = round(self.values[metric.name], 5)
        return found


def wrong(exact: Tensor, found: Tensor) -> str | None:
    """Why an output cannot be right, as a sentence; None when it may be."""
    if exact.shape != found.shape:
        return f"wrong result: shape {tuple(found.shape)} instead of {tuple(exact.shape)}"
    cosine = float(F.cosine_similarity(exact.float().flatten(0, -2), found.float().flatten(0, -2), dim=-1).mean())
    return None if cosine >= WRONG else f"wrong result: cosine {cosine:.3f} with float32"
