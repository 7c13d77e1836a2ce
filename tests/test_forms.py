"""Graph forms: every family, in float32 and with integers; what each may do to the outputs, and that it is less work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from crossed import crossed, first
from exports import build, export
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import forms, graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.forms import edit
from onnxsqueeze.stage import Context
from onnxsqueeze.stages import calibration, ranges
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_inc import QuantizeInc

NAMES = [form.name for form in forms.FORMS]


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Context]:
    """(float32, dynamic int8, context) of a random two-layer model."""
    family: FamilyName = request.param
    folder = tmp_path_factory.mktemp(family)
    parent, context = export(folder, family)
    return parent, build(QuantizeDynamic(), parent, folder / "int8", context)[0], context


@cache
def shaped(file: Path) -> onnx.ModelProto:
    return forms.with_shapes(graph.load(file))


def rewritten(
    parent: Artifact, folder: Path, names: Sequence[str], known: Mapping[str, forms.Range] | None = None
) -> tuple[Path, dict[str, int]]:
    model = forms.opened(shaped(parent.onnx))
    counts: dict[str, int] = {}
    for form in forms.FORMS:
        if form.name in names:
            forms.note_ranges(model, known or {})
            counts[form.name] = form.apply(model)
    folder.mkdir()
    copy_side_files(parent.path, folder)
    return graph.save(forms.write(model), folder), counts


def difference(one: Path, other: Path, context: Context, *, optimized: bool) -> tuple[float, float]:
    """(largest difference, largest logit) over three shapes, one of them padded."""
    batches = calibration.shapes(one.parent, context)
    a, b = (calibration.logits(path, batches, 1, optimized=optimized) for path in (one, other))
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True)), max(float(np.abs(x).max()) for x in a)


def measured(model: Path, folder: Path, context: Context) -> dict[str, forms.Range]:
    """The ranges of what ``model`` quantizes at run time."""
    folder.mkdir()
    copy_side_files(model.parent, folder)
    return {found.name: found.range for found in ranges.measured(model, folder, context)}


@crossed("exported, name", FAMILIES, NAMES, through=["exported"])
def test_a_form_does_no_more_than_it_says(exported: tuple[Artifact, Artifact, Context], tmp_path: Path, name: str) -> None:
    form = next(form for form in forms.FORMS if form.name == name)
    before = ["constant-shapes", "compact-mask", "folded-scale"][: NAMES.index(name)]  # what the others build on
    for parent, effect in ((exported[0], form.effect), (exported[1], form.quantized)):
        base, _ = rewritten(parent, tmp_path / f"{parent.path.name}-base", before)
        known = measured(base, tmp_path / f"{parent.path.name}-probe", exported[2])
        written, counts = rewritten(parent, tmp_path / f"{parent.path.name}-{name}", [*before, name], known)
        if effect == "finds nothing":
            assert (counts[name], known) == (0, {}), "a float graph quantizes nothing"
        else:
            assert counts[name] or name == "compact-mask", "ELECTRA's export never spreads its mask"
        graph.check(written, like=parent.onnx, inputs="int32" if name == "int32-inputs" else None)
        off, scale = difference(base, written, exported[2], optimized=False)
        limit = {"float noise": 2.0**-16 * scale, "other rounding": 0.1 * scale, "other quantization": 0.1 * scale}.get(effect, 0.0)
        if parent is exported[1] and effect == "float noise":
            limit = 0.1 * scale  # noise can turn a rounding
        assert off <= limit


def test_every_family_becomes_less_work_and_says_the_same(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    parent, _, context = exported
    written, counts = rewritten(parent, tmp_path / "all", [name for name in NAMES if name != "attention-operator"])
    off, scale = difference(parent.onnx, written, context, optimized=True)
    assert off <= 2.0**-16 * scale
    assert counts["first-token"] > 20
    assert counts["sequence-first"] == 2
    assert counts["unfused-residual"] == 5, "two a layer, one behind the embeddings"
    assert counts["folded-scale"] in (2, 4), "one of the scores, or one of query and one of key"
    found = graph.operators(written)
    assert found["com.microsoft.FusedMatMul"] == 4, "two an attention"
    assert found["Transpose"] < graph.operators(parent.onnx)["Transpose"]
    assert "Shape" not in found or found["Shape"] < graph.operators(parent.onnx)["Shape"] / 2
    assert sum(found.values()) < sum(graph.operators(parent.onnx).values()) / 1.5


def test_the_last_layer_computes_one_token_and_the_others_all(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    parent, int8, context = exported
    for one in (parent, int8):
        written, counts = rewritten(one, tmp_path / one.path.name, ["constant-shapes", "compact-mask", "first-token"])
        assert counts["first-token"] > 20
        rows = _rows_of_products(written, context)
        full = calibration.shapes(parent.path, context)[2]["input_ids"].size
        first = len(calibration.shapes(parent.path, context)[2]["input_ids"])
        # of twelve products, six of the first layer and the last one's keys and values read every token
        assert sorted(rows)[-8:] == [full] * 8
        assert sorted(rows)[:4] == [first] * 4


def _rows_of_products(path: Path, context: Context) -> list[int]:
    """Rows that each encoder product with a constant matrix reads, for the third shape: read off its output."""
    model = graph.load(path)
    initial = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "MatMulInteger") and n.input[1] in initial and "layer" in n.name]
    del model.graph.output[:]
    kinds = {"MatMul": TensorProto.FLOAT, "MatMulInteger": TensorProto.INT32}
    model.graph.output.extend(helper.make_tensor_value_info(n.output[0], kinds[n.op_type], None) for n in products)
    probe = path.parent / "probe.onnx"
    onnx.save(model, probe)
    names = list(calibration.input_types(probe))
    batch = calibration.shapes(path.parent, context)[2]
    outputs: list[NDArray[np.float32]] = calibration.session(probe, 1).run(None, {name: batch[name] for name in names})
    return [int(np.prod(output.shape[:-1])) for output in outputs]


def test_a_head_that_reads_every_token_keeps_the_last_layer_whole(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    model = graph.load(exported[0].onnx)
    gather = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0].endswith("LayerNormalization_output_0"))
    mean = helper.make_node("ReduceMean", [gather.input[0], "axes_of_tokens"], ["mean"], keepdims=0, name="mean")
    both = helper.make_node("Add", [gather.output[0], "mean"], ["both"], name="both")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes_of_tokens"))
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == gather.output[0]:
                node.input[i] = "both"
    at = list(model.graph.node).index(gather) + 1
    model.graph.node.insert(at, both)
    model.graph.node.insert(at, mean)
    (tmp_path / "mean").mkdir()
    copy_side_files(exported[0].path, tmp_path / "mean")
    parent = Artifact(tmp_path / "mean", "onnx", "0" * 64, "0" * 64)
    graph.save(model, parent.path)
    written, counts = rewritten(parent, tmp_path / "all", NAMES)
    assert counts["first-token"] == 0
    off, scale = difference(parent.onnx, written, exported[2], optimized=True)
    assert off <= 2.0**-16 * scale


@first("exported", FAMILIES, through=True)
def test_a_graph_can_be_opened_again_after_forms_have_changed_it(exported: tuple[Artifact, Artifact, Context]) -> None:
    for parent in exported[:2]:
        one = forms.with_shapes(graph.load(parent.onnx))
        before = one.SerializeToString(deterministic=True)
        for form in forms.FORMS:
            model = forms.opened(one)
            form.apply(model)
            forms.write(model)
        assert one.SerializeToString(deterministic=True) == before


def test_writing_a_graph_that_no_form_touched_changes_no_bit(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    for parent in exported[:2]:
        written, _ = rewritten(parent, tmp_path / parent.path.name, [])
        assert difference(parent.onnx, written, exported[2], optimized=False)[0] == 0


def test_the_attention_operator_takes_the_place_of_everything_between_products_and_leaves_no_heads_to_flip(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    parent, _, context = exported
    written, counts = rewritten(parent, tmp_path / "all", NAMES)
    found = graph.operators(written)
    assert (counts["attention-operator"], counts["sequence-first"]) == (2, 0)
    assert found["Attention"] == 2
    spread = [node for node in graph.load(written).graph.node if node.output[0].endswith("_rows")]
    assert len(spread) == 1, "a row of the mask for each query, for all layers but the last, which has one query"
    assert not {"Softmax", "Transpose", "com.microsoft.FusedMatMul"} & set(found)
    off, scale = difference(parent.onnx, written, context, optimized=True)
    assert off <= 2.0**-16 * scale


def test_a_residual_is_subtracted_where_weights_can_take_the_sign_and_no_bit_changes(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    for parent in exported[:2]:
        written, counts = rewritten(parent, tmp_path / parent.path.name, ["unfused-residual"])
        before, after = graph.operators(parent.onnx), graph.operators(written)
        assert counts["unfused-residual"] == 5
        assert after["Sub"] - before.get("Sub", 0) == 4, "two a layer"
        assert after["Sum"] == 1, "the embeddings"
        assert difference(parent.onnx, written, exported[2], optimized=False)[0] == 0


@first("exported", FAMILIES, through=True)
def test_an_attention_of_onnxs_own_is_read_and_quantized_like_any_other_node(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    parent, _, context = exported
    (tmp_path / "float").mkdir()
    written, _ = rewritten(parent, tmp_path / "float" / "all", NAMES)
    again, counts = rewritten(artifact(written.parent, "onnx"), tmp_path / "again", NAMES)
    assert difference(written, again, context, optimized=False)[0] == 0
    assert not any(counts[name] for name in ("folded-scale", "attention-operator", "sequence-first", "unfused-residual"))
    for stage in (QuantizeDynamic(), QuantizeInc()):
        integers, _ = build(stage, artifact(written.parent, "onnx"), tmp_path / stage.name, context)
        assert graph.operators(integers.onnx)["Attention"] == 2
        off, scale = difference(written, integers.onnx, context, optimized=True)
        assert off <= 0.1 * scale


def test_neural_compressors_graphs_get_the_same_forms(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    parent, int8, context = exported
    inc, _ = build(QuantizeInc(), parent, tmp_path / "inc", context)
    found = [rewritten(one, tmp_path / f"{one.path.name}-all", NAMES)[1] for one in (inc, int8)]
    assert {name for name, count in found[0].items() if count} == {name for name, count in found[1].items() if count}


def test_a_graph_of_an_older_opset_stays_in_it(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    model = graph.load(exported[0].onnx)
    next(entry for entry in model.opset_import if not entry.domain).version = 17
    (tmp_path / "old").mkdir()
    copy_side_files(exported[0].path, tmp_path / "old")
    old = graph.save(model, tmp_path / "old")
    written, counts = rewritten(artifact(old.parent, "onnx"), tmp_path / "all", NAMES)
    assert (counts["attention-operator"], counts["sequence-first"]) == (0, 2)
    assert {entry.version for entry in graph.load(written).opset_import if not entry.domain} == {17}


def stock_operators(path: Path) -> Counter[str]:
    """What a session with default optimizations makes of the file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in graph.load(Path(options.optimized_model_filepath)).graph.node)


