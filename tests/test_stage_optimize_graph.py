from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from exports import build, export
from models import artifact
from onnxsqueeze import forms, graph, weights
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.recipe import load
from onnxsqueeze.stage import Context
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic

NAMES = [form.name for form in forms.FORMS]
APPLIED = [name for name in NAMES if name != "sequence-first"]  # attention-operator leaves it nothing to do


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Context]:
    folder = tmp_path_factory.mktemp("bert")
    parent, context = export(folder, "bert")
    return parent, build(QuantizeDynamic(), parent, folder / "int8", context)[0], context


def test_the_stage_offers_every_form_that_there_is(tmp_path: Path) -> None:
    assert list(OptimizeGraph(tune=True).wanted()) == NAMES
    assert list(OptimizeGraph().wanted()) == NAMES
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


def test_tuning_keeps_what_no_trial_found_slower_and_records_every_trial(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    stage = OptimizeGraph(tune=True, tune_seconds=0.05, max_drop_pp=100)
    _, changed = build(stage, exported[1], tmp_path / "out", exported[2])
    trials, left_out = changed.details["trials"], changed.details["left_out"]
    rounds = max(trial["round"] for trial in trials)
    first = [trial for trial in trials if trial["round"] == 1]
    assert [trial["forms"] for trial in first][:2] == [NAMES, []]
    tried = [set(NAMES) - set(trial["forms"]) for trial in first[2:]]
    assert tried == [{name} for name in NAMES if name != "sequence-first"], "which has nothing to do beside attention-operator"
    assert len(left_out) in (rounds - 1, rounds), "each round but the last leaves one form out"
    for name in left_out:
        assert any((trial["speedup_ci95"] or [0])[0] > 1 and name not in trial["forms"] for trial in trials)


def test_a_tuned_graph_is_bound_to_machine_and_shape_and_a_named_one_is_not() -> None:
    assert (OptimizeGraph(tune=True).machine_bound(), OptimizeGraph(tune=True).timed()) == (True, True)
    assert (OptimizeGraph().machine_bound(), OptimizeGraph().timed()) == (False, False)
    assert OptimizeGraph(tune=True).refuses("cuda")
    assert OptimizeGraph(tune=True).refuses("cpu") is None
    assert OptimizeGraph().refuses("cuda") is None


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
