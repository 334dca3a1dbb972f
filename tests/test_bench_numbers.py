"""`hwkern bench`, the parts that need no torch: percentiles, noise, traffic, budgets, energy, comparing two results."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics as stdlib
import sys
import time

import pytest

from hwkern.bench import compare, energy, settings, traffic
from hwkern.bench import statistics as numbers
from hwkern.bench.limits import Budget, at_most

# ---- percentiles and noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 100])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95, 0.99, 1.0])
def test_a_quantile_is_the_least_value_that_enough_do_not_exceed(count, share):
    values = random.Random(count).sample(range(1000), count)
    found = numbers.quantile(values, share)
    assert sum(v <= found for v in values) >= share * count - 1e-9
    below = [v for v in values if v < found]
    assert not below or sum(v <= max(below) for v in values) < share * count + 1e-9


def test_no_values_have_no_quantile():
    with pytest.raises(ValueError, match="no values"):
        numbers.quantile([], 0.5)


def test_summary_is_in_milliseconds():
    assert numbers.summary([0.001] * 19 + [0.5]) == {"p50": 1.0, "p95": 1.0, "p99": 500.0, "n": 20}


def test_one_block_says_nothing_of_noise():
    assert numbers.spread([3.0]) is None
    assert numbers.noise([3.0]) is None
    assert numbers.noise([]) is None


def test_noise_of_few_blocks_is_their_range_and_never_below_the_floor():
    assert numbers.noise([90.0, 100.0, 110.0]) == pytest.approx(0.2)
    assert numbers.noise([100.0, 100.0, 100.0]) == numbers.FLOOR


@pytest.mark.parametrize("count", range(5, 30))
def test_the_median_lies_in_its_interval_as_often_as_stated(count):
    # Blocks 1 … n: the spread tells which of them bound the interval. It misses the median when k or fewer of n fair
    # coins fall on one side; one more value taken off each side would miss it too often.
    values = [float(i) for i in range(1, count + 1)]
    taken = round((count - 1) / 2 - numbers.spread(values) * (count + 1) / 2)
    missed = [2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count for k in (taken, taken + 1)]
    assert missed[0] <= 1 - numbers.CONFIDENCE < missed[1]


def test_two_stalled_blocks_of_eleven_are_no_noise():
    blocks = [100.0, 101.0, 99.0, 100.5, 20.0, 99.5, 100.0, 101.0, 35.0, 99.0, 100.0]
    assert numbers.noise(blocks) == pytest.approx(0.02)
    assert numbers.noise([*blocks[:10], 30.0]) > 0.5


def test_a_ratio_cancels_what_slowed_both_down():
    base, ours = [100.0, 50.0, 100.0, 70.0, 100.0], [200.0, 100.0, 200.0, 140.0, 200.0]
    assert numbers.ratio(ours, base) == (2.0, numbers.FLOOR)
    with pytest.raises(ValueError, match="without blocks"):
        numbers.ratio([], base)


def runs(sigma, shift=1.0, count=2000):
    """Verdicts on pairs of runs of ``settings.BLOCKS`` normal blocks with relative deviation ``sigma``."""
    rng = random.Random(0)
    for _ in range(count):
        old, new = ([m * rng.gauss(1, sigma) for _ in range(settings.BLOCKS)] for m in (1.0, shift))
        yield numbers.change(stdlib.median(old), stdlib.median(new), numbers.noise(old), numbers.noise(new))[2]


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.03])
def test_equal_runs_are_rarely_called_different(sigma):
    # The medians differ by 0.53 σ (deviation of a median of eleven: 0.37 σ), the bound is √2 · 1.46 σ on average: 3.9
    # deviations. Blocks that happen to agree make it smaller.
    wrong = sum(verdict != "same" for verdict in runs(sigma))
    assert wrong / 2000 < 0.01


def test_a_real_slowdown_is_found():
    # 15 % against blocks with σ = 1 %: the bound is 2.8 % on average (the floor's share counted).
    found = list(runs(0.01, shift=0.85))
    assert sum(verdict == "slower" for verdict in found) / len(found) > 0.999


def test_slower_and_faster_mirror_each_other():
    for factor in (0.5, 0.9, 0.97, 1.0):
        there = numbers.change(100.0, 100.0 * factor, 0.02, 0.03)[2]
        back = numbers.change(100.0 * factor, 100.0, 0.03, 0.02)[2]
        assert {there, back} in ({"slower", "faster"}, {"same"})
    assert numbers.change(1.0, 0.1, None, 0.02)[2] == "unknown"


# ---- traffic ---------------------------------------------------------------------------------------------------------


def test_lengths_are_log_normal():
    count = 20_000
    found = traffic.log_normal_lengths(count, 7, 10**9)
    logs = [math.log(n) for n in found]
    # The mean of n normals with deviation σ lies within 4 σ/√n but once in 16 000 times; rounding a length to an
    # integer moves its logarithm by less than 1/(2·length), on average under 0.01, and both ways.
    bound = 4 * traffic.SIGMA / math.sqrt(count) + 0.01
    assert abs(stdlib.fmean(logs) - math.log(traffic.MEDIAN_LENGTH)) < bound
    assert abs(stdlib.stdev(logs) - traffic.SIGMA) < bound
    assert traffic.log_normal_lengths(count, 7, 10**9) == found
    assert traffic.log_normal_lengths(count, 8, 10**9) != found


def test_lengths_stay_between_one_and_the_most():
    found = traffic.log_normal_lengths(5000, 0, 100, median=60)
    assert min(found) >= 1
    assert max(found) == 100


def test_arrivals_are_a_poisson_process():
    count = 20_000
    times = traffic.poisson_arrivals(count, 3)
    gaps = sorted(b - a for a, b in itertools.pairwise([0.0, *times]))
    assert gaps[0] >= 0
    # Kolmogorov–Smirnov against 1 − exp(−t): the distance exceeds 2.2/√n once in 8000 times.
    distance = max(abs((i + 1) / count - (1 - math.exp(-gap))) for i, gap in enumerate(gaps))
    assert distance < 2.2 / math.sqrt(count)
    # Arrivals in disjoint windows are uncorrelated: the correlation of neighbours has deviation 1/√windows.
    windows = [0] * 2000
    for t in times:
        if t < 2000 * 8:
            windows[int(t / 8)] += 1
    mean = stdlib.fmean(windows)
    covariance = stdlib.fmean((a - mean) * (b - mean) for a, b in itertools.pairwise(windows))
    assert abs(covariance / stdlib.pvariance(windows)) < 4 / math.sqrt(2000)
    assert abs(stdlib.pvariance(windows) / mean - 1) < 4 * math.sqrt(2 / 2000)  # a Poisson count: variance = mean


def test_lengths_come_from_the_users_file(tmp_path):
    file = tmp_path / "lengths.jsonl"
    file.write_text('17\n{"length": 4}\n\n{"tokens": 900, "id": "x"}\n', encoding="utf-8")
    assert traffic.lengths_from(file, 512) == [17, 4, 512]


@pytest.mark.parametrize("line", ['"x"', "0", "-3", "1.5", "true", "[1]", '{"size": 3}', "{"])
def test_a_bad_line_is_named(tmp_path, line):
    file = tmp_path / "lengths.jsonl"
    file.write_text(f"5\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=":2"):
        traffic.lengths_from(file, 512)


def test_a_file_without_lengths_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no lengths"):
        traffic.lengths_from(tmp_path / "empty", 512)


def test_the_queue_by_hand():
    # Arrivals at 0, 1, 2 s; a batch takes 3 s. The first runs alone until 3, the other two together until 6.
    stream = traffic.Traffic([5, 10, 20], [0.0, 1.0, 2.0], (20,), 8)
    trial = stream.simulate(1.0, lambda rows, length: 3.0)
    assert trial.latencies == [3.0, 5.0, 4.0]
    assert (trial.seconds, trial.busy, trial.batches) == (6.0, 6.0, 2)
    assert (trial.tokens, trial.padded) == (35, 20 + 40)
    assert trial.waste == pytest.approx(60 / 35 - 1)


def test_idle_time_is_not_busy_time():
    stream = traffic.Traffic([1, 1], [0.0, 10.0], (1,), 8)
    trial = stream.simulate(1.0, lambda rows, length: 2.0)
    assert trial.latencies == [2.0, 2.0]
    assert (trial.seconds, trial.busy) == (12.0, 4.0)


@pytest.mark.parametrize("tops", [(), (64,), (16, 64)])
@pytest.mark.parametrize("full_rows", [False, True])
def test_every_request_is_served_once_in_a_batch_that_fits(tops, full_rows):
    lengths = traffic.log_normal_lengths(500, 1, 64, median=12)
    stream = traffic.Traffic(lengths, traffic.poisson_arrivals(500, 2), tops, 6, full_rows)
    served = []

    def serve(requests, rows, length):
        served.extend(requests)
        longest = max(lengths[i] for i in requests)
        assert 1 <= len(requests) <= rows <= 6
        if full_rows:
            assert rows in (1, 2, 4, 6)
        else:
            assert rows == len(requests)
        assert length == (longest if not tops else min(t for t in tops if t >= longest))
        return 1.5

    trial = stream.trial(2.0, serve)
    assert sorted(served) == list(range(500))
    assert min(trial.latencies) >= 1.5
    assert trial.padded >= trial.tokens


def test_one_at_a_time_waits_as_queueing_theory_says():
    # M/D/1: Poisson arrivals at rate λ, every service takes s: the mean wait is ρ·s/(2(1 − ρ)), ρ = λ·s (Pollaczek and
    # Khinchine). At ρ = 0.5 the waits of 40 000 requests, correlated over some ten, have a mean with a deviation of
    # about 0.5·s/√4000 = 0.008 s; 5 of them are 8 % of 0.5 s.
    count, service, rho = 40_000, 1.0, 0.5
    stream = traffic.Traffic([1] * count, traffic.poisson_arrivals(count, 11), (1,), 1)
    trial = stream.simulate(rho / service, lambda rows, length: service)
    wait = stdlib.fmean(trial.latencies) - service
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.08)
    assert trial.busy / trial.seconds == pytest.approx(rho, rel=0.03)


def stream_of(count=1500, **options):
    lengths = traffic.log_normal_lengths(count, 4, 256)
    return traffic.Traffic(lengths, traffic.poisson_arrivals(count, 5), **{"tops": (256,), **options})


def test_the_capacity_is_the_highest_rate_within_the_bound():
    stream = stream_of()
    service = lambda rows, length: 1e-3 + 1e-6 * rows * length  # noqa: E731
    rate, trial = stream.capacity(service, 0.02)
    assert numbers.quantile(trial.latencies, 0.95) <= 0.02
    assert numbers.quantile(stream.simulate(1.1 * rate, service).latencies, 0.95) > 0.02
    assert rate <= 1500 / stream.simulate(math.inf, service).seconds
    assert stream.capacity(service, 0.01)[0] < rate
    assert stream.capacity(lambda rows, length: service(rows, length) / 2, 0.02)[0] > rate
    assert stream.capacity(lambda rows, length: 0.03, 0.02) is None


def test_more_profiles_waste_less_and_serve_more():
    service = lambda rows, length: 2e-4 + 2e-6 * rows * length  # noqa: E731
    found = {}
    for most in (1, 2, 4):
        stream = stream_of(tops=traffic.profiles(stream_of().lengths, most))
        found[most] = stream.capacity(service, 0.05)
    wastes = [trial.waste for _, trial in found.values()]
    rates = [rate for rate, _ in found.values()]
    assert wastes == sorted(wastes, reverse=True)
    assert rates == sorted(rates)
    exact = stream_of(tops=())
    assert exact.simulate(1e-6, service).waste == 0  # one at a time: nothing to pad to


def test_traffic_that_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="reach 9 tokens"):
        traffic.Traffic([9], [0.0], (8,))
    with pytest.raises(ValueError, match="ascend"):
        traffic.Traffic([9], [0.0], (20, 10))
    with pytest.raises(ValueError, match="as many of both"):
        traffic.Traffic([9], [])


def test_the_table_is_exact_on_its_grid_and_straight_between():
    table = traffic.Table({(r, n): 0.1 + 0.01 * r + 0.001 * n for r in (1, 2, 8) for n in (16, 64)})
    for rows in range(1, 12):
        for length in (16, 20, 64, 80):
            assert table(rows, length) == pytest.approx(0.1 + 0.01 * rows + 0.001 * length)
    assert traffic.Table({(1, 8): 0.5})(7, 99) == 0.5
    with pytest.raises(ValueError, match="holes"):
        traffic.Table({(1, 8): 0.5, (2, 16): 0.5})


def test_the_grid_covers_every_batch():
    stream = stream_of(tops=(64, 256), max_rows=24)
    assert traffic.grid(stream) == [(r, n) for n in (64, 256) for r in (1, 2, 4, 8, 16, 24)]
    free = traffic.grid(stream_of(tops=(), max_rows=4))
    assert {r for r, _ in free} == {1, 2, 4}
    assert max(n for _, n in free) == max(stream_of().lengths)


def test_measured_times_every_shape_at_least_once_and_stops():
    calls = []

    def serve(requests, rows, length):
        calls.append((rows, length))
        assert [len(r) for r in requests] == [length] * rows
        time.sleep(1e-3)
        return 0.5, 0.1

    assert traffic.measured([(1, 4), (2, 8)], serve, 0.0) == {(1, 4): (0.5, 0.1), (2, 8): (0.5, 0.1)}
    assert calls == [(1, 4), (2, 8)]
    traffic.measured([(1, 4), (2, 8)], serve, 0.02)
    assert len(calls) >= 6


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_limit_ends_what_takes_too_long():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not ready after 0\.1 s"), at_most(0.1):
        time.sleep(5)
    assert time.monotonic() - start < 2
    time.sleep(0.15)  # and strikes no more afterwards


def test_no_except_clause_swallows_a_limit():
    def stubborn():
        while True:
            try:
                time.sleep(5)
            except Exception:
                continue

    with pytest.raises(TimeoutError), at_most(0.1):
        stubborn()


def test_the_nearer_of_two_limits_holds():
    with pytest.raises(TimeoutError, match=r"0\.1 s"), at_most(0.1), at_most(9):
        time.sleep(5)
    with at_most(9), pytest.raises(TimeoutError, match=r"0\.1 s"), at_most(0.1):
        time.sleep(5)
    start = time.monotonic()

    def one_inside_the_other():
        with pytest.raises(TimeoutError, match=r"0\.1 s"), at_most(0.1):
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(TimeoutError, match=r"0\.3 s"), at_most(0.3):
        one_inside_the_other()
    assert 0.25 < time.monotonic() - start < 2


def test_without_a_limit_nothing_happens():
    for limit in (None, math.inf):
        with at_most(limit):
            pass
    with pytest.raises(TimeoutError, match="no time left"), at_most(0):
        raise AssertionError


def test_a_budget_counts_from_its_start():
    assert math.isinf(Budget(None).left)
    assert math.isinf(Budget(0).share(0.1).left)
    budget = Budget(10, time.monotonic() - 4)
    assert 5.5 < budget.left <= 6
    assert 2.5 < budget.share(0.5).left <= 3
    assert Budget(1, time.monotonic() - 2).spent


# ---- energy ----------------------------------------------------------------------------------------------------------


class FakeNvml:
    """A GPU that takes 300 W."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVMLError = RuntimeError

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setitem(sys.modules, "pynvml", self)
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == b"GPU-abc"
        return "gpu"

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):  # noqa: N802
        return round(300 * self.now * 1e3)  # millijoules

    def nvmlDeviceGetClockInfo(self, gpu, which):  # noqa: N802
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):  # noqa: N802
        return 700_000


def test_a_stretch_begins_and_ends_at_a_step_of_the_counter(monkeypatch):
    nvml = FakeNvml(monkeypatch)
    meter = energy.Meter("abc")
    assert meter.problem is None
    assert meter.clocks() == {"sm_mhz": 1980, "memory_mhz": 2619, "power_limit_w": 700}
    # The counter moves every 0.1 s; a call takes 0.03 s, does 7 units and the GPU draws 300 W.
    monkeypatch.setattr(
        nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda gpu: 30_000 * math.floor(nvml.now * 10 + 1e-6)
    )

    def call():
        nvml.now += 0.03
        return 7.0

    found = energy.stretch(meter, call)
    # Each end is seen at the end of the call in which the counter moved: late by less than a call.
    assert found.joules in (90, 120)
    assert found.seconds == pytest.approx(found.joules / 300, abs=0.03)
    assert found.units == pytest.approx(7 * found.seconds / 0.03)
    assert found.watts == pytest.approx(300, rel=0.1)


def test_a_counter_that_does_not_move_has_no_energy(monkeypatch):
    nvml = FakeNvml(monkeypatch)
    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda gpu: 5)

    def call():
        nvml.now += 0.5
        return 1.0

    assert energy.stretch(energy.Meter("abc"), call) is None


def test_without_a_counter_the_reason_is_said(monkeypatch):
    assert "NVIDIA GPUs only" in energy.Meter(None).problem
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = energy.Meter("abc")
    assert "pip install nvidia-ml-py" in meter.problem
    assert meter.read() is None
    assert meter.clocks() == {}
    assert energy.stretch(meter, lambda: 1.0) is None


# ---- workloads -------------------------------------------------------------------------------------------------------


def test_workloads_read_back_by_name():
    for text in ("8x128", "32", "decode:1x128+32", "traffic:4", "traffic:0"):
        assert settings.workload(text).name == text
    assert settings.workload("traffic").name == "traffic:4"
    assert settings.workload("8x128").tokens == 1024
    assert settings.workload("32").tokens == 32
    assert settings.workload("decode:2x128+32").tokens == 64


@pytest.mark.parametrize(
    "text", ["", "0x8", "8x0", "x", "8x", "decode:1x8", "decode:1x8+1", "decode:0x8+2", "traffic:x"]
)
def test_a_workload_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="must be like"):
        settings.workload(text)


def test_a_model_gets_the_workloads_that_it_takes():
    wanted = tuple(map(settings.workload, ("8x128", "32", "decode:1x8+2", "traffic:4")))
    run, left = settings.workloads_of("encoder", wanted, True)
    assert [w.name for w in run] == ["8x128", "traffic:4"]
    assert set(left) == {"32", "decode:1x8+2"}
    run, left = settings.workloads_of("decoder", wanted, True)
    assert [w.name for w in run] == ["8x128", "decode:1x8+2"]
    assert "continuous batching" in left["traffic:4"]
    run, left = settings.workloads_of("image", wanted, True)
    assert [w.name for w in run] == ["32"]
    assert left["8x128"] == "images have no length"
    for kind in settings.DEFAULTS:
        for cuda in (False, True):
            run, left = settings.workloads_of(kind, (), cuda)
            assert run
            assert not left