@pytest.mark.parametrize("stage", [QuantizeDynamic(), QuantizeInc()], ids=lambda stage: str(stage.name))
def test_with_fixed_ranges_each_integer_product_scale_and_bias_is_still_one_kernel(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path, stage: QuantizeDynamic | QuantizeInc
) -> None:
    parent, context = exported[0], exported[2]
    int8, _ = build(stage, parent, tmp_path / "int8", context)
    base, _ = rewritten(int8, tmp_path / "base", NAMES)
    before, stock = graph.operators(base), stock_operators(base)
    assert not stock["MatMulInteger"], "the session fuses dynamic ones"
    written, counts = rewritten(int8, tmp_path / "fixed", NAMES, measured(base, tmp_path / "probe", context))
    assert counts["static-ranges"] == before["DynamicQuantizeLinear"] > 9
    found = stock_operators(written)
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMul", "Gemm"} & set(found)
    assert found["MatMulIntegerToFloat"] == before["MatMulInteger"] == stock["MatMulIntegerToFloat"] + stock["DynamicQuantizeMatMul"]
    assert (found["Add"], found["Cast"], found["Gelu"]) == (stock["Add"], stock["Cast"], stock["Gelu"]), "biases are in the kernel"
    made = {name for node in graph.load(written).graph.node if node.op_type == "MatMulIntegerToFloat" for name in node.output}
    assert made < {name for node in graph.load(base).graph.node for name in node.output}, "records name an activation as before"
    assert {output.name for output in graph.load(written).graph.output} == {"logits"}
    off, scale = difference(base, written, context, optimized=True)
    assert 0 < off <= 0.1 * scale


