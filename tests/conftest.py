"""Fixtures shared by all tests. GPU tests carry the marker ``gpu`` and skip, with the reason, where none can run."""

from __future__ import annotations

import pytest
import torch

from hwkern import _native


def gpu_problem() -> str | None:
    if not torch.cuda.is_available():
        return "this machine shows torch no CUDA GPU"
    return _native.cuda_problem()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    problem = gpu_problem()
    if problem is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
