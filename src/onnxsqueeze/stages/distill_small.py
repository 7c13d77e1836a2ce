"""distill-small: a student that is no transformer, a CNN or a BiLSTM on the teacher's table of words, written as .onnx at once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import TaughtSettings
from onnxsqueeze.stage import Changed, Context, State
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.chatter import captured


class DistillSmall(TaughtSettings):
    """Learns the task from the labels and the teacher's logits, best with many rows that the teacher alone labels (``texts``, ``other_words``).

    Source: Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks"; Kim 2014 (the CNN).
    """

    gives: ClassVar[State] = "onnx"
    version: ClassVar[int] = 2  # 2: copies with other words hold whole words alone
    tools: ClassVar[tuple[str, ...]] = (*TaughtSettings.tools, "onnx", "onnxruntime")
    needs_teacher: ClassVar[bool] = True

    embeds: ClassVar[bool] = False

    kind: Literal["distill-small"] = "distill-small"
    architecture: Literal["cnn", "bilstm"] = Field(
        "cnn", description="Convolutions over words, or two recurrent networks, one from each end"
    )
    rank: int = Field(64, ge=1, description="Columns of the table of words; it starts as the strongest directions of the parent's")
    width: int = Field(128, ge=1, description="Filters of each length, or hidden units of each direction")
    kernels: tuple[int, ...] = Field((2, 3, 4), min_length=1, description="Lengths of the filters in words; for the CNN")
    dropout: float = Field(0.3, ge=0, lt=1, description="Share of the features that is dropped while training")
    learning_rate: float = Field(1e-3, gt=0, le=0.1, description="The highest one, after warm-up")
    opset: int = Field(18, ge=14, le=20, description="ONNX operator set")

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write ``out/model.onnx`` of the best epoch; counts its weights.

        Raises StageError where the file does not say what PyTorch says.
        """
        import numpy as np
        import torch

        from onnxsqueeze.nn import checkpoint, distillation, small
        from onnxsqueeze.nn.family import family_of

        if teacher is None:
            raise StageError(
                f"{self.name}: has no teacher", remedy="put a finetune stage before it, or start from a model with a trained head"
            )
        task, config = context.task, checkpoint.read_config(parent.path)
        family = family_of(config["model_type"])
        table = checkpoint.vocabulary_matrix(parent.path)
        shape = small.Shape(self.architecture, min(self.rank, table.shape[1]), self.width, self.kernels, task.outputs)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            model = small.SmallStudent(shape, small.narrowed(table, shape.rank), self.dropout)
        outcome = distillation.Distillation(self, model, family, context, parent, teacher, kept=()).train()
        model.to("cpu").eval()
        kept: dict[str, Any] = {key: config[key] for key in ("pad_token_id", "max_position_embeddings") if key in config}
        described: dict[str, Any] = {
            **kept,
            "vocab_size": table.shape[0],
            "model_type": f"onnxsqueeze-{self.architecture}",
            "num_labels": task.outputs,
        }
        described |= {"id2label": dict(enumerate(task.labels or ("score",))), "shape": [shape.rank, shape.width, *shape.kernels]}
        (out / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_side_files(parent.path, out)
        ids = torch.full((2, 8), 5)
        axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "attention_mask")} | {"logits": {0: "batch_size"}}
        with captured(), tempfile.TemporaryDirectory(dir=out) as scratch:
            rough = Path(scratch) / MODEL_FILE
            torch.onnx.export(
                small.Exportable(model).eval(), (ids, torch.ones_like(ids)), str(rough), input_names=["input_ids", "attention_mask"],
                output_names=["logits"], dynamic_axes=axes, opset_version=self.opset, dynamo=False,
            )  # fmt: skip
            written = graph.save(graph.load(rough), out)
        feeds = calibration.shapes(out, context)
        with torch.inference_mode():
            said = [model(*(torch.from_numpy(feed[name]) for name in ("input_ids", "attention_mask"))).logits.numpy() for feed in feeds]
        off = calibration.furthest(calibration.logits(written, feeds, context.threads), said)
        if not off <= _NOISE * max(1.0, *(float(np.abs(logits).max()) for logits in said)):  # "not": NaN fails too
            raise StageError(f"{self.name}: the exported model's logits are {off:.3g} from PyTorch's", remedy="export with another opset")
        weights = sum(parameter.numel() for parameter in model.parameters())
        details = {**outcome.details(), "weights": weights}
        return Changed(weights, "weights", details)


_NOISE = 1e-4
