"""Models that give a text a vector of length 1, where a classifier gives logits: an encoder without a head, and a pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family

OUTPUT = "sentence_embedding"  # sentence-transformers' name for it


class Embedder(nn.Module):
    """What `turn` makes of a classification model: its ``logits`` are the text's vector ``[batch, width]``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """As a classification model of transformers: its SequenceClassifierOutput.

        Source: Reimers and Gurevych 2019, "Sentence-BERT", section 3 (mean of the last states, or the first token's).
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        assert input_ids is not None  # noqa: S101  # an encoder cannot do without; the default is for those who name their inputs
        family, pooling = cast("tuple[Family, Literal['mean', 'first']]", self.embedder)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {"input_ids": input_ids, "attention_mask": mask}
        if family.token_types and token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        encoder = getattr(self, family.encoder)
        found = encoder(**given, output_hidden_states=output_hidden_states, output_attentions=output_attentions, return_dict=True)
        vectors = pooled(found.last_hidden_state, mask, pooling)
        return SequenceClassifierOutput(logits=vectors, hidden_states=found.hidden_states, attentions=found.attentions)  # type: ignore[arg-type]  # any tensor


def pooled(states: Tensor, mask: Tensor, pooling: Literal["mean", "first"]) -> Tensor:
    """Vectors of length 1, ``[batch, width]``, of the last states ``[batch, tokens, width]``; padding, where ``mask`` is 0, has no part in them."""
    if pooling == "first":
        return nn.functional.normalize(states[:, 0].float(), dim=1)
    weight = mask[:, :, None].to(torch.float32 if states.dtype != torch.float64 else states.dtype)
    return nn.functional.normalize((states.to(weight.dtype) * weight).sum(1) / weight.sum(1), dim=1)


def turn(model: PreTrainedModel, family: Family, pooling: Literal["mean", "first"]) -> None:
    """Take a classification model's head and pooler away; from now on its logits are vectors."""
    for path in family.head:
        setattr(model, path.split(".")[0], nn.Identity())
    for path in family.fresh:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    cls = type(model)
    changed = cast("Any", model)
    changed.__class__ = type(cls.__name__, (Embedder, cls), {})  # not an attribute: copies of the model must run themselves
    changed.embedder = (family, pooling)
