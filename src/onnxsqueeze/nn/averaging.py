"""The average of a training's weights: less of the noise of single steps, at the cost of one more copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_ETA = 8  # of Shamir and Zhang; the average reaches back over about a ninth of the steps so far
_STRIDE = 4  # steps between two updates: the next step's weights hardly differ, and an update reads the whole model


class PolynomialAverage:
    """A running average of a model's floating-point tensors in which later steps count more.

    After step t it is ``(1 - w) · average + w · weights`` with ``w = (η + 1) / (t + η)``; updated every few steps, which stand for those
    between. Source: Shamir and Zhang 2013, "Stochastic Gradient Descent for Non-smooth Optimization", section 4 (polynomial decay, η).
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in _floating(model)}

    def after_step(self, model: nn.Module, step: int) -> None:
        """Count the weights of ``model`` after ``step`` finished steps."""
        if step % _STRIDE:
            return
        kept = 1.0
        for passed in range(step - _STRIDE + 1, step + 1):
            kept *= 1 - min(1.0, (_ETA + 1) / (passed + _ETA))
        with torch.no_grad():
            for name, tensor in _floating(model):
                self.tensors[name].lerp_(tensor.detach(), 1 - kept)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from tensors that were saved."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Inside, ``model`` has the averaged weights; behind it its own again."""
        own = {name: tensor.detach().clone() for name, tensor in _floating(model)}
        model.load_state_dict(self.tensors, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point())
