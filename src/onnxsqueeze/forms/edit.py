"""Reading and changing a graph: what the forms share.

Values carry symbolic shapes, so that a form can tell batch from tokens, and, where they were measured, the ranges of their content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

Dimension = int | str  # a length, or the name of one that the caller chooses ("sequence_length")
Range = tuple[float, float]  # the smallest and the largest value
_RANGE = "onnxsqueeze.range"
_STAND_IN = ":stand-in"
_FOLDED_ELEMENTS = 1 << 16  # constants are computed ahead up to this size: shapes and scales, never weights


def read(model: onnx.ModelProto) -> ir.Model:
    """``model`` with symbolic shapes on its values and every constant an initializer; see `with_shapes`, which takes most of the time."""
    return opened(with_shapes(model))


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with symbolic shapes of its values, for `opened`.

    Shapes are ONNX Runtime's (onnxruntime.tools.symbolic_shape_infer), or where it fails those of onnx.shape_inference, which knows fewer:
    forms then find fewer places.
    """
    plain = model.__class__.FromString(model.SerializeToString())
    hidden = _hide(plain)
    inferred = _with_shapes(plain)
    for node in list(inferred.graph.node):
        if node.output[0] in hidden:
            node.CopyFrom(hidden[node.output[0]])
        elif node.output[0].endswith(_STAND_IN):
            inferred.graph.node.remove(node)
    return inferred


def opened(shaped: onnx.ModelProto) -> ir.Model:
    """What `with_shapes` gave, to be changed by forms, with every constant an initializer; ``shaped`` stays as it is."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    own = type(shaped)()
    own.CopyFrom(shaped)  # onnx_ir names the constants that it lifts in the message it was given
    found: ir.Model = ir.from_proto(own)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(found)
    return found


def _hide(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Put nodes with the same shapes in the place of those that shape inference mistakes or does not know; output → the node that was there."""
    from onnx import TensorProto, helper

    hidden = {}
    for node in list(model.graph.node):
        there = node.__class__.FromString(node.SerializeToString())
        if node.op_type == "Attention" and not node.domain and len(node.output) == 1:
            # taken for the operator of the same name in com.microsoft; for the shape it is as good as its query
            hidden[node.output[0]] = there
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
        elif node.op_type == "MatMulIntegerToFloat":
            hidden[node.output[0]], integers = there, f"{node.output[0]}{_STAND_IN}"
            at = list(model.graph.node).index(node)
            node.CopyFrom(helper.make_node("Cast", [integers], [node.output[0]], to=TensorProto.FLOAT))
            model.graph.node.insert(at, helper.make_node("MatMulInteger", there.input[:2], [integers]))
    return hidden


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx.shape_inference import infer_shapes
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    try:
        found: onnx.ModelProto = SymbolicShapeInference.infer_shapes(model.__class__.FromString(model.SerializeToString()), auto_merge=True)
    except Exception:  # noqa: BLE001  # it asserts, indexes and unpacks what an operator it does not know has left empty
        return infer_shapes(model, data_prop=True)
    return found


def write(model: ir.Model) -> onnx.ModelProto:
    """``model`` without what nothing reads, in an order in which it can run."""
    tidy(model)
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


def tidy(model: ir.Model) -> None:
    """Take out what nothing reads, and put the nodes into an order in which they can run."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The content of an initializer; None for what is only known when the graph runs."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The one number that an initializer holds, of any rank; None for anything else."""
    found = constant(value)
    return float(found.reshape(())) if found is not None and found.size == 1 else None


