"""SmoothQuant: activations with a few large channels hand a part of their size to the weights that read them, which int8 tells apart better.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnxsqueeze import graph
from onnxsqueeze.stages.calibrated import Activations

if TYPE_CHECKING:
    import onnx

_SMALLEST = 1e-5


def channels(activations: Iterable[Activations]) -> dict[str, NDArray[np.float32]]:
    """Tensor → the largest size of each of its channels, the last axis: ``[width]``."""
    found: dict[str, NDArray[np.float32]] = {}
    for values in activations:
        for name, one in values.items():
            largest = np.abs(one).reshape(-1, one.shape[-1]).max(0)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


def smooth(model: onnx.ModelProto, products: Sequence[onnx.NodeProto], largest: dict[str, NDArray[np.float32]], alpha: float) -> int:
    """Divide the input of ``products`` (MatMul and Gemm with a weight) channel by channel and multiply the weights, in place; returns how many inputs.

    Products that read the same tensor share its divided form, one Mul; what else reads it, as a residual does, reads it as it was. ``alpha``: 0 leaves activations as they
    are, 1 leaves all their differences to the weights. The model's outputs stay what they were, to float rounding.
    """
    from onnx import helper, numpy_helper

    held = {tensor.name: tensor for tensor in model.graph.initializer}
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in products:
        groups.setdefault(node.input[0], []).append(node)
    muls = {}
    for number, (name, readers) in enumerate(groups.items()):
        weights = [numpy_helper.to_array(held[node.input[1]]) for node in readers]
        turned = [_transposed(node) for node in readers]
        sizes = np.max([np.abs(w).max(0 if t else 1) for w, t in zip(weights, turned, strict=True)], axis=0)
        scale = np.maximum(largest[name], _SMALLEST) ** alpha / np.maximum(sizes, _SMALLEST) ** (1 - alpha)
        scale = np.maximum(np.where(largest[name] > 0, scale, 1), _SMALLEST).astype(np.float32)
        factor, divided = f"smooth_{number}", f"{name}_smooth"
        model.graph.initializer.append(numpy_helper.from_array(1 / scale, factor))
        muls[name] = helper.make_node("Mul", [name, factor], [divided], f"{name}_smooth")
        for node, weight, transposed in zip(readers, weights, turned, strict=True):
            own = f"{node.input[1]}_smooth_{number}"
            if own not in held:
                held[own] = numpy_helper.from_array(weight * (scale if transposed else scale[:, None]), own)
                model.graph.initializer.append(held[own])
            node.input[0], node.input[1] = divided, own
    _insert(model, muls)
    return len(muls)


def _transposed(node: onnx.NodeProto) -> bool:
    """Whether the weight lies as [outputs, inputs]."""
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _insert(model: onnx.ModelProto, muls: dict[str, onnx.NodeProto]) -> None:
    """Put each node right behind the one that makes what it reads."""
    ordered = [muls[value.name] for value in model.graph.input if value.name in muls]
    for node in model.graph.node:
        ordered.append(node)
        ordered += [muls[name] for name in node.output if name in muls]
    graph.replace(model.graph.node, ordered)
    used = {name for node in model.graph.node for name in node.input}
    graph.replace(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in used])
