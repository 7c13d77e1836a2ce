"""Bad input to the real command: one clear message with the remedy, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import random_checkpoint
from onnxsqueeze.store import Store
from runs import RECIPES, Command, command, small, start_words

SST2 = "sentence\tlabel\n" + "".join(f"a {word} film number {i}\t{i % 2}\n" for i, word in enumerate(["fine", "dull"] * 300))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("m") / "model", "bert", layers=2, head=False)


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(SST2)
    return folder.parent


def complain(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with ``code`` and one message that says all ``words``, and no traceback."""
    text = " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert done.stderr.count("error:") == 1, done.stderr


def test_a_recipe_with_typos_and_wrong_types(onnxsqueeze: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text((RECIPES / "qdp.yaml").read_text().replace("share: 0.6", "shere: 0.6").replace("layers: 4", "layers: [a]"))
    for words in (("run", "a.yaml"), ("check", "a.yaml")):
        complain(onnxsqueeze(*words, cwd=tmp_path), 2, "a.yaml:", "unknown key 'shere'; did you mean 'share'?", "got 'a'")


def test_a_missing_recipe(tmp_path: Path) -> None:
    complain(command("run", "qdq.yaml", cwd=tmp_path), 2, "recipe qdq.yaml: there is no such file", "remedy: name a recipe file")


def test_stages_in_an_impossible_order(onnxsqueeze: Command, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "schema: 1\nname: a\ntask: toy\ntargets: [{name: x, stages: [{kind: quantize-dynamic}, {kind: export}]}]\n"
    )
    complain(
        onnxsqueeze("run", "a.yaml", cwd=tmp_path),
        2,
        "a.yaml:4: targets[0].stages[0]: quantize-dynamic takes a float32 .onnx",
        "add {kind: export} before it",
    )


def test_an_export_of_a_model_without_a_head(onnxsqueeze: Command, tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.yaml").write_text("schema: 1\nname: a\ntask: toy\ntargets: [{name: x, stages: [{kind: export}]}]\n")
    complain(onnxsqueeze("run", "a.yaml", "--model", model, cwd=tmp_path), 2, "a.yaml:4", "has no trained head; put {kind: finetune} above")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "stages: [{kind: prune-weights}, {kind: finetune}]\ntargets: [{name: x, stages: [{kind: export}]}]",
            ("a.yaml:4", "prune-weights: the model", "has no trained head"),
        ),
        (
            "stages: [{kind: finetune}, {kind: distill, layers: 12}]\ntargets: [{name: x, stages: [{kind: export}]}]",
            ("a.yaml:4", "distill: layers: ", "got 12"),
        ),
        (
            "targets: [{name: x, stages: [{kind: finetune}, {kind: export}]}]",
            ("a.yaml:4: targets[0]: a backend without a baseline", "put {kind: finetune} into `stages:`"),
        ),
        (
            "stages: [{kind: finetune}]\nmeasure: {sequence: 512}\ntargets: [{name: x, stages: [{kind: export}]}]",
            ("a.yaml:5: measure.sequence", "reads at most", "got 512"),
        ),
        (
            "stages: [{kind: finetune}]\ntargets: [{name: report.md, stages: [{kind: export}]}]",
            ("a.yaml:5: targets[0].name", "name the target otherwise"),
        ),
        (
            "stages: [{kind: finetune}, {kind: prune-vocabulary, corpus: corpsu.txt}]\ntargets: [{name: x, stages: [{kind: export}]}]",
            ("a.yaml:4: stages[1].corpus: prune-vocabulary: there is no file corpsu.txt", "relative to the recipe"),
        ),
        (
            "stages: [{kind: finetune}]\ntargets: [{name: x, stages: [{kind: prune-vocabulary, out_of_domain: latin1.txt}, {kind: export}]}]",
            ("latin1.txt:2: is not UTF-8", "remedy:"),
        ),
        (
            "stages: [{kind: finetune}, {kind: prune-vocabulary, size: 90000}]\ntargets: [{name: x, stages: [{kind: export}]}]",
            ("a.yaml:4", "prune-vocabulary: size: must be below", "got 90000"),
        ),
        (
            "stages: [{kind: finetune}, {kind: prune-vocabulary, min_count: 0}]\ntargets: [{name: x, stages: [{kind: export}]}]",
            ("a.yaml:4: stages[1].prune-vocabulary.min_count: must be greater than or equal to 1, got 0",),
        ),
        (
            "targets: [{name: x, stages: [{kind: prune-vocabulary}, {kind: export}]}]",
            ("a.yaml:4: targets[0].stages[1]", "export: the model", "has no trained head"),
        ),
        ("description: !mine x\ntargets: [{name: x, stages: [{kind: export}]}]", ("a.yaml:4: description", "write a plain value")),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_anything_is_made(
    onnxsqueeze: Command, tmp_path: Path, model: Path, own_store: Path, text: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"plain\ncaf\xe9\n")
    (tmp_path / "a.yaml").write_text(f"schema: 1\nname: a\ntask: {{name: toy, max_length: 32}}\n{text}\n")
    complain(onnxsqueeze("run", "a.yaml", "--model", model, cwd=tmp_path), 2, *words)
    assert not own_store.exists() or not list((own_store / "artifacts").iterdir())


def test_an_unknown_task(onnxsqueeze: Command, tmp_path: Path) -> None:
    complain(onnxsqueeze("run", RECIPES / "q.yaml", "--task", "sst3", cwd=tmp_path), 2, "unknown task 'sst3'; did you mean 'sst2'?")


def test_a_task_without_data_says_how_to_get_it(tmp_path: Path, model: Path) -> None:
    env = {"ONNXSQUEEZE_GLUE_DIR": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    complain(command("run", RECIPES / "q.yaml", "--task", "sst2", "--model", model, cwd=tmp_path, env=env), 2, "sst2", "--data-dir")


def test_a_corrupt_tsv_names_the_line(onnxsqueeze: Command, tmp_path: Path, model: Path, glue: Path) -> None:
    (glue / "SST-2" / "train.tsv").write_text(SST2 + "a line with three fields\t1\tmore\n")
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--task", "sst2", "--data-dir", glue, "--model", model, cwd=tmp_path),
        2,
        "train.tsv:602",
        "remedy:",
    )


def test_a_truncated_tsv_names_the_line(onnxsqueeze: Command, tmp_path: Path, model: Path, glue: Path) -> None:
    (glue / "SST-2" / "train.tsv").write_text(SST2 + "a good fi")
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--task", "sst2", "--data-dir", glue, "--model", model, cwd=tmp_path),
        2,
        "train.tsv:602",
        "remedy:",
    )