def add_constant(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer, or the one of this name that holds the same."""
    import numpy as np

    graph, free = model.graph, name
    count = 0
    while free in graph.initializers:
        there = graph.initializers[free]
        known = constant(there)
        if known is not None and known.dtype == array.dtype and np.array_equal(known, array):
            return there
        count += 1
        free = f"{name}_{count}"
    value = ir.Value(name=free, const_value=ir.tensor(array, name=free), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def shape(value: ir.Value | None) -> tuple[Dimension, ...] | None:
    """The value's dimensions; None where they are not known, or where one has no name."""
    if value is None:
        return None
    if (known := constant(value)) is not None:
        return tuple(known.shape)
    if value.shape is None:
        return None
    found = [dimension if isinstance(dimension, int) else dimension.value for dimension in value.shape]
    return None if None in found else tuple(d for d in found if d is not None)


def note_ranges(model: ir.Model, ranges: Mapping[str, Range]) -> None:
    """Note on the values of these names, as far as the graph has them now, between what bounds they lie."""
    for node in model.graph:
        for value in node.outputs:
            if (known := ranges.get(str(value.name))) is not None:
                value.meta[_RANGE] = known


def noted_range(value: ir.Value | None) -> Range | None:
    """What `note_ranges` noted on ``value``."""
    return value.meta.get(_RANGE) if value is not None else None


def rank(value: ir.Value | None) -> int | None:
    """How many dimensions the value has."""
    known = shape(value)
    return None if known is None else len(known)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value``, where it is one of ``op_types``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads ``value``, where it is the only one and the graph does not give the value out."""
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and not value.is_graph_output() else None


def integers(node: ir.Node, attribute: str) -> tuple[int, ...]:
    """A list attribute of integers; empty where the node has none."""
    found = node.attributes.get(attribute)
    return tuple(found.as_ints()) if found is not None else ()


def integer(node: ir.Node, attribute: str, default: int) -> int:
    """An integer attribute."""
    found = node.attributes.get(attribute)
    return default if found is None else int(found.as_int())


def with_constant(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(the changing input, the constant one) of a node with two inputs of which exactly one is constant."""
    first, second = node.inputs[:2] if len(node.inputs) == 2 else (None, None)
    if first is None or second is None or (constant(first) is None) == (constant(second) is None):
        return None
    return (second, first) if constant(first) is not None else (first, second)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Every reader of ``old`` reads ``new``, which also takes its name where the graph gives it out."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}_before", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def insert_after(node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], name: str, like: ir.Value, **options: Any) -> ir.Value:
    """A new node behind ``node``; its output, which bears its name and has the shape and type of ``like``."""
    graph = node.graph
    assert graph is not None and not isinstance(graph, ir.Function)  # noqa: S101, PT018  # nodes of a model that was read
    made = ir.node(op_type, inputs, options.pop("attributes", {}), domain=options.pop("domain", ""), name=name, **options)
    made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = name, like.shape, like.type
    graph.insert_after(node, made)
    return made.outputs[0]


def fold(model: ir.Model) -> int:
    """Compute what depends on small constants alone; how many nodes that was. Source: onnx.reference."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    opsets = [helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    done = 0
    for node in list(_foldable(model)):
        given: dict[str, NDArray[Any]] = {}
        for value in node.inputs:
            content = constant(value)
            if value is not None and content is not None and content.size <= _FOLDED_ELEMENTS:
                given[str(value.name)] = content
        if len(given) < len({value for value in node.inputs if value is not None}):
            continue
        inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()]
        name = str(node.outputs[0].name)
        one = helper.make_graph([ir.to_proto(node)], "one", inputs, [helper.make_empty_tensor_value_info(name)])
        (result,) = cast("list[NDArray[Any]]", ReferenceEvaluator(helper.make_model(one, opset_imports=opsets)).run(None, given))
        replace(node.outputs[0], add_constant(model, f"{name}_constant", result))
        done += 1
    return done


def _foldable(model: ir.Model) -> Iterator[ir.Node]:
    """In topological order, the nodes of ONNX's own domain with one output whose inputs may be constants by the time they are reached."""
    for node in model.graph:
        plain = node.domain == "" and node.op_type not in ("Shape", "DequantizeLinear", "ConstantOfShape")
        if plain and node.inputs and len(node.outputs) == 1 and not node.outputs[0].is_graph_output():
            yield node
