"""How the values of one tensor are written down in fewer bytes, and which of the ways takes the fewest.

All ways are lossless. A stream of values is raw, or coded: b bits for each value, its place in a list (the commonest first), and a last code that says
that the value is none of these and follows in the next stream. One bit is a mask of the commonest value, a few bits and a second stream are two code
lengths, one stream alone is a code book. Tensors are one stream in their own shape, or:

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
_MOST_CODED = 4096  # of a list; rarer values are listed one by one
_MOST_LEVELS = 256  # of a row or column: a rank is a byte
_CHOSEN = frozenset({"int8", "uint8", "int32", "int64"})  # `Where` keeps their bits; of floats it loses the sign of zero
_TYPES = _CHOSEN | frozenset({"int16", "uint16", "float16", "float32", "float64"})

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
class Count:
    """``start``, ``start`` + 1, … as int32[``n``]."""

    start: int
    n: int

    @property
    def bytes(self) -> int:
        """That it takes in the file, about."""
        return NODE_BYTES


@dataclass(frozen=True)
class Coded:
    """``codes[n]``, each the place of a value in ``book``; where there is ``further``, the last code, 2^``bits`` - 1, means: the next value of that."""

    bits: int
    codes: NDArray[np.uint8]
    book: Values
    further: Stream | None = None

    @property
    def bytes(self) -> int:
        """That it takes in the file, about, with the operators that undo it."""
        own = _turn_bytes(len(self.codes), self.bits, more=self.further is not None) + self.book.nbytes
        return own + (self.further.bytes if self.further else 0)


@dataclass(frozen=True)
class Listed:
    """``book[places]``, for types between which no operator chooses. Values that are listed lie at the end of ``book``."""

    book: Values
    places: Stream  # int32

    @property
    def bytes(self) -> int:
        """That it takes in the file, about, with the operators that undo it."""
        return self.book.nbytes + self.places.bytes + NODE_BYTES + TENSOR_BYTES


Stream = Raw | Coded | Listed | Count


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


def pack(tensor: Values, least_saving: float = 0.0) -> Packed | None:
    """The way that takes the fewest bytes, or None where none saves more than ``least_saving`` of the tensor's own. Any shape, integers and floats."""
    if tensor.size == 0 or tensor.dtype.name not in _TYPES:
        return None
    flat = np.ascontiguousarray(tensor).reshape(-1)
    values, inverse, counts = _different(flat)
    found: list[Packed] = [Flat(tensor.shape, _coded(flat, values, inverse, counts, least_saving))]
    found += _steps(tensor.shape, flat, values, inverse, counts, least_saving)
    if tensor.ndim == 2:
        found += [*_levels(tensor, 0, least_saving), *_levels(tensor, 1, least_saving)]
    best = min(found, key=lambda one: one.bytes)
    return best if best.bytes < (1 - least_saving) * (tensor.nbytes + TENSOR_BYTES) else None


def stream(values: Values, least_saving: float = 0.0) -> Stream:
    """The stream that takes the fewest bytes; values are listed, all or the rarer ones, where codes for them save no more than ``least_saving``."""
    return _coded(values, *_different(values), least_saving)


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
    if isinstance(stream, Listed):
        return np.asarray(stream.book[values_of(stream.places)])
    if isinstance(stream, Count):
        return np.arange(stream.start, stream.start + stream.n, dtype=np.int32)
    last = 2**stream.bits - 1
    found: Values = stream.book[np.minimum(stream.codes, len(stream.book) - 1)]
    if stream.further:
        found[stream.codes == last] = values_of(stream.further)
    return found


def _different(flat: Values) -> tuple[Values, NDArray[np.intp], NDArray[np.intp]]:
    """(the different values, the index of each among them, how often each occurs), told apart by their bits: 0.0 is not -0.0."""
    bits = _bits(flat)
    if bits.itemsize > 2:
        values, inverse, counts = np.unique(bits, return_inverse=True, return_counts=True)
        return values.view(flat.dtype), inverse.reshape(-1), counts
    least = int(bits.min())  # few are possible: counted, which is a tenth of the time of sorting
    numbers = bits.astype(np.intp) - least
    times = np.bincount(numbers)
    held = np.flatnonzero(times)
    return (held + least).astype(bits.dtype).view(flat.dtype), (np.cumsum(times > 0) - 1)[numbers], times[held]


def _bits(values: Values) -> Values:
    return values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values


def _steps(
    shape: tuple[int, ...], flat: Values, values: Values, inverse: NDArray[np.intp], counts: NDArray[np.intp], least_saving: float
) -> Iterator[Steps]:
    commonest = int(counts.argmax())
    places = np.flatnonzero(inverse != commonest)
    if len(places) and 2 * len(places) <= flat.size < 2**31:
        steps = np.diff(places, prepend=0).astype(np.int32)
        enough = least_saving * 2 * len(places) / flat.size  # the fewer there are, the less time it takes to undo them
        yield Steps(shape, values[commonest : commonest + 1], stream(steps, enough), stream(flat[places], enough))


