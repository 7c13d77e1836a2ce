"""The far side of a session: one process that runs one .onnx file, in any Python from 3.9 on that has numpy and onnxruntime.

    PYTHON worker.py  < requests  > answers

A message is a line of JSON and then the bytes of its arrays, in the order of "arrays": [[name, dtype, shape], …]. Requests, by "do":

    about                                               → python, version, wheels, providers; or missing, where something is not installed
    open    provider, threads, options, path | [model]  → load_s, inputs {name: type}, outputs, started, moved {operator: nodes}
    run     output, [feed]                              → [logits]
    hold    output, [feeds: "0/input_ids", …]           → nothing; the feeds of what follows
    time    least_runs, least_ms, uncounted             → [times_us], cpu_s; runs of feed 0
    replay  order, arrivals_s or null                   → [begins_us, ends_us] since the start, cpu_s; one run of each feed of the order
    profile runs, uncounted                             → nodes [[name, operator, provider, us]], all runs of feed 0 together
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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    | {"Identity", "ReduceProd", "ReduceMax", "ReduceMin", "Sqrt"}
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
        self.model: Any = arrays["model"].tobytes() if "model" in arrays else header["path"]
        self.threads: int = header["threads"]
        self.before_bytes = _status_bytes("VmRSS")
        began = time.perf_counter()
        self.session = self._load()
        self.load_s = time.perf_counter() - began
        self.output, self.feeds = "", ()  # type: str, Sequence[Arrays]
        self.calls: list[Callable[[], object]] = []

    def _load(self, profile: str | None = None) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        # Threads spin while a call runs, as in stock sessions, and stop when it has returned: while one session is timed the others idle.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.provider != CPU:
            told = "session.record_ep_graph_assignment_info" if _tells_assignment() else "session.disable_cpu_ep_fallback"
            options.add_session_config_entry(told, "1")
        return ort.InferenceSession(self.model, options, providers=[(self.provider, self.options)])

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

    def hold(self, output: str, feeds: Sequence[Arrays]) -> None:
        """Make ``feeds`` the input of what follows. On NVIDIA's providers they are copied to the device once, and only the output comes back."""
        self.output, self.feeds = output, feeds
        on_device = self.provider in _NVIDIA
        self.calls = [self._bound(feed) if on_device else partial(self.session.run, [output], feed) for feed in feeds]

    def _bound(self, feed: Arrays) -> Callable[[], object]:
        binding = bound(self.session, self.output, feed, "cuda", int(self.options.get("device_id", 0)))

        def call() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call

    def times(self, least_runs: int, least_ms: float, uncounted: int) -> tuple[NDArray[np.float64], float]:
        """``(times_us[runs], CPU seconds of this process meanwhile)``: runs until there are enough and they took long enough.

        ``uncounted`` runs go before them. Without garbage collection.
        """
        import numpy as np

        clock, call, enough_ns = time.perf_counter_ns, self.calls[0], 1e6 * least_ms
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

    def replay(self, order: list[int], arrivals_s: list[float] | None) -> tuple[Arrays, float]:
        """``({begins_us[runs], ends_us[runs]}, CPU seconds meanwhile)``: the held feeds in this order, none before its arrival.

        Without garbage collection.
        """
        import numpy as np

        clock, calls = time.perf_counter_ns, self.calls
        begins, ends = np.empty(len(order)), np.empty(len(order))
        gc.collect()
        gc.disable()
        cpu, start = time.process_time(), clock()
        try:
            for i, which in enumerate(order):
                if arrivals_s is not None:
                    early_s = arrivals_s[i] - (clock() - start) / 1e9
                    if early_s > 0:
                        time.sleep(early_s)
                begins[i] = clock() - start
                calls[which]()
                ends[i] = clock() - start
        finally:
            gc.enable()
        return {"begins_us": begins / 1e3, "ends_us": ends / 1e3}, time.process_time() - cpu

    def profile(self, runs: int, uncounted: int) -> list[list[Any]]:
        """Name, operator, provider and microseconds of every node, in a session of its own that writes the runtime's profile."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._load(str(Path(folder) / "profile"))
            for _ in range(uncounted + runs):
                session.run([self.output], self.feeds[0])
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[tuple[str, str, str], list[float]] = {}
        for event in events:
            name = str(event.get("name"))
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                facts = event["args"]
                key = (f"{name[: -len('_kernel_time')]}#{facts.get('node_index', '')}", facts["op_name"], facts["provider"])
                times.setdefault(key, []).append(event["dur"])
        return [[*key, sum(found[-runs:])] for key, found in times.items()]


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
            except runtime_errors() as error:
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
        feeds: list[dict[str, Any]] = [{} for _ in range(header["count"])]
        for name, array in arrays.items():
            number, _, given = name.partition("/")
            feeds[int(number)][given] = array
        model.hold(header["output"], feeds)
        return {}, {}
    if header["do"] == "replay":
        spans, cpu_s = model.replay(header["order"], header["arrivals_s"])
        return {"cpu_s": cpu_s}, spans
    if header["do"] == "profile":
        return {"nodes": model.profile(header["runs"], header["uncounted"])}, {}
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


def runtime_errors() -> tuple[type[Exception], ...]:
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
