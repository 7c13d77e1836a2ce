"""Layers of unequal shape: how many heads and neurons each has, and which matrices are factored.

transformers' classes know one shape for all layers; this knows the others. A checkpoint of unequal layers is the same state dict with other matrices,
and in its config.json, one element a layer (the last five only where there is something of the kind):

    "onnxsqueeze": {"head_size": 32, "heads": [12, 7, …], "neurons": [1536, 640, …],
                    "ranks": [{"output.dense": 64}, {}, …], "vocabulary_rank": 128, "shared": [0, 0, 2, …], "exits": [1, 3], "kept_tokens": [[1, 60]]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from onnxsqueeze.errors import ModelError, StageError
from onnxsqueeze.nn.family import Family, layers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from onnxsqueeze.nn.factors import FactoredLinear

    Matrix = nn.Linear | FactoredLinear

CONFIG_FIELD = "onnxsqueeze"
# What a model may have that not every stage can work on, and the stage that makes it.
_BREAKS = {
    "shared": ("has layers that stand in several places", "share-layers"),
    "exits": ("has exits", "early-exit"),
    "kept_tokens": ("drops tokens", "drop-tokens"),
}


@dataclass(frozen=True)
class Structure:
    """``heads`` and ``neurons`` hold one element a layer; a head is ``head_size`` units wide in query, key and value.

    ``ranks`` holds, per layer, the rank of each matrix that is two factors, by its path in the layer; ``vocabulary_rank`` that of the table of words.
    ``shared`` holds, per layer, the index of the first layer that is the very same module: its own, where it shares nothing before it. ``exits`` are the
    layers behind which a head stands, ``kept_tokens`` those behind which tokens are dropped, with the percent that go on.
    """

    head_size: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    ranks: tuple[Mapping[str, int], ...] = ()
    vocabulary_rank: int | None = None
    shared: tuple[int, ...] = ()
    exits: tuple[int, ...] = ()
    kept_tokens: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple({} for _ in self.heads))
        if not self.shared:
            object.__setattr__(self, "shared", tuple(range(len(self.heads))))

    def to_json(self) -> dict[str, Any]:
        """For config.json."""
        found: dict[str, Any] = {"head_size": self.head_size, "heads": list(self.heads), "neurons": list(self.neurons)}
        if any(self.ranks):
            found["ranks"] = [dict(ranks) for ranks in self.ranks]
        if self.vocabulary_rank is not None:
            found["vocabulary_rank"] = self.vocabulary_rank
        if self.shares:
            found["shared"] = list(self.shared)
        if self.exits:
            found["exits"] = list(self.exits)
        return found | {"kept_tokens": [list(pair) for pair in self.kept_tokens]} if self.kept_tokens else found

    @property
    def shares(self) -> bool:
        """Whether a layer stands in more than one place."""
        return self.shared != tuple(range(len(self.heads)))

    def of_layers(self, kept: Sequence[int]) -> Structure:
        """The same, of the layers with these indices."""
        return replace(
            self,
            heads=tuple(self.heads[i] for i in kept),
            neurons=tuple(self.neurons[i] for i in kept),
            ranks=tuple(self.ranks[i] for i in kept),
            shared=tuple(next(j for j, other in enumerate(kept) if self.shared[other] == self.shared[i]) for i in kept),
        )


def stated(config: PretrainedConfig) -> Structure | None:
    """What config.json says of unequal layers; None where it says nothing, and transformers' own fields hold.

    Raises ModelError where it cannot be understood.
    """
    found = getattr(config, CONFIG_FIELD, None)
    if found is None:
        return None
    remedy = "take config.json and weights from the same folder"
    try:
        rank = found.get("vocabulary_rank")
        structure = Structure(
            int(found["head_size"]),
            tuple(map(int, found["heads"])),
            tuple(map(int, found["neurons"])),
            tuple({str(path): int(n) for path, n in ranks.items()} for ranks in found.get("ranks") or [{} for _ in found["heads"]]),
            None if rank is None else int(rank),
            tuple(map(int, found.get("shared") or ())),
            tuple(map(int, found.get("exits") or ())),
            tuple((int(layer), int(percent)) for layer, percent in found.get("kept_tokens") or ()),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f'config.json: {CONFIG_FIELD}: must be {{"head_size": n, "heads": [n, …], "neurons": [n, …], "ranks": [{{…}}, …]}}, got {found!r}',
            remedy=remedy,
        ) from error
    deep = int(config.num_hidden_layers)
    numbers = (structure.head_size, *structure.heads, *structure.neurons, *(n for ranks in structure.ranks for n in ranks.values()))
    lengths = {len(structure.heads), len(structure.neurons), len(structure.ranks), len(structure.shared), deep}
    forward = any(first > i or structure.shared[first] != first for i, first in enumerate(structure.shared) if first < deep)
    outside = any(not 0 <= i < deep - 1 for i in (*structure.exits, *(layer for layer, _ in structure.kept_tokens)))
    if len(lengths) > 1 or min(numbers) < 1 or min(structure.shared) < 0 or forward or outside:
        raise ModelError(f"config.json: {CONFIG_FIELD}: must hold one number ≥ 1 for each of {deep} layers, got {found!r}", remedy=remedy)
    return structure


def of(model: nn.Module, family: Family) -> Structure:
    """The structure that a model has."""
    from onnxsqueeze.nn import exits, kept_tokens
    from onnxsqueeze.nn.factors import FactoredEmbedding, FactoredLinear

    heads, neurons, ranks, size = [], [], [], 1
    for layer in layers(model, family):
        count = int(getattr(layer.get_submodule(family.attention_core), family.heads_attribute))
        heads.append(count)
        size = matrix(layer, family.attention[0]).out_features // count
        neurons.append(matrix(layer, family.feed_forward[0]).out_features)
        found = ((path, matrix(layer, path)) for path in (*family.attention, *family.feed_forward))
        ranks.append({path: module.rank for path, module in found if isinstance(module, FactoredLinear)})
    words = model.get_submodule(family.table_of_words)
    first: dict[int, int] = {}
    shared = tuple(first.setdefault(id(layer), i) for i, layer in enumerate(layers(model, family)))
    rank = words.rank if isinstance(words, FactoredEmbedding) else None
    return Structure(size, tuple(heads), tuple(neurons), tuple(ranks), rank, shared, exits.after(model), kept_tokens.of(model))


def build(model: PreTrainedModel, family: Family, structure: Structure) -> None:
    """Give a freshly made model layers of these shapes; their weights are new and have no meaning until a state dict is loaded."""
    from torch import nn

    from onnxsqueeze.nn import exits, kept_tokens
    from onnxsqueeze.nn.factors import FactoredEmbedding, FactoredLinear

    for layer, heads, neurons, ranks in zip(layers(model, family), structure.heads, structure.neurons, structure.ranks, strict=True):
        inner, width = heads * structure.head_size, matrix(layer, family.attention[0]).in_features
        into, out = family.feed_forward
        shapes = dict.fromkeys(family.attention[:3], (width, inner))
        shapes |= {family.attention[3]: (inner, width), into: (width, neurons), out: (neurons, width)}
        for path, (before, after) in shapes.items():
            replace_module(layer, path, FactoredLinear(before, after, ranks[path]) if path in ranks else nn.Linear(before, after))
        _tell(layer, family, heads, structure.head_size)
    share(model, family, structure.shared)
    if structure.vocabulary_rank is not None:
        words = cast("nn.Embedding", model.get_submodule(family.table_of_words))
        table = FactoredEmbedding(words.num_embeddings, words.embedding_dim, structure.vocabulary_rank, words.padding_idx)
        replace_module(model, family.table_of_words, table)
    if structure.exits:
        exits.attach(model, structure.exits)
    if structure.kept_tokens:
        kept_tokens.attach(model, family, structure.kept_tokens)
    note(model, structure)


def require_none(model: nn.Module, family: Family, name: str, *of_these: Literal["shared", "exits", "kept_tokens"]) -> None:
    """Raise StageError, for the stage ``name``, where the model has what that stage would break."""
    found = of(model, family)
    there = {"shared": found.shares, "exits": bool(found.exits), "kept_tokens": bool(found.kept_tokens)}
    for kind in of_these:
        if there[kind]:
            what, stage = _BREAKS[kind]
            raise StageError(f"{name}: the parent {what}", remedy=f"put {stage} behind this stage")


def share(model: PreTrainedModel, family: Family, shared: Sequence[int]) -> None:
    """Put the very same layer into several places: into place i the one that stands in place ``shared[i]``; note it in the configuration."""
    every = layers(model, family)
    for i, first in enumerate(shared):
        every[i] = every[first]
    note(model, of(model, family))


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with each tensor once, by its first name."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def shrink(model: PreTrainedModel, family: Family, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Take out of each layer all heads and neurons but those named (rising indices, one list a layer), and note what is left in the configuration."""
    import torch

    had = of(model, family)
    for layer, kept_heads, kept_neurons in zip(layers(model, family), heads, neurons, strict=True):
        units = torch.tensor([head * had.head_size + i for head in kept_heads for i in range(had.head_size)])
        for path in family.attention[:3]:
            replace_module(layer, path, _outputs(matrix(layer, path), units))
        replace_module(layer, family.attention[3], _inputs(matrix(layer, family.attention[3]), units))
        rows = torch.tensor(list(kept_neurons))
        into, out = family.feed_forward
        replace_module(layer, into, _outputs(matrix(layer, into), rows))
        replace_module(layer, out, _inputs(matrix(layer, out), rows))
        _tell(layer, family, len(kept_heads), had.head_size)
    note(model, of(model, family))


