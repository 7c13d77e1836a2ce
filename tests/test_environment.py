"""What the machine tells, and from which files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnxsqueeze import environment
from onnxsqueeze.environment import (
    cpu_features,
    cpu_model,
    default_threads,
    describe,
    instruction_set,
    memory_bytes,
    usable_cores,
    versions,
)

CORES = float(len(os.sched_getaffinity(0)))
V1_MOUNT = "34 31 0:31 {top} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
V2_MOUNT = "30 20 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def version_2(root: Path, own: str, files: dict[str, str], top: str = "/") -> Path:
    return write(root, {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": V2_MOUNT.format(top=top), **files})


def test_a_quota_of_half_a_core_is_half_a_core_and_one_thread(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/", {"sys/fs/cgroup/cpu.max": "50000 100000\n"})

    assert usable_cores(root) == 0.5
    assert default_threads(root) == 1


def test_the_tightest_of_nested_quotas_binds(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/pod/cpu.max": "30000 100000\n", "sys/fs/cgroup/pod/app/cpu.max": "80000 100000\n"}

    assert usable_cores(version_2(tmp_path, "/pod/app", files)) == 0.3


def test_no_quota_leaves_the_affinity(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/a", {"sys/fs/cgroup/a/cpu.max": "max 100000\n"})

    assert usable_cores(root) == CORES
    assert default_threads(root) == int(CORES)


def test_a_quota_above_the_affinity_does_not_add_cores(tmp_path: Path) -> None:
    assert usable_cores(version_2(tmp_path, "/", {"sys/fs/cgroup/cpu.max": "9900000 100000\n"})) == CORES


def test_a_container_that_sees_only_its_part_of_the_hierarchy_finds_its_quota(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "25000 100000\n", "sys/fs/cgroup/docker/abc/cpu.max": "10000 100000\n"}

    assert usable_cores(version_2(tmp_path, "/docker/abc", files, top="/docker/abc")) == 0.25


def test_cgroup_version_1_quotas_and_its_word_for_none_are_read(tmp_path: Path) -> None:
    def root(name: str, quota: str) -> Path:
        cpu = "sys/fs/cgroup/cpu,cpuacct/box/"
        files = {cpu + "cpu.cfs_quota_us": quota, cpu + "cpu.cfs_period_us": "100000\n"}
        mount = V1_MOUNT.format(top="/", name="cpu,cpuacct")
        return write(tmp_path / name, {"proc/self/cgroup": "4:cpu,cpuacct:/box\n0::/\n", "proc/self/mountinfo": mount, **files})

    assert usable_cores(root("limited", "40000\n")) == 0.4
    assert usable_cores(root("free", "-1\n")) == CORES


def test_memory_is_the_tightest_limit_and_never_more_than_the_machine_has(tmp_path: Path) -> None:
    machine = memory_bytes(tmp_path / "nothing")
    files = {"sys/fs/cgroup/a/memory.max": "268435456\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}
    version_1 = {
        "proc/self/cgroup": "4:memory:/box\n",
        "proc/self/mountinfo": V1_MOUNT.format(top="/", name="memory"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "134217728\n",
    }

    assert machine > 2**28
    assert memory_bytes(version_2(tmp_path / "two", "/a/b", files)) == 2**28
    assert memory_bytes(write(tmp_path / "one", version_1)) == 2**27
    assert memory_bytes(version_2(tmp_path / "huge", "/", {"sys/fs/cgroup/memory.max": "9223372036854771712\n"})) == machine


def test_cpu_model_and_features_come_from_cpuinfo(tmp_path: Path) -> None:
    text = "processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some Xeon @ 2.50GHz\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t: none\n"
    root = write(tmp_path / "x86", {"proc/cpuinfo": text})
    arm = write(tmp_path / "arm", {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n"})

    assert cpu_model(root) == "Some Xeon @ 2.50GHz"
    assert cpu_features(root) == {"fpu", "avx2", "avx512_vnni"}
    assert cpu_features(arm) == {"fp", "asimd", "asimddp"}


AVX512 = {"avx", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({*AVX512, "avx512_vnni", "avx_vnni", "amx_int8", "amx_tile"}, "amx_int8"),
        ({*AVX512, "avx512_vnni", "avx_vnni"}, "avx512_vnni"),
        ({"avx", "avx2", "avx_vnni"}, "avx_vnni"),
        (AVX512, "avx512"),
        ({"avx", "avx2"}, "avx2"),
        ({"asimd", "asimddp"}, "neon_dotprod"),
        ({"asimd"}, "neon"),
    ],
)
def test_the_best_instruction_set_names_the_cpu(features: set[str], name: str) -> None:
    assert instruction_set(frozenset(features)) == name


def test_versions_leave_out_what_is_not_installed() -> None:
    found = versions(["numpy", "no-such-distribution-here"])

    assert list(found) == ["numpy"]
    assert found["numpy"][0].isdigit()


def test_the_description_of_this_machine_holds_no_host_no_user_and_no_path() -> None:
    text = describe(("CPUExecutionProvider",)).model_dump_json()

    assert describe(()).providers == ()
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert "/" not in text.replace(cpu_model(), "")


def test_the_module_imports_no_heavy_library() -> None:
    import subprocess
    import sys

    code = "import sys, onnxsqueeze.environment, onnxsqueeze.backends, onnxsqueeze.measure.settings; print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))"
    source = str(Path(environment.__file__).parents[1])
    shown = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True, check=True
    )

    assert shown.stdout.strip() == "[]"


def test_the_governor_is_read_where_the_system_has_one(tmp_path: Path) -> None:
    assert environment.governor(tmp_path) is None
    first = min(os.sched_getaffinity(0))
    write(tmp_path, {f"sys/devices/system/cpu/cpu{first}/cpufreq/scaling_governor": "powersave\n"})
    assert environment.governor(tmp_path) == "powersave"
