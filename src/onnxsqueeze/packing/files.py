"""Packed .onnx models: every initializer that gets smaller is written in few bits, with the operators that rebuild it; and the way back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxsqueeze import graph as graphs
from onnxsqueeze.packing import coding

Values = NDArray[Any]

OPSET = 18  # BitwiseOr
_MARK = "~"  # begins the name of every tensor that only rebuilds weights; short, since there are a thousand
_LEAST_BYTES = 256
_AT_ONCE = 8  # codes that fill whole bytes at any width


def pack(model: onnx.ModelProto, least_saving: float = 0.0) -> dict[str, coding.Packed]:
    """Pack the initializers of ``model`` in place, those in the branches of its `If`s too; how each that got smaller is written, by its name.

    One stays as it is where that saves no more than ``least_saving`` of its bytes. The default opset must be `OPSET` or newer. What is packed already stays.
    """
    found: dict[str, coding.Packed] = {}
    shared = _Shared(model.graph)
    for graph in graphs.graphs(model.graph):
        for tensor in [one for one in graph.initializer if not one.name.startswith(_MARK)]:
            values = numpy_helper.to_array(tensor)
            packed = coding.pack(values, least_saving) if values.nbytes >= _LEAST_BYTES and not _is_input(graph, tensor.name) else None
            if packed is not None:
                found[tensor.name] = packed
                graph.initializer.remove(tensor)
                _Decoder(graph, shared, len(found)).rebuild(packed, tensor.name)
    shared.write()
    for graph in graphs.graphs(model.graph):
        graphs.replace(graph.node, sorted(graph.node, key=lambda node: not _rebuilds(node)))  # decoders first, in their order
    return found


def unpack(model: onnx.ModelProto) -> bool:
    """Put the packed weights of ``model`` back as initializers, in place: its dense twin. False where nothing was packed."""
    import onnxruntime as ort

    outer = [_copy(tensor) for tensor in model.graph.initializer if tensor.name.startswith(_MARK)]
    rebuilt = False
    for graph in graphs.graphs(model.graph):
        decoders = [_copy(node) for node in graph.node if _rebuilds(node)]
        if not decoders:
            continue
        rebuilt = True
        names = [name for node in decoders for name in node.output if not name.startswith(_MARK)]
        held = {tensor.name: tensor for tensor in (*outer, *graph.initializer) if tensor.name.startswith(_MARK)}
        outputs = [onnx.ValueInfoProto(name=name) for name in names]
        part = helper.make_graph(decoders, "weights", [], outputs, initializer=list(held.values()))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        alone = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = ort.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graphs.replace(graph.node, [node for node in graph.node if not _rebuilds(node)])
        graphs.replace(graph.initializer, [tensor for tensor in graph.initializer if not tensor.name.startswith(_MARK)])
        graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in zip(names, session.run(None, {}), strict=True))
    return rebuilt


def dense(path: Path) -> onnx.ModelProto:
    """The model of a file with its packed weights unpacked, to be read."""
    model = graphs.load(path)
    unpack(model)
    return model


def owners(model: onnx.ModelProto) -> dict[str, str]:
    """Of each initializer of ``model`` that holds data of one packed weight alone, by its name: the weight's. Tables that weights share are not in it."""
    numbers: dict[str, str] = {}
    parts: list[str] = []
    for graph in graphs.graphs(model.graph):
        parts += [tensor.name for tensor in graph.initializer if _number(tensor.name)]
        for node in filter(_rebuilds, graph.node):
            own = next((number for name in node.input if (number := _number(name))), None)
            if own and not node.output[0].startswith(_MARK):
                numbers[own] = node.output[0]
    return {name: numbers[_number(name)] for name in parts}


def is_shared(name: str) -> bool:
    """Whether an initializer is a table or a constant that decoders have in common."""
    return name.startswith(_MARK) and not _number(name)


