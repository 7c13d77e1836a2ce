"""pack: a smaller file with the same bits, which a stock session folds into what its parent was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from crossed import crossed
from exports import build
from models import FAMILIES, FamilyName, artifact, random_checkpoint, run_stage, toy_context
from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.entropy import entropy_bytes
from onnxsqueeze.errors import StageError
from onnxsqueeze.packing import files
from onnxsqueeze.stage import Context, Stage
from onnxsqueeze.stages.branch_exits import BranchExits
from onnxsqueeze.stages.early_exit import EarlyExit
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.float16 import Float16
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.pack import Pack
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.stages.quantize_weights import QuantizeWeights


@pytest.fixture(scope="module")
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Context]:
    """`sparse` of each family."""
    return sparse(tmp_path_factory.mktemp(request.param), request.param)


def sparse(folder: Path, name: FamilyName, zeros: float = 0.7) -> tuple[Artifact, Context]:
    """A random model, most of whose weights are zero, as exported, and the context it was exported in."""
    checkpoint = random_checkpoint(folder / "checkpoint", name, hidden=64)
    state = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key, weight in state.items():
        if weight.dim() == 2:
            state[key] = weight * (torch.rand(weight.shape, generator=generator) > zeros)
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    context = toy_context(folder)
    return build(Export(), artifact(checkpoint), folder / "fp32", context)[0], context


def folded(file: Path, target: Path) -> Counter[str]:
    """The operators of what a stock session makes of a file, with those alone that every version of it would run."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for one in graph.graphs(onnx.load(target).graph) for node in one.node)


FORMS: dict[str, list[Stage]] = {
    "float": [],
    "dynamic": [QuantizeDynamic()],
    "dynamic in its best form": [QuantizeDynamic(), OptimizeGraph()],
    "static": [QuantizeStatic()],
    "4-bit weights": [QuantizeWeights(bits=4, block_size=32)],
    "float16": [Float16()],
}


@crossed("every, form", FAMILIES, list(FORMS), through=["every"])
def test_a_session_folds_a_packed_file_into_its_parent(tmp_path: Path, every: tuple[Artifact, Context], form: str) -> None:
    parent, context = every
    for i, stage in enumerate(FORMS[form]):
        parent, _ = build(stage, parent, tmp_path / str(i), context)
    packed, changed = build(Pack(), parent, tmp_path / "packed", context)

    graph.check(packed.onnx, like=parent.onnx)
    assert packed.onnx.stat().st_size == changed.details["packed_bytes"] < changed.details["dense_bytes"] == parent.onnx.stat().st_size
    assert folded(packed.onnx, tmp_path / "b.onnx") == folded(parent.onnx, tmp_path / "a.onnx")
    assert changed.details["packed"] == len(files.stored_bytes(graph.load(packed.onnx))) > 0


def test_counts_are_those_of_the_dense_weights_and_bytes_those_of_the_file(tmp_path: Path) -> None:
    parent, context = sparse(tmp_path, "bert")
    parent, _ = build(QuantizeDynamic(), parent, tmp_path / "int8", context)
    packed, _ = build(Pack(), parent, tmp_path / "packed", context)
    before, after = ({(w.class_, w.dtype): w for w in weights.by_class(one.onnx)} for one in (parent, packed))

    assert {key: (w.n, w.zeros) for key, w in after.items()} == {key: (w.n, w.zeros) for key, w in before.items()}
    assert after["feed_forward", "int8"].bytes < 0.7 * before["feed_forward", "int8"].bytes
    assert sum(w.bytes for w in after.values()) < packed.onnx.stat().st_size
    assert entropy_bytes(packed.onnx) == entropy_bytes(parent.onnx)


def test_the_dense_twin_is_the_parent(tmp_path: Path) -> None:
    parent, context = sparse(tmp_path, "bert")
    packed, _ = build(Pack(dense=True), parent, tmp_path / "packed", context)
    model = graph.load(packed.onnx)
    files.unpack(model)
    stored, again = (
        {t.name: numpy_helper.to_array(t).tobytes() for t in one.graph.initializer} for one in (graph.load(parent.onnx), model)
    )

    assert again == stored
    assert (packed.path / "dense" / "model.onnx").read_bytes() == parent.onnx.read_bytes()


def test_weights_in_branches_are_packed_too(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", "bert", layers=3, hidden=64)
    trained, _ = run_stage(EarlyExit(after=(0,), epochs=1, batch_size=16, learning_rate=1e-3), checkpoint, tmp_path / "exits")
    context = toy_context(tmp_path)
    file, _ = build(Export(), artifact(trained), tmp_path / "fp32", context)
    file, _ = build(QuantizeDynamic(), file, tmp_path / "int8", context)
    file, _ = build(BranchExits(max_drop_pp=100), file, tmp_path / "branched", context)
    model = graph.load(file.onnx)
    for one in graph.graphs(model.graph):  # weights of few bits, so that the small ones get smaller
        for tensor in one.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
                tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) // 32 * 32).astype(np.int8), tensor.name))
    (tmp_path / "few").mkdir()
    graph.save(model, tmp_path / "few")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "few" / name).write_bytes((file.path / name).read_bytes())
    few = artifact(tmp_path / "few", "onnx")
    packed, _ = build(Pack(), few, tmp_path / "packed", context)
    inner = list(graph.graphs(graph.load(packed.onnx).graph))[1:]

    assert any(name.startswith("~") for one in inner for node in one.node for name in node.input)
    assert folded(packed.onnx, tmp_path / "b.onnx") == folded(few.onnx, tmp_path / "a.onnx")
    assert weights.by_class(packed.onnx)[0].n == weights.by_class(few.onnx)[0].n


def test_what_cannot_get_smaller_stays_as_it_is(tmp_path: Path) -> None:
    parent, context = sparse(tmp_path, "bert", zeros=0)
    packed, changed = build(Pack(), parent, tmp_path / "packed", context)

    assert packed.onnx.read_bytes() == parent.onnx.read_bytes()
    assert changed.details["packed"] == 0


def test_an_old_opset_is_named(tmp_path: Path) -> None:
    parent, context = sparse(tmp_path, "bert")
    model: Any = graph.load(parent.onnx)
    model.opset_import[0].version = 17
    (tmp_path / "old").mkdir()
    graph.save(model, tmp_path / "old")
    with pytest.raises(StageError, match="opset 17, packed weights need 18"):
        build(Pack(), artifact(tmp_path / "old", "onnx"), tmp_path / "packed", context)
