"""`deploy --push` and `--model NAME`, spoken by huggingface_hub to a stand-in of the Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import Hub, running
from models import random_checkpoint
from onnxsqueeze.pipeline import Outcome
from runs import command

LOAD = """
import sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
name = sys.argv[1]
model, tokenizer = ORTModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
print(pipeline("text-classification", model=model, tokenizer=tokenizer)("a great film")[0])
"""


@pytest.fixture(scope="module")
def noted(ran: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with all notes beside its tokenizer: transformers, which takes seconds to import, is not needed to write them."""
    out = tmp_path_factory.mktemp("noted") / "out"
    shutil.copytree(ran.out, out, ignore=shutil.ignore_patterns(".lock"))
    (out / "fp32" / "special_tokens_map.json").write_text("{}")
    return out


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.mark.full
def test_a_pushed_folder_is_a_private_repository_that_loads_by_its_name(ran: Outcome, hub: Hub, tmp_path: Path) -> None:
    words = ("deploy", ran.out, "--target", "int8-ort", "--to", "hf", "--out", "mine", "--push", "alice/tiny-int8")
    done = command(*words, cwd=tmp_path, env=hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.endpoint}/alice/tiny-int8/commit/" in done.stdout
    assert hub.private == {"alice/tiny-int8"}
    local = {f.relative_to(tmp_path / "mine").as_posix(): f.read_bytes() for f in (tmp_path / "mine").rglob("*") if f.is_file()}
    assert hub.repos["alice/tiny-int8"] == local
    assert hub.lfs_paths == {"onnx/model.onnx"}
    said = []
    for name in ("alice/tiny-int8", str(tmp_path / "mine")):
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, name],
            env={**os.environ, **hub.env(tmp_path / "other")}, capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert loaded.returncode == 0, loaded.stderr
        said.append(loaded.stdout)
    assert said[0] == said[1]
    again = command(*(tmp_path / "again" if word == "mine" else word for word in words), cwd=tmp_path, env=hub.env(tmp_path / "home"))
    assert again.returncode == 0, again.stderr
    assert hub.commits["alice/tiny-int8"] == 2


@pytest.mark.parametrize("token", ["hf_wrong", ""])
def test_a_refused_push_says_why_and_leaves_the_folder(token: str, noted: Path, hub: Hub, tmp_path: Path) -> None:
    env = {**hub.env(tmp_path / "home"), "HF_TOKEN": token}
    done = command("deploy", noted, "--target", "fp32", "--to", "hf", "--out", "mine", "--push", "alice/x", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "--push alice/x: the Hub did not take it: " in done.stderr
    assert "401" in done.stderr
    assert "hf upload alice/x mine" in done.stderr
    assert (tmp_path / "mine" / "onnx" / "model.onnx").is_file()
    assert hub.repos == {}


def test_what_cannot_be_pushed_is_told_before_anything_is_written(noted: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--to", "folder", "--push", "alice/x"), "--push goes with --to hf"),
        (("--to", "hf", "--push", "alice/x/y"), "--push alice/x/y: is no name of a repository"),
    ):
        done = command("deploy", noted, "--target", "fp32", *words, "--out", "mine", cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "mine").exists()


def test_a_hub_that_is_not_there(noted: Path, tmp_path: Path) -> None:
    with running() as gone:
        env = gone.env(tmp_path / "home")
    done = command("deploy", noted, "--target", "fp32", "--to", "hf", "--out", "mine", "--push", "alice/x", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "--push alice/x: the Hub did not take it: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_of_the_hub_is_a_start_with_the_licence_of_its_card(hub: Hub, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "tiny", "bert", layers=1, head=False)
    hub.repos["alice/tiny"] = {f.name: f.read_bytes() for f in model.iterdir()} | {"README.md": b"---\nlicense: bsd-3-clause\n---\n"}
    code = "from onnxsqueeze.models import resolve; import json; s = resolve('alice/tiny'); print(json.dumps([s.name, s.license, s.artifact.digest]))"
    env = {**os.environ, **hub.env(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from onnxsqueeze.models import resolve

    assert json.loads(done.stdout) == ["alice/tiny", "bsd-3-clause", resolve(str(model)).artifact.digest]
