"""Weights and embeddings to int8; activations are quantized while the model runs, by the range they then have."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import backends, graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import modules
from onnxsqueeze.stages.chatter import captured
from onnxsqueeze.stages.int8 import EXCLUDE, OpType, ReduceRange, count, depends_on_machine, seven_bits

if TYPE_CHECKING:
    import onnx


class QuantizeDynamic(Stage):
    """Quantize to 8 bits with scales for activations taken at run time; needs no data.

    Weights of MatMul and Gemm become symmetric integers, embeddings (Gather) unsigned ones with a zero point, one scale a
    table. Source: onnxruntime.quantization.quantize_dynamic.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")

    kind: Literal["quantize-dynamic"] = "quantize-dynamic"
    # MiniLM: logits 3× nearer to float32 than with one scale a matrix, for 0.1 of 23 MB and the same speed
    per_channel: bool = Field(default=True, description="One scale per output of a weight matrix, else one per matrix")
    reduce_range: ReduceRange = Field(
        "auto", description='7-bit weights; "auto": only where this CPU has no VNNI and 8 bits would saturate'
    )
    op_types: tuple[OpType, ...] = Field(("MatMul", "Gemm", "Gather"), min_length=1, description="Operators whose weights are quantized")
    exclude: tuple[str, ...] | None = Field(None, min_length=1, description=EXCLUDE)

    def machine_bound(self) -> bool:
        """True where "auto" chose 7 bits for this CPU."""
        return depends_on_machine(self.reduce_range)

    def refuses(self, backend: str) -> str | None:
        """Backends without kernels for what it writes."""
        return backends.get(backend).refusal(("DynamicQuantizeLinear", "MatMulInteger"))

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where nothing, or nothing of a named operator, was quantized."""
        model = graph.load(parent.onnx)
        left, names = modules.excluded(model, self.exclude, f"{self.name}: exclude")
        with captured(), tempfile.TemporaryDirectory(dir=out) as scratch:
            rough = Path(scratch) / MODEL_FILE
            inference = self._quantize(model, names, rough)
            written = graph.save(graph.load(rough), out)
        modules.require_float(written, left, f"{self.name}: exclude")
        copy_side_files(parent.path, out)
        details: dict[str, Any] = {"seven_bits": seven_bits(self.reduce_range), "shape_inference": inference}
        if left:
            details["excluded"] = list(left)
        return count(self, self.op_types, parent.onnx, written, details)

    def _quantize(self, model: onnx.ModelProto, excluded: Sequence[str], target: Path) -> str:
        """Write the quantized model; returns which attempt at shape inference did, and what it left out."""
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        float32: dict[str, Any] = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        ladder: tuple[tuple[str, dict[str, Any]], ...] = (
            ("by ONNX, whole graph", {}),
            ("by ONNX; outputs of contributed operators, which it does not know, taken as float32", float32),
        )
        reasons = []
        for words, options in ladder:
            try:
                quantize_dynamic(
                    model,
                    target,
                    op_types_to_quantize=list(self.op_types),
                    per_channel=self.per_channel,
                    reduce_range=seven_bits(self.reduce_range),
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=list(excluded),
                    extra_options=dict(options),
                )
            except (RuntimeError, onnx.shape_inference.InferenceError) as error:  # "Unable to find data type for weight_name=…"
                reasons.append(str(error))
            else:
                return words
        raise StageError(f"{self.name}: ONNX Runtime cannot quantize this graph: {reasons[-1]}")
