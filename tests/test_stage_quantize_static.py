from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dequantize import errors, matrices
from exports import build, distance, export
from models import FAMILIES, FamilyName
from onnxsqueeze import graph, weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.quantize_static import QuantizeStatic


def stage(**settings: Any) -> QuantizeStatic:
    return QuantizeStatic.model_validate({"kind": "quantize-static", "reduce_range": False, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_within_half_a_step_and_logits_stay_close(tmp_path: Path, family: FamilyName) -> None:
    parent, context = export(tmp_path, family)
    small, changed = build(stage(), parent, tmp_path / "int8", context)
    graph.check(small.onnx, like=parent.onnx)
    found = errors(small.onnx, parent.onnx)
    assert set(found) == {name for name, values in matrices(parent.onnx).items() if values.ndim == 2 and values.dtype == np.float32}
    for name, (error, step) in found.items():
        assert (error <= step * 0.501).all(), name
    assert changed.details["integer_weights"] == {
        "Gather": 2 if family == "distilbert" else 3,
        "Gemm": 2,
        "MatMul": 13 if family == "electra" else 12,
    }
    assert changed.details["calibration_rows"] == 64
    embeddings = {w.dtype for w in weights.by_class(small.onnx) if w.class_ == "embedding"}
    assert embeddings == ({"uint8", "int8", "int32"} if family == "electra" else {"uint8"})  # electra: a projection behind the tables
    assert distance(parent, small, context) < 0.1


def test_activation_ranges_are_the_smallest_and_largest_values_of_the_training_rows(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(samples=16), parent, tmp_path / "int8", context)
    name = "/bert/embeddings/LayerNorm/LayerNormalization_output_0"
    model = onnx.load(str(parent.onnx))
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.concatenate([session.run([name], feed)[0] for feed in calibration.feeds(parent.onnx, context, 16)])
    stored = matrices(small.onnx)
    assert stored[f"{name}_scale"] == pytest.approx((values.max() - values.min()) / 255, rel=1e-5)
    assert stored[f"{name}_zero_point"] == round(-values.min() / (values.max() - values.min()) * 255)


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_not_rounded(tmp_path: Path, family: FamilyName) -> None:
    """What lies behind QuantizeLinear goes into products with weights alone, but for rows of tables, which are on their grid."""
    parent, context = export(tmp_path, family)
    small, _ = build(stage(), parent, tmp_path / "int8", context)
    nodes = list(graph.load(small.onnx).graph.node)
    maker = {output: node for node in nodes for output in node.output}
    rounded = {n.output[0]: n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in maker}
    readers = {(node.op_type, maker[rounded[name].input[0]].input[0]) for node in nodes for name in node.input if name in rounded}
    others = {source for kind, source in readers if kind not in ("MatMul", "Gemm")}

    assert others  # the tables'
    assert all(maker[source].op_type == "Gather" and "embeddings" in source for source in others)
    assert sum(kind == "MatMul" for kind, _ in readers) >= 8  # per layer: what query, key and value share, and three more


def test_attention_products_stay_in_float(tmp_path: Path) -> None:
    import onnx

    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(), parent, tmp_path / "int8", context)
    dequantized = {n.output[0] for n in onnx.load(str(small.onnx)).graph.node if n.op_type == "DequantizeLinear"}
    products = [
        n for n in onnx.load(str(small.onnx)).graph.node if n.op_type == "MatMul" and n.name.endswith(("self/MatMul", "self/MatMul_1"))
    ]
    assert len(products) == 4
    assert not any(name in dequantized for node in products for name in node.input)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_nothing_but_the_model_is_left_behind(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    before = names(parent.path)
    parent.path.chmod(0o555)
    small, _ = build(stage(samples=8), parent, tmp_path / "int8", context)
    assert names(parent.path) == before == names(small.path)


def test_a_stage_that_quantizes_nothing_is_an_error(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    tables, _ = build(stage(op_types=["Gather"]), parent, tmp_path / "tables", context)
    with pytest.raises(StageError, match="no weight of Gather was quantized"):
        build(stage(op_types=["Gather"]), tables, tmp_path / "again", context)


def test_no_samples_and_unknown_operators_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValidationError):
        stage(samples=0)
    with pytest.raises(ValidationError):
        stage(op_types=["Softmax"])


def test_biases_stay_float_where_a_backend_has_no_kernel_for_others(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    parent, context = export(tmp_path, "bert")
    whole, _ = build(stage(), parent, tmp_path / "whole", context)
    apart, _ = build(stage(quantize_bias=False, op_types=["MatMul", "Gather"]), parent, tmp_path / "apart", context)
    loaded = {}
    for name, artifact in (("whole", whole), ("apart", apart)):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        ort.InferenceSession(str(artifact.onnx), options, providers=["CPUExecutionProvider"])
        model = onnx.load(tmp_path / f"{name}.onnx")
        int32 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT32}
        loaded[name] = sum(node.op_type == "DequantizeLinear" and node.input[0] in int32 for node in model.graph.node)
    assert loaded["whole"] > 12, "the session makes int32 of biases: what this setting is for"
    assert loaded["apart"] == 0
    assert distance(parent, apart, context) < 0.1
    with pytest.raises(ValidationError, match="op_types without Gemm"):
        stage(quantize_bias=False)
