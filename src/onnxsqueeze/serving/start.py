"""From the command line's words to a running server. Imports nothing that only the extra `serve` brings, until it is known to be there."""

from __future__ import annotations

import ipaddress
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from onnxsqueeze import environment
from onnxsqueeze.errors import UsageError
from onnxsqueeze.serving.folder import require
from onnxsqueeze.serving.settings import Settings

_NEEDED = ("starlette", "uvicorn", "httptools", "uvloop", "prometheus_client")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_QUEUED_BATCHES = 8


def start(
    folder: Path,
    *,
    name: str | None,
    host: str,
    port: int,
    workers: int,
    max_batch: int,
    max_delay_ms: float,
    threads: int | None,
    queue: int | None,
    timeout_s: float,
) -> int:
    """Serve until told to end; the exit code. Raises UsageError before anything is loaded, and what `server.serve` raises."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise UsageError(f"serve: {', '.join(missing)} not installed", remedy="pip install 'onnxsqueeze[serve]'")
    require(folder)
    name = name or folder.resolve().name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name}: must be letters, digits, '_', '.' and '-', as it stands in URLs", remedy="name the model with --name NAME"
        )
    settings = Settings(
        folder=folder.absolute(),
        name=name,
        host=host,
        port=port,
        workers=workers,
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        threads=threads or max(1, environment.default_threads() // workers),
        queue=queue or _QUEUED_BATCHES * max_batch,
        timeout_s=timeout_s,
    )
    from onnxsqueeze.serving.server import address, bind, serve
    from onnxsqueeze.serving.workers import serve_all

    bound = bind(settings)
    if not _loopback(host):
        _say(f"onnxsqueeze serve: note: {host} is not loopback: whoever reaches it may use it; nothing here checks who asks")
    told = f"serving {name} on {address(bound)}: threads={settings.threads}, workers={workers}"
    if workers > 1:
        return serve_all(settings, bound, told)
    return serve(settings, bound, lambda: print(told, flush=True))  # noqa: T201  # the result


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # progress goes to stderr
