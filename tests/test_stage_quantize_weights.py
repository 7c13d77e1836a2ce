from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dequantize import errors
from exports import build, distance, export
from models import FAMILIES, FamilyName
from onnxsqueeze import graph, weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_weights import QuantizeWeights


def stage(**settings: Any) -> QuantizeWeights:
    return QuantizeWeights.model_validate({"kind": "quantize-weights", **settings})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_within_half_a_step_of_its_block(tmp_path: Path, family: FamilyName, bits: int) -> None:
    parent, context = export(tmp_path, family)
    small, changed = build(stage(bits=bits, block_size=16), parent, tmp_path / "small", context)
    graph.check(small.onnx, like=parent.onnx)
    found = errors(small.onnx, parent.onnx)
    for name, (error, step) in found.items():
        assert (error <= step * 0.501).all(), name
    written = graph.operators(small.onnx)
    assert written["com.microsoft.MatMulNBits"] == (13 if family == "electra" else 12)
    assert changed.details["embedding_tables"] == written["com.microsoft.GatherBlockQuantized"] == (2 if family == "distilbert" else 3)
    assert len(found) == changed.count == written["com.microsoft.MatMulNBits"] + written["com.microsoft.GatherBlockQuantized"]
    assert distance(parent, small, context) < (0.05 if bits == 8 else 0.6)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_four_bits_for_the_tables_alone_and_int8_behind_them_for_the_layers(tmp_path: Path, family: FamilyName) -> None:
    parent, context = export(tmp_path, family)
    tables, changed = build(stage(layers=False, embedding_bits=4, block_size=16), parent, tmp_path / "tables", context)
    graph.check(tables.onnx, like=parent.onnx)
    found = errors(tables.onnx, parent.onnx)
    assert len(found) == changed.count == changed.details["embedding_tables"] == (2 if family == "distilbert" else 3)
    for name, (error, step) in found.items():
        assert (error <= step * 0.501).all(), name
    stored = {w.dtype: w for w in weights.by_class(tables.onnx) if w.class_ == "embedding"}
    values = sum(error.size for error, _ in found.values())
    assert values <= stored["uint4"].n <= values * 1.1, "with the zero points"
    both, _ = build(QuantizeDynamic(), tables, tmp_path / "both", context)
    graph.check(both.onnx, like=parent.onnx)
    operators = graph.operators(both.onnx)
    assert operators["com.microsoft.GatherBlockQuantized"] == changed.count
    assert operators["MatMulInteger"] >= 12
    assert distance(parent, both, context) < 0.6


def test_tables_of_an_odd_number_of_blocks_do_not_get_four_bits(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "electra")  # embeddings of width 16
    with pytest.raises(StageError, match="no float embedding whose width 32 divides"):
        build(stage(layers=False, embedding_bits=4, block_size=16), parent, tmp_path / "small", context)


def test_the_record_counts_weights_and_not_bytes(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(bits=4, embeddings=False), parent, tmp_path / "small", context)
    before = {w.class_: w for w in weights.by_class(parent.onnx) if w.dtype == "float32"}
    packed = {w.class_: w for w in weights.by_class(small.onnx) if w.dtype == "uint4"}
    assert set(packed) == {"attention", "feed_forward"}
    for class_, weight in packed.items():
        biases = sum(w.n for w in weights.by_class(small.onnx) if (w.class_, w.dtype) == (class_, "float32"))
        assert weight.n == before[class_].n - biases
        assert weight.bytes == weight.n // 2
    assert {w.dtype for w in weights.by_class(small.onnx) if w.class_ == "embedding"} == {"float32"}


def test_tables_whose_width_the_block_does_not_divide_stay_in_float(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "electra")  # embeddings of width 16
    small, changed = build(stage(block_size=32), parent, tmp_path / "small", context)
    assert changed.details["embedding_tables"] == 0
    assert {w.dtype for w in weights.by_class(small.onnx) if w.class_ == "embedding" and w.n > 1000} == {"float32"}


def test_a_stage_that_quantizes_nothing_is_an_error(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    small, _ = build(stage(), parent, tmp_path / "small", context)
    with pytest.raises(StageError, match="no MatMul with a float weight"):
        build(stage(), small, tmp_path / "again", context)


def test_bits_and_block_sizes_without_a_kernel_are_refused_before_anything_runs() -> None:
    for wrong in (
        {"bits": 3},
        {"block_size": 48},
        {"layers": False, "embeddings": False},
        {"layers": False, "bits": 4},
        {"embeddings": False, "embedding_bits": 4},
    ):
        with pytest.raises(ValidationError):
            stage(**wrong)


def test_backends_without_kernels_are_refused_and_embeddings_decide_for_openvino() -> None:
    assert "no kernel for com.microsoft.GatherBlockQuantized" in (stage().refuses("openvino") or "")
    assert stage(embeddings=False).refuses("openvino") is None
    assert "no kernel for com.microsoft.GatherBlockQuantized, com.microsoft.MatMulNBits" in (stage().refuses("tensorrt") or "")
    assert stage().refuses("cuda") is None
    assert stage().refuses("cpu") is None
