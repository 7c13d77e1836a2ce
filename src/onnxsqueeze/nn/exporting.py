"""The one call that turns a PyTorch model into ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPSET = 18


def write(model: PreTrainedModel, target: Path, opset: int = OPSET) -> None:
    """Write ``target``; inputs int64 ``[batch_size, sequence_length]``, logits float32, both axes dynamic. Nothing is compared.

    Source: optimum.exporters.onnx.export.
    """
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    describe = TasksManager.get_exporter_config_constructor("onnx", model=model, task="text-classification", library_name="transformers")
    export(model, describe(model.config), target, opset=opset)
