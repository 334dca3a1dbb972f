"""Embeddings in a plan: tables and the heads that share their weight, and whether the model can do with int8 ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern._layers import Layer, tied
from hwkern._observe import evaluating

if TYPE_CHECKING:
    from hwkern.plan import Plan

#: The model's output with int8 tables must have this signal-to-noise ratio (dB). A table's own rounding costs some
#: 40 dB; what falls below this reads the table's weight, or its dtype, somewhere beside calling it.
LEAST_DB = 10.0
ROWS = 64  # of the output, some more at most


def with_their_tables(layers: Sequence[Layer], unusable: dict[str, str]) -> dict[str, str]:
    """``unusable`` for layers that share a weight with an embedding: all of them, or none.

    A table that no batch reached goes with what shares its weight (T5 holds one table in four places, and calls two).
    """
    found = dict(unusable)
    for group in tied(layers):
        if not any(layer.is_embedding for layer in group) or len(group) < 2:
            continue
        names = [layer.names[0] for layer in group]
        reached = any(layer.is_embedding and layer.names[0] not in unusable for layer in group)
        for layer in group:
            if layer.is_embedding and reached and unusable.get(layer.names[0]) == "no batch reached it":
                del found[layer.names[0]]
        if bad := next((name for name in names if name in found), None):
            for name in names:
                found.setdefault(name, f"it shares its weight with {bad!r}: {found[bad]}")
    return found


def _sample(output: Any) -> Tensor:
    """Some rows of the main output as float32, so that the logits of a long prompt fit beside the model."""
    found = _batches.main_output(output)
    rows = found.reshape(-1, found.shape[-1]) if found.dim() else found.reshape(1, 1)
    return rows[:: max(1, rows.shape[0] // ROWS)].float()


def try_tables(result: Plan, model: nn.Module, batches: Sequence[Any]) -> None:
    """Run the first batch with the tables that the plan makes int8; where the model cannot, it keeps them all."""
    from hwkern._back_off import _Recipes, _swapped, trial_place
    from hwkern._whole import send_back
    from hwkern.calibrate import snr_db
    from hwkern.patch import patch, unpatch

    layers = [
        layer for layer in result.layers.values() if layer.chosen and (layer.lookups or layer.kind == "Embedding")
    ]
    if not layers:
        return
    recipes = {name: layer.choice.recipe for layer in layers for name in layer.names}
    with torch.no_grad(), evaluating(model):
        try:
            exact = _sample(_batches.call(model, batches[0]))
        except ValueError:  # an output without a float tensor: then only whether it runs at all counts
            exact = None
        problem = ""
        patch(model, originals=trial_place(model), plan=_Recipes(recipes))
        try:
            output = _batches.call(model, batches[0])
            if exact is not None and bool(exact.isfinite().all()):
                found = snr_db(exact, _sample(output))
                problem = f"the model's output has {found:.1f} dB with it" if found < LEAST_DB else ""
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            first = (str(error).splitlines() or [""])[0]
            problem = f"the model does not run with it ({type(error).__name__}: {first[:100]})"
        finally:
            unpatch(model, include=[name for name in _swapped(model) if name in recipes])
    if problem:
        why = f"{problem}: it reads the weight itself"
        send_back(result, [layer.name for layer in layers], why)
        for layer in layers:  # nothing may choose one again: no other times, no bound, no trial of the whole model
            del layer.candidates[1:]
