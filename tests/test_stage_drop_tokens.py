"""drop-tokens: which tokens go, that the file does what PyTorch does at every length, and that padding changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from crossed import crossed, first
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_rows, toy_task
from onnxsqueeze import graph
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint, kept_tokens, structure
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.drop_tokens import DropTokens
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.structure_budget import Budget
from onnxsqueeze.tokens import Encoder, pad

QUICK = DropTokens(keep={0: 60, 1: 50}, epochs=1, batch_size=16, learning_rate=1e-3)


def lengths(model: object, family: families.Family, tokens: int) -> list[int]:
    """How many tokens reach each layer."""
    found: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
        for layer in families.layers(model, family)  # type: ignore[arg-type]
    ]
    ids = torch.arange(7, 7 + tokens)[None]
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return found


@first("name", FAMILIES)
def test_fewer_tokens_reach_the_layers_behind_and_the_model_reloads(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, layers=3)
    out, changed = run_stage(QUICK, parent, tmp_path, teacher=parent)
    model, family = checkpoint.load(out, toy_task())

    assert structure.of(model, family).kept_tokens == ((0, 60), (1, 50))
    assert lengths(model, family, 20) == [20, 12, 6]
    assert lengths(model, family, 7) == [7, 5, 3], "rounded up"
    assert changed.count == round(100 * (1 - (1 + 0.6 + 0.3) / 3))


@crossed("name, form", FAMILIES, ["in its best form", "in int8"])
def test_the_file_says_what_pytorch_says_at_every_length_and_has_other_forms(tmp_path: Path, name: FamilyName, form: str) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, layers=3)
    out, _ = run_stage(QUICK, parent, tmp_path, teacher=parent)
    exported, _ = run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    stage = OptimizeGraph() if form == "in its best form" else QuantizeDynamic()
    formed, _ = run_stage(stage, exported, tmp_path / "formed", context=toy_context(tmp_path / "formed"))
    encoder = Encoder(out, 48)
    rows = encoder.encode([" ".join(row.text for row in toy_rows(n % 3 + 1, seed=n)) for n in range(12)], [None] * 12)
    feeds = [pad([row], encoder.pad_id) for row in rows]
    model, family = checkpoint.load(out, toy_task())
    with torch.inference_mode():
        said = [model(**{k: torch.from_numpy(feed[k]) for k in family.inputs()}).logits.numpy() for feed in feeds]

    assert len({len(row) for row in rows}) > 4
    assert graph.operators(exported / "model.onnx")["TopK"] == 2
    for file in (exported, *([formed] if form == "in its best form" else [])):
        for got, wanted in zip(calibration.logits(file / "model.onnx", feeds, 1), said, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4)


@first("name", FAMILIES)
def test_padding_is_dropped_first(tmp_path: Path, name: FamilyName) -> None:
    """With as much padding as is dropped, all real tokens stay: the padded row says what the whole model says of it alone."""
    folder = random_checkpoint(tmp_path, name, layers=3)
    whole, family = checkpoint.load(folder, toy_task())
    ids = torch.arange(7, 17)[None]
    padded = torch.cat([ids, torch.full((1, 10), int(whole.config.pad_token_id or 0))], 1)
    mask = torch.cat([torch.ones(1, 10), torch.zeros(1, 10)], 1).long()
    with torch.inference_mode():
        wanted = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        kept_tokens.attach(whole, family, ((0, 50),))
        got = whole(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def test_the_tokens_that_stay_are_those_that_the_first_attends_to_most(tmp_path: Path) -> None:
    """By the probabilities that transformers itself returns."""
    folder = random_checkpoint(tmp_path, "bert", layers=3)
    model, family = checkpoint.load(folder, toy_task(), eager_attention=True)
    ids = torch.randint(7, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        attended = found.attentions[0][:, :, 0].mean(1)
        kept_tokens.attach(model, family, ((0, 50),))
        left = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    for row in range(3):
        shares = attended[row].clone()
        shares[0] = 2.0
        wanted = found.hidden_states[1][row][shares.argsort(descending=True)[:8]]
        torch.testing.assert_close(left[row], wanted, atol=1e-5, rtol=1e-4)


def test_keeping_nearly_all_changes_little_and_training_wins_back(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3)
    model, family = checkpoint.load(parent, toy_task())
    examples = encode(parent, toy_rows(32, seed=3), 32)
    before = predict(model, family, examples)
    kept_tokens.attach(model, family, ((0, 99),))
    assert np.abs(predict(model, family, examples) - before).max() < 1e-5, "of fewer than a hundred tokens 99 % are all"
    stage = DropTokens(keep={0: 40}, epochs=4, batch_size=16, learning_rate=1e-3, alpha_task=0.0)
    _, changed = run_stage(stage, parent, tmp_path, teacher=parent)
    losses = [epoch["loss"] for epoch in changed.details["history"]]
    assert losses[-1] < losses[0]


def test_it_goes_with_a_pruned_model_and_what_follows_knows_of_it(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3, heads=4)
    pruned, _ = run_stage(PruneStructure(epochs=1, batch_size=16, multiple_of=8, budget=Budget(share=0.6)), parent, tmp_path / "pruned")
    out, _ = run_stage(QUICK, pruned, tmp_path / "dropped", teacher=parent)
    run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    with pytest.raises(StageError, match="the parent drops tokens"):
        run_stage(PruneStructure(epochs=1, batch_size=16, multiple_of=8), out, tmp_path / "again")
    with pytest.raises(StageError, match="distill: the parent drops tokens"):
        run_stage(Distill(layers=2, epochs=1), out, tmp_path / "student", teacher=parent)
    with pytest.raises(StageError, match="drops tokens already"):
        run_stage(QUICK, out, tmp_path / "twice", teacher=parent)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3)
    for keep, words in (({2: 50}, "2: 50"), ({0: 100}, "0: 100"), ({-1: 50}, "-1: 50")):
        with pytest.raises(StageError, match=f"keep: must map layers from 0 to 1 to percents from 1 to 99, got {words}"):
            run_stage(DropTokens(keep=keep), parent, tmp_path / words.replace(": ", "-"))
    refused: tuple[dict[str, object], ...] = ({"keep": {}}, {"keep": {"first": 50}}, {"alpha_hidden": 1.0})
    for wrong in refused:
        with pytest.raises(ValidationError):
            DropTokens.model_validate({"kind": "drop-tokens", **wrong})