def _levels(matrix: Values, axis: int, least_saving: float) -> Iterator[Levels]:
    """``axis`` 1: each row by itself; 0: each column."""
    held = _bits(np.ascontiguousarray(matrix))
    lines = held if axis else np.ascontiguousarray(held.T)
    if not _shrinks(lines[0], len(np.unique(lines[0]))):  # most matrices end here
        return
    own = [np.unique(line) for line in lines]
    most = max(len(one) for one in own)
    if most == 1 or not _shrinks(lines[0], most):
        return
    book = np.stack([np.resize(one, most) for one in own]).view(matrix.dtype)
    ranks = np.stack([np.searchsorted(one, line) for one, line in zip(own, lines, strict=True)]).astype(np.uint8)
    yield Levels(
        matrix.shape, axis, book if axis else np.ascontiguousarray(book.T), stream((ranks if axis else ranks.T).reshape(-1), least_saving)
    )


def _shrinks(line: Values, levels: int) -> bool:
    """Whether ranks of a fixed width and a list of the levels take fewer bytes than the line itself."""
    return levels <= _MOST_LEVELS and levels * line.itemsize + len(line) * (levels - 1).bit_length() / 8 < line.nbytes


def _coded(flat: Values, values: Values, inverse: NDArray[np.intp], counts: NDArray[np.intp], least_saving: float) -> Stream:
    """``flat`` is ``values[inverse]``; ``counts`` is how often each occurs."""
    order = np.argsort(-counts, kind="stable")
    often, seldom = order[:_MOST_CODED], order[_MOST_CODED:]
    widths = _widths(tuple(counts[often].tolist()), int(counts[seldom].sum()), values.itemsize, least_saving)
    if not widths:
        return Raw(flat)
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    places, book = place[inverse], values[order]
    if 2 ** widths[0] >= len(book) or flat.dtype.name in _CHOSEN:
        return _turns(flat, places, book, widths)
    reached = sum(2**bits - 1 for bits in widths)
    listed = flat[places >= reached] if len(book) > reached + 1 else book[reached:]
    numbers = np.arange(len(book), dtype=np.int32)
    return Listed(np.concatenate([book[:reached], listed]), _turns(numbers[places], places, numbers, widths, counted=True))


def _turns(flat: Values, places: NDArray[np.int64], book: Values, widths: tuple[int, ...], *, counted: bool = False) -> Stream:
    """``flat`` is ``book[places]``; with ``counted`` what is listed is counted on from the first."""
    if not widths:
        return Count(int(book[0]), len(flat)) if counted else Raw(flat)
    bits, *later = widths
    last = 2**bits - 1
    codes = np.minimum(places, last).astype(np.uint8)
    if len(book) <= last + 1:
        return Coded(bits, codes, book)
    beyond = places >= last
    return Coded(bits, codes, book[:last], _turns(flat[beyond], places[beyond] - last, book[last:], tuple(later), counted=counted))


def _widths(counts: tuple[int, ...], others: int, itemsize: int, least_saving: float) -> tuple[int, ...]:
    """The widths of the streams, each behind the last, that take the fewest bytes for values that occur so often, the commonest first; () is raw.

    ``others`` values more are listed in any case.
    """
    left = [others]  # how many values are left from each place on
    for count in reversed(counts):
        left.append(left[-1] + count)
    left.reverse()
    best: dict[int, tuple[float, tuple[int, ...]]] = {}
    for start in reversed(_starts(len(counts))):
        ways: list[tuple[float, tuple[int, ...]]] = [((left[start] + 1) * itemsize, ())]  # listed
        for bits in PLANES:
            codes, last = left[start] + (start > 0), 2**bits - 1
            if last + 1 >= len(counts) - start and not others:
                ways.append((_turn_bytes(codes, bits, more=False) + (len(counts) - start) * itemsize, (bits,)))
                break
            if start + last not in best:
                break
            cost, widths = best[start + last]
            ways.append((_turn_bytes(codes, bits, more=True) + last * itemsize + cost, (bits, *widths)))
        cost, widths = min(ways)
        best[start] = ways[0] if cost >= (1 - least_saving) * ways[0][0] else (cost, widths)
    return best[0][1]


@cache
def _starts(values: int) -> tuple[int, ...]:
    """The places in the list at which a stream can begin."""
    found, new = {0}, {0}
    while new:
        new = {start + 2**bits - 1 for start in new for bits in PLANES if start + 2**bits < values} - found
        found |= new
    return tuple(sorted(found))


def _turn_bytes(n: int, bits: int, *, more: bool) -> int:
    """Bytes of ``n`` codes and the operators that undo them."""
    found = _beside_codes(bits, more)
    for width in PLANES[bits]:
        found -= -n * width // 8  # rounded up
    return found


@cache
def _beside_codes(bits: int, more: bool) -> int:  # noqa: FBT001, cached by place
    planes = PLANES[bits]
    nodes = sum(0 if width == 8 else 3 for width in planes) + len(planes) - 1 + (1 if planes[0] == 4 < bits else 0) + (7 if more else 2)
    return (len(planes) + 1) * TENSOR_BYTES + nodes * NODE_BYTES
