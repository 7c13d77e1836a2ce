"""Layers of unequal shape: how many heads and neurons each has. transformers' classes know one number for all layers; this knows the others.

A checkpoint of unequal layers is the same state dict with smaller matrices, and in its config.json
``"onnxsqueeze": {"head_size": 32, "heads": [12, 7, …], "neurons": [1536, 640, …]}``, one element a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from onnxsqueeze.errors import ModelError
from onnxsqueeze.nn.family import Family, layers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG_FIELD = "onnxsqueeze"


@dataclass(frozen=True)
class Structure:
    """``heads`` and ``neurons`` hold one element a layer; a head is ``head_size`` units wide in query, key and value."""

    head_size: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """For config.json."""
        return {"head_size": self.head_size, "heads": list(self.heads), "neurons": list(self.neurons)}

    def of_layers(self, kept: Sequence[int]) -> Structure:
        """The same, of the layers with these indices."""
        return replace(self, heads=tuple(self.heads[i] for i in kept), neurons=tuple(self.neurons[i] for i in kept))


def stated(config: PretrainedConfig) -> Structure | None:
    """What config.json says of unequal layers; None where it says nothing, and transformers' own fields hold.

    Raises ModelError where it cannot be understood.
    """
    found = getattr(config, CONFIG_FIELD, None)
    if found is None:
        return None
    try:
        structure = Structure(int(found["head_size"]), tuple(map(int, found["heads"])), tuple(map(int, found["neurons"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f'config.json: {CONFIG_FIELD}: must be {{"head_size": n, "heads": [n, …], "neurons": [n, …]}}, got {found!r}',
            remedy="take config.json and weights from the same folder",
        ) from error
    deep = int(config.num_hidden_layers)
    if not len(structure.heads) == len(structure.neurons) == deep or min(structure.head_size, *structure.heads, *structure.neurons) < 1:
        raise ModelError(
            f"config.json: {CONFIG_FIELD}: must hold one number ≥ 1 for each of {deep} layers, got {found!r}",
            remedy="take config.json and weights from the same folder",
        )
    return structure


def of(model: nn.Module, family: Family) -> Structure:
    """The structure that a model has."""
    heads, neurons, size = [], [], 1
    for layer in layers(model, family):
        attention = layer.get_submodule(family.attention_core)
        count = int(getattr(attention, family.heads_attribute))
        heads.append(count)
        size = _linear(layer, family.attention[0]).out_features // count
        neurons.append(_linear(layer, family.feed_forward[0]).out_features)
    return Structure(size, tuple(heads), tuple(neurons))


def build(model: PreTrainedModel, family: Family, structure: Structure) -> None:
    """Give a freshly made model layers of these shapes; their weights are new and have no meaning until a state dict is loaded."""
    from torch import nn

    for layer, heads, neurons in zip(layers(model, family), structure.heads, structure.neurons, strict=True):
        inner = heads * structure.head_size
        for path in family.attention[:3]:
            _set(layer, path, nn.Linear(_linear(layer, path).in_features, inner))
        _set(layer, family.attention[3], nn.Linear(inner, _linear(layer, family.attention[3]).out_features))
        into, out = family.feed_forward
        _set(layer, into, nn.Linear(_linear(layer, into).in_features, neurons))
        _set(layer, out, nn.Linear(neurons, _linear(layer, out).out_features))
        _tell(layer, family, heads, structure.head_size)
    note(model, structure)


def shrink(model: PreTrainedModel, family: Family, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Take out of each layer all heads and neurons but those named (rising indices, one list a layer), and note what is left in the configuration."""
    import torch

    had = of(model, family)
    for layer, kept_heads, kept_neurons in zip(layers(model, family), heads, neurons, strict=True):
        units = torch.tensor([head * had.head_size + i for head in kept_heads for i in range(had.head_size)])
        for path in family.attention[:3]:
            _set(layer, path, _outputs(_linear(layer, path), units))
        _set(layer, family.attention[3], _inputs(_linear(layer, family.attention[3]), units))
        rows = torch.tensor(list(kept_neurons))
        into, out = family.feed_forward
        _set(layer, into, _outputs(_linear(layer, into), rows))
        _set(layer, out, _inputs(_linear(layer, out), rows))
        _tell(layer, family, len(kept_heads), had.head_size)
    note(model, Structure(had.head_size, tuple(map(len, heads)), tuple(map(len, neurons))))