def stored_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Of each packed weight of ``model``, by its name: the bytes of its own data. Tables that all share and the operators are not in it."""
    sizes: Counter[str] = Counter()
    owner = owners(model)
    for graph in graphs.graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.name in owner:
                sizes[owner[tensor.name]] += len(tensor.raw_data)
    return dict(sizes)


def _number(name: str) -> str:
    """Of the weight whose decoder alone has this tensor; "" for other tensors."""
    number, dot, _ = name.removeprefix(_MARK).partition(".")
    return number if name.startswith(_MARK) and dot else ""


def _rebuilds(node: onnx.NodeProto) -> bool:
    return any(name.startswith(_MARK) for name in node.input)


def _copy(part: Any) -> Any:
    return type(part).FromString(part.SerializeToString())


def _is_input(graph: onnx.GraphProto, name: str) -> bool:
    """Whether a caller may give the tensor another value: then it is no constant."""
    return any(value.name == name for value in graph.input)


def _led(values: Values) -> Values:
    """With a zero before them, which stands for nothing."""
    return np.concatenate([np.zeros(1, values.dtype), values])


def _bits(values: Values) -> Values:
    """int8 as uint8."""
    return values.view(np.uint8) if values.dtype == np.int8 else values


class _Shared:
    """Constants that decoders have in common, in the outermost graph, which branches see too."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._made: list[TensorProto] = []

    def name(self, values: Values) -> str:
        """Of a constant of these values."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._known:
            self._known[key] = f"{_MARK}c{len(self._known)}"
            self._made.append(numpy_helper.from_array(values, self._known[key]))
        return self._known[key]

    def write(self) -> None:
        """Add those that were asked for to the graph."""
        self._graph.initializer.extend(self._made)


class _Decoder:
    """Writes the operators that rebuild one tensor into a graph; their names hold ``number``."""

    def __init__(self, graph: onnx.GraphProto, shared: _Shared, number: int) -> None:
        self._graph, self._shared, self._number, self._made = graph, shared, number, 0

    def rebuild(self, packed: coding.Packed, name: str) -> None:
        """End in a tensor of that name."""
        shape = self._constant(np.array(packed.shape, np.int64))
        if isinstance(packed, coding.Flat):
            self._node("Reshape", self._stream(packed.stream), shape, output=name)
        elif isinstance(packed, coding.Levels):
            ranks = self._node("Reshape", self._node("Cast", self._stream(packed.ranks), to=TensorProto.INT32), shape)
            self._node("GatherElements", self._own(packed.book), ranks, output=name, axis=packed.axis)
        else:
            places = self._node("CumSum", self._stream(packed.steps), self._constant(np.array(0, np.int64)))
            size = self._constant(np.array([int(np.prod(packed.shape))], np.int64))
            empty = self._node("ConstantOfShape", size, value=numpy_helper.from_array(packed.fill))
            self._node("Reshape", self._node("ScatterElements", empty, places, self._stream(packed.values)), shape, output=name)

    def _stream(self, stream: coding.Stream) -> str:
        """The values of a stream, ``[n]``."""
        if isinstance(stream, coding.Listed):
            return self._node("GatherElements", self._own(stream.book), self._values(stream.places))
        if isinstance(stream, coding.Coded) and stream.further and stream.book.dtype == np.int8:  # of which there is no Where
            return self._node("Cast", self._values(stream), to=TensorProto.INT8)
        return self._values(stream)

    def _values(self, stream: coding.Stream, *, lead: bool = False) -> str:
        """The values of a stream, int8 by its bits as uint8 where two streams meet; with ``lead`` one more before them and some behind, which stand for nothing."""
        if not isinstance(stream, coding.Coded):
            values = coding.values_of(stream)
            return self._own(_led(_bits(values)) if lead else values)
        codes = self._codes(_led(stream.codes) if lead else stream.codes, stream.bits)
        n = len(stream.codes)
        if not lead and stream.bits < 8 and n % _AT_ONCE:
            ends = self._constant(np.array([n], np.int64))
            codes = self._node("Slice", codes, self._constant(np.array([0], np.int64)), ends)
        places = self._node("Cast", codes, to=TensorProto.INT32)
        if stream.further is None:
            return self._node("GatherElements", self._own(_bits(stream.book) if lead else stream.book), places)
        book = _bits(stream.book)
        if stream.bits == 1:
            beyond, counted, near = self._node("Cast", codes, to=TensorProto.BOOL), places, self._own(book)
        else:
            beyond = self._node("Equal", places, self._constant(np.array(2**stream.bits - 1, np.int32)))
            counted = self._node("Cast", beyond, to=TensorProto.INT32)
            near = self._node("GatherElements", self._own(np.append(book, book[:1])), places)
        count = self._node("CumSum", counted, self._constant(np.array(0, np.int64)))  # no NonZero: sessions do not fold it
        if isinstance(stream.further, coding.Count):
            far = self._node("Add", count, self._constant(np.array(stream.further.start - 1, np.int32)))
        else:
            far = self._node("GatherElements", self._values(stream.further, lead=True), count)
        return self._node("Where", beyond, far, near)

    def _codes(self, codes: NDArray[np.uint8], bits: int) -> str:
        """``codes[n]`` again, uint8, with up to seven zeros behind them, from planes of one, two or four bits, the highest bits first."""
        if bits == 8:
            return self._own(codes)
        codes = np.concatenate([codes, np.zeros(-len(codes) % _AT_ONCE, np.uint8)])
        found, above = "", bits
        for width in coding.PLANES[bits]:
            above -= width
            plane = ((codes >> above) & (2**width - 1)).astype(np.uint8)
            whole = self._halves(plane, above) if width == 4 else self._table(plane, width, above)
            found = self._node("BitwiseOr", found, whole) if found else whole
        return found

    def _halves(self, codes: NDArray[np.uint8], above: int) -> str:
        """``codes[n]`` of four bits, times 2^``above``, from bytes whose low halves are the first n / 2 codes and whose high ones are the others."""
        low, high = np.split(codes, 2)
        packed = self._own(low | (high << 4))
        first = self._node("BitwiseAnd", packed, self._constant(np.array(15, np.uint8)))
        second = self._node("BitShift", packed, self._constant(np.array(4, np.uint8)), direction="RIGHT")
        whole = self._node("Concat", first, second, axis=0)
        return self._node("BitShift", whole, self._constant(np.array(above, np.uint8)), direction="LEFT") if above else whole

    def _table(self, codes: NDArray[np.uint8], width: int, above: int) -> str:
        """``codes[n]`` of one or two bits, times 2^``above``, from bytes that hold several, by a table of all bytes."""
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        packed = np.bitwise_or.reduce(codes.reshape(-1, 8 // width) << shifts, axis=1).astype(np.uint8)
        table = ((np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8(2**width - 1)) << np.uint8(above)
        places = self._node("Cast", self._own(packed), to=TensorProto.INT32)
        rows = self._node("Gather", self._constant(table), places)
        return self._node("Reshape", rows, self._constant(np.array([-1], np.int64)))

    def _constant(self, values: Values) -> str:
        return self._shared.name(values)

    def _own(self, values: Values) -> str:
        name = self._name()
        self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        made = output or self._name()
        self._graph.node.append(helper.make_node(kind, inputs, [made], **attributes))
        return made

    def _name(self) -> str:
        self._made += 1
        return f"{_MARK}{self._number}.{self._made}"
