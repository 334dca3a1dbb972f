"""Which measured config a launch takes, for ``ops`` to look up: nothing is here unless ``hwkern.tune`` put it here.

Needs no torch, like the two constants of hwkern.h below.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from typing import Any

CHOOSE = -1  # hwkern.h kChoose: the cost model picks the config
K_MAX = 2**17 - 1  # hwkern.h kMaxK: an int32 sum of K products of int8 stays exact below 2¹⁷

#: M is tuned in steps: all M above one edge and up to the next share a config. Fine where a step of the tiles changes
#: the time, coarse where there are many tiles. Above the last edge the cost model chooses.
EDGES = (
    1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192
)  # fmt: skip

#: What was measured: the product of two int8 matrices alone, or a whole layer, which quantizes its activations first,
#: in a launch of its own or in the product's.
PRODUCT, LAYER = "product", "layer"

Key = tuple[int, int, int, Any, str]  # device index, N, K, output dtype, PRODUCT or LAYER

#: For each key one config id per step of M, and CHOOSE for the M above the last edge. Read at every launch.
tuned: dict[Key, tuple[int, ...]] = {}


# The place of what HWKERN_TUNED=1 in the environment asks for, until the first launch reads the cache folder.
_PENDING: Key = (-1, -1, -1, None, "")


def config_for(device: int, m: int, n: int, k: int, dtype: Any, kind: str = PRODUCT) -> int:
    """The measured config, or CHOOSE: 0.3 µs, and callers ask only when ``tuned`` is not empty.

    ``dtype`` is the output's, and with LAYER the input's too.
    """
    steps = tuned.get((device, n, k, dtype, kind))
    if steps is None:
        return config_for(device, m, n, k, dtype, kind) if load_pending() else CHOOSE
    return steps[bisect_left(EDGES, m)]


def load_pending() -> bool:
    """Read what earlier runs of ``hwkern.tune`` measured, if that was asked for and not done yet."""
    if _PENDING not in tuned:
        return False
    from hwkern.tune import use_tuned

    use_tuned()
    return True


def ask() -> None:
    """Let the first launch read the cache folder if the environment says HWKERN_TUNED=1."""
    if os.environ.get("HWKERN_TUNED") == "1":
        tuned[_PENDING] = ()


ask()
