"""What a packed file costs when its session is made, and in calls afterwards: against the file it was made from, each in processes of its own.

    python benchmarks/loading.py runs/qdp-toy/int8-ort/model.onnx
    python benchmarks/loading.py --bert-base [ZEROS]

Packs FILE.onnx, or an int8 BERT-base of random weights with this share of its layers' smallest set to zero, as the stage `pack` does by default. Prints a table:
bytes, the seconds to make a session on one thread (median and range of fresh processes, in turns; the files are in the page cache), the peak memory of such a
process and p50 of a call at 128 tokens; and whether the outputs have the same bits.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from onnxsqueeze.packing import files
from onnxsqueeze.stages.pack import Pack

PROCESSES = 7
SECONDS = 4.0  # of calls

ONE = """
import json, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
start = time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
load = time.perf_counter() - start
peak = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024
ids = np.random.default_rng(0).integers(1000, 20000, (1, 128))
given = {i.name: (ids if "ids" in i.name and "type" not in i.name else np.full_like(ids, "mask" in i.name)) for i in session.get_inputs()}
given = {i.name: given[i.name].astype(np.int32 if "32" in i.type else np.int64) for i in session.get_inputs()}
times = []
end = time.perf_counter() + float(sys.argv[2])
while len(times) < 40 or time.perf_counter() < end:
    start = time.perf_counter()
    outputs = session.run(None, given)
    times.append(time.perf_counter() - start)
print(json.dumps({"load": load, "peak": peak, "p50": float(np.median(times[10:])), "outputs": outputs[0].tobytes().hex()}))
"""


def int8(model: Any, folder: Path, zeros: float) -> Path:
    """The .onnx of a classifier of transformers in int8, with this share of the smallest weights 0 in each matrix of the layers.

    By the exporter of optimum and ONNX Runtime's dynamic quantization, one scale per output channel.
    """
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from optimum.exporters.onnx import onnx_export_from_model

    for weight in (weight for name, weight in model.named_parameters() if ".layer." in name and weight.ndim == 2):
        least = weight.detach().abs().flatten().kthvalue(max(1, int(zeros * weight.numel()))).values
        weight.data[weight.abs() <= least] = 0
    onnx_export_from_model(model, folder, task="text-classification", opset=18)
    quant_pre_process(str(folder / "model.onnx"), str(folder / "inferred.onnx"), skip_symbolic_shape=True)
    quantize_dynamic(folder / "inferred.onnx", folder / "int8.onnx", per_channel=True)
    return folder / "int8.onnx"


def bert_base(folder: Path, zeros: float) -> Path:
    """Of random weights."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    return int8(AutoModelForSequenceClassification.from_config(BertConfig()).eval(), folder, zeros)  # type: ignore[no-untyped-call]


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as place:
        asked, *zeros = sys.argv[1:]
        dense = bert_base(Path(place), float(zeros[0]) if zeros else 0.0) if asked == "--bert-base" else Path(asked)
        packed = Path(place) / "packed.onnx"
        model = onnx.load(dense)
        files.pack(model, Pack().least_saving)
        packed.write_bytes(model.SerializeToString())
        runs: dict[Path, list[dict[str, float]]] = {dense: [], packed: []}
        for _ in range(PROCESSES):
            for file, found in runs.items():
                words = [sys.executable, "-c", ONE, file, SECONDS]
                found.append(json.loads(subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout))
        print("| file | MB | load, s (range) | peak memory, MB | p50, ms (range) |\n| --- | --- | --- | --- | --- |")
        for name, file in (("dense", dense), ("packed", packed)):
            load, peak, p50 = ([run[key] for run in runs[file]] for key in ("load", "peak", "p50"))
            size, times = file.stat().st_size / 1e6, [1000 * one for one in p50]
            print(
                f"| {name} | {size:.2f} | {statistics.median(load):.2f} ({min(load):.2f} to {max(load):.2f}) | {max(peak):.0f}"
                f" | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) |"
            )
        ratios = [b["p50"] / a["p50"] for a, b in zip(runs[dense], runs[packed], strict=True)]
        same = len({run["outputs"] for found in runs.values() for run in found}) == 1
        print(
            f"\npacked ÷ dense, p50: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); {'the same' if same else 'OTHER'} bits"
        )


if __name__ == "__main__":
    main()