def narrow(model: PreTrainedModel, family: Family, kept: Sequence[int]) -> None:
    """Take out of the hidden states all units but ``kept`` (rising indices): from embeddings, norms, every layer's inputs and outputs, and head.

    Heads and neurons keep their sizes.
    """
    import torch
    from torch import nn

    from onnxsqueeze.nn.factors import FactoredEmbedding, FactoredLinear

    had = int(model.config.hidden_size)
    units = torch.tensor(list(kept))
    inner = {id(matrix(layer, path)): "out" for layer in layers(model, family) for path in (*family.attention[:3], family.feed_forward[0])}
    inner |= {id(matrix(layer, path)): "in" for layer in layers(model, family) for path in (family.attention[3], family.feed_forward[1])}
    whole: list[str] = []  # what is done with all that it holds
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{done}.") for done in whole):
            continue
        if isinstance(module, FactoredEmbedding):
            whole.append(name)
            if module.up.out_features == had:
                module.up = _outputs(module.up, units)
        elif isinstance(module, nn.Embedding) and module.embedding_dim == had:
            replace_module(model, name, _columns(module, units))
        elif isinstance(module, nn.LayerNorm) and module.normalized_shape == (had,):
            replace_module(model, name, _norm(module, units))
        elif isinstance(module, nn.Linear | FactoredLinear):
            whole.append(name)
            left = module.in_features == had and inner.get(id(module)) != "in"
            right = module.out_features == had and inner.get(id(module)) != "out" and name != family.head[-1]  # whose outputs are classes
            found = _inputs(module, units) if left else module
            replace_module(model, name, _outputs(found, units) if right else found)
    for field in ("hidden_size", "dim", "embedding_size"):
        if getattr(model.config, field, None) == had:
            setattr(model.config, field, len(units))
    model.config.num_attention_heads = math.gcd(
        len(units), model.config.num_attention_heads
    )  # transformers' classes insist that it divides
    note(model, of(model, family))


