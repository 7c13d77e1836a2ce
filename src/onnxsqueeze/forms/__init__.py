"""Graph forms: other ways to write the same model, of which a machine may run one faster.

read(model) → ir.Model  →  form.apply(model), …  →  write(model)

static-ranges reads ranges that `note_ranges` has put on the values before it; without them it finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxsqueeze.forms import (
    attention_operator,
    compact_mask,
    constant_shapes,
    first_token,
    folded_scale,
    int32_inputs,
    sequence_first,
    static_ranges,
    unfused_residual,
)
from onnxsqueeze.forms.edit import Range, note_ranges, opened, read, with_shapes, write

__all__ = ["FORMS", "Effect", "Form", "Range", "note_ranges", "opened", "read", "with_shapes", "write"]

# What a form may do to the outputs: nothing at all; another order of float additions and products; other roundings to integers;
# another choice of what is rounded to which integers; or there is nothing for it to do.
Effect = Literal["same bits", "float noise", "other rounding", "other quantization", "finds nothing"]


@dataclass(frozen=True)
class Form:
    """``apply`` changes a model in place and says how many places it changed. ``effect`` is on a float32 graph, ``quantized`` on one with integers."""

    name: str
    effect: Effect
    quantized: Effect
    apply: Callable[[ir.Model], int]


# In the order in which they are applied: later ones build on what earlier ones leave.
FORMS = (
    Form("constant-shapes", "same bits", "same bits", constant_shapes.apply),
    Form("compact-mask", "same bits", "same bits", compact_mask.apply),
    Form("folded-scale", "float noise", "float noise", folded_scale.apply),
    Form("first-token", "float noise", "other rounding", first_token.apply),
    Form("attention-operator", "float noise", "float noise", attention_operator.apply),
    Form("sequence-first", "same bits", "same bits", sequence_first.apply),
    Form("unfused-residual", "same bits", "same bits", unfused_residual.apply),
    Form("static-ranges", "finds nothing", "other quantization", static_ranges.apply),
    Form("int32-inputs", "same bits", "same bits", int32_inputs.apply),
)
