"""Traffic instead of fixed batches: a stream of requests, dynamic batching, the highest rate under a bound of latency.

Requests have log-normal lengths (or those of a file) and arrive as a Poisson process. One worker takes the oldest
request, fills the batch with waiting ones of the same profile, pads, runs, and only then looks at the queue again.

What a batch of R requests padded to L tokens takes is measured for a grid of (R, L), input processing counted: padding
the ids, building the mask, the way to the device, the answer back. The queue itself is simulated with those times on a
clock of its own: a search for the highest rate needs a dozen trials of thousands of requests each, and no waiting.
``Traffic.trial`` takes any function for the time of a batch, so a real run of the same queue checks the simulation.

Needs neither torch nor numpy.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwkern.bench.statistics import quantile

#: Median and shape of the log-normal lengths: half of the requests below 64 tokens, one in forty above 250.
MEDIAN_LENGTH = 64
SIGMA = 0.7
REQUESTS = 2000
MAX_ROWS = 32
#: The search ends when the rate is known to this.
PRECISION = 0.01

#: (requests in the batch, tokens that they are padded to) → seconds.
Service = Callable[[int, int], float]


def log_normal_lengths(count: int, seed: int, most: int, median: float = MEDIAN_LENGTH) -> list[int]:
    """``count`` lengths between 1 and ``most`` tokens; ln(length) is normal with mean ln(median) and deviation SIGMA.

    Longer ones are cut to ``most``, as a server truncates them.
    """
    rng = random.Random(seed)
    return [min(most, max(1, round(rng.lognormvariate(math.log(median), SIGMA)))) for _ in range(count)]


def lengths_from(path: Path, most: int) -> list[int]:
    """Lengths in tokens from JSON lines: a number a line, or an object with ``length`` or ``tokens``.

    Raises ValueError, with the line's number, for anything else, and for a file without lines.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if isinstance(value, dict):
            value = value.get("length", value.get("tokens"))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f'{path}:{number}: a length of at least 1 is needed, as 17 or {{"length": 17}}.')
        found.append(min(most, value))
    if not found:
        raise ValueError(f"{path} holds no lengths.")
    return found


def poisson_arrivals(count: int, seed: int) -> list[float]:
    """Arrival times at one request a second on average; divide by the rate for another one."""
    rng = random.Random(seed)
    return list(itertools.accumulate(rng.expovariate(1.0) for _ in range(count)))


@dataclass(frozen=True)
class Trial:
    """One run of the queue.

    Attributes:
        latencies: seconds from arrival to answer, by request.
        seconds: from the first arrival to the last answer; busy: of these, with a batch on the device.
        tokens: of the requests; padded: what was computed, padding included.
        batches: how many there were.
    """

    latencies: list[float]
    seconds: float
    busy: float
    tokens: int
    padded: int
    batches: int

    @property
    def waste(self) -> float:
        """0.25: a quarter more tokens were computed than there are."""
        return self.padded / self.tokens - 1


@dataclass(frozen=True)
class Traffic:
    """A stream of requests and the shapes that they are served in.

    Attributes:
        lengths: of the requests, in tokens; arrivals: their times at one request a second.
        tops: lengths that a batch may be padded to, ascending; empty: each batch to its own longest request.
        max_rows: most requests in a batch.
        full_rows: whether the rows are padded too, to the next power of two (captured graphs have fixed shapes).
    """

    lengths: Sequence[int]
    arrivals: Sequence[float]
    tops: tuple[int, ...] = ()
    max_rows: int = MAX_ROWS
    full_rows: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.arrivals):
            raise ValueError(
                f"{len(self.lengths)} lengths and {len(self.arrivals)} arrivals: as many of both are needed."
            )
        if self.tops and (list(self.tops) != sorted(set(self.tops)) or max(self.lengths) > self.tops[-1]):
            raise ValueError(f"The profiles {self.tops} must ascend and reach {max(self.lengths)} tokens.")

    def rows(self, count: int) -> int:
        """Rows that a batch of ``count`` requests is computed with."""
        return min(self.max_rows, 1 << (count - 1).bit_length()) if self.full_rows else count

    def trial(self, rate: float, serve: Callable[[Sequence[int], int, int], float]) -> Trial:
        """Serve all requests at ``rate`` per second (inf: all are there from the start).

        ``serve(requests, rows, length)`` returns the seconds that this batch took; ``requests`` are indices.
        """
        times = [t / rate for t in self.arrivals]
        # One queue per profile; without profiles there is one for all.
        queues: list[deque[int]] = [deque() for _ in range(max(1, len(self.tops)))]
        latencies = [0.0] * len(times)
        clock, busy, padded, batches, coming = times[0], 0.0, 0, 0, 0
        while True:
            while coming < len(times) and times[coming] <= clock:
                queues[bisect.bisect_left(self.tops, self.lengths[coming]) if self.tops else 0].append(coming)
                coming += 1
            waiting = [q for q in queues if q]
            if not waiting:
                if coming == len(times):
                    break
                clock = times[coming]
                continue
            queue = min(waiting, key=lambda q: q[0])  # that of the oldest request
            batch = [queue.popleft() for _ in range(min(self.max_rows, len(queue)))]
            longest = max(self.lengths[i] for i in batch)
            length = self.tops[bisect.bisect_left(self.tops, longest)] if self.tops else longest
            rows = self.rows(len(batch))
            seconds = serve(batch, rows, length)
            clock += seconds
            busy += seconds
            padded += rows * length
            batches += 1
            for i in batch:
                latencies[i] = clock - times[i]
        return Trial(latencies, clock - times[0], busy, sum(self.lengths), padded, batches)

    def simulate(self, rate: float, service: Service) -> Trial:
        """:meth:`trial` with known times."""
        return self.trial(rate, lambda _, rows, length: service(rows, length))

    def capacity(self, service: Service, bound: float) -> tuple[float, Trial] | None:
        """The highest rate (requests per second) at which 95 % of the requests take at most ``bound`` seconds.

        None when even one request at a time takes longer. By bisection: p95 grows with the rate but for the luck of the
        draw, and the arrivals are the same at every rate.
        """

        def fits(rate: float) -> Trial | None:
            trial = self.simulate(rate, service)
            return trial if quantile(trial.latencies, 0.95) <= bound else None

        everything = self.simulate(math.inf, service)
        high = len(self.lengths) / everything.seconds  # more cannot be served for long
        low = high / 1024
        best = fits(low)
        if best is None:
            return None
        while high / low > 1 + PRECISION:
            middle = math.sqrt(low * high)
            found = fits(middle)
            if found is None:
                high = middle
            else:
                low, best = middle, found
        return low, best


