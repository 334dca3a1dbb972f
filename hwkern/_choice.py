"""Which measured config a launch takes, for ``ops`` to look up: nothing is here unless ``hwkern.tune`` put it here."""

from __future__ import annotations

import os
from bisect import bisect_left
from typing import Any

from hwkern._checks import CHOOSE

#: M is tuned in steps: all M above one edge and up to the next share a config. Fine where a step of the tiles changes
#: the time, coarse where there are many tiles. Above the last edge the cost model chooses.
EDGES = (
    1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192
)  # fmt: skip

Key = tuple[int, int, int, Any]  # device index, N, K, output dtype

#: For each key one config id per step of M, and CHOOSE for the M above the last edge. Read at every launch.
tuned: dict[Key, tuple[int, ...]] = {}


def config_for(device: int, m: int, n: int, k: int, dtype: Any) -> int:
    """The measured config, or CHOOSE: 0.3 µs, and callers ask only when ``tuned`` is not empty."""
    steps = tuned.get((device, n, k, dtype))
    return CHOOSE if steps is None else steps[bisect_left(EDGES, m)]


def load_if_asked() -> None:
    """With HWKERN_TUNED=1 in the environment, use what earlier runs of ``hwkern.tune`` left in the cache folder."""
    if os.environ.get("HWKERN_TUNED") == "1":
        from hwkern.tune import use_tuned

        use_tuned()
