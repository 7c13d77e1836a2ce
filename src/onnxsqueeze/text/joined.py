"""A model with its tokenizer before it: one .onnx whose input is ``text``; the model's own nodes, weights and metadata stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxsqueeze import graph
from onnxsqueeze.errors import ModelError
from onnxsqueeze.text.front import DOMAIN, OPSET, TEXT, build
from onnxsqueeze.text.rules import Rules
from onnxsqueeze.tokens import INPUT_NAMES

if TYPE_CHECKING:
    import onnx


def join(model: onnx.ModelProto, rules: Rules) -> None:
    """Put the tokenizer before ``model``, whose external data may stay where it is. Raises ModelError where its inputs are not a tokenizer's."""
    from onnx import TensorProto, helper

    inputs = [value for value in model.graph.input if value.name not in {tensor.name for tensor in model.graph.initializer}]
    strange = [value.name for value in inputs if value.name not in INPUT_NAMES]
    fixed = [value.name for value in inputs if any(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)]
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if strange or fixed or opset < OPSET:
        reason = (
            f"the model takes {strange[0]}" if strange else f"{fixed[0]} has a fixed length" if fixed else f"opset {opset} is below {OPSET}"
        )
        raise ModelError(f"--text: no tokenizer can be put before this model: {reason}", remedy="leave out --text")
    nodes, constants = build(rules, {value.name: value.type.tensor_type.elem_type for value in inputs})
    text = helper.make_tensor_value_info(TEXT, TensorProto.STRING, [inputs[0].type.tensor_type.shape.dim[0].dim_param or "batch"])
    model.graph.value_info.extend(inputs)  # their free lengths stay known, so that a session fuses what it fused before
    kept = [value for value in model.graph.input if value.name not in INPUT_NAMES]
    graph.replace(model.graph.input, [text, *kept])
    graph.replace(model.graph.node, [*nodes, *model.graph.node])
    model.graph.initializer.extend(constants)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def alone(rules: Rules) -> onnx.ModelProto:
    """The tokenizer as a model of its own: ``text`` → the three inputs of a model."""
    from onnx import TensorProto, helper

    nodes, constants = build(rules, dict.fromkeys(INPUT_NAMES, TensorProto.INT64))
    made = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in INPUT_NAMES]
    text = helper.make_tensor_value_info(TEXT, TensorProto.STRING, ["batch"])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(nodes, "text", [text], made, constants), opset_imports=opsets, ir_version=8)
