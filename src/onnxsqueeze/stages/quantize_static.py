"""Weights and activations to int8 with ranges fixed beforehand, measured on training rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze import backends, graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibrated, calibration, modules, smoothing
from onnxsqueeze.stages.calibrated import Method, Watch
from onnxsqueeze.stages.chatter import captured
from onnxsqueeze.stages.int8 import EXCLUDE, OpType, ReduceRange, count, depends_on_machine, seven_bits
from onnxsqueeze.tasks.rows import rows_sha256, spread

if TYPE_CHECKING:
    import onnx

_PRODUCTS = ("MatMul", "Gemm")
_OF_RANGES = {"format", "calibration", "percentile", "samples", "smooth", "op_types"}


class QuantizeStatic(Stage):
    """Quantize weights to symmetric int8, and activations to 8 bits within ranges that training rows have.

    In QDQ form inputs of products with a weight are quantized, their outputs and attention's own products are not: that is three times nearer
    to float32 on MiniLM, and no slower. What else reads such an input, as a residual does, reads it unrounded. Embeddings (Gather) get
    one scale a table. As operators on integers (``qoperator``) products give their outputs in 8 bits, too. Source: onnxruntime.quantization's QDQQuantizer and
    ONNXQuantizer; ranges: `onnxsqueeze.stages.calibrated`.
    """

    version: ClassVar[int] = 3  # 2: residuals are not rounded; 3: tables keep 8 bits beside weights of 7
    takes: ClassVar[tuple[State, ...]] = ("onnx",)
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    uses_data: ClassVar[bool] = True

    kind: Literal["quantize-static"] = "quantize-static"
    format: Literal["qdq", "qoperator"] = Field(
        "qdq", description="Float operators between QuantizeLinear and DequantizeLinear, which sessions fuse, or operators on integers"
    )
    calibration: Method = Field(
        "minmax",
        description="How ranges come of what activations hold: their extremes, the rows' extremes on average, all but a few per mille of the values, or what loses least information",
    )
    percentile: float = Field(99.99, gt=50, le=100, description="Per cent of the values that lie within, with calibration: percentile")
    samples: int = Field(128, ge=1, description="Training rows to measure ranges on")
    smooth: float | None = Field(
        None,
        ge=0,
        le=1,
        description="SmoothQuant's alpha: how much of large channels of activations goes to the weights; default: not at all",
    )
    activation_type: Literal["uint8", "int8"] = Field("uint8", description="Type of quantized activations")
    symmetric: bool = Field(default=False, description="Ranges of activations symmetric about 0, as TensorRT wants them, with int8")
    per_channel: bool = Field(default=True, description="One scale per output of a weight matrix, else one per matrix")
    reduce_range: ReduceRange = Field(
        "auto", description='7-bit weights; "auto": only where this CPU has no VNNI and 8 bits would saturate'
    )
    op_types: tuple[OpType, ...] = Field(("MatMul", "Gemm", "Gather"), min_length=1, description="Operators whose weights are quantized")
    exclude: tuple[str, ...] | None = Field(None, min_length=1, description=EXCLUDE)
    quantize_bias: bool = Field(
        default=True,
        description="False: biases stay float32, also when ONNX Runtime loads the file; for CUDA, which has no kernel for int32 ones. Leaves Gemm out",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if not self.quantize_bias and "Gemm" in self.op_types:
            raise ValueError("quantize_bias: false needs op_types without Gemm: its bias is part of the product")
        if not self.quantize_bias and self.format != "qdq":
            raise ValueError("quantize_bias: false needs format: qdq")
        if "percentile" in self.model_fields_set and self.calibration != "percentile":
            raise ValueError(f"percentile needs calibration: percentile, got {self.calibration}")
        if self.symmetric and self.activation_type != "int8":
            raise ValueError("symmetric needs activation_type: int8; uint8 has no value for what is negative then")
        return self

    def refuses(self, backend: str) -> str | None:
        """Backends without kernels for products of integers."""
        return backends.get(backend).refusal(("QLinearMatMul", "com.microsoft.QGemm")) if self.format == "qoperator" else None

    def machine_bound(self) -> bool:
        """True where "auto" chose 7 bits for this CPU."""
        return depends_on_machine(self.reduce_range)

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where nothing, or nothing of a named operator, was quantized."""
        model = graph.load(parent.onnx)
        left, names = modules.excluded(model, self.exclude, f"{self.name}: exclude")
        rows = list(calibration.feeds(parent.onnx, context, self.samples))
        with captured(), tempfile.TemporaryDirectory(dir=out) as scratch:
            smoothed = 0
            if self.smooth is not None:
                products, _ = self._quantizable(model, names)
                inputs = Watch(model, [node.input[0] for node in products], Path(scratch), context.threads)
                smoothed = smoothing.smooth(model, products, smoothing.channels(inputs(rows)), self.smooth)
            found = self._ranges(model, parent.digest, names if smoothed else [], rows, Path(scratch), context)
            quantized = self._quantize(model, found, names)
            if self.format == "qdq":
                _round_for_products_alone(quantized, frozenset(names))
            if not self.quantize_bias:
                _keep_biases_apart(quantized)
            written = graph.save(quantized, out)
        modules.require_float(written, left, f"{self.name}: exclude")
        copy_side_files(parent.path, out)
        details: dict[str, Any] = {
            "seven_bits": seven_bits(self.reduce_range),
            "calibration_rows": sum(len(feed["input_ids"]) for feed in rows),
        }
        if self.smooth is not None:
            details["smoothed"] = smoothed
        if left:
            details["excluded"] = list(left)
        return count(self, self.op_types, parent.onnx, written, details)

    def _ranges(
        self,
        model: onnx.ModelProto,
        digest: str,
        excluded: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        scratch: Path,
        context: Context,
    ) -> dict[str, calibrated.Range]:
        """Of every tensor that may be quantized but around the ``excluded`` nodes; kept, so that another choice of modules finds them. ``digest`` is the parent's."""
        causes = {"model": digest, **self.model_dump(mode="json", include=_OF_RANGES), "excluded": list(excluded)}
        causes |= {"rows": rows_sha256(spread(context.train.rows, self.samples)), "max_length": context.task.max_length}
        kept = context.kept.measurement("ranges", causes)
        if kept is not None:
            return {name: (low, high) for name, (low, high) in json.loads(kept).items()}
        products, tables = self._quantizable(model, excluded)
        names = [node.input[0] for node in products] + [node.output[0] for node in tables]
        names += [node.output[0] for node in products] if self.format == "qoperator" else []
        watch = Watch(model, list(dict.fromkeys(names)), scratch, context.threads)
        found = calibrated.ranges(lambda: watch(rows), self.calibration, self.percentile)
        context.kept.keep_measurement("ranges", causes, json.dumps(found).encode())
        return found

    def _quantizable(self, model: onnx.ModelProto, excluded: Sequence[str]) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """(products, Gathers) whose weights are to be quantized."""
        nodes = [
            node
            for group in modules.weighted(model).values()
            for node in group
            if node.op_type in self.op_types and node.name not in excluded
        ]
        return [node for node in nodes if node.op_type in _PRODUCTS], [node for node in nodes if node.op_type not in _PRODUCTS]

    def _quantize(self, model: onnx.ModelProto, found: Mapping[str, calibrated.Range], excluded: Sequence[str]) -> onnx.ModelProto:
        import numpy as np
        from onnxruntime.quantization import CalibrationMethod, QuantizationMode, QuantType
        from onnxruntime.quantization.calibrate import TensorData, TensorsData
        from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        ends = {name: tuple(np.array(end, np.float32) for end in one) for name, one in found.items()}
        data = TensorsData(CalibrationMethod.MinMax, {name: TensorData(lowest=low, highest=high) for name, (low, high) in ends.items()})
        constant = {tensor.name for tensor in model.graph.initializer}
        alone = [node.name for node in model.graph.node if node.op_type in _PRODUCTS and not constant.intersection(node.input)]
        settings: tuple[Any, ...] = (
            QuantType.QInt8,
            QuantType.QInt8 if self.activation_type == "int8" else QuantType.QUInt8,
            data,
            [],
            [*alone, *excluded],
        )
        options: dict[str, Any] = {"WeightSymmetric": True, "ActivationSymmetric": self.symmetric}
        seven, operators = seven_bits(self.reduce_range), list(self.op_types)
        if self.format == "qdq":
            options["OpTypesToExcludeOutputQuantization"] = list(_PRODUCTS)
            if seven:  # no product reads a table's integers, so these need no spare bit
                gathers = (node for node in model.graph.node if node.op_type == "Gather" and node.name not in excluded)
                tables = {node.input[0] for node in gathers if node.input[0] in constant}
                options["TensorQuantOverrides"] = (
                    {name: [{"reduce_range": False}] for name in sorted(tables)} if "Gather" in operators else {}
                )
            quantizer = QDQQuantizer(model, self.per_channel, seven, *settings, operators, options)
        else:
            quantizer = ONNXQuantizer(model, self.per_channel, seven, QuantizationMode.QLinearOps, True, *settings, operators, options)  # noqa: FBT003, static
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantized: onnx.ModelProto = quantizer.model.model
        return quantized


def _round_for_products_alone(model: onnx.ModelProto, excluded: frozenset[str]) -> None:
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
        if node.op_type not in _PRODUCTS or node.name in excluded:
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
