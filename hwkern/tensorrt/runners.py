"""``Runners``: several engines of one model as one, each request on the engine that is fastest for its shapes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from hwkern.tensorrt.builder import Engine
from hwkern.tensorrt.profiles import Shape
from hwkern.tensorrt.runner import Closing, Outputs, Runner


class Runners(Closing):
    """As a :class:`Runner`, over engines of the same model with the same profiles.

    ::

        plan = ht.make_plan("bert.onnx", profiles, engines=(engines := {}))
        with ht.Runners(engines, plan.fastest) as run:      # e.g. int8 for single requests, float for full batches
            outputs = run({"input_ids": ids, "attention_mask": mask})

    Args:
        engines: by name, each as Runner takes it.
        fastest: for each profile the name of its engine; only these are loaded. Every engine that is loaded keeps its
            weights on the GPU.
        graphs, trt: as for Runner.

    Raises:
        ValueError: no engine of that name, other inputs or outputs, or not one name for each profile.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine | bytes | str | os.PathLike[str] | Any],
        fastest: Sequence[str],
        *,
        graphs: int = 16,
        trt: ModuleType | str | None = None,
    ) -> None:
        missing = [name for name in fastest if name not in engines]
        if missing or not fastest:
            raise ValueError(
                f"No engine {missing[0]!r} among {', '.join(engines)}." if missing else "fastest is empty."
            )
        self.fastest = list(fastest)
        self.runners: dict[str, Runner] = {}
        try:
            for name in dict.fromkeys(fastest):
                self.runners[name] = Runner(engines[name], graphs=graphs, trt=trt)
            first = self._first
            for name, runner in self.runners.items():
                if (runner.inputs, runner.outputs, runner.profiles) != (first.inputs, first.outputs, first.profiles):
                    raise ValueError(f"The engine {name!r} has other inputs, outputs or profiles than {fastest[0]!r}.")
            if len(fastest) != len(first.profiles):
                raise ValueError(f"{len(fastest)} names for {len(first.profiles)} profiles.")
        except BaseException:
            self.close()
            raise
        self.inputs, self.outputs, self.profiles = first.inputs, first.outputs, first.profiles

    @property
    def _first(self) -> Runner:
        return self.runners[self.fastest[0]]

    def choose(self, inputs: Mapping[str, Any] | Sequence[Any] | Any) -> Runner:
        """The Runner for a request. KeyError, ValueError: as for calling a Runner."""
        named = self._first._named(inputs)
        shapes: dict[str, Shape] = {}
        for name, tensor in self.inputs.items():
            if not tensor.on_host:
                shape = getattr(named[name], "shape", None)
                shapes[name] = tuple(np.shape(named[name]) if shape is None else shape)
        return self.runners[self.fastest[self._first.choose_profile(shapes)]]

    def __call__(
        self,
        inputs: Mapping[str, Any] | Sequence[Any] | Any,
        outputs: Mapping[str, Any] | None = None,
        stream: Any = None,
    ) -> Outputs:
        """As ``Runner.__call__``."""
        return self.choose(inputs)(inputs, outputs, stream)

    def map(self, requests: Iterable[Mapping[str, Any] | Sequence[Any]], depth: int = 2) -> Iterator[Outputs]:
        """As ``Runner.map``; transfers overlap within runs of requests for the same engine."""
        waiting: list[Mapping[str, Any] | Sequence[Any]] = []

        def run_of(source: Iterator[Mapping[str, Any] | Sequence[Any]], runner: Runner) -> Iterator[Any]:
            """The requests from the one that waits to the last of the same engine; the one after it waits then."""
            yield waiting.pop()
            for request in source:
                if self.choose(request) is not runner:
                    waiting.append(request)
                    return
                yield request

        source = iter(requests)
        for request in source:
            waiting.append(request)
            while waiting:
                runner = self.choose(waiting[0])
                yield from runner.map(run_of(source, runner), depth)

    def close(self) -> None:
        """As ``Runner.close``, of all."""
        for runner in self.runners.values():
            runner.close()
