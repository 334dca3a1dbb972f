"""profiles_from: covers every request, wastes least, says what each choice costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hwkern.tensorrt as ht
from hwkern.tensorrt.builder import default_profile

lengths = st.lists(st.integers(1, 512), min_size=1, max_size=9)
boxes = st.lists(st.tuples(st.integers(1, 16), st.integers(1, 256)), min_size=1, max_size=30)


def brute_force(sizes: Sequence[int], k: int) -> int:
    """The least padding of any cut of the sorted sizes into at most k runs: the definition, tried out."""
    ordered = sorted(sizes)
    n = len(ordered)
    best = math.inf
    for count in range(1, min(k, n) + 1):
        for cuts in itertools.combinations(range(1, n), count - 1):
            edges = [0, *cuts, n]
            waste = sum(ordered[b - 1] * (b - a) - sum(ordered[a:b]) for a, b in itertools.pairwise(edges))
            best = min(best, waste)
    return int(best)


@given(lengths, st.integers(1, 4))
@settings(deadline=None, max_examples=150)
def test_one_dimension_is_cut_optimally(sizes: list[int], k: int) -> None:
    made = ht.profiles_from([{"x": (8, n)} for n in sizes], max_profiles=k, tolerance=0.0)
    assert made.exact
    work = sum(sizes) if len(set(sizes)) > 1 else len(sizes)
    found = min(choice.waste for choice in made.choices.values()) * work
    assert found == pytest.approx(brute_force(sizes, k))
    assert made.waste * work == pytest.approx(found)


@given(boxes, st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_every_request_is_covered_and_waste_falls_with_more_profiles(shapes: list[tuple[int, int]], k: int) -> None:
    requests = [{"ids": shape, "mask": shape, "labels": (shape[0],)} for shape in shapes]
    made = ht.profiles_from(requests, max_profiles=k)
    assert 1 <= len(made) <= k
    for request in requests:
        assert any(profile.covers(request) for profile in made)
    for choice in made.choices.values():
        assert all(any(p.covers(r) for p in choice.profiles) for r in requests)
    wastes = [made.choices[n].waste for n in sorted(made.choices)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(wastes))
    assert all(p.min[n] <= p.opt[n] <= p.max[n] for p in made for n in p.opt)


def test_the_reported_waste_is_what_padding_costs() -> None:
    sizes = [10, 10, 10, 20, 100]
    made = ht.profiles_from([{"x": (n,)} for n in sizes], max_profiles=2, tolerance=0.0)
    # {10, 10, 10, 20} → 20 pads 3 · 10 = 30 of 150; {100} pads nothing.
    assert made.choices[2].waste == pytest.approx(30 / 150)
    assert made.choices[1].waste == pytest.approx((4 * 90 - 10 + 0) / 150)
    assert [p.max["x"] for p in made] == [(20,), (100,)]
    assert made[0].opt["x"] == (10,)  # three requests of 10 are more work than one of 20
    assert "chosen" in str(made)
    assert "20.0 %" in str(made)


def test_no_more_profiles_than_they_are_worth() -> None:
    requests = [{"x": (n,)} for n in (100, 101, 102, 103)]
    assert len(ht.profiles_from(requests, max_profiles=4, tolerance=0.05)) == 1
    assert len(ht.profiles_from(requests, max_profiles=4, tolerance=0.0)) == 4


def test_dimensions_that_move_together_count_once() -> None:
    requests = [{"ids": (1, n), "mask": (1, n)} for n in (10, 20)]
    assert ht.profiles_from(requests, 1).waste == pytest.approx(10 / 30)


def test_many_distinct_shapes_are_put_on_a_grid() -> None:
    requests = [{"x": (1 + i % 37, 1 + (i * 7919) % 499)} for i in range(1500)]
    made = ht.profiles_from(requests, 3)
    assert not made.exact
    assert all(any(p.covers(r) for p in made) for r in requests)


def test_arrays_and_bad_requests() -> None:
    numpy = pytest.importorskip("numpy")
    assert ht.profiles_from([{"x": numpy.zeros((2, 3))}])[0].max == {"x": (2, 3)}
    with pytest.raises(ValueError, match="at least one request"):
        ht.profiles_from([])
    with pytest.raises(ValueError, match="at least 1"):
        ht.profiles_from([{"x": (1,)}], 0)
    with pytest.raises(ValueError, match="names and ranks differ"):
        ht.profiles_from([{"x": (1, 2)}, {"x": (1,)}])
    with pytest.raises(ValueError, match="names and ranks differ"):
        ht.profiles_from([{"x": (1, 2)}, {"y": (1, 2)}])


def test_profiles_check_themselves() -> None:
    with pytest.raises(ValueError, match="not in this order"):
        ht.Profile({"x": (2,)}, {"x": (1,)}, {"x": (3,)})
    with pytest.raises(ValueError, match="the same inputs"):
        ht.Profile({"x": (2,)}, {"y": (2,)}, {"x": (3,)})
    with pytest.raises(ValueError, match="not in this order"):
        ht.Profile({"x": (2,)}, {"x": (2, 2)}, {"x": (3,)})


def test_the_default_profile() -> None:
    made = default_profile({"ids": (-1, -1), "image": (-1, 3, -1, 224)})
    assert made.opt == {"ids": (8, 128), "image": (8, 3, 128, 224)}
    assert made.min["image"] == (1, 3, 1, 224)
    assert made.max["ids"] == (32, 512)
