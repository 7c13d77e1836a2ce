"""The one call that turns a PyTorch model into ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPSET = 18


def write(model: PreTrainedModel, target: Path, opset: int = OPSET) -> None:
    """Write ``target``; inputs int64 ``[batch_size, sequence_length]``, logits float32, both axes dynamic. Nothing is compared.

    The logits of exit heads, where the model has some, are further outputs. Source: optimum.exporters.onnx.export; for exits torch.onnx.export, its TorchScript route.
    """
    from onnxsqueeze.nn import exits

    if exits.after(model):
        _write_exits(model, target, opset)
        return
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    describe = TasksManager.get_exporter_config_constructor("onnx", model=model, task="text-classification", library_name="transformers")
    export(model, describe(model.config), target, opset=opset)


def _write_exits(model: PreTrainedModel, target: Path, opset: int) -> None:
    import torch

    from onnxsqueeze.nn import exits
    from onnxsqueeze.nn.family import family_of

    family = family_of(model.config.model_type)
    inputs, outputs = family.inputs(), ["logits", *exits.names(model)]
    ids = torch.full((2, 16), 7)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in inputs} | {name: {0: "batch_size"} for name in outputs}
    torch.onnx.export(
        exits.Export(model, family).eval(),
        tuple(given[name] for name in inputs),
        str(target),
        input_names=list(inputs),
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )
