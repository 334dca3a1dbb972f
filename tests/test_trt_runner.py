"""The runner's own logic, on a driver and a TensorRT in host memory; the real ones run in test_trt_gpu.py."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

import fake_tensorrt as fake

from hwkern.tensorrt import _api, _cuda, _results, measure
from hwkern.tensorrt.runner import Runner
from hwkern.tensorrt.runners import Runners

# min, opt, max of x [batch, length]
SHORT = ((1, 1), (4, 16), (8, 32))
LONG = ((1, 16), (4, 128), (8, 256))


@pytest.fixture(params=["results copied", "results handed out"])
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> fake.Driver:
    if request.param == "results handed out":
        monkeypatch.setattr(_results, "_LEAST", 1)
    return installed(monkeypatch)


def installed(monkeypatch: pytest.MonkeyPatch) -> fake.Driver:
    made = fake.Driver()
    monkeypatch.setattr(_cuda, "attempt", made)
    monkeypatch.setattr(_api, "find", lambda trt=None: _api.TensorRT(fake.module()))
    return made


@pytest.fixture
def engine(driver: fake.Driver) -> fake.ICudaEngine:
    return fake.ICudaEngine(driver, [SHORT, LONG])


def check(x: Any, outputs: dict[str, Any]) -> None:
    np.testing.assert_array_equal(outputs["y"], 2 * x + 1)
    np.testing.assert_array_equal(outputs["s"], x.sum(1))


def some(batch: int, length: int, start: float = 0.0) -> Any:
    return (np.arange(batch * length, dtype=np.float32).reshape(batch, length) + start) % 64


def test_numpy_in_numpy_out(engine: fake.ICudaEngine) -> None:
    with Runner(engine) as run:
        for length in (3, 5, 3, 3, 200):
            x = some(2, length, length)
            check(x, run({"x": x}))
            check(x, run(x))
            check(x, run([x]))


def test_the_second_call_of_a_shape_is_captured_and_later_ones_replayed(
    engine: fake.ICudaEngine, driver: fake.Driver
) -> None:
    with Runner(engine) as run:
        for number in range(5):
            x = some(2, 4, number)
            check(x, run({"x": x}))
        assert sum(c.enqueued for c in engine.contexts) == 2  # one to warm up, one into the graph
        assert driver.launches == 4


def test_an_engine_that_cannot_be_captured_runs_all_the_same(engine: fake.ICudaEngine, driver: fake.Driver) -> None:
    driver.fail_capture = True
    with Runner(engine) as run:
        for number in range(4):
            x = some(2, 4, number)
            check(x, run({"x": x}))
        assert driver.launches == 0


def test_no_graphs(engine: fake.ICudaEngine, driver: fake.Driver) -> None:
    with Runner(engine, graphs=0) as run:
        for number in range(4):
            check(some(1, 2, number), run({"x": some(1, 2, number)}))
    assert "cuStreamBeginCapture_v2" not in driver.log


def test_more_shapes_than_graphs_evicts_the_oldest(engine: fake.ICudaEngine, driver: fake.Driver) -> None:
    with Runner(engine, graphs=4) as run:
        for _ in range(3):
            for length in range(1, 12):
                x = some(1, length)
                check(x, run({"x": x}))
        # x, y and s on the device and staged, for at most four shapes (and the one that pushed the oldest out)
        assert len(driver.memory) <= 6 * 5
    assert not driver.memory


@pytest.mark.parametrize("graphs", [0, 16])
def test_arrays_on_the_gpu(engine: fake.ICudaEngine, graphs: int) -> None:
    with Runner(engine, graphs=graphs) as run:
        for number in range(4):
            x = fake.GpuArray(some(3, 7, number))
            outputs = run({"x": x})
            check(x.values, {name: fake.values_of(value) for name, value in outputs.items()})


def test_results_on_the_gpu_belong_to_the_caller(engine: fake.ICudaEngine, driver: fake.Driver) -> None:
    with Runner(engine) as run:
        first = run({"x": fake.GpuArray(some(2, 3))})
        for number in range(4):
            run({"x": fake.GpuArray(some(2, 3, 10 + number))})
    np.testing.assert_array_equal(fake.values_of(first["y"]), 2 * some(2, 3) + 1)
    del first
    assert not driver.memory


def test_outputs_of_the_caller_are_written_in_place(engine: fake.ICudaEngine) -> None:
    with Runner(engine) as run:
        target = fake.GpuArray(np.zeros((2, 3), np.float32))
        outputs = run({"x": fake.GpuArray(some(2, 3))}, outputs={"y": target})
        assert outputs["y"] is target
        np.testing.assert_array_equal(target.values, 2 * some(2, 3) + 1)
        with pytest.raises(ValueError, match=r"must be \(2, 3\)"):
            run({"x": fake.GpuArray(some(2, 3))}, outputs={"y": fake.GpuArray(np.zeros((2, 4)))})
        with pytest.raises(TypeError, match="on the host"):
            run({"x": fake.GpuArray(some(2, 3))}, outputs={"y": np.zeros((2, 3), np.float32)})
        with pytest.raises(KeyError, match="no output z"):
            run({"x": some(2, 3)}, outputs={"z": target})


def test_torch_on_the_cpu_gives_torch(engine: fake.ICudaEngine) -> None:
    with Runner(engine) as run:
        x = torch.randn(3, 4)
        y = run({"x": x.t()[:, ::2]})["y"]
        assert torch.equal(y, 2 * x.t()[:, ::2] + 1)


def test_dlpack(engine: fake.ICudaEngine) -> None:
    class Packed:
        """Speaks DLPack alone, and says that it is on a GPU."""

        def __init__(self, x: Any) -> None:
            self.x = torch.from_numpy(x)

        def __dlpack__(self) -> Any:
            from hwkern.tensorrt._arrays import _DLTensor

            capsule = self.x.__dlpack__()
            get = ctypes.pythonapi.PyCapsule_GetPointer
            get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
            _DLTensor.from_address(get(capsule, b"dltensor")).device_type = 2
            return capsule

    with Runner(engine) as run:
        outputs = run({"x": Packed(some(2, 5))})
        check(some(2, 5), {name: fake.values_of(value) for name, value in outputs.items()})


def test_the_profile_that_is_tuned_nearest_is_used(engine: fake.ICudaEngine) -> None:
    with Runner(engine) as run:
        assert run.choose_profile({"x": (4, 16)}) == 0
        assert run.choose_profile({"x": (4, 32)}) == 0
        assert run.choose_profile({"x": (4, 33)}) == 1
        assert run.choose_profile({"x": (1, 1)}) == 0
        check(some(8, 256), run({"x": some(8, 256)}))
        check(some(8, 2), run({"x": some(8, 2)}))


def test_a_shape_outside_every_profile_names_the_nearest(engine: fake.ICudaEngine) -> None:
    with Runner(engine) as run:
        with pytest.raises(ValueError, match=r"covers x: 9x300\. The nearest is number 1 .*1x16 … 4x128 … 8x256"):
            run({"x": some(9, 300)})
        with pytest.raises(ValueError, match=r"covers x: 9x2\. The nearest is number 0"):
            run({"x": some(9, 2)})
        with pytest.raises(ValueError, match=r"x has the shape \(4,\), but the engine takes \(-1, -1\)"):
            run({"x": np.zeros(4, np.float32)})


def test_wrong_requests(engine: fake.ICudaEngine) -> None:
    with Runner(engine) as run:
        with pytest.raises(KeyError, match="lacks x"):
            run({})
        with pytest.raises(KeyError, match="no input z"):
            run({"x": some(1, 1), "z": some(1, 1)})
        with pytest.raises(ValueError, match="2 inputs, but the engine has 1"):
            run([some(1, 1), some(1, 1)])
        with pytest.raises(TypeError, match="x is float64, but the engine takes float32"):
            run({"x": np.zeros((2, 2))})
        with pytest.raises(TypeError, match="x is float16, but the engine takes float32"):
            run({"x": torch.zeros(2, 2, dtype=torch.float16)})
        with pytest.raises(TypeError, match="x is a str"):
            run({"x": "text"})
        with pytest.raises(ValueError, match="gaps"):
            run({"x": fake.GpuArray(np.zeros((2, 3)), strides=(24, 8))})
    with pytest.raises(RuntimeError, match="closed"):
        run({"x": some(1, 1)})
    run.close()
    with pytest.raises(TypeError, match="not int"):
        Runner(3)


def test_map_keeps_the_order_and_frees_everything(engine: fake.ICudaEngine, driver: fake.Driver) -> None:
    with Runner(engine) as run:
        requests = [some(1 + i % 3, 1 + i % 5, i) for i in range(30)]
        for depth in (1, 2, 3):
            results = list(run.map(({"x": x} for x in requests), depth=depth))
            for x, outputs in zip(requests, results, strict=True):
                check(x, outputs)
        del results, outputs
        with pytest.raises(ValueError, match="depth = 0"):
            next(run.map([{"x": requests[0]}], depth=0))
        early = run.map({"x": x} for x in requests)
        check(requests[0], next(early))
        early.close()
        with pytest.raises(TypeError, match="on the host"):
            list(run.map([{"x": fake.GpuArray(some(1, 1))}]))
    assert not driver.memory


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> fake.Driver:
    monkeypatch.setattr(_results, "_LEAST", 100)  # y is larger, s is not
    return installed(monkeypatch)


def page_locked(driver: fake.Driver) -> int:
    return driver.log.count("cuMemAllocHost_v2")


def test_memory_of_a_result_is_used_again_when_nobody_holds_it(handed: fake.Driver) -> None:
    with Runner(fake.ICudaEngine(handed, [SHORT, LONG])) as run:
        x = some(4, 16)
        first = run({"x": x})
        one_set = page_locked(handed)  # the input's and s's, and y's
        part = first["y"][1:, ::2]
        del first
        for start in (1, 2, 3):  # each y dies before the next call; what is left of the first holds its memory
            check(x + start, run({"x": x + start}))
        assert page_locked(handed) == one_set + 1
        np.testing.assert_array_equal(part, (2 * x + 1)[1:, ::2])
        del part
        held = [run({"x": x + start}) for start in range(5)]
        assert page_locked(handed) == one_set + 4
        for start, outputs in enumerate(held):
            check(x + start, outputs)


def test_results_outlive_the_runner_and_free_themselves(handed: fake.Driver) -> None:
    with Runner(fake.ICudaEngine(handed, [SHORT, LONG])) as run:
        outputs, other = run({"x": some(4, 16)}), run({"x": some(4, 16, 1)})
        del other
    assert len(handed.memory) == 1
    check(some(4, 16), outputs)
    del outputs
    assert not handed.memory


@pytest.mark.parametrize("limit", ["_MOST_HELD", "_MOST_IDLE"])
def test_page_locked_memory_is_limited(handed: fake.Driver, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    x = some(4, 16)
    monkeypatch.setattr(_results, limit, 3 * x.nbytes)
    with Runner(fake.ICudaEngine(handed, [SHORT, LONG])) as run:
        results = [run({"x": x + i}) for i in range(10)]
        sizes = [len(block) for block in handed.memory.values()]
        # The input has two buffers, y one on the device; beyond the limit on what is held, one for staging.
        assert sizes.count(x.nbytes) == 3 + (3 + 1 if limit == "_MOST_HELD" else 10)
        for i, outputs in enumerate(results):
            check(x + i, outputs)
        del results, outputs
        assert [len(block) for block in handed.memory.values()].count(x.nbytes) == 3 + 3 + (limit == "_MOST_HELD")
    assert not handed.memory


def test_no_page_locked_memory_left(handed: fake.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise _cuda.CudaError("out of memory")

    with Runner(fake.ICudaEngine(handed, [SHORT, LONG])) as run:
        x = some(4, 16)
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "PinnedBuffer", refuse)
            assert run._results.take(x.nbytes) is None
        check(x, run({"x": x}))
        assert run._results._held == 0


def test_each_thread_has_its_own_context(engine: fake.ICudaEngine) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                x = some(1 + i % 3, 4, number * 100 + i)
                check(x, run({"x": x}))
        except BaseException as error:
            failures.append(error)

    with Runner(engine) as run:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(engine.contexts) == 4


def test_empty_batches(driver: fake.Driver) -> None:
    engine = fake.ICudaEngine(driver, [((0, 1), (2, 2), (4, 4))])
    with Runner(engine) as run:
        assert run({"x": np.zeros((0, 3), np.float32)})["y"].shape == (0, 3)


def test_graph_timing_counts_every_call(driver: fake.Driver) -> None:
    calls: list[int] = []
    times = measure.graph_us([calls.append, calls.append], seconds=0.001)
    # The fake driver says 1 ms a replay; 20 calls are in the graph.
    assert times["p50"] == pytest.approx(50.0)
    assert len(calls) == 2 + 20


def test_two_graphs_are_replayed_in_turn(driver: fake.Driver) -> None:
    once, twice = measure.graphs_us([[lambda stream: None], [lambda stream: None] * 40], seconds=0.001)
    assert (once["p50"], twice["p50"]) == (pytest.approx(1000 / 20), pytest.approx(1000 / 40))
    assert driver.launches == 2 * (1 + 1 + 7)


def test_percentiles() -> None:
    found = measure.summary([float(i) for i in range(1, 101)])
    assert found == {"p50": 50.5, "p95": 95.0, "p99": 99.0}


def test_each_request_runs_on_the_engine_that_is_fastest_at_its_profile(driver: fake.Driver) -> None:
    engines = {name: fake.ICudaEngine(driver, [SHORT, LONG]) for name in ("float", "all", "unused")}
    with Runners(engines, ["all", "float"]) as run:
        assert set(run.runners) == {"all", "float"}
        for length in (3, 200, 16, 100):
            x = some(2, length, length)
            assert run.choose({"x": x}) is run.runners["all" if length <= 16 else "float"]
            check(x, run({"x": x}))
            check(x, run(x))
        lengths = (3, 4, 200, 5, 100, 200)
        found = list(run.map([some(1, length)] for length in lengths))
        assert [tuple(y["y"].shape) for y in found] == [(1, length) for length in lengths]
        for length, outputs in zip(lengths, found, strict=True):
            check(some(1, length), outputs)
        assert list(run.map([])) == []
        with pytest.raises(ValueError, match="No profile of this engine covers"):
            run(some(2, 1000))
        with pytest.raises(KeyError, match="lacks x"):
            run({})
        assert [sum(c.enqueued for c in e.contexts) > 0 for e in engines.values()] == [True, True, False]
    assert all(runner.engine is None for runner in run.runners.values())


def test_runners_that_do_not_belong_together_are_refused(driver: fake.Driver) -> None:
    engines = {"a": fake.ICudaEngine(driver, [SHORT, LONG]), "b": fake.ICudaEngine(driver, [SHORT])}
    with pytest.raises(ValueError, match="No engine 'c' among a, b"):
        Runners(engines, ["a", "c"])
    with pytest.raises(ValueError, match="other inputs, outputs or profiles"):
        Runners(engines, ["a", "b"])
    with pytest.raises(ValueError, match="1 names for 2 profiles"):
        Runners(engines, ["a"])
    with pytest.raises(ValueError, match="empty"):
        Runners(engines, [])
