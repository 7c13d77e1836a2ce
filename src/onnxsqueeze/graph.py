"""The .onnx file as data: read it, write it in one form, check that it runs. What its weights are: `onnxsqueeze.weights`.

Everything here looks at files, so that records tell what was written and not what was meant. Written files hold no
path, no time and no library's notes: the same graph gives the same bytes in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze.artifact import EXTERNAL_DATA_FILE, MODEL_FILE
from onnxsqueeze.errors import ModelError, StageError, without_paths

if TYPE_CHECKING:
    import onnx

# protobuf cannot hold a message of 2 GiB; the rest is room for the graph itself
EXTERNAL_ABOVE_BYTES = 1_900_000_000
_EXTERNAL_TENSOR_BYTES = 1024  # onnx.save_model's own default: smaller tensors stay in the .onnx
_PRODUCER = "onnxsqueeze"
_INSTEAD_OF_ONNX = "name an .onnx file as `onnxsqueeze run` writes it; checkpoints (safetensors, pickles) and .ort files are something else"


def load(path: Path) -> onnx.ModelProto:
    """Read an .onnx file with the external data beside it."""
    import onnx

    return onnx.load(str(path))


def files_of(path: Path) -> list[Path]:
    """The .onnx file, then those beside it that hold tensors of it, whether they are there or not.

    Raises ModelError where it names one outside its folder: by an absolute path, by ``..``, or by a link.
    """
    import onnx

    found: set[str] = set()
    proto = onnx.load(str(path), load_external_data=False)
    left: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while left:
        graph = left.pop()
        tensors = list(graph.initializer) if isinstance(graph, onnx.GraphProto) else []
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                left += [attribute.g, *attribute.graphs]
        external = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
        found |= {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    folder = path.parent.resolve()
    for name in sorted(found):
        if not (folder / name).resolve().is_relative_to(folder):
            raise ModelError(
                f"{path.parent.name}/{path.name}: its weights are said to lie in {without_paths(name)!r}, outside its folder",
                remedy="do not use this file: a model is its .onnx and files beside it",
            )
    return [path, *(path.parent / name for name in sorted(found))]


def read(path: Path) -> onnx.ModelProto:
    """The .onnx file as it is, without the external data beside it. Raises ModelError where it is no ONNX or cannot be read."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="name an .onnx file, or a folder that holds model.onnx"
        ) from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path}: is no ONNX file", remedy=_INSTEAD_OF_ONNX) from error
    if not model.HasField("graph") or not model.opset_import:  # protobuf takes an empty file, and some others, for a message
        raise ModelError(f"{path}: is no ONNX file: it holds no graph", remedy=_INSTEAD_OF_ONNX)
    return model


def save(model: onnx.ModelProto, folder: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES) -> Path:
    """Write ``folder/model.onnx``, and ``model.onnx_data`` beside it where the weights exceed ``external_above_bytes``.

    ``model`` is stripped (see `strip`), and with external data its tensors are emptied: do not use it afterwards.
    """
    import onnx

    strip(model)
    target = folder / MODEL_FILE
    weights_bytes = sum(len(tensor.raw_data) for graph in graphs(model.graph) for tensor in graph.initializer)
    external = weights_bytes > external_above_bytes
    onnx.save_model(
        model,
        str(target),
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location=EXTERNAL_DATA_FILE if external else None,
        size_threshold=_EXTERNAL_TENSOR_BYTES,
        convert_attribute=False,
    )
    return target


