"""unfused-residual: the sum in front of a layer norm is written so that no session fuses it into SkipLayerNormalization.

On CPUs that fused operator can cost more than its two parts: `onnxsqueeze.stages.optimize_graph` with ``tune`` tells where. Where one side
is a linear layer's output, its weights change their sign and it is subtracted, which ONNX Runtime does on all threads; any other
addition becomes Sum, which it does on one.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxsqueeze.forms import edit, folded_scale


def apply(model: ir.Model) -> int:
    """Write each Add that feeds a LayerNormalization as Sub or Sum; how many. A sign costs no bit: x - (-y) is x + y."""
    done = 0
    for node in list(model.graph):
        add = edit.producer(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if add is None:
            continue
        op_type, inputs = "Sum", list(add.inputs)
        for kept, turned in (inputs, inputs[::-1]):
            if turned is not None and edit.only_reader(turned) is add and folded_scale.into_weights(model, turned, -1.0):
                op_type, inputs = "Sub", [kept, turned]
                break
        edit.replace(add.outputs[0], edit.insert_after(add, op_type, inputs, f"{add.name}/{op_type}", like=add.outputs[0]))
        done += 1
    edit.tidy(model)
    return done
