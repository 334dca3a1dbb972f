"""Validate a classifier: INT8 with a calibration set, held to a bound on the lost top-1 accuracy.

    python examples/validate_classifier.py [--most-drop 0.005]

A small MLP learns to read handwritten digits (scikit-learn's set; without scikit-learn: noisy prototypes). Part of the
data calibrates, another part that neither training nor calibration saw decides: if INT8 loses more than the bound
there, the exit code is 1, as a deployment script wants it.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import Tensor, nn

import hwkern


def data() -> tuple[Tensor, Tensor]:
    """Inputs ``[examples, 64]`` and their classes, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        prototypes, labels = torch.randn(10, 64), torch.randint(0, 10, (1800,))
        return prototypes[labels] + 1.2 * torch.randn(1800, 64), labels
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return x[order], y[order].long()


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """64 → 512 → 512 → 10, a few hundred steps of Adam."""
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(200):
        rows = torch.randint(0, len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-drop", type=float, default=0.005, help="of top-1, absolute (default 0.005)")
    most = parser.parse_args().most_drop
    torch.manual_seed(0)
    x, y = data()
    model = trained(x[:1000], y[:1000])
    calibration, held_out = (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:])

    # Static scales for the activations, and back to float where the calibration set's top-1 would suffer.
    int8 = copy.deepcopy(model)
    found = hwkern.calibrate(
        int8, [calibration[0]], observer="mse", metric=hwkern.metrics.top1([calibration[1]]), max_metric_drop=most,
        include="*", show=False,
    )  # fmt: skip
    hwkern.patch(int8, plan=found)
    print(hwkern.report(int8))

    checked = hwkern.validate(model, int8, [held_out[0]], metric=hwkern.metrics.top1([held_out[1]]), show=False)
    print(checked)
    before, after, drop = checked.metrics["top-1"]
    verdict = "within" if drop <= most else "ABOVE"
    print(f"\nheld-out top-1: {before:.2%} -> {after:.2%}, {verdict} the bound of {most:.2%}")
    return int(drop > most)


if __name__ == "__main__":
    sys.exit(main())
