"""A factor on every head and every neuron while a model trains: 0 takes it out, and the loss's gradient by it says what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onnxsqueeze.nn import structure
from onnxsqueeze.nn.budget import Costs
from onnxsqueeze.nn.family import Family, layers

Kind = Literal["heads", "neurons"]
KINDS: tuple[Kind, ...] = ("heads", "neurons")
Kept = tuple[tuple[int, ...], ...]  # indices, one tuple a layer

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3  # of the hard concrete distribution; Louizos et al. 2018, section 4
_OPEN = 3.0  # the logit of a factor at the start: 97 % of the draws are above zero
_LOGIT_STEP = 0.05  # that a logit moves in a step at the full learning rate
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
            factor = self._factor(name)
            wide = factor.repeat_interleave(width) if width > 1 else factor
            return (given[0] * wide.to(given[0].dtype),)

        return gate

    def _factor(self, name: str) -> Tensor:
        factor = self.get_buffer(name)
        if torch.is_grad_enabled() and self.training:
            factor = factor.detach().clone().requires_grad_()
            self._factors[name] = factor
        return factor

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

    def penalty(self) -> Tensor | None:
        """What a training adds to its loss; None here, where importance is only watched."""
        return None

    def aims(self, share: float) -> bool:  # noqa: ARG002  # for those who override it
        """Whether the gates come to this share of their cost by themselves; else they must be told what to mask."""
        return False

    def settle(self) -> None:
        """The choice that is now made stays."""

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


class MagnitudeGates(Gates):
    """Importance is the mean square of all weights of a unit, what makes it and what reads it.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1 (sums of magnitudes there).
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__(model, family)
        self._layers = [
            tuple(layer.get_parameter(f"{path}.weight") for path in (*family.attention, *family.feed_forward))
            for layer in layers(model, family)
        ]

    def _factor(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def importance(self, kind: Kind) -> list[Tensor]:
        """As above; what is masked has none: -inf."""
        found = []
        for i, (query, key, value, output, into, out) in enumerate(self._layers):
            makes, reads = ((query, key, value), output) if kind == "heads" else ((into,), out)
            squares = torch.stack([weight.detach().square().mean(1) for weight in makes]).mean(0) + reads.detach().square().mean(0)
            mask = self.get_buffer(f"{kind}{i}")
            found.append(squares.reshape(len(mask), -1).mean(1).masked_fill(mask == 0, -math.inf).cpu())
        return found


class LearnedGates(Gates):
    """Importance is the probability that a unit's factor, which is learned with the weights, is not zero.

    Each factor is drawn anew in every step (hard concrete); `penalty` pulls the expected cost to ``goal`` with two multipliers that are learned against
    it. Source: Louizos et al. 2018, "Learning Sparse Neural Networks through L0
    Regularization", equations 10 to 13; Xia et al. 2022, "Structured Pruning Learns Compact and Accurate Models", section 3.1 (multipliers).
    """

    def __init__(self, model: nn.Module, family: Family, costs: Costs, learning_rate: float) -> None:
        super().__init__(model, family)
        self._costs, self._full = costs, costs.of(self.shape)
        self._scale = _LOGIT_STEP / learning_rate  # Adam moves a parameter by the learning rate, whatever its gradient
        self.register_buffer("goal", torch.ones(()))
        self.register_buffer("settled", torch.zeros(()))
        for kind in KINDS:
            for i, count in enumerate(getattr(self.shape, kind)):
                self.register_parameter(f"{kind}{i}_logit", self._learned(torch.full((count,), _OPEN)))
        self.linear, self.square = self._learned(torch.zeros(()), sign=-1), self._learned(torch.zeros(()), sign=-1)

    def _learned(self, start: Tensor, sign: int = 1) -> nn.Parameter:
        found = nn.Parameter(start / self._scale)
        found.register_hook(lambda gradient: sign * gradient / self._scale)  # type: ignore[no-untyped-call]  # as large as the logit's own, for the clipping of all
        return found

    def _logit(self, name: str) -> Tensor:
        return self.get_parameter(f"{name}_logit") * self._scale

    def _factor(self, name: str) -> Tensor:
        mask = self.get_buffer(name)
        if self.settled:
            return mask
        logit = self._logit(name)
        if torch.is_grad_enabled() and self.training:
            drawn = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = (drawn.log() - (1 - drawn).log() + logit) / _TEMPERATURE
        return ((_HIGH - _LOW) * logit.sigmoid() + _LOW).clamp(0, 1) * mask

    def _open(self, name: str) -> Tensor:
        """The probability of each factor to be above zero."""
        return (self._logit(name) - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid() * self.get_buffer(name)

    def penalty(self) -> Tensor | None:
        """The multipliers' product with how far the expected share of the cost is from the goal; None once the choice is made."""
        if self.settled:
            return None
        deep = range(len(self.shape.heads))
        heads, neurons = (torch.stack([self._open(f"{kind}{i}").sum() for i in deep]).sum() for kind in KINDS)
        expected = (self._costs.fixed + self._costs.head * heads + self._costs.neuron * neurons) / self._full
        off = expected - self.get_buffer("goal")
        return self.linear * self._scale * off + self.square * self._scale * off.square()

    def aims(self, share: float) -> bool:
        """They do: it is their goal from now on."""
        self.get_buffer("goal").fill_(share)
        return True

    def settle(self) -> None:
        """Every factor that is not masked is one from now on."""
        self.get_buffer("settled").fill_(1)

    def importance(self, kind: Kind) -> list[Tensor]:
        """As above; what is masked has none: -inf."""
        found = []
        for i in range(len(self.shape.heads)):
            mask = self.get_buffer(f"{kind}{i}")
            found.append(self._open(f"{kind}{i}").detach().masked_fill(mask == 0, -math.inf).cpu())
        return found
