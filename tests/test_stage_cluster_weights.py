"""cluster-weights: clusters that are the best there are, values that learn from all their members, and files that pack to the bits asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from crossed import crossed
from exports import build
from models import FAMILIES, FamilyName, artifact, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze import graph
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint, losses, training
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.clusters import CodeBooks, k_means
from onnxsqueeze.nn.importance import Asked, fisher
from onnxsqueeze.nn.levels import levels, nearest
from onnxsqueeze.packing import files
from onnxsqueeze.stages.cluster_weights import ClusterWeights
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.pack import Pack
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.tasks.rows import spread

QUICK = ClusterWeights(epochs=1, batch_size=16, learning_rate=1e-2, bits=2, precision="fp32")
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def off(values: torch.Tensor, importance: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of each row."""
    return (importance * (values - nearest(values, found)).square()).sum(1)


def best(values: tuple[float, ...], importance: tuple[float, ...], clusters: int) -> float:
    """The least weighted squared error over all ways to cut the sorted values into at most ``clusters`` runs."""
    order = np.argsort(values, kind="stable")
    v, w = np.array(values)[order], np.array(importance)[order]

    def error(start: int, end: int) -> float:
        part, says = v[start:end], w[start:end]
        return float((says * (part - np.average(part, weights=says)) ** 2).sum()) if end > start and says.sum() else 0.0

    cuts = itertools.combinations_with_replacement(range(len(v) + 1), clusters - 1)
    return min(sum(error(a, b) for a, b in itertools.pairwise((0, *inner, len(v)))) for inner in cuts)


numbers = st.floats(-4, 4, width=16)


@given(st.lists(st.tuples(numbers, st.sampled_from([0.0, 0.1, 1.0, 7.0])), min_size=1, max_size=12), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_clusters_of_a_short_row_are_the_best_of_all(row: list[tuple[float, float]], clusters: int) -> None:
    values, importance = zip(*row, strict=True)
    one, says = torch.tensor([values]), torch.tensor([importance])
    found = k_means(one, says, clusters)

    assert found.shape == (1, clusters)
    assert bool((found.diff(dim=1) >= 0).all())
    assert off(one, says, found).item() == pytest.approx(best(values, importance, clusters), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("clusters", "most"), [(2, 1.001), (4, 1.01), (16, 1.01)])
@pytest.mark.parametrize("scale", ["uniform", "magnitude", "heavy"])
def test_clusters_of_a_long_row_are_nearly_the_best(clusters: int, most: float, scale: str) -> None:
    """Against dynamic programming over all boundaries, Wang and Song 2011, without its shortcuts."""
    generator = torch.Generator().manual_seed(clusters)
    values = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    importance = {
        "uniform": torch.ones_like(values),
        "magnitude": values.abs(),
        "heavy": torch.randn(values.shape, generator=generator, dtype=torch.float64).pow(4),
    }[scale]
    reached = off(values, importance, k_means(values, importance, clusters))
    for v, w, own in zip(values.numpy(), importance.numpy(), reached, strict=True):
        order = np.argsort(v)
        mass, first, second = (np.append(0, (w[order] * v[order] ** power).cumsum()) for power in range(3))
        m, f, s = (one[None, :] - one[:, None] for one in (mass, first, second))
        errors = np.where(np.tri(301, k=0, dtype=bool), np.inf, s - f**2 / np.maximum(m, 1e-300))
        total = errors[0]
        for _ in range(clusters - 1):
            total = np.minimum(total, (total[:, None] + errors).min(0))
        assert own.item() <= most * total[-1]


def test_clusters_beat_those_from_quantiles_and_find_the_values_that_there_are() -> None:
    values = torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
    same = torch.ones_like(values)
    assert bool((off(values, same, k_means(values, same, 16)) < 0.9 * off(values, same, levels(values, "code-book", 4))).all())

    there = torch.tensor([-1.5, -0.2, 0.3, 2.0])
    rows = there[torch.randint(4, (3, 200), generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(k_means(rows, torch.ones_like(rows), 4), there.expand(3, 4))


def test_what_counts_more_is_met_more_closely() -> None:
    values = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    even, right = torch.ones_like(values), torch.where(values > 0.5, 20.0, 1.0)
    plain, weighted = k_means(values, even, 8), k_means(values, right, 8)

    assert bool(((weighted > 0.5).sum(1) > (plain > 0.5).sum(1)).all()), "more of the levels lie where it counts"
    closer = off(values, (values > 0.5).float(), weighted) / off(values, (values > 0.5).float(), plain)
    further = off(values, (values <= 0.5).float(), weighted) / off(values, (values <= 0.5).float(), plain)
    assert bool((closer < 0.7).all())
    assert bool((further > 1).all())


def test_fisher_is_the_mean_over_rows_of_the_squared_gradient(tmp_path: Path) -> None:
    parent, context = random_checkpoint(tmp_path / "parent", "bert"), toy_context(tmp_path)
    model, family = checkpoint.load(parent, context.task)
    found = fisher(model, [QUERY], Asked(model, family, parent, context, 5, batch=1))[QUERY]
    rows = spread(context.train.rows, 5)
    expected = torch.zeros_like(found)
    for i, row in enumerate(rows):
        logits = model(**training.inputs(family, encode(parent, rows, 32), [i])).logits
        loss = losses.task(logits, torch.tensor([row.label]), regression=False)
        expected += torch.autograd.grad(loss, model.get_parameter(QUERY))[0].square() / 5

    assert expected.max() > 0
    torch.testing.assert_close(found, expected)


def test_code_books_by_the_gradient_cost_less_by_the_gradient(tmp_path: Path) -> None:
    parent, context = random_checkpoint(tmp_path / "parent", "bert"), toy_context(tmp_path)
    model, family = checkpoint.load(parent, context.task)
    before = model.get_parameter(QUERY).detach().clone()
    felt = fisher(model, [QUERY], Asked(model, family, parent, context, 64, batch=1))
    moved = {}
    for name, importance in (("fisher", felt), ("uniform", {QUERY: torch.ones_like(before)})):
        books = CodeBooks(model, [QUERY], 2, importance, per_row=True)
        moved[name] = (books.value(0, before) - before).detach().square()

    assert (felt[QUERY] * moved["fisher"]).sum() < 0.8 * (felt[QUERY] * moved["uniform"]).sum()
    assert moved["uniform"].sum() < moved["fisher"].sum()


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("keep_zeros", [True, False])
def test_a_values_gradient_is_the_sum_of_its_members(per_row: bool, keep_zeros: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 6))
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight[:, ::4] = 0.0
    books = CodeBooks(model, ["0.weight"], 2, {"0.weight": torch.ones_like(weight)}, per_row=per_row, keep_zeros=keep_zeros, movable=True)
    given = torch.randn(5, 20)
    with books:
        model(given).square().sum().backward()
    assert weight.grad is None
    moved = books.value(0, weight).detach().requires_grad_()
    functional.linear(given, moved, model.get_parameter("0.bias")).square().sum().backward()  # type: ignore[no-untyped-call]
    assert moved.grad is not None
    codes, rows = books.get_buffer("codes0").long(), moved.grad.reshape(6 if per_row else 1, -1)
    summed = torch.zeros(len(rows), 4).scatter_add_(1, codes, rows)

    torch.testing.assert_close(books.get_parameter("book0").grad, summed[:, 1:] if keep_zeros else summed)
    torch.testing.assert_close(books.get_parameter("free0").grad, rows)


def test_a_weight_that_has_come_nearer_to_another_value_moves_there_and_a_kept_zero_does_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 1))
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.0, 1.0, 1.0, 2.0, 2.0, 5.0]]))
    books = CodeBooks(model, ["0.weight"], 2, {"0.weight": torch.ones_like(weight)}, per_row=True, keep_zeros=True, movable=True)
    with torch.no_grad():
        books.get_parameter("free0").copy_(torch.tensor([[5.0, 1.6, 0.1, 2.0, 2.0, 5.0]]))
    books.reassign()
    books.write()

    assert weight.tolist() == [[0.0, 2.0, 1.0, 2.0, 2.0, 5.0]]


@crossed("name, scope", FAMILIES, ["row", "matrix"])
def test_every_row_of_the_written_file_has_few_values(tmp_path: Path, name: FamilyName, scope: str) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    out, changed = run_stage(QUICK.model_copy(update={"scope": scope, "bits": 3}), parent, tmp_path, teacher=parent)
    model, family = checkpoint.load(out, toy_task())
    names = families.linear_weights(model, family)
    stored = load_file(out / "model.safetensors")

    assert max(len(np.unique(row)) for name in names for row in (stored[name] if scope == "row" else stored[name].reshape(1, -1))) == 8
    assert changed.count == changed.details["weights"] == sum(stored[name].numel() for name in names)
    assert 2 < changed.details["entropy_bits_per_weight"] <= 3
    run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))


@pytest.mark.parametrize("embedding_bits", [None, 3])
def test_tables_take_part_when_asked_and_share_values_by_the_whole_table(tmp_path: Path, embedding_bits: int | None) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    out, _ = run_stage(QUICK.model_copy(update={"bits": 4, "embeddings": True, "embedding_bits": embedding_bits}), parent, tmp_path)
    stored = load_file(out / "model.safetensors")

    assert len(np.unique(stored["bert.embeddings.word_embeddings.weight"].numpy())) == 2 ** (embedding_bits or 4)
    assert max(len(np.unique(row)) for row in stored[QUERY].numpy()) == 16
    assert len(np.unique(stored[QUERY].numpy())) > 16, "a book for each row of the layers"


def sharing(weight: torch.Tensor) -> list[list[int]]:
    """Of each row which of its weights have the same value: the place of the first of them."""
    return [[row.index(value) for value in row] for row in weight.tolist()]


