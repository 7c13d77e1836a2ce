from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from onnxsqueeze.nn import losses

# KL((1/4, 3/4) ‖ (1/2, 1/2))
KL = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)


def test_cross_entropy_is_the_log_of_the_labels_probability() -> None:
    value = losses.task(tensor([[0.0, math.log(3)], [0.0, 0.0]]), tensor([1, 0]), regression=False)
    assert value.item() == pytest.approx((-math.log(0.75) - math.log(0.5)) / 2)


def test_regression_is_the_squared_error() -> None:
    value = losses.task(tensor([[1.0], [2.0]]), tensor([3.0, 2.5]), regression=True)
    assert value.item() == pytest.approx((4 + 0.25) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_logits_are_compared_after_softening_and_scaled_by_the_square_of_the_temperature(temperature: float) -> None:
    teacher = tensor([[0.0, temperature * math.log(3)], [1.0, 1.0]])  # softened: (1/4, 3/4), and (1/2, 1/2)
    value = losses.logits(torch.zeros(2, 2), teacher, temperature=temperature, regression=False)
    assert value.item() == pytest.approx(temperature**2 * KL / 2, rel=1e-5)


def test_scores_are_compared_by_their_squared_difference() -> None:
    assert losses.logits(tensor([[1.0]]), tensor([[4.0]]), temperature=2.0, regression=True).item() == pytest.approx(9)


def test_hidden_states_are_compared_over_real_tokens_only() -> None:
    student = torch.zeros(2, 2, 2)
    teacher = tensor([[[1.0, 3.0], [9.0, 9.0]], [[2.0, 2.0], [1.0, 1.0]]])
    value = losses.hidden(student, teacher, tensor([[1, 0], [1, 1]]))
    assert value.item() == pytest.approx((5 + 4 + 1) / 3)  # (1 + 9)/2, (4 + 4)/2, (1 + 1)/2 over three tokens


def test_attention_is_compared_over_real_queries_and_a_masked_key_adds_nothing() -> None:
    student = tensor([[[[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]]])
    teacher = tensor([[[[0.25, 0.75, 0.0], [0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]]])
    value = losses.attention(student, teacher, tensor([[1, 1, 0]]))
    assert value.item() == pytest.approx((KL + 0) / 2, rel=1e-5)


def test_relations_are_compared_head_by_head_over_real_tokens_and_widths_may_differ() -> None:
    """By hand, one head each: the student's tokens relate evenly, the teacher's first token three times as much to the second as to itself."""
    student = torch.zeros(1, 3, 2)
    teacher = tensor([[[1.0, 0.0, 0.0, 0.0], [1 + 2 * math.log(3), 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]]])
    value = losses.relations(student, teacher, tensor([[1, 1, 0]]), heads=1)
    # scores ÷ √4: first query 1/2 and 1/2 + log 3, so (1/4, 3/4); second (1 + 2 log 3) times as far apart
    far = (1 + 2 * math.log(3)) * math.log(3)
    high = 1 / (1 + math.exp(-far))
    second = high * math.log(2 * high) + (1 - high) * math.log(2 * (1 - high))
    assert value.item() == pytest.approx((KL + second) / 2, rel=1e-4)


def test_relations_of_heads_are_those_of_their_part_of_the_width() -> None:
    states = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    other = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 4)
    halves = [losses.relations(states[..., part], other[..., part], mask, heads=1) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(losses.relations(states, other, mask, heads=2), sum(halves) / 2)
    assert losses.relations(states, states, mask, heads=2).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_float32_whatever_the_model_ran_in(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = logits[:, None, :].expand(4, 2, 3)
    found: list[Tensor] = [
        losses.task(logits, tensor([0, 1, 2, 0]), regression=False),
        losses.logits(logits, logits, temperature=2.0, regression=False),
        losses.hidden(states, states, torch.ones(4, 2)),
        losses.attention(states[:, None].softmax(-1), states[:, None].softmax(-1), torch.ones(4, 2)),
        losses.relations(states, states, torch.ones(4, 2), heads=1),
    ]
    assert all(value.dtype == torch.float32 for value in found)
    assert [value.item() for value in found[1:]] == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_projections_map_to_the_teachers_width() -> None:
    mapped = losses.Projections(2, 3, 5)((torch.ones(4, 7, 3), torch.ones(4, 7, 3)))
    assert [state.shape for state in mapped] == [(4, 7, 5), (4, 7, 5)]
    assert not torch.equal(mapped[0], mapped[1])
