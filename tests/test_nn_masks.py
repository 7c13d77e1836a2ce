from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onnxsqueeze.nn.masks import Curve, Masks, schedule

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
    masks = Masks(model, [NAMES])
    masks.update(sparsity)
    masks.apply_()
    left = torch.cat([model.get_parameter(n).detach().flatten() for n in NAMES])
    assert int((left == 0).sum()) == masks.zeros() == round(sparsity * 400)
    if 0 < masks.zeros() < 400:
        assert every[left == 0].abs().max() <= every[left != 0].abs().min()
    assert torch.equal(every[left != 0], left[left != 0])


def test_compared_with_all_a_matrix_with_large_weights_is_spared_and_by_itself_it_is_not() -> None:
    shares = {}
    for scope, groups in (("global", [NAMES]), ("uniform", [[name] for name in NAMES])):
        model = two_layers()
        masks = Masks(model, groups)
        masks.update(0.5)
        masks.apply_()
        shares[scope] = [float((model.get_parameter(n) == 0).float().mean()) for n in NAMES]
    assert shares["uniform"] == [0.5, 0.5]
    assert shares["global"][0] > 0.8 > 0.2 > shares["global"][1]


def test_a_pruned_weight_never_comes_back() -> None:
    model = two_layers()
    masks = Masks(model, [NAMES])
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
    first = Masks(two_layers(), [[name] for name in NAMES])
    first.update(0.7)
    second = Masks(two_layers(), [[name] for name in NAMES])
    second.load_state_dict(first.state_dict())
    assert second.zeros() == first.zeros() == 280


def test_movement_keeps_what_training_moves_away_from_zero() -> None:
    """By hand: weights with gradients of known sign; the sum of -weight · gradient over two steps decides, and sizes do not."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.1, 0.1, -3.0, -3.0]]))
    masks = Masks(model, [["0.weight"]], "movement")
    for gradient in ([[-1.0, 1.0, 0.5, -0.5]], [[-1.0, 0.0, -0.1, 0.1]]):
        weight.grad = torch.tensor(gradient)
        masks.watch()
    torch.testing.assert_close(masks.get_buffer("score0"), torch.tensor([[0.2, -0.1, 1.2, -1.2]]))
    masks.update(0.5)
    assert masks.get_buffer("mask0").tolist() == [[True, False, True, False]]
    masks.update(0.75)
    assert masks.get_buffer("mask0").tolist() == [[False, False, True, False]]


def test_by_movement_a_weight_comes_back_as_it_was_and_a_zero_of_before_does_not() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(torch.tensor([[2.0, 3.0, 4.0, 0.0]]))
    masks = Masks(model, [["0.weight"]], "movement")

    def step(*gradient: float) -> None:
        weight.grad = torch.tensor([gradient])
        masks.watch()
        masks.update(0.5)
        masks.apply_()

    step(1.0, -1.0, -1.0, -9.0)
    assert weight.tolist() == [[0.0, 3.0, 4.0, 0.0]]
    with torch.no_grad():
        weight.add_(torch.tensor([[50.0, 0.5, 0.0, 50.0]]))  # what training does; what is pruned it cannot move
    masks.apply_()
    step(-5.0, -1.0, 1.5, -9.0)  # sums: -2 + 10, 3 + 3.5, 4 - 6
    assert weight.tolist() == [[2.0, 3.5, 0.0, 0.0]]
    assert masks.zeros() == 2


@given(st.floats(0, 0.5), st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]))
def test_of_every_row_of_m_only_n_stay_and_rows_are_thinned_whole(share: float, pattern: tuple[int, int]) -> None:
    n, m = pattern
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(24, 4))
    names = ["0.weight", "1.weight"]
    masks = Masks(model, [names], pattern=pattern)
    goal = share / 0.5 * (1 - n / m)
    masks.update(goal / 2)  # on the way
    masks.update(goal)
    masks.apply_()
    counts = torch.cat([(model.get_parameter(name) != 0).reshape(-1, m).sum(1) for name in names])

    assert set(counts.tolist()) <= {n, m}
    assert masks.zeros() / masks.total() == pytest.approx(goal, abs=1 / len(counts))
    first = model.get_parameter("0.weight").detach().abs().reshape(-1, m)
    thinned = first[(first != 0).sum(1) == n]
    assert (thinned != 0).sum() == n * len(thinned)


def test_a_pattern_keeps_the_largest_of_each_row() -> None:
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.4, 0.1, -0.2, 0.3]]))
    masks = Masks(model, [["0.weight"]], pattern=(2, 4))
    masks.update(0.25)
    assert masks.get_buffer("mask0").tolist() == [[True] * 4 + [True, False, False, True]], "the row that loses least goes first"
    masks.update(0.5)
    assert masks.get_buffer("mask0").tolist() == [[False, True, True, False, True, False, False, True]]


def test_the_schedule_is_cubic_or_linear_or_all_at_once() -> None:
    rising = schedule("cubic", 0.0, 0.8, 10, 50)
    assert rising[30] == pytest.approx(0.8 * (1 - 0.5**3))
    assert rising[50] == 0.8
    assert min(rising) > 10
    assert schedule("linear", 0.2, 0.8, 10, 50)[30] == pytest.approx(0.5)
    assert schedule("once", 0.0, 0.8, 10, 50) == {50: 0.8}


@given(st.sampled_from(["cubic", "linear"]), st.floats(0, 0.5), st.floats(0.51, 0.99), st.integers(0, 300), st.integers(1, 3000))
def test_the_schedule_only_rises_ends_where_asked_and_has_few_updates(
    curve: Curve, start: float, end: float, first: int, ramp: int
) -> None:
    found = schedule(curve, start, end, first, first + ramp)
    steps, values = list(found), list(found.values())
    assert steps == sorted(steps)
    assert values == sorted(values)
    assert steps[-1] == first + ramp
    assert values[-1] == end
    assert values[0] >= start
    assert len(steps) <= 101
