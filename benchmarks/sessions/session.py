"""One .onnx in one session of this Python's onnxruntime: how long it takes to open and to call. Needs numpy and onnxruntime, nothing of ours.

    python session.py FILE.onnx PROVIDER {all|none} SECONDS [profile]

The session has one thread and all graph optimizations, or none. Prints one JSON object: version, load_s, p50_ms and n of calls at 1 × 128 tokens for at least so many seconds, peak_bytes of
the process (VmHWM), outputs as hex. With ``profile`` also the nodes that one call runs, per operator. Ids are the same everywhere, see `ids`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

TOKENS, WARMUP, LEAST = 128, 3, 15


def ids() -> NDArray[np.int64]:
    """``[1, 128]``, for any vocabulary of 20,000 words or more."""
    return (np.arange(TOKENS)[None] * 7919 % 19_000 + 1_000).astype(np.int64)


def feed(session: Any) -> dict[str, NDArray[Any]]:
    """By input; all tokens are read and are of the first text."""
    given = {"input_ids": ids(), "attention_mask": np.ones_like(ids()), "token_type_ids": np.zeros_like(ids())}
    return {one.name: given[one.name].astype(np.int32 if "32" in one.type else np.int64) for one in session.get_inputs()}


def main() -> None:
    """Open, call, print."""
    file, provider, optimizations, seconds, *profile = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimizations == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    place = tempfile.TemporaryDirectory()
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(place.name) / "profile")
    if provider not in ort.get_available_providers():
        raise SystemExit(f"no {provider} in this onnxruntime {ort.__version__}")
    threads = {"num_of_threads": "1"} if provider == "OpenVINOExecutionProvider" else {}
    start = time.perf_counter()
    session = ort.InferenceSession(file, options, providers=[(provider, threads)])
    found: dict[str, Any] = {"version": ort.__version__, "load_s": time.perf_counter() - start}
    if session.get_providers()[0] != provider:
        raise SystemExit(f"{provider} does not start: the session has {', '.join(session.get_providers())}")
    given = feed(session)
    if profile:
        session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
        found["nodes"] = Counter(event["args"]["op_name"] for event in nodes)
    else:
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while len(times) < WARMUP + LEAST or time.perf_counter() < end:
            start = time.perf_counter()
            outputs = session.run(None, given)
            times.append(time.perf_counter() - start)
        found |= {"p50_ms": 1000 * float(np.median(times[WARMUP:])), "n": len(times) - WARMUP, "outputs": outputs[0].tobytes().hex()}
    status = Path("/proc/self/status").read_text()
    found["peak_bytes"] = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps(found))
    sys.stdout.flush()
    place.cleanup()
    os._exit(0)  # some providers' threads crash when an interpreter ends; what was measured is written


if __name__ == "__main__":
    main()
