"""How small the weights of an .onnx file could be packed: their order-0 entropy, with what it takes to say which values there are.

Source: Shannon 1948, "A Mathematical Theory of Communication"; counted per tensor, as a coder without context would code it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze.graph import graphs
from onnxsqueeze.weights import integer_values

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

_LOOKED_AT = 65_536  # values of a tensor, spread over it
_ALL_DIFFERENT = 0.9  # of these: then there is nothing to gain, and no need to sort millions


def entropy_bytes(path: Path, dense: onnx.ModelProto | None = None) -> int:
    """Bytes of all initializers of a file, each coded by how often its stored values occur, or as it is where that is less.

    The list of values counts. A matrix whose rows or columns have levels of their own (weights of few bits) is coded by their rank among these
    where that is less. Packed 4-bit weights count by the byte, those of `pack` as what they stand for.
    ``dense`` is the same file as `packing.files.dense` gives it, where that is at hand.
    """
    from onnx import numpy_helper

    from onnxsqueeze.packing import files as packing

    total = 0.0
    for graph in graphs((dense or packing.dense(path)).graph):
        for tensor in graph.initializer:
            values: NDArray[Any] = numpy_helper.to_array(tensor)
            total += _coded(values) if values.dtype.kind in "fiub" else values.nbytes
    return round(total)


def bound_bytes(path: Path, dense: onnx.ModelProto | None = None) -> int | None:
    """What no coder goes below that knows of each integer weight how often its values occur: their order-0 entropy, zeros included, and the scales, in bytes.

    Scales and zero points count as they are, lists of values, floats and the graph not at all. Packed weights count as what they stand for.
    None where no weight is stored as an integer. ``dense`` as above.
    """
    import numpy as np

    from onnxsqueeze.packing import files as packing

    tensors, scales = integer_values(dense or packing.dense(path))
    if not tensors:
        return None
    total = float(scales)
    for values in tensors:
        counts = np.unique(values, return_counts=True)[1]
        total -= float((counts * np.log2(counts / values.size)).sum()) / 8
    return round(total)


def _coded(values: NDArray[Any]) -> float:
    """Bytes of one tensor."""
    import numpy as np

    flat = values.reshape(1, -1)
    some = flat[0, :: max(1, flat.size // _LOOKED_AT)]
    if not flat.size or len(np.unique(some)) >= _ALL_DIFFERENT * some.size:
        return float(values.nbytes)
    ways = [flat] if values.ndim != 2 else [flat, values, values.T]
    return min(float(values.nbytes), *(_by_rank(rows) for rows in ways))


def _by_rank(rows: NDArray[Any]) -> float:
    """Bytes of ``rows[groups, values]``: every value by its rank among those of its group, and the groups' different values."""
    import numpy as np

    ordered = np.sort(rows, axis=1)
    ranks = np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, dtype=np.int32)
    counts = np.bincount(ranks.ravel(), minlength=1)
    counts[0] += len(rows)  # the first of each group
    shares = counts[counts > 0] / rows.size
    different = len(rows) + int(ranks[:, -1].sum()) if ranks.shape[1] else len(rows)
    return float(-rows.size * (shares * np.log2(shares)).sum() / 8 + different * rows.itemsize)
