"""What every test gets: a store of its own, no configuration file, and no way to the network."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from onnxsqueeze.pipeline import Outcome
    from runs import Command

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a test run in the background ignores Ctrl-C, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # a core for each worker and what it starts: stock sessions make a thread for each core that they see, and all of them spin
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    monkeypatch.setenv("ONNXSQUEEZE_STORE", str(root))
    monkeypatch.delenv("ONNXSQUEEZE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return root


@pytest.fixture
def onnxsqueeze(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process."""
    from runs import here

    return partial(here, patch=monkeypatch, said=capsys)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """recipes/q.yaml without neural-compressor, on a random model with a card and without the notes that transformers writes beside a tokenizer."""
    from models import random_checkpoint
    from runs import RECIPES, STEADY, run, small

    place = tmp_path_factory.mktemp("deploy")
    model = random_checkpoint(place / "tiny", "bert", layers=2, head=False)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (model / "special_tokens_map.json").unlink()
    notes = json.loads((model / "tokenizer_config.json").read_text()) | {"name_or_path": "/home/alice/models/tiny"}
    (model / "tokenizer_config.json").write_text(json.dumps(notes))  # as older versions of transformers have it
    lines = (RECIPES / "q.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "q.yaml").write_text("".join(line for line in lines if "quantize-inc" not in line))
    outcome, _ = run(place / "q.yaml", place / "out", model=model, store=place / "store", overrides=[*small("q"), *STEADY])
    assert outcome.exit_code == 0
    return outcome