def keep_layers(model: PreTrainedModel, family: Family, kept: Sequence[int]) -> None:
    """Drop every encoder layer whose index is not in ``kept``, in the model and in its configuration."""
    every, unequal = layers(model, family), stated(model.config)
    parent, _, name = f"{family.encoder}.{family.layers}".rpartition(".")
    setattr(model.get_submodule(parent), name, type(every)([every[i] for i in kept]))
    setattr(model.config, family.layers_field, len(kept))
    if unequal is not None:
        note(model, unequal.of_layers(kept))


def evenly(wanted: int, available: int) -> tuple[int, ...]:
    """Indices of ``wanted`` layers: the last of each of as many equal parts, so that the top one is always among them.

    Source: the uniform mapping of Jiao et al. 2020, "TinyBERT", section 4.3, rounded up where the parts are not whole.
    """
    return tuple(-(-(i + 1) * available // wanted) - 1 for i in range(wanted))


def note(model: PreTrainedModel, structure: Structure) -> None:
    """Write a structure into the model's configuration."""
    setattr(model.config, CONFIG_FIELD, structure.to_json())


def _tell(layer: nn.Module, family: Family, heads: int, size: int) -> None:
    """Set what the attention module has noted of its own shape."""
    core = layer.get_submodule(family.attention_core)
    setattr(core, family.heads_attribute, heads)
    setattr(core, family.width_attribute, heads * size)
    core.attention_head_size = size  # type: ignore[assignment]  # a number, which a Module may hold


def matrix(layer: nn.Module, path: str) -> Matrix:
    """A layer's linear module, whole or in factors."""
    return cast("Matrix", layer.get_submodule(path))


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` leads."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


@overload
def _outputs(old: nn.Linear, kept: Tensor) -> nn.Linear: ...
@overload
def _outputs(old: Matrix, kept: Tensor) -> Matrix: ...
def _outputs(old: Matrix, kept: Tensor) -> Matrix:
    """``old`` with these of its outputs."""
    from torch import nn

    if isinstance(old, nn.Linear):
        return _like(old, old.weight[kept], None if old.bias is None else old.bias[kept])
    old.up = _outputs(old.up, kept)
    return old


@overload
def _inputs(old: nn.Linear, kept: Tensor) -> nn.Linear: ...
@overload
def _inputs(old: Matrix, kept: Tensor) -> Matrix: ...
def _inputs(old: Matrix, kept: Tensor) -> Matrix:
    """``old`` with these of its inputs."""
    from torch import nn

    if isinstance(old, nn.Linear):
        return _like(old, old.weight[:, kept], old.bias)
    old.down = _inputs(old.down, kept)
    return old


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
