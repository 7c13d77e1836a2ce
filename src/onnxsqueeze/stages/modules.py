"""Which nodes of an exported graph hold the weights of which PyTorch module: exporters call a node by the module that it stands in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsqueeze import graph
from onnxsqueeze.errors import StageError, nearest

if TYPE_CHECKING:
    import onnx

_WEIGHT = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # which input may be the weight


def weighted(model: onnx.ModelProto) -> dict[str, tuple[onnx.NodeProto, ...]]:
    """Module path ("bert.encoder.layer.0.output.dense") → its nodes that read a float32 matrix of the file, in the graph's order.

    A node that no exporter named so counts under its own name.
    """
    from onnx import TensorProto

    found: dict[str, tuple[onnx.NodeProto, ...]] = {}
    for inner in graph.graphs(model.graph):
        matrices = {tensor.name for tensor in inner.initializer if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2}
        for node in inner.node:
            place = _WEIGHT.get(node.op_type)
            if place is not None and len(node.input) > place and node.input[place] in matrices:
                found[_module(node)] = (*found.get(_module(node), ()), node)
    return found


def weight_of(node: onnx.NodeProto) -> str:
    """The name of the matrix that a node of `weighted` reads."""
    return str(node.input[_WEIGHT[node.op_type]])


def matching(paths: Iterable[str], globs: Sequence[str], setting: str) -> tuple[str, ...]:
    """Those of the module ``paths`` that one of ``globs`` names, or that lie in a module which it names.

    Raises StageError for a glob that names none; ``setting`` says where it stands ("quantize-static: exclude").
    """
    every = tuple(paths)
    chosen: set[str] = set()
    for pattern in globs:
        hits = {path for path in every if any(fnmatchcase(above, pattern) for above in _and_above(path))}
        if not hits:
            above = sorted({name for path in every for name in _and_above(path)})
            raise StageError(
                f"{setting}: {pattern!r} matches no module with float weights{nearest(pattern, above)}",
                remedy="name modules by their path in PyTorch, such as bert.encoder.layer.0.output.dense or *.attention.*",
            )
        chosen |= hits
    return tuple(path for path in every if path in chosen)


def excluded(model: onnx.ModelProto, globs: Sequence[str] | None, setting: str) -> tuple[tuple[str, ...], list[str]]:
    """(module paths, names of their nodes) that ``globs`` leave in float; see `matching`.

    A Gemm has two names: quantize_dynamic makes a MatMul of it before it looks at what is excluded (onnxruntime.quantization's replace_gemm_with_matmul).
    """
    held = weighted(model)
    paths = matching(held, globs, setting) if globs else ()
    nodes = [node for path in paths for node in held[path]]
    return paths, [node.name for node in nodes] + [f"{node.name}_MatMul" for node in nodes if node.op_type == "Gemm"]


def require_float(written: Path, paths: Sequence[str], setting: str) -> None:
    """Raise StageError where a module of ``paths`` has no float weight in the written file: it was to be left alone."""
    left = weighted(graph.load(written))
    gone = [path for path in paths if path not in left]
    if gone:
        raise StageError(f"{setting}: the weights of {gone[0]} were quantized all the same", remedy="report this with the recipe")


def _module(node: onnx.NodeProto) -> str:
    above = node.name.removeprefix("/").rpartition("/")[0]
    return above.replace("/", ".") or node.name


def _and_above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
