"""From measured times and errors to one recipe per layer. Pure functions of numbers: no device, no model."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hwkern._recipes import Recipe

Policy = Literal["fastest", "balanced", "accurate", "smallest"]
Mode = Literal["any", "eager", "graph"]
MODES = ("any", "eager", "graph")
POLICIES = ("fastest", "balanced", "accurate", "smallest")

#: A layer is swapped only for at least this gain over all calls: two measurements of one thing differ by up to 2 %.
LEAST_GAIN = 0.03
#: At no number of tokens that matters may it be slower by more than this.
NOISE = 0.02
#: Numbers of tokens matter that have this share of the layer's time, or this share of its calls: a decoding step is
#: short beside a prompt and is what a user waits for.
SHARE = 0.02
CALLS_SHARE = 0.05
#: µs by which a lookup may be slower than the float table's where "smallest" is asked for: it runs once in a forward
#: that takes a thousand times as long, and eager calls for few tokens are the host's time: on an H100 12 against 14 µs,
#: with as much scatter beside other work. Elsewhere none: there the whole model says whether it can be had
#: (_tables.try_smaller).
LOOKUP_US = 2.0
#: What "balanced" gives for accuracy: time within this of the fastest.
BALANCED_TIME = 0.05
#: And "accurate" for time: dB within this of the best.
ACCURATE_DB = 1.0

Times = Mapping[str, Mapping[int, float]]  # mode → tokens → µs


@dataclass
class Candidate:
    """One recipe of one layer, measured.

    Attributes:
        us: mode → tokens → µs of one call.
        snr_db: of the layer's output on the user's data; inf for "keep".
        weight_bytes: what the layer's tensors take.
        ruled_out: why it was not chosen, in words; empty for the chosen one.
    """

    recipe: Recipe
    snr_db: float
    weight_bytes: int
    us: dict[str, dict[int, float]] = field(default_factory=dict)
    ruled_out: str = ""

    @property
    def name(self) -> str:
        return self.recipe.name


def total(times: Mapping[int, float], calls: Mapping[int, int]) -> float:
    """µs of all calls."""
    return sum(times[m] * count for m, count in calls.items())


def score(candidate: Candidate, keep: Candidate, calls: Mapping[int, int]) -> float:
    """Time over the float layer's, the mean over the modes; below 1 is faster."""
    ratios = [total(candidate.us[mode], calls) / total(keep.us[mode], calls) for mode in keep.us]
    return sum(ratios) / len(ratios)


def worst(
    candidate: Candidate,
    keep: Candidate,
    calls: Mapping[int, int],
    slack: float = 0.0,
    modes: Container[str] = MODES,
) -> tuple[float, int, str]:
    """The largest ratio to the float layer at a number of tokens that matters: (ratio, tokens, mode).

    ``slack``: µs by which a call may be slower without being counted.
    """
    found = (0.0, 0, "")
    for mode, times in keep.us.items():
        if mode not in modes:
            continue
        whole, number = total(times, calls), sum(calls.values())
        for m, count in calls.items():
            if candidate.us[mode][m] <= times[m] + slack and slack:
                continue
            if times[m] * count >= SHARE * whole or count >= CALLS_SHARE * number:
                found = max(found, (candidate.us[mode][m] / times[m], m, mode))
    return found


def slower_lookups(candidate: Candidate, keep: Candidate, calls: Mapping[int, int], policy: Policy) -> list[str]:
    """The modes in which lookups in an int8 table take longer, alone, than a table taken for its bytes may."""
    slack = LOOKUP_US if policy == "smallest" else 0.0
    return [mode for mode in keep.us if worst(candidate, keep, calls, slack, (mode,))[0] > 1 + NOISE]


def threshold(few: Candidate, many: Candidate, calls: Mapping[int, int]) -> int | None:
    """The number of tokens up to which ``few`` is faster and above which ``many`` is, by the sum of all times.

    None where one of them is the better for every number that was measured.
    """
    sizes = sorted(calls)

    def cost(split: int) -> float:
        return sum(count * (few if m <= split else many).us[mode][m] for mode in few.us for m, count in calls.items())

    best = min((0, *sizes), key=cost)
    return None if best in (0, sizes[-1]) else best


