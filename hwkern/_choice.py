"""Which measured config a launch takes, for ``ops`` to look up: nothing is here unless ``hwkern.tune`` put it here.

Needs no torch, like the two constants of hwkern.h below.
"""

from __future__ import annotations

import functools
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

Key = tuple[int, int, int, Any]  # device index, N, K, output dtype

#: For each key one config id per step of M, and CHOOSE for the M above the last edge. Read at every launch.
tuned: dict[Key, tuple[int, ...]] = {}


# The place of what HWKERN_TUNED=1 in the environment asks for, until the first launch reads the cache folder.
_PENDING: Key = (-1, -1, -1, None)


def config_for(device: int, m: int, n: int, k: int, dtype: Any) -> int:
    """The measured config, or CHOOSE: 0.3 µs, and callers ask only when ``tuned`` is not empty."""
    steps = tuned.get((device, n, k, dtype))
    if steps is None:
        return config_for(device, m, n, k, dtype) if load_pending() else CHOOSE
    return steps[bisect_left(EDGES, m)]


def linear_config_for(device: int, m: int, n: int, k: int, dtype: Any) -> int:
    """:func:`config_for` of a linear, which keeps what was measured of products out where it takes one launch."""
    config = config_for(device, m, n, k, dtype)
    return CHOOSE if config != CHOOSE and dtype.itemsize == 2 and _in_one_launch(device, m, n, k) else config


@functools.lru_cache(maxsize=4096)
def _in_one_launch(device: int, m: int, n: int, k: int) -> bool:
    """Whether the cost model quantizes ``x`` in the product's own launch: configs that ``tune`` does not measure."""
    from hwkern import _native, hardware

    native, gpu = _native.extension(), hardware.gpu(device)
    chosen = native.linear_choose(m, n, k, gpu.sm_count, gpu.compute, gpu.shared_bytes)
    return any(row["id"] == chosen and row["scheme"] == "w8a8_linear" for row in native.gemm_configs())


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
