"""Write the measured tables into README.md and docs/ from benchmarks/results/*.json, or check that they are current.

A table stands between two comment lines, the first of which names the file without `.json`:

    <!-- results: gemm-h100 -->
    ...
    <!-- end results -->

`<!-- results: gemm-h100 4096x4096 -->` shows the rows of one layer, N×K, only; `<!-- results: targets-h100 -->` what
all files of an H100 say of the targets in targets.py; `kernels_in_short-h100` and `plans_in_short-h100` give sentences
(in_short.py). Of `hwkern bench`: `<!-- results: bench-h100 bert-base 8x128 -->`
shows the headline of one model and workload, `<!-- results: moves-h100-h200 -->` what differs between two GPUs, and
`<!-- results: again-h200 -->` the ratios of bench-h200.json beside those of a second run, bench-h200-again.json.

`--check` changes nothing and exits with 1 when a table differs from what the files say. A file that is not there gives
one line that says so: nothing is ever shown that was not measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import in_short
import targets
import tensorrt_tables

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: ([\w.-]+)(?: (\d+)x(\d+)| (\S+) (\S+))? -->\n).*?(<!-- end results -->)", re.DOTALL)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def shape(row: dict[str, Any]) -> str:
    """ "M×N×K"."""
    return f"{row['m']}×{row['n']}×{row['k']}"


def ratio(row: dict[str, Any], peer: str) -> str:
    """How many times faster hwkern is than ``peer``; – where the peer cannot run."""
    us = row["peers_us"].get(peer)
    return "–" if us is None else f"{us / row['us']:.2f}×"


PEER_TITLES = {
    "int_mm": "`_int_mm`", "cutlass": "CUTLASS", "compiled_int8": "compiled `_int_mm`", "torchao_int8": "torchao int8",
    "torchao_weight_only": "torchao int8 weight-only", "torchao_fp8": "torchao fp8",
}  # fmt: skip


def peers(rows: list[dict[str, Any]], known: tuple[str, ...]) -> list[str]:
    """The peers of ``known`` that at least one row has."""
    return [name for name in known if any(row["peers_us"].get(name) is not None for row in rows)]


def absent(rows: list[dict[str, Any]]) -> str:
    """A line for each peer that no row has: the reason."""
    reasons = {name: reason for row in rows for name, reason in row.get("absent", {}).items()}
    measured = {name for row in rows for name in row["peers_us"]}
    return "".join(f"\n\nNot measured: {name}: {reason}." for name, reason in reasons.items() if name not in measured)


def gemm(document: dict[str, Any]) -> str:
    """benchmarks/gemm.py."""
    names = peers(document["rows"], ("bf16", "int_mm", "fp8", "cutlass"))
    rows = [
        [
            shape(row),
            f"{row['us']:.1f}",
            f"{row['tops']:.0f}",
            f"{row['floor_us'] / row['us'] * 100:.0f} % ({row['bound']})",
            *(ratio(row, peer) for peer in names),
        ]
        for row in document["rows"]
    ]
    titles = [f"vs {PEER_TITLES.get(name, name)}" for name in names]
    table = markdown(["M×N×K", "µs", "TOPS", "of the speed of light", *titles], rows)
    return table + beside(document["rows"], names) + absent(document["rows"])


BESIDE = {
    "sustained": "without a rest between replays: a GPU at its power limit",
    "uniform": "on matrices uniform over ±1",
}


def beside(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Tables below GEMM's first one, of the rows that were measured in another way too."""
    tables = []
    for kind, title in BESIDE.items():
        found = [row | row[kind] for row in rows if kind in row]
        measured = peers(found, tuple(names))
        lines = [
            [
                shape(row),
                f"{row['us']:.1f}",
                f"{2e-6 * row['m'] * row['n'] * row['k'] / row['us']:.0f}",
                *(ratio(row, peer) for peer in measured),
            ]
            for row in found
        ]
        columns = ["M×N×K", "µs", "TOPS", *(f"vs {PEER_TITLES.get(name, name)}" for name in measured)]
        if found:
            tables.append(f"\n\nThe large ones {title}:\n\n{markdown(columns, lines)}")
    return "".join(tables)


