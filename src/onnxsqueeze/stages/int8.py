"""What the int8 stages share: which operators hold weights, when weights must keep to 7 bits, and the count of what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from onnxsqueeze import environment, weights
from onnxsqueeze.errors import StageError
from onnxsqueeze.stage import Changed, Stage

OpType = Literal["MatMul", "Gemm", "Gather"]
ReduceRange = Literal["auto"] | bool
EXCLUDE = "Modules left in float: globs on their paths in PyTorch, such as `bert.encoder.layer.5.*`, `*.output.dense` or `classifier`"

# x86 without VNNI: vpmaddubsw adds two uint8·int8 products in 16 bits and saturates there.
# Source: onnxruntime's quantization documentation, "reduce_range".
_SATURATING = ("avx512", "avx2", "avx", "sse")


def seven_bits(setting: ReduceRange) -> bool:
    """Whether weights are quantized to 7 bits: as set, or for "auto" by this machine's instruction set."""
    return (
        environment.instruction_set().startswith(_SATURATING) and "vnni" not in environment.instruction_set()
        if setting == "auto"
        else setting
    )


def depends_on_machine(setting: ReduceRange) -> bool:
    """True where "auto" made 7 bits of it. With VNNI "auto" gives the same bytes as False, so nothing of the machine is in them."""
    return setting == "auto" and seven_bits(setting)


def count(stage: Stage, op_types: tuple[OpType, ...], parent: Path, written: Path, details: dict[str, Any]) -> Changed:
    """The integer weights of the written file, per operator, and how many matrices stayed in float.

    Raises StageError where there is none, or where the recipe names an operator none of whose weights were quantized, and excludes no modules.
    """
    quantized = weights.integers(written)
    before = weights.floats(parent)
    after = {name for names in weights.floats(written).values() for name in names}
    named = op_types if "op_types" in stage.model_fields_set and not getattr(stage, "exclude", None) else ()
    idle = [op for op in named if before.get(op, set()) <= after]
    if idle or not quantized:
        raise StageError(
            f"{stage.name}: no weight of {', '.join(idle or op_types)} was quantized",
            remedy=f"name operators that hold float weights in this model: {', '.join(sorted(before)) or 'there are none left'}",
        )
    return Changed(sum(quantized.values()), "weights", {"integer_weights": quantized, "float_matrices_left": len(after), **details})
