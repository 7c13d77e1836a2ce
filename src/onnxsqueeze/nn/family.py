"""What an architecture looks like from outside: where its parts live and what it reads. One `Family` each, and nothing else knows these names.

A new architecture of the BERT kind is one more instance here; tests/test_nn_family.py checks it against a real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from onnxsqueeze.errors import ModelError, nearest

if TYPE_CHECKING:
    from torch import nn

WeightClass = Literal["embedding", "attention", "feed_forward"]


@dataclass(frozen=True)
class Family:
    """One architecture. Paths are attribute names joined by dots, as in ``state_dict`` keys."""

    model_type: str  # config.json's word for it
    classes: str  # prefix of its classes in transformers: <classes>Config, <classes>ForSequenceClassification
    encoder: str  # attribute of the classification model that holds the encoder
    words: str  # below the encoder: the module that holds the vocabulary matrix, one row a token
    positions: str  # below the encoder: the module that holds the table of positions
    layers: str  # below the encoder: the list of layers
    attention: tuple[str, ...]  # linear modules inside one layer: query, key, value, output
    feed_forward: tuple[str, ...]  # linear modules inside one layer: in, out
    head: tuple[str, ...]  # modules beside the encoder that only a classification checkpoint has
    fresh: tuple[str, ...]  # weights that a plain encoder checkpoint may lack: a pooler
    layers_field: str  # config's name for the number of layers
    attention_core: str  # inside one layer: the module that splits into heads, and notes in these two attributes …
    heads_attribute: str  # … how many
    width_attribute: str  # … and how wide all are together
    attention_dropout: str  # inside one layer: the module that drops attention probabilities
    token_types: bool  # whether it reads token_type_ids
    position_offset: int  # positions that no token uses: RoBERTa counts from padding_idx + 1

    def inputs(self) -> tuple[str, ...]:
        """Names of the model's inputs, in the order of its ONNX export."""
        return ("input_ids", "attention_mask", "token_type_ids") if self.token_types else ("input_ids", "attention_mask")

    @property
    def table_of_words(self) -> str:
        """Where the vocabulary matrix lives in a classification model."""
        return f"{self.encoder}.{self.words}"

    def max_tokens(self, config: Any) -> int:
        """The longest input, special tokens included, that has positions. ``config``: config.json's mapping, or transformers' object."""
        positions = config["max_position_embeddings"] if isinstance(config, Mapping) else config.max_position_embeddings
        return int(positions) - self.position_offset


_WORDS, _POSITIONS = "embeddings.word_embeddings", "embeddings.position_embeddings"
_BERT_ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_BERT_FEED_FORWARD = ("intermediate.dense", "output.dense")

BERT = Family(
    model_type="bert",
    classes="Bert",
    encoder="bert",
    words=_WORDS,
    positions=_POSITIONS,
    layers="encoder.layer",
    attention=_BERT_ATTENTION,
    feed_forward=_BERT_FEED_FORWARD,
    head=("classifier",),
    fresh=("bert.pooler",),
    layers_field="num_hidden_layers",
    attention_core="attention.self",
    heads_attribute="num_attention_heads",
    width_attribute="all_head_size",
    attention_dropout="attention.self.dropout",
    token_types=True,
    position_offset=0,
)
DISTILBERT = Family(
    model_type="distilbert",
    classes="DistilBert",
    encoder="distilbert",
    words=_WORDS,
    positions=_POSITIONS,
    layers="transformer.layer",
    attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    feed_forward=("ffn.lin1", "ffn.lin2"),
    head=("pre_classifier", "classifier"),
    fresh=(),
    layers_field="n_layers",
    attention_core="attention",
    heads_attribute="n_heads",
    width_attribute="dim",
    attention_dropout="attention.dropout",
    token_types=False,
    position_offset=0,
)
ROBERTA = Family(
    model_type="roberta",
    classes="Roberta",
    encoder="roberta",
    words=_WORDS,
    positions=_POSITIONS,
    layers="encoder.layer",
    attention=_BERT_ATTENTION,
    feed_forward=_BERT_FEED_FORWARD,
    head=("classifier.dense", "classifier.out_proj"),
    fresh=(),
    layers_field="num_hidden_layers",
    attention_core="attention.self",
    heads_attribute="num_attention_heads",
    width_attribute="all_head_size",
    attention_dropout="attention.self.dropout",
    token_types=False,
    position_offset=2,
)
ELECTRA = Family(
    model_type="electra",
    classes="Electra",
    encoder="electra",
    words=_WORDS,
    positions=_POSITIONS,
    layers="encoder.layer",
    attention=_BERT_ATTENTION,
    feed_forward=_BERT_FEED_FORWARD,
    head=("classifier.dense", "classifier.out_proj"),
    fresh=(),
    layers_field="num_hidden_layers",
    attention_core="attention.self",
    heads_attribute="num_attention_heads",
    width_attribute="all_head_size",
    attention_dropout="attention.self.dropout",
    token_types=True,
    position_offset=0,
)

FAMILIES = {family.model_type: family for family in (BERT, DISTILBERT, ROBERTA, ELECTRA)}


def family_of(model_type: str) -> Family:
    """The family that config.json calls ``model_type``.

    Raises ModelError for an unknown one, saying what would have to be written.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r}: unknown architecture{nearest(model_type, list(FAMILIES))}",
            remedy=f"take a model of one of {', '.join(FAMILIES)}, or describe this one: a Family in onnxsqueeze/nn/family.py "
            "(where its layers, attention, feed-forward and head live, and its inputs) and a builder in tests/models.py",
        )
    return FAMILIES[model_type]


def layers(model: nn.Module, family: Family) -> nn.ModuleList:
    """The list of encoder layers of a classification model, first to last; changing it changes the model."""
    found = model.get_submodule(f"{family.encoder}.{family.layers}")
    return cast("nn.ModuleList", found)  # get_submodule promises only a Module


def without_attention_dropout(model: nn.Module, family: Family) -> None:
    """Stop dropping attention probabilities, for losses that read them: the models return them as dropped."""
    for layer in layers(model, family):
        cast("nn.Dropout", layer.get_submodule(family.attention_dropout)).p = 0.0


def linear_weights(model: nn.Module, family: Family) -> dict[str, WeightClass]:
    """Name (as in ``state_dict``) → class of every weight matrix of the encoder layers, first layer first; of factors both, of shared layers the first."""
    names: dict[str, WeightClass] = {}
    seen: set[int] = set()
    kinds: tuple[tuple[WeightClass, tuple[str, ...]], ...] = (("attention", family.attention), ("feed_forward", family.feed_forward))
    for i, layer in enumerate(layers(model, family)):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        for kind, paths in kinds:
            for path in paths:
                stem = f"{family.encoder}.{family.layers}.{i}.{path}"
                inside = layer.get_submodule(path).named_parameters()
                names.update({f"{stem}.{name}": kind for name, parameter in inside if parameter.dim() > 1})
    return names


def embedding_weights(model: nn.Module, family: Family) -> dict[str, WeightClass]:
    """Name → "embedding" for the matrices of words, positions and token types."""
    return {
        name: "embedding"
        for name, weight in model.named_parameters()
        if name.startswith(f"{family.encoder}.embeddings.") and weight.dim() == 2
    }
