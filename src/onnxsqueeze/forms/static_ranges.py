"""static-ranges: activations are quantized by ranges measured beforehand; nothing looks for their smallest and largest value at run time.

DynamicQuantizeLinear reads its input twice, first for the range, which is that of all rows of the call; with a fixed one a row's answer
no longer depends on what shares its call. Where a range is noted on the value (`edit.note_ranges`), QuantizeLinear
takes its place. A session would compute the product of the two scales ahead, as both are then constant, and after that no longer
recognise the integer product, its scale and its bias as one; so they are written as the one node that it fuses them to. QuantizeLinear
is com.microsoft's too: ONNX's own has no kernel for opset 23, that of attention-operator, before ONNX Runtime 1.24.
Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulIntegerToFloat and QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit

_MICROSOFT = "com.microsoft"
_MOVING = ("Slice", "Reshape", "Transpose", "Identity")  # the same integers elsewhere


@dataclass(frozen=True)
class _Product:
    """A linear layer on a quantized activation: the integer product, the weight's scale, the bias if any, the node and the value that end it."""

    integers: ir.Node
    inner: ir.Node
    scale: ir.Value
    bias: ir.Value | None
    last: ir.Node


def apply(model: ir.Model) -> int:
    """Fix the range of each activation that has one noted and that nothing but linear layers reads; how many."""
    done = 0
    found = [(node, edit.noted_range(node.inputs[0])) for node in model.graph if node.op_type == "DynamicQuantizeLinear"]
    for node, known in found:
        if known is not None and (products := _products(node)):
            _fix(model, node, known, products)
            done += 1
    if done:
        model.graph.opset_imports[_MICROSOFT] = 1
    edit.tidy(model)
    return done


def parameters(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 for values from ``low`` to ``high``; 0 is always exact. Source: ONNX, docs/Operators.md, DynamicQuantizeLinear."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)  # all zeros: any scale will do
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


def _products(quantize: ir.Node) -> list[_Product]:
    """The linear layers that read the quantized activation; none where anything else reads its integers, scale or zero point."""
    integers, scale, zero = quantize.outputs
    found: list[_Product] = []
    values = [integers]
    if scale.is_graph_output() or zero.is_graph_output():
        return []
    while values:
        value = values.pop()
        if value.is_graph_output():
            return []
        for use in value.uses():
            if use.node.op_type in _MOVING and use.idx == 0:
                values.append(use.node.outputs[0])
            elif (product := _product(use.node, value, scale, zero)) is not None:
                found.append(product)
            else:
                return []
    inner, outer = {product.inner for product in found}, {product.integers for product in found}
    return found if {use.node for use in scale.uses()} == inner and {use.node for use in zero.uses()} == outer else []


def _product(node: ir.Node, value: ir.Value, scale: ir.Value, zero: ir.Value) -> _Product | None:
    whole = node.op_type == "MatMulInteger" and len(node.inputs) > 2 and node.inputs[0] is value and node.inputs[2] is zero
    weight = edit.constant(node.inputs[1]) if whole else None
    cast = edit.only_reader(node.outputs[0])
    outer = edit.only_reader(cast.outputs[0]) if weight is not None and cast is not None and cast.op_type == "Cast" else None
    if weight is None or cast is None or outer is None or outer.op_type != "Mul" or weight.ndim != 2:
        return None
    inner = next((found for other in outer.inputs if (found := edit.producer(other, "Mul")) is not None), None)
    scales = edit.with_constant(inner) if inner is not None and edit.only_reader(inner.outputs[0]) is outer else None
    if inner is None or scales is None or scales[0] is not scale or (edit.rank(scales[1]) or 0) > 1:
        return None
    add = edit.only_reader(outer.outputs[0])
    parts = edit.with_constant(add) if add is not None and add.op_type == "Add" else None
    if add is None or parts is None or edit.shape(parts[1]) != (weight.shape[1],):
        return _Product(node, inner, scales[1], None, outer)
    return _Product(node, inner, scales[1], parts[1], add)


def _fix(model: ir.Model, quantize: ir.Node, known: edit.Range, products: list[_Product]) -> None:
    source = quantize.inputs[0]
    assert source is not None  # noqa: S101  # the operator has it
    scale, zero = (
        edit.add_constant(model, f"{source.name}_{what}", np.asarray(number))
        for what, number in zip(("fixed_scale", "fixed_zero_point"), parameters(*known), strict=True)
    )
    name = f"{source.name}_fixed"
    integers = edit.insert_after(quantize, "QuantizeLinear", [source, scale, zero], name, like=quantize.outputs[0], domain=_MICROSOFT)
    edit.replace(quantize.outputs[0], integers)
    for product in products:
        activation, weight = product.integers.inputs[:2]
        point = product.integers.inputs[3] if len(product.integers.inputs) > 3 else None
        content = edit.constant(point)
        if content is not None and not content.any():
            point = None  # the kernel then leaves the term out
        inputs = [activation, weight, scale, product.scale, zero, point, product.bias]
        while inputs[-1] is None:
            inputs.pop()
        out = product.last.outputs[0]
        name = str(out.name)
        unlike = f"{product.integers.name}/MatMulIntegerToFloat"
        new = edit.insert_after(product.last, "MatMulIntegerToFloat", inputs, unlike, like=out, domain=_MICROSOFT)
        edit.replace(out, new)
        out.name, new.name = f"{name}_unfused", name  # it is the same number: records name it alike
