"""A loaded model on one execution provider, which never runs quietly on another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze.errors import MeasureError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CPU = "CPUExecutionProvider"

# ONNX Runtime itself places the arithmetic on shapes beside the CPU, on purpose, whatever the provider (its GetCpuPreferredNodes):
# a few integers each. Such nodes are no fall-back; "session.disable_cpu_ep_fallback" would refuse every model that has them.
_SHAPE_OPERATORS = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max"}
    | {"Equal", "Not", "And", "Or", "Less", "Greater", "Where", "Range", "Expand", "Reshape", "Tile", "ConstantOfShape", "Constant"}
    | {"Identity", "ReduceProd", "ReduceMax", "ReduceMin"}
)


class Session:
    """Runs one .onnx file. ``inputs`` are its input names in order, ``load_s`` what making the session took."""

    def __init__(self, onnx: Path, provider: str, threads: int) -> None:
        began = time.perf_counter()
        try:
            session = load(onnx, provider, threads)
        except runtime_errors() as error:
            raise MeasureError(
                f"{_name(onnx)}: {provider} cannot load it: {_said(error, onnx)}",
                remedy="check the file with `onnx.checker`, or leave out the stage that wrote it on this backend",
            ) from error
        self.load_s = time.perf_counter() - began
        moved = fallen_back(session, provider)
        if moved:
            what = ", ".join(f"{n} {operator}" for operator, n in moved.most_common(5))
            raise MeasureError(
                f"{_name(onnx)}: {sum(moved.values())} nodes do not run on {provider} and fell back: {what}",
                remedy=f"choose stages whose operators {provider} has kernels for",
            )
        self._session = session
        self._name, self._onnx = _name(onnx), onnx
        self._types = {given.name: given.type for given in session.get_inputs()}
        outputs = [given.name for given in session.get_outputs()]
        self._output = "logits" if "logits" in outputs else outputs[0]
        self.inputs = tuple(self._types)

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """``{input_ids, attention_mask, …}[batch, tokens]`` → ``logits[batch, outputs] float32``.

        Names that the graph does not have are left out; int64 is cast where the graph wants int32. Raises MeasureError.
        """
        import numpy as np

        try:
            given = {name: feed[name].astype(np.int32) if kind == "tensor(int32)" else feed[name] for name, kind in self._types.items()}
        except KeyError as error:
            raise MeasureError(
                f"{self._name}: its input {error} is not one of {', '.join(feed)}",
                remedy="export it again with the inputs input_ids, attention_mask, token_type_ids",
            ) from error
        try:
            (logits,) = self._session.run([self._output], given)
        except runtime_errors() as error:
            raise MeasureError(
                f"{self._name}: stopped while running: {_said(error, self._onnx)}",
                remedy="run it in a stock session on the same input; if that works, report this as a bug",
            ) from error
        return np.asarray(logits, np.float32)

    def close(self) -> None:
        """Free the session's memory and threads."""
        self._session = None


def load(model: Path | bytes, provider: str, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on one provider with default graph optimization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Threads spin while a call runs, as in stock sessions, and stop when it has returned: while one session is timed the others idle.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider != CPU:
        if _tells_assignment():
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        else:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=[provider])


def fallen_back(session: Any, provider: str) -> Counter[str]:
    """Operators of ``session`` (from `load`) that run on another provider, apart from arithmetic on shapes: name → nodes."""
    if provider == CPU or not _tells_assignment():
        return Counter()
    nodes = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    return Counter(operator for place, operator in nodes if place != provider and not (place == CPU and operator in _SHAPE_OPERATORS))


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


def _name(onnx: Path) -> str:
    """The target's folder and the file: no absolute path may reach a record."""
    return f"{onnx.parent.name}/{onnx.name}"


def _said(error: Exception, onnx: Path) -> str:
    return str(error).strip().replace(str(onnx), _name(onnx)).replace(str(onnx.parent), onnx.parent.name)
