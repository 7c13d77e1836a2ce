"""The .onnx file as data: read it, write it in one form, count what is in it, check that it runs.

Everything here looks at files, so that records tell what was written and not what was meant. Written files hold no
path, no time and no library's notes: the same graph gives the same bytes in every process.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxsqueeze.artifact import EXTERNAL_DATA_FILE, MODEL_FILE
from onnxsqueeze.errors import StageError, without_paths
from onnxsqueeze.results import WeightClass

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

# protobuf cannot hold a message of 2 GiB; the rest is room for the graph itself
EXTERNAL_ABOVE_BYTES = 1_900_000_000
_EXTERNAL_TENSOR_BYTES = 1024  # onnx.save_model's own default: smaller tensors stay in the .onnx
_PRODUCER = "onnxsqueeze"

# Where a module path speaks of a class; the first match decides. Source: module names of transformers' BERT, DistilBERT, RoBERTa, ELECTRA.
_CLASSES = (
    ("norm", re.compile(r"layer_?norm", re.IGNORECASE)),
    ("embedding", re.compile(r"embedding", re.IGNORECASE)),
    ("head", re.compile(r"classifier|pooler", re.IGNORECASE)),
    ("attention", re.compile(r"attention", re.IGNORECASE)),
    ("feed_forward", re.compile(r"intermediate|ffn|layer[._]\d+[./]output", re.IGNORECASE)),
)
_SCALE_NAME = re.compile(r"_(scales?|zero_points?|zp)(_|$)", re.IGNORECASE)


class _Places(NamedTuple):
    """Which inputs of an operator hold its weight, the weight's zero point, and all scales and zero points."""

    weight: int
    zero_point: int
    scales: tuple[int, ...]


# Source: ONNX operator docs and onnxruntime's docs/ContribOperators.md.
_WEIGHT_INPUTS = {
    "DequantizeLinear": _Places(0, 2, (1, 2)),
    "QuantizeLinear": _Places(0, 2, (1, 2)),
    "MatMulInteger": _Places(1, 3, (2, 3)),
    "MatMulIntegerToFloat": _Places(1, 5, (2, 3, 4, 5)),
    "DynamicQuantizeMatMul": _Places(1, 3, (2, 3)),
    "QLinearMatMul": _Places(3, 5, (1, 2, 4, 5, 6, 7)),
    "QGemm": _Places(3, 5, (1, 2, 4, 5, 7, 8)),
    "QAttention": _Places(1, 7, (3, 4, 6, 7)),
    "MatMulNBits": _Places(1, 3, (2, 3)),
    "GatherBlockQuantized": _Places(0, 3, (2, 3)),
}
_UNPACKING = ("DequantizeLinear", "Cast", "Identity", "Transpose", "Reshape")
_MOVING = ("Gather", "Transpose", "Reshape")  # the same values elsewhere: a scale may follow
_INTEGER_WEIGHTS = ("int8", "uint8", "int4", "uint4")


def load(path: Path) -> onnx.ModelProto:
    """Read an .onnx file with the external data beside it."""
    import onnx

    return onnx.load(str(path))


