"""One execution provider: whether it starts here, why not, and sessions on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onnxsqueeze.backends.session import Session, fallen_back, load, runtime_errors
from onnxsqueeze.errors import Unavailable


@dataclass(frozen=True)
class Backend:
    """``name`` is ours ("cuda"), ``provider`` is ONNX Runtime's, ``wheel`` is the distribution that has it."""

    name: str
    provider: str
    wheel: str

    def unavailable(self) -> tuple[str, str] | None:
        """(reason, remedy) where a tiny model does not run on this very provider, else None. Tried once a process."""
        return _try(self)

    def open(self, onnx: Path, threads: int) -> Session:
        """A session of the file on this provider, with ``threads`` threads inside an operator and stock graph optimization.

        Raises Unavailable where the provider does not start, MeasureError where the file does not load or where ONNX Runtime gave
        nodes of it to another provider.
        """
        absent = self.unavailable()
        if absent:
            raise Unavailable(absent[0], remedy=absent[1])
        return Session(onnx, self.provider, threads)


@cache
def _try(backend: Backend) -> tuple[str, str] | None:
    import onnxruntime as ort

    offered = ort.get_available_providers()
    if backend.provider not in offered:
        remedy = f"pip uninstall -y onnxruntime && pip install {backend.wheel}  (in an environment of its own: they cannot share one)"
        return f"no {backend.provider} in this onnxruntime {ort.__version__} (it offers {', '.join(offered)})", remedy
    remedy = {
        "cuda": 'look at `nvidia-smi`, then pip install "onnxruntime-gpu[cuda,cudnn]"',
        "tensorrt": 'look at `nvidia-smi`, then pip install "onnxruntime-gpu[cuda,cudnn]" tensorrt',
    }.get(backend.name, f"pip install --force-reinstall {backend.wheel}")
    try:
        session = load(_tiny_model(), backend.provider, threads=1)
        started = session.get_providers()[0]
        moved = fallen_back(session, backend.provider)
        session.run(None, {"x": [[1.0, 2.0]]})
    except runtime_errors() as error:
        return f"{backend.provider} is in this onnxruntime but does not start: {str(error).strip()}", remedy
    if started != backend.provider or moved:
        return f"{backend.provider} is in this onnxruntime but does not start: a library, a driver or the device is missing", remedy
    return None


def _tiny_model() -> bytes:
    """y[1, 2] = x[1, 2] · w[2, 2], float32: old enough an opset for every provider."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])],
    )
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString())
