from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onnxsqueeze.nn.masks import MagnitudeMasks, Scope, cubic_schedule

NAMES = ["0.weight", "1.weight"]


def two_layers() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10))
    with torch.no_grad():
        model.get_parameter("1.weight").mul_(10)
    return model


@given(st.floats(0.01, 0.99))
def test_the_smallest_weights_go_and_as_many_as_asked(sparsity: float) -> None:
    model = two_layers()
    every = torch.cat([model.get_parameter(n).detach().flatten().clone() for n in NAMES])
    masks = MagnitudeMasks(model, NAMES, "global")
    masks.update(sparsity)
    masks.apply_()
    left = torch.cat([model.get_parameter(n).detach().flatten() for n in NAMES])
    assert int((left == 0).sum()) == masks.zeros() == round(sparsity * 400)
    if 0 < masks.zeros() < 400:
        assert every[left == 0].abs().max() <= every[left != 0].abs().min()
    assert torch.equal(every[left != 0], left[left != 0])


def test_global_scope_spares_the_matrix_with_large_weights_and_layer_scope_does_not() -> None:
    shares = {}
    scope: Scope
    for scope in ("global", "layer"):
        model = two_layers()
        masks = MagnitudeMasks(model, NAMES, scope)
        masks.update(0.5)
        masks.apply_()
        shares[scope] = [float((model.get_parameter(n) == 0).float().mean()) for n in NAMES]
    assert shares["layer"] == [0.5, 0.5]
    assert shares["global"][0] > 0.8 > 0.2 > shares["global"][1]


def test_a_pruned_weight_never_comes_back() -> None:
    model = two_layers()
    masks = MagnitudeMasks(model, NAMES, "global")
    masks.update(0.3)
    masks.apply_()
    first = model.get_parameter("0.weight")
    gone = first == 0
    with torch.no_grad():
        first.add_(100 * gone)  # as an optimizer's momentum might
    masks.apply_()
    masks.update(0.6)
    masks.apply_()
    assert bool((first[gone] == 0).all())
    assert masks.zeros() == 240


def test_masks_travel_in_the_state_dict() -> None:
    first = MagnitudeMasks(two_layers(), NAMES, "layer")
    first.update(0.7)
    second = MagnitudeMasks(two_layers(), NAMES, "layer")
    second.load_state_dict(first.state_dict())
    assert second.zeros() == first.zeros() == 280


def test_the_schedule_is_cubic() -> None:
    schedule = cubic_schedule(0.0, 0.8, 10, 50)
    assert schedule[30] == pytest.approx(0.8 * (1 - 0.5**3))
    assert schedule[50] == 0.8
    assert min(schedule) > 10


@given(st.floats(0, 0.5), st.floats(0.51, 0.99), st.integers(0, 300), st.integers(1, 3000))
def test_the_schedule_only_rises_ends_where_asked_and_has_few_updates(start: float, end: float, first: int, ramp: int) -> None:
    schedule = cubic_schedule(start, end, first, first + ramp)
    steps, values = list(schedule), list(schedule.values())
    assert steps == sorted(steps)
    assert values == sorted(values)
    assert steps[-1] == first + ramp
    assert values[-1] == end
    assert values[0] >= start
    assert len(steps) <= 101
