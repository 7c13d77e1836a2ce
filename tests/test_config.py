"""Which Python runs which backend: --python, else the user's file; every fault with its place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxsqueeze import config, prepare
from onnxsqueeze.backends import Backends
from onnxsqueeze.errors import RecipeError, UsageError
from runs import RECIPES, Command


@pytest.fixture
def own_config(tmp_path: Path) -> Path:
    """The user's file, which is not there yet."""
    (tmp_path / "config" / "onnxsqueeze").mkdir(parents=True)
    return tmp_path / "config" / "onnxsqueeze" / "config.yaml"


def test_without_a_file_every_backend_runs_here() -> None:
    assert config.load() == Backends()
    assert config.load().get("cuda").python == sys.executable


def test_options_win_over_the_file_and_full_names_are_the_same_backend(own_config: Path) -> None:
    own_config.write_text(f"pythons:\n  OpenVINOExecutionProvider: {sys.executable}\n  cuda: /bin/sh\n", encoding="utf-8")

    assert config.load().pythons == {"openvino": sys.executable, "cuda": "/bin/sh"}
    assert config.load(["cuda=/bin/cat"]).pythons == {"openvino": sys.executable, "cuda": "/bin/cat"}
    assert config.load(["DnnlExecutionProvider=/bin/cat"]).names()[-1] == "DnnlExecutionProvider"


def test_paths_of_the_file_begin_where_it_lies(own_config: Path) -> None:
    python = own_config.parent / "ov" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    own_config.write_text("pythons: {openvino: ov/bin/python}\n", encoding="utf-8")

    assert config.load().pythons == {"openvino": str(python)}, "a link is kept: an environment's Python is one"


def test_a_file_that_the_environment_names_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSQUEEZE_CONFIG", str(tmp_path / "absent.yaml"))
    with pytest.raises(UsageError, match=r"absent\.yaml: no such file"):
        config.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python: {}\n", r"config\.yaml:1: python: unknown key; did you mean 'pythons'\?"),
        ("pythons:\n  cdua: /bin/sh\n", r"config\.yaml:2: pythons\.cdua: unknown backend 'cdua'; did you mean 'cuda'\?"),
        ("pythons:\n  cuda: /no/such/python\n", r"config\.yaml:2: pythons\.cuda: /no/such/python: no such file; name the python program"),
        ("pythons:\n  cuda: 3\n", r"config\.yaml:2: pythons\.cuda: must be the path of a Python program, got 3"),
        ("pythons: [a]\n", r"config\.yaml:1: pythons: must map backends to Python programs, got \['a'\]"),
        ("- a\n", r"config\.yaml:1: must be a mapping with the key 'pythons'"),
        ("pythons: {cuda: /bin/sh, cuda: /bin/sh}\n", r"config\.yaml:1: pythons\.cuda: the key 'cuda' stands twice"),
        ("pythons: {\n", r"config\.yaml:2: is not YAML"),
    ],
)
def test_a_fault_of_the_file_is_told_with_its_place(own_config: Path, text: str, message: str) -> None:
    own_config.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        config.load()


def test_all_faults_of_the_file_are_told_at_once(own_config: Path) -> None:
    own_config.write_text("pythns: {}\npythons:\n  cdua: /bin/sh\n  openvino: 1\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        config.load()
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("openvino", "--python openvino: must be BACKEND=PATH"),
        ("opnvino=/bin/sh", "--python opnvino=/bin/sh: unknown backend 'opnvino'; did you mean 'openvino'?"),
        ("openvino=/no/such/python", "--python openvino=/no/such/python: no such file"),
        ("openvino=no-such-python", "--python openvino=no-such-python: no such file"),
        ("openvino=pyproject.toml", "is not a program"),
        ("openvino=.venv", "is a folder; did you mean .venv/bin/python?"),
    ],
)
def test_a_bad_option_is_wrong_usage(onnxsqueeze: Command, option: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    for words in (("run", RECIPES / "q.yaml", "--dry-run"), ("doctor",)):
        done = onnxsqueeze(*words, "--python", option, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_recorded_command_names_the_pythons_without_their_place() -> None:
    asked = Backends({"openvino": "/home/alice/ov/bin/python", "cuda": "gpu/bin/python3.12"})

    assert prepare.command_of(prepare.Request(Path("q.yaml"), backends=asked)) == (
        "onnxsqueeze run q.yaml --python cuda=gpu/bin/python3.12 --python openvino=python"
    )
