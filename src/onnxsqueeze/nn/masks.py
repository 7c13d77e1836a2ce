"""Which weights are pruned: masks that grow along a schedule, and stay on the weights after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Scope = Literal["global", "layer", "uniform"]
Criterion = Literal["magnitude", "movement"]
Curve = Literal["cubic", "linear", "once"]

_UPDATES = 50  # masks are drawn anew at most this often: a global threshold over millions of weights costs like a training step


class Masks(nn.Module):
    """A mask for each named weight of a model. `update` prunes the least important weights, `apply_` sets the pruned ones to zero.

    ``groups`` are lists of names: importances are compared within each. ``criterion``: "magnitude" is a weight's size; "movement" the sum of
    -weight · gradient over all steps that `watch` has seen, which is high where training moves a weight away from zero (Sanh et al. 2020, "Movement
    Pruning", equation 4; masked weights have no gradient here, so they never come back). With ``pattern`` (n, m), of every m weights in a row of inputs
    only the n most important stay, and what is pruned are whole rows of m: the share of them that has been thinned is sparsity · m ÷ (m - n).
    Masks and scores are buffers, so they travel with the training's checkpoint.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Sequence[str]], criterion: Criterion = "magnitude", pattern: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self._weights = [model.get_parameter(name) for group in groups for name in group]
        self._sizes, self._criterion, self._pattern = [len(group) for group in groups], criterion, pattern
        for i, weight in enumerate(self._weights):
            self.register_buffer(f"mask{i}", weight.detach() != 0)
            if criterion == "movement":
                self.register_buffer(f"score{i}", torch.zeros_like(weight))

    @torch.no_grad()
    def watch(self) -> None:
        """Take in the gradients of the last backward pass."""
        if self._criterion == "movement":
            for i, weight in enumerate(self._weights):
                if weight.grad is not None:
                    self.get_buffer(f"score{i}").sub_(weight * weight.grad)

    def update(self, sparsity: float) -> None:
        """Prune until ``sparsity`` (0-1) of the weights of each group is zero."""
        start = 0
        for size in self._sizes:
            group = range(start, start + size)
            start += size
            importances = [self._importance(i) for i in group]
            if self._pattern:
                self._thin(group, importances, sparsity, *self._pattern)
                continue
            limit = _threshold(torch.cat([importance.flatten() for importance in importances]), sparsity)
            for i, importance in zip(group, importances, strict=True):
                self.get_buffer(f"mask{i}").logical_and_(importance > limit)

    def _importance(self, i: int) -> Tensor:
        """Of each weight; of a pruned one the least there is."""
        found = self._weights[i].detach().abs() if self._criterion == "magnitude" else self.get_buffer(f"score{i}")
        least = 0.0 if self._criterion == "magnitude" else float("-inf")
        return found.masked_fill(~self.get_buffer(f"mask{i}"), least)

    def _thin(self, group: range, importances: Sequence[Tensor], sparsity: float, n: int, m: int) -> None:
        rows = [importance.reshape(-1, m) for importance in importances]
        keeps = [row.argsort(dim=1, descending=True, stable=True)[:, :n] for row in rows]
        lost = [_finite(row).sum(1) - _finite(row.gather(1, keep)).sum(1) for row, keep in zip(rows, keeps, strict=True)]
        count = round(sparsity * m / (m - n) * sum(map(len, lost)))
        chosen = torch.zeros(sum(map(len, lost)), dtype=torch.bool, device=lost[0].device)
        chosen[torch.cat(lost).argsort(stable=True)[:count]] = True
        for i, keep, thin in zip(group, keeps, torch.split(chosen, [len(part) for part in lost]), strict=True):
            mask = self.get_buffer(f"mask{i}")
            stay = torch.zeros_like(mask.reshape(-1, m)).scatter_(1, keep, value=True)
            mask.logical_and_((stay | ~thin[:, None]).reshape(mask.shape))

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the pruned weights in the model."""
        for i, weight in enumerate(self._weights):
            weight.mul_(self.get_buffer(f"mask{i}"))

    def total(self) -> int:
        """How many weights have a mask."""
        return sum(weight.numel() for weight in self._weights)

    def zeros(self) -> int:
        """How many of them are pruned."""
        return sum(int((~self.get_buffer(f"mask{i}")).sum()) for i in range(len(self._weights)))


def _finite(importance: Tensor) -> Tensor:
    return importance.clamp_min(torch.finfo(importance.dtype).min / 1e6)


def _threshold(importances: Tensor, sparsity: float) -> Tensor:
    """The largest of the smallest ``sparsity`` share."""
    count = round(sparsity * importances.numel())
    return importances.kthvalue(count).values if count else importances.new_tensor(float("-inf"))


def schedule(curve: Curve, start: float, end: float, first: int, last: int) -> dict[int, float]:
    """Finished step → sparsity to prune to: from ``start`` before step ``first`` to ``end`` at step ``last``.

    "cubic" is steep first and flat later (Zhu and Gupta 2017, "To prune, or not to prune", equation 1), "linear" as Movva et al. 2022, "once" all of it at ``last``.
    """
    if curve == "once":
        return {last: end}
    power = 3 if curve == "cubic" else 1
    every = max(1, (last - first) // _UPDATES)
    steps = [*range(first + every, last, every), last]
    return {step: end + (start - end) * (1 - (step - first) / max(1, last - first)) ** power for step in steps}
