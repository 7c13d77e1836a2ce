"""`onnxsqueeze doctor`: what this machine and installation can do, tried and not guessed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from onnxsqueeze import backends, environment
from onnxsqueeze.stages import QuantizeInc


def print_doctor(console: Console) -> None:
    """Print versions, CPU, cores, and each backend with what starting a session on it gave."""
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
    clash = backends.clash()
    if clash:
        console.print(f"onnxruntime: {clash}\n  remedy: uninstall both, then install the one you need", soft_wrap=True, markup=False)
    for name in backends.known():
        backend = backends.get(name)
        absent = backend.unavailable()
        if absent is None:
            console.print(f"{name}: ready ({backend.provider} started a session)", soft_wrap=True)
        else:
            console.print(f"{name}: not available: {absent[0]}\n  remedy: {absent[1]}", soft_wrap=True, markup=False)
    missing = QuantizeInc(kind="quantize-inc").unavailable()
    console.print(
        "neural-compressor: ready" if missing is None else f"neural-compressor: not available: {missing[0]}\n  remedy: {missing[1]}",
        soft_wrap=True,
        markup=False,
    )
