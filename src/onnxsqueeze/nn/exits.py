"""Heads after earlier layers, which say what the last one says as soon as they are sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from onnxsqueeze.nn import training
from onnxsqueeze.nn.batches import Examples, by_length
from onnxsqueeze.nn.family import Family

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

_BATCH = 64
ATTRIBUTE = "exits"  # of a model that has some: a ModuleDict, by the index of the layer


class ExitHead(nn.Module):
    """Logits from the first token's state behind a layer: a dense layer of the same width, tanh, the classes."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)

    def forward(self, states: Tensor) -> Tensor:
        """``[batch, tokens, hidden]`` → ``[batch, outputs]``."""
        return cast("Tensor", self.out(torch.tanh(self.dense(states[:, 0]))))


def attach(model: PreTrainedModel, after: Sequence[int], seed: int | None = None) -> None:
    """Give the model new heads after these layers; drawn from ``seed`` where it is given, else without meaning until a state dict is loaded."""
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        heads = {str(i): ExitHead(int(model.config.hidden_size), int(model.config.num_labels)) for i in after}
    model.add_module(ATTRIBUTE, nn.ModuleDict(heads))


def after(model: nn.Module) -> tuple[int, ...]:
    """The layers behind which the model has exit heads."""
    found = getattr(model, ATTRIBUTE, None)
    return () if found is None else tuple(int(name) for name in cast("nn.ModuleDict", found))


def of(model: PreTrainedModel, hidden_states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits ``[batch, outputs]`` of each exit, from the first layer to the last; ``hidden_states`` are transformers', the embeddings' first."""
    heads = cast("nn.ModuleDict", getattr(model, ATTRIBUTE))
    return tuple(head(hidden_states[int(name) + 1]) for name, head in heads.items())


def every(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits ``[batch, outputs]``: the model's own first, then those of each exit."""
    found = model(**inputs, output_hidden_states=True)
    return (found.logits, *of(model, found.hidden_states))


def predict(model: PreTrainedModel, family: Family, examples: Examples) -> list[NDArray[np.float32]]:
    """Of each head as in `every` its logits ``[rows, outputs]`` in the rows' order, in evaluation mode. The model must be on the training device."""
    was_training = model.training
    model.train(mode=False)
    order = by_length([len(row) for row in examples.encoded], _BATCH)
    with torch.inference_mode():
        parts = [tuple(logits.float().cpu() for logits in every(model, training.inputs(family, examples, rows))) for rows in order]
    model.train(was_training)
    back = np.argsort(np.concatenate([np.array(rows) for rows in order]))
    return [torch.cat(head).numpy()[back] for head in zip(*parts, strict=True)]


def names(model: nn.Module) -> list[str]:
    """Names of the exported outputs behind the logits."""
    return [f"logits_after_{i}" for i in after(model)]
