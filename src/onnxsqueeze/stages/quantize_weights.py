"""Weights to 8 or 4 bits in blocks, activations untouched: for GPUs and for memory, not for speed on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import backends, graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages.chatter import captured

if TYPE_CHECKING:
    import onnx

_NBITS, _GATHER = "com.microsoft.MatMulNBits", "com.microsoft.GatherBlockQuantized"


class QuantizeWeights(Stage):
    """Store the weights of MatMul in 8 or 4 bits, one scale and zero point a block; the kernel unpacks them as it multiplies.

    Embeddings take 8 bits, in blocks too, where the block size divides their width (CUDA's kernel is wrong where it does not:
    onnxruntime#32663). The head (Gemm) stays as it is. Source: onnxruntime's MatMulNBitsQuantizer, contributed operators
    MatMulNBits and GatherBlockQuantized.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")

    kind: Literal["quantize-weights"] = "quantize-weights"
    bits: Literal[8, 4] = Field(8, description="Bits a weight")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="Weights that share a scale")

    embeddings: bool = Field(default=True, description="Store embeddings in 8 bits too")

    def refuses(self, backend: str) -> str | None:
        """Backends without kernels that unpack the weights."""
        return backends.get(backend).refusal((_NBITS, _GATHER) if self.embeddings else (_NBITS,))

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where no weight was quantized."""
        with captured():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            quantizer = MatMulNBitsQuantizer(graph.load(parent.onnx), bits=self.bits, block_size=self.block_size, is_symmetric=False)
            quantizer.process()
            model = quantizer.model.model
            tables = _quantize_tables(model, self.block_size) if self.embeddings else 0
            written = graph.save(model, out)
        copy_side_files(parent.path, out)
        found = graph.operators(written).get(_NBITS, 0) - graph.operators(parent.onnx).get(_NBITS, 0)
        if found == 0:
            raise StageError(
                f"{self.name}: the model has no MatMul with a float weight",
                remedy="quantize each weight once: put this stage right after export",
            )
        return Changed(found, "weights", {"bits": self.bits, "block_size": self.block_size, "embedding_tables": tables})


def _quantize_tables(model: onnx.ModelProto, block: int) -> int:
    """Replace Gather on float matrices by GatherBlockQuantized on uint8 ones, in place; returns how many matrices.

    Per block of ``block`` values of a row: scale = range ÷ 255, the range made to hold 0.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    tables = {
        t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and t.dims[1] % block == 0
    }
    done: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables or any(a.name == "axis" and a.i != 0 for a in node.attribute):
            continue
        name = node.input[0]
        if name not in done:
            rows = numpy_helper.to_array(tables[name])
            blocks = rows.reshape(len(rows), -1, block)
            low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
            scale = np.where(high > low, (high - low) / 255, 1).astype(np.float32)
            zero = np.rint(-low / scale).astype(np.uint8)
            packed = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, 255).astype(np.uint8).reshape(rows.shape)
            done[name] = [f"{name}_Q8", f"{name}_scales", f"{name}_zero_points"]
            parts = zip((packed, scale, zero), done[name], strict=True)
            model.graph.initializer.extend(numpy_helper.from_array(values, label) for values, label in parts)
        data, scales, zeros = done[name]
        attributes: dict[str, Any] = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        inputs = [data, node.input[1], scales, zeros]
        node.CopyFrom(
            helper.make_node("GatherBlockQuantized", inputs, list(node.output), f"{node.name}_Q8", domain="com.microsoft", **attributes)
        )
    return len(done)
