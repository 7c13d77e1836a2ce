"""`onnxsqueeze doctor`: what this machine and installation can do, tried and not guessed."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from onnxsqueeze import environment
from onnxsqueeze.backends import Backend, Backends
from onnxsqueeze.stages import QuantizeInc


def print_doctor(console: Console, backends: Backends) -> None:
    """Print versions, CPU, cores, and each backend with its Python and what starting a session on it gave."""
    facts = environment.describe(backends.started_providers())
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("CPU", f"{facts.cpu} ({facts.instruction_set})")
    table.add_row("features", " ".join(facts.features) or "none that matter here")
    table.add_row("cores", f"{facts.cores:g} usable by this process")
    table.add_row("memory", f"{facts.memory_bytes / 1e9:.1f} GB")
    table.add_row("python", facts.python)
    for name, version in facts.versions.items():
        table.add_row(name, version)
    console.print(table)
    console.print()
    for name in backends.names():
        _print_backend(console, backends.get(name))
    missing = QuantizeInc(kind="quantize-inc").unavailable()
    console.print(
        "neural-compressor: ready" if missing is None else f"neural-compressor: not available: {missing[0]}\n  remedy: {missing[1]}",
        soft_wrap=True,
        markup=False,
    )


def _print_backend(console: Console, backend: Backend) -> None:
    absent, runtime = backend.unavailable(), backend.runtime
    where = "this Python" if backend.python == sys.executable else backend.python
    text = (
        f"{backend.name}: ready ({backend.provider} started a session)" if absent is None else f"{backend.name}: not available: {absent[0]}"
    )
    console.print(text, soft_wrap=True, markup=False)
    if absent:
        console.print(f"  remedy: {absent[1]}", soft_wrap=True, markup=False)
    console.print(f"  {runtime.name if runtime else 'no onnxruntime'} in {where}", soft_wrap=True, markup=False)
    if runtime and runtime.clash:
        console.print(f"  {runtime.clash}: uninstall them all, then install the one you need", soft_wrap=True, markup=False)