def quantize(document: dict[str, Any]) -> str:
    """benchmarks/quantize.py."""
    rows = [
        [
            f"{row['operator']}, {row['dtype']}",
            f"{row['m']}×{row['k']}",
            f"{row['us']:.1f}",
            f"{row['bandwidth']:.0f}",
            f"{row['of_copy'] * 100:.0f} %",
            f"{row['of_large_copy'] * 100:.0f} %",
            f"{row['eager_us'] / row['us']:.1f}×",
        ]
        for row in document["rows"]
    ]
    return markdown(["", "M×K", "µs", "GB/s", "of a copy", "of a 1 GiB copy", "vs eager torch"], rows)


def fused(document: dict[str, Any]) -> str:
    """benchmarks/fused.py."""
    rows = [
        [
            f"{row['operator']}, {row['dtype']}",
            f"{row['m']}×{row['k']}",
            f"{row['us']:.1f}",
            f"{row['of_copy'] * 100:.0f} %",
            f"{row['alone']} {row['peers_us'][row['alone']]:.1f}",
            f"{row['of_alone']:.2f}",
            f"{row['unfused_us'] / row['us']:.2f}×",
        ]
        for row in document["rows"]
    ]
    columns = ["", "M×K", "µs", "of a copy", "without quantization, µs", "ours / that", "vs unfused"]
    return markdown(columns, rows)


def embedding(document: dict[str, Any]) -> str:
    """benchmarks/embedding.py."""
    rows = [
        [
            f"{row['rows']} × {row['width']}",
            str(row["m"]),
            f"{row['us']:.1f}",
            f"{row['of_light'] * 100:.0f} %",
            f"{row['torch_us'] / row['us']:.2f}×",
            f"{row['eager_us']:.1f}",
            f"{row['torch_eager_us'] / row['eager_us']:.2f}×",
        ]
        for row in document["rows"]
    ]
    return markdown(["table", "tokens", "µs", "of the speed of light", "vs torch", "eager µs", "vs torch"], rows)


LAYER_PEERS = (
    "bf16", "fp16", "fp32", "bitsandbytes", "compiled_int8", "torchao_int8", "torchao_weight_only", "torchao_fp8",
)  # fmt: skip


def linear(document: dict[str, Any]) -> str:
    """benchmarks/linear.py: the device table, then the host's."""
    rows = [row for row in document["rows"] if row["kind"] == "device"]
    names = peers(rows, LAYER_PEERS)
    device = [
        [shape(row), f"{row['us']:.1f}", f"{row['floor_us'] / row['us'] * 100:.0f} %"]
        + [ratio(row, peer) for peer in names]
        for row in rows
    ]
    host = [
        [row["mode"], f"{row['us']:.1f}", f"{row['linear_us']:.1f}", f"{row['us'] / row['linear_us']:.2f}"]
        for row in document["rows"]
        if row["kind"] == "host"
    ]
    parts = []
    if device:
        titles = [f"vs {PEER_TITLES.get(name, name)}" for name in names]
        parts.append(markdown(["M×N×K", "µs", "of the speed of light", *titles], device) + absent(rows))
    if host:
        parts.append(
            markdown(["host, one eager call", "Int8Linear µs", "nn.Linear µs", "Int8Linear / nn.Linear"], host)
        )
    return "\n\n".join(parts)


def sweep(document: dict[str, Any]) -> str:
    """benchmarks/sweep.py: the worst steps of each layer."""
    rows = [
        [
            f"{row['n']}×{row['k']}",
            f"{m} → {m + 1}",
            f"{row['us'][m - 1]:.2f} → {row['us'][m]:.2f}",
            f"{ratio:.3f}",
            " → ".join(map(str, dict.fromkeys(row["configs"][m - 1 : m + 1]))),
        ]
        for row in document["rows"]
        for ratio, m in row["worst"][:3]
    ]
    return markdown(["N×K", "M", "µs", "t(M + 1) / t(M)", "config"], rows)


