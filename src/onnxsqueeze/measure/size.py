"""Bytes of a deployable folder, read from the files that were written."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsqueeze.artifact import MODEL_FILE, file_sha256, folder_files
from onnxsqueeze.errors import MeasureError
from onnxsqueeze.results import FileRecord

if TYPE_CHECKING:
    import onnx

_PIECE = 1 << 20
_MEMORY = 9  # zlib then cuts its blocks where the gzip program does


@dataclass(frozen=True)
class Size:
    """``size_bytes`` is model.onnx with its external data, ``size_gzip_bytes`` those files after gzip -9, one by one.

    ``tokenizer_bytes`` is tokenizer.json, or None without one. ``files`` are all files, by their name below the folder.
    """

    size_bytes: int
    size_gzip_bytes: int
    tokenizer_bytes: int | None
    files: tuple[FileRecord, ...]


def measure_size(folder: Path) -> Size:
    """The size of an *onnx* artifact. Raises MeasureError where model.onnx or data that it names is missing."""
    model = folder / MODEL_FILE
    if not model.is_file():
        raise MeasureError(f"{folder.name}: has no {MODEL_FILE}", remedy="give the folder of a target")
    weights = [model, *(folder / name for name in sorted(_external_data(model)))]
    for path in weights:
        if not path.is_file():
            raise MeasureError(
                f"{folder.name}/{MODEL_FILE}: its weights are in {path.name}, which is not there",
                remedy="copy the .onnx with all files that lie beside it",
            )
    tokenizer = folder / "tokenizer.json"
    return Size(
        size_bytes=sum(path.stat().st_size for path in weights),
        size_gzip_bytes=sum(_gzip_bytes(path) for path in weights),
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else None,
        files=tuple(
            FileRecord(path=p.relative_to(folder).as_posix(), sha256=file_sha256(p), bytes=p.stat().st_size) for p in folder_files(folder)
        ),
    )


def _gzip_bytes(path: Path) -> int:
    """Bytes of one file after ``gzip -9 -n`` (no name, no time in the header), to 0.01 %: zlib deflates a hair otherwise."""
    squeezed = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16, _MEMORY)
    total = 0
    with path.open("rb") as handle:
        while piece := handle.read(_PIECE):
            total += len(squeezed.compress(piece))
    return total + len(squeezed.flush())


def _external_data(model: Path) -> set[str]:
    """The files, relative to the model's folder, that hold tensors of it."""
    import onnx

    found: set[str] = set()
    graphs: list[onnx.GraphProto | onnx.FunctionProto] = []
    proto = onnx.load(str(model), load_external_data=False)
    graphs += [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        tensors = list(graph.initializer) if isinstance(graph, onnx.GraphProto) else []
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                graphs += [attribute.g, *attribute.graphs]
        external = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
        found |= {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    return found
