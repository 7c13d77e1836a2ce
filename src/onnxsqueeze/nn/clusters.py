"""Weighted k-means of a row's weights, and code books that are trained: a weight is a place in the book of its row, and the book's values learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnxsqueeze.nn.few_values import Replaced
from onnxsqueeze.nn.levels import codes, lloyd

_CUTS, _NEAR, _PASSES = 8, 16, 4  # cuts that are looked at a cluster; how many of them a boundary may move in a pass; passes
_AT_ONCE = 64  # rows, so that what is compared stays in the cache: twice as fast as all
_TINY = 1e-300
_LEAST = 1e-3  # of a row's mean: what a weight that the loss does not feel counts for


def k_means(values: Tensor, importance: Tensor, count: int) -> Tensor:
    """Sorted levels ``[rows, count]`` with the least sum of importance · (value - nearest level)², for ``values[rows, n]`` and ``importance[rows, n]`` ≥ 0.

    The optimum for rows of up to 16 weights. For longer ones the boundaries between clusters start where they lie for n → ∞, are improved all together by
    dynamic programming over the places around them, and then by Lloyd's algorithm: on rows of MiniLM within 1 % of the optimum for up to 32 values, 4 % for 64.

    Source: Choi et al. 2017, "Towards the Limit of Network Quantization" (Hessian-weighted k-means); Wang and Song 2011, "Ckmeans.1d.dp" (the optimum by
    dynamic programming); Panter and Dite 1951, "Quantization Distortion in Pulse-Count Modulation" (levels as dense as the cube root of the values' density).
    """
    parts = zip(torch.split(values, _AT_ONCE), torch.split(importance, _AT_ONCE), strict=True)
    return torch.cat([_k_means(*part, count) for part in parts])


def _k_means(values: Tensor, importance: Tensor, count: int) -> Tensor:
    ranked, order = values.detach().double().sort(dim=1)
    says = importance.detach().double().gather(1, order)
    cuts, boundaries = _start(ranked, says, count)
    sums = torch.stack([functional.pad(one.cumsum(1), (1, 0)) for one in (says, says * ranked, says * ranked.square())], 1)
    sums = sums.gather(2, cuts[:, None].expand(-1, 3, -1))
    for _ in range(_PASSES):
        before, boundaries = boundaries, _improved(sums, boundaries)
        if torch.equal(before, boundaries):
            break
    mass, first, _ = sums.gather(2, boundaries[:, None].expand(-1, 3, -1)).diff(dim=2).unbind(1)
    return lloyd(ranked, (first / mass.clamp_min(_TINY)).sort(dim=1).values, says).to(values.dtype)


def _start(ranked: Tensor, says: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where clusters may end, ``cuts[rows, M + 1]``, each as how many values lie before it, and ``boundaries[rows, count + 1]`` as places among the cuts."""
    rows, n = ranked.shape
    density = ranked.diff(dim=1).pow(2 / 3) * ((says[:, 1:] + says[:, :-1]) / 2).pow(1 / 3)  # a gap is 1 ÷ the density of values
    passed = functional.pad(density.cumsum(1), (1, 0))
    most = _CUTS * count

    def places(parts: int) -> Tensor:
        shares = torch.arange(1, parts, device=ranked.device, dtype=ranked.dtype) / parts
        inner = torch.searchsorted(passed, passed[:, -1:] * shares)
        return functional.pad(functional.pad(inner, (1, 0)), (0, 1), value=n)

    if n <= most or n <= _NEAR:
        return torch.arange(n + 1, device=ranked.device).expand(rows, -1), places(count)
    return places(most), torch.arange(0, most + 1, _CUTS, device=ranked.device).expand(rows, -1)


def _improved(sums: Tensor, boundaries: Tensor) -> Tensor:
    """The best of all boundaries that lie no further than `_NEAR` cuts from the given ones; ``sums[rows, 3, cuts]`` of what lies before each cut."""
    rows, last = len(sums), sums.shape[2] - 1
    near = torch.arange(-_NEAR, _NEAR + 1, device=sums.device)
    ends = [torch.zeros_like(boundaries[:, :1])]
    best, chosen = sums.new_zeros(rows, 1), []
    for inner in boundaries[:, 1:].unbind(1):
        ends.append((inner[:, None] + near).clamp(0, last) if len(ends) < boundaries.shape[1] - 1 else torch.full_like(ends[0], last))
        mass, first, second = _spread(sums, ends[-2], ends[-1]).unbind(1)
        off = second - first.square() / mass.clamp_min(_TINY)
        best, where = (best[:, :, None] + off.masked_fill(ends[-2][:, :, None] > ends[-1][:, None], torch.inf)).min(1)
        chosen.append(where)
    at, found = torch.zeros_like(boundaries[:, :1]), [ends[-1]]
    for where, end in zip(reversed(chosen), reversed(ends[:-1]), strict=True):
        at = where.gather(1, at)
        found.append(end.gather(1, at))
    return torch.cat(found[::-1], 1)


def _spread(sums: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Sums ``[rows, 3, starts, ends]`` of the clusters from every start to every end."""
    a, b = (sums.gather(2, one[:, None].expand(-1, 3, -1)) for one in (start, end))
    return b[:, :, None] - a[..., None]


class CodeBooks(Replaced):
    """While entered, every weight of the named matrices counts as the value of its row's code book that its code names; gradients reach the books.

    A value's gradient is the sum of its members' (Han et al. 2016, "Deep Compression", section 3). Books are found by `k_means` with ``importance`` by
    name. With ``keep_zeros`` zeros are a value of their own, which is not trained. With ``movable`` each weight's own gradient moves a free copy of it,
    from which `reassign` takes codes anew. Books, codes and free copies travel with the training's checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        bits: int | Sequence[int],
        importance: Mapping[str, Tensor],
        *,
        per_row: bool | Sequence[bool],
        keep_zeros: bool = False,
        movable: bool = False,
    ) -> None:
        super().__init__(model, names, per_row=per_row)
        self._keep_zeros, self._movable = keep_zeros, movable
        of_each = [bits] * len(names) if isinstance(bits, int) else bits
        for i, (name, weight, width) in enumerate(zip(names, self._weights(), of_each, strict=True)):
            rows, says = self._rows(i, weight.detach()), self._rows(i, importance[name])
            says = (says / says.mean(1, keepdim=True)).nan_to_num(1.0).clamp_min(_LEAST)
            says = says.masked_fill(rows == 0, 0.0) if keep_zeros else says
            self.register_parameter(f"book{i}", nn.Parameter(k_means(rows, says, 2**width - keep_zeros)))
            self.register_buffer(f"codes{i}", (rows != 0).to(torch.uint8))
            self._assign(i, rows)
            if movable:
                self.register_parameter(f"free{i}", nn.Parameter(rows.clone()))

    @torch.no_grad()
    def reassign(self) -> None:
        """Every weight gets the code of the value that its free copy is nearest to; zeros that are kept stay zero, and nothing else becomes one."""
        for i in range(len(self._names)):
            self._assign(i, self.get_parameter(f"free{i}"))

    @torch.no_grad()
    def write(self) -> None:
        """Make the model's weights what they count as."""
        for i, weight in enumerate(self._weights()):
            weight.copy_(self.value(i, weight))

    def value(self, i: int, weight: Tensor) -> Tensor:
        """From the book."""
        # a book for each row, also where all share one: the gradients of a whole matrix summed into a few places are a hundred times slower on a GPU
        found = self._book(i).expand(len(weight), -1).gather(1, self.get_buffer(f"codes{i}").long().reshape(weight.shape))
        if self._movable:
            free = self.get_parameter(f"free{i}").reshape(weight.shape)
            found = found + (free - free.detach())
        return found

    def _book(self, i: int) -> Tensor:
        book = self.get_parameter(f"book{i}")
        return functional.pad(book, (1, 0)) if self._keep_zeros else book

    def _assign(self, i: int, rows: Tensor) -> None:
        held, found = self.get_buffer(f"codes{i}"), codes(rows.detach(), self.get_parameter(f"book{i}").detach())
        held.copy_(torch.where(held == 0, 0, found + 1) if self._keep_zeros else found)