def choose(
    candidates: Sequence[Candidate],
    calls: Mapping[int, int],
    min_snr_db: float,
    policy: Policy,
    for_bytes: bool = False,
) -> tuple[Candidate, str]:
    """The candidate for one layer, and the reason; every other one gets its ``ruled_out``.

    The first candidate is "keep". Never one that is slower than it by measurement. ``for_bytes``: of an embedding,
    which is taken for the memory it saves where it is not slower; "accurate" does not.
    """
    keep, *others = candidates
    for candidate in candidates:
        candidate.ruled_out = ""
    if not calls:
        return keep, "no batch reached it"
    most = 1 + NOISE if for_bytes else 1 - (0.0 if policy == "smallest" else LEAST_GAIN)  # of the float layer's time
    allowed = []
    for candidate in others:
        ratio, m, mode = worst(candidate, keep, calls, LOOKUP_US if for_bytes and policy == "smallest" else 0.0)
        gain = score(candidate, keep, calls)
        if candidate.snr_db < min_snr_db:
            candidate.ruled_out = f"{candidate.snr_db:.1f} dB is below {min_snr_db:g} dB"
        elif ratio > 1 + NOISE:
            candidate.ruled_out = f"{ratio:.2f}× the float layer's time at {m} tokens ({mode})"
        elif for_bytes and policy == "accurate":
            candidate.ruled_out = "accurate: memory alone is no reason to round it"
        elif not for_bytes and gain > most:
            candidate.ruled_out = f"no gain that is more than noise ({gain:.2f}× the time)"
        else:
            allowed.append(candidate)
    if not allowed:
        return keep, _why_kept(keep, others, calls, min_snr_db, most)
    chosen = _best(allowed, keep, calls, policy)
    for candidate in allowed:
        if candidate is not chosen:
            gain = score(candidate, keep, calls)
            candidate.ruled_out = (
                f"{policy}: {chosen.name} is preferred ({gain:.2f}× the time, {_db(candidate.snr_db)})"
            )
    ratio = score(chosen, keep, calls)
    if for_bytes:
        keep.ruled_out = f"{chosen.name} is smaller, and not slower"
        share = chosen.weight_bytes / max(1, keep.weight_bytes)
        return chosen, f"{share:.2f}× the bytes at {ratio:.2f}× the time and {_db(chosen.snr_db)} ({policy})"
    keep.ruled_out = f"{chosen.name} is faster"
    return chosen, f"{1 / ratio:.2f}× as fast as the float layer at {_db(chosen.snr_db)} ({policy})"


def _best(allowed: Sequence[Candidate], keep: Candidate, calls: Mapping[int, int], policy: Policy) -> Candidate:
    def time(candidate: Candidate) -> float:
        return score(candidate, keep, calls)

    if policy == "smallest":
        return min(allowed, key=lambda c: (c.weight_bytes, time(c)))
    if policy == "accurate":
        best = max(c.snr_db for c in allowed)
        return min((c for c in allowed if c.snr_db >= best - ACCURATE_DB), key=time)
    fastest = min(map(time, allowed))
    if policy == "fastest":
        return min(allowed, key=time)
    near = [c for c in allowed if time(c) <= fastest * (1 + BALANCED_TIME)]
    return max(near, key=lambda c: (c.snr_db, -time(c)))


def _why_kept(
    keep: Candidate, others: Sequence[Candidate], calls: Mapping[int, int], min_snr_db: float, most: float
) -> str:
    inaccurate = [c for c in others if c.snr_db < min_snr_db and score(c, keep, calls) <= most]
    if inaccurate:
        best = max(inaccurate, key=lambda c: c.snr_db)
        gain = 1 / score(best, keep, calls)
        return f"{best.name} would be {gain:.2f}× as fast, but has {_db(best.snr_db)} of the {min_snr_db:g} dB wanted"
    if not others:
        return "nothing else is possible"
    best = min(others, key=lambda c: score(c, keep, calls))
    if best.ruled_out.startswith("accurate:"):
        return best.ruled_out.removeprefix("accurate: ")
    ratio, m, mode = worst(best, keep, calls)
    if ratio > 1 + NOISE:
        return f"nothing is faster throughout: {best.name} takes {ratio:.2f}× the time at {m} tokens ({mode})"
    return f"nothing is faster: {best.name} takes {score(best, keep, calls):.2f}× the time"


def _db(snr: float) -> str:
    return "the same numbers" if math.isinf(snr) and snr > 0 else f"{snr:.1f} dB"
