"""attention-operator: scores, mask, softmax and their product with the values as one node, MultiHeadAttention of ONNX Runtime.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MultiHeadAttention: query, key and value ``[batch, tokens, heads · width]``,
key_padding_mask ``[batch, tokens] int32``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit

_MASKED = float(np.finfo(np.float32).min)  # what transformers adds to a masked score


def apply(model: ir.Model) -> int:
    """Replace each attention that adds the mask of the input ``attention_mask``, [batch, 1, 1, tokens]; how many."""
    mask = next((value for value in model.graph.inputs if value.name == "attention_mask"), None)
    if mask is None:
        return 0
    done = 0
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        done += _replace(model, node, mask)
    if done:
        model.graph.opset_imports["com.microsoft"] = 1
    edit.tidy(model)
    return done


def _replace(model: ir.Model, softmax: ir.Node, mask: ir.Value) -> bool:
    add = edit.producer(softmax.inputs[0], "Add")
    scores = next((node for value in add.inputs if (node := edit.producer(value, "MatMul")) is not None), None) if add else None
    if add is None or scores is None:
        return False
    bias = next(value for value in add.inputs if value is not scores.outputs[0])
    product = edit.only_reader(softmax.outputs[0])
    moved = edit.only_reader(product.outputs[0]) if product is not None and product.op_type == "MatMul" else None
    joined = edit.only_reader(moved.outputs[0]) if moved is not None and moved.op_type == "Transpose" else None
    if product is None or joined is None or joined.op_type != "Reshape" or not _is_padding(bias, mask):
        return False
    sources = [
        _before_heads(scores.inputs[0], (0, 2, 1, 3)),
        _before_heads(scores.inputs[1], (0, 2, 3, 1)),
        _before_heads(product.inputs[1], (0, 2, 1, 3)),
    ]
    heads = edit.shape(product.outputs[0])
    if any(source is None for source in sources) or heads is None or not isinstance(heads[1], int):
        return False
    short = next((node.outputs[0] for node in model.graph if node.name == "attention_mask_int32"), None)
    if short is None:
        cast = ir.node("Cast", [mask], {"to": int(ir.DataType.INT32)}, name="attention_mask_int32")
        short = cast.outputs[0]
        short.name, short.shape, short.type = "attention_mask_int32", mask.shape, ir.TensorType(ir.DataType.INT32)
        model.graph.insert_before(model.graph[0], cast)
    attributes = {"num_heads": heads[1], "scale": 1.0, "mask_filter_value": _MASKED}
    made = edit.insert_after(
        joined,
        "MultiHeadAttention",
        [*sources, None, short],
        f"{product.name}/MultiHeadAttention",
        joined.outputs[0],
        attributes=attributes,
        domain="com.microsoft",
    )
    edit.replace(joined.outputs[0], made)
    return True


def _before_heads(value: ir.Value | None, order: tuple[int, ...]) -> ir.Value | None:
    """``[batch, tokens, heads · width]`` of a value that a Reshape and a Transpose in ``order`` made of it."""
    turn = edit.producer(value, "Transpose")
    split = edit.producer(turn.inputs[0], "Reshape") if turn is not None and edit.integers(turn, "perm") == order else None
    return split.inputs[0] if split is not None and edit.rank(split.inputs[0]) == 3 else None


def _is_padding(bias: ir.Value | None, mask: ir.Value) -> bool:
    """Whether the same is added for every query, and it depends on the padding alone: a causal mask has a row for each query."""
    lengths = edit.shape(bias)
    return lengths is not None and len(lengths) == 4 and lengths[1:3] == (1, 1) and _comes_from(bias, mask)


def _comes_from(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether ``value`` is computed from ``source`` and constants alone (apart from lengths)."""
    if value is None or value is source or edit.constant(value) is not None:
        return True
    node = value.producer()
    if node is None:
        return False
    return node.op_type == "Shape" or all(_comes_from(one, source) for one in node.inputs)
