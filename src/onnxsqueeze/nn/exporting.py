"""The one call that turns a PyTorch model into ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

OPSET = 18


def write(model: PreTrainedModel, target: Path, opset: int = OPSET) -> None:
    """Write ``target``; inputs int64 ``[batch_size, sequence_length]``, logits float32, both axes dynamic. Nothing is compared.

    The logits of exit heads, where the model has some, are further outputs; a model that embeds has its vectors in place of logits. Source:
    optimum.exporters.onnx.export; for exits and vectors torch.onnx.export, its TorchScript route.
    """
    from onnxsqueeze.nn import embedder, exits

    if exits.after(model):
        _trace(model, lambda inputs: exits.every(model, inputs), ["logits", *exits.names(model)], target, opset)
        return
    if isinstance(model, embedder.Embedder):
        _trace(model, lambda inputs: (model(**inputs).logits,), [embedder.OUTPUT], target, opset)
        return
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    describe = TasksManager.get_exporter_config_constructor("onnx", model=model, task="text-classification", library_name="transformers")
    export(model, describe(model.config), target, opset=opset)


def _trace(
    model: PreTrainedModel, run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], outputs: list[str], target: Path, opset: int
) -> None:
    """Write what ``run`` makes of the model's inputs."""
    import torch
    from torch import nn

    from onnxsqueeze.nn.family import family_of

    inputs = family_of(model.config.model_type).inputs()

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return run(dict(zip(inputs, given, strict=True)))

    ids = torch.full((2, 16), 7)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in inputs} | {name: {0: "batch_size"} for name in outputs}
    torch.onnx.export(
        Traced().eval(),
        tuple(given[name] for name in inputs),
        str(target),
        input_names=list(inputs),
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )
