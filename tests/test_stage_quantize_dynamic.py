from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dequantize import errors, matrices
from exports import build, distance, export, near
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import graph, weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages.int8 import seven_bits
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic


def stage(**settings: Any) -> QuantizeDynamic:
    return QuantizeDynamic.model_validate({"kind": "quantize-dynamic", "reduce_range": seven_bits("auto"), **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_is_within_half_a_step(tmp_path: Path, family: FamilyName) -> None:
    parent, context = export(tmp_path, family)
    small, changed = build(stage(), parent, tmp_path / "int8", context)
    graph.check(small.onnx, like=parent.onnx)
    found = errors(small.onnx, parent.onnx)
    assert set(found) == {name for name, values in matrices(parent.onnx).items() if values.ndim == 2 and values.dtype == np.float32}
    for name, (error, step) in found.items():
        assert (error <= step * 0.501).all(), name
    assert changed.count == len(found) == sum(changed.details["integer_weights"].values())
    assert changed.details["float_matrices_left"] == 0
    assert distance(parent, small, context) < near(0.1)


def test_embeddings_are_8_bit_in_the_file(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(), parent, tmp_path / "int8", context)
    before = next(w for w in weights.by_class(parent.onnx) if w.class_ == "embedding")
    after = [w for w in weights.by_class(small.onnx) if w.class_ == "embedding"]
    assert [(w.dtype, w.n, w.bytes) for w in after] == [("uint8", before.n, before.n)]
    assert weights.integers(small.onnx) == {"Gather": 3, "MatMulInteger": 14}


def test_one_scale_a_matrix_and_seven_bits_are_what_the_settings_say(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "distilbert")
    whole, _ = build(stage(per_channel=False), parent, tmp_path / "whole", context)
    narrow, _ = build(stage(reduce_range=True), parent, tmp_path / "narrow", context)
    for name, (error, step) in errors(whole.onnx, parent.onnx).items():
        assert np.unique(step).size == 1
        assert (error <= step * 0.501).all(), name
    stored = [values for name, values in matrices(narrow.onnx).items() if name.endswith("_quantized") and values.dtype == np.int8]
    assert stored
    assert max(np.abs(values.astype(int)).max() for values in stored) <= 64


def test_a_stage_that_quantizes_nothing_is_an_error(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(), parent, tmp_path / "int8", context)
    with pytest.raises(StageError, match="no weight of MatMul was quantized"):
        build(stage(op_types=["MatMul"]), small, tmp_path / "again", context)


def test_a_named_operator_without_weights_is_an_error_though_others_were_quantized(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    tables, _ = build(stage(op_types=["Gather"]), parent, tmp_path / "tables", context)
    assert weights.integers(tables.onnx) == {"Gather": 3}
    with pytest.raises(StageError, match="no weight of Gather was quantized"):
        build(stage(op_types=["MatMul", "Gather"]), tables, tmp_path / "again", context)


def test_a_misspelled_operator_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValidationError, match="'MatMul', 'Gemm' or 'Gather'"):
        stage(op_types=["Matmul"])
    with pytest.raises(ValidationError):
        stage(op_types=[])


def test_a_fused_graph_is_quantized_and_the_record_says_what_shape_inference_left_out(tmp_path: Path) -> None:
    import onnx
    from onnxruntime.transformers.optimizer import optimize_model

    parent, context = export(tmp_path, "bert")
    fused_folder = tmp_path / "fused"
    fused_folder.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (fused_folder / file).write_bytes((parent.path / file).read_bytes())
    optimized = optimize_model(str(parent.onnx), "bert", num_heads=2, hidden_size=32, opt_level=0)
    optimized.model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    graph.save(optimized.model, fused_folder)
    fused = artifact(fused_folder, "onnx")
    assert graph.operators(fused.onnx)["com.microsoft.SkipLayerNormalization"] == 4
    small, changed = build(stage(), fused, tmp_path / "int8", context)
    assert "taken as float32" in changed.details["shape_inference"]
    assert distance(parent, small, context) < near(0.1)


def test_cuda_is_refused_with_the_reason_and_the_cpu_is_not() -> None:
    reason = stage().refuses("cuda")
    assert reason is not None
    assert "no kernel for DynamicQuantizeLinear" in reason
    assert stage().refuses("cpu") is None


@pytest.mark.parametrize(
    ("isa", "seven"), [("avx512_vnni", False), ("amx_int8", False), ("avx_vnni", False), ("avx512", True), ("avx2", True), ("neon", False)]
)
def test_seven_bits_are_chosen_where_8_would_saturate_and_only_then_the_machine_joins_the_key(
    monkeypatch: pytest.MonkeyPatch, isa: str, *, seven: bool
) -> None:
    from onnxsqueeze import environment
    from onnxsqueeze.stages.int8 import seven_bits

    monkeypatch.setattr(environment, "instruction_set", lambda: isa)
    assert seven_bits("auto") is seven
    assert stage(reduce_range="auto").machine_bound() is seven
    assert not stage(reduce_range=True).machine_bound()