def cpu_linear(document: dict[str, Any]) -> str:
    """benchmarks/cpu_linear.py."""
    rows = [
        [shape(row), f"{row['us']:.0f}", *(ratio(row, peer) for peer in ("fp32", "bf16", "fbgemm"))]
        for row in document["rows"]
    ]
    return markdown(["M×N×K", "µs", "vs float32", "vs bfloat16", "vs fbgemm dynamic"], rows)


def demo(document: dict[str, Any]) -> str:
    """`hwkern demo --json`: laid out by the demo itself, from the JSON's numbers."""
    from hwkern.demo import Result, quality_rows, speed_rows

    result = Result.from_dict(document)
    head = markdown(["", "original", "hwkern", "change"], speed_rows(result))
    quality = [[label, value] for label, value, _ in quality_rows(result)]
    return head + "\n\n" + markdown(["", "hwkern against original"], quality)


def comparison(document: dict[str, Any]) -> str:
    """`hwkern bench`: a table for each model and workload with its plots beside it, then what was not measured."""
    from hwkern.bench import page, tables, verdicts

    parts = []
    for model, workloads in tables.by_model(document).items():
        for workload, rows in workloads:
            heads, cells = tables.columns(rows)
            said = verdicts.verdicts(rows)
            parts += [f"### {tables.title(document, model)}, {workload}", markdown(heads, cells), *said]
            names = list(page.plots({**document, "rows": rows}))
            parts.append("\n".join(f"![{n.rpartition('.')[0]}](plots/{document['name']}-{n})" for n in names))
        parts += verdicts.padding(workloads)
    if missing := tables.left_out(document):
        parts.append("### Not measured")
        parts.append("\n".join(f"- {status}: {reason}: {'; '.join(places)}" for status, reason, places in missing))
    return "\n\n".join(parts)


def headline(document: dict[str, Any], model: str, workload: str) -> str:
    """The fastest path of each kind for one model and workload of `hwkern bench`."""
    from hwkern.bench import page, tables, verdicts

    for found in tables.groups(document):
        if found[:2] == (model, workload):
            return "\n\n".join(
                [
                    f"{tables.title(document, model)}, {workload}:",
                    markdown(*page.headline_cells(found[2])),
                    *verdicts.verdicts(found[2]),
                ]
            )
    return f"*Not measured: {model}, {workload}.*"


def again(results: Path, name: str) -> str:
    """The ratios of two runs of one command, and whether they agree within the noise that they state."""
    from hwkern.bench import compare

    files = [results / f"bench-{name}.json", results / f"bench-{name}-again.json"]
    for path in files:
        if not path.is_file():
            return f"*Not measured yet: there is no benchmarks/results/{path.name}.*"
    first, second = map(compare.load, files)
    count, moved = compare.ratios(first, second)
    known = {(row["model"], row["workload"], row["path"]): row["ratio"] for row in first["rows"] if row.get("ratio")}
    cells = []
    for row in second["rows"]:
        key = (row["model"], row["workload"], row["path"])
        if row.get("ratio") and key in known and row["path"] != row["ratio"]["to"]:
            pair = (known[key], row["ratio"])
            cells.append([", ".join(key), *map(_ratio_and_noise, pair)])
    beyond = "".join(f" Beyond it: {d.name}, {d.note}." for d in moved)
    said = f"{count - len(moved)} of {count} ratios agree within the noise that both runs state.{beyond}"
    plans = [{row["model"]: row["plan"] for row in document["rows"] if row.get("plan")} for document in (first, second)]
    for model in (model for model in plans[0] if model in plans[1]):
        if plans[0][model] == plans[1][model]:
            said += f" Both runs made the same plan of {model}."
        else:
            said += f" Their plans of {model} differ: {_schemes(plans[0][model])}, then {_schemes(plans[1][model])}."
    return "\n\n".join([said, markdown(["", "first run", "second run"], cells), caption(second)])


