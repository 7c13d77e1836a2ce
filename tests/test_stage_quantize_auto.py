from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from exports import build, export
from models import artifact, toy_task
from onnxsqueeze import graph
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Context
from onnxsqueeze.stages import modules, scoring
from onnxsqueeze.stages.quantize_auto import QuantizeAuto, divergence
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic

FRAGILE = "bert.encoder.layer.1.intermediate.dense"


def stage(**settings: Any) -> QuantizeAuto:
    return QuantizeAuto.model_validate({"kind": "quantize-auto", "samples": 16, **settings})


def fragile(folder: Path) -> tuple[Artifact, Context]:
    """A model of which one matrix has rows far larger than the others, so that int8 makes zeros of the others; scored by whether its answers stay."""
    parent, context = export(folder, "bert")
    model = graph.load(parent.onnx)
    name = modules.weight_of(modules.weighted(model)[FRAGILE][0])
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = np.frombuffer(weight.raw_data, np.float32).reshape(tuple(weight.dims)).copy()
    values[0] = 0
    values[0, ::2], values[0, 1::2] = 400.0, -400.0
    weight.raw_data = values.tobytes()
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization" and "layer.1/attention/output" in node.name]
    gains, shifts = np.ones(32, np.float32), np.zeros(32, np.float32)
    gains[0] = 0  # what meets the large row is 0: in float it changes nothing
    for place, (label, content) in enumerate((("gains", gains), ("shifts", shifts)), 1):
        tensor = type(weight)(name=label, data_type=1, dims=[32], raw_data=content.tobytes())
        model.graph.initializer.append(tensor)
        norms[0].input[place] = label
    written = folder / "fragile"
    shutil.copytree(parent.path, written)
    graph.save(model, written)
    source = artifact(written, "onnx")
    exact = _answers(source.path, context)

    def select(logits: Any) -> float:
        return float(np.exp(-divergence(context.task, exact, logits) * 1000))

    return source, replace(context, select=select)


def _answers(folder: Path, context: Context) -> Any:
    kept: list[Any] = []

    def keep(logits: Any) -> float:
        kept.append(logits)
        return 0.0

    scoring.selection_score(folder, replace(context, select=keep))
    return kept[0]


def test_the_module_that_int8_breaks_is_found_and_stays_in_float_alone(tmp_path: Path) -> None:
    parent, context = fragile(tmp_path)
    out, changed = build(stage(max_drop_pp=20), parent, tmp_path / "auto", context)
    graph.check(out.onnx, like=parent.onnx)
    found = changed.details["sensitivities"]
    assert found[0]["module"] == FRAGILE
    assert found[0]["sensitivity"] > 10 * found[1]["sensitivity"] >= 0
    assert [one["module"] for one in found if one["float"]] == [FRAGILE]
    assert set(modules.weighted(graph.load(out.onnx))) == {FRAGILE}
    assert len(found) == len(modules.weighted(graph.load(parent.onnx)))
    assert sorted(found, key=lambda one: -one["sensitivity"]) == found
    trials = changed.details["trials"]
    assert (trials[0]["float"], trials[0]["holds"]) == ([], False)
    assert changed.details["selection_before"] - changed.details["selection_after"] <= 0.2
    assert scoring.selection_score(out.path, context) == changed.details["selection_after"]
    again, _ = build(stage(max_drop_pp=20), parent, tmp_path / "again", context)
    assert again.onnx.read_bytes() == out.onnx.read_bytes()


def test_where_everything_holds_it_is_the_quantizer_s_own_file(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "distilbert")
    context = replace(context, select=lambda _: 0.5)
    out, changed = build(
        stage(quantizer={"kind": "quantize-static", "samples": 8}, sensitivity="metric"), parent, tmp_path / "auto", context
    )
    plain, _ = build(stage(quantizer={"kind": "quantize-static", "samples": 8}).quantizer, parent, tmp_path / "plain", context)
    assert out.onnx.read_bytes() == plain.onnx.read_bytes()
    assert [trial["float"] for trial in changed.details["trials"]] == [[]]
    assert {one["sensitivity"] for one in changed.details["sensitivities"]} == {0.0}


def test_operators_that_the_quantizer_names_are_tried_module_by_module(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    context = replace(context, select=lambda _: 0.5)
    out, changed = build(
        stage(quantizer={"kind": "quantize-dynamic", "op_types": ["Gather", "MatMul"]}), parent, tmp_path / "auto", context
    )
    assert len(changed.details["sensitivities"]) == 3 + 12
    assert not {one["module"] for one in changed.details["sensitivities"]} & set(modules.weighted(graph.load(out.onnx)))


def test_a_score_that_any_quantized_module_breaks_is_an_error_with_the_best(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    exact = _answers(parent.path, context)
    context = replace(context, select=lambda logits: float(np.array_equal(logits, exact)))
    with pytest.raises(
        StageError,
        match=r"score is 1.0000 in float32; the best quantized model has 0.0000 with \d+ of 17 modules in float32, more than 1.0 points",
    ):
        build(stage(max_drop_pp=1), parent, tmp_path / "auto", context)


def test_divergences_by_hand() -> None:
    a, b = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)), np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence(toy_task(), a, b) == pytest.approx(expected, rel=1e-5)
    assert divergence(toy_task(), a, a) == pytest.approx(0, abs=1e-12)
    scores = np.array([[0.0], [2.0]], np.float32)
    assert divergence(toy_task(outputs=1), scores, scores + 0.5) == pytest.approx(0.25)
    vectors = np.array([[1.0, 0.0]], np.float32)
    assert divergence(replace(toy_task(), compare="cosine"), vectors, np.array([[0.0, 3.0]], np.float32)) == pytest.approx(1)


def test_its_quantizer_decides_where_it_runs_and_what_its_settings_may_be() -> None:
    assert "no kernel" in (stage().refuses("cuda") or "")
    assert stage(quantizer={"kind": "quantize-static"}).refuses("cuda") is None
    assert stage().parts() == (QuantizeDynamic(),)
    for wrong in (
        {"quantizer": {"kind": "quantize-weights"}},
        {"quantizer": {"kind": "quantize-static", "samples": 0}},
        {"max_drop_pp": -1},
    ):
        with pytest.raises(ValidationError):
            stage(**wrong)
