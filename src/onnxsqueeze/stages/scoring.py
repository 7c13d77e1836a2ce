"""What an .onnx file scores on the selection split, as it will be served: what a stage may choose by."""

from __future__ import annotations

from pathlib import Path

from onnxsqueeze.measure.metric import predict
from onnxsqueeze.stage import Context


def selection_score(folder: Path, context: Context) -> float:
    """The primary metric of ``folder/model.onnx`` on the selection rows, on the CPU at the batch and threads of the measured call.

    Raises MeasureError where the file does not load or gives logits that are not finite.
    """
    rows = predict(folder, "cpu", context.selection, context.task.max_length, context.call.batch, context.call.threads, context.progress)
    return context.select(rows)
