"""Progress: plain lines without a terminal, a live bar with time left on one."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from onnxsqueeze import console
from onnxsqueeze.console import Watcher


def plain() -> tuple[Watcher, io.StringIO]:
    text = io.StringIO()
    return Watcher(Console(file=text, width=60, soft_wrap=True, highlight=False)), text


def test_without_a_terminal_each_piece_of_work_is_a_line_when_it_starts_and_when_it_ends() -> None:
    watcher, text = plain()
    with watcher:
        progress = watcher.begin("export")
        progress(1, 2, "half")
        watcher.end("export: 529 nodes")
    assert [re.sub(r"\[ *[\d.]+ s\] ", "", line) for line in text.getvalue().splitlines()] == ["export …", "export: 529 nodes"]


def test_long_work_says_what_is_left_and_a_resumed_one_counts_from_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PLAIN_INTERVAL_S", 10.0)
    now = [0.0]
    monkeypatch.setattr("onnxsqueeze.console.time.monotonic", lambda: now[0])
    watcher, text = plain()
    with watcher:
        progress = watcher.begin("finetune")
        now[0] = 5.0
        progress(900, 1000)
        now[0] = 15.0
        progress(910, 1000, "epoch 2/2")
    assert text.getvalue().splitlines()[-1].endswith("finetune: 910/1,000, about 90 s left (epoch 2/2)")


def test_on_a_terminal_there_is_one_live_bar_that_is_gone_at_the_end() -> None:
    text = io.StringIO()
    watcher = Watcher(Console(file=text, width=100, force_terminal=True, color_system=None))
    with watcher:
        progress = watcher.begin("finetune")
        progress(1, 4, "epoch 1/2")
        watcher._bar.refresh()
        watcher.end("finetune: done")
    shown = text.getvalue()
    assert "1/4" in shown
    assert "epoch 1/2" in shown
    assert shown.index("epoch 1/2") < shown.index("finetune: done")
    assert "1/4" not in shown[shown.index("finetune: done") :]
