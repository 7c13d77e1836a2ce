"""Float weights and activations to half precision: half the bytes, and the fast path of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from onnxsqueeze import backends, graph, weights
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured

# Half precision has 11 bits; a layer's errors add up to some fifty roundings of 2^-10 in the worst case. Overflow is off by far more.
_TOLERANCE = 0.05


class Float16(Stage):
    """Turn float32 into float16 inside the graph; inputs stay int64 and logits float32.

    The file is run on training rows in a CPU session, which computes half precision with casts: logits must stay where
    they were (values above 65504 are cut off or become infinite). Source: onnxruntime.transformers.float16.convert_float_to_float16.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx-fp16"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    uses_data: ClassVar[bool] = True  # for the comparison, which is part of the record

    kind: Literal["float16"] = "float16"

    def refuses(self, backend: str) -> str | None:
        """What speaks against half precision there."""
        return backends.get(backend).float16

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; raises StageError where no weight was float32 or where logits are no longer numbers."""
        with captured():
            from onnxruntime.transformers.float16 import convert_float_to_float16

            written = graph.save(convert_float_to_float16(graph.load(parent.onnx), keep_io_types=True), out)
        copy_side_files(parent.path, out)
        halves = weights.tensors_of(written, "float16") - weights.tensors_of(parent.onnx, "float16")
        if halves == 0:
            raise StageError(f"{self.name}: the model has no float32 weight", remedy="put this stage after export or quantize-weights")
        return Changed(halves, "tensors", self._compare(parent.onnx, written, context))

    def _compare(self, parent: Path, written: Path, context: Context) -> dict[str, Any]:
        import numpy as np

        batches = calibration.shapes(written.parent, context)
        exact, half = (calibration.logits(path, batches, context.threads) for path in (parent, written))
        off = max(float(np.abs(h - e).max()) for h, e in zip(half, exact, strict=True))
        limit = _TOLERANCE * max(float(np.abs(e).max()) for e in exact)
        if not off <= limit:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: logits overflow in float16: {off:.3g} from float32, at most {limit:.3g} is rounding",
                remedy="leave this target in float32, or quantize its weights alone (quantize-weights)",
            )
        return {"max_abs_diff": off, "tolerance": limit}
