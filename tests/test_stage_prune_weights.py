from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from crossed import crossed
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze import weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn import family as families
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.prune_weights import PruneWeights

SIZES = [32 * 32] * 4 + [32 * 128] * 2  # query, key, value, output, in, out of one layer
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16}


def shares_of_zeros(folder: Path) -> dict[str, float]:
    """Name of each layer matrix and embedding → its share of zeros in the written file."""
    model, family = checkpoint.load(folder, toy_task())
    names = {**families.linear_weights(model, family), **families.embedding_weights(model, family)}
    tensors = load_file(folder / "model.safetensors")
    return {name: float((tensors[name] == 0).float().mean()) for name in names}


@crossed("name, sparsity", FAMILIES, [0.5, 0.9])
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


def test_a_scope_says_which_weights_are_compared(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=2)
    tensors = load_file(parent / "model.safetensors")
    for name, tensor in tensors.items():  # the second layer's are larger, and within each layer the query's
        tensors[name] = tensor * (4.0 if "layer.1." in name else 1.0) * (2.0 if "query.weight" in name else 1.0)
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    shares = {}
    for scope in ("global", "layer", "uniform"):
        out, _ = run_stage(PruneWeights(sparsity=0.5, scope=scope, **QUICK), parent, tmp_path / scope)
        found = [share for key, share in shares_of_zeros(out).items() if "embeddings" not in key]
        shares[scope] = (found, [sum(s * n for s, n in zip(found[i : i + 6], SIZES, strict=True)) / sum(SIZES) for i in (0, 6)])

    assert shares["uniform"][0] == pytest.approx([0.5] * 12, abs=0.001)
    assert shares["layer"][1] == pytest.approx([0.5, 0.5], abs=0.001)
    assert shares["layer"][0][0] < 0.4
    assert shares["global"][1][0] > 0.7 > 0.3 > shares["global"][1][1]


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_a_pattern_holds_in_every_row_of_the_written_file_and_of_the_export(tmp_path: Path, pattern: str) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    out, changed = run_stage(PruneWeights(pattern=pattern, **QUICK), parent, tmp_path)
    n, m = int(pattern[0]), int(pattern[2])
    model, family = checkpoint.load(out, toy_task())
    for name in families.linear_weights(model, family):
        assert int((model.get_parameter(name).detach().reshape(-1, m) != 0).sum(1).max()) <= n, name
    assert changed.details["sparsity"] == pytest.approx(1 - n / m)
    exported, _ = run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    counted = [row for row in weights.by_class(exported / "model.onnx") if row.class_ in ("attention", "feed_forward") and row.n > 2_000]
    assert sum(row.zeros for row in counted) == pytest.approx(changed.details["zeros"], abs=2)


def test_movement_prunes_as_much_and_something_else(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    files = []
    for criterion in ("magnitude", "movement"):
        stage = PruneWeights(sparsity=0.8, criterion=criterion, curve="linear", learning_rate=1e-3, **QUICK)
        out, changed = run_stage(stage, parent, tmp_path / criterion, teacher=parent)
        assert changed.details["sparsity"] == pytest.approx(0.8, abs=0.001)
        files.append(load_file(out / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"] == 0)
    assert (files[0] != files[1]).float().mean() > 0.1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pattern": "4:4"}, "4 cannot stay"),
        ({"pattern": "2:4", "sparsity": 0.7}, "leave one out"),
        ({"pattern": "2-4"}, "pattern"),
        ({"curve": "square"}, "curve"),
    ],
)
def test_patterns_and_curves_that_make_no_sense_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PruneWeights.model_validate({"kind": "prune-weights", **wrong})


def test_a_pattern_that_does_not_divide_a_matrix_is_an_error_that_names_it(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    with pytest.raises(StageError, match=r"attention.self.query.weight has 32 inputs, which are no multiple of 5"):
        run_stage(PruneWeights(pattern="3:5", **QUICK), parent, tmp_path)


def test_embeddings_are_pruned_when_asked(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "distilbert")
    out, _ = run_stage(PruneWeights(sparsity=0.6, scope="uniform", embeddings=True, **QUICK), parent, tmp_path)
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
