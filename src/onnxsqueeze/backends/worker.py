"""The far side of a session: one process that runs one .onnx file, in any Python from 3.9 on that has numpy and onnxruntime.

    PYTHON worker.py  < requests  > answers

A message is a line of JSON and then the bytes of its arrays, in the order of "arrays": [[name, dtype, shape], …]. Requests, by "do":

    about                                               → python, version, wheels, providers; or missing, where something is not installed
    open    provider, threads, options, path | [model]  → load_s, inputs {name: type}, outputs, started, moved {operator: nodes}
    run     output, [feed]                              → [logits]
    hold    output, [feed]                              → nothing; the feed of later times
    time    least_runs, least_ms, uncounted             → [times_us], cpu_s
    memory                                              → before_bytes, peak_bytes: held before the load, and most since the start; or null

An answer with "error" is what ONNX Runtime said. The process ends when its standard input does, so with the one that started it.
This file imports nothing else of the package: another Python reads it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Header = dict[str, Any]
    Arrays = Mapping[str, NDArray[Any]]

CPU = "CPUExecutionProvider"
_NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")

# Distributions that all install the one Python package `onnxruntime`: two of them overwrite each other's files.
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn", "onnxruntime-rocm")
_WHEELS_BY_VENDORS = (
    "onnxruntime-migraphx",
    "onnxruntime-cann",
    "onnxruntime-vitisai",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)

# ONNX Runtime itself places the arithmetic on shapes beside the CPU, on purpose, whatever the provider (its GetCpuPreferredNodes):
# a few integers each. Such nodes are no fall-back; "session.disable_cpu_ep_fallback" would refuse every model that has them.
_SHAPE_OPERATORS = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max"}
    | {"Equal", "Not", "And", "Or", "Less", "Greater", "Where", "Range", "Expand", "Reshape", "Tile", "ConstantOfShape", "Constant"}
    | {"Identity", "ReduceProd", "ReduceMax", "ReduceMin"}
)


def send(pipe: IO[bytes], header: Header, arrays: Arrays) -> None:
    """Write one message. Raises BrokenPipeError where nobody reads any more."""
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    pipe.write(json.dumps({**header, "arrays": listed}).encode() + b"\n")
    for array in arrays.values():
        pipe.write(array.tobytes())
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[Header, Arrays] | None:
    """Read one message; None at the end of the pipe. Raises ValueError where it is not a message, EOFError where it ends within one."""
    line = pipe.readline()
    if not line:
        return None
    header = json.loads(line)
    if not isinstance(header, dict) or "arrays" not in header:
        raise ValueError("not a message")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in header.pop("arrays"):
        import numpy as np

        kind = np.dtype(dtype)
        size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
        content = pipe.read(size)
        if len(content) < size:
            raise EOFError(f"the pipe ended within the array {name}")
        arrays[name] = np.frombuffer(content, kind).reshape(shape)
    return header, arrays


class Model:
    """The open file: an ``onnxruntime.InferenceSession`` on one provider, and the call that is timed."""

    def __init__(self, header: Header, arrays: Arrays) -> None:
        import onnxruntime as ort

        self.provider = header["provider"]
        self.options = header["options"]
        if self.provider in _NVIDIA and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from their wheels: the dynamic linker does not look there
        self.before_bytes = _status_bytes("VmRSS")
        began = time.perf_counter()
        self.session = self._load(arrays["model"].tobytes() if "model" in arrays else header["path"], header["threads"])
        self.load_s = time.perf_counter() - began
        self.call: Callable[[], object] = lambda: None

    def _load(self, model: Any, threads: int) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        # Threads spin while a call runs, as in stock sessions, and stop when it has returned: while one session is timed the others idle.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.provider != CPU:
            told = "session.record_ep_graph_assignment_info" if _tells_assignment() else "session.disable_cpu_ep_fallback"
            options.add_session_config_entry(told, "1")
        return ort.InferenceSession(model, options, providers=[(self.provider, self.options)])

    def facts(self) -> Header:
        """What came of opening it."""
        return {
            "load_s": self.load_s,
            "inputs": {given.name: given.type for given in self.session.get_inputs()},
            "outputs": [given.name for given in self.session.get_outputs()],
            "started": self.session.get_providers(),
            "moved": dict(self._fallen_back()),
        }

    def _fallen_back(self) -> Counter[str]:
        """Operators that run on another provider, apart from arithmetic on shapes: name → nodes."""
        if self.provider == CPU or not _tells_assignment():
            return Counter()
        nodes = [(part.ep_name, node.op_type) for part in self.session.get_provider_graph_assignment_info() for node in part.get_nodes()]
        return Counter(name for place, name in nodes if place != self.provider and not (place == CPU and name in _SHAPE_OPERATORS))

    def run(self, output: str, feed: Arrays) -> NDArray[Any]:
        """One output of one call."""
        return self.session.run([output], feed)[0]  # type: ignore[no-any-return]  # onnxruntime is not typed

    def hold(self, output: str, feed: Arrays) -> None:
        """Make ``feed`` the input of `times`. On NVIDIA's providers it is copied to the device once, and only the output comes back."""
        if self.provider not in _NVIDIA:
            self.call = lambda: self.session.run([output], feed)
            return
        binding = bound(self.session, output, feed, "cuda", int(self.options.get("device_id", 0)))

        def call() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        self.call = call

    def times(self, least_runs: int, least_ms: float, uncounted: int) -> tuple[NDArray[np.float64], float]:
        """``(times_us[runs], CPU seconds of this process meanwhile)``: runs until there are enough and they took long enough.

        ``uncounted`` runs go before them. Without garbage collection.
        """
        import numpy as np

        clock, call, enough_ns = time.perf_counter_ns, self.call, 1e6 * least_ms
        times: list[int] = []
        spent = 0
        gc.collect()
        gc.disable()
        cpu = time.process_time()
        try:
            for _ in range(uncounted):
                call()
            while len(times) < least_runs or spent < enough_ns:
                began = clock()
                call()
                took = clock() - began
                times.append(took)
                spent += took
        finally:
            gc.enable()
        return np.array(times, np.float64) / 1e3, time.process_time() - cpu


