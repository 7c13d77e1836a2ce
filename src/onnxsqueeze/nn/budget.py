"""Which heads and neurons stay, where their importance and what each costs are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxsqueeze.nn.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor

    from onnxsqueeze.nn.gates import Kept


@dataclass(frozen=True)
class Costs:
    """What a head and a neuron cost, and what is left without any (``fixed``): weights, multiply-adds, or milliseconds."""

    head: float
    neuron: float
    fixed: float = 0.0

    def of(self, shape: Structure) -> float:
        """The cost of all layers."""
        return self.fixed + self.head * sum(shape.heads) + self.neuron * sum(shape.neurons)


def parameters(hidden: int, head_size: int) -> Costs:
    """Weights of the layers' matrices, biases included; norms are not counted, since no budget changes them."""
    return Costs(head=4 * hidden * head_size + 3 * head_size, neuron=2 * hidden + 1)


def multiply_adds(hidden: int, head_size: int, tokens: int) -> Costs:
    """Of one row of ``tokens``: the layers' matrices, and the attention's products of queries, keys and values."""
    return Costs(head=tokens * 4 * hidden * head_size + 2 * tokens**2 * head_size, neuron=tokens * 2 * hidden)


def choose(heads: Sequence[Tensor], neurons: Sequence[Tensor], costs: Costs, limit: float, multiple: int) -> tuple[Kept, Kept]:
    """(heads, neurons) to keep, indices per layer, so that their cost is ``limit`` at most, where what the layers must keep allows that.

    ``heads`` and ``neurons`` hold the importance of each unit, one tensor a layer; -inf: it is gone already. Units go by importance ÷ cost, the
    least first; neurons in groups of ``multiple``, the least important of a layer together, so that products keep widths that kernels like.
    Every layer keeps a head and a group of neurons.
    """
    removals: list[tuple[float, str, int, tuple[int, ...]]] = []
    kept: dict[tuple[str, int], set[int]] = {}
    spent = costs.fixed
    for kind, layers, size, cost in (("heads", heads, 1, costs.head), ("neurons", neurons, multiple, costs.neuron)):
        for i, importance in enumerate(layers):
            order = importance.argsort(stable=True).tolist()
            alive = [unit for unit in order if importance[unit] > float("-inf")]
            kept[kind, i] = set(alive)
            spent += cost * len(alive)
            odd = len(alive) % size  # the first group makes what is left a multiple
            groups = [alive[:odd]] if odd else []
            groups += [alive[start : start + size] for start in range(odd, len(alive), size)]
            removals += [(float(importance[group].mean()) / cost, kind, i, tuple(group)) for group in groups[:-1]]
    for _, kind, i, group in sorted(removals):
        if spent <= limit:
            break
        kept[kind, i] -= set(group)
        spent -= len(group) * (costs.head if kind == "heads" else costs.neuron)
    chosen = {key: tuple(sorted(units)) for key, units in kept.items()}
    return tuple(chosen["heads", i] for i in range(len(heads))), tuple(chosen["neurons", i] for i in range(len(neurons)))
