"""Several trainings of one start become one model: the average of those weights that are better together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Soup:
    """The averaged weights, the positions of the trainings that went in (the best alone first), and the score of the average."""

    weights: Weights
    members: tuple[int, ...]
    score: float


def greedy(trained: Sequence[Weights], scores: Sequence[float], score: Callable[[Weights], float]) -> Soup:
    """Begin with the best of ``trained`` (one of equals: the first); add each other one, the better first, where the average scores no less.

    ``scores`` are those of each alone, higher is better; tensors are on the CPU and of equal shapes.
    Source: Wortsman et al. 2022, "Model soups", recipe 1.
    """
    ranked = sorted(range(len(trained)), key=lambda i: (-scores[i], i))
    found = Soup(trained[ranked[0]], (ranked[0],), scores[ranked[0]])
    for i in ranked[1:]:
        members = (*found.members, i)
        together = average([trained[j] for j in members])
        reached = score(together)
        if reached >= found.score:
            found = Soup(together, members, reached)
    return found


def average(members: Sequence[Weights]) -> Weights:
    """The mean of each tensor of floats; others, such as positions, are the first one's."""
    return {
        name: sum((other[name] for other in members[1:]), first) / len(members) if first.is_floating_point() else first
        for name, first in members[0].items()
    }
