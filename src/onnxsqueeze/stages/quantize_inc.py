"""Weights and activations to int8 by Intel Neural Compressor, the second opinion beside ONNX Runtime's own quantizers."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from onnxsqueeze import backends, graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.errors import StageError, without_paths
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured
from onnxsqueeze.stages.inc_search import Search, watched
from onnxsqueeze.stages.int8 import ReduceRange, count, depends_on_machine, seven_bits

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

_LINES_SHOWN = 12
_MAX_DROP_PP, _MAX_TRIALS = 0.5, 30
_NEVER = 365 * 24 * 3600  # seconds; more does not fit into neural-compressor's timer
_WRITES = {
    "dynamic": ("DynamicQuantizeLinear", "MatMulInteger"),
    "static": ("QLinearMatMul",),
    "qdq": ("QuantizeLinear", "DequantizeLinear"),
}
_TOUCHED = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES")  # neural-compressor sets or removes them, and would hide the GPU from later stages


class QuantizeInc(Stage):
    """Quantize to int8 with neural-compressor: weights per output, embeddings too, activations by range at run time or fixed beforehand.

    With ``tune`` one of its strategies tries configurations until one loses at most ``max_drop_pp`` points on the selection split; with
    ``tune_seconds`` it goes on. Of all that lose no more, that is written which has fewest weights in float, then most operators in
    integers, then the highest score, then came first. Each trial is recorded; none that loses so little is an error.

    With ``smooth`` each product's inputs are divided, channel by channel, by max|X|^alpha / max|W|^(1 - alpha), and its weights multiplied
    by it. Source: neural_compressor.quantization.fit, PostTrainingQuantConfig; Xiao et al. 2023 (SmoothQuant), equation 4.
    """

    version: ClassVar[int] = 2  # tables keep 8 bits beside weights of 7
    takes: ClassVar[tuple[State, ...]] = ("onnx",)
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("neural-compressor", "onnxruntime", "onnx")
    uses_data: ClassVar[bool] = True

    kind: Literal["quantize-inc"] = "quantize-inc"
    approach: Literal["dynamic", "static"] = Field(
        "dynamic", description="Ranges of activations: as they come, or measured on training rows"
    )
    format: Literal["qoperator", "qdq"] = Field(
        "qoperator", description="Integer operators, or float ones between QuantizeLinear and DequantizeLinear, for GPUs (static)"
    )
    samples: int = Field(128, ge=1, description="Training rows to measure ranges on (static)")
    smooth: float | None = Field(
        None,
        gt=0,
        le=1,
        description="SmoothQuant's alpha, how much of the outliers moves from activations into weights (static); each product gets a Mul",
    )
    reduce_range: ReduceRange = Field(
        "auto", description='7-bit weights; "auto": only where this CPU has no VNNI and 8 bits would saturate'
    )
    tune: Literal["basic", "bayesian", "mse_v2"] | None = Field(
        None,
        description="Try configurations until one loses little on the selection split: basic leaves more and more operators in float, "
        "bayesian varies how ranges and scales are chosen, mse_v2 leaves in float what the outputs depend on most (slow: it quantizes once per operator and trial)",
    )
    max_drop_pp: float | None = Field(
        None, ge=0, le=100, description=f"Most points that it may lose there against the float model (tune; default {_MAX_DROP_PP})"
    )
    max_trials: int | None = Field(None, ge=1, description=f"Most configurations to try (tune; default {_MAX_TRIALS})")
    tune_seconds: float | None = Field(
        None,
        ge=0,
        description="Go on for so long, also behind the first trial that loses little enough, and keep the best; default: end there",
    )

    @model_validator(mode="after")
    def _format_is_of_static(self) -> QuantizeInc:
        if self.format == "qdq" and self.approach != "static":
            raise ValueError(f"format: qdq needs approach: static, got {self.approach}: ranges taken at run time have no such form")
        if self.smooth is not None and self.approach != "static":
            raise ValueError(f"smooth needs approach: static, got {self.approach}: it is measured on training rows")
        return self

    @model_validator(mode="after")
    def _goals_are_of_tuning(self) -> QuantizeInc:
        idle = [name for name in ("max_drop_pp", "max_trials", "tune_seconds") if getattr(self, name) is not None]
        if idle and self.tune is None:
            raise ValueError(f"{', '.join(idle)}: only with tune")
        return self

    def machine_bound(self) -> bool:
        """True where "auto" chose 7 bits for this CPU, or where the clock ends the search."""
        return depends_on_machine(self.reduce_range) or self.tune_seconds is not None

    def timed(self) -> bool:
        """True where trials are scored: what they score depends on the batch of the measured call, which joins the key."""
        return self.tune is not None

    def refuses(self, backend: str) -> str | None:
        """Backends without kernels for what it writes, which depends on the approach."""
        return backends.get(backend).refusal(_WRITES["qdq" if self.format == "qdq" else self.approach])

    def unavailable(self) -> tuple[str, str] | None:
        """The optional dependency of the extra ``inc``."""
        if importlib.util.find_spec("neural_compressor") is None:
            return "neural-compressor is not installed", "pip install 'onnxsqueeze[inc]'"
        return None

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError with neural-compressor's last lines where it gives up or changes nothing.

        Raises KeyboardInterrupt where the process was interrupted, which neural-compressor would take for the end of its search. With
        ``tune`` raises StageError where no trial meets the goal.
        """

        def finish(model: onnx.ModelProto) -> None:
            if self.format == "qdq":
                _leave_gathered_rows(model)
            if seven or (self.approach == "static" and self.format != "qdq"):
                _requantize_tables(model, graph.load(parent.onnx))

        seven = seven_bits(self.reduce_range)
        details: dict[str, Any] = {"approach": self.approach, "seven_bits": seven}
        with tempfile.TemporaryDirectory(dir=out) as folder:
            scratch = Path(folder)
            if self.tune is None:
                model = self._fitted(parent.onnx, context, scratch)
                finish(model)
                graph.save(model, out)
                copy_side_files(parent.path, out)
            else:
                goal = _MAX_DROP_PP if self.max_drop_pp is None else self.max_drop_pp
                search = Search(self.name, parent, finish, context, folder=scratch, max_drop_pp=goal, seconds=self.tune_seconds)
                self._fitted(parent.onnx, context, scratch, search)
                details |= search.take(out)
        written = out / MODEL_FILE
        if self.smooth is not None:
            details["smoothed"] = self._smoothed(written)
        return count(self, (), parent.onnx, written, details)

    def _smoothed(self, written: Path) -> int:
        """The products whose inputs SmoothQuant scales; raises StageError where there are none."""
        found = len([node for node in graph.load(written).graph.node if node.name.endswith("_smooth_mul")])
        if not found:
            raise StageError(f"{self.name}: smooth: {self.smooth} scaled the input of no product", remedy="leave out smooth on this model")
        return found

    def _fitted(self, model: Path, context: Context, scratch: Path, search: Search | None = None) -> Any:
        """What neural-compressor makes of ``model``: an onnx.ModelProto, of no meaning with a search. Raises StageError where it fails."""
        os.environ.setdefault("LOGLEVEL", "ERROR")  # read by neural-compressor when it is first imported
        before = {name: os.environ.get(name) for name in _TOUCHED}
        with captured() as lines:
            try:
                with _interruptible():
                    fitted = self._fit(model, context, scratch, search)
            finally:
                for name, value in before.items():
                    os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        failed = any("Traceback (most recent call last):" in line for line in lines)  # fit swallows its errors
        if failed or (fitted is None and search is None):
            tail = without_paths("\n    ".join(lines[-_LINES_SHOWN:]))
            raise StageError(
                f"{self.name}: neural-compressor gave no model. Its last lines:\n    {tail}", remedy="try quantize-dynamic on this model"
            )
        return fitted and fitted.model

    def _fit(self, model: Path, context: Context, scratch: Path, search: Search | None) -> Any:
        from neural_compressor import PostTrainingQuantConfig, quantization, set_random_seed, set_workspace
        from neural_compressor.config import AccuracyCriterion, TuningCriterion

        set_workspace(str(scratch / "workspace"))
        set_random_seed(0)
        config = PostTrainingQuantConfig(
            approach=self.approach,
            quant_format="QDQ" if self.format == "qdq" else "default",
            calibration_sampling_size=[self.samples],
            quant_level=1,  # the configuration, or the strategy, as it is: 0 and "auto" begin with others
            tuning_criterion=TuningCriterion(
                strategy=self.tune or "basic",
                max_trials=1 if search is None else self.max_trials or _MAX_TRIALS,
                timeout=0
                if self.tune_seconds is None
                else _NEVER,  # 0: up to the first success. Our clock ends it: its own would interrupt us
            ),
            accuracy_criterion=AccuracyCriterion(criterion="absolute", tolerable_loss=0.0 if search is None else search.max_drop_pp / 100),
            reduce_range=seven_bits(self.reduce_range),
            # it takes ONNX's Attention for the operator of that name in com.microsoft, and writes a file that does not load
            op_type_dict={"Attention": {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}},
            recipes={
                # its default lets ONNX Runtime fuse Gemm with Tanh first, which hides the pooler's weight from the quantizer
                "graph_optimization_level": "ENABLE_BASIC",
                **({"smooth_quant": True, "smooth_quant_args": {"alpha": self.smooth}} if self.smooth else {}),
            },
        )
        rows = None
        if self.approach == "static" or self.tune == "mse_v2":
            rows = _Loader(model, context, self.samples, even=self.smooth is not None)
        with nullcontext() if self.tune is None else watched(self.tune):
            return quantization.fit(str(model), config, calib_dataloader=rows, eval_func=search)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block at the latest, where the process was interrupted inside it.

    Only the main thread receives signals; where SIGINT is ignored, or not Python's to handle, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001, a handler's arguments
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt


