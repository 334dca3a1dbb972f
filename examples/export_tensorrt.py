"""Export a patched torch model to TensorRT with dynamic shapes that match the traffic.

    python examples/export_tensorrt.py [--out FOLDER]

1. patch; 2. export to ONNX with a dynamic batch and length; 3. optimization profiles from a sample of requests; 4.
build the engine and run it. Steps 1 to 3 need no GPU, and ONNX Runtime checks the file; step 4 is left out, with the
reason, where TensorRT or a GPU is missing. From an ONNX model instead of torch: examples/tensorrt_bert.py.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import nn

import hwkern
import hwkern.tensorrt as ht


class Block(nn.Module):
    """A feed-forward block with its residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the files (default: here)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    model = nn.Sequential(Block(256), Block(256)).eval()
    hwkern.patch(model, include="*")
    x = torch.randn(2, 24, 256)
    batch, length = torch.export.Dim("batch", max=32), torch.export.Dim("length", max=512)
    path = ht.export(model, (x,), out / "model.onnx", ({0: batch, 1: length},), input_names=["x"], output_names=["y"])
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")
    try:
        import onnxruntime

        (y,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
        with torch.inference_mode():
            error = float((torch.from_numpy(y) - model(x)).norm() / model(x).norm())
        print(f"ONNX Runtime gives the same to a relative error of {error:.1e}")
    except ImportError:
        print("not checked: pip install onnxruntime")

    # What the service saw last week: short requests mostly. Padding everything to the longest would cost this much:
    rng = random.Random(0)
    seen = [{"x": (rng.choice([1, 8]), min(512, int(rng.lognormvariate(4, 0.7)) + 1), 256)} for _ in range(300)]
    profiles = ht.profiles_from(seen, max_profiles=4)
    print(profiles)

    try:
        engine = ht.build(path, profiles, "fp16", path=out / "model.engine")
        with ht.Runner(engine) as run:
            print("engine:", len(engine.data), "bytes; output", run({"x": x.numpy()})["y"].shape)
    except (ImportError, RuntimeError, FileNotFoundError, ValueError) as error:
        print(f"no engine here: {error}")


if __name__ == "__main__":
    main()
