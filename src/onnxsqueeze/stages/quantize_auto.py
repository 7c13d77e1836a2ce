"""quantize-auto: everything in int8 but the few modules that cost the most accuracy a byte, found by quantizing each alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration, modules, scoring
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.tasks.rows import TaskInfo

if TYPE_CHECKING:
    import onnx

_SMALLEST = 1e-12


class QuantizeAuto(Stage):
    """Quantize with ``quantizer``, and leave as few modules in float32 as keep the selection score within ``max_drop_pp`` of the parent's.

    First each module with weights is quantized alone: how far the answers move is its sensitivity. Then everything is quantized; while the score
    has fallen too far, modules stay in float32, those first that are the most sensitive for the bytes that they cost there: one, two, four, …, then by halving. At
    last each of these, the largest first, is quantized after all where the score allows it. The record keeps sensitivities and trials.
    Source: sensitivity analysis by one module at a time, Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.7.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx",)
    gives: ClassVar[State] = "onnx-int"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    uses_data: ClassVar[bool] = True

    kind: Literal["quantize-auto"] = "quantize-auto"
    quantizer: Annotated[QuantizeDynamic | QuantizeStatic, Field(discriminator="kind")] = Field(
        default_factory=QuantizeDynamic, description="The stage that quantizes, with its settings"
    )
    max_drop_pp: float = Field(0.5, ge=0, description="Most points that the score on the selection split may lie below the parent's")
    sensitivity: Literal["divergence", "metric"] = Field(
        "divergence",
        description="Of a module quantized alone: how far the answers to `samples` training rows move, or how far the selection score falls",
    )
    samples: int = Field(128, ge=1, description="Training rows for the divergence")

    def parts(self) -> tuple[Stage, ...]:
        """The quantizer."""
        return (self.quantizer,)

    def machine_bound(self) -> bool:
        """As the quantizer."""
        return self.quantizer.machine_bound()

    def timed(self) -> bool:
        """True: scores depend on the batch of the measured call, which joins the key."""
        return True

    def refuses(self, backend: str) -> str | None:
        """As the quantizer."""
        return self.quantizer.refuses(backend)

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; counts its integer weights. Raises StageError where no module can be quantized within ``max_drop_pp``."""
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            bench = _Bench(self.quantizer, self.samples, parent, Path(scratch), context)
            found = self._sensitivities(bench)
            trials: list[dict[str, Any]] = []
            floats = self._fewest(bench, found, trials)
            changed = bench.quantize(floats, Path(scratch) / "chosen")
            shutil.copytree(Path(scratch) / "chosen", out, dirs_exist_ok=True)
        table = [{"module": one.module, "sensitivity": one.value, "float_bytes": one.bytes, "float": one.module in floats} for one in found]
        details = {
            "selection_before": bench.before,
            "selection_after": next(trial["selection"] for trial in reversed(trials) if set(trial["float"]) == set(floats)),
            "sensitivity_of": self.sensitivity,
            "sensitivities": table,
            "trials": trials,
        }
        return Changed(changed.count, changed.what, {**changed.details, **details})

    def _sensitivities(self, bench: _Bench) -> list[_Sensitivity]:
        """Of each module, the most sensitive first."""
        found = []
        for i, (name, size) in enumerate(bench.modules.items()):
            bench.context.progress(i, len(bench.modules), f"{name} alone")
            others = tuple(other for other in bench.modules if other != name)
            value = bench.divergence(others) if self.sensitivity == "divergence" else bench.before - bench.score(others)
            found.append(_Sensitivity(name, value, size))
        return sorted(found, key=lambda one: (-one.value, one.module))

    def _fewest(self, bench: _Bench, found: Sequence[_Sensitivity], trials: list[dict[str, Any]]) -> tuple[str, ...]:
        """The modules that stay in float32; each set of them that was scored is added to ``trials``."""
        order = [one.module for one in sorted(found, key=lambda one: (-one.value / one.bytes, one.module))]

        def holds(floats: Sequence[str]) -> bool:
            bench.context.progress(0, 1, f"{len(floats)} modules in float32")
            score = bench.score(floats)
            held = bench.before - score <= self.max_drop_pp / 100
            trials.append({"float": list(floats), "selection": score, "holds": held})
            return held

        few, many = -1, 0  # the first ``few`` in order are too few
        while many < len(order) and not holds(order[:many]):
            few, many = many, max(1, 2 * many)
        if many >= len(order):
            many = len(order)  # all: nothing would be quantized
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if holds(order[:middle]) else (middle, many)
        if many == len(order):
            best = max(trials, key=lambda trial: float(trial["selection"]))
            raise StageError(
                f"{self.name}: the selection score is {bench.before:.4f} in float32; the best quantized model has {best['selection']:.4f}"
                f" with {len(best['float'])} of {len(order)} modules in float32, more than {self.max_drop_pp} points below",
                remedy="raise max_drop_pp, or train beside the quantizer (train-quantized)",
            )
        floats = order[:many]
        for name in sorted(floats[:-1], key=lambda name: -bench.modules[name]):  # without the last it was tried
            fewer = [other for other in floats if other != name]
            floats = fewer if holds(fewer) else floats
        return tuple(floats)


@dataclass(frozen=True)
class _Sensitivity:
    """How much a module quantized alone moves the answers, and the bytes that its weights take in float32."""

    module: str
    value: float
    bytes: int


class _Bench:
    """Quantizes the parent with some modules left in float32, and asks what comes of it."""

    def __init__(
        self, quantizer: QuantizeDynamic | QuantizeStatic, samples: int, parent: Artifact, scratch: Path, context: Context
    ) -> None:
        self._quantizer, self._parent, self._scratch, self.context = quantizer, parent, scratch, context
        self.modules = _sizes(graph.load(parent.onnx), quantizer.op_types)
        self._rows = list(calibration.feeds(parent.onnx, context, samples, batch=1, one_length=False))
        self._exact = calibration.logits(parent.onnx, self._rows, context.threads)
        self.before = scoring.selection_score(parent.path, context)

    def quantize(self, floats: Sequence[str], folder: Path) -> Changed:
        """Write the parent with all modules quantized but those into the new ``folder``."""
        folder.mkdir()
        stage = self._quantizer.model_copy(update={"exclude": tuple(floats) or None})
        return stage.run(self._parent, None, folder, self.context)

    def divergence(self, floats: Sequence[str]) -> float:
        """How far the answers to training rows lie from the parent's."""
        with self._made(floats) as folder:
            moved = calibration.logits(folder / MODEL_FILE, self._rows, self.context.threads)
        return divergence(self.context.task, np.concatenate(self._exact), np.concatenate(moved))

    def score(self, floats: Sequence[str]) -> float:
        """The primary metric on the selection rows."""
        with self._made(floats) as folder:
            return scoring.selection_score(folder, self.context)

    @contextmanager
    def _made(self, floats: Sequence[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            self.quantize(floats, Path(scratch) / "model")
            yield Path(scratch) / "model"


def divergence(task: TaskInfo, exact: NDArray[np.float32], moved: NDArray[np.float32]) -> float:
    """How far ``moved[rows, outputs]`` lies from ``exact``, the mean over rows.

    Of classes the Kullback-Leibler divergence of their probabilities, of vectors 1 - cosine, of scores the squared difference by the variance of ``exact``.
    """
    a, b = exact.astype(np.float64), moved.astype(np.float64)
    if task.embeds:
        return float(np.mean(1 - (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), _SMALLEST)))
    if not task.labels:
        return float(np.mean((a - b) ** 2) / max(float(a.var()), _SMALLEST))
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (a, b))
    return float(np.mean((np.exp(p) * (p - q)).sum(1)))


def _sizes(model: onnx.ModelProto, op_types: Sequence[str]) -> dict[str, int]:
    """Module path → bytes of its float32 weights that an operator of ``op_types`` reads."""
    held = {tensor.name: int(np.prod(tensor.dims)) * 4 for inner in graph.graphs(model.graph) for tensor in inner.initializer}
    found = {}
    for path, nodes in modules.weighted(model).items():
        size = sum(held[name] for name in {modules.weight_of(node) for node in nodes if node.op_type in op_types})
        if size:
            found[path] = size
    return found
