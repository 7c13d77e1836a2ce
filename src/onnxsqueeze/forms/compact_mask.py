"""compact-mask: the mask stays one row a sentence, [batch, 1, 1, tokens], and is broadcast where it is added."""

from __future__ import annotations

import onnx_ir as ir

from onnxsqueeze.forms import edit

_ELEMENTWISE = ("Cast", "Sub", "Where", "Mul", "Not", "Equal")


def apply(model: ir.Model) -> int:
    """Take out every Expand of [batch, 1, 1, tokens] whose result is only cast, subtracted and added; how many."""
    done = 0
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Expand" else None
        before, after = edit.shape(source), edit.shape(node.outputs[0])
        if source is None or before is None or after is None or len(before) != len(after) or before[-2:-1] != (1,):
            continue
        if all(a == b or i == len(after) - 2 for i, (a, b) in enumerate(zip(before, after, strict=True))) and _broadcasts(node.outputs[0]):
            _forget_shapes(node.outputs[0], before)
            edit.replace(node.outputs[0], source)
            done += 1
    edit.tidy(model)
    return done


def _broadcasts(value: ir.Value) -> bool:
    """Whether all that reads ``value`` gives the same numbers when its one row is broadcast later."""
    for use in value.uses():
        node = use.node
        if node.op_type in _ELEMENTWISE:
            if not _broadcasts(node.outputs[0]):
                return False
        elif node.op_type != "Add" or edit.rank(node.outputs[0]) != edit.rank(value):
            return False
    return not value.is_graph_output()


def _forget_shapes(value: ir.Value, row: tuple[edit.Dimension, ...]) -> None:
    """Give the values behind ``value``, up to the additions, the shape that they then have."""
    for use in value.uses():
        if use.node.op_type in _ELEMENTWISE:
            use.node.outputs[0].shape = ir.Shape(row)
            _forget_shapes(use.node.outputs[0], row)