# ---- comparing two results -------------------------------------------------------------------------------------------


def document(rates, **environment):
    rows = []
    for name, value in rates.items():
        model, workload, path = name.split()
        row = {"model": model, "workload": workload, "path": path, "status": "ok"}
        if isinstance(value, str):
            row |= {"status": "absent", "reason": value}
        else:
            rate, noise = value
            row |= {"tokens_per_s": rate, "noise": noise}
        rows.append(row)
    known = {"gpu": "Test GPU", "commit": "abc", **environment}
    return {"schema": 1, "benchmark": "comparison", "environment": known, "rows": rows}


def test_every_row_gets_its_verdict():
    old = document(
        {"m w same": (100, 0.05), "m w slow": (100, 0.02), "m w fast": (100, 0.02), "m w gone": (9, 0.02),
         "m w broken": (9, 0.02), "m w never": "not installed", "m w once": (100, None)}
    )  # fmt: skip
    new = document(
        {"m w same": (95, 0.05), "m w slow": (90, 0.02), "m w fast": (110, 0.02), "m w broken": "it failed",
         "m w never": "not installed", "m w once": (10, 0.02), "m w more": (5, 0.02)}
    )  # fmt: skip
    found = {d.name.split()[-1]: d for d in compare.differences(old, new)}
    assert {name: d.verdict for name, d in found.items()} == {
        "same": "same", "slow": "slower", "fast": "faster", "gone": "lost", "broken": "lost", "once": "unknown",
        "more": "new",
    }  # fmt: skip
    assert found["slow"].ratio == pytest.approx(0.9)
    assert found["slow"].bound == pytest.approx(math.hypot(0.02, 0.02))
    assert found["broken"].note == "it failed"
    assert compare.regressed(list(found.values()))
    assert not compare.regressed([found["same"], found["fast"], found["more"], found["once"]])
    text = compare.text(list(found.values()), old, new)
    assert "m w slow" in text
    assert "0.900×" in text
    assert "m w same" not in text
    assert "2 lost" in text


