"""Weights stored in few bits, and rebuilt by standard ONNX operators that a session folds into constants when it is made."""
