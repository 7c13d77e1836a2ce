"""The matrices of a quantized .onnx file back in float, read by the operators' definitions alone: nothing of the package is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = ("_quantized", "_Q8", "_Q4")


def matrices(path: Path) -> dict[str, NDArray[Any]]:
    """Every initializer of the file as an array, by name."""
    import onnx
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def errors(written: Path, original: Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """For every quantized matrix by its name in ``original``: |w - s·(q - z)| and s, in the shape of ``w``."""
    before, after, found = matrices(original), matrices(written), {}
    for stored, q in after.items():
        suffix = next((s for s in SUFFIXES if stored.endswith(s)), None)
        name = stored.removesuffix(suffix or "").removesuffix("_transposed")
        if suffix is None or name not in before or before[name].ndim < 2:
            continue
        w = before[name]
        if suffix == "_quantized":
            s, z, values = *_scale_and_zero(written, stored, after), q.astype(np.int32)
            # Gemm keeps [outputs, inputs] in both files; what became a product of integers lies as [inputs, outputs]
            outputs_first = _reader(original, name).op_type == "Gemm"
            turned = _reader(written, stored).op_type in ("MatMul", "MatMulInteger", "QLinearMatMul")
            if outputs_first and turned:
                values = values.T
            if s.ndim == 1 and s.size > 1 and outputs_first:
                s, z = s[:, None], z[:, None]
        else:
            w = w.T if q.ndim == 3 else w
            s, z, values = _blocks(q, after[f"{name}_scales"], after[f"{name}_zero_points"], w.shape, 4 if suffix == "_Q4" else 8)
        found[name] = np.abs(w - s * (values - z.astype(np.int32))), np.broadcast_to(s, w.shape)
    return found


def _scale_and_zero(written: Path, stored: str, after: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    name = stored.removesuffix("_quantized")
    if f"{name}_scale" in after:
        return after[f"{name}_scale"], after[f"{name}_zero_point"]
    gathered = _reader(written, stored)  # a table read as it is: whoever reads its rows has the scale beside them
    user = _user(written, gathered.output[0])
    at = list(user.input).index(gathered.output[0])
    return after[user.input[at + 1]], after[user.input[at + 2]]


def _user(model: Path, name: str) -> Any:
    import onnx

    return next(node for node in onnx.load(str(model)).graph.node if name in node.input)


def _reader(model: Path, name: str) -> Any:
    """The node that reads ``name``, behind a DequantizeLinear."""
    found = _user(model, name)
    return _reader(model, found.output[0]) if found.op_type == "DequantizeLinear" else found


def _blocks(q: NDArray[Any], s: NDArray[Any], z: NDArray[Any], shape: tuple[int, ...], bits: int) -> tuple[Any, Any, Any]:
    rows, width = shape
    s = s.reshape(rows, -1)
    if bits == 4:
        q, z = (np.stack([a & 15, a >> 4], -1).reshape(rows, -1) for a in (q.reshape(rows, -1), z.reshape(rows, -1)))
    values = q.reshape(rows, -1)[:, :width].astype(np.int32)
    per_block = q.reshape(rows, -1).shape[1] // s.shape[1]
    s, z = (np.repeat(a.reshape(rows, -1)[:, : s.shape[1]], per_block, axis=1)[:, :width] for a in (s, z))
    return s, z, values
