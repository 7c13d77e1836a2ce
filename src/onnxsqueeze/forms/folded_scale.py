"""folded-scale: the attention's factor sits in the weights of the query and the key, not in a product of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit


def apply(model: ir.Model) -> int:
    """Multiply weights and bias, and take out the Mul or Div that did it while the model ran; how many.

    In a quantized graph the factor goes into the weight's scale: the integers stay.
    """
    done = 0
    for node in list(model.graph):
        found = edit.with_constant(node) if node.op_type in ("Mul", "Div") else None
        factor = edit.scalar(found[1]) if found else None
        if found is None or factor is None or (node.op_type == "Div" and found[1] is node.inputs[0]):
            continue
        if into_weights(model, found[0], 1 / factor if node.op_type == "Div" else factor):
            edit.replace(node.outputs[0], found[0])
            done += 1
    edit.tidy(model)
    return done


def into_weights(model: ir.Model, value: ir.Value, factor: float) -> bool:
    """Scale the linear layer whose output, moved about, is ``value``; False where there is none or another reader would see it.

    Scores, query · key, take the factor into the query's.
    """
    scores = edit.producer(value, "MatMul")
    if scores is not None and edit.only_reader(value) is not None and edit.constant(scores.inputs[1]) is None:
        query = scores.inputs[0]
        return query is not None and edit.constant(query) is None and into_weights(model, query, factor)
    while (move := edit.producer(value, "Transpose", "Reshape")) is not None and edit.only_reader(value) is not None:
        source = move.inputs[0]
        assert source is not None  # noqa: S101  # both operators have it
        value = source
    add = edit.producer(value, "Add")
    parts = edit.with_constant(add) if add is not None and edit.only_reader(value) is not None else None
    if add is None or parts is None:
        return False
    product, bias = parts
    scaled = edit.producer(product, "MatMul") or _scales(product)
    if scaled is None or edit.only_reader(product) is None:
        return False
    weight = scaled.inputs[1] if edit.constant(scaled.inputs[1]) is not None else scaled.inputs[0]
    if weight is None or edit.constant(weight) is None:
        return False
    for reader, old in ((scaled, weight), (add, bias)):
        content = edit.constant(old)
        assert content is not None  # noqa: S101  # looked at above
        new = edit.add_constant(model, f"{old.name}_scaled", (content * np.float32(factor)).astype(content.dtype))
        reader.replace_input_with(list(reader.inputs).index(old), new)
    return True


def _scales(product: ir.Value) -> ir.Node | None:
    """Of an integer product turned into float32, the Mul of the activation's with the weight's scale."""
    outer = edit.producer(product, "Mul")
    if outer is None or not any(edit.producer(value, "Cast") for value in outer.inputs):
        return None
    inner = next((node for value in outer.inputs if (node := edit.producer(value, "Mul")) is not None), None)
    return inner if inner is not None and edit.with_constant(inner) and edit.only_reader(inner.outputs[0]) else None
