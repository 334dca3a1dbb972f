"""Percentiles, the noise of a measurement, and when a difference is more than noise. Plain numbers; needs no torch.

A row is measured in blocks that alternate with the blocks of the other rows. Its noise is what a second run may differ
by: the whole width of the interval that holds the median at ``CONFIDENCE``, by the order of the blocks alone, and never
less than ``FLOOR``. Of eleven blocks that is the third to the ninth, so that two stalls of the host do not widen it; of
eight or fewer it is their range. Why the whole width: for normal blocks with deviation σ it is 1.46 σ on average for
eleven and 2.3 σ for five, while the medians of two runs differ by 0.53 σ and 0.76 σ; the rest is room for what the
blocks of one process share and two processes do not (clocks, addresses, heat).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Least probability that the median of what the blocks are drawn from lies in their interval.
CONFIDENCE = 0.93
#: Least noise of any row: two runs of one thing on one machine were seen to differ by this with blocks that agreed.
FLOOR = 0.02


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed (nearest rank). ValueError when empty."""
    if not values:
        raise ValueError("There is no quantile of no values.")
    ordered = sorted(values)
    # 0.95 · 20 is 19.000000000000004 or 18.999…: a rank is not to move by rounding.
    return ordered[max(0, math.ceil(round(share * len(ordered), 9)) - 1)]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in ms of times in seconds, and how many there are."""
    found: dict[str, float] = {
        f"p{round(100 * share)}": round(quantile(seconds, share) * 1e3, 5) for share in (0.5, 0.95, 0.99)
    }
    return found | {"n": len(seconds)}


def spread(blocks: Sequence[float]) -> float | None:
    """Half of the interval that holds the median over the median; None for fewer than two blocks, which say nothing of
    noise."""
    if len(blocks) < 2:
        return None
    ordered = sorted(blocks)
    # k values below and k above the interval: the median is outside when at most k of n fair coins fall on one side.
    # The range itself (k = 0) where even that is not sure enough, for four blocks and fewer.
    count, outside, k = len(ordered), 1.0, 0
    while 1 - 2 * (outside + math.comb(count, k + 1)) / 2**count >= CONFIDENCE:
        k += 1
        outside += math.comb(count, k)
    middle = statistics.median(ordered)
    return (ordered[-1 - k] - ordered[k]) / 2 / middle if middle else None


def noise(blocks: Sequence[float]) -> float | None:
    """Relative difference to another run that means nothing; None when there are too few blocks to say."""
    found = spread(blocks)
    return None if found is None else max(FLOOR, 2 * found)


def ratio(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float | None]:
    """``(ours / base, its noise)`` of two rows whose blocks were timed in turn: block by block, so that what slowed
    both down at the same time (heat, neighbours) cancels."""
    pairs = [a / b for a, b in zip(ours, base, strict=False)]
    if not pairs:
        raise ValueError("There is no ratio without blocks.")
    return statistics.median(pairs), noise(pairs)


def change(old: float, new: float, old_noise: float | None, new_noise: float | None) -> tuple[float, float, str]:
    """``(new / old, what it may differ from 1 by, verdict)`` for a figure where higher is better.

    The verdict is "slower", "faster" or "same"; "unknown" where a row has too few blocks to know its noise.
    """
    found = new / old
    if old_noise is None or new_noise is None:
        return found, math.nan, "unknown"
    bound = math.hypot(old_noise, new_noise)
    # In logarithms, so that "slower" one way is "faster" the other way.
    if abs(math.log(found)) <= math.log1p(bound):
        return found, bound, "same"
    return found, bound, "slower" if found < 1 else "faster"
