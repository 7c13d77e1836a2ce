"""train-quantized: trains on with numbers rounded as the int8 file will round them (quantization-aware training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context, Stage
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.int8 import ReduceRange, depends_on_machine, seven_bits
from onnxsqueeze.tasks.rows import SplitRows

_SEEN = {
    "exclude": None,
    "format": "qdq",
    "calibration": "minmax",
    "smooth": None,
    "activation_type": "uint8",
    "symmetric": False,
}  # of the quantizer
_STEPS_PER_RANGES = 50  # static: after so many steps ranges are measured again, for less than a twentieth of the time


class TrainQuantized(StatesTaughtSettings):
    """Trains all weights under fake quantization, beside the teacher; gives a checkpoint in float.

    Behind it stand export and the quantizer that it was trained for, with the same settings: `quantize-dynamic`, where activations get the range that
    each row has when it comes alone (the file is meant for one row a call), or with ``activations: static`` `quantize-static`, where ranges are fixed:
    they are measured on the rows that the quantizer takes, anew during training and before each epoch is scored. Source: `onnxsqueeze.nn.fake`.
    """

    kind: Literal["train-quantized"] = "train-quantized"
    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="Which quantizer stands behind it: quantize-dynamic or quantize-static"
    )
    per_channel: bool = Field(default=True, description="As in the quantizer: one scale per output of a weight matrix, else one per matrix")
    reduce_range: ReduceRange = Field("auto", description="As in the quantizer")
    samples: int = Field(128, ge=1, description="With static activations: training rows to measure ranges on, as in quantize-static")

    def machine_bound(self) -> bool:
        """True where it is trained in bf16, or "auto" chose 7 bits for this CPU."""
        return super().machine_bound() or depends_on_machine(self.reduce_range)

    def reads(self, train: SplitRows, seed: int) -> SplitRows:  # noqa: ARG002, the contract's arguments
        """All: ranges are measured on rows among all, as quantize-static does; `run` draws ``train_rows``."""
        return train

    def clashes(self, behind: Sequence[Stage]) -> str | None:
        """Where the first quantizer behind it rounds otherwise than training did."""
        quantizer = next((stage for stage in behind if stage.kind.startswith("quantize-")), None)
        if quantizer is None:
            return None
        if quantizer.kind != f"quantize-{self.activations}":
            return f"activations: {self.activations} trains for quantize-{self.activations}, but behind it stands {quantizer.kind}"
        for name in ("per_channel", "reduce_range", "samples"):
            own, its = getattr(self, name), getattr(quantizer, name, None)
            if its is not None and its != own:
                return f"{name} is {own} here and {its} in {quantizer.name!r} behind it; training must see the grid of the file"
        changed = next((name for name, usual in _SEEN.items() if getattr(quantizer, name, usual) != usual), None)
        if changed:
            return f"{quantizer.name!r} behind it has {changed}: {getattr(quantizer, changed)}, which training does not know; leave it out there"
        return None

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the epoch that scores best when it is rounded; counts the tensors that differ from the parent's."""
        from onnxsqueeze.nn import checkpoint, distillation
        from onnxsqueeze.nn.fake import FakeQuantized

        model, family = checkpoint.load(parent.path, context.task)
        rows = [{name: batch[name] for name in family.inputs()} for batch in calibration.padded_rows(parent.path, context, self.samples)]
        seven = seven_bits(self.reduce_range)
        lessons = distillation.Distillation(
            self, model, family, replace(context, train=super().reads(context.train, context.seed)), parent, teacher
        )
        in_float = lessons.score()
        with FakeQuantized(model, per_channel=self.per_channel, bits=7 if seven else 8, static=self.activations == "static") as fake:

            def measure_ranges(steps: int = 0) -> None:
                if fake.ranges is not None and steps % _STEPS_PER_RANGES == 0:
                    fake.measure(rows)

            def score() -> float | None:
                measure_ranges()
                return lessons.score()

            untrained = score()
            outcome = lessons.train(companion=fake.ranges, after_step=measure_ranges, scored=score)
        checkpoint.save(model, parent.path, out, context.task)
        details = {
            **outcome.details(),
            "score_in_float_before": in_float,
            "score_rounded_before": untrained,
            "seven_bits": seven,
            "with_teacher": lessons.taught,
        }
        return Changed(checkpoint.changed_tensors(parent.path, out), "tensors", details)
