"""Weights and activations to int8 with ranges fixed beforehand, measured on training rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured
from onnxsqueeze.stages.int8 import OpType, ReduceRange, count, depends_on_machine, seven_bits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PRODUCTS = ("MatMul", "Gemm")


class QuantizeStatic(Stage):
    """Quantize to 8 bits in QDQ form: symmetric int8 weights, one scale per output; uint8 activations, smallest to largest value seen.

    Inputs of products with a weight are quantized, their outputs and attention's own products are not: that is three times nearer
    to float32 on MiniLM, and no slower. Embeddings (Gather) get one scale a table. Source: onnxruntime.quantization.quantize_static.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx",)
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    uses_data: ClassVar[bool] = True

    kind: Literal["quantize-static"] = "quantize-static"
    samples: int = Field(128, ge=1, description="Training rows to measure ranges on")
    reduce_range: ReduceRange = Field(
        "auto", description='7-bit weights; "auto": only where this CPU has no VNNI and 8 bits would saturate'
    )
    op_types: tuple[OpType, ...] = Field(("MatMul", "Gemm", "Gather"), min_length=1, description="Operators whose weights are quantized")

    def machine_bound(self) -> bool:
        """True where "auto" chose 7 bits for this CPU."""
        return depends_on_machine(self.reduce_range)

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where nothing, or nothing of a named operator, was quantized."""
        with captured(), tempfile.TemporaryDirectory(dir=out) as scratch:
            from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

            rough = Path(scratch) / MODEL_FILE
            reader = _Reader(parent.onnx, context, self.samples)
            model = graph.load(parent.onnx)
            constant = {tensor.name for tensor in model.graph.initializer}
            quantize_static(
                model,  # not the path: it would write beside the parent
                rough,
                reader,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(self.op_types),
                per_channel=True,
                reduce_range=seven_bits(self.reduce_range),
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=[
                    node.name for node in model.graph.node if node.op_type in _PRODUCTS and not constant.intersection(node.input)
                ],
                extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
            )
            written = graph.save(graph.load(rough), out)
        copy_side_files(parent.path, out)
        details = {"seven_bits": seven_bits(self.reduce_range), "calibration_rows": reader.rows}
        return count(self, self.op_types, parent.onnx, written, details)


class _Reader:
    """Training rows in the form in which ONNX Runtime's calibrators ask for them: one batch a call, None at the end."""

    def __init__(self, model: Path, context: Context, samples: int) -> None:
        self._feeds = calibration.feeds(model, context, samples)
        self.rows = 0

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        feed = next(self._feeds, None)
        self.rows += 0 if feed is None else len(feed["input_ids"])
        return feed
