"""Which weights are pruned: masks that grow along a schedule, and stay on the weights after every step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Scope = Literal["global", "layer"]

_UPDATES = 50  # masks are drawn anew at most this often: a global threshold over millions of weights costs like a training step


class MagnitudeMasks(nn.Module):
    """A mask for each named weight of a model. `update` prunes the smallest weights, `apply_` sets the pruned ones to zero.

    ``scope``: "global" compares all weights with each other, "layer" each matrix with itself. A pruned weight never comes back.
    The masks are buffers, so they travel with the training's checkpoint.
    """

    def __init__(self, model: nn.Module, names: list[str], scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self._weights = [model.get_parameter(name) for name in names]
        for i, weight in enumerate(self._weights):
            self.register_buffer(f"mask{i}", weight.detach() != 0)

    def update(self, sparsity: float) -> None:
        """Prune until ``sparsity`` (0-1) of all weights, or of each matrix, is zero."""
        magnitudes = [(w.detach() * m).abs() for w, m in zip(self._weights, self._masks(), strict=True)]
        together = _threshold(torch.cat([m.flatten() for m in magnitudes]), sparsity) if self.scope == "global" else None
        for mask, magnitude in zip(self._masks(), magnitudes, strict=True):
            mask.logical_and_(magnitude > (_threshold(magnitude.flatten(), sparsity) if together is None else together))

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the pruned weights in the model."""
        for weight, mask in zip(self._weights, self._masks(), strict=True):
            weight.mul_(mask)

    def total(self) -> int:
        """How many weights have a mask."""
        return sum(mask.numel() for mask in self._masks())

    def zeros(self) -> int:
        """How many of them are pruned."""
        return sum(int((~mask).sum()) for mask in self._masks())

    def _masks(self) -> list[Tensor]:
        return [self.get_buffer(f"mask{i}") for i in range(len(self._weights))]


def _threshold(magnitudes: Tensor, sparsity: float) -> Tensor:
    """The largest of the smallest ``sparsity`` share."""
    count = round(sparsity * magnitudes.numel())
    return magnitudes.kthvalue(count).values if count else magnitudes.new_tensor(-1.0)


def cubic_schedule(start: float, end: float, first: int, last: int) -> dict[int, float]:
    """Finished step → sparsity to prune to: from ``start`` before step ``first`` to ``end`` at step ``last``, steep first, flat later.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", equation 1.
    """
    every = max(1, (last - first) // _UPDATES)
    steps = [*range(first + every, last, every), last]
    return {step: end + (start - end) * (1 - (step - first) / max(1, last - first)) ** 3 for step in steps}
