"""factorize: factors against what singular values promise, in files that reload and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from crossed import first
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze import graph
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint, factors, structure
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.factorize import Factorize
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.structure_budget import Budget

QUICK = Factorize(epochs=1, batch_size=16, learning_rate=1e-4, multiple_of=2)


def matrix(out: int, into: int, seed: int) -> torch.Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_factors_leave_out_what_the_truncated_spectrum_says(out: int, into: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(out, into)))
    weight = matrix(out, into, seed)
    up, down = factors.split(weight, rank)

    assert (up.shape, down.shape) == ((out, rank), (rank, into))
    error = (weight - up @ down).double().square().sum()
    torch.testing.assert_close(error, factors.spectrum(weight)[rank:].square().sum(), atol=1e-4, rtol=1e-3)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_weighted_factors_are_nearest_on_the_inputs_that_they_will_see(out: int, into: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(out, into)))
    weight = matrix(out, into, seed)
    inputs = matrix(200, into, seed + 1) * torch.logspace(0, -1, into)
    moment = inputs.double().T @ inputs.double()
    weighting = factors.root(moment)
    plain, weighted = factors.split(weight, rank), factors.split(weight, rank, weighting)

    def off(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (inputs.double() @ (weight - pair[0] @ pair[1]).double().T).square().sum()

    tail = factors.spectrum(weight, weighting)[rank:].square().sum()
    torch.testing.assert_close(off(weighted), tail, atol=1e-3, rtol=1e-2)  # the damping
    assert off(weighted) <= off(plain) * 1.001 + 1e-3


@given(
    st.lists(st.tuples(st.integers(2, 24), st.integers(2, 24)), min_size=1, max_size=5), st.floats(0.2, 0.95), st.sampled_from([1, 2, 4])
)
@settings(max_examples=60, deadline=None)
def test_ranks_keep_to_the_share_and_spend_it_where_it_tells(shapes: list[tuple[int, int]], share: float, multiple: int) -> None:
    spectra = [factors.spectrum(matrix(out, into, i)) for i, (out, into) in enumerate(shapes)]
    ranks = factors.choose_ranks(spectra, shapes, share, multiple)
    spent = sum(out * into if rank is None else rank * (out + into) for rank, (out, into) in zip(ranks, shapes, strict=True))
    least = sum(min(out * into, multiple * (out + into)) for out, into in shapes)

    assert spent <= max(share * sum(out * into for out, into in shapes), least)
    assert all(
        rank is None or (rank % multiple == 0 and rank * (out + into) < out * into) for rank, (out, into) in zip(ranks, shapes, strict=True)
    )


def test_a_matrix_of_low_rank_gets_a_low_rank() -> None:
    low = matrix(40, 4, 0) @ matrix(4, 40, 1)
    full = 3 * matrix(40, 40, 2)
    ranks = factors.choose_ranks([factors.spectrum(low), factors.spectrum(full)], [(40, 40), (40, 40)], 0.6, 1)

    assert ranks[0] == 4
    assert ranks[1] is None


@first("name", FAMILIES)
def test_half_of_the_layers_weights_are_gone_and_the_file_reloads_and_exports(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    stage = QUICK.model_copy(update={"vocabulary_rank": 8})
    out, changed = run_stage(stage, parent, tmp_path, teacher=parent)
    model, family = checkpoint.load(out, toy_task())
    before, _ = checkpoint.load(parent, toy_task())

    def weights(some: torch.nn.Module) -> int:
        return sum(some.get_parameter(weight).numel() for weight in families.linear_weights(some, family))

    assert 0.4 < weights(model) / weights(before) <= 0.5
    assert changed.count == sum(p.numel() for p in before.parameters()) - sum(p.numel() for p in model.parameters())
    assert structure.of(model, family).vocabulary_rank == 8
    assert json.loads((out / "config.json").read_text())["onnxsqueeze"]["vocabulary_rank"] == 8
    assert 0 < max(changed.details["left_out"].values()) < 1
    exported, _ = run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    whole, _ = run_stage(Export(), parent, tmp_path / "whole", context=toy_context(tmp_path / "whole"))
    assert (exported / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
    more = graph.operators(exported / "model.onnx")["MatMul"] - graph.operators(whole / "model.onnx")["MatMul"]
    assert more == sum(map(len, changed.details["ranks"])) + 1, "one product more for each matrix in factors"


def test_factors_of_full_rank_say_what_the_matrix_said(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    model, family = checkpoint.load(folder, toy_task())
    examples = encode(folder, toy_context(tmp_path).train.rows, 32)
    before = predict(model, family, examples)
    for layer in families.layers(model, family):
        for path in (*family.attention, *family.feed_forward):
            old = layer.get_submodule(path)
            assert isinstance(old, torch.nn.Linear)
            structure.replace_module(layer, path, factors.factored(old, min(old.weight.shape)))
    table = model.get_submodule(family.table_of_words)
    assert isinstance(table, torch.nn.Embedding)
    structure.replace_module(model, family.table_of_words, factors.factored_table(table, 32))

    torch.testing.assert_close(torch.tensor(predict(model, family, examples)), torch.tensor(before), atol=1e-4, rtol=1e-3)


def test_words_that_occur_come_out_nearer_than_words_that_do_not() -> None:
    table = torch.nn.Embedding(60, 16)
    frequency = torch.cat([torch.full((20,), 500.0), torch.zeros(40)])
    ids = torch.arange(60)

    def off(weighting: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = (factors.factored_table(table, 6, weighting)(ids) - table(ids)).square().sum(1)
        return found

    weighted, plain = off(frequency), off(None)
    assert weighted[:20].sum() < 0.8 * plain[:20].sum()
    assert weighted.sum() > plain.sum()


def test_weighting_by_activations_keeps_the_logits_nearer_before_any_training(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3)
    rows = encode(parent, toy_context(tmp_path).train.rows, 32)
    before = predict(*checkpoint.load(parent, toy_task()), rows)
    off = {}
    for weighting in ("activations", "none"):
        stage = QUICK.model_copy(update={"weighting": weighting, "learning_rate": 1e-12, "weight_decay": 0, "share": 0.6})
        out, _ = run_stage(stage, parent, tmp_path / weighting)
        off[weighting] = float(abs(predict(*checkpoint.load(out, toy_task()), rows) - before).mean())

    assert off["activations"] < off["none"]


def test_a_factored_model_can_be_pruned_and_a_pruned_one_factored(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    prune = PruneStructure(epochs=1, batch_size=16, multiple_of=8, budget=Budget(share=0.6), hidden=28)
    once, _ = run_stage(QUICK, parent, tmp_path / "factors")
    pruned, _ = run_stage(prune, once, tmp_path / "factors-pruned")
    first, _ = run_stage(prune, parent, tmp_path / "pruned")
    run_stage(QUICK, first, tmp_path / "pruned-factors")
    model, family = checkpoint.load(pruned, toy_task())

    assert any(structure.of(model, family).ranks)
    assert model.config.hidden_size == 28
    run_stage(Export(), pruned, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))


def test_what_is_in_factors_already_or_would_not_shrink_is_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    once, _ = run_stage(QUICK, parent, tmp_path / "once")
    with pytest.raises(StageError, match="has factors already"):
        run_stage(QUICK, once, tmp_path / "twice")
    with pytest.raises(StageError, match=r"vocabulary_rank: the table of words, \d+ × 32, has no rank of 33"):
        run_stage(QUICK.model_copy(update={"vocabulary_rank": 33}), parent, tmp_path / "more")
    with pytest.raises(StageError, match="no fewer weights"):
        run_stage(Factorize(share=None, vocabulary_rank=32, epochs=1), parent, tmp_path / "wide")


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"share": 0}, {"share": None}, {"vocabulary_rank": 0}, {"weighting": "rows"}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Factorize.model_validate({"kind": "factorize", **wrong})
