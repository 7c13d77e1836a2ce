from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from exports import build, export
from models import artifact
from onnxsqueeze import forms, graph, weights
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.measure.latency import LatencyResult, Verdict, measure_latency
from onnxsqueeze.measure.metric import predict
from onnxsqueeze.recipe import load
from onnxsqueeze.stage import Context
from onnxsqueeze.stages import calibration, optimize_graph, ranges
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_static import QuantizeStatic

NAMES = [form.name for form in forms.FORMS if form.name != "int32-inputs"]
DEFAULT = [name for name in NAMES if name != "static-ranges"]  # which must be asked for
APPLIED = [name for name in DEFAULT if name != "sequence-first"]  # attention-operator leaves it nothing to do


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Context]:
    folder = tmp_path_factory.mktemp("bert")
    parent, context = export(folder, "bert")
    return parent, build(QuantizeDynamic(), parent, folder / "int8", context)[0], context


def test_the_stage_offers_every_form_that_there_is(tmp_path: Path) -> None:
    assert list(OptimizeGraph(tune=True).wanted()) == NAMES
    assert list(OptimizeGraph().wanted()) == DEFAULT
    assert OptimizeGraph(forms=("static-ranges", "compact-mask")).wanted() == ("compact-mask", "static-ranges")
    with pytest.raises(ValidationError, match="first-token"):
        OptimizeGraph.model_validate({"kind": "optimize-graph", "forms": ["first_token"]})


