"""prune-structure: heads and neurons that are gone from the file, chosen by what the loss says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from crossed import first
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import budget, checkpoint, structure
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.gates import KINDS, Gates, Kind, LearnedGates, MagnitudeGates
from onnxsqueeze.nn.importance import Asked, hidden_units
from onnxsqueeze.nn.structure import Structure
from onnxsqueeze.stage import Call
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.structure_budget import Budget

QUICK = PruneStructure(epochs=2, batch_size=16, learning_rate=1e-3, multiple_of=8, budget=Budget(share=0.5))


@first("name", FAMILIES)
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
    assert changed.details["parameters"] <= 0.5 * changed.details["parameters_before"]
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
        from onnxsqueeze.nn.training import inputs as read

        inputs = read(family, examples, list(range(8)))
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


@pytest.mark.parametrize("importance", ["magnitude", "gates"])
def test_other_importances_come_to_the_same_budget(tmp_path: Path, importance: str) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3, heads=4)
    _, changed = run_stage(QUICK.model_copy(update={"importance": importance, "epochs": 4}), parent, tmp_path, teacher=parent)

    assert 0.4 < changed.details["parameters"] / changed.details["parameters_before"] <= 0.5


def test_small_weights_go_first_by_magnitude(tmp_path: Path) -> None:
    model, family = checkpoint.load(random_checkpoint(tmp_path, "bert", heads=4), toy_task())
    first = families.layers(model, family)[0]
    with torch.no_grad():
        for path in family.attention[:3]:
            first.get_parameter(f"{path}.weight")[8:16] *= 0.1
        first.get_parameter(f"{family.attention[3]}.weight")[:, 8:16] *= 0.1
        first.get_parameter(f"{family.feed_forward[0]}.weight")[5] *= 0.1
        first.get_parameter(f"{family.feed_forward[1]}.weight")[:, 5] *= 0.1
    gates = MagnitudeGates(model, family)

    assert gates.importance("heads")[0].argmin() == 1
    assert gates.importance("neurons")[0].argmin() == 5


def test_gates_are_learned_towards_the_goal_and_what_the_loss_needs_stays_open(tmp_path: Path) -> None:
    model, family = checkpoint.load(random_checkpoint(tmp_path, "bert", heads=4), toy_task())
    costs = budget.parameters(32, 8)
    gates = LearnedGates(model, family, costs, learning_rate=1e-3).train()
    gates.aims(0.5)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(400):
        penalty = gates.penalty()
        assert penalty is not None
        wanted = gates._factor("heads1")[0] + gates._factor("neurons0")[:4].mean()  # a loss that these lower
        (penalty - wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    opened = [importance.sum() for kind in KINDS for importance in gates.importance(kind)]

    share = (costs.head * (opened[0] + opened[1]) + costs.neuron * (opened[2] + opened[3])) / costs.of(gates.shape)
    assert float(share) == pytest.approx(0.5, abs=0.06)
    assert gates.importance("heads")[1][0] > 0.9
    assert gates.importance("neurons")[0][:4].min() > 0.8
    gates.settle()
    assert gates.penalty() is None


def test_whole_layers_go_first_and_the_rest_keep_their_order(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4, heads=4)
    stage = PruneStructure(layers=2, budget=None, epochs=1, batch_size=16)
    out, changed = run_stage(stage, parent, tmp_path, teacher=parent)
    after, family = checkpoint.load(out, toy_task())

    assert len(changed.details["layers"]) == len(families.layers(after, family)) == 2
    assert changed.details["layers"] == sorted(changed.details["layers"])
    assert changed.count == 2 + 2 * (4 + 128)


@first("name", FAMILIES)
def test_hidden_units_go_from_the_whole_model(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, heads=4)
    stage = QUICK.model_copy(update={"hidden": 20})
    out, changed = run_stage(stage, parent, tmp_path, teacher=parent)
    after, family = checkpoint.load(out, toy_task())

    assert after.config.hidden_size == changed.details["hidden"] == 20
    assert families.layers(after, family)[0].get_parameter(f"{family.attention[0]}.weight").shape[1] == 20
    assert changed.details["parameters"] <= 0.5 * changed.details["parameters_before"]
    run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))


def test_hidden_units_that_nothing_reads_are_worth_nothing(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert", layers=1, heads=4)
    model, family = checkpoint.load(folder, toy_task())
    dull = [3, 30]
    with torch.no_grad():
        layer = families.layers(model, family)[0]
        for path in (*family.attention[:3], family.feed_forward[0]):
            layer.get_parameter(f"{path}.weight")[:, dull] = 0
        model.get_parameter("bert.pooler.dense.weight")[:, dull] = 0
    for norm in ("bert.embeddings.LayerNorm", "bert.encoder.layer.0.attention.output.LayerNorm"):
        model.get_parameter(f"{norm}.weight").data[dull] = 0  # or the residual would carry them into the next norm
        model.get_parameter(f"{norm}.bias").data[dull] = 0
    asked = Asked(model, family, folder, toy_context(tmp_path), 32)
    found = hidden_units(model, asked)

    assert found[dull].max() == 0
    assert found.count_nonzero() == 30


@pytest.mark.full
def test_a_budget_in_milliseconds_is_measured_and_kept(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=2, hidden=128, heads=8)
    stage = QUICK.model_copy(update={"budget": Budget(measure="milliseconds", share=0.7), "epochs": 1})
    context = replace(toy_context(tmp_path), call=Call(batch=4, tokens=64, threads=1))
    _, changed = run_stage(stage, parent, tmp_path, teacher=parent, context=context)

    assert 0 < changed.details["milliseconds"] < 0.85 * changed.details["milliseconds_before"]  # on a machine that others use
    assert stage.timed()
    assert stage.machine_bound()


def test_more_layers_or_hidden_units_than_there_are_cannot_be_kept(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    for field, value, words in (("layers", 3, "layers: the model has 2, 3 cannot be kept"), ("hidden", 33, "hidden: the model has 32")):
        with pytest.raises(StageError, match=words):
            run_stage(QUICK.model_copy(update={field: value}), parent, tmp_path / field)


def test_a_budget_that_no_model_can_hold_is_refused_with_what_is_least(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=4)
    stage = QUICK.model_copy(update={"budget": Budget(share=0.05), "multiple_of": 32})
    with pytest.raises(StageError, match=r"one head and 32 neurons a layer cost 6256 parameters, the budget is 1\d{3}"):
        run_stage(stage, parent, tmp_path)


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
    assert changed.details["parameters"] <= 0.7 * changed.details["parameters_before"]


@pytest.mark.parametrize(
    "wrong", [{"budget": {"share": 1.0}}, {"budget": {"share": 0}}, {"multiple_of": 0}, {"budget": {"measure": "watts"}}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneStructure.model_validate({"kind": "prune-structure", **wrong})
