"""Writes the pages of a run beside its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxsqueeze.report.html import html
from onnxsqueeze.report.markdown import markdown
from onnxsqueeze.results import Results
from onnxsqueeze.store import write_atomically

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"


def write_reports(results: Sequence[Results], folder: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into ``folder``, each whole or not at all; returns their paths.

    Raises StoreError where the folder cannot be written.
    """
    pages = ((folder / MARKDOWN_FILE, markdown(results)), (folder / HTML_FILE, html(results)))
    for path, text in pages:
        write_atomically(path, text.encode())
    return pages[0][0], pages[1][0]
