"""sequence-first: inside the graph tokens come before sentences, [tokens, batch, width], and heads are read where they lie.

ONNX Runtime's FusedMatMul can take the heads of ``[tokens, batch, heads, width]`` as a batch without copying them; from
``[batch, tokens, heads, width]`` it cannot. So the three transposes in front of each attention's products fall away for one of the ids.
Source: onnxruntime, docs/ContribOperators.md, com.microsoft.FusedMatMul, transBatchA and transBatchB.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxsqueeze.forms import edit

_ELEMENTWISE = ("Add", "Sum", "Sub", "Mul", "Div", "Pow", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid", "Cast", "Identity")
_BY_TENSOR = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")  # with one scale; looked at in _flips
_HEADS, _HEADS_TURNED, _JOINED = (0, 2, 1, 3), (0, 2, 3, 1), (2, 0, 1, 3)


def apply(model: ir.Model) -> int:
    """Turn the ids, read the heads where they lie; how many attentions. Changes nothing where any part cannot follow."""
    plan = _Plan(model)
    for node in model.graph:
        if not plan.follow(node):
            return 0
    if not plan.products or any(value in plan.flipped for value in model.graph.outputs):
        return 0
    for action in plan.actions:
        action()
    model.graph.opset_imports["com.microsoft"] = 1
    edit.tidy(model)
    return plan.products


class _Plan:
    """What has to be done, found from the first node to the last. ``flipped`` values will have tokens before sentences."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.flipped: set[ir.Value] = set()
        self.heads: dict[ir.Value, tuple[ir.Value, bool]] = {}  # output of a transpose that falls away → its flipped source, whether turned
        self.actions: list[Callable[[], None]] = []
        self.products = 0
        self.turned: dict[ir.Value, ir.Value] = {}

    def follow(self, node: ir.Node) -> bool:
        """Take one node into the plan; False where it cannot be."""
        if any(value in self.heads for value in node.inputs if value is not None):
            return self._product(node)
        reads = [value in self.flipped for value in node.inputs]
        if not any(reads):
            return self._begins(node) if node.op_type == "Gather" else self._joins(node) if node.op_type == "Transpose" else True
        match node.op_type:
            case "Transpose":
                order = edit.integers(node, "perm")
                if order not in (_HEADS, _HEADS_TURNED) or node.inputs[0] is None:
                    return False
                self.heads[node.outputs[0]] = (node.inputs[0], order == _HEADS_TURNED)
                return True
            case "Reshape":
                return self._reshape(node)
            case "Gather":
                return self._gather(node)
            case "Slice":
                return self._slice(node)
        if self._flips(node):
            self.flipped.add(node.outputs[0])
            return True
        return False

    def _begins(self, node: ir.Node) -> bool:
        """An embedding: rows of a table by ids [batch, tokens]; the ids are turned in front of it."""
        ids = node.inputs[1]
        if ids is None or edit.integer(node, "axis", 0) != 0 or edit.rank(ids) != 2 or edit.rank(node.outputs[0]) != 3:
            return True
        if edit.constant(ids) is not None:
            return False

        def turn() -> None:
            node.replace_input_with(1, self._turned(ids))

        self.actions.append(turn)
        self.flipped.add(node.outputs[0])
        return True

    def _turned(self, ids: ir.Value) -> ir.Value:
        if ids not in self.turned:
            made = ir.node("Transpose", [ids], {"perm": [1, 0]}, name=f"{ids.name}_turned")
            made.outputs[0].name, made.outputs[0].type = f"{ids.name}_turned", ids.type
            graph, before = self.model.graph, ids.producer()
            if before is None:
                graph.insert_before(graph[0], made)
            else:
                graph.insert_after(before, made)
            self.turned[ids] = made.outputs[0]
        return self.turned[ids]

    def _reshape(self, node: ir.Node) -> bool:
        """Heads split or joined: the first two dimensions stay."""
        before, after = edit.shape(node.inputs[0]), edit.shape(node.outputs[0])
        if before is None or after is None or before[:2] != after[:2] or not all(isinstance(d, int) for d in after[2:]):
            return False
        target = np.array([0, 0, *after[2:]], np.int64)

        def shape() -> None:
            node.replace_input_with(1, edit.add_constant(self.model, f"{node.outputs[0].name}_flipped", target))

        self.actions.append(shape)
        self.flipped.add(node.outputs[0])
        return True

    def _gather(self, node: ir.Node) -> bool:
        """One token of every sentence: [batch, width], which no longer has an order of tokens."""
        if edit.integer(node, "axis", 0) != 1 or edit.rank(node.inputs[1]) != 0:
            return False
        self.actions.append(lambda: node.attributes.add(ir.AttrInt64("axis", 0)))
        return True

    def _slice(self, node: ir.Node) -> bool:
        along = edit.constant(node.inputs[3]) if len(node.inputs) > 3 else None
        if along is None or along.tolist() != [1]:
            return False

        def first() -> None:
            node.replace_input_with(3, edit.add_constant(self.model, "first_axis_0", np.array([0], np.int64)))

        self.actions.append(first)
        self.flipped.add(node.outputs[0])
        return True

    def _flips(self, node: ir.Node) -> bool:
        """Whether the node does the same to every token, so that their order is all the same to it."""
        others = [value for value in node.inputs if value is not None and value not in self.flipped]
        if node.op_type in _ELEMENTWISE:
            return all((edit.rank(value) or 0) <= 1 for value in others if edit.shape(value) is not None) and all(
                edit.shape(value) is not None for value in others
            )
        if node.op_type in ("MatMul", "MatMulInteger"):
            return node.inputs[0] in self.flipped and edit.rank(node.inputs[1]) == 2 and edit.constant(node.inputs[1]) is not None
        if node.op_type in _BY_TENSOR:
            return node.inputs[0] in self.flipped and all(edit.rank(value) == 0 or edit.shape(value) == (1,) for value in others)
        last = (edit.rank(node.outputs[0]) or 0) - 1
        return node.op_type == "LayerNormalization" and edit.integer(node, "axis", -1) in (-1, last)

    def _product(self, node: ir.Node) -> bool:
        """A product of heads: scores, or the values' average."""
        if node.op_type != "MatMul" or node.inputs[1] not in self.heads:
            return False
        left, right = node.inputs
        assert left is not None  # noqa: S101  # a MatMul has both
        assert right is not None  # noqa: S101
        attributes: dict[str, int] = {"transBatchB": 1}
        inputs = [left, self.heads[right][0]]
        if self.heads[right][1]:
            attributes["transB"] = 1
        if left in self.heads:
            if self.heads[left][1]:
                return False
            attributes["transBatchA"], inputs[0] = 1, self.heads[left][0]

        def fuse() -> None:
            out = node.outputs[0]
            made = edit.insert_after(
                node, "FusedMatMul", inputs, f"{node.name}/FusedMatMul", like=out, attributes=attributes, domain="com.microsoft"
            )
            edit.replace(out, made)

        self.actions.append(fuse)
        self.products += left not in self.heads
        return True

    def _joins(self, node: ir.Node) -> bool:
        """Behind the values' average: [batch, heads, tokens, width] back to tokens, now before sentences."""
        source = edit.producer(node.inputs[0], "MatMul")
        if source is None or source.inputs[1] not in self.heads:
            return True
        if edit.integers(node, "perm") != _HEADS:
            return False
        self.actions.append(lambda: node.attributes.add(ir.AttrInt64s("perm", _JOINED)))
        self.flipped.add(node.outputs[0])
        return True
