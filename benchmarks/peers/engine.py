"""One engine with one model in a process of its own, timed on request. Needs numpy and the engine, nothing of ours.

    python engine.py {onnxruntime|openvino|ctranslate2} MODEL THREADS

Reads one JSON object a line, answers one a line: {"shape": [batch, tokens]} → {"ready": seconds, "version": …, "logits": […]};
{"runs": n, "seconds": s} → {"ms": [one time a run]}: at least n runs that take at least s seconds, after one that is not counted.
Ends with its input. Ids are random (seed 0) with a full attention mask, the same for every engine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Run = Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]


def onnxruntime(model: str, threads: int) -> tuple[str, Run]:
    """A stock session: default options, `threads` threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle while another engine is timed
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return f"onnxruntime {ort.__version__}", lambda feed: session.run(None, {name: feed[name] for name in names})[0]


def openvino(model: str, threads: int) -> tuple[str, Run]:
    """A compiled model for latency, in float32 precision where it is not quantized: bf16 would not be the same weights."""
    import openvino as ov

    core = ov.Core()
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    request = compiled.create_infer_request()
    names = [given.get_any_name() for given in compiled.inputs]

    def run(feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        request.infer({name: feed[name] for name in names}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    return f"openvino {ov.__version__}", run


def ctranslate2(model: str, threads: int) -> tuple[str, Run]:
    """The encoder in int8 with CTranslate2's own pooling; the classifier's two small products are left to numpy, unmeasured weights of `head.npz`."""
    import ctranslate2 as ct

    encoder = ct.Encoder(model, device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1)
    head = np.load(f"{model}/head.npz")

    def run(feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        output = encoder.forward_batch(feed["input_ids"].tolist())
        pooled = np.tanh(np.array(output.last_hidden_state)[:, 0] @ head["pooler_weight"].T + head["pooler_bias"])
        logits: NDArray[np.float32] = pooled @ head["weight"].T + head["bias"]
        return logits

    return f"ctranslate2 {ct.__version__}", run


def main() -> None:
    """Serve one model."""
    engine, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    began = time.perf_counter()
    version, run = {"onnxruntime": onnxruntime, "openvino": openvino, "ctranslate2": ctranslate2}[engine](model, threads)
    ready = time.perf_counter() - began
    feed: dict[str, NDArray[np.int64]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "shape" in asked:
            ids = np.random.default_rng(0).integers(1000, 30000, size=asked["shape"])
            feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            answer: dict[str, Any] = {"ready": ready, "version": version, "logits": run(feed).tolist()}
        else:
            run(feed)
            times: list[float] = []
            end = time.perf_counter() + asked["seconds"]
            while len(times) < asked["runs"] or time.perf_counter() < end:
                start = time.perf_counter()
                run(feed)
                times.append((time.perf_counter() - start) * 1e3)
            answer = {"ms": times}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