def test_wrong_labels_name_what_is_allowed(onnxsqueeze: Command, tmp_path: Path, model: Path, glue: Path) -> None:
    (glue / "SST-2" / "train.tsv").write_text(SST2 + "a good film\t2\n")
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--task", "sst2", "--data-dir", glue, "--model", model, cwd=tmp_path),
        2,
        "train.tsv:602",
        "'2'",
    )


def test_a_corrupt_dev_file_is_found_when_measuring_and_the_stages_are_kept(
    onnxsqueeze: Command, tmp_path: Path, model: Path, glue: Path, own_store: Path
) -> None:
    (glue / "SST-2" / "dev.tsv").write_text(SST2 + "a good film\n")
    complain(
        onnxsqueeze("run", RECIPES / "none.yaml", "--task", "sst2", "--data-dir", glue, "--model", model, *sets("none"), cwd=tmp_path),
        2,
        "dev.tsv:602",
    )
    assert len(list((own_store / "artifacts").iterdir())) == 2


def test_a_model_folder_without_weights(onnxsqueeze: Command, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--model", "./empty", cwd=tmp_path),
        2,
        "model folder empty: has no weights",
        "save_pretrained",
    )


def test_a_truncated_model_file(onnxsqueeze: Command, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    complain(onnxsqueeze("run", RECIPES / "q.yaml", "--model", "./cut", cwd=tmp_path), 2, "model.safetensors", "remedy:")


def test_an_unknown_architecture_is_refused_by_name(onnxsqueeze: Command, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    config.write_text(config.read_text().replace('"bert"', '"t5"'))
    complain(onnxsqueeze("run", RECIPES / "q.yaml", "--model", "./t5", cwd=tmp_path), 2, "t5", "bert")


def test_an_unknown_model_name(onnxsqueeze: Command, tmp_path: Path) -> None:
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--model", "minlm", cwd=tmp_path),
        2,
        "model minlm: is neither a folder nor a known name; did you mean 'minilm'?",
    )


def test_an_output_folder_that_is_a_file(onnxsqueeze: Command, tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").touch()
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--model", model, "--out", "out", cwd=tmp_path),
        2,
        "output folder out: cannot be written to",
        "--out DIR",
    )


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MB that can be mounted read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_output_folder(onnxsqueeze: Command, tmp_path: Path, model: Path, mounted: Path, own_store: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    complain(
        onnxsqueeze("run", RECIPES / "q.yaml", "--model", model, "--out", mounted / "out", cwd=tmp_path),
        2,
        "cannot be written to: Read-only file system",
        "--out DIR",
    )
    assert not list((own_store / "artifacts").iterdir()), "nothing was started"


@pytest.mark.full
def test_a_full_disk_below_the_store(tmp_path: Path, model: Path, mounted: Path) -> None:
    (mounted / "ballast").write_bytes(bytes(6_000_000))
    words = ("run", RECIPES / "none.yaml", "--model", model, *sets("none"))
    complain(command(*words, cwd=tmp_path, env={"ONNXSQUEEZE_STORE": str(mounted / "store")}), 1, "the disk is full", "free some space")
    (mounted / "ballast").unlink()
    assert command(*words, cwd=tmp_path, env={"ONNXSQUEEZE_STORE": str(mounted / "store")}).returncode == 0


@pytest.mark.full
def test_a_full_disk_below_the_results(tmp_path: Path, model: Path, mounted: Path) -> None:
    (mounted / "ballast").write_bytes(bytes(6_200_000))
    words = ("run", RECIPES / "none.yaml", "--model", model, *sets("none"), "--out", mounted / "out")
    complain(command(*words, cwd=tmp_path), 1, "the disk is full", "--out")
    assert not list(mounted.rglob("*.onnx"))
    (mounted / "ballast").unlink()
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("in the store") == 2


@pytest.mark.full
def test_ctrl_c_is_one_line_and_loses_nothing(tmp_path: Path, model: Path, own_store: Path) -> None:
    words = ("run", RECIPES / "none.yaml", "--model", model, *sets("none"), "--set", "stages.finetune.epochs=12")
    process = subprocess.Popen(start_words(*words), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any((own_store / "checkpoints").glob("*/training.pt")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert (
        stderr.strip()
        .splitlines()[-1]
        .endswith("interrupted: finished stages and epochs are in the store; the same command goes on from there")
    )
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resumed in epoch" in again.stderr
    assert not list((own_store / "drafts").iterdir())


def test_a_report_of_something_that_is_no_run(onnxsqueeze: Command, tmp_path: Path) -> None:
    complain(onnxsqueeze("report", ".", cwd=tmp_path), 2, "results.json: cannot be read", "onnxsqueeze run")
    (tmp_path / "results.json").write_text('{"schema": 1')
    complain(onnxsqueeze("report", "results.json", cwd=tmp_path), 2, "is not a record of schema 1")


def test_the_store_of_these_tests_is_their_own(own_store: Path) -> None:
    assert Store.default_root() == own_store


def sets(recipe: str) -> list[str]:
    return [word for override in small(recipe) for word in ("--set", override)]