def _schemes(plan: dict[str, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in plan.items())


def _ratio_and_noise(found: dict[str, Any]) -> str:
    return f"{found['value']:.3f}×" + ("" if found["noise"] is None else f" ± {100 * found['noise']:.0f} %")


def moves(results: Path, first: str, second: str) -> str:
    """What two GPUs have different: every path's throughput and its ratio to the baseline, and the plans' choices."""
    documents = []
    for name in (first, second):
        path = results / f"bench-{name}.json"
        if not path.is_file():
            return f"*Not measured yet: there is no benchmarks/results/bench-{name}.json.*"
        documents.append(json.loads(path.read_text(encoding="utf-8")))
    a, b = (
        {(row["model"], row["workload"], row["path"]): row for row in document["rows"] if row["status"] == "ok"}
        for document in documents
    )
    titles = [name.upper() for name in (first, second)]
    cells = []
    for key in (key for key in a if key in b):
        to = [found[key].get("ratio", {}) for found in (a, b)]
        cells.append(
            [", ".join(key), *(f"{found[key]['tokens_per_s']:.0f}" for found in (a, b))]
            + [f"{b[key]['tokens_per_s'] / a[key]['tokens_per_s']:.2f}×"]
            + [f"{each['value']:.2f}×" if each else "–" for each in to]
        )
    base = documents[0]["settings"]["baseline"]
    heads = ["", *(f"{t} tokens/s" for t in titles), f"{titles[1]} / {titles[0]}", *(f"{t} to {base}" for t in titles)]
    parts = [markdown(heads, cells), _plans(a, b, titles)]
    commits = [str(document["environment"].get("commit"))[:12] for document in documents]
    if commits[0] != commits[1]:
        parts.insert(0, f"The columns are of commits {' and '.join(commits)}: a few percent may be the commits'.")
    return "\n\n".join(parts)


#: Two times of one layer that differ by less are the same.
SAME = 0.03


def _plans(a: dict[Any, Any], b: dict[Any, Any], titles: list[str]) -> str:
    """What each plan chose, and µs of the recipes, for each kind of layer and number of tokens that both plans saw;
    before it in words where the plans differ, where only the fastest recipe does, and where nothing does."""
    cells, words = [], []
    seen = set()
    for key in (key for key in a if key in b and a[key].get("plan_shapes") and b[key].get("plan_shapes")):
        if key[0] in seen:
            continue  # one plan for all workloads of a model
        seen.add(key[0])
        one, two = ({_kind(s): s for s in reversed(found[key]["plan_shapes"])} for found in (a, b))
        kinds = [kind for kind in reversed(one) if kind in two]
        words.append(_moved(key[0], {kind: (one[kind], two[kind]) for kind in kinds}, titles))
        for kind in kinds:
            plans = (one[kind], two[kind])
            for tokens in plans[0]["us"]["keep"]:
                times = [
                    ", ".join(
                        f"**{name} {us[tokens]:.1f}**" if name == _fastest(plan, tokens) else f"{name} {us[tokens]:.1f}"
                        for name, us in _alone(plan)
                        if tokens in us
                    )
                    for plan in plans
                ]
                cells.append([f"{key[0]}, {kind}, {tokens} tokens", *map(_chosen, plans), *times])
    if not cells:
        return "*No plan was made on both.*"
    heads = ["layer", *(f"{t} plan" for t in titles), *(f"{t} µs" for t in titles)]
    return "\n\n".join([*words, markdown(heads, cells)])


def _kind(shape: dict[str, Any]) -> str:
    return f"{shape.get('kind', '')} {shape['n']}×{shape['k']}".strip()


def _fastest(plan: dict[str, Any], tokens: str) -> str:
    return min((us[tokens], name) for name, us in _alone(plan) if tokens in us)[1]


def _alone(plan: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The recipes with their times, without those that are one recipe for few tokens and another for many."""
    return [(name, us) for name, us in plan["us"].items() if "/" not in name]


def _moved(model: str, kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]], titles: list[str]) -> str:
    """Sentences: the kinds of layer whose choice differs between two GPUs, those where only the fastest recipe of the
    layer alone does (by more than SAME on one of them), and by how much the choices are ahead of float."""
    changed = [
        f"{kind} ({_chosen(one)} on the {titles[0]}, {_chosen(two)} on the {titles[1]})"
        for kind, (one, two) in kinds.items()
        if _chosen(one) != _chosen(two)
    ]
    alone = []
    least: list[list[tuple[float, str]]] = [[], []]
    for kind, pair in kinds.items():
        for tokens in pair[0]["us"]["keep"]:
            best = [_fastest(plan, tokens) for plan in pair]
            lost = [
                plan["us"][other][tokens] / plan["us"][mine][tokens] - 1 if tokens in plan["us"].get(other, {}) else 0.0
                for plan, mine, other in zip(pair, best, reversed(best), strict=True)
            ]
            if best[0] != best[1] and max(lost) > SAME:
                alone.append(f"{kind} at {tokens} tokens ({best[0]}, {best[1]})")
            for found, plan in zip(least, pair, strict=True):
                if plan["chosen"] != "keep" and tokens in plan["us"][plan["chosen"]]:
                    gain = plan["us"]["keep"][tokens] / plan["us"][plan["chosen"]][tokens]
                    found.append((gain, f"{kind}, {tokens} tokens"))
    same = len(kinds) - len(changed)
    said = [
        f"{model}: the plans of the two GPUs differ at {'; '.join(changed)}."
        if changed
        else f"{model}: the plans of the two GPUs are the same at all {same} kinds of layer."
    ]
    if alone:
        said.append(
            f"The fastest recipe of a layer by itself differs by more than {SAME:.0%} at {'; '.join(alone)} (in bold "
            "below)."
        )
    if same and all(least):
        ahead = (
            f"{gain:.2f}× on the {title} ({where})"
            for title, (gain, where) in zip(titles, map(min, least), strict=True)
        )
        said.append(f"The chosen recipe is at least so much faster than float: {', '.join(ahead)}.")
    return " ".join(said)


def _chosen(plan: dict[str, Any]) -> str:
    return plan["chosen"] + (f", W8A16 up to {plan['max_tokens']} tokens" if plan["max_tokens"] else "")


def kernels(document: dict[str, Any]) -> str:
    """`hwkern bench kernels`."""
    from hwkern.bench import kernel_page

    drawn = "\n".join(f"![{n}](plots/{document['name']}-{n})" for n in kernel_page.plots(document))
    left = "\n".join(f"- {line}" for line in kernel_page.left_out(document))
    return "\n\n".join(filter(None, [markdown(*kernel_page.columns(kernel_page.measured(document))), drawn, left]))


def accuracy(document: dict[str, Any]) -> str:
    """benchmarks/accuracy.py."""
    rows = [
        [f"{row['model']}, {row['scheme']}: {row['figure']}"]
        + [f"{row[key]:.1f}" if "dB" in row["figure"] else f"{row[key]:.4f}" for key in ("before", "after", "least")]
        for row in document["rows"]
        if "figure" in row
    ]
    return "\n\n".join([markdown(["", "before", "after", "at least"], rows), *layers(document["rows"])])


def layers(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Of each model a table of its layers' dB: a row for the layers of one name, a column for each block."""
    for model in dict.fromkeys(row["model"] for row in rows if "layer" in row):
        mine = [row for row in rows if row["model"] == model and "layer" in row]
        names: dict[str, list[str]] = {}
        for row in mine:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", row["layer"])
            values = [value for key, value in row.items() if key not in ("model", "layer")]
            names.setdefault(name, []).append(" / ".join(f"{value:.1f}" for value in values))
        blocks = max(map(len, names.values()))
        schemes = [key for key in mine[0] if key not in ("model", "layer")]
        cells = [[name, *found, *["–"] * (blocks - len(found))] for name, found in names.items()]
        columns = [f"block {i}" for i in range(blocks)] if blocks > 1 else ["dB"]
        yield f"{model}, dB of each layer's output ({' / '.join(schemes)}):"
        yield markdown(["layer", *columns], cells)


def llama(document: dict[str, Any]) -> str:
    """benchmarks/llama.py: times and their ratio to bfloat16 in the same mode, then memory and the plan's seconds."""
    rows = [row for row in document["rows"] if "ratio" in row]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(row["workload"], row["mode"], row["variant"]): row for row in rows}
    cells = []
    for workload, mode in dict.fromkeys((row["workload"], row["mode"]) for row in rows):
        line = [f"{workload}, {mode.replace('_', ' ')}"]
        for variant in variants:
            row = found.get((workload, mode, variant))
            times = "" if row is None else f"{row['ms']:.2f} ms"
            line.append("–" if row is None else times if variant == "bf16" else f"{times}, {row['ratio']:.2f}×")
        cells.append(line)
    memory = ["weights of the linear layers"]
    for variant in variants:
        size = document["linear_memory"].get(variant)
        memory.append("–" if size is None else f"{size['bytes'] / 1e9:.2f} GB, {size['of_bf16']:.2f}×")
    parts = [markdown(["", *variants], [*cells, memory])]
    if plan := document.get("plan"):
        schemes = _schemes(plan["schemes"])
        parts.append(
            f"The plan took {plan['first_seconds']:.1f} s, a second one, from the cache, "
            f"{plan['cached_seconds']:.1f} s: {schemes}."
        )
    missing = {f"{row['variant']} ({row['mode']})": row["absent"] for row in document["rows"] if "absent" in row}
    parts += [f"Not measured: {name}: {reason}." for name, reason in missing.items()]
    return "\n\n".join(parts)


def plan_time(document: dict[str, Any]) -> str:
    """benchmarks/plan_time.py: the seconds of each plan, and what they went to."""
    cells = []
    for row in document["rows"]:
        for name in ("first", "again"):
            if (found := row.get(name)) is None:
                continue
            what = f"{row['layers']} layers, {row['parameters'] / 1e9:.2f} billion parameters, {name}"
            phases = [f"{seconds:.1f}" for seconds in found["phases"].values()]
            cells.append([what, f"{found['seconds']:.1f}", *phases, str(found["measured"]), str(found["reused"])])
    phases = list(document["rows"][0]["first"]["phases"])
    return markdown(["seconds of a plan", "all", *phases, "times measured", "known"], cells)


def never_slower(document: dict[str, Any]) -> str:
    """benchmarks/never_slower.py: a row for each model and mode, a column for each batch shape."""
    rows = [row for row in document["rows"] if "ratio" in row]
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["size"], row["mode"]), []).append(row)
    cells = [
        [f"{model}, {size}, {mode}", f"{line[0]['int8']} of {line[0]['layers']}"]
        + [f"{row['shape'].removesuffix('x1')}: {row['ratio']:.2f}" for row in line]
        + ["–"] * (4 - len(line))
        for (model, size, mode), line in lines.items()
    ]
    worst = max((row["ratio"] for row in rows), default=0.0)
    above = sum(row["ratio"] > 1.02 for row in rows)
    text = f"{len(rows)} cells, the slowest {worst:.3f}, {above} above 1.02."
    if twice := [row for row in rows if row.get("noise") is not None]:
        first, noise = (max(row[key] for row in twice) for key in ("first_ratio", "noise"))
        text += f" {len(twice)} were read twice (at first at most {first:.3f}), standard error at most {noise:.3f}."
    if same := [row["ratio"] for row in rows if row["int8"] == 0]:
        text += f" In {len(same)} the plan swaps nothing, the model is a copy: {min(same):.3f} to {max(same):.3f}."
    columns = ["planned time / original's", "int8 layers", "batch 1", "batch 2", "batch 3", "batch 4"]
    return f"{text}\n\n{markdown(columns, cells)}"


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "gemm": gemm,
    "quantize": quantize,
    "embedding": embedding,
    "fused": fused,
    "linear": linear,
    "sweep": sweep,
    "cpu_linear": cpu_linear,
    "demo": demo,
    "comparison": comparison,
    "kernels": kernels,
    "accuracy": accuracy,
    "llama": llama,
    "plan_time": plan_time,
    "never_slower": never_slower,
    "tensorrt": tensorrt_tables.tables,
}