def profiles(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """Up to ``most`` lengths to pad to, where the requests are, by :func:`hwkern.tensorrt.profiles_from`."""
    from hwkern.tensorrt.profiles import profiles_from

    found = profiles_from([{"x": (n,)} for n in lengths], max_profiles=most)
    return tuple(sorted(profile.max["x"][0] for profile in found))


def grid(traffic: Traffic) -> list[tuple[int, int]]:
    """(rows, length) to be measured: powers of two of the rows, times the profiles or six lengths of the sample."""
    rows = sorted({min(traffic.max_rows, 1 << i) for i in range(traffic.max_rows.bit_length() + 1)})
    ordered = sorted(traffic.lengths)
    lengths = traffic.tops or tuple(dict.fromkeys(ordered[round(i * (len(ordered) - 1) / 5)] for i in range(6)))
    return [(r, n) for n in lengths for r in rows]


def measured(
    shapes: Sequence[tuple[int, int]],
    serve: Callable[[Sequence[Sequence[int]], int, int], tuple[float, float]],
    seconds: float,
) -> dict[tuple[int, int], tuple[float, float]]:
    """Median of ``serve(requests, rows, length)``, which is (seconds, of these spent on the inputs), for every shape:
    all of them in turn, for about so long, at least once."""
    full = {(rows, length): [[11] * length] * rows for rows, length in shapes}
    samples: dict[tuple[int, int], list[tuple[float, float]]] = {shape: [] for shape in full}
    until = time.perf_counter() + seconds
    while True:
        for (rows, length), each in samples.items():
            each.append(serve(full[rows, length], rows, length))
        if time.perf_counter() >= until:
            return {shape: sorted(each)[len(each) // 2] for shape, each in samples.items()}


@dataclass
class Table:
    """Times of a grid of (rows, length), and in between by straight lines; outside, the nearest edge's line goes on."""

    seconds: Mapping[tuple[int, int], float]
    _rows: list[int] = field(init=False)
    _lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = sorted({r for r, _ in self.seconds})
        self._lengths = sorted({n for _, n in self.seconds})
        if len(self.seconds) != len(self._rows) * len(self._lengths):
            raise ValueError("The table has holes.")

    def __call__(self, rows: int, length: int) -> float:
        def at(n: int) -> float:
            return _line(self._rows, [self.seconds[r, n] for r in self._rows], rows)

        low, high = _around(self._lengths, length)
        if low == high:
            return at(low)
        return max(1e-9, at(low) + (at(high) - at(low)) * (length - low) / (high - low))


def _around(points: Sequence[int], value: int) -> tuple[int, int]:
    """The two points that ``value`` lies between, or the outermost two; twice the same one on a point."""
    i = bisect.bisect_left(points, value)
    if (i < len(points) and points[i] == value) or len(points) == 1:
        return points[min(i, len(points) - 1)], points[min(i, len(points) - 1)]
    i = min(max(i, 1), len(points) - 1)
    return points[i - 1], points[i]


def _line(points: Sequence[int], values: Sequence[float], at: int) -> float:
    low, high = _around(points, at)
    a, b = values[points.index(low)], values[points.index(high)]
    return a if low == high else max(1e-9, a + (b - a) * (at - low) / (high - low))


def describe(traffic: Traffic, rate: float, trial: Trial) -> dict[str, Any]:
    """What a row keeps of one rate."""
    ms = sorted(trial.latencies)
    return {
        "requests_per_s": round(rate, 2),
        "tokens_per_s": round(rate * trial.tokens / len(traffic.lengths), 1),
        "p50_ms": round(quantile(ms, 0.5) * 1e3, 3),
        "p95_ms": round(quantile(ms, 0.95) * 1e3, 3),
        "p99_ms": round(quantile(ms, 0.99) * 1e3, 3),
        "padding_waste": round(trial.waste, 4),
        "rows_per_batch": round(len(traffic.lengths) / trial.batches, 2),
        "busy": round(trial.busy / trial.seconds, 4) if trial.seconds else None,
        "tops": list(traffic.tops),
    }
