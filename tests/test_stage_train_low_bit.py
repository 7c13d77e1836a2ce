"""train-low-bit: levels that are the least-squares ones, and files that hold no other values."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from crossed import crossed
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.levels import Method, levels, nearest
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.train_low_bit import TrainLowBit

QUICK = TrainLowBit(epochs=1, batch_size=16, learning_rate=1e-3)


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def off(values: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return (values - nearest(values, found)).square().sum(1)


@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_ternary_is_the_best_of_all_supports(n: int, width: int, seed: int) -> None:
    """Against every choice of which weights are not zero, each with its best scale."""
    values = rows(n, width, seed)
    best = torch.full((n,), math.inf)
    for support in itertools.product((0.0, 1.0), repeat=width):
        chosen = torch.tensor(support)
        if not chosen.any():
            continue
        scale = (values.abs() * chosen).sum(1) / chosen.sum()
        best = torch.minimum(best, (values - scale[:, None] * values.sign() * chosen).square().sum(1))

    torch.testing.assert_close(off(values, levels(values, "ternary", 2)), best, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 3), st.integers(2, 8), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_one_bit_is_the_mean_size_and_its_sign(n: int, width: int, seed: int) -> None:
    values = rows(n, width, seed)
    scale = values.abs().mean(1, keepdim=True)
    for method in ("binary-greedy", "binary"):
        torch.testing.assert_close(levels(values, method, 1), torch.cat([-scale, scale], 1), atol=1e-5, rtol=1e-4)


@given(st.integers(1, 4), st.integers(20, 80), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_least_squares_is_no_worse_than_greedy_and_more_bits_no_worse_than_fewer(n: int, width: int, bits: int, seed: int) -> None:
    values = rows(n, width, seed)
    greedy, optimal = (off(values, levels(values, method, bits)).sum() for method in ("binary-greedy", "binary"))
    fewer = off(values, levels(values, "binary", bits - 1)).sum()

    assert optimal <= greedy * 1.0001
    assert optimal <= fewer * 1.0001


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_over_many_rows_levels_of_any_value_lie_nearer_than_sums_of_signs(bits: int) -> None:
    # not in every row: Lloyd's algorithm ends in the optimum that lies nearest to its quantiles
    values = rows(64, 80, seed=bits)
    binary, book = (off(values, levels(values, method, bits)).sum() for method in ("binary", "code-book"))

    assert book < 0.98 * binary


def test_a_code_book_finds_the_values_that_there_are() -> None:
    there = torch.tensor([-1.5, -0.2, 0.3, 2.0])
    values = there[torch.randint(4, (3, 200), generator=torch.Generator().manual_seed(0))]
    found = levels(values, "code-book", 2)

    torch.testing.assert_close(found, there.expand(3, 4))
    torch.testing.assert_close(nearest(values, found), values)


@given(st.integers(1, 5), st.integers(2, 30), st.integers(1, 3), st.sampled_from(["binary", "code-book", "ternary"]))
@settings(max_examples=40, deadline=None)
def test_nearest_is_nearest(n: int, width: int, bits: int, method: Method) -> None:
    values = rows(n, width, width)
    found = levels(values, method, bits)
    distances = (values[:, :, None] - found[:, None, :]).abs()

    torch.testing.assert_close((values - nearest(values, found)).abs(), distances.min(2).values)


FEW: dict[Method, tuple[int, int]] = {"code-book": (2, 4), "ternary": (3, 3), "binary": (2, 4)}  # bits, and how many values at most


@crossed("name, method", FAMILIES, list(FEW))
def test_every_row_of_the_written_file_has_few_values(tmp_path: Path, name: FamilyName, method: Method) -> None:
    bits, most = FEW[method]
    parent = random_checkpoint(tmp_path / "parent", name)
    out, changed = run_stage(QUICK.model_copy(update={"method": method, "bits": bits}), parent, tmp_path, teacher=parent)
    model, family = checkpoint.load(out, toy_task())
    names = families.linear_weights(model, family)
    stored = load_file(out / "model.safetensors")

    assert max(len(np.unique(row)) for name in names for row in stored[name].numpy()) <= most
    assert changed.count == sum(stored[name].numel() for name in names)
    assert 0.5 < changed.details["entropy_bits_per_weight"] <= math.log2(most) + 1e-6
    run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))


def test_a_matrix_can_share_its_values_and_embeddings_take_part_when_asked(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    stage = QUICK.model_copy(update={"scope": "matrix", "bits": 4, "embeddings": True})
    out, _ = run_stage(stage, parent, tmp_path)
    stored = load_file(out / "model.safetensors")

    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        assert len(np.unique(stored[name].numpy())) <= 16


def test_the_file_scores_what_the_best_epoch_scored(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    context = toy_context(tmp_path)
    out, changed = run_stage(QUICK.model_copy(update={"epochs": 3, "renew": 3}), parent, tmp_path, context=context)
    model, family = checkpoint.load(out, toy_task())
    logits = predict(model, family, encode(out, context.selection.rows, 32))

    best = max(epoch["score"] for epoch in changed.details["history"])
    assert context.select(logits) == pytest.approx(best)


@pytest.mark.parametrize("method", ["binary", "ternary", "code-book"])
def test_rows_that_are_zero_or_constant_stay_what_they_are(method: Method) -> None:
    for values in (torch.zeros(2, 8), torch.full((2, 8), 0.5)):
        found = nearest(values, levels(values, method, 2))
        assert torch.isfinite(found).all()
        np.testing.assert_allclose(found.numpy(), values.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"bits": 0}, {"bits": 5}, {"method": "ternary", "bits": 2}, {"embeddings": True, "freeze_embeddings": True}, {"renew": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainLowBit.model_validate({"kind": "train-low-bit", **wrong})
