"""Check what an sdist and a wheel hold: ``check_dist.py DIST_FOLDER``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

MAX_WHEEL_BYTES = 20_000_000

SDIST_ALLOWED = [
    "CMakeLists.txt",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "cmake/*.cmake",
    "cmake/hwkern_build.py",
    "csrc/*.cpp",
    "csrc/*.cu",
    "csrc/*.cuh",
    "csrc/*.h",
    "csrc/tensorrt/exports.map",
    "hwkern/*.py",
    "hwkern/py.typed",
]
SDIST_REQUIRED = [*SDIST_ALLOWED]

WHEEL_ALLOWED = ["hwkern/*.py", "hwkern/py.typed", "hwkern/_C.*.so", "hwkern/libhwkern_trt*.so", "hwkern-*.dist-info/*"]
WHEEL_REQUIRED = [
    "hwkern/__init__.py",
    "hwkern/py.typed",
    "hwkern/_C.*.so",
    "hwkern-*.dist-info/METADATA",
    "hwkern-*.dist-info/entry_points.txt",
    "hwkern-*.dist-info/licenses/LICENSE",
]


def problems(names: Iterable[str], allowed: list[str], required: list[str]) -> Iterator[str]:
    """A sentence for every file that does not belong, and for every pattern that no file matches."""
    names = list(names)
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in allowed):
            yield f"{name} does not belong in it"
    for pattern in required:
        if not any(fnmatch(name, pattern) for name in names):
            yield f"nothing like {pattern} in it"


def sdist_problems(path: Path) -> Iterator[str]:
    """What is wrong with a source distribution."""
    with tarfile.open(path) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    top = path.name.removesuffix(".tar.gz")
    yield from (f"{name} lies outside {top}/" for name in names if not name.startswith(f"{top}/"))
    yield from problems((name.removeprefix(f"{top}/") for name in names), SDIST_ALLOWED, SDIST_REQUIRED)


def wheel_problems(path: Path) -> Iterator[str]:
    """What is wrong with a wheel."""
    if path.stat().st_size > MAX_WHEEL_BYTES:
        yield f"{path.stat().st_size / 1e6:.1f} MB, over {MAX_WHEEL_BYTES / 1e6:.0f} MB"
    with zipfile.ZipFile(path) as archive:
        yield from problems((name for name in archive.namelist() if name[-1] != "/"), WHEEL_ALLOWED, WHEEL_REQUIRED)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    sdists, wheels = (sorted(Path(arguments[0]).glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    failed = len(sdists) != 1 or len(wheels) != 1
    if failed:
        print(f"FAILED {arguments[0]} holds {len(sdists)} sdists and {len(wheels)} wheels instead of one of each.")
    for path in [*sdists, *wheels]:
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        for problem in (sdist_problems if path in sdists else wheel_problems)(path):
            print(f"FAILED {path.name}: {problem}")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