def _requantize_tables(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Give every embedding table 8 bits and the scale of its own range, in place.

    neural-compressor 3.7.1 gives tables the spare bit of weights, which no product of theirs needs. In static graphs of integers it takes
    the range of the rows that calibration happened to read, and lets all other rows wrap around in uint8 instead of saturating
    (GatherOperator.convert): a token unseen in calibration would get a random embedding.
    """
    import numpy as np
    from onnx import numpy_helper

    gathered = {node.input[0] for node in original.graph.node if node.op_type == "Gather"}
    after = {tensor.name: tensor for tensor in model.graph.initializer}
    for before in original.graph.initializer:
        label = f"{before.name}_quantized"
        if before.name not in gathered or label not in after:
            continue
        table, kind = numpy_helper.to_array(before), numpy_helper.to_array(after[label]).dtype
        low, high = min(float(table.min()), 0.0), max(float(table.max()), 0.0)
        signed = kind == np.int8  # one scale on both sides of zero
        scale = np.float32((max(-low, high) / 127 if signed else (high - low) / 255) or 1)
        zero = np.asarray(0 if signed else np.rint(-low / scale), kind)
        limits = np.iinfo(kind)
        values = np.clip(np.rint(table / scale) + zero, limits.min, limits.max).astype(kind)
        rows = {label, *(node.output[0] for node in model.graph.node if node.op_type == "Gather" and node.input[0] == label)}
        # every other reader takes (values, scale, zero point) side by side
        places = {
            (user.input[i + 1], user.input[i + 2])
            for user in model.graph.node
            for i, read in enumerate(user.input)
            if read in rows and user.op_type != "Gather"
        }
        for content, name in ((values, label), *(pair for place in places for pair in zip((scale, zero), place, strict=True))):
            after[name].CopyFrom(numpy_helper.from_array(np.asarray(content), name))


def _leave_gathered_rows(model: onnx.ModelProto) -> None:
    """Take out QuantizeLinear and DequantizeLinear behind the Gather of a table that is stored in integers, in place.

    They would clip the rows that calibration did not read to the range of those that it did.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    around = {}
    for node in model.graph.node:
        quantize = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        gather = makers.get(quantize.input[0]) if quantize is not None and quantize.op_type == "QuantizeLinear" else None
        table = makers.get(gather.input[0]) if gather is not None and gather.op_type == "Gather" else None
        if quantize is not None and table is not None and table.op_type == "DequantizeLinear" and table.input[0] not in makers:
            around[node.output[0]] = quantize.input[0]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = around.get(name, name)
    read = {name for node in model.graph.node for name in node.input} | {given.name for given in model.graph.output}
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        for node in [node for node in model.graph.node if node.op_type == op_type and not read.intersection(node.output)]:
            model.graph.node.remove(node)
        read = {name for node in model.graph.node for name in node.input} | {given.name for given in model.graph.output}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)


class _Loader:
    """Training rows in the form in which neural-compressor reads them: again and again, as (inputs, label).

    ``even``: all batches have the same number of rows, as its SmoothQuant needs them.
    """

    def __init__(self, model: Path, context: Context, samples: int, *, even: bool) -> None:
        rows = min(samples, len(context.train.rows))
        self.batch_size = next(n for n in range(calibration.CALIBRATION_BATCH, 0, -1) if not even or rows % n == 0)
        self._arguments = (model, context, samples, self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, NDArray[np.int64]], int]]:
        return ((feed, 0) for feed in calibration.feeds(*self._arguments))
