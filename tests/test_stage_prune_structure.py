"""prune-structure: heads and neurons that are gone from the file, chosen by what the loss says of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import budget, checkpoint, structure
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.gates import Gates, Kind
from onnxsqueeze.nn.structure import Structure
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.prune_structure import Budget, PruneStructure

QUICK = PruneStructure(epochs=2, batch_size=16, learning_rate=1e-3, multiple_of=8, budget=Budget(share=0.5))


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_layers_is_gone_from_the_file_and_the_rest_reloads_and_exports(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, layers=3, heads=4)
    out, changed = run_stage(QUICK, parent, tmp_path, teacher=parent)
    before, after = (checkpoint.load(folder, toy_task())[0] for folder in (parent, out))
    family = families.FAMILIES[name]
    left = structure.of(after, family)

    def matrices(model: torch.nn.Module) -> int:
        stems = [weight.removesuffix(".weight") for weight in families.linear_weights(model, family)]
        return sum(model.get_submodule(stem).get_parameter(kind).numel() for stem in stems for kind in ("weight", "bias"))

    assert 0.42 < matrices(after) / matrices(before) <= 0.51
    assert changed.details["share"] <= 0.5
    assert changed.count == 3 * (4 + 128) - sum(left.heads) - sum(left.neurons)
    assert all(neurons % 8 == 0 for neurons in left.neurons)
    assert changed.details["with_teacher"]
    run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))


def test_what_the_loss_does_not_need_goes_first(tmp_path: Path) -> None:
    """Heads and neurons whose outputs nobody reads have no gradient: they must be the ones that go."""
    folder = random_checkpoint(tmp_path / "parent", "bert", layers=2, heads=4)
    model, family = checkpoint.load(folder, toy_task())
    useless = {0: (range(1, 3), range(64)), 1: ((0, 3), range(40, 104))}
    for i, layer in enumerate(families.layers(model, family)):
        heads, neurons = useless[i]
        with torch.no_grad():
            for head in heads:
                layer.get_parameter(f"{family.attention[3]}.weight")[:, 8 * head : 8 * head + 8] = 0
            layer.get_parameter(f"{family.feed_forward[1]}.weight")[:, list(neurons)] = 0
    (tmp_path / "dull").mkdir()
    checkpoint.save(model, folder, tmp_path / "dull", toy_task())
    stage = PruneStructure(epochs=1, batch_size=16, learning_rate=1e-9, weight_decay=0, multiple_of=1, recovery=0.25, warmup=0)
    out, _ = run_stage(stage, tmp_path / "dull", tmp_path)
    after, _ = checkpoint.load(out, toy_task())
    query = "bert.encoder.layer.0.attention.self.query.weight"

    assert structure.of(after, family) == Structure(8, (2, 2), (64, 64))
    kept = model.get_parameter(query)[[*range(8), *range(24, 32)]]
    torch.testing.assert_close(after.get_parameter(query), kept, atol=1e-6, rtol=0)


def test_importance_is_the_squared_gradient_by_the_factor_on_a_unit(tmp_path: Path) -> None:
    """Against a difference quotient: the loss with one head, or one neuron, a little louder and a little quieter."""
    folder = random_checkpoint(tmp_path, "bert", heads=4)
    model, family = checkpoint.load(folder, toy_task())
    context = toy_context(tmp_path)
    examples = encode(folder, context.train.rows[:8], 32)
    model.double()
    gates = Gates(model, family).train()

    def loss() -> torch.Tensor:
        from onnxsqueeze.nn.training import _inputs

        inputs = _inputs(family, examples, list(range(8)))
        found: torch.Tensor = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor(examples.labels))
        return found

    loss().backward()  # type: ignore[no-untyped-call]
    gates.watch()
    probes: tuple[tuple[Kind, int], ...] = (("heads", 2), ("neurons", 17))
    for kind, unit in probes:
        found = float(gates.importance(kind)[1][unit]) / 0.05  # the first step's share of the running mean
        values = []
        for factor in (1.001, 0.999):
            gates.get_buffer(f"{kind}1")[unit] = factor
            with torch.no_grad():
                values.append(float(loss()))
        gates.get_buffer(f"{kind}1")[unit] = 1.0
        assert found == pytest.approx(((values[0] - values[1]) / 0.002) ** 2, rel=0.02)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_choice_keeps_to_its_budget_takes_the_least_important_and_leaves_every_layer_something(data: st.DataObject) -> None:
    deep, multiple = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 8, 32]))
    shape = Structure(
        8, tuple(data.draw(st.integers(1, 12)) for _ in range(deep)), tuple(data.draw(st.integers(multiple, 200)) for _ in range(deep))
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    heads, neurons = [torch.rand(n) for n in shape.heads], [torch.rand(n) for n in shape.neurons]
    costs = budget.parameters(32, 8)
    limit = data.draw(st.floats(0.05, 1.0)) * costs.of(shape)
    kept_heads, kept_neurons = budget.choose(heads, neurons, costs, limit, multiple)
    left = Structure(8, tuple(map(len, kept_heads)), tuple(map(len, kept_neurons)))
    bare = all(n == 1 for n in left.heads) and all(n <= multiple for n in left.neurons)

    assert costs.of(left) <= limit or bare
    assert min(*left.heads, *left.neurons) >= 1
    for kept, importance in (*zip(kept_heads, heads, strict=True), *zip(kept_neurons, neurons, strict=True)):
        gone = sorted(set(range(len(importance))) - set(kept))
        assert not gone or max(importance[gone]) <= min(importance[list(kept)])
    assert all(len(k) == n or len(k) % multiple == 0 for k, n in zip(kept_neurons, shape.neurons, strict=True))


def test_costs_are_those_of_a_real_model(tmp_path: Path) -> None:
    model, family = checkpoint.load(random_checkpoint(tmp_path, "bert", layers=2, heads=4), toy_task())
    counted = sum(
        model.get_parameter(f"{name.removesuffix('.weight')}.{kind}").numel()
        for name in families.linear_weights(model, family)
        for kind in ("weight", "bias")
    )
    outputs = 2 * 2 * 32  # biases of what goes back into the hidden states: nothing takes them out

    assert budget.parameters(32, 8).of(structure.of(model, family)) == counted - outputs


def test_a_budget_that_no_model_can_hold_is_refused_with_what_is_least(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    stage = QUICK.model_copy(update={"budget": Budget(share=0.05), "multiple_of": 32})
    with pytest.raises(StageError, match=r"one head and 32 neurons a layer are 2\d\.\d% of the layers' parameters, more than 5.0%"):
        run_stage(stage, parent, tmp_path)


def test_a_killed_training_resumes_with_its_masks_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    stage = QUICK.model_copy(update={"epochs": 3, "recovery": 0.4})
    whole, _ = run_stage(stage, parent, tmp_path / "whole", teacher=parent)

    def kill(done: int, total: int, note: str = "") -> None:
        if "epoch" in note and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, parent, tmp_path / "killed", teacher=parent, context=toy_context(tmp_path, progress=kill))
    out, changed = run_stage(stage, parent, tmp_path / "again", teacher=parent, context=toy_context(tmp_path))

    assert changed.details["resumed_at_epoch"] == 2
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_only_epochs_with_the_final_structure_are_kept(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    scores = iter([0.9, 0.5, 0.6])
    stage = QUICK.model_copy(update={"epochs": 3, "recovery": 0.4})
    _, changed = run_stage(stage, parent, tmp_path, context=replace(toy_context(tmp_path), select=lambda _: next(scores)))

    assert changed.details["best_epoch"] == 3


def test_pruning_goes_on_from_layers_that_are_unequal_already(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    once, _ = run_stage(QUICK, parent, tmp_path / "once")
    _, changed = run_stage(QUICK.model_copy(update={"budget": Budget(share=0.7)}), once, tmp_path / "twice", teacher=parent)

    assert sum(changed.details["neurons"]) < sum(changed.details["neurons_before"]) < 256
    assert changed.details["share"] <= 0.7


@pytest.mark.parametrize(
    "wrong", [{"budget": {"share": 1.0}}, {"budget": {"share": 0}}, {"multiple_of": 0}, {"budget": {"measure": "watts"}}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneStructure.model_validate({"kind": "prune-structure", **wrong})
    assert math.isclose(PruneStructure().budget.share, 0.5)