def test_a_float_graph_is_rewritten_within_noise_and_says_what_was_done(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    parent, _, context = exported
    out, changed = build(OptimizeGraph(), parent, tmp_path / "out", context)
    assert list(changed.details["forms"]) == APPLIED
    assert changed.count == sum(changed.details["forms"].values()) > 50
    assert changed.details["max_abs_diff"] <= changed.details["tolerance"]
    assert changed.details["left_out"] == []
    assert graph.operators(out.onnx)["Attention"] == 2
    assert (out.path / "tokenizer.json").read_bytes() == (parent.path / "tokenizer.json").read_bytes()


def test_only_the_named_forms_are_applied(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    _, changed = build(OptimizeGraph(forms=("unfused-residual",)), exported[0], tmp_path / "out", exported[2])
    assert changed.details["forms"] == {"unfused-residual": 5}


def test_a_quantized_graph_keeps_its_integers_and_its_score_is_told(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    _, int8, context = exported
    out, changed = build(OptimizeGraph(max_drop_pp=100), int8, tmp_path / "out", context)
    assert weights.integers(out.onnx) == weights.integers(int8.onnx)
    before, after = ([w for w in weights.by_class(file) if "int" in w.dtype and w.class_ != "other"] for file in (int8.onnx, out.onnx))
    assert after == before, "shapes and axes are no weights"
    assert 0 <= changed.details["selection_after"] <= 1
    assert "first-token" in changed.details["forms"]


def test_a_form_that_rounds_otherwise_goes_where_it_costs_the_selection_score(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    _, int8, context = exported
    given = iter([0.90, 0.85, 0.90])  # the parent, all forms, those without other roundings
    out, changed = build(OptimizeGraph(), int8, tmp_path / "out", replace(context, select=lambda _: next(given)))
    assert "first-token" not in changed.details["forms"]
    assert changed.details["left_out"] == ["first-token"]
    assert changed.details["refused"] == {"forms": ["first-token"], "selection": 0.85}
    assert changed.details["selection_after"] == 0.90
    assert out.onnx.is_file()


def test_forms_that_cost_the_score_all_the_same_are_an_error(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    given = iter([0.90, 0.85, 0.85])
    with pytest.raises(StageError, match=r"falls from 0\.9000 to 0\.8500, more than 0\.5 points"):
        build(OptimizeGraph(), exported[1], tmp_path / "out", replace(exported[2], select=lambda _: next(given)))


def _change_one_weight(model: ir.Model) -> int:
    value = next(
        v
        for v in model.graph.initializers.values()
        if v.const_value is not None and len(v.const_value.shape) == 2 and "onnx::MatMul" in str(v.name)
    )
    assert value.const_value is not None
    array: NDArray[np.float32] = value.const_value.numpy().copy()
    array[0, 0] += np.float32(1e-3)
    value.const_value = ir.tensor(array, name=value.name)
    return 1


@pytest.mark.parametrize(
    ("effect", "said"), [("same bits", "only move data, but the logits moved by"), ("float noise", "more than float32 noise explains")]
)
def test_a_form_that_does_more_than_it_says_is_caught(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effect: forms.Effect, said: str
) -> None:
    broken = forms.Form("compact-mask", effect, effect, _change_one_weight)
    monkeypatch.setattr(forms, "FORMS", tuple(broken if form.name == "compact-mask" else form for form in forms.FORMS))
    with pytest.raises(StageError, match=said):
        build(OptimizeGraph(), exported[0], tmp_path / "out", exported[2])


@pytest.mark.full
def test_tuning_keeps_what_no_trial_found_slower_and_records_every_trial(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    stage = OptimizeGraph(tune=True, tune_seconds=0.05, max_drop_pp=100)
    _, changed = build(stage, exported[1], tmp_path / "out", exported[2])
    trials, left_out = changed.details["trials"], changed.details["left_out"]
    rounds = max(trial["round"] for trial in trials)
    first = [trial for trial in trials if trial["round"] == 1]
    assert [trial["forms"] for trial in first][:2] == [DEFAULT, []]
    tried = [set(DEFAULT) - set(trial["forms"]) for trial in first[2:]]
    assert tried == [{name} for name in DEFAULT if name != "sequence-first"], "which has nothing to do beside attention-operator"
    with_static, without = trials[-2:]
    assert with_static["forms"] == [*without["forms"], "static-ranges"], "what quantizes otherwise is tried last, on top of what is left"
    assert with_static["round"] == without["round"] == rounds
    for name in set(left_out) - {"static-ranges"}:
        assert any((trial["speedup_ci95"] or [0])[0] > 1 and name not in trial["forms"] for trial in trials)


def test_a_tuned_graph_is_bound_to_machine_and_shape_and_a_named_one_is_not() -> None:
    assert (OptimizeGraph(tune=True).machine_bound(), OptimizeGraph(tune=True).timed()) == (True, True)
    assert (OptimizeGraph().machine_bound(), OptimizeGraph().timed()) == (False, False)
    assert OptimizeGraph(tune=True).refuses("cuda")
    assert OptimizeGraph(tune=True).refuses("cpu") is None
    assert OptimizeGraph().refuses("cuda") is None
    assert "com.microsoft.MatMulIntegerToFloat" in str(OptimizeGraph(forms=("static-ranges",)).refuses("cuda"))


def test_it_stands_before_or_behind_quantization_and_hands_the_state_on(tmp_path: Path) -> None:
    recipe = """
schema: 1
name: a
task: toy
model: minilm
stages: [{kind: finetune}]
targets:
  - {name: before, stages: [{kind: export}, {kind: optimize-graph}, {kind: quantize-dynamic}]}
  - {name: behind, stages: [{kind: export}, {kind: quantize-dynamic}, {kind: optimize-graph, tune: true}]}
"""
    (tmp_path / "a.yaml").write_text(recipe)
    loaded = load(tmp_path / "a.yaml")
    assert [stage.kind for stage in loaded.recipe.targets[1].stages] == ["export", "quantize-dynamic", "optimize-graph"]


def test_the_same_graph_gives_the_same_bytes(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    made = [build(OptimizeGraph(), artifact(exported[0].path, "onnx"), tmp_path / name, exported[2])[0] for name in ("one", "two")]
    assert made[0].onnx.read_bytes() == made[1].onnx.read_bytes()


def without_softmax(parent: Artifact, folder: Path) -> Artifact:
    """The same model with each softmax written out, as some exporters do: no attention can be recognised in it."""
    model = onnx.load(parent.onnx)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            nodes.append(node)
            continue
        (given,), (result,) = node.input, node.output
        axis = f"{result}_axis"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), axis))
        nodes += [
            onnx.helper.make_node("ReduceMax", [given, axis], [f"{result}_max"]),
            onnx.helper.make_node("Sub", [given, f"{result}_max"], [f"{result}_below"]),
            onnx.helper.make_node("Exp", [f"{result}_below"], [f"{result}_exp"]),
            onnx.helper.make_node("ReduceSum", [f"{result}_exp", axis], [f"{result}_sum"]),
            onnx.helper.make_node("Div", [f"{result}_exp", f"{result}_sum"], [result]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shutil.copytree(parent.path, folder)
    onnx.save(model, folder / "model.onnx")
    return artifact(folder, "onnx")


def test_a_graph_whose_attention_cannot_be_recognised_is_told(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    parent = without_softmax(exported[0], tmp_path / "parent")
    _, changed = build(OptimizeGraph(), parent, tmp_path / "all", exported[2])
    assert "attention-operator" in changed.details["found_nothing"]
    with pytest.raises(StageError, match=r"forms: attention-operator found nothing to change in this graph"):
        build(OptimizeGraph(forms=("constant-shapes", "attention-operator")), parent, tmp_path / "named", exported[2])


ALL = tuple(name for name in NAMES if name != "sequence-first")


def with_static(**settings: Any) -> OptimizeGraph:
    return OptimizeGraph.model_validate({"kind": "optimize-graph", "forms": ALL, **settings})


def test_named_static_ranges_fix_every_activation_and_the_record_counts_them(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    _, int8, context = exported
    out, changed = build(with_static(max_drop_pp=100), int8, tmp_path / "out", context)
    found = graph.operators(out.onnx)
    assert changed.details["activations"] == {"static": 10, "dynamic": 0, "stayed_dynamic": []}
    assert found["com.microsoft.QuantizeLinear"] == changed.details["forms"]["static-ranges"] == 10
    assert "DynamicQuantizeLinear" not in found
    assert sum(weights.integers(out.onnx).values()) == sum(weights.integers(int8.onnx).values())


def test_activations_stay_dynamic_half_of_them_at_a_time_until_the_score_holds(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    _, int8, context = exported
    given = iter([0.90, 0.90, 0.80, 0.85, 0.90])  # the parent, the other forms; then ten, five and two activations static
    out, changed = build(with_static(), int8, tmp_path / "out", replace(context, select=lambda _: next(given)))
    told = changed.details["activations"]
    assert (told["static"], told["dynamic"], len(told["stayed_dynamic"])) == (2, 8, 8)
    assert graph.operators(out.onnx)["DynamicQuantizeLinear"] == 8
    assert changed.details["refused_static"] == [{"static": 10, "selection": 0.80}, {"static": 5, "selection": 0.85}]
    assert changed.details["selection_after"] == 0.90


def test_an_activation_whose_range_is_wrong_stays_dynamic(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, int8, context = exported
    honest, wrong = ranges.extremes, "/bert/encoder/layer.0/attention/output/LayerNorm/LayerNormalization_output_0"

    def narrow(probe: Any, context: Context) -> dict[str, forms.Range]:
        found = honest(probe, context)
        return {name: (low / 50, high / 50) if name == wrong else (low, high) for name, (low, high) in found.items()}

    rows = predict(int8.path, "cpu", context.selection, context.task.max_length, 1, 1, context.progress)

    def near(logits: NDArray[np.float32]) -> float:
        return 1 - float(np.abs(logits - rows).mean() / np.abs(rows).mean())

    judged = replace(context, select=near)
    _, before = build(with_static(max_drop_pp=4), int8, tmp_path / "right", judged)
    assert before.details["activations"]["static"] == 10, "with right ranges all of them hold"
    monkeypatch.setattr(ranges, "extremes", narrow)
    _, changed = build(with_static(max_drop_pp=4), int8, tmp_path / "wrong", judged)
    assert wrong in changed.details["activations"]["stayed_dynamic"]
    assert changed.details["activations"]["static"] == 5
    assert changed.details["refused_static"][0]["selection"] < 0.96 <= changed.details["selection_after"]


def test_where_no_fixed_range_holds_the_graph_stays_dynamic_and_says_so(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    _, int8, context = exported
    given = iter([0.90, 0.90, 0.80, 0.80, 0.80, 0.80])
    out, changed = build(with_static(), int8, tmp_path / "out", replace(context, select=lambda _: next(given)))
    assert changed.details["left_out"] == ["static-ranges"]
    assert [trial["static"] for trial in changed.details["refused_static"]] == [10, 5, 2, 1]
    assert changed.details["activations"]["static"] == 0
    assert graph.operators(out.onnx)["DynamicQuantizeLinear"] == 10
    assert changed.details["selection_after"] == 0.90


def test_a_float_graph_has_no_activations_to_fix(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="forms: static-ranges found nothing to change"):
        build(with_static(), exported[0], tmp_path / "out", exported[2])


@pytest.mark.parametrize(
    ("verdict", "kept"),
    [
        ("slower", True),
        pytest.param("tie", False, marks=pytest.mark.full),
        pytest.param("unproven", False, marks=pytest.mark.full),
    ],
)
def test_tuning_keeps_fixed_ranges_only_where_the_graph_without_them_was_slower(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, kept: bool
) -> None:
    def told(*arguments: Any) -> dict[str, LatencyResult]:
        return {
            name: replace(result, verdict=verdict if name == "without" else "tie") for name, result in measure_latency(*arguments).items()
        }

    monkeypatch.setattr(optimize_graph, "measure_latency", told)
    stage = OptimizeGraph(forms=("static-ranges",), tune=True, tune_seconds=0, max_drop_pp=100)
    out, changed = build(stage, exported[1], tmp_path / "out", exported[2])
    assert ("static-ranges" in changed.details["forms"]) is kept
    assert changed.details["activations"]["static"] == (10 if kept else 0)
    assert ("DynamicQuantizeLinear" in graph.operators(out.onnx)) is not kept
    assert changed.details["trials"][-1]["verdict"] == verdict


def test_the_file_asks_for_int32_where_the_recipe_does_and_everything_that_feeds_it_copes(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    parent, _, context = exported
    stage = OptimizeGraph(inputs="int32")
    out, changed = build(stage, parent, tmp_path / "out", context)
    assert changed.details["forms"]["int32-inputs"] == 3
    assert set(calibration.input_types(out.onnx).values()) == {"int32"}
    graph.check(out.onnx, like=parent.onnx, inputs=stage.integer_inputs())
    with pytest.raises(StageError, match=r"input input_ids int32, .*the parent has input input_ids int64"):
        graph.check(out.onnx, like=parent.onnx)
    with pytest.raises(StageError, match="its int64 inputs were to become int32"):
        graph.check(parent.onnx, like=parent.onnx, inputs="int32")
    wide, narrow = (
        predict(one.path, "cpu", context.selection, context.task.max_length, 4, 1, context.progress)
        for one in (build(OptimizeGraph(), parent, tmp_path / "wide", context)[0], out)
    )
    assert np.array_equal(wide, narrow)
    static, _ = build(QuantizeStatic(), out, tmp_path / "static", context)
    assert set(calibration.input_types(static.onnx).values()) == {"int32"}
    behind, _ = build(
        with_static(inputs="int32", max_drop_pp=100), build(QuantizeDynamic(), parent, tmp_path / "d", context)[0], tmp_path / "b", context
    )
    assert set(calibration.input_types(behind.onnx).values()) == {"int32"}


def test_int64_inputs_are_left_as_they_are(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    narrow, _ = build(OptimizeGraph(inputs="int32"), exported[0], tmp_path / "narrow", exported[2])
    assert OptimizeGraph().integer_inputs() is None
    again, _ = build(OptimizeGraph(), narrow, tmp_path / "again", exported[2])
    graph.check(again.onnx, like=narrow.onnx)
