"""Facts of the machine and of the installed software that a number depends on.

Linux is read from /proc and /sys; ``root`` stands for "/" so that tests can give another tree. Elsewhere the CPU's features are
what Python itself knows.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxsqueeze.results import Environment

ROOT = Path("/")

# Best first: the first set whose features are all there names what the CPU's integer products can use.
INSTRUCTION_SETS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx_int8", frozenset({"amx_int8", "amx_tile"})),
    ("avx512_vnni", frozenset({"avx512_vnni", "avx512vl"})),
    ("avx_vnni", frozenset({"avx_vnni"})),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})),
    ("avx2", frozenset({"avx2"})),
    ("avx", frozenset({"avx"})),
    ("sse4_1", frozenset({"sse4_1"})),
    ("neon_i8mm", frozenset({"asimd", "i8mm"})),
    ("neon_dotprod", frozenset({"asimd", "asimddp"})),
    ("neon", frozenset({"asimd"})),
)

# Distributions whose version can change a model's bytes or its speed.
TOOLS = (
    "onnxsqueeze",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnx",
    "torch",
    "transformers",
    "tokenizers",
    "optimum",
    "optimum-onnx",
    "neural-compressor",
    "numpy",
    "scipy",
    "scikit-learn",
)

_NOTABLE = re.compile(r"avx|amx|fma$|f16c$|sse4|asimd|i8mm$|bf16$|sve|sme\d*$")  # the features that kernels are chosen by


def cpu_model(root: Path = ROOT) -> str:
    """The CPU's name as it reports it, e.g. "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz"."""
    return _cpuinfo(root, "model name") or _cpuinfo(root, "Model") or platform.processor() or platform.machine()


def cpu_features(root: Path = ROOT) -> frozenset[str]:
    """The CPU's features in Linux spelling ("avx512_vnni"); outside Linux only "asimd" on 64-bit ARM is known."""
    listed = _cpuinfo(root, "flags") or _cpuinfo(root, "Features")
    if listed:
        return frozenset(listed.split())
    return frozenset({"asimd"}) if platform.machine().lower() in ("arm64", "aarch64") else frozenset()


def instruction_set(features: frozenset[str] | None = None) -> str:
    """The best of `INSTRUCTION_SETS` among ``features`` (default: this CPU's); the architecture's name where there is none."""
    found = cpu_features() if features is None else features
    return next((name for name, needed in INSTRUCTION_SETS if needed <= found), platform.machine())


def usable_cores(root: Path = ROOT) -> float:
    """How many cores this process may use: its affinity, or the tightest cgroup quota (version 1 or 2) where that is less.

    1.5 means a quota of 150 ms of CPU time in every 100 ms.
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroup_folders(root, "cpu"):
        quota, period = [*_words(folder / "cpu.max"), "", ""][:2]  # version 2: "150000 100000" or "max 100000"
        if not period:  # version 1
            quota, period = "".join(_words(folder / "cpu.cfs_quota_us")), "".join(_words(folder / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            cores = min(cores, int(quota) / int(period))
    return cores


def default_threads(root: Path = ROOT) -> int:
    """Threads that fit into `usable_cores`: whole ones, at least one."""
    return max(1, math.floor(usable_cores(root)))


def governor(root: Path = ROOT) -> str | None:
    """The frequency governor of the first CPU that this process may use; None where there is none to be read (most virtual machines)."""
    first = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return "".join(_words(root / f"sys/devices/system/cpu/cpu{first}/cpufreq/scaling_governor")) or None


def memory_bytes(root: Path = ROOT) -> int:
    """The machine's memory, or the tightest cgroup limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = "".join(_words(folder / name))
            if limit.isdigit() and int(limit) > 0:
                total = min(total, int(limit))
    return total


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution; those that are not installed are left out. Imports none of them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def accelerator(root: Path = ROOT) -> str | None:
    """Model names of the NVIDIA GPUs that this process may use, as the driver gives them; None without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    names = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE)
        names.append(found[1] if found else "NVIDIA GPU")
    return ", ".join(names) or None


def processors() -> dict[str, str]:
    """What computes here, as causes of machine-bound results: CPU model, instruction set, and the GPU where there is one."""
    gpu = accelerator()
    return {"cpu": cpu_model(), "instruction_set": instruction_set(), **({"accelerator": gpu} if gpu else {})}


def describe(providers: Sequence[str]) -> Environment:
    """This machine for the record. ``providers`` are those that started a session: `onnxsqueeze.backends.started_providers`.

    Holds no host name, user name or path.
    """
    features = cpu_features()
    return Environment(
        cpu=cpu_model(),
        instruction_set=instruction_set(features),
        features=tuple(sorted(f for f in features if _NOTABLE.match(f))),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        os=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions(TOOLS),
        providers=tuple(providers),
        accelerator=accelerator(),
    )


def _cpuinfo(root: Path, key: str) -> str:
    """The first value of ``key`` in /proc/cpuinfo, or ""."""
    for line in _lines(root / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders whose limits bind this process: its own cgroup and those around it, in every hierarchy with ``controller``.

    In a container the mount often shows only a part of the hierarchy, whose top stands in mountinfo's fourth column.
    """
    own: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):  # "4:memory:/a/b" in version 1, "0::/a/b" in version 2
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        top, point = mount.split()[3:5]
        kind, *_, options = source.split()
        name = "" if kind == "cgroup2" else controller if kind == "cgroup" and controller in options.split(",") else None
        if name not in own:
            continue
        path = own[name]
        inside = path.removeprefix(top.rstrip("/")) if path == top or path.startswith(top.rstrip("/") + "/") else ""
        parts = [part for part in inside.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(point.lstrip("/"), *parts[:depth])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another operating system, or a controller that is not mounted
        return []


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]
