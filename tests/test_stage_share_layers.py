"""share-layers: each layer once in the checkpoint and once in the .onnx, however often it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from safetensors.torch import load_file

from crossed import first
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint, structure
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.prune_weights import PruneWeights
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.share_layers import ShareLayers

QUICK = ShareLayers(epochs=1, batch_size=16, learning_rate=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_is_stored_once_and_runs_in_all_its_places(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, layers=4)
    out, changed = run_stage(QUICK, parent, tmp_path, teacher=parent)
    model, family = checkpoint.load(out, toy_task())
    every = families.layers(model, family)

    assert structure.of(model, family).shared == (0, 0, 2, 2)
    assert every[0] is every[1]
    assert every[2] is every[3]
    one_layer = sum(p.numel() for p in every[0].parameters())
    assert changed.count == 2 * one_layer
    stored = load_file(out / "model.safetensors")
    assert not any(f"{family.layers}.1." in key or f"{family.layers}.3." in key for key in stored)
    rows = encode(parent, toy_context(tmp_path / "rows").train.rows, 32)
    twice, _ = checkpoint.load(out, toy_task())
    assert np.array_equal(predict(model, family, rows), predict(twice, family, rows))


@first("name", FAMILIES)
def test_the_onnx_file_holds_each_shared_tensor_once_in_float_and_in_int8(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, layers=4)
    out, _ = run_stage(QUICK, parent, tmp_path, teacher=parent)
    exported, _ = run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    quantized, _ = run_stage(QuantizeDynamic(), exported, tmp_path / "int8")
    model, family = checkpoint.load(out, toy_task())
    matrices = len(families.linear_weights(model, family))
    for folder in (exported, quantized):
        tensors = [numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer]
        inner = [t for t in tensors if t.ndim == 2 and set(t.shape) <= {32, 128} and t.size >= 1024]
        heads = sum(
            m.weight.shape == (32, 32) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and family.layers not in n
        )
        assert len(inner) == matrices + heads == 12 + heads
    whole, _ = run_stage(Export(), parent, tmp_path / "whole", context=toy_context(tmp_path / "whole"))
    layer_bytes = 4 * sum(p.numel() for p in families.layers(model, family)[0].parameters())
    saved = (whole / "model.onnx").stat().st_size - (exported / "model.onnx").stat().st_size
    assert saved == pytest.approx(2 * layer_bytes, rel=0.1)


def test_orders_and_starts(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4)
    shared, kept = {}, {}
    for order in ("sequence", "cycle"):
        stage = QUICK.model_copy(update={"order": order, "start": "even"})
        _, changed = run_stage(stage, parent, tmp_path / order)
        shared[order], kept[order] = changed.details["shared"], changed.details["kept"]

    assert shared == {"sequence": [0, 0, 2, 2], "cycle": [0, 1, 0, 1]}
    assert kept["cycle"] == [1, 3]


def test_what_follows_knows_that_layers_are_shared(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4)
    once, _ = run_stage(QUICK, parent, tmp_path / "shared", teacher=parent)
    sparse, changed = run_stage(PruneWeights(epochs=1, batch_size=16), once, tmp_path / "sparse", teacher=parent)
    student, _ = run_stage(Distill(layers=(1, 2, 3), epochs=1, batch_size=16), once, tmp_path / "student", teacher=parent)
    model, family = checkpoint.load(student, toy_task())

    assert changed.details["weights"] == 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert structure.of(checkpoint.load(sparse, toy_task())[0], family).shared == (0, 0, 2, 2)
    assert structure.of(model, family).shared == (0, 1, 1)
    with pytest.raises(StageError, match="prune-structure: the parent has layers that stand in several places"):
        run_stage(PruneStructure(epochs=1, batch_size=16, multiple_of=8), once, tmp_path / "cut")


def test_as_many_different_layers_as_there_are_share_nothing(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=2)
    with pytest.raises(StageError, match="distinct: the model has 2 layers"):
        run_stage(QUICK, parent, tmp_path)
    with pytest.raises(ValidationError):
        ShareLayers.model_validate({"kind": "share-layers", "distinct": 0})
