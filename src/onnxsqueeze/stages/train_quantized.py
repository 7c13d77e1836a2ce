"""train-quantized: trains on with numbers rounded as the int8 file will round them (quantization-aware training)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context
from onnxsqueeze.stages.int8 import ReduceRange, depends_on_machine, seven_bits


class TrainQuantized(StatesTaughtSettings):
    """Trains all weights under fake quantization for `quantize-dynamic`, beside the teacher; gives a checkpoint in float.

    The stages behind it must be export and quantize-dynamic with the same ``per_channel`` and ``reduce_range``, or training saw another grid.
    Activations get the range that each row has when it comes alone: the file is meant for one row a call. Source: `onnxsqueeze.nn.fake`.
    """

    kind: Literal["train-quantized"] = "train-quantized"
    per_channel: bool = Field(
        default=True, description="As in quantize-dynamic: one scale per output of a weight matrix, else one per matrix"
    )
    reduce_range: ReduceRange = Field("auto", description="As in quantize-dynamic")

    def machine_bound(self) -> bool:
        """True where it is trained in bf16, or "auto" chose 7 bits for this CPU."""
        return super().machine_bound() or depends_on_machine(self.reduce_range)

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the epoch that scores best when it is rounded; counts the tensors that differ from the parent's."""
        from onnxsqueeze.nn import checkpoint, distillation
        from onnxsqueeze.nn.fake import FakeQuantized

        model, family = checkpoint.load(parent.path, context.task)
        seven = seven_bits(self.reduce_range)
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)
        in_float = lessons.score()
        with FakeQuantized(model, per_channel=self.per_channel, bits=7 if seven else 8):
            untrained = lessons.score()
            outcome = lessons.train()
        checkpoint.save(model, parent.path, out, context.task)
        details = {
            **outcome.details(),
            "score_in_float_before": in_float,
            "score_rounded_before": untrained,
            "seven_bits": seven,
            "with_teacher": lessons.taught,
        }
        return Changed(checkpoint.changed_tensors(parent.path, out), "tensors", details)