def test_ratios_of_two_runs_agree_within_the_noise_of_both():
    def run(**values):
        made = document(dict.fromkeys([f"m w {path}" for path in values], (100, 0.02)))
        for row in made["rows"]:
            value, noise = values[row["path"]]
            row["ratio"] = {"to": "fp16", "value": value, "noise": noise}
        return made

    old = run(fp16=(1, 0.02), a=(1.8, 0.02), b=(1.2, 0.1), c=(1.5, 0.02))
    new = run(fp16=(1, 0.02), a=(1.84, 0.02), b=(1.31, 0.02), c=(1.4, 0.02))
    count, moved = compare.ratios(old, new)
    assert count == 3  # the baseline's own is 1
    assert [(d.name, d.verdict) for d in moved] == [("m w c", "slower")]
    assert moved[0].bound == pytest.approx(math.hypot(0.02, 0.02))
    text = compare.text(compare.differences(old, new), old, new)
    assert "Ratios: 2 of 3 agree within their noise. m w c 1.500× to 1.400×." in text
    assert "Ratios: 3 of 3 agree within their noise." in compare.text(compare.differences(old, old), old, old)


def test_the_command_exits_with_one_when_something_got_slower(tmp_path, capsys):
    from hwkern import cli

    paths = []
    for name, rate in (("old", 100), ("worse", 50), ("better", 200)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(document({"m w p": (rate, 0.02)})), encoding="utf-8")
    old, worse, better = map(str, paths)
    assert cli.main(["bench", "--compare", old, worse]) == 1
    assert "slower" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", old, better]) == 0
    assert cli.main(["bench", "--compare", old, old]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "no result"),
        ('{"benchmark": "gemm", "schema": 1}', "no result"),
        (None, "No such"),
    ],
)
def test_what_is_no_result_is_refused_with_a_sentence(tmp_path, capsys, content, words):
    from hwkern import cli

    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(document({})), encoding="utf-8")
    if content is not None:
        bad.write_text(content, encoding="utf-8")
    assert cli.main(["bench", "--compare", str(good), str(bad)]) == 1
    assert words in capsys.readouterr().err


def test_two_machines_are_not_compared():
    with pytest.raises(compare.CompareError, match="different machines"):
        compare.differences(document({}), document({}, gpu="Other GPU"))


def test_kernels_are_compared_by_their_time():
    def kernels(us):
        row = {
            "operator": "INT8 GEMM",
            "dtype": "bfloat16",
            "m": 1,
            "n": 2,
            "k": 3,
            "status": "ok",
            "us": us,
            "noise": 0.02,
        }
        return {"schema": 1, "benchmark": "kernels", "environment": {"gpu": "G"}, "rows": [row]}

    (found,) = compare.differences(kernels(10.0), kernels(20.0))
    assert (found.verdict, found.ratio) == ("slower", 0.5)
    with pytest.raises(compare.CompareError, match="benchmark"):
        compare.differences(kernels(1.0), document({}))


def test_the_comparison_needs_no_torch():
    """The child with TensorRT imports traffic, and a reader of results may have no torch."""
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import hwkern.bench.traffic, hwkern.bench.compare, hwkern.bench.statistics, hwkern.bench.engine_child\n"
        "import hwkern.bench.settings, hwkern.bench.energy, hwkern.bench.limits, hwkern.bench.record"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
