"""Plan for a latency target: the most accurate plan that answers within it, or the nearest miss.

    python examples/plan_for_latency.py [--target-ms 20] [--batch 4] [--tokens 64]

`hwkern.plan` times every scheme of every layer on this device and measures its error on these batches. Policies trade
one for the other: this tries them from the most accurate on, and stops at the first that meets the target.
"""

from __future__ import annotations

import argparse
import copy

import torch
import transformers

import hwkern

POLICIES = ("accurate", "balanced", "fastest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-ms", type=float, default=20.0, help="of one batch (default 20)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=2, vocab_size=1024)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    if torch.cuda.is_available():
        model = model.half().cuda()
    ids = torch.randint(10, 1024, (arguments.batch, arguments.tokens), device=model.device)
    batches = [{"input_ids": ids}]

    best = None
    for policy in POLICIES:
        candidate = copy.deepcopy(model)
        plan = hwkern.plan(candidate, batches, policy=policy, show=False)
        hwkern.patch(candidate, plan=plan)
        found = hwkern.validate(model, candidate, batches, show=False)
        took = found.model_ms[0]
        print(f"{policy}: {found.reference_ms[0]:.2f} -> {took:.2f} ms, {found.snr_db[0]:.1f} dB")
        if best is None or took < best[1]:
            best = policy, took, plan
        if took <= arguments.target_ms:
            break
    assert best is not None
    policy, took, plan = best
    verdict = "meets" if took <= arguments.target_ms else "misses"
    print(f"\n{policy!r} {verdict} the target of {arguments.target_ms:g} ms with {took:.2f} ms:\n")
    print(plan)


if __name__ == "__main__":
    main()
