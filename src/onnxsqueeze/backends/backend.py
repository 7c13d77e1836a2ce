"""One execution provider in one Python: whether it starts there, why not, and sessions on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onnxsqueeze.backends.process import Worker
from onnxsqueeze.backends.session import Session
from onnxsqueeze.errors import MeasureError, Unavailable

_ABSENT_LIBRARY = re.compile(r"[\w.+-]+\.so[\d.]*: cannot open shared object file")  # as the dynamic linker says it


@dataclass(frozen=True)
class Runtime:
    """The ONNX Runtime of one Python. ``wheels`` are distributions with their versions, ``providers`` what the build offers."""

    version: str
    wheels: tuple[str, ...]
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        """For records: "onnxruntime-openvino 1.24.1"."""
        return " and ".join(self.wheels) or f"onnxruntime {self.version}"

    @property
    def clash(self) -> str | None:
        """Which wheels lie over each other, or None: the one installed last wins, in part."""
        return f"{self.name} are both installed and overwrite each other's files" if len(self.wheels) > 1 else None


@dataclass(frozen=True)
class Backend:
    """``name`` is ours ("cuda"), ``provider`` is ONNX Runtime's, ``wheel`` is the distribution that has it, ``python`` the one to run it in.

    ``lacks`` are operators that it has no kernel for, ``instead`` what to do about them; ``float16`` says what speaks against half
    precision. ``options`` go to the provider, with the number of threads as ``threads_option`` where it keeps threads of its own.
    """

    name: str
    provider: str
    wheel: str | None = None
    python: str = sys.executable
    lacks: frozenset[str] = frozenset()
    instead: str = ""
    float16: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    threads_option: str | None = None

    @property
    def runtime(self) -> Runtime | None:
        """The ONNX Runtime of its Python, or None where there is none. Looked at once a process."""
        found = look(self.python)
        return found if isinstance(found, Runtime) else None

    def unavailable(self) -> tuple[str, str] | None:
        """(reason, remedy) where a tiny model does not run on this very provider, else None. Tried once a process."""
        return _try(self)

    def refusal(self, operators: Iterable[str]) -> str | None:
        """Why a graph with these operators makes no sense here, or None."""
        lacking = sorted(self.lacks.intersection(operators))
        if not lacking:
            return None
        return f"{self.provider} has no kernel for {', '.join(lacking)}: such nodes would run on another provider, with copies in between; {self.instead}"

    def open(self, onnx: Path, threads: int) -> Session:
        """A session of the file on this provider, with ``threads`` threads inside an operator and stock graph optimization.

        Raises Unavailable where the provider does not start, MeasureError where the file does not load or where ONNX Runtime gave
        nodes of it to another provider.
        """
        absent = self.unavailable()
        if absent:
            raise Unavailable(absent[0], remedy=absent[1])
        own_threads = {self.threads_option: str(threads)} if self.threads_option else {}
        return Session(onnx, self.provider, threads, python=self.python, options={**dict(self.options), **own_threads})


@cache
def look(python: str) -> Runtime | str:
    """The ONNX Runtime of a Python, or what is wrong with it, as the end of a sentence that begins with the Python."""
    try:
        with closing(Worker(python, "that Python")) as worker:
            facts = worker.about()
    except MeasureError as error:
        return f"cannot be used: {error.message}"
    if "missing" in facts:
        return f"has no {facts['missing']}{' that can be imported: ' + facts['error'] if 'error' in facts else ''}"
    return Runtime(facts["version"], tuple(facts["wheels"]), tuple(facts["providers"]))


@cache
def _try(backend: Backend) -> tuple[str, str] | None:
    import numpy as np

    wheel = backend.wheel or f"a build of ONNX Runtime with {backend.provider}"
    runtime = look(backend.python)
    if isinstance(runtime, str):
        whose = "this Python" if backend.python == sys.executable else f"the Python named for {backend.name}"
        return f"{whose} {runtime}", f"pip install numpy {wheel}  (in that Python), or name another one: --python {backend.name}=PATH"
    if backend.provider not in runtime.providers:
        remedy = f"python3 -m venv VENV && VENV/bin/pip install numpy {wheel}, then --python {backend.name}=VENV/bin/python  (an environment of its own: they cannot share one)"
        return f"no {backend.provider} in this {runtime.name} (it offers {', '.join(runtime.providers)})", remedy
    remedy = {
        "cuda": 'look at `nvidia-smi`, then pip install "onnxruntime-gpu[cuda,cudnn]"',
        "tensorrt": 'look at `nvidia-smi`, then pip install "onnxruntime-gpu[cuda,cudnn]" tensorrt',
    }.get(backend.name, f"pip install --force-reinstall {wheel}")
    fails = f"{backend.provider} is in this {runtime.name} but does not start"
    try:
        with closing(Worker(backend.python, "a session")) as worker:
            tiny = {"model": np.frombuffer(_tiny_model(), np.uint8)}
            facts, _ = worker.ask("open", tiny, provider=backend.provider, threads=1, options=dict(backend.options))
            if "error" in facts:
                return f"{fails}: {facts['error']}", remedy
            if facts["started"][0] != backend.provider or facts["moved"]:
                library = _ABSENT_LIBRARY.search(worker.said())
                return f"{fails}: {library[0] if library else 'a library, a driver or the device is missing'}", remedy
            answer, _ = worker.ask("run", {"x": np.array([[1.0, 2.0]], np.float32)}, output="y")
    except MeasureError as error:
        return f"{fails}: {error.message}", remedy
    return (f"{fails}: {answer['error']}", remedy) if "error" in answer else None


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
