from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dequantize import matrices
from exports import build, distance, export
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import EXTERNAL_DATA_FILE
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn import family as families
from onnxsqueeze.stage import Stage
from onnxsqueeze.stages import modules
from onnxsqueeze.stages.float16 import Float16
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.stages.quantize_weights import QuantizeWeights

QUANTIZERS: dict[str, Stage] = {
    "dynamic": QuantizeDynamic(),
    "static": QuantizeStatic(samples=16),
    "qoperator": QuantizeStatic(samples=16, format="qoperator"),
    "weights": QuantizeWeights(block_size=16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_and_table_is_found_under_its_path_also_behind_optimize_graph(tmp_path: Path, family: FamilyName) -> None:
    parent, context = export(tmp_path, family)
    model, described = checkpoint.load(tmp_path / "checkpoint-folder", context.task)
    paths = {
        name.removesuffix(".weight") for name in (*families.linear_weights(model, described), *families.embedding_weights(model, described))
    }
    found = modules.weighted(graph.load(parent.onnx))
    assert paths <= set(found)
    assert all(len(nodes) == 1 for nodes in found.values())
    assert set(found) - paths <= {*described.head, f"{described.encoder}.pooler.dense", f"{described.encoder}.embeddings_project"}
    optimized, _ = build(OptimizeGraph(), parent, tmp_path / "optimized", context)
    assert set(modules.weighted(graph.load(optimized.onnx))) == set(found)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_excluded_modules_keep_their_float_weights_and_the_others_do_not(tmp_path: Path, name: str) -> None:
    parent, context = export(tmp_path, "bert")
    globs = ("bert.encoder.layer.1", "*.layer.0.attention.self.query", "*.position_embeddings", "bert.pooler")
    out, changed = build(QUANTIZERS[name].model_copy(update={"exclude": globs}), parent, tmp_path / "out", context)
    graph.check(out.onnx, like=parent.onnx)
    before, after = modules.weighted(graph.load(parent.onnx)), modules.weighted(graph.load(out.onnx))
    wanted = [
        path
        for path in before
        if ".layer.1." in path or path.endswith(("layer.0.attention.self.query", "position_embeddings", "pooler.dense"))
    ]
    assert changed.details["excluded"] == wanted
    heads = {"classifier"} if name == "weights" else set()
    assert set(after) == {*wanted, *heads}
    original, written = matrices(parent.onnx), matrices(out.onnx)
    for path in wanted:
        one, other = (held[modules.weight_of(nodes[path][0])] for held, nodes in ((written, after), (original, before)))
        np.testing.assert_array_equal(one.T if after[path][0].op_type != before[path][0].op_type else one, other)
    whole, _ = build(QUANTIZERS[name], parent, tmp_path / "whole", context)
    assert out.onnx.stat().st_size > whole.onnx.stat().st_size


def test_what_is_excluded_reads_unrounded_activations(tmp_path: Path) -> None:
    """Query, key and value share an input, which static quantization rounds for those that are left."""
    parent, context = export(tmp_path, "bert")
    out, _ = build(QuantizeStatic(samples=16, exclude=("*.query",)), parent, tmp_path / "out", context)
    nodes = graph.load(out.onnx).graph.node
    maker = {output: node for node in nodes for output in node.output}
    reads = {kind: [maker[n.input[0]].op_type for n in nodes if n.name.endswith(f"{kind}/MatMul")] for kind in ("query", "key")}
    assert reads == {"query": ["LayerNormalization"] * 2, "key": ["DequantizeLinear"] * 2}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_glob_that_matches_nothing_is_an_error_with_the_nearest_path(tmp_path: Path, name: str) -> None:
    parent, context = export(tmp_path, "bert")
    stage = QUANTIZERS[name].model_copy(update={"exclude": ("classifier", "bert.encoder.layer.7")})
    with pytest.raises(
        StageError, match=r"exclude: 'bert.encoder.layer.7' matches no module with float weights; did you mean 'bert.encoder.layer.\d'"
    ):
        build(stage, parent, tmp_path / "out", context)


@pytest.mark.parametrize("name", [*QUANTIZERS, "float16"])
def test_weights_in_a_file_of_their_own_are_quantized_like_those_inside(tmp_path: Path, name: str) -> None:
    """What a model above 2 GB looks like, by a tiny threshold."""
    stage = Float16() if name == "float16" else QUANTIZERS[name]
    parent, context = export(tmp_path, "bert")
    apart = tmp_path / "apart"
    shutil.copytree(parent.path, apart)
    graph.save(graph.load(parent.onnx), apart, external_above_bytes=1000)
    assert (apart / EXTERNAL_DATA_FILE).is_file()
    one, _ = build(stage, parent, tmp_path / "one", context)
    other, _ = build(stage, artifact(apart, "onnx"), tmp_path / "other", context)
    assert one.onnx.read_bytes() == other.onnx.read_bytes()
    assert weights.by_class(one.onnx) == weights.by_class(other.onnx)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_matrix_of_one_value_gives_finite_outputs(tmp_path: Path, name: str, value: float) -> None:
    parent, context = export(tmp_path, "bert")
    flat = tmp_path / "flat"
    shutil.copytree(parent.path, flat)
    model = graph.load(parent.onnx)
    nodes = modules.weighted(model)
    names = {modules.weight_of(nodes[path][0]) for path in ("bert.encoder.layer.0.output.dense", "bert.embeddings.token_type_embeddings")}
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in names):
        tensor.raw_data = np.full(tuple(tensor.dims), value, np.float32).tobytes()
    graph.save(model, flat)
    source = artifact(flat, "onnx")
    out, _ = build(QUANTIZERS[name], source, tmp_path / "out", context)
    assert distance(source, out, context) < 0.6, "finite, and near"
