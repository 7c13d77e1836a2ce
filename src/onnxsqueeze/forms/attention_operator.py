"""attention-operator: scores, mask, softmax and their product with the values as one node, ONNX's own Attention.

ONNX Runtime's kernel reads the heads where they lie in ``[batch, tokens, heads · width]``, and adds the mask and takes the softmax of one
head's scores while they are in the cache. The node is of opset 23, so the file asks for ONNX Runtime 1.23 or newer.
Source: ONNX, docs/Operators.md, Attention-23; onnxruntime, core/providers/cpu/llm/attention.cc.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit

_OPSET = 23
# From 18 on, new versions of operators only admit more types, but for this one, whose scale changed its length in 21. Source: ONNX, docs/Changelog.md.
_OLDEST, _OTHERWISE = 18, frozenset({"GroupNormalization"})


def apply(model: ir.Model) -> int:
    """Replace each attention that adds a mask ``[batch, 1, 1 or queries, keys]`` to its scores; how many."""
    if model.graph.opset_imports[""] < _OLDEST or any(node.op_type in _OTHERWISE for node in model.graph):
        return 0
    spread: dict[tuple[ir.Value, edit.Dimension], ir.Value] = {}
    done = 0
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        done += _replace(model, node, spread)
    if done:
        model.graph.opset_imports[""] = max(_OPSET, model.graph.opset_imports[""])
    edit.tidy(model)
    return done


def _replace(model: ir.Model, softmax: ir.Node, spread: dict[tuple[ir.Value, edit.Dimension], ir.Value]) -> bool:
    add = edit.producer(softmax.inputs[0], "Add")
    scores = next((node for value in add.inputs if (node := edit.producer(value, "MatMul")) is not None), None) if add else None
    if add is None or scores is None or edit.only_reader(scores.outputs[0]) is None or edit.only_reader(add.outputs[0]) is None:
        return False
    bias = next(value for value in add.inputs if value is not scores.outputs[0])
    product = edit.only_reader(softmax.outputs[0])
    moved = edit.only_reader(product.outputs[0]) if product is not None and product.op_type == "MatMul" else None
    joined = edit.only_reader(moved.outputs[0]) if moved is not None and moved.op_type == "Transpose" else None
    if product is None or moved is None or joined is None or joined.op_type != "Reshape" or edit.integers(moved, "perm") != (0, 2, 1, 3):
        return False
    sources = [
        _before_heads(scores.inputs[0], (0, 2, 1, 3)),
        _before_heads(scores.inputs[1], (0, 2, 3, 1)),
        _before_heads(product.inputs[1], (0, 2, 1, 3)),
    ]
    heads, last = edit.shape(product.outputs[0]), edit.integer(softmax, "axis", -1) in (-1, 3)
    if any(source is None for source in sources) or heads is None or not isinstance(heads[1], int) or edit.rank(joined.outputs[0]) != 3:
        return False
    mask = _spread(model, bias, edit.shape(scores.outputs[0]), spread) if last else None
    if mask is None:
        return False
    attributes = {"q_num_heads": heads[1], "kv_num_heads": heads[1], "scale": 1.0}
    name, out = f"{product.name}/Attention", joined.outputs[0]
    edit.replace(out, edit.insert_after(joined, "Attention", [*sources, mask], name, out, attributes=attributes))
    return True


def _spread(
    model: ir.Model,
    bias: ir.Value | None,
    scores: tuple[edit.Dimension, ...] | None,
    spread: dict[tuple[ir.Value, edit.Dimension], ir.Value],
) -> ir.Value | None:
    """``bias`` with one row for each query, as the kernel wants it; made once for all layers. None where that cannot be told from the shapes."""
    known = edit.shape(bias)
    if bias is None or known is None or scores is None or len(known) != 4 or known[1] != 1 or known[3] != scores[3]:
        return None
    queries, keys = scores[2:]
    if known[2] == queries:
        return bias
    if known[2] != 1 or queries != keys:
        return None
    if (bias, queries) not in spread:
        name = f"{bias.name}_rows"
        ones = (
            edit.add_constant(model, "rows_before", np.array([1, 1], np.int64)),
            edit.add_constant(model, "rows_after", np.array([1], np.int64)),
        )
        length = ir.node("Shape", [bias], {"start": 3}, name=f"{name}/Shape")
        target = ir.node("Concat", [ones[0], length.outputs[0], ones[1]], {"axis": 0}, name=f"{name}/Concat")
        rows = ir.node("Expand", [bias, target.outputs[0]], name=name)
        for node, lengths in ((length, [1]), (target, [4]), (rows, [*known[:2], queries, keys])):
            node.outputs[0].name, node.outputs[0].shape = node.name, ir.Shape(lengths)
            node.outputs[0].type = bias.type if node is rows else ir.TensorType(ir.DataType.INT64)
        before = bias.producer()
        if before is None:
            return None
        model.graph.insert_after(before, [length, target, rows])
        spread[bias, queries] = rows.outputs[0]
    return spread[bias, queries]


def _before_heads(value: ir.Value | None, order: tuple[int, ...]) -> ir.Value | None:
    """``[batch, tokens, heads · width]`` of a value that a Reshape and a Transpose in ``order`` made of it."""
    turn = edit.producer(value, "Transpose")
    split = edit.producer(turn.inputs[0], "Reshape") if turn is not None and edit.integers(turn, "perm") == order else None
    return split.inputs[0] if split is not None and edit.rank(split.inputs[0]) == 3 else None
