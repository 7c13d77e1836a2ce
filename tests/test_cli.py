"""The command line: what it prints, what it imports, what it exits with."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pythons import environment
from records import qdp_results
from runs import RECIPES, ROOT, command

HEAVY = ("torch", "onnx", "onnxruntime", "transformers")


def test_the_command_line_imports_no_heavy_library() -> None:
    code = f"import sys, onnxsqueeze.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_checking_a_recipe_imports_no_heavy_library() -> None:
    code = f"import sys, pathlib, onnxsqueeze.recipe as r; r.load(pathlib.Path('recipes/qdp.yaml')); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("words", [(), ("run",), ("check",), ("report",), ("doctor",)])
def test_help_teaches_by_example(words: tuple[str, ...], tmp_path: Path) -> None:
    done = command(*words, "--help", cwd=tmp_path, env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"onnxsqueeze {' '.join(words)}".strip() in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_the_generated_pages_say_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pages().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name} is old: run `make docs`"


def test_check_names_the_stages_and_targets(tmp_path: Path) -> None:
    done = command("check", RECIPES / "qdp.yaml", cwd=tmp_path)
    assert done.returncode == 0
    assert (
        "fine: finetune → distill → prune-structure; 8 targets: fp32, int8-ort, int8-inc, qdp-ort, qdp-inc, cuda-fp32, cuda-fp16, cuda-w8"
        in done.stdout
    )


def test_a_dry_run_makes_nothing(tmp_path: Path, own_store: Path) -> None:
    done = command("run", RECIPES / "qdp.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"finetune +[0-9a-f]{12} +to be made", done.stdout)
    assert not list((own_store / "artifacts").iterdir())
    assert not (tmp_path / "runs").exists()


def test_doctor_tries_the_providers(tmp_path: Path) -> None:
    done = command("doctor", cwd=tmp_path)
    assert done.returncode == 0
    assert "cpu: ready (CPUExecutionProvider started a session)" in done.stdout
    assert re.search(r"^cuda: (ready|not available: .*\n  remedy: )", done.stdout, re.MULTILINE)
    assert re.search(r"cores +[\d.]+ usable by this process", done.stdout)


@pytest.mark.parametrize("name", ["a.html", "a.md"])
def test_report_draws_a_record_again(tmp_path: Path, name: str) -> None:
    (tmp_path / "results.json").write_text(qdp_results().to_json())
    done = command("report", ".", "-o", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "int8-ort" in (tmp_path / name).read_text()


def test_report_to_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(qdp_results().to_json())
    done = command("report", ".", "-o", "a.htm", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean '.html'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [(("run",), 2), (("run", "x.yaml", "--seed", "many"), 2), (("frobnicate",), 2), (("--version",), 0), (("run", "x.yaml"), 2)],
)
def test_exit_codes_of_the_command_line_itself(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    done = command(*words, cwd=tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_shell_completion_offers_tasks(tmp_path: Path) -> None:
    env = {"_ONNXSQUEEZE_COMPLETE": "complete_bash", "COMP_WORDS": "onnxsqueeze run x.yaml --task s", "COMP_CWORD": "4"}
    script = Path(sys.executable).with_name("onnxsqueeze")
    done = subprocess.run([script], env={"PATH": "", **env}, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["sst2", "stsb"]


def test_no_published_record_names_a_path_host_or_user() -> None:
    files = [f for f in (ROOT / "reports").rglob("*") if f.suffix in (".json", ".md", ".html")]
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        found = re.findall(r"(?<![\w.:/<])/(?:home|root|tmp|usr|var|mnt|opt|srv|Users)/[^\s\"'<]*", text)
        assert not found, f"{file.name}: {found[:3]}"


def test_doctor_tells_each_backends_python_and_what_it_lacks(tmp_path: Path) -> None:
    bare, other = environment(tmp_path / "bare", packages=False), environment(tmp_path / "other", packages=True)
    done = command("doctor", "--python", f"openvino={bare}", "--python", f"cpu={other}", cwd=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    at = lines.index("cpu: ready (CPUExecutionProvider started a session)")
    assert re.fullmatch(rf"  onnxruntime [0-9.]+ in {other}", lines[at + 1])
    at = lines.index("cuda: not available: " + next(line for line in lines if line.startswith("cuda:")).split(": ", 2)[2])
    assert "pip install numpy onnxruntime-gpu" in lines[at + 1]
    assert lines[at + 2].endswith(" in this Python")
    at = lines.index("openvino: not available: the Python named for openvino has no numpy")
    assert "pip install numpy onnxruntime-openvino  (in that Python)" in lines[at + 1]
    assert lines[at + 2] == f"  no onnxruntime in {bare}"