def test_a_row_whose_own_ranges_are_fixed_gets_the_integers_that_it_had(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    _, int8, context = exported
    model, random = graph.load(int8.onnx), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("bias"):  # a fresh model's are zeros, which nobody would miss
            tensor.CopyFrom(numpy_helper.from_array(random.normal(size=tuple(tensor.dims)).astype(np.float32), tensor.name))
    (tmp_path / "biased").mkdir()
    copy_side_files(int8.path, tmp_path / "biased")
    int8 = artifact(graph.save(model, tmp_path / "biased").parent, "onnx")
    names = [name for name in NAMES if name != "static-ranges"]
    base, _ = rewritten(int8, tmp_path / "base", names)
    one = replace(context, train=replace(context.train, rows=context.train.rows[7:8]))
    written, _ = rewritten(int8, tmp_path / "fixed", NAMES, measured(base, tmp_path / "probe", one))
    feeds = list(calibration.feeds(base, one, 1))
    (before,), (after,) = (calibration.logits(path, feeds, 1, optimized=False) for path in (base, written))
    assert float(np.abs(before - after).max()) <= 2.0**-16 * float(np.abs(before).max())


def test_with_fixed_ranges_a_row_gets_the_same_answer_whatever_shares_its_call(
    exported: tuple[Artifact, Artifact, Context], tmp_path: Path
) -> None:
    _, int8, context = exported
    base, _ = rewritten(int8, tmp_path / "base", NAMES)
    written, _ = rewritten(int8, tmp_path / "fixed", NAMES, measured(base, tmp_path / "probe", context))
    alone, together = (list(calibration.feeds(base, context, 32, batch)) for batch in (1, 32))
    moved = {}
    for path in (base, written):
        one, all_ = (np.concatenate(calibration.logits(path, feeds, 1)) for feeds in (alone, together))
        moved[path] = float(np.abs(one - all_).max() / np.abs(all_).max())
    assert moved[written] < 2.0**-10 < moved[base], "what rounds otherwise in a batch is the range"


def test_an_activation_that_something_else_reads_stays_dynamic(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    model = graph.load(exported[1].onnx)
    scale = next(node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear").output[1]
    model.graph.output.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, []))
    (tmp_path / "read").mkdir()
    copy_side_files(exported[1].path, tmp_path / "read")
    parent = artifact(graph.save(model, tmp_path / "read").parent, "onnx")
    written, counts = rewritten(parent, tmp_path / "fixed", ["static-ranges"], measured(parent.onnx, tmp_path / "probe", exported[2]))
    assert graph.operators(written)["DynamicQuantizeLinear"] == 1
    assert counts["static-ranges"] == graph.operators(parent.onnx)["DynamicQuantizeLinear"] - 1


def test_a_file_with_fixed_ranges_can_be_read_again(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    _, int8, context = exported
    base, _ = rewritten(int8, tmp_path / "base", NAMES)
    written, _ = rewritten(int8, tmp_path / "fixed", NAMES, measured(base, tmp_path / "probe", context))
    again, counts = rewritten(artifact(written.parent, "onnx"), tmp_path / "again", NAMES)
    assert difference(written, again, context, optimized=False)[0] == 0
    assert graph.operators(again) == graph.operators(written)
    assert not any(counts[name] for name in ("folded-scale", "attention-operator", "static-ranges", "int32-inputs"))
    read = {value.name: value for node in forms.read(graph.load(written)).graph for value in node.outputs}
    for node in graph.load(written).graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            assert (edit.rank(read[node.output[0]]), str(read[node.output[0]].dtype)) in ((3, "FLOAT"), (2, "FLOAT"))


def test_int32_inputs_need_no_more_casts(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    names = [name for name in NAMES if name != "int32-inputs"]
    for parent in exported[:2]:
        wide, _ = rewritten(parent, tmp_path / f"{parent.path.name}-wide", names)
        narrow, counts = rewritten(parent, tmp_path / f"{parent.path.name}-narrow", NAMES)
        types = calibration.input_types(narrow)
        assert counts["int32-inputs"] == len(types) >= 2
        assert set(types.values()) == {"int32"}
        assert graph.operators(narrow) == graph.operators(wide)
        assert graph.signature(narrow)["logits"] == ("output", "float32")


def test_what_must_have_64_bits_is_cast(exported: tuple[Artifact, Artifact, Context], tmp_path: Path) -> None:
    model = graph.load(exported[0].onnx)
    model.graph.node.insert(0, helper.make_node("Mod", ["input_ids", "modulus"], ["rest"]))
    model.graph.node.insert(1, helper.make_node("Sub", ["input_ids", "rest"], ["whole"]))
    model.graph.node.append(helper.make_node("Add", ["whole", "rest"], ["same_ids"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**40, np.int64), "modulus"))
    model.graph.output.append(helper.make_tensor_value_info("same_ids", TensorProto.INT64, None))
    (tmp_path / "wide").mkdir()
    copy_side_files(exported[0].path, tmp_path / "wide")
    parent = artifact(graph.save(model, tmp_path / "wide").parent, "onnx")
    written, _ = rewritten(parent, tmp_path / "narrow", ["int32-inputs"])
    graph.check(written, like=parent.onnx, inputs="int32")
    assert graph.operators(written)["Cast"] == graph.operators(parent.onnx).get("Cast", 0) + 1
    assert difference(parent.onnx, written, exported[2], optimized=False)[0] == 0
