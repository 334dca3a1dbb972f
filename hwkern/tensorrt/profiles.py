"""Optimization profiles from a sample of real request shapes.

TensorRT tunes a dynamic engine for one shape per profile (``opt``) and serves shapes between ``min`` and ``max``. A
request far from its profile's ``opt`` runs on kernels that were chosen for another size, and one that is padded to the
profile's ``max`` (fixed-shape CUDA graphs, batching) pays for the difference. So profiles should lie where the
requests are. ``profiles_from`` finds the cut of a sample into k profiles with the least padding, for every k, and
shows what each choice costs.

The waste of a cut: Σ over requests of (volume of its profile's max − its own volume), over the Σ of its own volumes;
the volume of a request is the product of all its varying dimensions. When the shapes form a chain (each is at least as
large as the one before in every dimension: one dynamic dimension, or several that grow together) the best cut is found
by dynamic programming over the sorted sizes. Otherwise groups are merged two by two, always the pair that adds the
least waste: a heuristic.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hwkern._console import plain_table

Shape = tuple[int, ...]
Request = Mapping[str, Any]  # input name → array or shape

# The merging heuristic is cubic; a sample with more distinct shapes is first rounded up to a grid.
_MOST_DISTINCT = 160


@dataclass(frozen=True)
class Profile:
    """Shape ranges of one optimization profile, by input name."""

    min: Mapping[str, Shape]
    opt: Mapping[str, Shape]
    max: Mapping[str, Shape]

    def __post_init__(self) -> None:
        names = set(self.opt)
        if set(self.min) != names or set(self.max) != names:
            raise ValueError(
                f"A profile names the same inputs in min, opt and max, not {sorted(names ^ set(self.min))}."
            )
        for name in names:
            low, best, high = self.min[name], self.opt[name], self.max[name]
            ordered = len(low) == len(best) == len(high) and all(
                0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)
            )
            if not ordered:
                raise ValueError(f"profile of {name!r}: min {low}, opt {best}, max {high} are not in this order.")

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether every shape is inside; inputs that the profile does not name do not count."""
        return all(
            len(shape) == len(self.min[name])
            and all(a <= d <= b for a, d, b in zip(self.min[name], shape, self.max[name], strict=True))
            for name, shape in shapes.items()
            if name in self.min
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """Σ |log(d / opt)| over all dimensions: how far the shapes are from what the profile is tuned for."""
        return sum(
            abs(math.log(max(d, 1) / max(o, 1)))
            for name, shape in shapes.items()
            if name in self.opt
            for d, o in zip(shape, self.opt[name], strict=False)
        )

    def gap(self, shapes: Mapping[str, Shape]) -> float:
        """How far the shapes are outside: Σ |log| of what each dimension would have to change; inf for other ranks."""
        total = 0.0
        for name, shape in shapes.items():
            if name not in self.min:
                continue
            if len(shape) != len(self.min[name]):
                return math.inf
            for a, d, b in zip(self.min[name], shape, self.max[name], strict=True):
                total += abs(math.log(max(d, 1) / max(1, min(max(d, a), b))))
        return total

    def to_dict(self) -> dict[str, Any]:
        return {kind: {n: list(s) for n, s in getattr(self, kind).items()} for kind in ("min", "opt", "max")}

    def __str__(self) -> str:
        return ", ".join(f"{n}: {_text(self.min[n])} … {_text(self.opt[n])} … {_text(self.max[n])}" for n in self.opt)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


@dataclass(frozen=True)
class Choice:
    """The best cut into a number of profiles."""

    waste: float  # 0.25: padding every request to its profile's max makes 25 % more work
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class Profiles(Sequence[Profile]):
    """The chosen profiles, and what every other number of them would waste; ``print`` it."""

    profiles: tuple[Profile, ...]
    choices: Mapping[int, Choice] = field(repr=False)
    exact: bool = True  # by dynamic programming; False: by the merging heuristic

    def __getitem__(self, index: Any) -> Any:
        return self.profiles[index]

    def __len__(self) -> int:
        return len(self.profiles)

    def __iter__(self) -> Iterator[Profile]:
        return iter(self.profiles)

    @property
    def waste(self) -> float:
        return self.choices[len(self.profiles)].waste

    def __str__(self) -> str:
        rows = [
            (str(k), f"{100 * c.waste:.1f} %", "chosen" if k == len(self) else "")
            for k, c in sorted(self.choices.items())
        ]
        how = "" if self.exact else " (heuristic: shapes that grow in different directions)"
        table = plain_table(f"padding waste by number of profiles{how}", ("profiles", "waste", ""), rows)
        return "\n".join([table, *(f"{i}: {p}" for i, p in enumerate(self.profiles))])


def profiles_from(requests: Sequence[Request], max_profiles: int = 4, tolerance: float = 0.02) -> Profiles:
    """Profiles that cover every request of a sample.

    Args:
        requests: one mapping per request: input name → array (anything with ``.shape``) or shape.
        max_profiles: the most to consider. Each profile costs build time and some engine size.
        tolerance: the smallest number of profiles is chosen whose waste is at most this much (0.02: 2 % of the work)
            above that of ``max_profiles``.

    Returns:
        :class:`Profiles`: a sequence for ``build``, with the waste of each choice.

    Raises:
        ValueError: no requests; other inputs or ranks than the first request; max_profiles < 1.
    """
    if max_profiles < 1:
        raise ValueError(f"max_profiles = {max_profiles}: at least 1.")
    names, counts = _points(requests)
    points = sorted(counts, key=lambda p: (math.prod(p), p))
    exact = all(all(a <= b for a, b in zip(p, q, strict=True)) for p, q in itertools.pairwise(points))
    volumes = _Volumes(points)
    cuts = (
        _chain_cuts(points, counts, max_profiles, volumes)
        if exact
        else _merged_cuts(points, counts, max_profiles, volumes)
    )
    work = sum(volumes.of(p) * c for p, c in counts.items())
    choices = {
        k: Choice(waste / work, _profiles(groups, counts, names, volumes)) for k, (waste, groups) in cuts.items()
    }
    least = choices[max(choices)].waste
    best = min(k for k, choice in choices.items() if choice.waste <= least + tolerance)
    return Profiles(choices[best].profiles, choices, exact)


def _points(requests: Sequence[Request]) -> tuple[list[tuple[str, int]], Counter[Shape]]:
    """([(input name, rank)], every request as one tuple of all its dimensions → how often)."""
    requests = list(requests)
    if not requests:
        raise ValueError("profiles_from needs at least one request.")
    shapes = [{name: _shape(v) for name, v in request.items()} for request in requests]
    names = [(name, len(shape)) for name, shape in shapes[0].items()]
    counts: Counter[Shape] = Counter()
    for i, request in enumerate(shapes):
        if {name: len(shape) for name, shape in request.items()} != dict(names):
            raise ValueError(
                f"request {i} has the inputs {request}, but the first has {shapes[0]}: names and ranks differ."
            )
        counts[tuple(d for name, _ in names for d in request[name])] += 1
    return names, counts


def _shape(value: Any) -> Shape:
    dims: Any = getattr(value, "shape", value)
    return tuple(int(d) for d in dims)


class _Volumes:
    """Product of the dimensions that vary in the sample, each size counted once.

    Dimensions that move together in all requests (the sequence length of ids and of their mask) are one.
    """

    def __init__(self, points: Sequence[Shape]) -> None:
        columns = {tuple(p[i] for p in points): i for i in range(len(points[0]))}
        self.indices = [i for column, i in columns.items() if len(set(column)) > 1]

    def of(self, point: Shape) -> float:
        return math.prod(max(1, point[i]) for i in self.indices)


_Groups = list[list[Shape]]


def _chain_cuts(
    points: list[Shape], counts: Counter[Shape], most: int, volumes: _Volumes
) -> dict[int, tuple[float, _Groups]]:
    """Least-waste cuts of a chain into 1 … most intervals: cost[k][j] = min over i of cost[k-1][i] + waste(i … j)."""
    n = len(points)
    weight, load = [0.0], [0.0]
    for p in points:
        weight.append(weight[-1] + counts[p])
        load.append(load[-1] + counts[p] * volumes.of(p))

    def waste(i: int, j: int) -> float:  # points i … j-1 in one profile
        return volumes.of(points[j - 1]) * (weight[j] - weight[i]) - (load[j] - load[i])

    cost = [[math.inf] * (n + 1) for _ in range(most + 1)]
    cut = [[0] * (n + 1) for _ in range(most + 1)]
    cost[0][0] = 0.0
    for k in range(1, most + 1):
        for j in range(1, n + 1):
            for i in range(k - 1, j):
                total = cost[k - 1][i] + waste(i, j)
                if total < cost[k][j]:
                    cost[k][j], cut[k][j] = total, i
    found = {}
    for k in range(1, min(most, n) + 1):
        groups: _Groups = []
        j = n
        for level in range(k, 0, -1):
            groups.insert(0, points[cut[level][j] : j])
            j = cut[level][j]
        found[k] = (cost[k][n], groups)
    return found


def _merged_cuts(
    points: list[Shape], counts: Counter[Shape], most: int, volumes: _Volumes
) -> dict[int, tuple[float, _Groups]]:
    groups: _Groups = [[p] for p in points] if len(points) <= _MOST_DISTINCT else _on_grid(points)
    sizes = [sum(counts[p] for p in g) for g in groups]
    tops = [_top(g) for g in groups]
    loads = [sum(counts[p] * volumes.of(p) for p in g) for g in groups]

    def waste() -> float:
        return sum(volumes.of(t) * s - w for t, s, w in zip(tops, sizes, loads, strict=True))

    found = {}
    while True:
        if len(groups) <= most:
            found[len(groups)] = (waste(), [list(g) for g in groups])
        if len(groups) == 1:
            return found

        def added(i: int, j: int) -> float:
            top = volumes.of(tuple(map(max, tops[i], tops[j])))
            return top * (sizes[i] + sizes[j]) - volumes.of(tops[i]) * sizes[i] - volumes.of(tops[j]) * sizes[j]

        i, j = min(((i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))), key=lambda ij: added(*ij))
        groups[i] = groups[i] + groups[j]
        tops[i] = tuple(map(max, tops[i], tops[j]))
        sizes[i] += sizes[j]
        loads[i] += loads[j]
        for items in (groups, tops, sizes, loads):
            del items[j]


def _on_grid(points: list[Shape]) -> _Groups:
    """Group shapes whose dimensions round up to the same power of √2 (then of 2, of 4 …)."""
    step = 0.5
    while True:
        cells: dict[tuple[int, ...], list[Shape]] = {}
        for p in points:
            cells.setdefault(tuple(math.ceil(math.log2(max(1, d)) / step) for d in p), []).append(p)
        if len(cells) <= _MOST_DISTINCT:
            return list(cells.values())
        step *= 2


def _top(group: Sequence[Shape]) -> Shape:
    return tuple(map(max, zip(*group, strict=True)))


def _profiles(
    groups: _Groups, counts: Counter[Shape], names: list[tuple[str, int]], volumes: _Volumes
) -> tuple[Profile, ...]:
    def split(point: Shape) -> dict[str, Shape]:
        shapes, at = {}, 0
        for name, rank in names:
            shapes[name] = point[at : at + rank]
            at += rank
        return shapes

    made = []
    for group in groups:
        # Tuned for the shape on which most of the group's work is done.
        best = max(group, key=lambda p: counts[p] * volumes.of(p))
        made.append(Profile(split(tuple(map(min, zip(*group, strict=True)))), split(best), split(_top(group))))
    return tuple(made)
