"""Float weights and activations to half precision: half the bytes, and the fast path of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import backends, graph, weights
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError, nearest
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured

if TYPE_CHECKING:
    import onnx

# Half precision has 11 bits; a layer's errors add up to some fifty roundings of 2^-10 in the worst case. Overflow is off by far more.
_TOLERANCE = 0.05
_BACK, _ROUNDED = (
    "_cast_to_fp32",
    "_cast_to_fp16",
)  # how the library names a tensor that it casts to float32, and one before it casts it to half


class Float16(Stage):
    """Turn float32 into float16 inside the graph; inputs stay int64 and logits float32.

    The file is run on training rows in a CPU session, which computes half precision with casts: logits must stay where
    they were (values above 65504 are cut off or become infinite). Source: onnxruntime.transformers.float16.convert_float_to_float16.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx-fp16"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    uses_data: ClassVar[bool] = True  # for the comparison, which is part of the record

    kind: Literal["float16"] = "float16"
    keep_float32: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Operators that stay in float32, such as LayerNormalization or Softmax: mixed precision, where half overflows",
    )

    def refuses(self, backend: str) -> str | None:
        """What speaks against half precision there."""
        return backends.get(backend).float16

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where no weight was float32, where an operator to keep is not there, or logits are no longer numbers."""
        kept = self.keep_float32 or ()
        there = {name.split(".")[-1] for name in graph.operators(parent.onnx)}  # the library knows no domains
        lacking = [name for name in kept if name not in there]
        if lacking:
            raise StageError(
                f"{self.name}: keep_float32: the graph has no {lacking[0]}{nearest(lacking[0], sorted(there))}",
                remedy="name operators of this graph",
            )
        with captured():
            from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

            blocked = [*DEFAULT_OP_BLOCK_LIST, *kept]
            model = convert_float_to_float16(graph.load(parent.onnx), keep_io_types=True, op_block_list=blocked)
            if kept:
                _join(model)
            written = graph.save(model, out)
        copy_side_files(parent.path, out)
        halves = weights.tensors_of(written, "float16") - weights.tensors_of(parent.onnx, "float16")
        if halves == 0:
            raise StageError(f"{self.name}: the model has no float32 weight", remedy="put this stage after export or quantize-weights")
        return Changed(halves, "tensors", self._compare(parent.onnx, written, context))

    def _compare(self, parent: Path, written: Path, context: Context) -> dict[str, Any]:
        import numpy as np

        batches = calibration.shapes(written.parent, context)
        exact, half = (calibration.logits(path, batches, context.threads) for path in (parent, written))
        off = max(float(np.abs(h - e).max()) for h, e in zip(half, exact, strict=True))
        limit = _TOLERANCE * max(float(np.abs(e).max()) for e in exact)
        if not off <= limit:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: logits overflow in float16: {off:.3g} from float32, at most {limit:.3g} is rounding",
                remedy="keep the operators that overflow in float32 (keep_float32), or quantize the weights alone (quantize-weights)",
            )
        return {"max_abs_diff": off, "tolerance": limit}


def _join(model: onnx.ModelProto) -> None:
    """Let what stays in float32 read float32, in place: the library rounds to half in between, and writes a cast anew for every reader, which no session opens."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    back = {name: node for name, node in casts.items() if _target(node) == onnx.TensorProto.FLOAT and name.endswith(_BACK)}
    graph.replace(model.graph.node, [node for node in model.graph.node if node.output[0] not in back])
    model.graph.node.extend(back.values())  # one for all readers
    for node in casts.values():
        rounded = casts.get(node.input[0])
        if _target(node) == onnx.TensorProto.FLOAT and rounded is not None and rounded.input[0].endswith(_ROUNDED):
            node.input[0] = rounded.input[0]
    whole = {name: node.input[0] for name, node in back.items() if node.input[0].endswith(_ROUNDED)}
    for node in model.graph.node:
        node.input[:] = [whole.get(name, name) for name in node.input]
    read = {name for node in model.graph.node for name in node.input} | {output.name for output in model.graph.output}
    graph.replace(model.graph.node, [node for node in model.graph.node if node.op_type != "Cast" or node.output[0] in read])
    OnnxModel(model).topological_sort()


def _target(cast: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")
