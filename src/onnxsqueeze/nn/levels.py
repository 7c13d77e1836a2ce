"""Few values for many weights: the levels that lie nearest to a row's weights in the least squares, and weights moved onto them while training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from onnxsqueeze.nn.few_values import Replaced

Method = Literal["binary-greedy", "binary", "ternary", "code-book"]

_LLOYD, _ALTERNATIONS = 20, 10


def levels(weight: Tensor, method: Method, bits: int) -> Tensor:
    """Sorted levels ``[rows, L]`` for each row of ``weight[rows, n]``; L is 3 for "ternary", else 2 ** ``bits``.

    "binary-greedy": sums of ± one scale a bit, each scale the mean size of what the ones before left over (Guo et al. 2017, "Network Sketching", algorithm 1).
    "binary": the same, scales and signs improved in turns, each by least squares (Xu et al. 2018, "Alternating Multi-bit Quantization", section 3).
    "ternary": 0 and ± one scale, the least-squares optimum over all thresholds (Li et al. 2016, "Ternary Weight Networks", equation 5, by sorting).
    "code-book": any values, by Lloyd's algorithm from quantiles (Lloyd 1982).
    """
    values = weight.detach().float()
    if method == "ternary":
        return _ternary(values)
    if method == "code-book":
        return _code_book(values, 2**bits)
    return _binary(values, bits, alternations=0 if method == "binary-greedy" else _ALTERNATIONS)


def nearest(weight: Tensor, sorted_levels: Tensor) -> Tensor:
    """Each weight of ``[rows, n]`` on the nearest level of its row ``[rows, L]``; half way goes down."""
    middles = (sorted_levels[:, 1:] + sorted_levels[:, :-1]) / 2
    return sorted_levels.gather(1, torch.searchsorted(middles.contiguous(), weight.detach().float().contiguous()))


def _ternary(values: Tensor) -> Tensor:
    sizes = values.abs().sort(dim=1, descending=True).values
    total = sizes.cumsum(1)
    count = torch.arange(1, sizes.shape[1] + 1, device=sizes.device)
    best = (total.square() / count).argmax(1, keepdim=True)  # what is left out is the sum of squares less this
    scale = total.gather(1, best) / (best + 1)
    return torch.cat([-scale, torch.zeros_like(scale), scale], 1)


def _binary(values: Tensor, bits: int, alternations: int) -> Tensor:
    left, scales = values, []
    for _ in range(bits):
        scales.append(left.abs().mean(1))
        left = left - scales[-1][:, None] * torch.where(left < 0, -1.0, 1.0)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), device=values.device)  # [L, bits]
    scale = torch.stack(scales, 1)  # [rows, bits]
    for _ in range(alternations):
        chosen = signs[codes(values, scale @ signs.T)]  # [rows, n, bits]
        gram = chosen.transpose(1, 2) @ chosen + 1e-6 * torch.eye(bits, device=values.device)
        scale = torch.linalg.solve(gram, (chosen.transpose(1, 2) @ values[:, :, None]))[:, :, 0]
    return (scale @ signs.T).sort(dim=1).values


def codes(values: Tensor, every: Tensor) -> Tensor:
    """Of each value of ``[rows, n]`` the index of the nearest of its row's levels ``every[rows, L]``, which need no order."""
    order = every.argsort(dim=1)
    ranked = every.gather(1, order)
    middles = (ranked[:, 1:] + ranked[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(middles.contiguous(), values.contiguous()))


def _code_book(values: Tensor, count: int) -> Tensor:
    at = (torch.arange(count, device=values.device) + 0.5) / count
    ranked = values.sort(dim=1).values
    book = ranked[:, (at * values.shape[1]).long().clamp_max(values.shape[1] - 1)].clone()
    return lloyd(values, book, torch.ones_like(values))


def lloyd(values: Tensor, book: Tensor, importance: Tensor) -> Tensor:
    """A sorted ``book[rows, L]`` after some rounds of Lloyd's algorithm on ``values[rows, n]``: every level in the weighted mean of what it is nearest to."""
    for _ in range(_LLOYD):
        middles = ((book[:, 1:] + book[:, :-1]) / 2).contiguous()
        places = torch.searchsorted(middles, values.contiguous())
        sums = torch.zeros_like(book).scatter_add_(1, places, values * importance)
        mass = torch.zeros_like(book).scatter_add_(1, places, importance)
        book = torch.where(mass > 0, sums / mass, book).sort(dim=1).values
    return book


class OnLevels(Replaced):
    """While entered, the named matrices of a model count as what they are nearest to; gradients reach the weights behind as if nothing was moved.

    `renew` takes new levels from the weights as they are; they are buffers, so they travel with the training's checkpoint. `settle` moves the weights
    for good. Source of the gradient: Courbariaux et al. 2015, "BinaryConnect" (straight through).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], method: Method, bits: int, *, per_row: bool | Sequence[bool]) -> None:
        super().__init__(model, names, per_row=per_row)
        self._method, self._bits = method, bits
        for i, weight in enumerate(self._weights()):
            self.register_buffer(f"levels{i}", levels(self._rows(i, weight), method, bits))

    @torch.no_grad()
    def renew(self) -> None:
        """Levels of the weights as they are now."""
        for i, weight in enumerate(self._weights()):
            self.get_buffer(f"levels{i}").copy_(levels(self._rows(i, weight), self._method, self._bits))

    @torch.no_grad()
    def settle(self) -> None:
        """Move every weight onto the levels that the weights have now."""
        self.renew()
        for i, weight in enumerate(self._weights()):
            weight.copy_(self._moved(i, weight))

    def value(self, i: int, weight: Tensor) -> Tensor:
        """Every weight on the nearest level."""
        return weight + (self._moved(i, weight) - weight).detach()

    def _moved(self, i: int, weight: Tensor) -> Tensor:
        return nearest(self._rows(i, weight), self.get_buffer(f"levels{i}")).reshape(weight.shape).to(weight.dtype)
