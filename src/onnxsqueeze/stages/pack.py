"""pack: weights in as few bits as standard operators can undo; a session folds these into constants when it is made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from onnxsqueeze import graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration

_DENSE_FOLDER = "dense"


class Pack(Stage):
    """Write every weight that gets smaller in few bits, lossless: `onnxsqueeze.packing.coding` has the ways, the fewest counted bytes choose.

    The file rebuilds them by operators of opset 18, which ONNX Runtime folds when it opens a session: that takes longer (two thirds of a second for
    MiniLM); a call then runs the same operators and gives the same bits. A runtime that does not fold rebuilds them in every call: ``dense: true``
    writes the same weights unpacked beside it. The last stage of a target.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int", "onnx-fp16")
    gives: ClassVar[State] = "onnx-packed"
    version: ClassVar[int] = (
        5  # 2: other operators, which open in a third of the time; 3: least_saving for each stream; 4: rows of up to 256 levels; 5: less is enough for few values
    )
    tools: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    uses_data: ClassVar[bool] = True  # for the comparison

    kind: Literal["pack"] = "pack"
    least_saving: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Values that codes would make smaller by this share of their bytes or less are stored as they are: codes take time to undo. Less is enough for the few beside many zeros. 0: the smallest file",
    )
    dense: bool = Field(
        default=False, description=f"Write {_DENSE_FOLDER}/model.onnx, too: the same weights unpacked, for runtimes that do not fold"
    )

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; counts the weights that were looked at. The parent's own graph where none gets smaller, which the details say.

        Raises StageError where the opset is too old, and where a session gives other bits.
        """
        from onnxsqueeze.packing import coding, files

        model = graph.load(parent.onnx)
        opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
        if opset < files.OPSET:
            raise StageError(
                f"{self.name}: the file has opset {opset}, packed weights need {files.OPSET}",
                remedy=f"set `opset: {files.OPSET}` in export",
            )
        dense_bytes = _bytes(parent.onnx)
        found = files.pack(model, self.least_saving)
        written = graph.save(model, out)
        if _bytes(written) >= dense_bytes:
            found, written = {}, graph.save(graph.load(parent.onnx), out)
        batches = calibration.shapes(parent.path, context)
        before, after = (calibration.logits(file, batches, context.threads) for file in (parent.onnx, written))
        if any(a.tobytes() != b.tobytes() for a, b in zip(before, after, strict=True)):
            raise StageError(f"{self.name}: the packed file gives other bits than its parent", remedy="report this as a bug")
        copy_side_files(parent.path, out)
        if self.dense:
            (out / _DENSE_FOLDER).mkdir()
            graph.save(graph.load(parent.onnx), out / _DENSE_FOLDER)
        ways = Counter({coding.Flat: "stream", coding.Steps: "steps", coding.Levels: "levels"}[type(one)] for one in found.values())
        details = {
            "packed": len(found),
            "dense_bytes": dense_bytes,
            "packed_bytes": _bytes(written),
            "ways": dict(ways),
        }
        looked_at = sum(len(one.initializer) for one in graph.graphs(graph.load(parent.onnx).graph))
        return Changed(looked_at, "weights looked at", details)


def _bytes(file: Path) -> int:
    """Of an .onnx file, with its external data."""
    return sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*"))
