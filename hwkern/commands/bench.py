"""Compare every way to run a model here: throughput, latency, memory, energy, accuracy. Writes tables, plots, page."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwkern.bench.settings import Workload

#: Seconds that a run may take by default: a table within minutes, and the rest listed as not run.
BUDGET = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern bench``."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=["models", "kernels"],
        default="models",
        help="whole models (default), or kernels alone",
    )
    parser.add_argument(
        "--models", default="", help="comma-separated names, or transformers folders; `--list` shows them"
    )
    parser.add_argument("--paths", default="", help="comma-separated; `--list` shows them")
    parser.add_argument(
        "--workloads",
        default="",
        help="comma-separated: 8x128 (sequences x tokens), 32 (images), decode:1x128+32 (prompts x tokens + new), "
        "traffic:4 (with so many padding profiles); default: what fits the model; @MODEL behind: only with it",
    )
    parser.add_argument("--list", action="store_true", help="print the models, paths and workloads that there are")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.5, help="measured time of each row (default 1.5)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS",
        help=f"time of the whole run; what does not fit is listed as not run (default {BUDGET:.0f}; 0: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("hwkern-bench"), metavar="FOLDER", help="default: hwkern-bench"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--p95-ms",
        type=float,
        metavar="MS",
        help="bound of the latency under traffic (default 50 on a GPU, 500 on a CPU)",
    )
    parser.add_argument("--requests", type=int, default=2000, help="requests of the traffic (default 2000)")
    parser.add_argument("--max-batch", type=int, default=32, help="most requests in a batch under traffic (default 32)")
    parser.add_argument(
        "--lengths",
        type=Path,
        metavar="FILE",
        help='request lengths as JSON lines, such as {"length": 17}; default: log-normal',
    )
    parser.add_argument(
        "--tensorrt-python", metavar="PATH", help="interpreter that has TensorRT, for its paths (default: this one)"
    )
    parser.add_argument(
        "--tensorrt-level", type=int, choices=range(6), help="the builder's effort (default: TensorRT's own, 3)"
    )
    parser.add_argument(
        "--engines", type=Path, metavar="FOLDER", help="keep TensorRT engines here, and take those that are kept"
    )
    parser.add_argument("--commit", help="commit to record (default: git's, in a checkout)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"),
        help="measure nothing: say what got slower between two results; exit code 1 if anything did",
    )  # fmt: skip
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: write the tables and pages again"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, or compare; 1 with a sentence when it cannot be, or when something got slower."""
    from hwkern.bench import compare, tables

    arguments.started = time.monotonic()  # importing torch counts
    try:
        if arguments.compare:
            return _compare(*arguments.compare)
        if arguments.list:
            print(_listing())
            return 0
        if arguments.from_json:
            document = compare.load(arguments.from_json)
        else:
            document = _measure(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(tables.text(document))
    try:
        for path in write(document, arguments.out):
            print(f"wrote {path}")
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _compare(old: Path, new: Path) -> int:
    from hwkern.bench import compare

    before, after = compare.load(old), compare.load(new)
    found = compare.differences(before, after)
    print(compare.text(found, before, after))
    return int(compare.regressed(found))


def _listing() -> str:
    from hwkern.bench import models, paths, settings

    lines = ["models: " + ", ".join([*models.MODELS, "minilm"]) + "; or a folder"]
    lines += [f"  by default: {', '.join(models.DEFAULT_MODELS)}", "paths by default:"]
    lines += [f"  {name:26} {paths.path(name).title}" for name in paths.DEFAULT_PATHS]
    lines += ["workloads by default, on a GPU:"]
    lines += [f"  {kind:8} {', '.join(gpu)}" for kind, (gpu, _) in settings.DEFAULTS.items()]
    return "\n".join(lines)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))  # twice is once


