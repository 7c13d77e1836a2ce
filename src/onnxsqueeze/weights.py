"""What the weights of an .onnx file are: which part of the model, stored as what, how many of them zero.

Counted in the file, so that records tell what was written and not what was meant.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxsqueeze.graph import files_of, graphs, load, qualified
from onnxsqueeze.results import SizeParts, WeightClass

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

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
_LENGTHS = ("int64", "bool")  # shapes, axes, positions: nothing that is learned
_LSTMS, _LSTM_BIAS = ("LSTM", "DynamicQuantizeLSTM"), 3  # the bias is a matrix
_INTEGER_WEIGHTS = ("int8", "uint8", "int4", "uint4")


def by_class(path: Path, dense: onnx.ModelProto | None = None) -> tuple[WeightClass, ...]:
    """Every initializer of the file, by what it does in the model and the type it is stored in.

    The class comes from the module path of the node that reads it, through nodes that only unpack it (DequantizeLinear, Cast,
    …). Scales, zero points, shapes and axes are "other". Zeros are values that stand for 0.0, so they are counted relative to the zero
    point. MatMulNBits data counts by the weights it holds. Weights that `pack` wrote are those they stand for, with the bytes they have in the file.
    ``dense`` is the same file as `packing.files.dense` gives it, where that is at hand.
    """
    from onnxsqueeze.packing import files as packing

    packed = packing.stored_bytes(load(path))
    index = _Index.of(dense or packing.dense(path))
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, tensor in index.tensors.items():
        dtype, n, zeros = _content(tensor, index)
        total = totals["other" if dtype in _LENGTHS else _class_of(name, index), dtype]
        for i, amount in enumerate((n, zeros, packed.get(name, _stored_bytes(tensor)))):
            total[i] += amount
    rows = sorted(totals.items())
    return tuple(WeightClass(class_=class_, dtype=dtype, n=n, zeros=zeros, bytes=size) for (class_, dtype), (n, zeros, size) in rows)


def by_part(path: Path, dense: onnx.ModelProto | None = None) -> SizeParts:
    """Every byte of the file and its external data, by what it is for. Packed weights count as what they stand for, with the bytes they have in the file.

    ``dense`` is the same file as `packing.files.dense` gives it, where that is at hand.
    """
    import onnx

    from onnxsqueeze.packing import files as packing

    stored = onnx.load(str(path), load_external_data=False)
    index, owner = _Index.of(dense or packing.dense(path)), packing.owners(stored)
    sizes = dict.fromkeys(SizeParts.model_fields, 0)
    for graph in graphs(stored.graph):
        for tensor in graph.initializer:
            part = "decoders" if packing.is_shared(tensor.name) else _part_of(owner.get(tensor.name, tensor.name), index)
            sizes[part] += _whole_bytes(tensor)
    sizes["graph"] = sum(file.stat().st_size for file in files_of(path)) - sum(sizes.values())
    return SizeParts(**sizes)


def integer_values(dense: onnx.ModelProto) -> tuple[list[NDArray[Any]], int]:
    """(the integer weights of a model without packed ones, as they are stored; the bytes of all scales and zero points).

    Biases that are stored as integers are among them. MatMulNBits has two 4-bit weights in a byte, which is one value here.
    """
    from onnx import numpy_helper

    index = _Index.of(dense)
    parts = {name: _part_of(name, index) for name in index.tensors}
    learned = [tensor for name, tensor in index.tensors.items() if parts[name] not in ("scales", "constants")]
    scales = sum(_stored_bytes(tensor) for name, tensor in index.tensors.items() if parts[name] == "scales")
    return [numpy_helper.to_array(tensor) for tensor in learned if _type_name(tensor) in (*_INTEGER_WEIGHTS, "int32")], scales


def integers(path: Path) -> dict[str, int]:
    """Integer matrices in the file per operator that works on them: ``{"Gather": 3, "MatMulInteger": 38}``.

    Behind a DequantizeLinear the operator is the one that reads its output. Packed 4-bit and 8-bit matrices count too.
    """
    index = _Index.of(load(path))
    found: Counter[str] = Counter()
    for name, tensor in index.tensors.items():
        if _type_name(tensor) not in _INTEGER_WEIGHTS or len(tensor.dims) < 2 or index.is_scale(name):
            continue
        found.update(qualified(node) for node in index.users(name))
    return dict(sorted(found.items()))


def floats(path: Path) -> dict[str, set[str]]:
    """Names of the floating-point matrices in the file, per operator that reads them: ``{"Gather": {"bert.embeddings.…"}, …}``."""
    index = _Index.of(load(path))
    found: dict[str, set[str]] = defaultdict(set)
    for name, tensor in index.tensors.items():
        if _type_name(tensor).startswith(("float", "bfloat")) and len(tensor.dims) > 1 and not index.is_scale(name):
            for node in index.users(name):
                found[qualified(node)].add(name)
    return dict(found)


def tensors_of(path: Path, dtype: str) -> int:
    """How many initializers of the file are stored as ``dtype``, e.g. "float16"."""
    return sum(_type_name(tensor) == dtype for graph in graphs(load(path).graph) for tensor in graph.initializer)


@dataclass(frozen=True)
class _Index:
    """Who reads what: every initializer by name, and for every tensor the (node, position of the input) pairs that read it."""

    tensors: dict[str, onnx.TensorProto]
    readers: dict[str, list[tuple[onnx.NodeProto, int]]]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Index:
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        tensors: dict[str, onnx.TensorProto] = {}
        for graph in graphs(model.graph):
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


def _part_of(name: str, index: _Index) -> str:
    """The field of `SizeParts` that counts the initializer ``name``."""
    tensor = index.tensors[name]
    if index.is_scale(name):
        return "scales"
    dtype, axes = _type_name(tensor), len(tensor.dims)
    if dtype in _LENGTHS or axes == 0 or (dtype == "int32" and axes > 1):
        return "constants"
    class_ = _class_of(name, index)
    if axes == 1 or class_ == "norm" or any(i == _LSTM_BIAS and node.op_type in _LSTMS for node, i in index.readers[name]):
        return "biases_and_norms"
    return "embeddings" if class_ == "embedding" else "layers"


def _whole_bytes(tensor: onnx.TensorProto) -> int:
    """What an initializer takes in its file, with its tag and length, and in the external one. Source: protobuf's encoding."""
    message: int = tensor.ByteSize()
    length = -(-message.bit_length() // 7)  # of the length, a varint
    return 1 + length + message + sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


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
    stated = {a.name: a.i for a in node.attribute}
    bits = stated.get("bits", 8) if node.op_type == "GatherBlockQuantized" and dtype == "uint8" else 8
    point: NDArray[Any] = np.zeros(1, np.int32) if zero is None else _unpack(numpy_helper.to_array(zero), bits).astype(np.int32)
    if bits < 8:
        dtype, values = f"uint{bits}", _unpack(values, bits)
        point = point[:, : values.shape[1] // stated["block_size"]] if zero is not None else point
    if point.ndim == 1 and point.size > 1:  # one per channel
        axis = 0 if stated.get("transB") else stated.get("axis", -1)  # QGemm may hold [outputs, inputs]
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
