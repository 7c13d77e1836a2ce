"""first-token: where the head reads one token, the last layer computes that token alone.

A classifier of the BERT kind gathers the first token's state behind the last layer. All that this layer does behind its keys and values
(query, attention, output, feed-forward, norms) treats each token by itself, so the choice of the token can stand before it: five sixths
of the layer's products fall away, the outputs stay what they were. In a dynamically quantized graph the activations of one token get a
range of their own, which is a finer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit

# Which inputs a node then reads otherwise: (input, its axis of which the first is enough), or None where all of it is still read.
# Inputs that have not that axis are left out.
Wants = Iterator[tuple[int, int | None]]


def apply(model: ir.Model) -> int:
    """Move each Gather or Slice of the first of axis 1 as far up as it can go; how many nodes then work on one token."""
    done = 0
    for node in list(model.graph):
        if _takes_first(node):
            done += _move_up(model, node)
    edit.tidy(model)
    return done


def _takes_first(node: ir.Node) -> bool:
    return (
        node.op_type == "Gather"
        and edit.constant(node.inputs[0]) is None
        and edit.scalar(node.inputs[1]) == 0
        and edit.integer(node, "axis", 0) == 1
        and edit.rank(node.inputs[0]) == 3
    )


def _move_up(model: ir.Model, gather: ir.Node) -> int:
    """Find what is read of its first token alone, from the gather upwards; then slice where that begins."""
    asked: dict[ir.Value, int | None] = {}  # the axis along which the first is wanted; None: all of it

    def ask(value: ir.Value, axis: int | None) -> None:
        # scale and zero point of a quantized activation go with its integers, whose readers decide
        if not (edit.producer(value, "DynamicQuantizeLinear") and value.index()):
            asked[value] = axis if asked.get(value, axis) == axis else None

    for output in model.graph.outputs:
        ask(output, None)
    moved: dict[ir.Node, int] = {}
    for node in reversed(list(model.graph)):
        wants: list[tuple[int, int | None]] | None = None
        if node is gather:
            wants = [(0, 1)]
        else:
            axes = {asked[value] for value in node.outputs if value in asked}
            axis = axes.pop() if len(axes) == 1 else None
            if axis is not None and node.op_type in _WANTS:
                try:
                    wants = list(_WANTS[node.op_type](node, axis))
                except _Stays:
                    wants = None
                else:
                    moved[node] = axis
        reads = [(i, None) for i in range(len(node.inputs))] if wants is None else wants
        for i, along in reads:
            value = node.inputs[i]
            if value is not None and edit.constant(value) is None:
                ask(value, along)
    if not moved:
        return 0
    sliced: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, axis in list(moved.items()):
        for i, wanted in _WANTS[node.op_type](node, axis):
            value = node.inputs[i]
            if wanted is not None and value is not None and value.producer() not in moved:
                if (value, wanted) not in sliced:
                    sliced[value, wanted] = _slice(model, value, wanted)
                node.replace_input_with(i, sliced[value, wanted])
    for node, axis in moved.items():
        _one(node, axis)
    return len(moved)


def _slice(model: ir.Model, value: ir.Value, axis: int) -> ir.Value:
    bounds = [edit.add_constant(model, f"first_{name}", np.array([number], np.int64)) for name, number in (("start", 0), ("end", 1))]
    along = edit.add_constant(model, f"first_axis_{axis}", np.array([axis], np.int64))
    graph, name = model.graph, f"{value.name}_first_{axis}"
    made = ir.node("Slice", [value, *bounds, along], name=name)
    out = made.outputs[0]
    out.name, out.type = name, value.type
    known = edit.shape(value)
    out.shape = ir.Shape([1 if i == axis else d for i, d in enumerate(known)]) if known else None
    before = value.producer()
    if before is None:
        graph.insert_before(graph[0], made)
    else:
        graph.insert_after(before, made)
    return out


def _one(node: ir.Node, axis: int) -> None:
    """Note that the node's output now has one token."""
    known = edit.shape(node.outputs[0])
    if known:
        node.outputs[0].shape = ir.Shape([1 if i == axis else d for i, d in enumerate(known)])


class _Stays(Exception):  # noqa: N818  # no fault: the node cannot work on one token
    """The node needs all tokens."""


def _elementwise(node: ir.Node, axis: int) -> Wants:
    whole = edit.rank(node.outputs[0])
    for i, value in enumerate(node.inputs):
        lengths = edit.shape(value)
        if whole is None or lengths is None:
            raise _Stays
        own = axis - (whole - len(lengths))
        if own >= 0 and lengths[own] != 1:
            if edit.constant(value) is not None:
                raise _Stays
            yield i, own


def _along_last(node: ir.Node, axis: int) -> Wants:
    whole = edit.rank(node.outputs[0])
    if whole is None or axis >= edit.integer(node, "axis", -1) % whole:
        raise _Stays
    yield 0, axis


def _product(node: ir.Node, axis: int) -> Wants:
    whole, left = edit.rank(node.outputs[0]), edit.rank(node.inputs[0])
    if whole is None or left is None or axis != whole - 2 or left < 2:
        raise _Stays
    yield 0, left - 2
    yield 1, None


def _quantize(node: ir.Node, axis: int) -> Wants:  # noqa: ARG001  # one signature for all
    yield 0, axis


def _transpose(node: ir.Node, axis: int) -> Wants:
    order = edit.integers(node, "perm")
    if not order:
        raise _Stays
    yield 0, order[axis]


def _reshape(node: ir.Node, axis: int) -> Wants:
    before, after, target = edit.shape(node.inputs[0]), edit.shape(node.outputs[0]), edit.constant(node.inputs[1])
    if before is None or after is None or target is None or before[: axis + 1] != after[: axis + 1] or target[axis] > 0:
        raise _Stays
    yield 0, axis


_WANTS: dict[str, Callable[[ir.Node, int], Wants]] = {
    **dict.fromkeys(
        ("Add", "Sum", "Sub", "Mul", "Div", "Pow", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid", "Cast", "Where", "Identity"), _elementwise
    ),
    "LayerNormalization": _along_last,
    "Softmax": _along_last,
    "MatMul": _product,
    "MatMulInteger": _product,
    "DynamicQuantizeLinear": _quantize,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "Transpose": _transpose,
    "Reshape": _reshape,
}
