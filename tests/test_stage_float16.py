from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from exports import build, distance, export
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import graph, weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages.float16 import Float16
from onnxsqueeze.stages.quantize_weights import QuantizeWeights

STAGE = Float16(kind="float16")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_half_and_logits_stay_within_half_precision(tmp_path: Path, family: FamilyName) -> None:
    parent, context = export(tmp_path, family)
    half, changed = build(STAGE, parent, tmp_path / "half", context)
    graph.check(half.onnx, like=parent.onnx)
    dtypes = {w.dtype for w in weights.by_class(half.onnx)}
    assert "float32" not in dtypes
    assert changed.count == weights.tensors_of(half.onnx, "float16") == weights.tensors_of(parent.onnx, "float32")
    assert distance(parent, half, context) < 0.005


def test_8_bit_weights_keep_their_bits_when_activations_become_half(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    small, _ = build(QuantizeWeights(kind="quantize-weights"), parent, tmp_path / "w8", context)
    both, _ = build(STAGE, small, tmp_path / "both", context)
    graph.check(both.onnx, like=parent.onnx)
    assert weights.integers(both.onnx) == weights.integers(small.onnx)
    assert {w.dtype for w in weights.by_class(both.onnx)} == {"uint8", "float16"}
    assert both.onnx.stat().st_size < small.onnx.stat().st_size
    assert distance(small, both, context) < 0.005


def test_logits_that_overflow_are_an_error(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    model = graph.load(parent.onnx)
    head = next(t for t in model.graph.initializer if t.name == "classifier.weight")
    head.raw_data = (np.frombuffer(head.raw_data, np.float32) * 1e6).tobytes()
    huge = tmp_path / "huge"
    huge.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (huge / file).write_bytes((parent.path / file).read_bytes())
    graph.save(model, huge)
    with pytest.raises(StageError, match="overflow"):
        build(STAGE, artifact(huge, "onnx"), tmp_path / "half", context)


def test_operators_that_stay_in_float32_hand_it_to_each_other_where_half_overflows(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    steep = tmp_path / "steep"
    shutil.copytree(parent.path, steep)
    model = graph.load(parent.onnx)
    queries = [node.input[1] for node in model.graph.node if node.op_type == "MatMul" and "query" in node.name]
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in queries):
        tensor.raw_data = (numpy_helper.to_array(tensor) * np.float32(3e4)).tobytes()  # attention scores of 10^6
    graph.save(model, steep)
    with pytest.raises(StageError, match="overflow"):
        build(STAGE, artifact(steep, "onnx"), tmp_path / "half", context)
    scores = ("MatMul", "Add", "Mul", "Div", "Where", "Transpose", "Reshape", "Softmax")
    mixed, changed = build(STAGE.model_copy(update={"keep_float32": scores}), artifact(steep, "onnx"), tmp_path / "mixed", context)
    graph.check(mixed.onnx, like=parent.onnx)
    dtypes = {tensor.name: tensor.data_type for tensor in graph.load(mixed.onnx).graph.initializer}
    assert {dtypes[name] for name in queries} == {TensorProto.FLOAT}
    assert changed.count == sum(kind == TensorProto.FLOAT16 for kind in dtypes.values()) > 5
    with pytest.raises(StageError, match=r"keep_float32: the graph has no Softmx.*did you mean 'Softmax'"):
        build(STAGE.model_copy(update={"keep_float32": ("Softmx",)}), parent, tmp_path / "none", context)


def test_a_stage_that_converts_nothing_is_an_error(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    half, _ = build(STAGE, parent, tmp_path / "half", context)
    with pytest.raises(StageError, match="no float32 weight"):
        build(STAGE, half, tmp_path / "again", context)


def test_the_cpu_is_refused_with_the_reason_and_cuda_is_not() -> None:
    reason = STAGE.refuses("cpu")
    assert reason is not None
    assert "slower than float32" in reason
    assert STAGE.refuses("cuda") is None
