"""branch-exits: one .onnx that stops at the first exit that is sure, by a threshold chosen on the selection split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import branches, graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.tokens import Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CANDIDATES = 200


class BranchExits(Stage):
    """Moves the layers behind each exit into the branch of an If that only unsure rows take; stock ONNX Runtime runs it.

    Stands last, behind the export of a model with exits and its quantization. The threshold on the largest probability is the lowest that keeps the
    selection score within ``max_drop_pp`` of the last head's; it is an initializer that is also an input, so a server may override it. Source: `onnxsqueeze.branches`.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnx-ir")
    uses_data: ClassVar[bool] = True

    embeds: ClassVar[bool] = False

    kind: Literal["branch-exits"] = "branch-exits"
    max_drop_pp: float = Field(0.5, ge=0, description="Most points of the metric on the selection split that leaving early may cost")
    threshold: float | None = Field(None, ge=0, le=1, description="Largest probability from which on a row leaves; default: chosen")

    def given(self, state: State) -> State:
        """A float graph stays one, and so does one with integers."""
        return state

    def outputs(self) -> tuple[str, ...] | None:
        """The logits alone."""
        return ("logits",)

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; counts the nodes that moved into branches.

        Raises StageError where the parent has no exits, or no threshold at which a row leaves keeps the score.
        """
        names = [name for name, (side, _) in graph.signature(parent.onnx).items() if side == "output"]
        if len(names) < 2:  # the logits and one exit
            raise StageError(f"{self.name}: the parent has no exits", remedy="put early-exit into the chain above the export")
        heads = self._heads(parent, names, context)
        threshold, proof = self._chosen(heads, context)
        model = branches.branch(graph.load(parent.onnx), names[1:], threshold, self.name)
        written = graph.save(model, out)
        copy_side_files(parent.path, out)
        before, after = (sum(graph.operators(file).values()) for file in (parent.onnx, written))
        top = len(graph.load(written).graph.node)
        details = {"threshold": threshold, "exits": names[1:], "nodes_before": before, "nodes": after, **proof}
        return Changed(after - top, "nodes in branches", details)

    def _heads(self, parent: Artifact, names: list[str], context: Context) -> list[NDArray[np.float32]]:
        """Of each exit, and of the last head at the end, the logits ``[rows, outputs]`` of the selection rows, each alone."""
        import numpy as np

        encoder = Encoder(parent.path, context.task.max_length)
        session = calibration.session(parent.onnx, context.threads)
        types = calibration.input_types(parent.onnx)
        rows = calibration.encode(encoder, context.selection.rows)
        found: list[list[Any]] = []
        for i, row in enumerate(rows):
            found.append(session.run([*names[1:], names[0]], calibration.given(types, pad([row], encoder.pad_id))))
            context.progress(i + 1, len(rows), "every exit on the selection rows")
        return [np.concatenate(head) for head in zip(*found, strict=True)]

    def _chosen(self, heads: list[NDArray[np.float32]], context: Context) -> tuple[float, dict[str, Any]]:
        import numpy as np

        whole = context.select(heads[-1])
        sure = np.stack([_largest(head) for head in heads[:-1]])
        for threshold in [self.threshold] if self.threshold is not None else _candidates(sure):
            left = _leaves(sure, threshold)
            score = context.select(np.stack(heads)[left, np.arange(len(left))])
            share = [float((left == i).mean()) for i in range(len(heads))]
            if self.threshold is not None or whole - score <= self.max_drop_pp / 100:
                return threshold, {"selection_before": whole, "selection_after": score, "share_leaving": share}
        raise StageError(
            f"{self.name}: max_drop_pp: wherever a selection row leaves, the score falls by more than {self.max_drop_pp} points from {whole:.4f}",
            remedy="train the exits longer, put them behind later layers, or raise max_drop_pp",
        )


def _largest(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    shifted = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    found: NDArray[np.float64] = (shifted / shifted.sum(axis=1, keepdims=True)).max(axis=1)
    return found


def _candidates(sure: NDArray[np.float64]) -> list[float]:
    """Thresholds from the lowest on, at each of which a row leaves; half way between two rows, so that float32 sees the same ones leave."""
    import numpy as np

    points = np.unique(sure)
    middles = (points[1:] + points[:-1]) / 2
    return [0.0, *np.unique(np.quantile(middles, np.linspace(0, 1, _CANDIDATES), method="nearest")).tolist()] if len(middles) else [0.0]


def _leaves(sure: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Of each row the first exit whose largest probability reaches ``threshold``; the last head where none does."""
    import numpy as np

    there = np.concatenate([sure >= threshold, np.ones((1, sure.shape[1]), bool)])
    first: NDArray[np.int64] = there.argmax(axis=0)
    return first
