from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from pydantic import ValidationError

from dequantize import errors, matrices
from exports import build, distance, export, near
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import graph, weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages import calibration, modules, smoothing
from onnxsqueeze.stages.calibrated import Watch
from onnxsqueeze.stages.int8 import seven_bits
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.store import Store


def stage(**settings: Any) -> QuantizeStatic:
    return QuantizeStatic.model_validate({"kind": "quantize-static", "reduce_range": seven_bits("auto"), **settings})


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
    assert distance(parent, small, context) < near(0.1)


@pytest.mark.parametrize("format", ["qdq", "qoperator"])
def test_beside_weights_of_7_bits_tables_keep_8(tmp_path: Path, format: str) -> None:  # noqa: A002, the setting's name
    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(reduce_range=True, format=format), parent, tmp_path / "int8", context)
    held = [values for values in matrices(small.onnx).values() if values.ndim == 2]
    assert max(int(np.abs(values.astype(int)).max()) for values in held if values.dtype == np.int8) == 64
    tables = [values for values in held if values.dtype == np.uint8]
    assert len(tables) == 3
    assert all(values.max() == 255 for values in tables)


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


@pytest.mark.parametrize("settings", [
    {"format": "qoperator"},
    {"format": "qoperator", "per_channel": False},
    {"per_channel": False},
    {"activation_type": "int8"},
    {"activation_type": "int8", "symmetric": True},
    {"calibration": "moving-average"},
    {"calibration": "entropy"},
    {"calibration": "percentile", "percentile": 99.9},
    {"smooth": 0.5},
    {"smooth": 0.5, "format": "qoperator"},
], ids=lambda settings: "-".join(str(value) for value in settings.values()))  # fmt: skip
def test_every_form_rounds_weights_to_the_nearest_step_and_stays_close(tmp_path: Path, settings: dict[str, Any]) -> None:
    parent, context = export(tmp_path, "bert")
    small, changed = build(stage(**settings), parent, tmp_path / "int8", context)
    graph.check(small.onnx, like=parent.onnx)
    if "smooth" in settings:
        assert changed.details["smoothed"] == 2 * 4 + 2, "of each layer four inputs of products, then the pooler and the classifier"
    else:
        found = errors(small.onnx, parent.onnx)
        assert len(found) == 12 + 3 + 2
        for name, (error, step) in found.items():
            assert (error <= step * 0.501).all(), name
    operators = graph.operators(small.onnx)
    if settings.get("format") == "qoperator":
        assert (operators["QLinearMatMul"], operators["com.microsoft.QGemm"]) == (12, 2)
    else:
        assert "QLinearMatMul" not in operators
        assert operators["QuantizeLinear"] > 8
    zero_points = [
        values for name, values in matrices(small.onnx).items() if name.endswith(("output_0_zero_point", "output_0_smooth_zero_point"))
    ]
    assert {values.dtype.name for values in zero_points} == {settings.get("activation_type", "uint8")}
    assert not settings.get("symmetric") or not any(values.any() for values in zero_points)
    assert distance(parent, small, context) < near(0.25)


def test_ranges_are_kept_and_another_choice_of_modules_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, context = export(tmp_path, "bert")
    fresh, _ = build(stage(exclude=["classifier"]), parent, tmp_path / "fresh", replace(context, kept=Store(tmp_path / "other")))
    build(stage(), parent, tmp_path / "whole", context)
    monkeypatch.setattr(Watch, "__call__", lambda *_: pytest.fail("the ranges were there"))
    found, _ = build(stage(exclude=["classifier"]), parent, tmp_path / "found", context)
    assert found.onnx.read_bytes() == fresh.onnx.read_bytes()
    monkeypatch.undo()
    other, _ = build(stage(calibration="percentile", percentile=95), parent, tmp_path / "percentile", context)
    assert other.onnx.read_bytes() != found.onnx.read_bytes()


def test_calibrations_give_other_ranges_and_percentile_the_narrower_the_smaller(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")

    def scales(**settings: Any) -> dict[str, float]:
        small, _ = build(stage(**settings), parent, tmp_path / "-".join(map(str, settings.values())), context)
        return {
            name: float(values) for name, values in matrices(small.onnx).items() if name.endswith("output_0_scale") and values.ndim == 0
        }

    minmax = scales(calibration="minmax")
    average = scales(calibration="moving-average")
    wide, narrow = (scales(calibration="percentile", percentile=p) for p in (99.9, 95))
    assert all(average[name] < minmax[name] for name in minmax if "LayerNorm" in name)
    assert all(narrow[name] < wide[name] <= minmax[name] * 1.001 for name in minmax if "LayerNorm" in name)
    assert scales(calibration="entropy") != minmax


def test_smoothing_moves_size_from_activations_to_weights_and_the_function_stays(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    model = graph.load(parent.onnx)
    nodes = modules.weighted(model)
    norm = next(
        node for node in model.graph.node if "layer.0/attention/output/LayerNorm" in node.name and node.op_type == "LayerNormalization"
    )
    gains = np.ones(32, np.float32)
    gains[:2] = 60  # two channels that a step for all would let swallow the others
    model.graph.initializer.append(numpy_helper.from_array(gains, "gains"))
    norm.input[1] = "gains"
    steep = tmp_path / "steep"
    shutil.copytree(parent.path, steep)
    graph.save(model, steep)
    source = artifact(steep, "onnx")

    smoothed = graph.load(source.onnx)
    products = [node for group in modules.weighted(smoothed).values() for node in group if node.op_type != "Gather"]
    (tmp_path / "scratch").mkdir()
    watch = Watch(smoothed, [node.input[0] for node in products], tmp_path / "scratch", 1)
    rows = list(calibration.feeds(source.onnx, context, 64))
    largest = smoothing.channels(watch(rows))
    assert smoothing.smooth(smoothed, products, largest, 0.5) == len({node.input[0].removesuffix("_smooth") for node in products})
    float_again = tmp_path / "float"
    shutil.copytree(steep, float_again)
    graph.save(smoothed, float_again)
    assert distance(source, artifact(float_again, "onnx"), context) < 1e-4

    name = nodes["bert.encoder.layer.0.intermediate.dense"][0].input[0]
    before = largest[name]
    after = smoothing.channels(Watch(smoothed, [f"{name}_smooth"], tmp_path / "scratch", 1)(rows))[f"{name}_smooth"]
    assert after.max() / np.median(after) < 0.5 * before.max() / np.median(before)
    plain, better = (build(stage(smooth=alpha, op_types=["MatMul"]), source, tmp_path / f"{alpha}", context)[0] for alpha in (None, 0.5))
    assert distance(source, better, context) < distance(source, plain, context)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for wrong, message in (
        ({"percentile": 99}, "percentile needs calibration: percentile"),
        ({"symmetric": True}, "symmetric needs activation_type: int8"),
        ({"quantize_bias": False, "op_types": ["MatMul"], "format": "qoperator"}, "quantize_bias: false needs format: qdq"),
        ({"smooth": 1.5}, "less than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            stage(**wrong)
    assert "no kernel for QLinearMatMul" in (stage(format="qoperator").refuses("cuda") or "")
    assert "no kernel for QLinearMatMul" in (stage(format="qoperator").refuses("openvino") or "")
    assert stage().refuses("cuda") is None


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
    for name, made in (("whole", whole), ("apart", apart)):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        ort.InferenceSession(str(made.onnx), options, providers=["CPUExecutionProvider"])
        model = onnx.load(tmp_path / f"{name}.onnx")
        int32 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT32}
        loaded[name] = sum(node.op_type == "DequantizeLinear" and node.input[0] in int32 for node in model.graph.node)
    assert loaded["whole"] > 12, "the session makes int32 of biases: what this setting is for"
    assert loaded["apart"] == 0
    assert distance(parent, apart, context) < near(0.1)
    with pytest.raises(ValidationError, match="op_types without Gemm"):
        stage(quantize_bias=False)