def narrow(model: PreTrainedModel, family: Family, kept: Sequence[int]) -> None:
    """Take out of the hidden states all units but ``kept`` (rising indices): from embeddings, norms, every layer's inputs and outputs, and head.

    Heads and neurons keep their sizes.
    """
    import torch
    from torch import nn

    had, structure = int(model.config.hidden_size), of(model, family)
    units = torch.tensor(list(kept))
    inner = {id(_linear(layer, path)): "out" for layer in layers(model, family) for path in (*family.attention[:3], family.feed_forward[0])}
    inner |= {id(_linear(layer, path)): "in" for layer in layers(model, family) for path in (family.attention[3], family.feed_forward[1])}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and module.embedding_dim == had:
            _set(model, name, _columns(module, units))
        elif isinstance(module, nn.LayerNorm) and module.normalized_shape == (had,):
            _set(model, name, _norm(module, units))
        elif isinstance(module, nn.Linear):
            left = module.in_features == had and inner.get(id(module)) != "in"
            right = module.out_features == had and inner.get(id(module)) != "out" and name != family.head[-1]  # whose outputs are classes
            found = _inputs(module, units) if left else module
            _set(model, name, _outputs(found, units) if right else found)
    for field in ("hidden_size", "dim", "embedding_size"):
        if getattr(model.config, field, None) == had:
            setattr(model.config, field, len(units))
    model.config.num_attention_heads = math.gcd(
        len(units), model.config.num_attention_heads
    )  # transformers' classes insist that it divides
    note(model, structure)


def keep_layers(model: PreTrainedModel, family: Family, kept: Sequence[int]) -> None:
    """Drop every encoder layer whose index is not in ``kept``, in the model and in its configuration."""
    every, unequal = layers(model, family), stated(model.config)
    parent, _, name = f"{family.encoder}.{family.layers}".rpartition(".")
    setattr(model.get_submodule(parent), name, type(every)([every[i] for i in kept]))
    setattr(model.config, family.layers_field, len(kept))
    if unequal is not None:
        note(model, unequal.of_layers(kept))


def note(model: PreTrainedModel, structure: Structure) -> None:
    """Write a structure into the model's configuration."""
    setattr(model.config, CONFIG_FIELD, structure.to_json())


def _tell(layer: nn.Module, family: Family, heads: int, size: int) -> None:
    """Set what the attention module has noted of its own shape."""
    core = layer.get_submodule(family.attention_core)
    setattr(core, family.heads_attribute, heads)
    setattr(core, family.width_attribute, heads * size)
    core.attention_head_size = size  # type: ignore[assignment]  # a number, which a Module may hold


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    return cast("nn.Linear", layer.get_submodule(path))


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _outputs(old: nn.Linear, kept: Tensor) -> nn.Linear:
    return _like(old, old.weight[kept], None if old.bias is None else old.bias[kept])


def _inputs(old: nn.Linear, kept: Tensor) -> nn.Linear:
    return _like(old, old.weight[:, kept], old.bias)


def _like(old: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    import torch
    from torch import nn

    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return new.train(old.training)


def _columns(old: nn.Embedding, kept: Tensor) -> nn.Embedding:
    import torch
    from torch import nn

    new = nn.Embedding(old.num_embeddings, len(kept), padding_idx=old.padding_idx, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(old.weight[:, kept])
    return new.train(old.training)


def _norm(old: nn.LayerNorm, kept: Tensor) -> nn.LayerNorm:
    import torch
    from torch import nn

    new = nn.LayerNorm(len(kept), eps=old.eps, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(old.weight[kept])
        new.bias.copy_(old.bias[kept])
    return new.train(old.training)
