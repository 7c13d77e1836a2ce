"""How the values of one tensor are written down in fewer bytes, and which of the ways takes the fewest.

All ways are lossless. A stream of values is raw, or the values' places in a list (the commonest first), written in turns: a turn has b bits for each
value, and its last code says that the place is further behind and follows in the next turn. One bit is a mask of the commonest value, a few bits
and a second turn are two code lengths, one turn alone is a code book. Tensors are one stream in their own shape, or:

    steps    the places of all values but the commonest, each as its distance from the last one, and those values
    levels   each row or column has a few values of its own; every value by its rank among these

Source: the parts of Han et al. 2016, "Deep Compression" (relative indices, code books), with fixed widths in place of Huffman's code, so that a few
operators on whole arrays undo them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NODE_BYTES, TENSOR_BYTES = 30, 20  # about what a node and a tensor take beside its data
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths that fill bytes
_MOST_VALUES = 4096  # in a list; what has more different ones is raw
_MOST_LEVELS = 16  # of a row or column

Values = NDArray[Any]


@dataclass(frozen=True)
class Raw:
    """``values[n]`` as they are."""

    values: Values

    @property
    def bytes(self) -> int:
        """That they take in the file, about."""
        return self.values.nbytes + TENSOR_BYTES


@dataclass(frozen=True)
class Turn:
    """``codes[n]``, each below 2^``bits``, the last of which means: further behind. From the second turn on ``codes[0]`` is 0 and stands for nothing."""

    bits: int
    codes: NDArray[np.uint8]


@dataclass(frozen=True)
class Coded:
    """Values by their places in ``book``. A place is the sum of its codes in all turns that it has.

    With ``listed`` the last turn's last code stands for a value of its own: these lie at the end of ``book`` in the order in which they come, behind
    one entry that stands for nothing.
    """

    book: Values
    turns: tuple[Turn, ...]
    listed: bool = False

    @property
    def bytes(self) -> int:
        """That it takes in the file, about, with the operators that undo it."""
        own = self.book.nbytes + 2 * NODE_BYTES + TENSOR_BYTES
        return own + sum(
            _turn_bytes(len(turn.codes), turn.bits, more=i + 1 < len(self.turns) or self.listed) for i, turn in enumerate(self.turns)
        )


Stream = Raw | Coded


@dataclass(frozen=True)
class Flat:
    """A tensor of ``shape`` as one stream, in the order in which it is stored."""

    shape: tuple[int, ...]
    stream: Stream

    @property
    def bytes(self) -> int:
        """That it takes in the file, about."""
        return self.stream.bytes + NODE_BYTES + TENSOR_BYTES + 8 * len(self.shape)


@dataclass(frozen=True)
class Steps:
    """A tensor of ``shape`` that is ``fill`` but for ``values``; the first lies ``steps[0]`` behind the start, each other one as far behind the last."""

    shape: tuple[int, ...]
    fill: Values  # one value, shape [1]
    steps: Stream
    values: Stream

    @property
    def bytes(self) -> int:
        """That it takes in the file, about."""
        return self.steps.bytes + self.values.bytes + 4 * NODE_BYTES + 3 * TENSOR_BYTES + 8 * len(self.shape)


@dataclass(frozen=True)
class Levels:
    """A matrix of ``shape`` by the rank of every value among those of its row (``axis`` 1, ``book[rows, levels]``) or column (0, ``book[levels, columns]``)."""

    shape: tuple[int, ...]
    axis: int
    book: Values
    ranks: Stream

    @property
    def bytes(self) -> int:
        """That it takes in the file, about."""
        return self.ranks.bytes + self.book.nbytes + 2 * NODE_BYTES + 2 * TENSOR_BYTES + 8 * len(self.shape)


Packed = Flat | Steps | Levels


def pack(tensor: Values) -> Packed | None:
    """The way that takes the fewest bytes, or None where none takes fewer than the tensor itself. Any shape, integers and floats."""
    if tensor.size == 0 or tensor.dtype.kind not in "iuf":
        return None
    found: list[Packed] = []
    flat = np.ascontiguousarray(tensor).reshape(-1)
    values, inverse, counts = _different(flat)
    if len(values) <= _MOST_VALUES:
        found.append(Flat(tensor.shape, _coded(flat, values, inverse, counts)))
        found += _steps(tensor.shape, flat, values, inverse, counts)
    if tensor.ndim == 2:
        found += [*_levels(tensor, 0), *_levels(tensor, 1)]
    best = min(found, key=lambda one: one.bytes, default=None)
    return best if best is not None and best.bytes < tensor.nbytes + TENSOR_BYTES else None


def stream(values: Values) -> Stream:
    """The stream that takes the fewest bytes."""
    different, inverse, counts = _different(values)
    return _coded(values, different, inverse, counts) if len(different) <= _MOST_VALUES else Raw(values)


def unpack(packed: Packed) -> Values:
    """The tensor again."""
    if isinstance(packed, Flat):
        return values_of(packed.stream).reshape(packed.shape)
    if isinstance(packed, Levels):
        return np.take_along_axis(packed.book, values_of(packed.ranks).reshape(packed.shape).astype(np.int64), packed.axis)
    whole = np.full(int(np.prod(packed.shape)), packed.fill[0])
    whole[np.cumsum(values_of(packed.steps))] = values_of(packed.values)
    return whole.reshape(packed.shape)


def values_of(stream: Stream) -> Values:
    """What a stream says."""
    if isinstance(stream, Raw):
        return stream.values
    places: NDArray[np.int64] | None = None
    for turn in reversed(stream.turns):
        own = turn.codes.astype(np.int64)
        further = own == 2**turn.bits - 1
        if places is not None:
            own[further] += places[1:]
        elif stream.listed:
            own[further] += np.arange(1, int(further.sum()) + 1)
        places = own
    found: Values = stream.book[places]
    return found


def _different(flat: Values) -> tuple[Values, NDArray[np.intp], NDArray[np.intp]]:
    """(the different values, the index of each among them, how often each occurs), told apart by their bits: 0.0 is not -0.0."""
    values, inverse, counts = np.unique(_bits(flat), return_inverse=True, return_counts=True)
    return values.view(flat.dtype), inverse.reshape(-1), counts


def _bits(values: Values) -> Values:
    return values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values


def _steps(shape: tuple[int, ...], flat: Values, values: Values, inverse: NDArray[np.intp], counts: NDArray[np.intp]) -> Iterator[Steps]:
    commonest = int(counts.argmax())
    places = np.flatnonzero(inverse != commonest)
    if len(places) and 2 * len(places) <= flat.size < 2**31:
        steps = np.diff(places, prepend=0).astype(np.int32)
        yield Steps(shape, values[commonest : commonest + 1], stream(steps), stream(flat[places]))


def _levels(matrix: Values, axis: int) -> Iterator[Levels]:
    """``axis`` 1: each row by itself; 0: each column."""
    held = _bits(np.ascontiguousarray(matrix))
    lines = held if axis else np.ascontiguousarray(held.T)
    if lines.shape[1] <= _MOST_LEVELS or len(np.unique(lines[0])) > _MOST_LEVELS:  # most matrices end here
        return
    own = [np.unique(line) for line in lines]
    most = max(len(one) for one in own)
    if not 1 < most <= _MOST_LEVELS:
        return
    book = np.stack([np.resize(one, most) for one in own]).view(matrix.dtype)
    ranks = np.stack([np.searchsorted(one, line) for one, line in zip(own, lines, strict=True)]).astype(np.int32)
    yield Levels(matrix.shape, axis, book if axis else np.ascontiguousarray(book.T), stream((ranks if axis else ranks.T).reshape(-1)))


def _coded(flat: Values, values: Values, inverse: NDArray[np.intp], counts: NDArray[np.intp]) -> Stream:
    """``flat`` is ``values[inverse]``; ``counts`` is how often each occurs."""
    order = np.argsort(-counts, kind="stable")
    widths = _widths(tuple(counts[order].tolist()), values.itemsize)
    if not widths:
        return Raw(flat)
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    left, turns, reached = place[inverse], [], 0
    for i, bits in enumerate(widths):
        last = 2**bits - 1
        codes = np.minimum(left - reached, last).astype(np.uint8)
        turns.append(Turn(bits, codes if i == 0 else np.concatenate([np.zeros(1, np.uint8), codes])))
        further = left - reached >= last
        left, flat, reached = left[further], flat[further], reached + last
    listed = reached + 1 < len(values)  # the last turn has a code for reached + 1 values at most
    if not listed:
        return Coded(values[order], tuple(turns))
    return Coded(np.concatenate([values[order][:reached], np.zeros(1, values.dtype), flat]), tuple(turns), listed=True)


def _widths(counts: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The turns' widths that take the fewest bytes for values that occur so often, the commonest first; () is raw."""
    left = [0]  # how many values are left from each place on
    for count in reversed(counts):
        left.append(left[-1] + count)
    left.reverse()
    best: dict[int, tuple[float, tuple[int, ...]]] = {}
    for start in reversed(_starts(len(counts))):
        ways: list[tuple[float, tuple[int, ...]]] = [((left[start] + 1) * itemsize, ())]  # listed
        for bits in PLANES:
            codes, last = left[start] + (start > 0), 2**bits - 1
            if last + 1 >= len(counts) - start:
                ways.append((_turn_bytes(codes, bits, more=False) + (len(counts) - start) * itemsize, (bits,)))
                break
            cost, widths = best[start + last]
            ways.append((_turn_bytes(codes, bits, more=True) + last * itemsize + cost, (bits, *widths)))
        best[start] = min(ways)
    return best[0][1]


@cache
def _starts(values: int) -> tuple[int, ...]:
    """The places at which a turn can begin."""
    found, new = {0}, {0}
    while new:
        new = {start + 2**bits - 1 for start in new for bits in PLANES if start + 2**bits < values} - found
        found |= new
    return tuple(sorted(found))


def _turn_bytes(n: int, bits: int, *, more: bool) -> int:
    """Bytes of ``n`` codes and the operators that undo them."""
    planes = PLANES[bits]
    nodes = 1 + sum(1 if width == 8 else 3 for width in planes) + 2 * (len(planes) - 1) + (6 if more else 0)
    return sum(-(-n * width // 8) + TENSOR_BYTES for width in planes) + nodes * NODE_BYTES
