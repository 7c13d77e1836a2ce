from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exports import build, export
from models import artifact, random_checkpoint, toy_context
from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import EXTERNAL_DATA_FILE
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages.export import Export

STAGES = """
import sys
from pathlib import Path
from typing import Any
from exports import build, export
from onnxsqueeze.stages.float16 import Float16
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_inc import QuantizeInc
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.stages.quantize_weights import QuantizeWeights

root = Path(sys.argv[1])
parent, context = export(root, "bert")
stages = [QuantizeDynamic(kind="quantize-dynamic"), QuantizeStatic(kind="quantize-static"), QuantizeWeights(kind="quantize-weights"), Float16(kind="float16")]
if QuantizeInc(kind="quantize-inc").unavailable() is None:
    stages += [QuantizeInc(kind="quantize-inc", id=approach, approach=approach) for approach in ("dynamic", "static")]
    stages.append(QuantizeInc(kind="quantize-inc", id="searched", approach="static", smooth=0.5, tune="bayesian", max_drop_pp=100))
for stage in stages:
    build(stage, parent, root / stage.name, context)
"""


@pytest.mark.full
def test_every_stage_writes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "src")]), "OMP_NUM_THREADS": "1"}
    runs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", STAGES, str(tmp_path / seed)]
        runs.append(
            subprocess.Popen(command, env={**environment, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    for run in runs:
        output, _ = run.communicate()
        assert (run.returncode, output) == (0, b"")
    files = [{file.relative_to(tmp_path / seed): file.read_bytes() for file in (tmp_path / seed).rglob("*.onnx")} for seed in ("1", "2")]
    assert len(files[0]) == (8 if importlib.util.find_spec("neural_compressor") else 5)
    assert [name for name in files[0] if files[0][name] != files[1].get(name)] == []
    for content in files[0].values():
        assert str(tmp_path).encode() not in content


def test_weights_above_the_threshold_lie_beside_the_graph_and_the_model_still_runs(tmp_path: Path) -> None:
    parent, _ = export(tmp_path, "bert")
    folder = tmp_path / "external"
    folder.mkdir()
    graph.save(graph.load(parent.onnx), folder, external_above_bytes=10_000)
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", EXTERNAL_DATA_FILE]
    assert (folder / "model.onnx").stat().st_size < parent.onnx.stat().st_size / 2
    graph.check(folder / "model.onnx", like=parent.onnx)
    assert weights.by_class(folder / "model.onnx") == weights.by_class(parent.onnx)
    assert graph.operators(folder / "model.onnx") == graph.operators(parent.onnx)


def test_weights_are_told_apart_by_what_they_do(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = random_checkpoint(tmp_path / "model", "bert")
    random = np.random.default_rng(0)  # all different: the exporter stores equal tensors once
    stored = {name: random.normal(size=v.shape).astype(np.float32) for name, v in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    exported, _ = build(Export(kind="export"), artifact(folder), tmp_path / "fp32", toy_context(tmp_path))

    def size(*words: str) -> int:
        return sum(v.size for name, v in stored.items() if any(word in name for word in words))

    norms = size("LayerNorm")
    attention = size(".attention.") - size("attention.output.LayerNorm")
    expected = {
        "embedding": size("embeddings.") - size("embeddings.LayerNorm"),
        "attention": attention,
        "feed_forward": size("encoder.") - size(".attention.") - size("0.output.LayerNorm", "1.output.LayerNorm"),
        "head": size("pooler", "classifier"),
        "norm": norms,
    }
    found = {w.class_: w.n for w in weights.by_class(exported.onnx) if w.dtype == "float32" and w.class_ != "other"}
    assert found == expected
    assert sum(found.values()) == sum(v.size for v in stored.values())


def one_node(node: onnx.NodeProto, tensors: dict[str, NDArray[Any]], folder: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"], "/encoder/layer.0/attention/self/query/MatMul")
    inner = helper.make_graph([node, multiply], "g", [x], [y], [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    return graph.save(helper.make_model(inner, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder)


def test_zeros_are_counted_relative_to_the_zero_point(tmp_path: Path) -> None:
    q = np.array([[128, 0], [3, 7], [128, 7], [1, 2]], np.uint8)
    tensors: dict[str, NDArray[Any]] = {"q": q, "s": np.array([0.5, 0.25], np.float32), "z": np.array([128, 7], np.uint8)}
    path = one_node(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1), tensors, tmp_path)
    found = {(w.class_, w.dtype): (w.n, w.zeros, w.bytes) for w in weights.by_class(path)}
    assert found == {("attention", "uint8"): (8, 4, 8), ("other", "uint8"): (2, 0, 2), ("other", "float32"): (2, 0, 8)}


def test_written_files_hold_no_notes_no_paths_and_nothing_unused(tmp_path: Path) -> None:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["w"], doc_string="/home/somebody/model.py(12): forward")
    tensors: dict[str, NDArray[Any]] = {"q": np.ones((4, 2), np.int8), "s": np.array(0.5, np.float32), "unused": np.ones(3, np.float32)}
    path = one_node(node, tensors, tmp_path)
    assert b"somebody" not in path.read_bytes()
    assert b"unused" not in path.read_bytes()
    assert graph.load(path).producer_name == "onnxsqueeze"


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    parent, _ = export(tmp_path, "bert")
    graph.check(parent.onnx, like=parent.onnx)

    def damaged(name: str) -> tuple[onnx.ModelProto, Path]:
        (tmp_path / name).mkdir()
        return graph.load(parent.onnx), tmp_path / name

    model, folder = damaged("renamed")
    model.graph.output[0].name = "scores"
    next(node for node in model.graph.node if "logits" in node.output).output[0] = "scores"
    with pytest.raises(StageError, match=r"output scores float32, the parent has .*output logits float32"):
        graph.check(graph.save(model, folder), like=parent.onnx)
    model, folder = damaged("unknown")
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmin"
    with pytest.raises(StageError, match="Softmin"):
        graph.check(graph.save(model, folder))
    model, folder = damaged("contributed")
    node = next(node for node in model.graph.node if node.op_type == "Erf")
    node.op_type, node.domain = "NoSuchOperator", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(StageError, match=r"cannot load it: .* model\.onnx failed:") as failure:
        graph.check(graph.save(model, folder))
    assert str(tmp_path) not in str(failure.value), "messages go into records, which name no machine"
    (tmp_path / "half").mkdir()
    half = tmp_path / "half" / "model.onnx"
    half.write_bytes(parent.onnx.read_bytes()[:5000])
    with pytest.raises(StageError, match="not valid ONNX"):
        graph.check(half)
