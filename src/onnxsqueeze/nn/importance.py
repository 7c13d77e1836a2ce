"""What whole layers, hidden units and single weights are worth, asked of some training rows before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import losses, training
from onnxsqueeze.nn.batches import by_length, encode
from onnxsqueeze.nn.family import Family, layers
from onnxsqueeze.tasks.rows import spread

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from onnxsqueeze.stage import Context

_BATCH = 32


class Asked:
    """``count`` training rows that a model is asked about, in batches; ``loss`` is the task's, mean over all of them. ``folder`` has the tokenizer."""

    def __init__(self, model: PreTrainedModel, family: Family, folder: Path, context: Context, count: int, batch: int = _BATCH) -> None:
        if context.task.embeds:
            raise StageError(
                "rows are asked for the loss against their labels, and a model that embeds reads texts without labels",
                remedy="let nothing be chosen by it: `choose: even` (distill), `start: even` (share-layers), `importance: magnitude` (cluster-weights)",
            )
        examples = encode(folder, spread(context.train.rows, count), context.task.max_length)
        self._model, self._family, self._examples, self._regression = model, family, examples, context.task.kind == "regression"
        self._labels = torch.tensor(examples.labels, device=training.device())
        self._batches = by_length([len(row) for row in examples.encoded], batch)
        training.place(model)

    def losses(self) -> Iterator[tuple[Tensor, float]]:
        """The loss of each batch, and its share of the rows."""
        for rows in self._batches:
            logits = self._model(**training.inputs(self._family, self._examples, rows)).logits
            yield losses.task(logits, self._labels[rows], regression=self._regression), len(rows) / len(self._examples)

    def loss(self) -> float:
        """Over all rows, without gradients."""
        with torch.no_grad():
            return float(sum(float(value) * share for value, share in self.losses()))


def layers_to_keep(model: PreTrainedModel, family: Family, asked: Asked, count: int) -> tuple[int, ...]:
    """Indices of ``count`` layers: again and again the one goes without which the loss is least.

    Source: Peer et al. 2022, "Greedy-layer pruning", algorithm 1.
    """
    kept = tuple(range(len(layers(model, family))))
    while len(kept) > count:
        without = [tuple(i for i in kept if i != gone) for gone in kept]
        kept = min(without, key=lambda some: _loss_with(model, family, asked, some))
    return kept


def _loss_with(model: PreTrainedModel, family: Family, asked: Asked, kept: Sequence[int]) -> float:
    parent, _, name = f"{family.encoder}.{family.layers}".rpartition(".")
    every = layers(model, family)
    setattr(model.get_submodule(parent), name, nn.ModuleList([every[i] for i in kept]))
    try:
        return asked.loss()
    finally:
        setattr(model.get_submodule(parent), name, every)


def fisher(model: PreTrainedModel, names: Sequence[str], asked: Asked) -> dict[str, Tensor]:
    """Of each named weight, in its shape, the mean of (∂ loss / ∂ weight)² over the batches: of rows that come alone, the empirical Fisher information's diagonal.

    Source: Choi et al. 2017, "Towards the Limit of Network Quantization" (squared gradients as an alternative to second derivatives).
    """
    weights = [model.get_parameter(name) for name in names]
    found = [torch.zeros_like(weight) for weight in weights]
    for value, share in asked.losses():
        for total, gradient in zip(found, torch.autograd.grad(value, weights), strict=True):
            total.add_(gradient.square(), alpha=share)
    return dict(zip(names, found, strict=True))


def hidden_units(model: PreTrainedModel, asked: Asked) -> Tensor:
    """The importance of each hidden unit, ``[hidden]``: the mean of (∂ loss / ∂ factor)², where one factor stands on a unit behind every norm.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8 with gates.
    """
    width = int(model.config.hidden_size)
    found = torch.zeros(width)
    with _gated(model, width) as factor:
        for value, share in asked.losses():
            (gradient,) = torch.autograd.grad(value, factor)
            found += share * gradient.cpu().square()
    return found


@contextmanager
def _gated(model: PreTrainedModel, width: int) -> Iterator[Tensor]:
    """A factor of ones, ``[width]``, on the output of every norm of this width."""
    factor = torch.ones(width, device=training.device(), requires_grad=True)

    def gate(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001, a hook's arguments
        return output * factor

    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm) and module.normalized_shape == (width,)]
    hooks = [norm.register_forward_hook(gate) for norm in norms]
    try:
        yield factor
    finally:
        for hook in hooks:
            hook.remove()
