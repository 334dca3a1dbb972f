"""`hwkern demo` for the record: the same run, with the GPU's driver and clocks and the commit in the JSON."""

from __future__ import annotations

import json

import timing

from hwkern import demo


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--device", help="as `hwkern demo --device`")
    parser.add_argument("--threads", type=int, help="as `hwkern demo --threads`")
    arguments = parser.parse_args()
    result = demo.demo(arguments.device, count=60 if arguments.quick else 300, threads=arguments.threads)
    result.environment |= timing.environment(result.environment["device"], arguments.commit) | {
        "threads": result.environment["threads"]
    }
    demo.print_result(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
