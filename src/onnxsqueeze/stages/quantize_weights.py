"""Weights to 8 or 4 bits in blocks, activations untouched: for GPUs and for memory, not for speed on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze import backends, graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import modules
from onnxsqueeze.stages.chatter import captured
from onnxsqueeze.stages.int8 import EXCLUDE

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

_NBITS, _GATHER = "com.microsoft.MatMulNBits", "com.microsoft.GatherBlockQuantized"


class QuantizeWeights(Stage):
    """Store the weights of MatMul in 8 or 4 bits, one scale and zero point a block; the kernel unpacks them as it multiplies.

    Embeddings have bits of their own, in blocks too, where the block size divides their width (CUDA's kernel is wrong where it does not:
    onnxruntime#32663), with 4 bits twice the block size (the CPU's kernel is wrong at an odd number of blocks before ONNX Runtime 1.31, of versions tried). The head (Gemm) stays as it is. With ``layers: false`` and quantize-dynamic behind it, the vocabulary has 4 bits and the layers int8.
    Source: onnxruntime's MatMulNBitsQuantizer, contributed operators MatMulNBits and GatherBlockQuantized.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")

    kind: Literal["quantize-weights"] = "quantize-weights"
    bits: Literal[8, 4] = Field(8, description="Bits a weight of the layers")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="Weights that share a scale")
    layers: bool = Field(default=True, description="Store the weights of MatMul so")
    embeddings: bool = Field(default=True, description="Store embeddings so, too")
    embedding_bits: Literal[8, 4] = Field(8, description="Bits a value of the embeddings")
    exclude: tuple[str, ...] | None = Field(None, min_length=1, description=EXCLUDE)

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.layers and not self.embeddings:
            raise ValueError("layers and embeddings: at least one must be stored in fewer bits")
        for name, needed in (("bits", "layers"), ("embedding_bits", "embeddings")):
            if name in self.model_fields_set and not getattr(self, needed):
                raise ValueError(f"{name} says nothing where {needed} is false; leave it out")
        return self

    def refuses(self, backend: str) -> str | None:
        """Backends without kernels that unpack the weights."""
        return backends.get(backend).refusal((*([_NBITS] if self.layers else []), *([_GATHER] if self.embeddings else [])))

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where no weight was quantized."""
        model = graph.load(parent.onnx)
        left, names = modules.excluded(model, self.exclude, f"{self.name}: exclude")
        with captured():
            from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

            if self.layers:
                # by a configuration: in ONNX Runtime 1.23 the quantizer's own arguments know no bits
                config = DefaultWeightOnlyQuantConfig(block_size=self.block_size, is_symmetric=False, bits=self.bits)
                quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=list(names), algo_config=config)
                quantizer.process()
                model = quantizer.model.model
            tables = _quantize_tables(model, self.block_size, self.embedding_bits, frozenset(names)) if self.embeddings else 0
            written = graph.save(model, out)
        modules.require_float(written, left, f"{self.name}: exclude")
        copy_side_files(parent.path, out)
        found = graph.operators(written).get(_NBITS, 0) - graph.operators(parent.onnx).get(_NBITS, 0)
        if self.layers and found == 0:
            raise StageError(
                f"{self.name}: the model has no MatMul with a float weight",
                remedy="quantize each weight once: put this stage right after export",
            )
        if found + tables == 0:
            raise StageError(
                f"{self.name}: the model has no float embedding whose width {_unit(self.embedding_bits, self.block_size)} divides",
                remedy="choose a smaller block_size, and quantize each weight once",
            )
        details: dict[str, Any] = {"block_size": self.block_size, "embedding_tables": tables}
        details |= {"bits": self.bits} if self.layers else {}
        details |= {"embedding_bits": self.embedding_bits} if self.embeddings else {}
        details |= {"excluded": list(left)} if left else {}
        return Changed(found + tables, "weights", details)


def _quantize_tables(model: onnx.ModelProto, block: int, bits: int, excluded: frozenset[str]) -> int:
    """Replace Gather on float matrices by GatherBlockQuantized on ones of ``bits``, in place; returns how many matrices.

    Per block of ``block`` values of a row: scale = range ÷ (2^bits - 1), the range made to hold 0. Two values of 4 bits share a byte, the first in its low half.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    tables = {
        t.name: t
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and t.dims[1] % _unit(bits, block) == 0
    }
    done: dict[str, list[str]] = {}
    for node in model.graph.node:
        if (
            node.op_type != "Gather"
            or node.input[0] not in tables
            or node.name in excluded
            or any(a.name == "axis" and a.i != 0 for a in node.attribute)
        ):
            continue
        name = node.input[0]
        if name not in done:
            rows = numpy_helper.to_array(tables[name])
            blocks = rows.reshape(len(rows), -1, block)
            low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
            steps = 2**bits - 1
            scale = np.where(high > low, (high - low) / steps, 1).astype(np.float32)
            zero = np.rint(-low / scale).astype(np.uint8)
            codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, steps).astype(np.uint8).reshape(rows.shape)
            done[name] = [f"{name}_Q{bits}", f"{name}_scales", f"{name}_zero_points"]
            parts = zip((codes, scale, zero) if bits == 8 else (_halves(codes), scale, _halves(zero)), done[name], strict=True)
            model.graph.initializer.extend(numpy_helper.from_array(values, label) for values, label in parts)
        data, scales, zeros = done[name]
        attributes: dict[str, Any] = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        inputs = [data, node.input[1], scales, zeros]
        node.CopyFrom(
            helper.make_node(
                "GatherBlockQuantized", inputs, list(node.output), f"{node.name}_Q{bits}", domain="com.microsoft", **attributes
            )
        )
    if done and all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(done)


def _unit(bits: int, block: int) -> int:
    """The width of the fewest blocks whose zero points fill whole bytes."""
    return block * 8 // bits


def _halves(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``codes[rows, n]`` of 4 bits, n even, as ``[rows, n / 2]`` bytes."""
    import numpy as np

    return (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
