"""Low-rank factors: a matrix as the product of two thin ones, by singular values, plain or weighted by what flows through the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    Matrix = nn.Linear | "FactoredLinear"

_BISECTIONS = 60
_DAMPING = 1e-6  # of the mean square of the inputs, added to each: a direction that no row has must not divide by zero


class FactoredLinear(nn.Module):
    """``up(down(x))``: a linear layer of rank ``rank``, with the bias in ``up``."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Width in between."""
        return self.down.out_features

    def forward(self, states: Tensor) -> Tensor:
        """``[…, in]`` → ``[…, out]``."""
        return cast("Tensor", self.up(self.down(states)))


class FactoredEmbedding(nn.Module):
    """``up(table[id])``: an embedding whose table has ``rank`` columns. Source: Lan et al. 2020, "ALBERT", section 3.1."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx), nn.Linear(rank, embedding_dim, bias=False)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.table.num_embeddings

    @property
    def rank(self) -> int:
        """Columns of the table."""
        return self.table.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """``[…]`` → ``[…, embedding_dim]``."""
        return cast("Tensor", self.up(self.table(ids)))


def root(second_moment: Tensor) -> Tensor:
    """A matrix S with S Sᵀ = ``second_moment`` (the mean of x xᵀ, ``[in, in]``), damped so that it has an inverse; float64."""
    moment = second_moment.double()
    damped = moment + _DAMPING * moment.diagonal().mean().clamp_min(1e-12) * torch.eye(len(moment), dtype=moment.dtype)
    return cast("Tensor", torch.linalg.cholesky(damped))


def spectrum(weight: Tensor, weighting: Tensor | None = None) -> Tensor:
    """Singular values of ``weight[out, in]``, or of its product with ``weighting`` (`root`): their squares are what leaving them out costs."""
    return cast("Tensor", torch.linalg.svdvals(_weighted(weight, weighting)))


def split(weight: Tensor, rank: int, weighting: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(up ``[out, rank]``, down ``[rank, in]``): their product is the matrix of this rank nearest to ``weight``.

    Near in the Frobenius norm (Eckart and Young 1936); with ``weighting`` in the mean square of the outputs on the inputs that it comes from.
    Source: Wang et al. 2024, "SVD-LLM", section 3.1 (whitening by a Cholesky factor).
    """
    left, values, right = torch.linalg.svd(_weighted(weight, weighting), full_matrices=False)
    scale = values[:rank].sqrt()
    up, down = left[:, :rank] * scale, scale[:, None] * right[:rank]
    if weighting is not None:
        down = torch.linalg.solve_triangular(weighting, down, upper=False, left=False)
    return up.to(weight.dtype), down.to(weight.dtype)


def choose_ranks(spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]], share: float, multiple: int) -> list[int | None]:
    """The rank of each matrix ``(out, in)``, so that all together have ``share`` of their weights at most; None: it stays whole.

    Every rank costs out + in weights, and the ranks that stay are those whose squared singular value per weight is the highest: the sum of
    what is left out is then the least for the weights spent. Ranks are multiples of ``multiple``, and one of them at least. A matrix whose factors would not be smaller stays whole.
    """
    worth = [values.double().square() / (out + into) for values, (out, into) in zip(spectra, shapes, strict=True)]
    limit = share * sum(out * into for out, into in shapes)

    def ranks(threshold: float) -> list[int | None]:
        found: list[int | None] = []
        for values, (out, into) in zip(worth, shapes, strict=True):
            rank = max(multiple, int((values > threshold).sum()) // multiple * multiple)
            found.append(rank if rank * (out + into) < out * into else None)
        return found

    def weights(some: Sequence[int | None]) -> int:
        return sum(out * into if rank is None else rank * (out + into) for rank, (out, into) in zip(some, shapes, strict=True))

    low, high = 0.0, max(float(values.max()) for values in worth)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(ranks(middle)) > limit else (low, middle)
    return ranks(high)


def factored(old: nn.Linear, rank: int, weighting: Tensor | None = None) -> FactoredLinear:
    """``old`` in factors of this rank."""
    new = FactoredLinear(old.in_features, old.out_features, rank, bias=old.bias is not None).to(old.weight.device)
    with torch.no_grad():
        up, down = split(old.weight, rank, weighting)
        new.up.weight.copy_(up)
        new.down.weight.copy_(down)
        if old.bias is not None:
            new.up.bias.copy_(old.bias)
    return new.train(old.training)


def factored_table(old: nn.Embedding, rank: int, frequency: Tensor | None = None) -> FactoredEmbedding:
    """``old`` in factors of this rank; with ``frequency[rows]`` the rows that occur more often come out nearer.

    Source: Chen et al. 2018, "GroupReduce", section 3.2 (weighted by frequency).
    """
    new = FactoredEmbedding(old.num_embeddings, old.embedding_dim, rank, old.padding_idx).to(old.weight.device)
    weight = old.weight.detach().double()
    heavy = torch.ones(len(weight), dtype=weight.dtype) if frequency is None else (frequency.double() + 1).sqrt()
    with torch.no_grad():
        # the right factor spans what the weighted rows need; each row is then projected on it by itself
        _, _, right = torch.linalg.svd(heavy[:, None] * weight.cpu(), full_matrices=False)
        basis = right[:rank]
        new.table.weight.copy_(weight.cpu() @ basis.T)
        new.up.weight.copy_(basis.T)
    return new.train(old.training)


def _weighted(weight: Tensor, weighting: Tensor | None) -> Tensor:
    found = weight.detach().double().cpu()
    return found if weighting is None else found @ weighting
