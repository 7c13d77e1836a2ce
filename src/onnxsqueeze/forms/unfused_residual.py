"""unfused-residual: the sum in front of a layer norm is written as Sum, which no session fuses into SkipLayerNormalization.

On CPUs that fused operator can cost more than its two parts: `onnxsqueeze.stages.optimize_graph` with ``tune`` tells where.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxsqueeze.forms import edit


def apply(model: ir.Model) -> int:
    """Write each Add that feeds a LayerNormalization as Sum; how many."""
    done = 0
    for node in list(model.graph):
        add = edit.producer(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if add is not None:
            edit.replace(add.outputs[0], edit.insert_after(add, "Sum", list(add.inputs), f"{add.name}/Sum", like=add.outputs[0]))
            done += 1
    edit.tidy(model)
    return done
