"""Every GPU benchmark in one process, for the record: ``record.py --gpu h100 [--out FOLDER] [--seconds S] [NAME ...]``.

Writes FOLDER/NAME-GPU.json for each, in the order of importance, so that a run that is stopped early has the most that
it could have; what fails is said and does not stop the rest. With --seconds 0.02 all of them take about two minutes on
an H100. Options after ``--`` go to the benchmark named last: ``record.py --gpu h100 gemm -- --library cutlass.so``;
options of any other are written with its name: ``record.py --gpu h100 "llama --modes eager,graph" never_slower``.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("gemm", "linear", "sweep", "weight_only", "quantize", "fused")


def main() -> int:
    """Run them; the number of those that failed, as the exit code."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, rest = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(NAMES)}")
    parser.add_argument("--gpu", required=True, help="end of the files' names, e.g. h100")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--seconds", help="as each benchmark's --seconds")
    parser.add_argument("--commit", help="as each benchmark's --commit")
    options = parser.parse_args(own)
    names = options.names or [name for name in NAMES if (HERE / f"{name}.py").is_file()]
    sys.path.insert(0, str(HERE))
    failed = 0
    for i, (name, *its) in enumerate(map(shlex.split, names)):
        command = [f"{name}.py", "--json", str(options.out / f"{name}-{options.gpu}.json")]
        for option in ("seconds", "commit"):
            if value := getattr(options, option):
                command += [f"--{option}", value]
        sys.argv = command + its + (rest if i == len(names) - 1 else [])
        start = time.monotonic()
        try:
            runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        except SystemExit as left:
            if left.code:
                failed += 1
                print(f"{name} FAILED: {left.code}", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"{name} FAILED", flush=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
