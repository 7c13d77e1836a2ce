"""Weights and activations to int8 with ranges fixed beforehand, measured on training rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured
from onnxsqueeze.stages.int8 import OpType, ReduceRange, count, depends_on_machine, seven_bits

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

_PRODUCTS = ("MatMul", "Gemm")


class QuantizeStatic(Stage):
    """Quantize to 8 bits in QDQ form: symmetric int8 weights, one scale per output; uint8 activations, smallest to largest value seen.

    Inputs of products with a weight are quantized, their outputs and attention's own products are not: that is three times nearer
    to float32 on MiniLM, and no slower. What else reads such an input, as a residual does, reads it unrounded. Embeddings (Gather) get
    one scale a table. Source: onnxruntime.quantization.quantize_static.
    """

    version: ClassVar[int] = 2  # 2: residuals are not rounded
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
    quantize_bias: bool = Field(
        default=True,
        description="False: biases stay float32, also when ONNX Runtime loads the file; for CUDA, which has no kernel for int32 ones. Leaves Gemm out",
    )

    @model_validator(mode="after")
    def _gemm_has_a_bias(self) -> Self:
        if not self.quantize_bias and "Gemm" in self.op_types:
            raise ValueError("quantize_bias: false needs op_types without Gemm: its bias is part of the product")
        return self

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
            quantized = graph.load(rough)
            _round_for_products_alone(quantized)
            if not self.quantize_bias:
                _keep_biases_apart(quantized)
            written = graph.save(quantized, out)
        copy_side_files(parent.path, out)
        details = {"seven_bits": seven_bits(self.reduce_range), "calibration_rows": reader.rows}
        return count(self, self.op_types, parent.onnx, written, details)


def _round_for_products_alone(model: onnx.ModelProto) -> None:
    """Let what is no product read the tensor before QuantizeLinear, where ONNX Runtime's quantizer gave every reader the rounded one.

    Rows of a table stay as they are: they lie on the table's grid already, and the pair behind a Gather is what lets it read integers.
    """
    maker = {output: node for node in model.graph.node for output in node.output}
    before = {}
    for node in model.graph.node:
        quantizing = maker.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizing is not None and quantizing.op_type == "QuantizeLinear":
            source = maker.get(quantizing.input[0])
            if source is None or source.op_type != "Gather" or maker.get(source.input[0], node).op_type != "DequantizeLinear":
                before[node.output[0]] = quantizing.input[0]
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS:
            node.input[:] = [before.get(name, name) for name in node.input]


def _keep_biases_apart(model: onnx.ModelProto) -> None:
    """Give each vector that is added to a product the shape [1, 1, N].

    ONNX Runtime makes one Gemm of a MatMul and an Add of [N], and int32 of a quantized Gemm's bias: its MatMulAddFusion and WeightBiasQuantization.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    for node in model.graph.node:
        bias = next((constants[name] for name in node.input if name in constants and len(constants[name].dims) == 1), None)
        if node.op_type != "Add" or bias is None or products.isdisjoint(node.input):
            continue
        apart = f"{bias.name}_apart"
        if apart not in constants:
            constants[apart] = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias)[None, None], apart)
            model.graph.initializer.append(constants[apart])
        node.input[:] = [apart if name == bias.name else name for name in node.input]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


class _Reader:
    """Training rows in the form in which ONNX Runtime's calibrators ask for them: one batch a call, None at the end."""

    def __init__(self, model: Path, context: Context, samples: int) -> None:
        self._feeds = calibration.feeds(model, context, samples)
        self.rows = 0

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        feed = next(self._feeds, None)
        self.rows += 0 if feed is None else len(feed["input_ids"])
        return feed
