"""The running average of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onnxsqueeze.nn.averaging import PolynomialAverage


def walk(steps: int) -> tuple[nn.Linear, PolynomialAverage]:
    """A weight that is t after step t."""
    model = nn.Linear(1, 1, bias=False)
    average = PolynomialAverage(model)
    for step in range(1, steps + 1):
        model.weight.data.fill_(float(step))
        average.after_step(model, step)
    return model, average


@pytest.mark.parametrize("steps", [40, 400, 4000])
def test_the_average_lags_a_tenth_behind_a_weight_that_grows_steadily(steps: int) -> None:
    """The closed form: weights t with w = 9 / (t + 8) settle at a lag of t / 10."""
    _, average = walk(steps)
    assert average.tensors["weight"].item() == pytest.approx(0.9 * steps, rel=0.08)


def test_the_first_steps_are_forgotten() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1e6)
    average = PolynomialAverage(model)
    for step in range(1, 101):
        model.weight.data.fill_(1.0)
        average.after_step(model, step)
    assert average.tensors["weight"].item() == 1.0


def test_a_model_has_its_own_weights_again_also_after_an_error() -> None:
    model, average = walk(40)

    def score() -> None:
        with average.in_place_of(model):
            assert model.weight.item() == average.tensors["weight"].item() < 40
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        score()
    assert model.weight.item() == 40


def test_it_goes_on_from_what_was_saved() -> None:
    _, whole = walk(80)
    model, half = walk(40)
    resumed = PolynomialAverage(model)
    resumed.restore(half.tensors)
    for step in range(41, 81):
        model.weight.data.fill_(float(step))
        resumed.after_step(model, step)
    assert torch.equal(resumed.tensors["weight"], whole.tensors["weight"])
