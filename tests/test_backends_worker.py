"""A session's process: another Python's, alone with its pipes, and never an orphan; where it ends, one clear error."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest

from crossed import first
from onnxsqueeze.backends import Backend, Backends, Session, get, worker
from onnxsqueeze.backends.process import Worker
from onnxsqueeze.errors import MeasureError
from onnxsqueeze.measure.proof import proof
from pythons import environment
from test_backends import FEED, classifier


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return classifier(tmp_path / "model.onnx")


def newest() -> psutil.Process:
    """The worker that this process started last."""
    return max((child for child in psutil.Process().children() if worker.__file__ in child.cmdline()), key=lambda child: child.pid)


def test_a_worker_gives_the_same_logits_as_a_session_in_this_process(model: Path) -> None:
    here = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (expected,) = here.run(["logits"], {name: FEED[name] for name in ("input_ids", "attention_mask")})
    session = get("cpu").open(model, 1)

    np.testing.assert_array_equal(session.run(FEED), expected)
    session.hold([FEED])
    block = session.time(30, 5.0, uncounted=2)
    assert len(block.times_ms) >= 30
    assert block.times_ms.sum() >= 5.0
    assert block.times_ms.min() > 0
    assert 0 < block.cpu_s < 10
    np.testing.assert_array_equal(session.run(FEED), expected)
    session.close()


def test_a_worker_that_is_killed_in_a_block_is_one_error_without_a_path(model: Path) -> None:
    session = get("cpu").open(model, 1)
    session.hold([FEED])
    threading.Timer(0.3, newest().kill).start()
    began = time.monotonic()

    with pytest.raises(MeasureError, match=r"/model\.onnx on CPUExecutionProvider: its process was killed by SIGKILL") as caught:
        session.time(1, 60_000)
    assert time.monotonic() - began < 20
    assert "memory" in (caught.value.remedy or "")
    assert str(model.parent) not in str(caught.value)
    with pytest.raises(MeasureError, match="SIGKILL"):
        session.run(FEED)
    assert session.cpu_s() in (None, 0.0)
    session.close()


def test_a_worker_that_fails_says_its_last_lines_without_paths(tmp_path: Path) -> None:
    bad = tmp_path / "onnxruntime.py"
    bad.write_text("raise MemoryError('no room in /home/alice/x')\n", encoding="utf-8")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{before}"
    try:
        process = Worker(sys.executable, "a model")
    finally:
        os.environ["PYTHONPATH"] = before
    with pytest.raises(MeasureError, match=r"a model: its process ended with exit code 1: .*MemoryError: no room in x") as caught:
        process.about()
    assert str(tmp_path) not in str(caught.value)
    process.close()


@first("busy", [True, False])
def test_the_death_of_its_parent_ends_a_worker(model: Path, busy: bool) -> None:
    code = (
        "import sys, pathlib, psutil, time, numpy as np\n"
        "from onnxsqueeze.backends import get\n"
        "session = get('cpu').open(pathlib.Path(sys.argv[1]), 1)\n"
        "session.hold([{name: np.ones((2, 5), np.int64) for name in ('input_ids', 'attention_mask')}])\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n" + ("session.time(1, 1000)\n" if busy else "") + "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, model], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    assert child.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()

    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_bound_inputs_give_the_same_logits(model: Path) -> None:
    """As NVIDIA's providers are timed, on the one device that every machine has."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    feed = {name: FEED[name] for name in ("input_ids", "attention_mask")}
    binding = worker.bound(session, "logits", feed, "cpu", 0)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()

    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], session.run(["logits"], feed)[0])


def test_ctrl_c_is_left_to_the_process_that_asks(model: Path) -> None:
    session = get("cpu").open(model, 1)
    newest().send_signal(signal.SIGINT)

    assert session.run(FEED).shape == (2, 2)
    session.close()


def test_what_a_runtime_prints_does_not_reach_the_pipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Chatter:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith(('numpy', 'onnxruntime')):\n"
        "            print('loading', name, flush=True)\n"
        "            os.write(1, b'{\"arrays\": []}\\n')\n"
        "sys.meta_path.insert(0, Chatter())\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    session = Session(model, "CPUExecutionProvider", 1)

    assert session.run(FEED).shape == (2, 2)
    session.close()


def test_another_python_runs_the_model_with_its_own_packages(model: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "other", packages=True)
    backend = Backends({"cpu": str(python)}).get("cpu")

    assert backend.unavailable() is None
    session = backend.open(model, 1)
    assert Path(newest().cmdline()[0]) == python
    np.testing.assert_array_equal(session.run(FEED), get("cpu").open(model, 1).run(FEED))
    session.close()
    assert backend.runtime is not None
    assert backend.runtime.name == f"onnxruntime {ort.__version__}"


def test_a_python_without_packages_is_a_reason_and_a_remedy(tmp_path: Path) -> None:
    python = environment(tmp_path / "bare", packages=False)
    absent = Backends({"openvino": str(python)}).get("openvino").unavailable()

    assert absent == (
        "the Python named for openvino has no numpy",
        "pip install numpy onnxruntime-openvino  (in that Python), or name another one: --python openvino=PATH",
    )


@pytest.mark.parametrize("program", ["cat", "yes", "false", "no-such-program"])
def test_a_program_that_is_no_python_is_a_reason(program: str) -> None:
    absent = Backend("cpu", "CPUExecutionProvider", "onnxruntime", python=program).unavailable()

    assert absent is not None
    assert "the Python named for cpu cannot be used" in absent[0]


def test_the_worker_is_written_for_python_3_9_and_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(worker.__file__).read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported}

    assert packages - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_held_calls_are_replayed_in_order_and_none_before_its_arrival(model: Path) -> None:
    session = get("cpu").open(model, 1)
    session.hold([FEED, {name: np.repeat(array, 8, axis=0) for name, array in FEED.items()}])
    at_once = session.replay([0, 1, 0])
    assert len(at_once.times_ms) == 3
    assert (at_once.times_ms > 0).all()
    assert (at_once.begins_ms[1:] >= at_once.ends_ms[:-1]).all()
    timed = session.replay([0, 0, 0], [0.0, 0.2, 0.1])
    assert timed.begins_ms[1] >= 200
    assert timed.begins_ms[2] - timed.ends_ms[1] < 100, "it has arrived long ago and waits for the one before alone"
    session.close()


def test_a_profile_names_each_node_once_with_its_provider_and_time(model: Path) -> None:
    session = get("cpu").open(model, 1)
    session.hold([FEED])
    nodes = session.profile(10, uncounted=2)
    session.close()

    in_file = Counter(node.op_type for node in onnx.load(model).graph.node)
    assert {node.provider for node in nodes} == {"CPUExecutionProvider"}
    assert len({node.name for node in nodes}) == len(nodes) <= sum(in_file.values())
    assert sum(node.us for node in nodes) > 0
    found = proof(nodes, 10, in_file)
    assert found.nodes_per_provider == {"CPUExecutionProvider": len(nodes)}
    assert set(found.fusions) <= {node.operator for node in nodes}
