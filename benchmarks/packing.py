"""How near `pack`'s codes come to the entropy: MiniLM's layer weights, pruned by magnitude without training and rounded to int8, at several sparsities.

    python benchmarks/packing.py runs/qdp-toy/fp32/model.onnx

Reads a float32 .onnx as `export` writes it. Prints a table: bits a weight by the order-0 entropy of each matrix's integers, by
the packed file that holds these matrices alone, with all operators, tables and names, as small as it gets and by the stage's default; against zstd -19, too, where there is such a program.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxsqueeze.packing import files
from onnxsqueeze.stages.pack import Pack

Matrix = NDArray[Any]


def matrices(file: Path) -> list[Matrix]:
    """The layers' weights ``[in, out]`` of an exported encoder, in the graph's order."""
    model = onnx.load(file)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [name for node in model.graph.node if node.op_type == "MatMul" for name in node.input if name in held]
    return [held[name] for name in dict.fromkeys(names)]


def rounded(weight: Matrix, zeros: float, *, per_channel: bool) -> Matrix:
    """``weight`` with its smallest values set to zero, on a symmetric int8 grid."""
    kept = np.where(np.abs(weight) <= np.quantile(np.abs(weight), zeros), 0, weight) if zeros else weight
    scale = (np.abs(kept).max(axis=0, keepdims=True) if per_channel else np.abs(kept).max()) / 127
    codes: Matrix = np.round(kept / np.where(scale > 0, scale, 1)).astype(np.int8)
    return codes


def entropy_bits(codes: Matrix) -> float:
    """Of all values of a matrix, order 0."""
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-codes.size * (share * np.log2(share)).sum())


def zstd_bits(codes: list[Matrix]) -> float | None:
    """Of all matrices, one after the other, by zstd -19; None where there is no such program."""
    if shutil.which("zstd") is None:
        return None
    whole = b"".join(one.tobytes() for one in codes)
    return 8.0 * len(subprocess.run(["zstd", "-19", "-c"], input=whole, capture_output=True, check=True).stdout)


def file_bits(codes: list[Matrix], least_saving: float) -> float:
    """Of the packed model that holds these matrices and nothing else."""
    held = [numpy_helper.from_array(one, f"w{i}") for i, one in enumerate(codes)]
    outputs = [onnx.ValueInfoProto(name=tensor.name) for tensor in held]
    graph = helper.make_graph([], "weights", [], outputs, initializer=held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", files.OPSET)])
    files.pack(model, least_saving)
    return 8.0 * len(model.SerializeToString())


def main() -> None:
    """Print the table."""
    weights = matrices(Path(sys.argv[1]))
    n = sum(weight.size for weight in weights)
    savings = (0.0, Pack().least_saving)
    columns = ["scales", "zeros", "entropy, bits a weight"]
    for saving in savings:
        columns += [f"least_saving {saving:g}: bits a weight", "÷ entropy", "÷ zstd -19"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for per_channel in (True, False):
        for zeros in (0.0, 0.5, 0.8, 0.9):
            codes = [rounded(weight, zeros, per_channel=per_channel) for weight in weights]
            bound, other = sum(map(entropy_bits, codes)), zstd_bits(codes)
            cells = ["per channel" if per_channel else "per tensor", f"{zeros:.0%}", f"{bound / n:.2f}"]
            for saving in savings:
                whole = file_bits(codes, saving)
                cells += [f"{whole / n:.2f}", f"{whole / bound:.3f}", f"{whole / other:.3f}" if other else "no zstd here"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
