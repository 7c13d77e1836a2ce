"""Writes a PyTorch checkpoint as an .onnx file and proves on real rows that both say the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint, exporting
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Export(Stage):
    """Write the checkpoint as ONNX: inputs int64 ``[batch_size, sequence_length]``, logits float32, both axes dynamic.

    By optimum's TorchScript route, because ONNX Runtime's fusions find nothing in the graphs of `torch.onnx`'s dynamo route.
    The file is compared with PyTorch on training rows at three shapes; the tolerance is the noise of float32, measured as
    PyTorch's own distance from float64. Source: optimum.exporters.onnx.export.
    """

    takes: ClassVar[tuple[State, ...]] = ("checkpoint",)
    gives: ClassVar[State] = "onnx"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "optimum", "optimum-onnx", "onnx")
    uses_data: ClassVar[bool] = True  # for the comparison, which is part of the record

    kind: Literal["export"] = "export"
    opset: int = Field(18, ge=14, le=20, description="ONNX operator set; below 17 a layer norm is many nodes")

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx`` and the tokenizer; raises StageError where it does not agree with PyTorch."""
        with captured():
            model, _ = checkpoint.load(parent.path, context.task)
            with tempfile.TemporaryDirectory(dir=out) as scratch:
                rough = Path(scratch) / MODEL_FILE
                exporting.write(model, rough, self.opset)
                written = graph.save(graph.load(rough), out)
        copy_side_files(parent.path, out)
        found = graph.operators(written)
        details = {"opset": self.opset, "operators": found, **_compare(model, written, context)}
        return Changed(sum(found.values()), "nodes", details)


def _compare(model: Any, written: Path, context: Context) -> dict[str, Any]:
    batches = calibration.shapes(written.parent, context)
    names = list(calibration.input_types(written))
    got = calibration.logits(written, batches, context.threads)
    single = [_torch_logits(model, batch, names) for batch in batches]
    model.double()
    exact = [_torch_logits(model, batch, names) for batch in batches]
    off, tolerance = calibration.furthest(got, exact), calibration.noise_tolerance(exact, single)
    if not off <= tolerance:  # "not": NaN fails too
        raise StageError(
            f"the exported model's logits are {off:.3g} from PyTorch's in float64, more than float32 noise explains ({tolerance:.3g})",
            remedy="export with another opset, or report the architecture: its tracing loses something",
        )
    shapes = [list(batch["input_ids"].shape) for batch in batches]
    return {"compared_shapes": shapes, "max_abs_diff": calibration.furthest(got, single), "tolerance": tolerance}


def _torch_logits(model: Any, batch: dict[str, NDArray[np.int64]], names: list[str]) -> NDArray[np.float64]:
    import torch

    from onnxsqueeze.nn import exits

    inputs = {name: torch.from_numpy(batch[name]) for name in names}
    with torch.inference_mode():
        found = exits.every(model, inputs) if exits.after(model) else (model(**inputs).logits,)
    result: NDArray[np.float64] = torch.cat(found, 1).double().numpy()
    return result
