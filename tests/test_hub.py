"""What is fetched from the Hub: a start model by its name, GLUE's rows through `datasets`; and what is told where that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import glue_hub
from hub import Hub, running
from models import random_checkpoint
from runs import RECIPES, command, small

ROWS = """
import json, sys
from onnxsqueeze.tasks import glue
task = glue.find(sys.argv[1], None)
splits = [task.train(), *task.dev()]
print(json.dumps([[s.name, s.role, s.source, s.sha256, [[r.text, r.text_pair, r.label] for r in s.rows]] for s in splits]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


def python(code: str, *words: str, hub: Hub, home: Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "ONNXSQUEEZE_GLUE_DIR"} | hub.env(home)
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("task", "dev", "first", "labels"),
    [
        ("sst2", ["validation"], ["the {} sentence 0 .", None], [0, 1, 0]),
        pytest.param("mrpc", ["validation"], ["the {} sentence1 0 .", "the {} sentence2 0 ."], [0, 1, 0], marks=pytest.mark.full),
        pytest.param(
            "mnli",
            ["validation_matched", "validation_mismatched"],
            ["the {} premise 0 .", "the {} hypothesis 0 ."],
            [0, 1, 2],
            marks=pytest.mark.full,
        ),
    ],
)
def test_the_rows_of_a_glue_task_come_from_its_parquet_files(
    task: str, dev: list[str], first: list[str | None], labels: list[int], hub: Hub, tmp_path: Path
) -> None:
    hub.repos[glue_hub.REPO] = glue_hub.repository({"train": 30})
    done = python(ROWS, task, hub=hub, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout)
    assert [(name, role, source, len(rows)) for name, role, source, _, rows in found] == [
        ("train", "train", f"nyu-mll/glue/{task}", 30),
        *((name, "dev", f"nyu-mll/glue/{task}", 12) for name in dev),
    ]
    for name, _, _, _, rows in found:
        assert rows[0] == [*(text and text.format(name) for text in first), labels[0]]
        assert [row[2] for row in rows[:3]] == labels
    hub.fault = 500
    again = python(ROWS, task, hub=hub, home=tmp_path, offline=True)
    assert json.loads(again.stdout) == found, "what the cache holds is used with HF_HUB_OFFLINE=1"


FAULTS: list[int | Literal["cut"] | None] = [None, 401, 404, 500, "cut"]
GLUE_OF = """
from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks import glue
try:
    glue.find("sst2", None).train()
except DataError as error:
    print(error)
"""
MODEL_OF = """
from onnxsqueeze.errors import ModelError
from onnxsqueeze.models import resolve
try:
    resolve("alice/tiny")
except ModelError as error:
    print(error)
"""


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_the_hub_does_not_give_are_an_error_that_says_what_to_do(
    fault: int | Literal["cut"] | None, hub: Hub, tmp_path: Path
) -> None:
    if fault is not None:
        hub.repos[glue_hub.REPO] = glue_hub.repository()
        hub.fault = fault
    done = python(GLUE_OF, hub=hub, home=tmp_path)
    assert done.stdout.startswith("task sst2: no --data-dir is given, and the Hub's nyu-mll/glue cannot be loaded: "), done.stderr
    assert "--data-dir DIR, or ONNXSQUEEZE_GLUE_DIR=DIR" in done.stdout
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 2, "one message, one remedy"
    hub.repos[glue_hub.REPO], hub.fault = glue_hub.repository(), None
    later = python(ROWS, "sst2", hub=hub, home=tmp_path)
    assert later.returncode == 0, "a failure leaves nothing behind that a second try trips over"


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_the_hub_does_not_give_is_an_error_that_says_what_to_do(
    fault: int | Literal["cut"] | None, hub: Hub, tmp_path: Path
) -> None:
    model = random_checkpoint(tmp_path / "tiny", "bert", layers=1, head=False)
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    if fault is not None:
        hub.repos["alice/tiny"], hub.fault = files, fault
    done = python(MODEL_OF, hub=hub, home=tmp_path / "home")
    assert done.stdout.startswith("model alice/tiny: is not in the local cache and cannot be had from the Hugging Face Hub: "), done.stderr
    assert "check the name and the network" in done.stdout
    hub.repos["alice/tiny"], hub.fault = files, None
    assert python(MODEL_OF, hub=hub, home=tmp_path / "home").stdout == ""


@pytest.mark.full
def test_a_run_fetches_its_model_and_its_rows_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "tiny", "bert", layers=1, head=False)
    hub.repos["alice/tiny"] = {file.name: file.read_bytes() for file in model.iterdir()} | {"README.md": b"---\nlicense: mit\n---\n"}
    hub.repos[glue_hub.REPO] = glue_hub.repository({"train": 1200, "validation": 40})
    sets = [word for one in (*small("q"), "measure.latency=false") for word in ("--set", one)]
    words = ("run", RECIPES / "q.yaml", "--model", "alice/tiny", "--task", "sst2", "--out", "out", *sets)
    done = command(*words, cwd=tmp_path, env=hub.env(tmp_path / "home") | {"ONNXSQUEEZE_GLUE_DIR": ""})
    assert done.returncode in (0, 3), done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["model"] == "alice/tiny"
    assert [(split["name"], split["n"], split["source"]) for split in record["task"]["splits"]] == [("validation", 40, "nyu-mll/glue/sst2")]
    assert '"license":"mit"' in (tmp_path / "out" / "int8-ort" / "model.onnx").read_bytes().decode("latin-1")
