"""A small MLP in float32, in hwkern's INT8 and in torch's own static INT8: error and time, on one CPU thread.

    python examples/mlp.py [--batch 64]

hwkern needs one call and no calibration: it scales every row of the activations by itself, at run time. torch's eager
static quantization needs stubs in the model, a configuration and sample data, and fixes one scale per layer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hwkern

ROUNDS = 31


def mlp() -> nn.Sequential:
    """768 -> 512 -> 256, the shape of a small classifier on top of an encoder."""
    return nn.Sequential(nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 256)).eval()


def with_hwkern(model: nn.Module) -> nn.Module:
    """A patched copy."""
    model = copy.deepcopy(model)
    print(hwkern.patch(model, include="*"), end="\n\n")  # "*": also on CPUs where INT8 is no faster
    return model


def with_torch(model: nn.Module, samples: Tensor) -> nn.Module | str:
    """A copy quantized by torch's eager static path, or a sentence on why there is none."""
    try:
        from torch.ao import quantization as ao
    except ImportError:
        return f"torch {torch.__version__} has no torch.ao.quantization any more."
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this build of torch has no fbgemm kernels."
    torch.backends.quantized.engine = "fbgemm"
    quantized = nn.Sequential(ao.QuantStub(), *copy.deepcopy(model), ao.DeQuantStub()).eval()
    quantized.qconfig = ao.get_default_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole of torch.ao.quantization is deprecated, and says so at every step
        try:
            quantized = ao.prepare(quantized)
            quantized(samples)
            return ao.convert(quantized)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            return f"torch {torch.__version__} cannot quantize it: {error}"


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Median time of one call."""
    times = []
    for _ in range(ROUNDS + 3):
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="A small MLP: float32, hwkern's INT8 and torch's static INT8.")
    parser.add_argument("--batch", type=int, default=64, help="rows of one input (default: 64)")
    batch = parser.parse_args().batch
    if batch < 1:
        parser.error(f"--batch {batch}: it must be at least 1.")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, samples, x = mlp(), torch.randn(1024, 768), torch.randn(batch, 768)
    with torch.inference_mode():
        expected = model(x)
        contenders: dict[str, nn.Module | str] = {
            "float32": model,
            "hwkern": with_hwkern(model),
            "torch static INT8": with_torch(model, samples),
        }
        print(f"torch {torch.__version__}, one thread, batches of {batch} × 768, median of {ROUNDS}")
        print(f"{'':18}  {'relative error':>14}  {'µs a batch':>10}  {'against float32':>15}")
        baseline = 0.0
        for name, contender in contenders.items():
            if isinstance(contender, str):
                print(f"{name:18}  {contender}")
                continue
            error = float((contender(x) - expected).norm() / expected.norm())
            took = microseconds(contender, x)
            baseline = baseline or took
            print(f"{name:18}  {error:>13.2%}  {took:>10.0f}  {baseline / took:>14.2f}×")


if __name__ == "__main__":
    main()