def caption(document: dict[str, Any], command: bool = True) -> str:
    """One line under the table: where and when, and with which command."""
    where = document["environment"]
    device = where.get("gpu") or where.get("device_name") or where.get("cpu")
    parts = [str(device)]
    if where.get("nvidia_smi", {}).get("driver_version"):
        parts.append(f"driver {where['nvidia_smi']['driver_version']}")
    if where.get("wheel_cuda"):
        parts.append(f"CUDA {where['wheel_cuda']}")
    if "threads" in where and not str(where.get("device", "")).startswith("cuda"):
        parts.append(f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}")
    parts += [f"torch {where['torch']}" if "torch" in where else where["tensorrt"], where["date"]]
    if where.get("commit"):
        parts.append(f"commit {where['commit'][:12]}")
    return f"Measured on {', '.join(parts)}" + (f": `{where['command']}`" if command else ".")


def render(name: str, results: Path, layer: tuple[int, int] | None = None, part: tuple[str, str] | None = None) -> str:
    """The text between the markers for benchmarks/results/``name``.json; of one layer (N, K), of one model and
    workload, or of all."""
    if name.startswith("targets-"):
        columns = ["target", "must", "reach for", "measured", ""]
        return f"{markdown(columns, targets.lines(results, name.removeprefix('targets-')))}\n"
    stem, _, gpu = name.partition("-")
    if stem in in_short.SHORT:
        return in_short.SHORT[stem](results, gpu)
    if name.startswith("again-"):
        return f"{again(results, name.removeprefix('again-'))}\n"
    if name.startswith("moves-"):
        return f"{moves(results, *name.split('-')[1:])}\n"
    path = results / f"{name}.json"
    if not path.is_file():
        return f"*Not measured yet: there is no benchmarks/results/{name}.json.*"
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != 1 or document.get("benchmark") not in RENDER:
        sys.exit(f"{path} has schema {document.get('schema')!r} and benchmark {document.get('benchmark')!r}: "
                 f"known are schema 1 and {', '.join(RENDER)}.")  # fmt: skip
    document["name"] = name
    if part is not None:
        # Its command, of hundreds of characters, stands below the file's whole table.
        return f"{headline(document, *part)}\n\n{caption(document, command=False)}"
    if layer is not None:
        document["rows"] = [
            row for row in document["rows"] if (row.get("n", layer[0]), row.get("k", layer[1])) == layer
        ]
    return f"{RENDER[document['benchmark']](document)}\n\n{caption(document)}"


def rewrite(text: str, results: Path) -> str:
    """``text`` with every table between markers made anew."""

    def table(found: re.Match[str]) -> str:
        layer = (int(found[3]), int(found[4])) if found[3] else None
        part = (found[5], found[6]) if found[5] else None
        return f"{found[1]}{render(found[2], results, layer, part)}\n{found[7]}"

    return BLOCK.sub(table, text)


def main() -> int:
    """Rewrite or check; 1 when ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 when a table is not current")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md, docs/ and benchmarks/results/")
    arguments = parser.parse_args()
    stale = []
    for path in [arguments.root / "README.md", *sorted((arguments.root / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = rewrite(before, arguments.root / "benchmarks" / "results")
        if after != before:
            stale.append(path.relative_to(arguments.root))
            if not arguments.check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'its tables differ from benchmarks/results' if arguments.check else 'rewritten'}")
    if stale and arguments.check:
        print("Run `python benchmarks/tables.py`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