def bound(session: Any, output: str, feed: Arrays, device: str, number: int) -> Any:
    """An ``IOBinding`` with ``feed`` on a device and ``output`` in the host's memory."""
    import onnxruntime as ort

    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, number))
    binding.bind_output(output, "cpu")
    binding.synchronize_inputs()
    return binding


def about() -> Header:
    """The Python, and the ONNX Runtime in it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        import numpy as np  # noqa: F401  # whether it is there
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        return {"missing": str(error.name).partition(".")[0]}
    except ImportError as error:  # a library below it is missing, or two wheels lie over each other
        return {"missing": "onnxruntime", "error": str(error)}
    wheels = []
    for name in (*_WHEELS, *_WHEELS_BY_VENDORS):
        try:
            wheels.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "version": ort.__version__,
        "wheels": wheels,
        "providers": ort.get_available_providers(),
    }


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until ``requests`` ends."""
    message, model = receive(requests), None
    while message:
        header, arrays = message
        answer: Header = {}
        results: Arrays = {}
        if header["do"] == "about":
            answer = about()
        else:
            try:
                if header["do"] == "open":
                    model = Model(header, arrays)
                    answer = model.facts()
                else:
                    assert model, "open comes first"  # noqa: S101  # the near side sees to it
                    answer, results = _ask(model, header, arrays)
            except _runtime_errors() as error:
                answer = {"error": str(error).strip() or type(error).__name__}
        try:
            send(answers, answer, results)
        except BrokenPipeError:
            return
        message = receive(requests)


def _ask(model: Model, header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    if header["do"] == "run":
        return {}, {"logits": model.run(header["output"], arrays)}
    if header["do"] == "hold":
        model.hold(header["output"], arrays)
        return {}, {}
    if header["do"] == "time":
        times_us, cpu_s = model.times(header["least_runs"], header["least_ms"], header["uncounted"])
        return {"cpu_s": cpu_s}, {"times_us": times_us}
    assert header["do"] == "memory", header  # noqa: S101  # the near side sees to it
    return {"before_bytes": model.before_bytes, "peak_bytes": _status_bytes("VmHWM")}, {}


def _status_bytes(field: str) -> int | None:
    """A size from /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), None)


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes have no common ancestor below Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")
    own = [getattr(state, name, None) for name in (*names, "NotImplemented", "RuntimeException")]
    return (*(error for error in own if error), RuntimeError, ValueError)


def _tells_assignment() -> bool:
    """Whether this onnxruntime can say which node runs where."""
    import onnxruntime as ort

    return hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")


def main() -> None:
    """Take the pipes for messages alone; whatever else is printed goes to the standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one ends with it
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if str(Path(place).resolve()) != here]  # the modules beside this file are none of its own
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        serve(requests, answers)
        os._exit(0)  # nothing is left to save, and runtimes' own clean-up at exit can hang


if __name__ == "__main__":
    main()
