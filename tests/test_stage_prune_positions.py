from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from crossed import first
from exports import build
from models import FAMILIES, FamilyName, artifact, random_checkpoint, run_stage, toy_context
from onnxsqueeze import prepare
from onnxsqueeze.errors import ModelError, RecipeError, StageError
from onnxsqueeze.nn import batches, checkpoint, training
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.prune_positions import PrunePositions


@first("name", FAMILIES)
def test_rows_of_the_task_get_the_same_logits_bit_for_bit_and_the_file_is_smaller_by_the_table(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    context = toy_context(tmp_path, pairs=True)
    out, changed = run_stage(PrunePositions(), parent, tmp_path, context=context)
    assert (changed.count, changed.details) == (160 - 32, {"positions": 32, "positions_before": 160})
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    both = []
    for folder in (parent, out):
        loaded, family = checkpoint.load(folder, context.task)
        assert family.max_tokens(loaded.config) == (160 if folder == parent else 32)
        in_torch = training.predict(loaded, family, batches.encode(folder, context.train.rows, 32))
        exported, _ = build(Export(kind="export"), artifact(folder), tmp_path / f"{folder.name}-onnx", context)
        in_onnx = np.concatenate(calibration.logits(exported.onnx, list(calibration.feeds(exported.onnx, context, 64)), 1))
        both.append((in_torch, in_onnx, exported.onnx.stat().st_size))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    np.testing.assert_array_equal(both[0][1], both[1][1])
    width = model.get_submodule(f"{family.encoder}.{family.positions}").weight.shape[1]
    assert 0 <= both[0][2] - both[1][2] - 4 * width * (160 - 32) < 10_000, "position ids may be constants of the file, too"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 32


def test_a_plain_encoder_with_positions_among_its_weights_is_cut_above_the_first_finetune(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=False)
    weights = load_file(parent / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(160)[None]  # as older versions of transformers wrote them
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    out, _ = run_stage(PrunePositions(length=100), parent, tmp_path, context=toy_context(tmp_path))
    left = load_file(out / "model.safetensors")
    assert left["embeddings.position_embeddings.weight"].equal(weights["embeddings.position_embeddings.weight"][:100])
    assert "embeddings.position_ids" not in left


def test_what_it_cannot_cut_is_an_error(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "roberta")
    context = toy_context(tmp_path)
    with pytest.raises(StageError, match="must be at least 32, as long as the task's rows may be, got 20"):
        run_stage(PrunePositions(length=20), parent, tmp_path / "short", context=context)
    once, _ = run_stage(PrunePositions(length=40), parent, tmp_path / "once", context=context)
    with pytest.raises(ModelError, match="has positions for 40 tokens, and 40 are to stay"):
        run_stage(PrunePositions(length=40), once, tmp_path / "twice", context=context)
    assert "must be below 160" in str(PrunePositions(length=160).misfit(checkpoint.read_config(parent)))
    assert PrunePositions(length=159).misfit(checkpoint.read_config(parent)) is None


def test_a_shape_that_is_longer_than_it_leaves_is_refused_before_anything_runs(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "model", "bert", head=False)
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        "schema: 1\nname: short\ntask: toy\nmodel: model\nstages: [{kind: finetune}, {kind: prune-positions, length: 64}]\n"
        "targets: [{name: small, stages: [{kind: export}]}]\nmeasure: {sequence: 64}\n"
    )
    prepare.prepare(prepare.Request(recipe, model=str(tmp_path / "model")))
    with pytest.raises(RecipeError, match=r"measure.sequence: a model behind prune-positions reads at most 64 tokens, got 65"):
        prepare.prepare(prepare.Request(recipe, model=str(tmp_path / "model"), overrides=["measure.sequence=65"]))
