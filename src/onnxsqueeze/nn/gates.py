"""A factor on every head and every neuron while a model trains: 0 takes it out, and the loss's gradient by it says what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onnxsqueeze.nn import structure
from onnxsqueeze.nn.family import Family, layers

Kind = Literal["heads", "neurons"]
KINDS: tuple[Kind, ...] = ("heads", "neurons")
Kept = tuple[tuple[int, ...], ...]  # indices, one tuple a layer

_MEMORY = 0.95  # of the importance seen before, in each step: what twenty steps say counts


class Gates(nn.Module):
    """Masks on the heads and neurons of a model, and the importance of each.

    A head's factor stands before the attention's output matrix, a neuron's before the second matrix of the feed-forward. `watch` after each
    backward pass adds what the gradients say: importance is the mean of (∂ loss / ∂ factor)², a first-order Taylor estimate of the change in
    loss, squared. What is masked once stays masked. Masks and importances are buffers, so they travel with the training's checkpoint.
    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8 with gates; for heads Michel et al. 2019,
    "Are Sixteen Heads Really Better than One?".
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.shape = structure.of(model, family)
        self._factors: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        for i, layer in enumerate(layers(model, family)):
            for kind, count, path in (
                ("heads", self.shape.heads[i], family.attention[3]),
                ("neurons", self.shape.neurons[i], family.feed_forward[1]),
            ):
                self.register_buffer(f"{kind}{i}", torch.ones(count))
                self.register_buffer(f"{kind}{i}_importance", torch.zeros(count))
                width = self.shape.head_size if kind == "heads" else 1
                self._hooks.append(layer.get_submodule(path).register_forward_pre_hook(self._hook(f"{kind}{i}", width)))

    def _hook(self, name: str, width: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        def gate(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
            factor = self.get_buffer(name)
            if torch.is_grad_enabled() and self.training:
                factor = factor.detach().clone().requires_grad_()
                self._factors[name] = factor
            wide = factor.repeat_interleave(width) if width > 1 else factor
            return (given[0] * wide.to(given[0].dtype),)

        return gate

    def release(self) -> None:
        """Let the model go: it computes without masks again."""
        for hook in self._hooks:
            hook.remove()

    def watch(self) -> None:
        """Take in the gradients of the last backward pass."""
        for name, factor in self._factors.items():
            if factor.grad is not None:
                self.get_buffer(f"{name}_importance").mul_(_MEMORY).add_(factor.grad.float().square(), alpha=1 - _MEMORY)
        self._factors.clear()

    def importance(self, kind: Kind) -> list[Tensor]:
        """Of each layer's heads or neurons; what is masked has none: -inf."""
        found = []
        for i in range(len(self.shape.heads)):
            mask = self.get_buffer(f"{kind}{i}")
            found.append(self.get_buffer(f"{kind}{i}_importance").masked_fill(mask == 0, -math.inf).cpu())
        return found

    def keep(self, heads: Kept, neurons: Kept) -> None:
        """Mask all but these."""
        for kind, kept in (("heads", heads), ("neurons", neurons)):
            for i, units in enumerate(kept):
                mask = torch.zeros_like(self.get_buffer(f"{kind}{i}"))
                mask[list(units)] = 1.0
                self.get_buffer(f"{kind}{i}").mul_(mask)

    def kept(self, kind: Kind) -> Kept:
        """The units that are not masked."""
        return tuple(tuple(torch.nonzero(self.get_buffer(f"{kind}{i}")).flatten().tolist()) for i in range(len(self.shape.heads)))