def save(model: onnx.ModelProto, folder: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES) -> Path:
    """Write ``folder/model.onnx``, and ``model.onnx_data`` beside it where the weights exceed ``external_above_bytes``.

    ``model`` is stripped (see `strip`), and with external data its tensors are emptied: do not use it afterwards.
    """
    import onnx

    strip(model)
    target = folder / MODEL_FILE
    weights_bytes = sum(len(tensor.raw_data) for graph in _graphs(model.graph) for tensor in graph.initializer)
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
    used = {name for graph in _graphs(model.graph) for node in graph.node for name in node.input}
    used |= {output.name for graph in _graphs(model.graph) for output in graph.output}
    domains = {"", *(node.domain for graph in _graphs(model.graph) for node in graph.node)}
    _replace(model.opset_import, [entry for entry in model.opset_import if entry.domain in domains])
    for graph in _graphs(model.graph):
        graph.doc_string = ""
        del graph.value_info[:]
        live = [tensor for tensor in graph.initializer if tensor.name in used]
        if len(live) < len(graph.initializer):
            _replace(graph.initializer, live)
        for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
        for tensor in graph.initializer:
            if not tensor.HasField("raw_data") and not tensor.external_data and tensor.data_type != onnx.TensorProto.STRING:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def operators(path: Path) -> dict[str, int]:
    """Nodes per operator in the file, subgraphs included; operators outside ONNX's own domain carry it: "com.microsoft.MatMulNBits"."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    counted = Counter(_qualified(node) for graph in _graphs(model.graph) for node in graph.node)
    return dict(sorted(counted.items()))


def weights(path: Path) -> tuple[WeightClass, ...]:
    """Every initializer of the file, by what it does in the model and the type it is stored in.

    The class comes from the module path of the node that reads it, through nodes that only unpack it (DequantizeLinear, Cast,
    …). Scales and zero points are "other". Zeros are values that stand for 0.0, so they are counted relative to the zero
    point. Packed MatMulNBits data counts by the weights it holds, not by its bytes.
    """
    index = _Index.of(load(path))
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, tensor in index.tensors.items():
        dtype, n, zeros = _content(tensor, index)
        total = totals[_class_of(name, index), dtype]
        for i, amount in enumerate((n, zeros, _stored_bytes(tensor))):
            total[i] += amount
    rows = sorted(totals.items())
    return tuple(WeightClass(class_=class_, dtype=dtype, n=n, zeros=zeros, bytes=size) for (class_, dtype), (n, zeros, size) in rows)


def integer_weights(path: Path) -> dict[str, int]:
    """Integer matrices in the file per operator that works on them: ``{"Gather": 3, "MatMulInteger": 38}``.

    Behind a DequantizeLinear the operator is the one that reads its output. Packed 4-bit and 8-bit matrices count too.
    """
    index = _Index.of(load(path))
    found: Counter[str] = Counter()
    for name, tensor in index.tensors.items():
        if _type_name(tensor) not in _INTEGER_WEIGHTS or len(tensor.dims) < 2 or index.is_scale(name):
            continue
        found.update(_qualified(node) for node in index.users(name))
    return dict(sorted(found.items()))


def float_weights(path: Path) -> dict[str, set[str]]:
    """Names of the floating-point matrices in the file, per operator that reads them: ``{"Gather": {"bert.embeddings.…"}, …}``."""
    index = _Index.of(load(path))
    found: dict[str, set[str]] = defaultdict(set)
    for name, tensor in index.tensors.items():
        if _type_name(tensor).startswith(("float", "bfloat")) and len(tensor.dims) > 1 and not index.is_scale(name):
            for node in index.users(name):
                found[_qualified(node)].add(name)
    return dict(found)


def tensors_of(path: Path, dtype: str) -> int:
    """How many initializers of the file are stored as ``dtype``, e.g. "float16"."""
    return sum(_type_name(tensor) == dtype for graph in _graphs(load(path).graph) for tensor in graph.initializer)


def check(path: Path, like: Path | None = None) -> None:
    """Raise StageError unless the file is valid ONNX, loads in a stock CPU session, and has the inputs and outputs of ``like``."""
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
    if like is not None and (here := signature(path)) != (there := signature(like)):
        raise StageError(f"{where}: inputs and outputs changed: got {_spoken(here)}, the parent has {_spoken(there)}")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only; changes nothing that runs
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _session_errors() as error:
        raise StageError(f"{where}: ONNX Runtime {ort.__version__} cannot load it: {without_paths(str(error))}") from error


def signature(path: Path) -> dict[str, tuple[str, str]]:
    """The file's inputs and outputs in order: name → ("input" | "output", type), e.g. ``{"logits": ("output", "float32")}``."""
    import onnx
    from onnx import helper

    graph = onnx.load(str(path), load_external_data=False).graph
    initial = {tensor.name for tensor in graph.initializer}
    result: dict[str, tuple[str, str]] = {}
    for side, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if value.name not in initial:
                result[value.name] = (side, str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)))
    return result


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


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """``graph`` and every graph inside its nodes (branches of If, bodies of Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _read_initializers_directly(model: onnx.ModelProto) -> None:
    """Drop the Identity nodes with which an exporter shares equal tensors."""
    initial = {tensor.name for graph in _graphs(model.graph) for tensor in graph.initializer}
    outputs = {output.name for graph in _graphs(model.graph) for output in graph.output}
    source: dict[str, str] = {}
    for graph in _graphs(model.graph):
        kept = []
        for node in graph.node:  # in topological order: an Identity of an Identity finds the first one's source
            for i, name in enumerate(node.input):
                node.input[i] = source.get(name, name)
            if node.op_type == "Identity" and node.input[0] in initial and node.output[0] not in outputs:
                source[node.output[0]] = node.input[0]
            else:
                kept.append(node)
        if len(kept) < len(graph.node):
            _replace(graph.node, kept)


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Put ``items`` (some or all of the repeated ``field``'s own) in its place."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def _qualified(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


@dataclass(frozen=True)
class _Index:
    """Who reads what: every initializer by name, and for every tensor the (node, position of the input) pairs that read it."""

    tensors: dict[str, onnx.TensorProto]
    readers: dict[str, list[tuple[onnx.NodeProto, int]]]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Index:
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        tensors: dict[str, onnx.TensorProto] = {}
        for graph in _graphs(model.graph):
            tensors.update((tensor.name, tensor) for tensor in graph.initializer)
            for node in graph.node:
                for i, name in enumerate(node.input):
                    readers[name].append((node, i))
        return cls(tensors, readers)

    def is_scale(self, name: str) -> bool:
        """Whether ``name`` is a scale or a zero point."""
        by_place = any(i in _WEIGHT_INPUTS[node.op_type].scales for node, i in self.readers[name] if node.op_type in _WEIGHT_INPUTS)
        return by_place or _SCALE_NAME.search(name) is not None

    def users(self, name: str) -> Iterator[onnx.NodeProto]:
        """The nodes that work with the tensor, behind those that only bring it into another form."""
        for node, _ in self.readers[name]:
            if node.op_type in _UNPACKING:
                yield from self.users(node.output[0])
            else:
                yield node

    def zero_point(self, name: str) -> tuple[onnx.NodeProto, onnx.TensorProto | None] | None:
        """The node that scales the integer tensor ``name``, and its zero point (None: the operator's default)."""
        for node, i in self.readers[name]:
            places = _WEIGHT_INPUTS.get(node.op_type)
            if places is not None and i == places.weight:
                return node, self.tensors.get(node.input[places.zero_point]) if len(node.input) > places.zero_point else None
            if places is None and node.op_type in _MOVING and i == 0 and (found := self.zero_point(node.output[0])) is not None:
                return found
        return None


def _class_of(name: str, index: _Index) -> str:
    if index.is_scale(name):
        return "other"
    seen, front = {name}, [name]
    while front:  # breadth first: the nearest reader whose path says something
        nodes = [node for tensor in front for node, _ in index.readers[tensor]]
        for text in (*front, *(node.name for node in nodes)):
            for class_, pattern in _CLASSES:
                if pattern.search(text):
                    return class_
        front = [output for node in nodes for output in node.output if output not in seen]
        seen.update(front)
    return "other"


def _content(tensor: onnx.TensorProto, index: _Index) -> tuple[str, int, int]:
    """(type, weights, weights that stand for zero)."""
    import numpy as np
    from onnx import numpy_helper

    values: NDArray[Any] = numpy_helper.to_array(tensor)
    dtype = _type_name(tensor)
    if dtype == "string":
        return dtype, values.size, 0
    scaled = index.zero_point(tensor.name) if dtype in _INTEGER_WEIGHTS else None
    if scaled is None:
        return dtype, values.size, int((values == 0).sum())
    node, zero = scaled
    if node.op_type == "MatMulNBits":
        return _packed_content(node, values, zero)
    point: NDArray[Any] = np.zeros(1, np.int32) if zero is None else numpy_helper.to_array(zero).astype(np.int32)
    if point.ndim == 1 and point.size > 1:  # one per channel
        axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
        point = np.expand_dims(point, tuple(k for k in range(values.ndim) if k != axis % values.ndim))
    elif point.ndim > 1 and point.shape != values.shape:  # one per block
        for axis in range(values.ndim):
            point = np.repeat(point, -(-values.shape[axis] // point.shape[axis]), axis).take(range(values.shape[axis]), axis)
    return dtype, values.size, int((values.astype(np.int32) == point).sum())


def _packed_content(node: onnx.NodeProto, packed: NDArray[np.uint8], zero: onnx.TensorProto | None) -> tuple[str, int, int]:
    """The same for MatMulNBits.

    ``packed[N, blocks, bytes]``, low bits first; zero points ``[N, blocks]`` packed alike, 2^(bits-1) where absent.
    """
    from onnx import numpy_helper

    settings = {a.name: a.i for a in node.attribute}
    inner, outer, bits, block = settings["K"], settings["N"], settings["bits"], settings["block_size"]
    blocks = -(-inner // block)
    values = _unpack(packed.reshape(outer, -1), bits).reshape(outer, blocks, block)
    point: Any = 1 << (bits - 1)
    if zero is not None:
        point = _unpack(numpy_helper.to_array(zero).reshape(outer, -1), bits)[:, :blocks, None]
    zeros = (values == point).reshape(outer, -1)[:, :inner]
    return f"uint{bits}", inner * outer, int(zeros.sum())


def _unpack(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    import numpy as np

    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread: NDArray[np.uint8] = ((data[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*data.shape[:-1], -1)
    return spread


def _type_name(tensor: onnx.TensorProto) -> str:
    """ONNX's own name of the stored type in small letters, with "float32" for FLOAT and "float64" for DOUBLE."""
    from onnx import TensorProto

    name: str = TensorProto.DataType.Name(tensor.data_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    return len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize()