def strip(model: onnx.ModelProto) -> None:
    """Bring ``model`` into the form in which files are written.

    Gone: doc strings (exporters put stack traces with paths there), inferred shapes (stale after a rewrite; sessions infer
    them anew), libraries' notes in the metadata, Identity nodes on initializers (they hide weights from quantizers),
    initializers that nothing reads, operator sets that no node is from. Tensors are raw bytes.
    """
    import onnx
    from onnx import numpy_helper

    model.producer_name, model.producer_version, model.doc_string = _PRODUCER, "", ""
    kept = [entry for entry in model.metadata_props if not entry.key.startswith("onnx.")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    _read_initializers_directly(model)
    used = {name for graph in graphs(model.graph) for node in graph.node for name in node.input}
    used |= {output.name for graph in graphs(model.graph) for output in graph.output}
    domains = {"", *(node.domain for graph in graphs(model.graph) for node in graph.node)}
    replace(model.opset_import, [entry for entry in model.opset_import if entry.domain in domains])
    for graph in graphs(model.graph):
        graph.doc_string = ""
        del graph.value_info[:]
        live = [tensor for tensor in graph.initializer if tensor.name in used]
        if len(live) < len(graph.initializer):
            replace(graph.initializer, live)
        for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
        for tensor in graph.initializer:
            if not tensor.external_data:
                tensor.ClearField("data_location")  # read from a file of its own, it says so still
            if not tensor.HasField("raw_data") and not tensor.external_data and tensor.data_type != onnx.TensorProto.STRING:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def operators(path: Path) -> dict[str, int]:
    """Nodes per operator in the file, subgraphs included; operators outside ONNX's own domain carry it: "com.microsoft.MatMulNBits"."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    counted = Counter(qualified(node) for graph in graphs(model.graph) for node in graph.node)
    return dict(sorted(counted.items()))


def check(path: Path, like: Path | None = None, *, inputs: str | None = None, outputs: Collection[str] | None = None) -> None:
    """Raise StageError unless the file is valid ONNX, loads in a stock CPU session, and has the inputs and outputs of ``like``.

    ``inputs`` is the type that its int64 inputs must have got ("int32"), ``outputs`` are the only ones that may be left.
    """
    import onnx
    import onnxruntime as ort

    where = f"{path.parent.name}/{path.name}"
    try:
        onnx.checker.check_model(str(path))  # by path: above 2 GB the checker cannot take a message
    except (onnx.checker.ValidationError, ValueError) as error:
        raise StageError(
            f"{where}: not valid ONNX: {without_paths(str(error))}",
            remedy="this is a fault of the stage that wrote it: please report the recipe",
        ) from error
    if like is not None:
        here, there = signature(path), signature(like)
        wanted = {
            name: (side, inputs if inputs and (side, dtype) == ("input", "int64") else dtype)
            for name, (side, dtype) in there.items()
            if outputs is None or side == "input" or name in outputs
        }
        if here != wanted:
            meant = f"; its int64 inputs were to become {inputs}" if inputs else ""
            raise StageError(f"{where}: inputs and outputs changed: got {_spoken(here)}, the parent has {_spoken(there)}{meant}")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only; changes nothing that runs
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _session_errors() as error:
        raise StageError(f"{where}: ONNX Runtime {ort.__version__} cannot load it: {without_paths(str(error))}") from error


def signature(path: Path) -> dict[str, tuple[str, str]]:
    """The file's inputs and outputs in order: name → ("input" | "output", type), e.g. ``{"logits": ("output", "float32")}``."""
    import onnx

    return {name: (side, dtype) for side, name, dtype, _ in values(onnx.load(str(path), load_external_data=False))}


def values(model: onnx.ModelProto) -> list[tuple[str, str, str, tuple[int | str, ...]]]:
    """Inputs and outputs in order: ("input" | "output", name, type, dims); a free dim by its name, or "?". Initializers that are inputs, too, are left out."""
    from onnx import TensorProto, helper

    initial = {tensor.name for tensor in model.graph.initializer}
    found = []
    for side, listed in (("input", model.graph.input), ("output", model.graph.output)):
        for value in (value for value in listed if value.name not in initial):
            kind = value.type.tensor_type
            dims = tuple(int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param or "?") for dim in kind.shape.dim)
            dtype = "string" if kind.elem_type == TensorProto.STRING else str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
            found.append((side, value.name, dtype, dims))
    return found


def _spoken(found: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{side} {name} {dtype}" for name, (side, dtype) in found.items())


def _session_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        RuntimeError,
        ValueError,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    )


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """``graph`` and every graph inside its nodes (branches of If, bodies of Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from graphs(inner)


def _read_initializers_directly(model: onnx.ModelProto) -> None:
    """Drop the Identity nodes with which an exporter shares equal tensors."""
    initial = {tensor.name for graph in graphs(model.graph) for tensor in graph.initializer}
    outputs = {output.name for graph in graphs(model.graph) for output in graph.output}
    source: dict[str, str] = {}
    for graph in graphs(model.graph):
        kept = []
        for node in graph.node:  # in topological order: an Identity of an Identity finds the first one's source
            for i, name in enumerate(node.input):
                node.input[i] = source.get(name, name)
            if node.op_type == "Identity" and node.input[0] in initial and node.output[0] not in outputs:
                source[node.output[0]] = node.input[0]
            else:
                kept.append(node)
        if len(kept) < len(graph.node):
            replace(graph.node, kept)


def replace(field: Any, items: Iterable[Any]) -> None:
    """Put ``items`` (some or all of the repeated ``field``'s own) in its place."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def qualified(node: onnx.NodeProto) -> str:
    """The node's operator; one outside ONNX's own domain carries it: "com.microsoft.MatMulNBits"."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
