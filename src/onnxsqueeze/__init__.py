"""onnxsqueeze: one recipe in; per backend the smallest and fastest .onnx that still does the job, and the evidence, out."""

__version__ = "0.1.0"
