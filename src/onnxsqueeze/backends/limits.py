"""What providers have no kernels for, among the operators that quantizers write: a node that falls back costs copies in both directions.

Names are as `onnxsqueeze.graph.operators` spells them. What is missing here is caught later: sessions report every node that fell back.
"""

from __future__ import annotations

# Source: onnxruntime, docs/OperatorKernels.md, CUDAExecutionProvider. It has QuantizeLinear, DequantizeLinear, MatMulNBits,
# GatherBlockQuantized and QAttention; and MatMulInteger, but of int8 by int8 alone, while activations quantized at run time are uint8.
CUDA = frozenset(
    {"DynamicQuantizeLinear", "QLinearMatMul"}
    | {
        f"com.microsoft.{name}"
        for name in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearAdd", "QEmbedLayerNormalization")
    }
)

# Source: onnx-tensorrt, docs/operators.md: integers only as QuantizeLinear and DequantizeLinear, and no operator of com.microsoft.
TENSORRT = CUDA | {"MatMulInteger", *(f"com.microsoft.{name}" for name in ("MatMulNBits", "GatherBlockQuantized", "QAttention"))}

# Measured with onnxruntime-openvino 1.24.1: MatMulNBits, MatMulInteger and DynamicQuantizeLinear run there, these fall back.
OPENVINO = frozenset({"com.microsoft.GatherBlockQuantized", "QLinearMatMul", "com.microsoft.QGemm"})

# Source: onnxruntime, docs/OperatorKernels.md, CPUExecutionProvider: few kernels take tensor(float16).
CPU_FLOAT16 = "on CPUs ONNX Runtime casts float16 to float32 and back around most operators: slower than float32; use quantize-dynamic"
