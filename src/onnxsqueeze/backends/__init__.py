"""Backends: the ONNX Runtime execution providers that a target can be made for.

get("cuda")  →  Backend  →  open(model.onnx, threads)  →  Session  →  run({"input_ids": …})  →  logits
"""

from __future__ import annotations

from functools import cache

from onnxsqueeze.backends.backend import Backend
from onnxsqueeze.backends.session import Session
from onnxsqueeze.environment import versions
from onnxsqueeze.errors import UsageError, nearest

__all__ = ["Backend", "Session", "clash", "get", "known", "started_providers"]

_BACKENDS = (
    Backend("cpu", "CPUExecutionProvider", "onnxruntime"),
    Backend("cuda", "CUDAExecutionProvider", "onnxruntime-gpu"),
    Backend("tensorrt", "TensorrtExecutionProvider", "onnxruntime-gpu"),
    Backend("openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino"),
)

# Wheels that all install the one Python package `onnxruntime`: two of them overwrite each other's files.
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def known() -> tuple[str, ...]:
    """The short names, "cpu" first."""
    return tuple(backend.name for backend in _BACKENDS)


def get(name: str) -> Backend:
    """The backend of a short name or of a provider's full name ("CUDAExecutionProvider").

    Raises UsageError for any other word, with the nearest right one.
    """
    for backend in _BACKENDS:
        if name in (backend.name, backend.provider):
            return backend
    words = [*known(), *(backend.provider for backend in _BACKENDS)]
    raise UsageError(f"unknown backend {name!r}{nearest(name, words)}", remedy=f"use one of {', '.join(known())}")


@cache
def started_providers() -> tuple[str, ...]:
    """Full names of the providers that really start a session here; tried once a process."""
    return tuple(backend.provider for backend in _BACKENDS if backend.unavailable() is None)


def clash() -> str | None:
    """Which wheels of ONNX Runtime lie over each other in this environment, or None: the one installed last wins, in part."""
    found = list(versions(_WHEELS))
    return f"{' and '.join(found)} are both installed and overwrite each other's files" if len(found) > 1 else None
