"""constant-shapes: lengths that the architecture fixes are written down; nothing computes them while the model runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxsqueeze.forms import edit


def apply(model: ir.Model) -> int:
    """Write Reshape targets as constants (0: as it was, -1: the rest) and read fixed lengths off the graph; how many nodes changed.

    Exporters compute ``[batch, tokens, heads, width]`` anew in every layer: a dozen tiny nodes each, and a chain of Cast, Sqrt and Div
    for the attention's scale.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type == "Reshape" and edit.constant(node.inputs[1]) is None:
            target = _target(edit.shape(node.inputs[0]), edit.shape(node.outputs[0]))
            if target is not None:
                name = f"{node.outputs[0].name}_shape"
                node.replace_input_with(1, edit.add_constant(model, name, np.array(target, np.int64)))
                done += 1
        elif node.op_type in ("Gather", "Slice"):
            known = _read_off(node)
            if known is not None:
                edit.replace(node.outputs[0], edit.add_constant(model, f"{node.outputs[0].name}_constant", known))
                done += 1
            elif node.op_type == "Gather" and _ask_the_input(model, node):
                done += 1
    done += edit.fold(model)
    edit.tidy(model)
    return done


def _target(before: tuple[edit.Dimension, ...] | None, after: tuple[edit.Dimension, ...] | None) -> list[int] | None:
    """What Reshape is told: a length, 0 for the same dimension of the input, -1 for at most one other."""
    if before is None or after is None:
        return None
    target = [d if isinstance(d, int) else 0 if i < len(before) and before[i] == d else -1 for i, d in enumerate(after)]
    return target if target.count(-1) <= 1 else None


def _read_off(node: ir.Node) -> NDArray[np.int64] | None:
    """What a Gather or Slice takes from the Shape of a value whose lengths there are fixed."""
    lengths = _lengths(node.inputs[0])
    places = [edit.constant(value) for value in node.inputs[1:]]
    if lengths is None or any(place is None for place in places):
        return None
    if node.op_type == "Gather":
        assert places[0] is not None  # noqa: S101  # looked at above
        taken = [lengths[int(i)] for i in places[0].reshape(-1)]
        return np.array(taken, np.int64).reshape(places[0].shape) if all(isinstance(d, int) for d in taken) else None
    start, end = (int(place.reshape(-1)[0]) for place in places[:2] if place is not None)
    step = int(places[3].reshape(-1)[0]) if len(places) > 3 and places[3] is not None else 1
    part = lengths[start : min(end, len(lengths)) if end >= 0 else end : step]
    return np.array(part, np.int64) if part and all(isinstance(d, int) for d in part) else None


def _lengths(value: ir.Value | None) -> tuple[edit.Dimension, ...] | None:
    """What Shape, or some of it in another order (Gather), will give: numbers, and names of those that the caller chooses."""
    node = edit.producer(value, "Shape", "Gather")
    if node is None:
        return None
    if node.op_type == "Shape":
        known = edit.shape(node.inputs[0])
        return None if known is None else known[edit.integer(node, "start", 0) : edit.integer(node, "end", len(known))]
    order, known = edit.constant(node.inputs[1]), _lengths(node.inputs[0])
    return tuple(known[int(i)] for i in order) if order is not None and order.ndim == 1 and known is not None else None


def _ask_the_input(model: ir.Model, node: ir.Node) -> bool:
    """Where a length of an inner value is one of a graph input's, read it there: then nothing but its content is asked of the inner one."""
    source = edit.producer(node.inputs[0], "Shape")
    lengths = edit.shape(source.inputs[0]) if source is not None else None
    place = edit.scalar(node.inputs[1])
    whole = source is not None and not edit.integer(source, "start", 0) and "end" not in source.attributes
    if source is None or not whole or lengths is None or place is None or source.inputs[0] in model.graph.inputs:
        return False
    found = next(
        ((given, axis) for given in model.graph.inputs for axis, d in enumerate(edit.shape(given) or ()) if d == lengths[int(place)]), None
    )
    index = edit.constant(node.inputs[1])
    if found is None or index is None:
        return False
    given, axis = found
    made = ir.node("Shape", [given], name=f"{node.name}/{given.name}_shape")
    made.outputs[0].name, made.outputs[0].shape = f"{node.outputs[0].name}_{given.name}_shape", ir.Shape([len(edit.shape(given) or ())])
    made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    model.graph.insert_before(node, made)
    node.replace_input_with(0, made.outputs[0])
    node.replace_input_with(1, edit.add_constant(model, f"axis_{axis}_{index.ndim}", np.full(index.shape, axis, index.dtype)))
    return True
