"""What a packed file costs when its session is made, and in calls afterwards: against the file it was made from, each in processes of its own.

    python benchmarks/loading.py runs/qdp-toy/int8-ort/model.onnx
    python benchmarks/loading.py --bert-base [ZEROS]

Packs FILE.onnx, or an int8 BERT-base of random weights with this share of its layers' smallest set to zero, as the stage `pack` does by default. Prints a table:
bytes, the seconds to make a session on one thread (median and range of fresh processes, in turns; the files are in the page cache) and the peak memory of such a
process; whether the outputs have the same bits; and how long a call at 128 tokens takes, packed ÷ dense: a process holds both sessions, opened in turns first, and calls them by turns; the
interval (95 %, Student's t) is over processes, since equal sessions in one process differ by where their weights lie. ``--pairs N`` says how many.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from scipy.stats import t

from onnxsqueeze.packing import files
from onnxsqueeze.stages.pack import Pack

PROCESSES, PAIRS = 7, 15
SECONDS = 8.0  # of calls in a pair

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
print(json.dumps({"load": load, "peak": peak, "outputs": session.run(None, given)[0].tobytes().hex()}))
"""

PAIR = """
import json, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
sessions = [ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in sys.argv[1:3]]
ids = np.random.default_rng(0).integers(1000, 20000, (1, 128))
given = {i.name: (ids if "ids" in i.name and "type" not in i.name else np.full_like(ids, "mask" in i.name)) for i in sessions[0].get_inputs()}
given = {i.name: given[i.name].astype(np.int32 if "32" in i.type else np.int64) for i in sessions[0].get_inputs()}
times = [[], []]
end = time.perf_counter() + float(sys.argv[3])
while time.perf_counter() < end or len(times[0]) < 60:
    for session, found in zip(sessions, times):
        start = time.perf_counter()
        session.run(None, given)
        found.append(time.perf_counter() - start)
print(json.dumps([float(np.median(found[10:])) for found in times]))
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
        words = sys.argv[1:]
        pairs = words.pop(words.index("--pairs") + 1) if "--pairs" in words else PAIRS
        asked, *zeros = [word for word in words if word != "--pairs"]
        dense = bert_base(Path(place), float(zeros[0]) if zeros else 0.0) if asked == "--bert-base" else Path(asked)
        packed = Path(place) / "packed.onnx"
        model = onnx.load(dense)
        files.pack(model, Pack().least_saving)
        packed.write_bytes(model.SerializeToString())
        runs: dict[Path, list[dict[str, float]]] = {dense: [], packed: []}
        for _ in range(PROCESSES):
            for file, found in runs.items():
                words = [sys.executable, "-c", ONE, str(file)]
                found.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        print("| file | MB | load, s (range) | peak memory, MB |\n| --- | --- | --- | --- |")
        for name, file in (("dense", dense), ("packed", packed)):
            load, peak = ([run[key] for run in runs[file]] for key in ("load", "peak"))
            size = file.stat().st_size / 1e6
            print(f"| {name} | {size:.2f} | {statistics.median(load):.2f} ({min(load):.2f} to {max(load):.2f}) | {max(peak):.0f} |")
        same = len({run["outputs"] for found in runs.values() for run in found}) == 1
        logs = [math.log(pair(dense, packed, first=i % 2)) for i in range(int(pairs))]
        half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
        mean = statistics.mean(logs)
        print(
            f"\npacked ÷ dense, p50: {math.exp(mean):.4f} ({math.exp(mean - half):.4f} to {math.exp(mean + half):.4f}); {'the same' if same else 'OTHER'} bits"
        )


def pair(dense: Path, packed: Path, *, first: int) -> float:
    """Packed ÷ dense in one process; ``first`` 1: the packed file is opened and called first."""
    order = (packed, dense) if first else (dense, packed)
    words = [sys.executable, "-c", PAIR, *map(str, order), str(SECONDS)]
    took = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return float(took[0] / took[1] if first else took[1] / took[0])


if __name__ == "__main__":
    main()
