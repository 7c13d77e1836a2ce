"""Backends: the ONNX Runtime execution providers that a target can be made for, each in the Python that has it.

Backends({"openvino": "ov/bin/python"}).get("openvino")  →  Backend  →  open(model.onnx, threads)  →  Session  →  run, time

    backends/__init__   names and the registry          process   the near side of a worker: start, ask, why it ended
    backend             one provider in one Python      worker    the far side: a process of its own, in any Python
    session             one open file                   limits    operators without kernels
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnxsqueeze.backends import limits
from onnxsqueeze.backends.backend import Backend, Runtime
from onnxsqueeze.backends.session import Answers, Block, NodeTime, Replay, Session, Shared
from onnxsqueeze.errors import UsageError, nearest

__all__ = [
    "HERE",
    "Answers",
    "Backend",
    "Backends",
    "Block",
    "NodeTime",
    "Opener",
    "Replay",
    "Runtime",
    "Session",
    "Shared",
    "get",
    "known",
]

_BACKENDS = (
    Backend("cpu", "CPUExecutionProvider", "onnxruntime", float16=limits.CPU_FLOAT16),
    Backend("cuda", "CUDAExecutionProvider", "onnxruntime-gpu", lacks=limits.CUDA, instead="use float16 or quantize-weights"),
    Backend("tensorrt", "TensorrtExecutionProvider", "onnxruntime-gpu", lacks=limits.TENSORRT, instead="use float16 or quantize-static"),
    # OpenVINO keeps threads of its own, as many as there are cores unless it is told otherwise
    Backend(
        "openvino",
        "OpenVINOExecutionProvider",
        "onnxruntime-openvino",
        lacks=limits.OPENVINO,
        instead="use quantize-static, or quantize-weights with `embeddings: false`",
        options=(("device_type", "CPU"),),
        threads_option="num_of_threads",
    ),
)

Opener = Callable[[str, Path, int], Session]  # a backend's name, the file, threads


def known() -> tuple[str, ...]:
    """The short names, "cpu" first."""
    return tuple(backend.name for backend in _BACKENDS)


def get(name: str) -> Backend:
    """The backend of a short name or of a provider's full name ("CUDAExecutionProvider"), in this Python.

    Any other name that ends in "ExecutionProvider" is a backend too, of which nothing more is known. Raises UsageError for any other
    word, with the nearest right one.
    """
    for backend in _BACKENDS:
        if name.lower() in (backend.name, backend.provider.lower()):
            return backend
    if name.endswith("ExecutionProvider"):
        return Backend(name, name)
    words = [*known(), *(backend.provider for backend in _BACKENDS)]
    raise UsageError(
        f"unknown backend {name!r}{nearest(name, words)}",
        remedy=f"use one of {', '.join(known())}, or the full name of an execution provider",
    )


@dataclass(frozen=True)
class Backends:
    """Which Python runs which backend: ``pythons`` maps a backend's name to a path; the others run in this one."""

    pythons: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Backend:
        """The backend of this name in its Python. Raises UsageError as `get` does."""
        backend = get(name)
        return replace(backend, python=self.pythons.get(backend.name, sys.executable))

    def open(self, name: str, onnx: Path, threads: int) -> Session:
        """A session on the backend of this name; see `Backend.open`."""
        return self.get(name).open(onnx, threads)

    def names(self) -> tuple[str, ...]:
        """The short names, and the others that have a Python."""
        return (*known(), *(name for name in self.pythons if name not in known()))

    def started_providers(self) -> tuple[str, ...]:
        """Full names of the providers that really start a session; each is tried once a process."""
        return tuple(backend.provider for backend in map(self.get, self.names()) if backend.unavailable() is None)


HERE = Backends()  # every backend in this Python