def _workloads(
    text: str, models: Sequence[str], known: Container[str]
) -> tuple[tuple[Workload, ...], dict[str, tuple[str, ...]]]:
    """The workloads, each once, and to which models those are kept that have ``@MODEL`` wherever they are named.

    One list may serve runs of different ``models``; ValueError for one that no run can have, because the workload would
    be left out without a word.
    """
    from hwkern.bench import settings

    found: dict[Workload, list[str]] = {}
    for part in _names(text):
        name, *only = part.split("@")
        for model in only:
            if model not in known:
                raise ValueError(f"workload {part!r}: there is no model {model!r}.")
        found.setdefault(settings.workload(name), []).extend(only or models)
    return tuple(found), {each.name: tuple(only) for each, only in found.items() if set(only) != set(models)}


def options(arguments: argparse.Namespace) -> Any:
    """The Settings of the command line. ValueError for what cannot be."""
    import shlex

    import torch

    from hwkern.bench import models, paths, settings, traffic
    from hwkern.commands.models import UsageError, device_of

    for name, least in (("seconds", 0.0), ("requests", 1), ("max_batch", 1), ("budget", 0.0), ("p95_ms", 0.001)):
        if (value := getattr(arguments, name)) is not None and not value >= least:  # NaN is not either
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least {least}.")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads {arguments.threads}: it must be at least 1.")
        torch.set_num_threads(arguments.threads)
    try:
        device = device_of(arguments.device)
    except UsageError as error:
        raise ValueError(str(error)) from error
    known = {*models.MODELS, "minilm"}
    for name in _names(arguments.models):
        if name not in known and not (Path(name) / "config.json").is_file():
            raise ValueError(f"model {name!r}: it must be one of {', '.join(sorted(known))}, or a transformers folder.")
    known |= set(_names(arguments.models))
    for name in _names(arguments.paths):
        if wrong := [each for each in paths.path(name).only if each not in known and not paths.is_workload(each)]:
            raise ValueError(f"path {name!r}: there is no model or workload {wrong[0]!r}.")
    chosen, kept_to = _workloads(arguments.workloads, _names(arguments.models) or models.DEFAULT_MODELS, known)
    if arguments.lengths is not None:  # to be refused now, not after minutes
        traffic.lengths_from(arguments.lengths, 1)
    # Without the folders of this machine.
    words = [word if not Path(word).is_absolute() else Path(word).name for word in arguments.argv]
    return settings.Settings(
        device,
        _names(arguments.models),
        _names(arguments.paths),
        chosen,
        kept_to,
        seconds=arguments.seconds,
        budget=arguments.budget or None,
        seed=arguments.seed,
        bound_ms=arguments.p95_ms or (50.0 if device.startswith("cuda") else 500.0),
        requests=arguments.requests,
        max_rows=arguments.max_batch,
        lengths=arguments.lengths,
        tensorrt_python=arguments.tensorrt_python,
        tensorrt_level=arguments.tensorrt_level,
        engines=arguments.engines,
        show=not arguments.quiet,
        started=arguments.started,
        keep={"command": shlex.join(["hwkern", *words]), **({"commit": arguments.commit} if arguments.commit else {})},
    )


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError("hwkern bench needs PyTorch >= 2.4: pip install torch") from error
    from hwkern.bench import record

    target = arguments.out / "results.json"
    chosen = options(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)  # or say now that it cannot be
    if arguments.what == "kernels":
        from hwkern.bench import kernels

        return kernels.run(chosen, lambda document: record.save(target, document))
    from hwkern.bench.comparison import Comparison

    return Comparison(chosen, lambda document: record.save(target, document)).run()


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Everything that is made of a document: results.json, results.csv, table.txt, plots and the page."""
    from hwkern import _svg
    from hwkern.bench import page, record, tables

    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder / "results.json", document)
    files = {
        "results.csv": tables.to_csv(document),
        "table.txt": tables.text(document) + "\n",
        "index.html": page.html(document),
        **{f"plots/{name}": drawn for name, drawn in page.plots(document).items()},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    try:
        for name, content in files.items():
            if name.endswith(".svg"):
                (folder / name).with_suffix(".png").write_bytes(_svg.png(content))
    except ImportError as error:
        print(f"no PNG beside the SVG plots: {error}", file=sys.stderr)
    return [folder / "results.json", *(folder / name for name in files if "plots/" not in name), folder / "plots"]
