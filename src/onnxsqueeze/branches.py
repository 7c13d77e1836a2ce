"""Early exits in one stock .onnx: what only the last layers compute moves into the branch of an If, which runs for the rows that are not sure yet.

    exit logits → softmax → largest probability < threshold → unsure rows
    If any row is unsure:  Compress what the rest reads to these rows → the rest → ScatterND its logits over the exit's
    else:                  the exit's logits

A batch pays for the rows that go on, not for all. Source of the idea: Teerapittayanon et al. 2016, "BranchyNet"; Xin et al. 2020, "DeeBERT".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsqueeze.errors import StageError

if TYPE_CHECKING:
    import onnx

THRESHOLD = "exit_threshold"
_REMEDY = "put optimize-graph with constant-shapes in front of this stage"


def branch(model: onnx.ModelProto, exits: Sequence[str], threshold: float, stage: str) -> onnx.ModelProto:
    """``model`` (outputs: logits first, then those named ``exits``, from the first layer to the last) with the logits alone as its output.

    ``threshold`` becomes an initializer that is also an input: a plain call needs only the usual inputs, another one may override it. Weights that
    only the rest reads move into the branch. Raises StageError, for the stage of that name, where the rest reads shapes that a smaller batch would make wrong.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from onnxsqueeze import forms

    shaped = forms.read(model)
    rows = next(iter(shaped.graph.inputs)).shape
    batch = None if rows is None else rows[0]
    kinds = {str(value.name): _kind(value, batch) for value in _values(shaped)}
    done: onnx.ModelProto = forms.write(shaped)
    graph = done.graph
    logits = graph.output[0].name
    graph.initializer.append(numpy_helper.from_array(np.array(threshold, np.float32), THRESHOLD))
    graph.input.append(helper.make_tensor_value_info(THRESHOLD, TensorProto.FLOAT, []))
    for depth, name in reversed(list(enumerate(exits))):
        _fold(graph, logits, name, exits[:depth], depth, kinds, stage)
    only = [output for output in graph.output if output.name == logits]
    del graph.output[:]
    graph.output.extend(only)
    return done


def _values(model: Any) -> Iterable[Any]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _kind(value: Any, batch: Any) -> str:
    """Say "rows" where the first axis is the batch, "one" for what is the same for any batch, "shape" for numbers that may hold its length, "unknown"."""
    import onnx_ir as ir

    if value.shape is None:
        return "unknown"
    if len(value.shape) and value.shape[0] == batch:
        return "rows"
    if value.dtype == ir.DataType.INT64:
        return "shape"
    return "one" if all(isinstance(length, int) for length in value.shape) else "unknown"


def _fold(graph: onnx.GraphProto, logits: str, leave: str, others: Sequence[str], depth: int, kinds: Mapping[str, str], stage: str) -> None:
    """Put what ``logits`` need beyond ``leave`` and ``others`` into a branch that the rows unsure of ``leave`` take."""
    from onnx import TensorProto, helper

    nodes = list(graph.node)
    stays = _needed(nodes, [leave, *others])
    rest = sorted(_needed(nodes, [logits]) - stays)
    moved = [nodes[i] for i in rest]
    main = [node for i, node in enumerate(nodes) if i not in set(rest)]
    made = {name for node in moved for name in node.output}
    read = {name for node in moved for name in _read(node)} - made
    initial = {tensor.name for tensor in graph.initializer} - {THRESHOLD}
    own = initial & read - {name for node in main for name in _read(node)}
    captured = sorted(read - initial - {THRESHOLD})
    unclear = [name for name in captured if kinds.get(name, "unknown") in ("shape", "unknown")]
    if unclear:
        raise StageError(f"{stage}: what lies behind {leave} reads {unclear[0]}, which may hold the length of the batch", remedy=_REMEDY)
    tag = f"exit_{depth}"
    smaller = {name: f"{name}_{tag}_unsure" for name in captured if kinds[name] == "rows"}
    merged, gone_on = f"{logits}_{tag}_merged", f"{logits}_{tag}_gone_on"
    unsure, places = f"{tag}_unsure", f"{tag}_places"
    inside = [helper.make_node("Compress", [name, unsure], [new], axis=0) for name, new in smaller.items()]
    inside += [_renamed(node, smaller | {logits: gone_on}) for node in moved]
    inside += [
        helper.make_node("NonZero", [unsure], [f"{places}_row"]),
        helper.make_node("Transpose", [f"{places}_row"], [places], perm=[1, 0]),
        helper.make_node("ScatterND", [leave, places, gone_on], [merged]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in (merged, f"{tag}_all_left")]
    going = helper.make_graph(inside, f"{tag}_go_on", [], outputs[:1], [tensor for tensor in graph.initializer if tensor.name in own])
    leaving = helper.make_graph([helper.make_node("Identity", [leave], [f"{tag}_all_left"])], f"{tag}_leave", [], outputs[1:])
    head = [
        helper.make_node("Softmax", [leave], [f"{tag}_probabilities"], axis=-1),
        helper.make_node("TopK", [f"{tag}_probabilities", f"{tag}_one"], [f"{tag}_largest", f"{tag}_class"], axis=-1),
        helper.make_node("Squeeze", [f"{tag}_largest", f"{tag}_last"], [f"{tag}_confidence"]),
        helper.make_node("Less", [f"{tag}_confidence", THRESHOLD], [unsure]),
        helper.make_node("Cast", [unsure], [f"{tag}_unsure_int"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", [f"{tag}_unsure_int"], [f"{tag}_any_int"], keepdims=0),
        helper.make_node("Cast", [f"{tag}_any_int"], [f"{tag}_any"], to=TensorProto.BOOL),
        helper.make_node("If", [f"{tag}_any"], [logits], then_branch=going, else_branch=leaving),
    ]
    kept = [tensor for tensor in graph.initializer if tensor.name not in own]
    kept += [_integers(f"{tag}_one", 1), _integers(f"{tag}_last", -1)]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([*main, *head])
    graph.initializer.extend(kept)


def _integers(name: str, number: int) -> onnx.TensorProto:
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array([number], np.int64), name)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> set[int]:
    """Positions of the nodes on which ``outputs`` depend."""
    wanted, found = set(outputs), set()
    for i in range(len(nodes) - 1, -1, -1):
        if wanted.intersection(nodes[i].output):
            found.add(i)
            wanted.update(_read(nodes[i]))
    return found


def _read(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    found = {name for name in node.input if name}
    for inner in _inner(node):
        made = {tensor.name for tensor in inner.initializer} | {name for one in inner.node for name in one.output}
        found |= ({name for one in inner.node for name in _read(one)} | {output.name for output in inner.output}) - made
    return found


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """The same node under other names, within its subgraphs too."""
    new: onnx.NodeProto = type(node).FromString(node.SerializeToString())
    for field in (new.input, new.output):
        for i, name in enumerate(field):
            field[i] = names.get(name, name)
    for inner in _inner(new):
        renamed = [_renamed(one, names) for one in inner.node]
        del inner.node[:]
        inner.node.extend(renamed)
        for output in inner.output:
            output.name = names.get(output.name, output.name)
    return new


def _inner(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]
