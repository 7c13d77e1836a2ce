"""Students that are no transformers: a table of words, convolutions or a recurrent network over it, the largest value of each feature, classes.

Padding changes nothing: convolutions see zeros there, the backward network reads each row from its own end, and the maximum leaves padding out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Architecture = Literal["cnn", "bilstm"]


@dataclass(frozen=True)
class Shape:
    """``rank`` columns of the table; ``width`` filters of each length in ``kernels``, or hidden units of each direction."""

    architecture: Architecture
    rank: int
    width: int
    kernels: tuple[int, ...]
    outputs: int


@dataclass
class Output:
    """Like transformers' own: ``logits[batch, outputs]``."""

    logits: Tensor


class SmallStudent(nn.Module):
    """Reads ``input_ids[batch, tokens]`` and ``attention_mask``; other inputs are taken and left alone.

    Source: Kim 2014, "Convolutional Neural Networks for Sentence Classification"; Tang et al. 2019, "Distilling Task-Specific Knowledge from
    BERT into Simple Neural Networks", section 3.1 (bidirectional LSTM).
    """

    def __init__(self, shape: Shape, table: Tensor, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(*table.shape)
        with torch.no_grad():
            self.words.weight.copy_(table)
        if shape.architecture == "cnn":
            self.convolutions = nn.ModuleList(nn.Conv1d(shape.rank, shape.width, k, padding=k - 1) for k in shape.kernels)
            features = shape.width * len(shape.kernels)
        else:
            self.forwards = nn.LSTM(shape.rank, shape.width, batch_first=True)
            self.backwards = nn.LSTM(shape.rank, shape.width, batch_first=True)
            features = 2 * shape.width
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(features, shape.outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Output:  # noqa: ARG002, read by others
        """The classes' logits."""
        mask = attention_mask.to(self.words.weight.dtype)[:, :, None]
        states = self.words(input_ids) * mask
        lengths = attention_mask.sum(1, keepdim=True)
        found = self._convolved(states, lengths) if self.shape.architecture == "cnn" else self._read(states, lengths, mask)
        return Output(self.out(self.dropout(found)))

    def _convolved(self, states: Tensor, lengths: Tensor) -> Tensor:
        columns, found = states.transpose(1, 2), []
        for kernel, convolution in zip(self.shape.kernels, self.convolutions, strict=True):
            seen = torch.relu(convolution(columns))  # also where a filter sees a word or two of the row's ends beside zeros
            there = torch.arange(seen.shape[2], device=seen.device)[None] < lengths + kernel - 1
            found.append((seen * there[:, None].to(seen.dtype)).amax(2))
        return torch.cat(found, 1)

    def _read(self, states: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        there, _ = self.forwards(states)
        place = torch.arange(states.shape[1], device=states.device)[None]
        turned = (lengths - 1 - place).clamp_min(0)[:, :, None].expand(-1, -1, states.shape[2])
        back, _ = self.backwards(states.gather(1, turned))
        both = torch.cat([there, back], 2)  # the maximum over tokens needs no turning back
        return (both + (mask - 1) * 1e4).amax(1)


class Exportable(nn.Module):
    """Positional inputs in, logits out, for the exporter."""

    def __init__(self, student: SmallStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[batch, outputs]``."""
        found: Tensor = self.student(input_ids, attention_mask).logits
        return found


def narrowed(table: Tensor, rank: int) -> Tensor:
    """The table ``[rows, width]`` in its ``rank`` strongest directions: the nearest of this rank, up to a rotation that the layers behind learn."""
    weight = table.double()
    _, _, right = torch.linalg.svd(weight, full_matrices=False)
    found: Tensor = weight @ right[:rank].T
    return found.float()
