"""What a finished .onnx is worth: its size, its latency, its metric, each with what is needed to believe it."""
