"""Runs whose backends live in another Python: what is measured there, what the record says of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort
import pytest

from models import random_checkpoint
from onnxsqueeze.backends import Backend, Backends
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.results import Target
from onnxsqueeze.verify import verify
from pythons import environment
from runs import SMALL, TIMED, Silent, run

RECIPE = """
schema: 1
name: elsewhere
task: toy
stages: [{kind: finetune}]
targets:
  - {name: fp32, backend: cpu, baseline: true, after: finetune, stages: [{kind: export}]}
  - {name: int8, backend: cpu, stages: [{kind: export}, {kind: quantize-dynamic}]}
"""
OPENVINO = """
  - {name: ov-fp32, backend: openvino, baseline: true, after: finetune, stages: [{kind: export}]}
  - {name: ov-int8, backend: openvino, stages: [{kind: export}, {kind: quantize-dynamic}]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a trained head, so that nothing is trained, and one store for this module."""
    folder = tmp_path_factory.mktemp("elsewhere")
    model = random_checkpoint(folder / "model", "bert", layers=2, head=True)
    config = json.loads((model / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "negative", "1": "positive"}, {"negative": 0, "positive": 1}
    (model / "config.json").write_text(json.dumps(config))
    return folder


def run_on(
    backends: Backends, place: Path, out: Path, text: str = RECIPE, require: tuple[str, ...] = (), more: Sequence[str] = ()
) -> tuple[Outcome, list[str]]:
    recipe = out.parent / "elsewhere.yaml"
    recipe.write_text(text, encoding="utf-8")
    sets = [*(word for word in SMALL if "finetune" not in word), *more]
    return run(recipe, out, model=place / "model", store=place / "store", overrides=sets, backends=backends, require=require)


def rows(outcome: Outcome) -> dict[str, Target]:
    return {target.name: target for target in outcome.results.targets}


@pytest.mark.full
def test_the_record_and_the_store_know_the_runtime_that_measured_a_row(place: Path, tmp_path: Path) -> None:
    here, _ = run_on(Backends(), place, tmp_path / "here", more=TIMED)
    assert rows(here)["int8"].runtime == f"onnxruntime {ort.__version__}"
    python = environment(tmp_path / "other", packages=True)
    (site,) = (tmp_path / "other").glob("lib/python*/site-packages")
    (site / "onnxruntime_gpu-9.9.dist-info").mkdir()  # only that Python has it
    (site / "onnxruntime_gpu-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.9\n")
    there = Backends({"cpu": str(python)})
    outcome, lines = run_on(there, place, tmp_path / "there", more=TIMED)

    assert rows(outcome)["int8"].runtime == f"onnxruntime {ort.__version__} and onnxruntime-gpu 9.9"
    assert any(line.startswith("latency on cpu") for line in lines), "another runtime is measured anew"
    text = (outcome.out / "results.json").read_text(encoding="utf-8")
    assert "--python cpu=python" in outcome.results.command
    assert str(tmp_path) not in text
    _, again = run_on(there, place, tmp_path / "there", more=TIMED)
    assert not any(line.startswith("latency on cpu") for line in again)
    found = {f.what: f for f in verify(outcome.out / "int8", data_dir=None, progress=Silent(), backends=there, reader=lambda: None)}
    assert found["outputs"].passed
    assert found["metric"].passed


def test_a_python_without_onnxruntime_skips_its_rows_with_a_remedy(place: Path, tmp_path: Path) -> None:
    bare = Backends({"openvino": str(environment(tmp_path / "bare", packages=False))})
    outcome, _ = run_on(bare, place, tmp_path / "bare-run", RECIPE + OPENVINO)

    row = rows(outcome)["ov-int8"]
    assert (row.status, row.runtime) == ("skipped", None)
    assert row.reason == "the Python named for openvino has no numpy"
    assert "pip install numpy onnxruntime-openvino" in str(row.remedy)
    assert rows(outcome)["int8"].status == "ok"
    assert outcome.exit_code == 0
    outcome, _ = run_on(bare, place, tmp_path / "bare-run", RECIPE + OPENVINO, require=("openvino",))
    assert outcome.exit_code == 1


class Lacking(Backends):
    """This machine's CPU, which claims to have no kernel for products of integers."""

    def get(self, name: str) -> Backend:
        return replace(super().get(name), lacks=frozenset({"MatMulInteger"}), instead="use float16")


def test_a_graph_with_operators_without_kernels_is_refused_before_it_is_measured(place: Path, tmp_path: Path) -> None:
    outcome, lines = run_on(Lacking(), place, tmp_path / "lacking")

    row = rows(outcome)["int8"]
    assert row.status == "failed"
    assert (
        row.reason
        == "int8: CPUExecutionProvider has no kernel for MatMulInteger: such nodes would run on another provider, with copies in between; use float16"
    )
    assert not any("int8: accuracy" in line for line in lines)
    assert rows(outcome)["fp32"].status == "ok"


@pytest.mark.full
def test_rows_of_openvino_are_measured_in_an_environment_of_its_own(place: Path, tmp_path: Path) -> None:
    """onnxruntime-openvino, which cannot be installed beside onnxruntime: every node of a float32 and of an int8 model runs there."""
    import subprocess
    import sys

    python = tmp_path / "ov" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "ov"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "onnxruntime-openvino==1.24.1"], check=True, timeout=300)
    outcome, _ = run_on(Backends({"openvino": str(python)}), place, tmp_path / "out", RECIPE + OPENVINO, require=("openvino",), more=TIMED)

    assert outcome.exit_code == 0, outcome.problems
    found = rows(outcome)
    for name, like in (("ov-fp32", "fp32"), ("ov-int8", "int8")):
        row = found[name]
        assert (row.status, row.provider, row.runtime) == ("ok", "OpenVINOExecutionProvider", "onnxruntime-openvino 1.24.1")
        assert row.latency is not None
        assert row.latency.peak_memory_bytes
        assert row.metrics["validation"]["accuracy"].value == pytest.approx(found[like].metrics["validation"]["accuracy"].value, abs=0.02)
    assert "OpenVINOExecutionProvider" in outcome.results.environment.providers
    assert found["fp32"].runtime == f"onnxruntime {ort.__version__}"
