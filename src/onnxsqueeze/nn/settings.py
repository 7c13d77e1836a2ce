"""The settings that every stage which trains has in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from onnxsqueeze.nn.precision import Precision, machine_bound
from onnxsqueeze.stage import Stage, State


class TrainingSettings(Stage):
    """AdamW with linear warm-up and linear decay over length-bucketed batches.

    Source: warm-up, decay, weight decay and clipping as in Devlin et al. 2019, appendix A.2 and their code.
    """

    takes: ClassVar[tuple[State, ...]] = ("checkpoint",)
    gives: ClassVar[State] = "checkpoint"
    tools: ClassVar[tuple[str, ...]] = ("safetensors", "tokenizers", "torch", "transformers")
    uses_data: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True

    epochs: int = Field(3, ge=1, le=100, description="Passes over the training rows; the best one by the selection split is kept")
    learning_rate: float = Field(5e-5, gt=0, le=0.1, description="The highest one, after warm-up")
    batch_size: int = Field(32, ge=1, description="Rows a step")
    warmup: float = Field(0.1, ge=0, lt=1, description="Fraction of all steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="On matrices; never on biases and norms")
    freeze_embeddings: bool = Field(
        default=False,
        description="Leave the tables of words, positions and token types as they are: faster, and unseen words keep their place",
    )
    precision: Precision = Field("auto", description="auto: bf16 where the CPU or GPU multiplies it natively, else fp32")

    def machine_bound(self) -> bool:
        """True where the trained bytes depend on the CPU or GPU model."""
        return machine_bound(self.precision)
