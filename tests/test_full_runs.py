"""Every recipe, all but five on the real MiniLM, a run on real GLUE files, and an installation without neural-compressor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from models import random_checkpoint
from onnxsqueeze.recipe import load
from onnxsqueeze.results import read_results
from onnxsqueeze.tasks.toy import LABELS, toy_rows
from runs import RECIPES, ROOT, SMALL, run
from test_embedding import pairs

pytestmark = pytest.mark.full

# quantize-auto quantizes MiniLM forty times, neural-compressor may try thirty configurations, half a minute each; two modules, one trial and few rows show as much of a recipe
FEWER = {
    "quantization": [
        "targets.dynamic-auto.stages.quantize-auto.quantizer={kind: quantize-dynamic, op_types: [Gather]}",
        "targets.static-auto.stages.quantize-auto.quantizer={kind: quantize-static, op_types: [Gemm]}",
        "targets.inc-tuned.stages.quantize-inc.max_drop_pp=100",
        *(f"targets.inc-{name}.stages.quantize-inc.samples=8" for name in ("static", "qdq", "smooth", "tuned")),
        "targets.vocabulary-4.stages.quantize-weights.block_size=16",
    ],
    # to tune is minutes; test_stage_optimize_graph.py does
    "backends": ["targets.int8-tuned.stages.optimize-graph.tune=false"],
    # hardly trained, exits disagree with the end: any loss will do for a threshold
    "early-exit": [f"targets.early-exit-{form}.stages.branch-exits.max_drop_pp=100" for form in ("fp32", "int8")],
    "size": ["stages.table.vocabulary_rank=16", *(f"stages.cut-{part}.multiple_of=4" for part in ("quarter", "eighth"))],
    "fastest": [f"targets.{name}.stages.optimize-graph.tune=false" for name in ("int8", "fastest")],
}


# 22 targets, or files of many zeros and few values, each of which gzip -9 works on for up to half a minute: reports/ has them on MiniLM
ON_SMALL = ("quantization", "prune-weights", "cluster-weights", "train-low-bit", "size")
TIMED_RECIPES = ("qdp", "early-exit", "drop-tokens")  # of the last two the time of a call depends on the row


def few_rows(place: Path, *, scores: bool) -> list[str]:
    """Overrides that put files of 800 generated rows to train on and 120 dev rows in the place of a recipe's task."""
    for name, seed, n in (("train", 1, 800), ("dev", 2, 120)):
        if scores:
            held = [{"text": row.text, "other": row.text_pair, "label": row.label} for row in pairs(n, seed).rows]
        else:
            held = [{"text": row.text, "label": LABELS[int(row.label)]} for row in toy_rows(n, seed)]
        (place / f"{name}-{scores}.jsonl").write_text("\n".join(map(json.dumps, held)), encoding="utf-8")
    about = "text_pair: other, metric: [spearman, pearson], compare: cosine" if scores else f"labels: [{', '.join(LABELS)}]"
    files = f"train: {place / f'train-{scores}.jsonl'}, dev: {place / f'dev-{scores}.jsonl'}"
    return [f"task={{{files}, {about}, max_length: 48, train_rows: 160}}"]


def one_epoch(file: Path) -> list[str]:
    """Overrides by which every stage of a recipe trains for one epoch."""
    recipe = load(file).recipe
    places = [("stages", recipe.stages), *((f"targets.{target.name}.stages", target.stages) for target in recipe.targets)]
    return [f"{place}.{stage.name}.epochs=1" for place, stages in places for stage in stages if "epochs" in type(stage).model_fields]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers: recipes have their teacher, its exports and their scores in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_runs(file: Path, place: Path, store: Path) -> None:
    timed = str(file.stem in TIMED_RECIPES).lower()
    overrides = [
        *few_rows(place, scores=file.stem == "embed"),
        *one_epoch(file),
        f"measure={{sequence: 32, shapes: [], processes: 2, min_runs: 20, min_seconds: 0, task_lengths: false, latency: {timed}}}",
        *FEWER.get(file.stem, ()),
    ]
    model = Path("minilm")
    if file.stem in ON_SMALL:
        deep = {"layers": 6, "heads": 8} if file.stem == "size" else {}
        model = random_checkpoint(place / f"small-{file.stem}", "bert", head=False, **deep)
    outcome, _ = run(file, place / file.stem, model=model, store=store, overrides=overrides)
    assert outcome.exit_code == 0, outcome.problems
    for target in outcome.results.targets:
        assert target.status == "ok" or (target.backend != "cpu" and target.status == "skipped"), target.reason
        assert target.size_bytes
    assert outcome.results.targets[0].baseline
    measured = [t for t in outcome.results.targets if t.status == "ok"]
    quantized = [t for t in measured if "int8" in t.name or t.name.startswith(("q-", "qd-", "qp-", "qdp-"))]
    for target in quantized if model == Path("minilm") else ():
        assert target.vs_baseline
        assert target.vs_baseline.size_ratio > 3.8, "int8 is near a quarter of fp32, embeddings included"
    if file.stem in ("smallest", "fastest"):
        found = {target.name: target for target in measured}
        assert (found[file.stem].size_bytes or 0) < (found["int8"].size_bytes or 0)
        config = json.loads((place / file.stem / file.stem / "config.json").read_text())
        assert config["onnxsqueeze"]["neurons"][0] < config["intermediate_size"]
        assert config["onnxsqueeze"].get("vocabulary_rank") == (128 if file.stem == "smallest" else None)
    if file.stem == "early-exit":
        assert [target.name for target in measured if "If" in (target.operators or {})] == ["early-exit-fp32", "early-exit-int8"]


