"""int32-inputs: the file asks for ids and masks of 32 bits, half of what a caller sends otherwise; applied where `inputs: int32` is set.

Gather takes such indices as they are, and the mask is cast to float32 anyway: what reads an input is followed until it no longer depends
on the type, constants beside it are narrowed, and a Cast stands only in front of what must have 64 bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit

_MOVING = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Expand", "Identity")  # of their first input the type is all the same
_COMPARING = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")


def apply(model: ir.Model) -> int:
    """Make every int64 input int32; how many."""
    done = 0
    for given in model.graph.inputs:
        if given.dtype == ir.DataType.INT64 and edit.constant(given) is None:
            _narrow(model, given)
            done += 1
    edit.tidy(model)
    return done


def _narrow(model: ir.Model, value: ir.Value) -> None:
    """Give ``value`` 32 bits, and what is made of it as far as that can have them."""
    value.type = ir.TensorType(ir.DataType.INT32)
    wide: list[tuple[ir.Node, int]] = []
    for use in list(value.uses()):
        node, place = use.node, use.idx
        if node.op_type in ("Cast", "Shape") or (node.op_type in ("Gather", "GatherBlockQuantized") and place == 1):
            continue
        if node.op_type in _MOVING and place == 0 and not node.outputs[0].is_graph_output():
            _narrow(model, node.outputs[0])
        elif not _compares(model, node, place):
            wide.append((node, place))
    if wide:
        cast = ir.node("Cast", [value], {"to": ir.DataType.INT64}, name=f"{value.name}_int64")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = cast.name, value.shape, ir.TensorType(ir.DataType.INT64)
        before = value.producer()
        if before is None:
            model.graph.insert_before(model.graph[0], cast)
        else:
            model.graph.insert_after(before, cast)
        for node, place in wide:
            node.replace_input_with(place, cast.outputs[0])


def _compares(model: ir.Model, node: ir.Node, place: int) -> bool:
    """Narrow the constant that the node compares its input with; False where it does something else, or needs 64 bits for it."""
    other = node.inputs[1 - place] if node.op_type in _COMPARING else None
    content, bounds = edit.constant(other), np.iinfo(np.int32)
    if other is None or content is None or content.min() < bounds.min or content.max() > bounds.max:
        return False
    node.replace_input_with(1 - place, edit.add_constant(model, f"{other.name}_int32", content.astype(np.int32)))
    return True
