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
    Pruning", equation 4). By movement a pruned weight's sum goes on, with the value that it had, and it comes back with that where others become less
    important; what was zero before stays so. With ``pattern`` (n, m), of every m weights in a row of inputs only the n most important stay, and what is pruned are
    whole rows of m, for good: the share of them that has been thinned is sparsity · m ÷ (m - n). Masks, scores and values are buffers, so they travel with the training's checkpoint.
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
                self.register_buffer(f"value{i}", torch.zeros_like(weight))  # of what is pruned, as it was

    @torch.no_grad()
    def watch(self) -> None:
        """Take in the gradients of the last backward pass."""
        if self._criterion == "movement":
            for i, weight in enumerate(self._weights):
                if weight.grad is not None:
                    value = torch.where(self.get_buffer(f"mask{i}"), weight, self.get_buffer(f"value{i}"))
                    self.get_buffer(f"score{i}").sub_(value * weight.grad)

    @torch.no_grad()
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
                self._keep(i, importance > limit)

    def _importance(self, i: int) -> Tensor:
        """Of each weight; of one that cannot come back the least there is."""
        gone = ~self.get_buffer(f"mask{i}")
        if self._criterion == "magnitude":
            return self._weights[i].detach().abs().masked_fill(gone, 0.0)
        gone = gone if self._pattern else gone & (self.get_buffer(f"value{i}") == 0)
        return self.get_buffer(f"score{i}").masked_fill(gone, float("-inf"))

    def _keep(self, i: int, chosen: Tensor) -> None:
        """``chosen`` is the mask from now on."""
        mask, weight = self.get_buffer(f"mask{i}"), self._weights[i]
        if self._criterion == "movement":
            value = self.get_buffer(f"value{i}")
            value.copy_(torch.where(mask & ~chosen, weight, value))
            weight.copy_(torch.where(chosen & ~mask, value, weight))
        mask.copy_(chosen)

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
            self._keep(i, mask & (stay | ~thin[:, None]).reshape(mask.shape))

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