def test_values_learn_and_members_stay_unless_they_may_move(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    before = load_file(parent / "model.safetensors")[QUERY]
    model, _ = checkpoint.load(parent, toy_task())
    books = CodeBooks(model, [QUERY], 2, {QUERY: before.abs()}, per_row=True)
    clustered = books.value(0, before).detach()
    stage = QUICK.model_copy(update={"importance": "magnitude", "epochs": 3})
    calls = itertools.count()  # the last epoch is the best one
    context = replace(toy_context(tmp_path), select=lambda _: float(next(calls)))
    out, _ = run_stage(stage, parent, tmp_path / "stay", context=context)
    context = replace(context, checkpoint=tmp_path / "move")
    moved, _ = run_stage(stage.model_copy(update={"reassign": 2}), parent, tmp_path / "move", context=context)
    after, free = (load_file(folder / "model.safetensors")[QUERY] for folder in (out, moved))

    assert sharing(after) == sharing(clustered)
    assert (after - clustered).abs().max() > 0.01
    assert sharing(free) != sharing(clustered)


@pytest.mark.parametrize("reassign", [None, 2])
def test_pruned_weights_stay_zero_and_no_other_becomes_zero(tmp_path: Path, reassign: int | None) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    state = load_file(parent / "model.safetensors")
    state[QUERY] = state[QUERY] * (torch.rand(state[QUERY].shape, generator=torch.Generator().manual_seed(0)) > 0.6)
    state[QUERY][3] = 0.0
    save_file(state, parent / "model.safetensors", metadata={"format": "pt"})
    out, _ = run_stage(QUICK.model_copy(update={"keep_zeros": True, "reassign": reassign}), parent, tmp_path)
    stored = load_file(out / "model.safetensors")[QUERY]

    assert torch.equal(stored == 0, state[QUERY] == 0)
    assert max(len(row.unique()) for row in stored) == 4


PACKED = {"int8 of 2 bits": (True, 2), "float of 3": (False, 3), "float of 6": (False, 6), "int8 of 4": (True, 4)}


@crossed("scope, form", ["row", "matrix"], list(PACKED))
def test_a_packed_file_takes_the_bits_and_the_code_books_of_its_weights(tmp_path: Path, scope: str, form: str) -> None:
    """`pack` proves that the outputs keep their bits; quantizing to int8 leaves each output's weights as few values as they had."""
    int8, bits = PACKED[form]
    parent = random_checkpoint(tmp_path / "parent", "bert", hidden=128, layers=1)
    stage = QUICK.model_copy(update={"scope": scope, "bits": bits, "importance": "uniform"})
    clustered, changed = run_stage(stage, parent, tmp_path)
    context = toy_context(tmp_path)
    dense, _ = build(Export(), artifact(clustered), tmp_path / "fp32", context)
    if int8:
        dense, _ = build(QuantizeDynamic(), dense, tmp_path / "int8", context)
    packed, _ = build(Pack(), dense, tmp_path / "packed", context)
    rows = {one.name: one.dims[1] for one in graph.load(dense.onnx).graph.initializer if len(one.dims) == 2 and min(one.dims) >= 128}
    stored = files.stored_bytes(graph.load(packed.onnx))
    lists = sum(2**bits * (1 if int8 else 4) * (1 if scope == "matrix" and not int8 else n) for name, n in rows.items() if name in stored)
    layers = sum(stored[name] for name in rows if name in stored)

    assert len(rows.keys() & stored.keys()) == 6
    assert layers <= changed.count * bits / 8 + lists + 6 * 64
    assert layers >= changed.count * changed.details["entropy_bits_per_weight"] / 8 * 0.9


def test_the_file_scores_what_the_best_epoch_scored_and_is_the_same_every_time(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    outs = []
    for i in range(2):
        context = toy_context(tmp_path / str(i))
        out, changed = run_stage(QUICK.model_copy(update={"epochs": 3}), parent, tmp_path / str(i), teacher=parent, context=context)
        model, family = checkpoint.load(out, toy_task())
        logits = training.predict(model, family, encode(out, context.selection.rows, 32))
        assert context.select(logits) == pytest.approx(max(epoch["score"] for epoch in changed.details["history"]))
        outs.append((out / "model.safetensors").read_bytes())

    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 1, "keep_zeros": True},
        {"embeddings": True, "freeze_embeddings": True},
        {"embedding_bits": 4},
        {"embeddings": True, "embedding_bits": 1, "keep_zeros": True},
        {"reassign": 0},
        {"importance": "taylor"},
        {"asked_rows": 8},
        {"scope": "layer"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ClusterWeights.model_validate({"kind": "cluster-weights", **wrong})


def test_more_values_than_weights_are_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    with pytest.raises(
        StageError, match=r"cluster-weights: bits: a row of bert\.encoder\S+ has 32 weights, 32 values are no fewer"
    ) as caught:
        run_stage(QUICK.model_copy(update={"bits": 5}), parent, tmp_path)
    assert "scope: matrix" in str(caught.value.remedy)
