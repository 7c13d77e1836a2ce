"""What only a machine with an NVIDIA GPU can show; run by `make test-gpu`, which fails where there is none.

onnxruntime-gpu may live in another Python: name it in the configuration file (`pythons: {cuda: …}`), which $ONNXSQUEEZE_CONFIG names.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from exports import build, export
from models import silent
from onnxsqueeze import config
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.backends import Backends
from onnxsqueeze.measure.latency import Candidate, measure_latency
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.work import FixedWork
from onnxsqueeze.stage import Context, Stage
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.float16 import Float16
from onnxsqueeze.stages.quantize_inc import QuantizeInc
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.stages.quantize_weights import QuantizeWeights

pytestmark = pytest.mark.gpu

# Each target of recipes/gpu.yaml: its stages behind the export, and how far its logits may lie from float32's, as a share of their spread.
CHAINS: dict[str, tuple[tuple[Stage, ...], float]] = {
    "fp32": ((), 0.005),
    "fp16": ((Float16(),), 0.02),
    "w8": ((QuantizeWeights(bits=8), Float16()), 0.05),
    "w4": ((QuantizeWeights(bits=4), Float16()), 0.5),
    "qdq-ort": ((QuantizeStatic(quantize_bias=False, op_types=("MatMul", "Gather")),), 0.3),
    "qdq-inc": ((QuantizeInc(approach="static", format="qdq"),), 0.3),
}


@pytest.fixture(scope="module")
def registry() -> Backends:
    return config.load([f"cuda={os.environ['ONNXSQUEEZE_GPU_PYTHON']}"] if "ONNXSQUEEZE_GPU_PYTHON" in os.environ else [])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Context]:
    return export(tmp_path_factory.mktemp("gpu"), "bert")


def made(name: str, exported: tuple[Artifact, Context], folder: Path) -> Artifact:
    artifact, context = exported
    for number, stage in enumerate(CHAINS[name][0]):
        artifact, _ = build(stage, artifact, folder / f"{name}-{number}", context)
    return artifact


def test_cuda_starts(registry: Backends) -> None:
    assert registry.get("cuda").unavailable() is None


@pytest.mark.parametrize("name", CHAINS)
def test_every_cuda_target_runs_there_alone_and_answers_like_float32(
    name: str, exported: tuple[Artifact, Context], registry: Backends, tmp_path: Path
) -> None:
    parent, context = exported
    artifact = made(name, exported, tmp_path)
    feeds = list(calibration.feeds(parent.onnx, context, 16))
    expected = np.concatenate(calibration.logits(parent.onnx, feeds, threads=1))
    with closing(registry.open("cuda", artifact.onnx, 1)) as session:  # opening raises where a node falls back
        found = np.concatenate([session.run(feed) for feed in feeds])
        session.hold(feeds[:1])
        nodes = session.profile(5, uncounted=2)
        block = session.time(20, 0.0, uncounted=1)
    assert np.abs(found - expected).max() <= CHAINS[name][1] * np.ptp(expected, axis=0).max()
    assert len(block.times_ms) == 20
    copies = sum("Memcpy" in node.operator for node in nodes)
    assert copies <= 4, "inputs and the output, and nothing in between"


@pytest.mark.parametrize("batch", [1, 8, 32, 128])
def test_bound_inputs_are_timed_at_every_batch(batch: int, exported: tuple[Artifact, Context], registry: Backends, tmp_path: Path) -> None:
    candidates = [Candidate(name, made(name, exported, tmp_path).onnx, "cuda") for name in ("fp32", "fp16")]
    work = FixedWork(Shape(batch=batch, sequence=32, threads=1))
    found = measure_latency(candidates, "fp32", work, MeasureSettings(min_runs=40, min_seconds=0), silent, opener=registry.open)
    assert found["fp16"].speedup is not None
    assert found["fp16"].latency.n >= 40


def test_tensorrt_runs_float32_where_it_is_installed(exported: tuple[Artifact, Context], registry: Backends) -> None:
    absent = registry.get("tensorrt").unavailable()
    if absent:
        pytest.skip(absent[0])
    feeds = list(calibration.feeds(exported[0].onnx, exported[1], 4))
    expected = np.concatenate(calibration.logits(exported[0].onnx, feeds, threads=1))
    with closing(registry.open("tensorrt", exported[0].onnx, 1)) as session:
        found = np.concatenate([session.run(feed) for feed in feeds])
    assert np.abs(found - expected).max() <= 0.01 * np.ptp(expected, axis=0).max()
