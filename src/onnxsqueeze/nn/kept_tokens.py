"""Fewer tokens behind some layers: those stay that the first token attends to most, which is what the head reads.

Works by hooks on transformers' own layers, so it trains, saves and exports like any model; in the .onnx it is a TopK and a Gather.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onnxsqueeze.nn import structure
from onnxsqueeze.nn.family import Family, layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = tuple[tuple[int, int], ...]  # (layer, percent of the tokens that reach it which go on behind it)

_FIRST = 2.0  # above every share of attention: the first token always stays, and stays first
_ATTRIBUTE = "kept_tokens"


class KeptTokens:
    """What the hooks of one model share during a forward pass."""

    def __init__(self, model: PreTrainedModel, family: Family, kept: Kept) -> None:
        self.kept, self._family = kept, family
        self._mask: Tensor | None = None  # of the tokens that are left, [batch, tokens], 1: real
        self._dropped = False
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        share = dict(kept)
        for i, layer in enumerate(layers(model, family)):
            layer.register_forward_pre_hook(self._narrowed)
            if i in share:
                layer.register_forward_hook(self._drop(share[i]))

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._mask, self._dropped = kwargs.get("attention_mask", args[1] if len(args) > 1 else None), False

    def _narrowed(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The mask of the tokens that are left, in the form in which the layer would have got the whole one."""
        if not self._dropped:
            return None
        assert self._mask is not None  # noqa: S101  # `_drop` has set it
        states = args[0]
        mask = ((1 - self._mask.to(states.dtype)) * torch.finfo(states.dtype).min)[:, None, None, :]
        return (states, mask, *args[2:])

    def _drop(self, percent: int) -> Any:
        def drop(layer: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
            place = next(i for i, part in enumerate(output) if part.dim() == 3)  # [batch, tokens, hidden]
            states: Tensor = output[place]
            mask = torch.ones_like(states[..., 0]) if self._mask is None else self._mask
            attended = self._attended(layer, args[0], mask)
            tokens = states.shape[1]
            count = (tokens * percent + 99) // 100
            chosen = attended.topk(
                count, dim=1
            ).indices  # the first token first, the others by what they are worth: nothing behind reads their order
            rows = torch.arange(states.shape[0], device=states.device)[:, None] * tokens
            flat = (chosen + rows).flatten()
            left = states.flatten(0, 1).index_select(0, flat).view(states.shape[0], -1, states.shape[2])
            self._mask, self._dropped = mask.flatten().index_select(0, flat).view(states.shape[0], -1), True
            return (*output[:place], left, *output[place + 1 :])

        return drop

    def _attended(self, layer: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
        """How much the first token attends to each, ``[batch, tokens]``, the mean over the layer's heads; padding less than any."""
        heads = int(getattr(layer.get_submodule(self._family.attention_core), self._family.heads_attribute))
        query = structure.matrix(layer, self._family.attention[0])(states[:, :1])
        key = structure.matrix(layer, self._family.attention[1])(states)
        width = key.shape[2] // heads
        split = [part.view(part.shape[0], -1, heads, width).transpose(1, 2) for part in (query, key)]
        scores = (split[0] @ split[1].transpose(2, 3)).float()[:, :, 0] / width**0.5
        shares = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(torch.float32).min).softmax(-1).mean(1)
        shares = shares.masked_fill(mask == 0, -1.0)
        return torch.cat([torch.full_like(shares[:, :1], _FIRST), shares[:, 1:]], 1)


def attach(model: PreTrainedModel, family: Family, kept: Sequence[tuple[int, int]]) -> None:
    """From now on the model drops tokens behind these layers."""
    object.__setattr__(model, _ATTRIBUTE, KeptTokens(model, family, tuple(kept)))


def of(model: nn.Module) -> Kept:
    """Behind which layers the model drops tokens, and how many of a hundred stay."""
    found = getattr(model, _ATTRIBUTE, None)
    return found.kept if isinstance(found, KeptTokens) else ()
