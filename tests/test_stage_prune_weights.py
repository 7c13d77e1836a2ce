from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn import family as families
from onnxsqueeze.stages.prune_weights import PruneWeights

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16}


def shares_of_zeros(folder: Path) -> dict[str, float]:
    """Name of each layer matrix and embedding → its share of zeros in the written file."""
    model, family = checkpoint.load(folder, toy_task())
    names = {**families.linear_weights(model, family), **families.embedding_weights(model, family)}
    tensors = load_file(folder / "model.safetensors")
    return {name: float((tensors[name] == 0).float().mean()) for name in names}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_written_file_has_the_asked_share_of_zeros_and_reloads(tmp_path: Path, name: FamilyName, sparsity: float) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    out, changed = run_stage(PruneWeights(sparsity=sparsity, **QUICK), parent, tmp_path)
    _, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    model, family = checkpoint.load(out, toy_task())
    linear = [m.weight.detach() for m in families.layers(model, family).modules() if isinstance(m, torch.nn.Linear)]
    zeros, weights = sum(int((w == 0).sum()) for w in linear), sum(w.numel() for w in linear)
    assert zeros / weights == pytest.approx(sparsity, abs=0.001)
    assert changed.count == changed.details["zeros"] == zeros
    assert changed.details["weights"] == weights
    assert all(share < 0.1 for key, share in shares_of_zeros(out).items() if "embeddings" in key), "embeddings are left alone"


def test_layer_scope_prunes_every_matrix_alike_and_global_scope_does_not(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=1)
    shares = {}
    for scope in ("global", "layer"):
        out, _ = run_stage(PruneWeights(sparsity=0.75, scope=scope, **QUICK), parent, tmp_path / scope)
        shares[scope] = [share for key, share in shares_of_zeros(out).items() if "embeddings" not in key]
    assert shares["layer"] == pytest.approx([0.75] * 6, abs=0.001)
    assert max(shares["global"]) - min(shares["global"]) > 0.002


def test_embeddings_are_pruned_when_asked(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "distilbert")
    out, _ = run_stage(PruneWeights(sparsity=0.6, scope="layer", embeddings=True, **QUICK), parent, tmp_path)
    assert shares_of_zeros(out)["distilbert.embeddings.word_embeddings.weight"] == pytest.approx(0.6, abs=0.001)


def test_an_epoch_before_the_final_sparsity_is_never_kept_however_good(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    scores = iter([1.0, 0.9, 0.2, 0.1])
    context = replace(toy_context(tmp_path), select=lambda _: next(scores))
    stage = PruneWeights(sparsity=0.8, epochs=4, batch_size=16, recovery=0.5)
    _, changed = run_stage(stage, parent, tmp_path / "run", context=context)
    assert changed.details["best_epoch"] == 2
    assert changed.details["sparsity"] == pytest.approx(0.8, abs=0.001)


def test_without_recovery_only_the_last_epoch_can_be_kept(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    scores = iter([1.0, 0.9, 0.2])
    context = replace(toy_context(tmp_path), select=lambda _: next(scores))
    _, changed = run_stage(PruneWeights(sparsity=0.8, epochs=3, batch_size=16, recovery=0), parent, tmp_path / "run", context=context)
    assert changed.details["best_epoch"] == 3
    assert changed.details["sparsity"] == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_training_of_very_few_steps_still_reaches_the_sparsity(tmp_path: Path, rows: int) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    stage = PruneWeights(sparsity=0.7, epochs=1, batch_size=2)
    _, changed = run_stage(stage, parent, tmp_path, context=toy_context(tmp_path, rows=rows))
    assert changed.details["sparsity"] == pytest.approx(0.7, abs=0.001)


def test_a_teacher_takes_part_in_the_loss(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    teacher = random_checkpoint(tmp_path / "teacher", "bert", seed=1)
    alone, without = run_stage(PruneWeights(**QUICK), parent, tmp_path / "alone")
    taught, with_ = run_stage(PruneWeights(**QUICK), parent, tmp_path / "taught", teacher=teacher)
    assert (without.details["with_teacher"], with_.details["with_teacher"]) == (False, True)
    assert (alone / "model.safetensors").read_bytes() != (taught / "model.safetensors").read_bytes()


def test_a_teacher_with_another_tokenizer_takes_part(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    teacher = random_checkpoint(tmp_path / "teacher", "roberta")
    _, changed = run_stage(PruneWeights(**QUICK), parent, tmp_path, teacher=teacher)
    assert changed.details["with_teacher"]


def test_pruning_twice_counts_only_what_the_second_added(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    half, first = run_stage(PruneWeights(sparsity=0.5, **QUICK), parent, tmp_path / "half")
    _, second = run_stage(PruneWeights(sparsity=0.75, **QUICK), half, tmp_path / "more")
    assert first.count + second.count == second.details["zeros"]
    with pytest.raises(StageError, match=r"50\.0% of the parent's weights are zero already"):
        run_stage(PruneWeights(sparsity=0.5, **QUICK), half, tmp_path / "again")


def test_pruning_embeddings_that_are_frozen_is_refused() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        PruneWeights(embeddings=True, freeze_embeddings=True)
