"""What a model can take: every fault that its kernels would meet with a crash, a wrong answer or another request's answer, found before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsqueeze.serving.answer import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"


@dataclass(frozen=True)
class Limits:
    """``rows`` a request, ``tokens`` a row (special ones included); ids and types are below ``vocabulary`` and ``types``, where known."""

    rows: int
    tokens: int
    vocabulary: int | None
    types: int | None


def check(feed: Feed, limits: Limits) -> tuple[int, int]:
    """(rows, tokens of the longest row without padding) of tensors that have the right names, types and ranks. Raises Refused (400)."""
    first = next(iter(feed))
    shape = feed[first].shape
    rows, width = shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1
    if 0 in shape:
        raise Refused(400, f"{first}: shape {list(shape)} holds no values; send at least one row of at least one token")
    if rows > limits.rows:
        raise Refused(
            400, f"{first}: at most {limits.rows} rows a request, got {rows}; send several requests, or start with a larger --max-batch"
        )
    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Refused(400, f"{name}: holds NaN or infinite values; send finite ones")
    if _IDS not in feed:
        return rows, width
    if width > limits.tokens:
        raise Refused(400, f"{first}: the model reads at most {limits.tokens} tokens a row, got {width}; cut the rows")
    ids = feed[_IDS]
    for name, array in feed.items():
        if array.shape != ids.shape:
            raise Refused(400, f"{name}: must have the shape of {_IDS}, {list(ids.shape)}, got {list(array.shape)}")
    _within(ids, _IDS, limits.vocabulary, "the vocabulary has")
    if _TYPES in feed:
        _within(feed[_TYPES], _TYPES, limits.types, "the model knows")
    return rows, _longest(feed[_MASK]) if _MASK in feed else width


def _within(array: NDArray[Any], name: str, size: int | None, whose: str) -> None:
    if array.dtype.kind != "i":
        return
    unsigned = array.view(f"u{array.dtype.itemsize}")  # a negative id is a very large one
    if size is not None and int(unsigned.max()) >= size:
        wrong = int(array[unsigned >= size][0])
        raise Refused(400, f"{name}: {whose} the ids 0 to {size - 1}, got {wrong}; tokenize with the tokenizer.json of this model")


def _longest(mask: NDArray[Any]) -> int:
    """The last column that any row attends to. Raises Refused for a mask of anything but 0 and 1, and for a row without any 1."""
    if mask.dtype.kind == "i" and int(mask.view(f"u{mask.dtype.itemsize}").max()) > 1:
        raise Refused(400, f"{_MASK}: must be 0 or 1, got {int(mask[(mask < 0) | (mask > 1)][0])}")
    if not mask[:, 0].all() and not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        raise Refused(400, f"{_MASK}: row {row} masks every token; leave the row out")
    if mask[:, -1].any():
        return int(mask.shape[1])
    return int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