def real_glue(place: Path, task: str) -> Path:
    """The folder of the real GLUE files; of tasks with ten thousand dev rows and more (test_tasks_open.py reads them whole) the first lines of each."""
    folder = os.environ.get("ONNXSQUEEZE_GLUE_DIR")
    if not folder:
        pytest.skip("ONNXSQUEEZE_GLUE_DIR does not name GLUE's files")
    large = {"mnli": "MNLI", "qnli": "QNLI"}.get(task)
    if not large:
        return Path(folder)
    few = place / "few" / large
    few.mkdir(parents=True)
    for file in (Path(folder) / large).glob("*.tsv"):
        with file.open(encoding="utf-8", newline="") as lines:
            (few / file.name).write_text(
                "".join(islice(lines, 2001 if file.stem.startswith("train") else 301)), encoding="utf-8", newline=""
            )
    return few.parent


@pytest.mark.parametrize("task", ["sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_a_run_on_real_glue_files(task: str, place: Path, store: Path) -> None:
    folder = real_glue(place, task)
    overrides = (*SMALL, "targets.int8-inc.stages.quantize-inc.approach=static")
    outcome, _ = run("q", place / f"q-{task}", model=small_model(place), store=store, overrides=overrides, task=task, data_dir=folder)
    assert outcome.exit_code == 0, outcome.problems
    record = read_results(outcome.out)
    assert record.task.name == task
    assert [split.role for split in record.task.training] == ["train", "selection"]
    for target in record.targets:
        for split in record.task.splits:
            assert target.metrics[split.name][record.task.primary].n == split.n
    text = (outcome.out / "results.json").read_text() + (outcome.out / "report.md").read_text()
    assert str(folder) not in text


def test_embed_runs_on_the_real_sts_b(place: Path, store: Path) -> None:
    overrides = [*(one for one in SMALL if "finetune" not in one), "stages.distill.layers=1", "stages.distill.epochs=1"]
    folder = real_glue(place, "stsb")
    outcome, _ = run("embed", place / "embed-stsb", model=small_model(place), store=store, overrides=overrides, data_dir=folder)
    assert outcome.exit_code == 0, outcome.problems
    assert outcome.results.task.compare == "cosine"
    assert {target.metrics["validation"]["spearman"].n for target in outcome.results.targets} == {1500}


def small_model(place: Path) -> Path:
    model = place / "model"
    return model if model.exists() else random_checkpoint(model, "bert", layers=2, head=False)


def test_without_neural_compressor_everything_else_works(place: Path) -> None:
    """numpy 2 and the newest onnx, in an environment of its own."""
    venv = place / "venv"
    python = venv / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints-latest.txt", "--editable", ROOT],
        check=True,
        timeout=600,
    )
    model = random_checkpoint(place / "headless", "bert", layers=2, head=False)
    sets = [word for override in SMALL for word in ("--set", override)]
    words: list[str | Path] = [python, "-m", "onnxsqueeze", "run", RECIPES / "q.yaml", "--model", model, "--out", place / "latest", *sets]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "ONNXSQUEEZE_STORE": str(place / "latest-store")}
    )
    assert done.returncode == 0, done.stderr
    rows = {target["name"]: target for target in json.loads((place / "latest" / "results.json").read_text())["targets"]}
    assert rows["int8-ort"]["status"] == "ok"
    assert rows["int8-inc"]["status"] == "skipped"
    assert rows["int8-inc"]["reason"] == "neural-compressor is not installed"
    assert "onnxsqueeze[inc]" in rows["int8-inc"]["remedy"]
    versions = json.loads((place / "latest" / "results.json").read_text())["environment"]["versions"]
    assert int(versions["numpy"].split(".")[0]) >= 2
