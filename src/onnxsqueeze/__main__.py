"""`python -m onnxsqueeze`."""

from onnxsqueeze.cli import main

main()
