"""The tokenizer inside the graph: text in, the model's own outputs out. The operators are onnxruntime-extensions'."""
