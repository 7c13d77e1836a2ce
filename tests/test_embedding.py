"""Models that embed: from a plain encoder to an .onnx that gives vectors, with every stage that is for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers import AutoModel, AutoTokenizer

from crossed import first
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_rows
from onnxsqueeze.backends import HERE
from onnxsqueeze.errors import RecipeError, StageError, UsageError
from onnxsqueeze.nn import checkpoint, losses, training
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.embedder import pooled
from onnxsqueeze.prepare import Request, prepare
from onnxsqueeze.stage import Context, Stage
from onnxsqueeze.stages.cluster_weights import ClusterWeights
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.factorize import Factorize
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.prune_vocabulary import PruneVocabulary
from onnxsqueeze.stages.prune_weights import PruneWeights
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.share_layers import ShareLayers
from onnxsqueeze.stages.train_low_bit import TrainLowBit
from onnxsqueeze.stages.train_quantized import TrainQuantized
from onnxsqueeze.tasks.metrics import primary, said
from onnxsqueeze.tasks.rows import UNLABELLED, Row, SplitRows, TaskInfo, as_read
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.verify import verify
from runs import RECIPES, SMALL, TIMED, run

TASK = TaskInfo("pairs", (), ("spearman", "pearson"), "spearman", 32, compare="cosine")
QUICK = {"epochs": 1, "batch_size": 16, "precision": "fp32"}


def pairs(n: int, seed: int) -> SplitRows:
    """Pairs of toy sentences with a score: how many words they share."""
    rows = toy_rows(n, seed=seed, pairs=True)
    shared = [len(set(row.text.split()) & set((row.text_pair or "").split())) for row in rows]
    scored = tuple(replace(row, label=float(score)) for row, score in zip(rows, shared, strict=True))
    return SplitRows("selection", scored, "generated", "1" * 64, "selection")


def embedding_context(folder: Path) -> Context:
    """A stage's context whose model embeds."""
    selection = pairs(32, 5)
    labels = [row.label for row in selection.rows]
    return replace(
        toy_context(folder),
        task=TASK,
        train=as_read(TASK, replace(pairs(32, 6), role="train")),
        selection=as_read(TASK, selection),
        select=lambda outputs: primary(TASK, said(TASK, outputs), labels),
    )


def embed(stage: Stage, parent: Path, folder: Path, *, teacher: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return run_stage(stage, parent, folder, teacher=teacher, context=embedding_context(folder))[0]


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]


def vectors(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    """What a stock session says to these texts, in one call."""
    tokens = tokenizer(folder)(texts, padding=True, return_tensors="np")
    session = ort.InferenceSession(str(folder / "model.onnx"))
    (found,) = session.run(None, {one.name: tokens[one.name].astype(np.int64) for one in session.get_inputs()})
    return np.asarray(found)


def test_a_models_rows_are_single_texts_and_a_pairs_score_is_the_cosine_of_its_vectors() -> None:
    split = SplitRows("train", (Row("a", "b", 1.0), Row("b", "c", 2.0)), "x", "0", "train")
    assert [row.text for row in as_read(TASK, split).rows] == ["a", "b", "c"]
    assert [row.text for row in as_read(TASK, replace(split, role="dev")).rows] == ["a", "b", "b", "c"]
    assert {row.label for row in as_read(TASK, split).rows} == {UNLABELLED}
    outputs = np.array([[1, 0], [0, 2], [3, 3], [1, 1]], np.float32)
    np.testing.assert_allclose(said(TASK, outputs), [[0.0], [1.0]], atol=1e-7)
    assert as_read(replace(TASK, compare=None), split) is split


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_has_no_part_in_a_vector_of_length_1(pooling: str) -> None:
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = pooled(states, mask, pooling)  # type: ignore[arg-type]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found[0], pooled(states[:1, :3], mask[:1, :3], pooling)[0])  # type: ignore[arg-type]


def test_the_losses_are_what_their_names_say() -> None:
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert losses.cosine(one, 5 * one).item() == pytest.approx(0)
    assert losses.cosine(one, one.flip(0)).item() == pytest.approx(1)
    assert losses.similarities(one, other).item() == pytest.approx(1)  # orthogonal here, alike there; widths differ
    assert losses.similarities(one[:1], other[:1]).item() == 0


@first("name", FAMILIES)
def test_the_file_gives_the_encoders_mean_of_states_and_reloads_as_a_plain_encoder(tmp_path: Path, name: FamilyName) -> None:
    model = random_checkpoint(tmp_path / "model", name, head=False)
    student = embed(Distill(layers=1, **QUICK), model, tmp_path / "student", teacher=model)
    out = embed(Export(), student, tmp_path / "file")
    texts = ["the plot was dull", "a great , great movie with music and a dog"]
    encoder, info = AutoModel.from_pretrained(student, output_loading_info=True)
    assert not {key for key in info["missing_keys"] if "pooler" not in key}
    assert json.loads((student / "config.json").read_text())["architectures"][0].endswith("Model")
    tokens = tokenizer(student)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = encoder(**{key: tokens[key] for key in tokens if key != "token_type_ids" or name in ("bert", "electra")}).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    mean = (states * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(vectors(out, texts), mean / mean.norm(dim=1, keepdim=True), atol=2e-6)
    assert ort.InferenceSession(str(out / "model.onnx")).get_outputs()[0].name == "sentence_embedding"


@pytest.mark.parametrize(
    "stage",
    [
        Distill(layers=1, alpha_attention=1.0, other_words=1, **QUICK),
        pytest.param(PruneWeights(**QUICK), marks=pytest.mark.full),
        PruneVocabulary(),
        Factorize(vocabulary_rank=8, **QUICK),
        ShareLayers(distinct=1, start="even", **QUICK),
        TrainQuantized(**QUICK),
        pytest.param(TrainLowBit(**QUICK), marks=pytest.mark.full),
        ClusterWeights(importance="magnitude", **QUICK),
    ],
    ids=lambda stage: stage.kind,
)
def test_every_stage_for_them_ends_in_an_int8_file_near_its_checkpoint(tmp_path: Path, stage: Stage) -> None:
    model = random_checkpoint(tmp_path / "model", "bert", head=False)
    after = embed(stage, model, tmp_path / "after", teacher=model)
    exported = embed(Export(), after, tmp_path / "exported")
    small = embed(OptimizeGraph(), embed(QuantizeDynamic(), exported, tmp_path / "int8"), tmp_path / "small")
    texts = [row.text for row in pairs(8, 7).rows]
    kept, family = checkpoint.load(after, TASK)
    exact = training.predict(kept, family, encode(after, [Row(text, None, UNLABELLED) for text in texts], 32))
    assert ((exact * vectors(exported, texts)).sum(1) > 1 - 1e-5).all()
    assert ((exact * vectors(small, texts)).sum(1) > 0.99).all()


def test_a_student_of_another_width_learns_from_how_texts_compare_and_says_so_where_it_should_learn_vectors(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert", hidden=64, head=False)
    student = random_checkpoint(tmp_path / "small", "bert", hidden=16, head=False)
    alike = Distill(
        student=str(student), alpha_logits=0, alpha_hidden=0, alpha_similarities=1, **{**QUICK, "epochs": 6, "learning_rate": 5e-3}
    )
    (tmp_path / "one").mkdir()
    _, changed = run_stage(alike, teacher, tmp_path / "one", teacher=teacher, context=embedding_context(tmp_path / "one"))
    history = [entry["loss"] for entry in changed.details["history"]]
    assert 0 < history[-1] < history[0]
    (tmp_path / "two").mkdir()
    with pytest.raises(StageError, match="alpha_logits: the student's vectors are 16 wide, the teacher's 64"):
        run_stage(
            Distill(student=str(student), alpha_hidden=0, **QUICK),
            teacher,
            tmp_path / "two",
            teacher=teacher,
            context=embedding_context(tmp_path / "two"),
        )


def test_similarities_without_vectors_and_choices_by_labels_are_refused(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    with pytest.raises(StageError, match="alpha_similarities: is for models that embed"):
        run_stage(Distill(layers=1, alpha_similarities=1, **QUICK), teacher, tmp_path, teacher=teacher)
    with pytest.raises(StageError, match="without labels"):
        embed(Distill(layers=1, choose="useful", **QUICK), teacher, tmp_path / "useful", teacher=teacher)


@pytest.mark.parametrize(
    "task",
    [
        {"name": "sst2", "compare": "cosine"},
        {"name": "toy", "compare": "cosine"},
        {"train": "a.csv", "dev": "b.csv", "metric": "spearman", "compare": "cosine"},
        {"train": "a.csv", "dev": "b.csv", "text_pair": "other", "compare": "cosine"},
    ],
)
def test_a_task_without_pairs_and_scores_has_nothing_to_compare(task: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="`compare` is for pairs of texts with a score"):
        TaskSettings.model_validate(task)
    if "name" in task:
        with pytest.raises(UsageError, match=f"--task {task['name']}: .*`compare` is for pairs"):
            prepare(Request(RECIPES / "embed.yaml", task=task["name"]))


@pytest.mark.full
def test_embed_from_pairs_to_a_verified_file(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", "bert", head=False)
    for name, seed, n in (("train", 1, 600), ("dev", 2, 40)):
        lines = [json.dumps({"one": row.text, "two": row.text_pair, "score": row.label}) for row in pairs(n, seed).rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    own = "{train: train.jsonl, dev: dev.jsonl, text: one, text_pair: two, label: score, metric: [spearman, pearson], compare: cosine, max_length: 32}"
    recipe = tmp_path / "embed.yaml"
    recipe.write_text((RECIPES / "embed.yaml").read_text().replace("{name: stsb, compare: cosine}", own), encoding="utf-8")
    overrides = [
        *(one for one in SMALL if one.startswith("measure")),
        *TIMED,
        "stages.distill.epochs=1",
        "stages.distill.layers=1",
        "measure.task_lengths=true",
    ]
    outcome, _ = run(recipe, tmp_path / "out", model=model, store=tmp_path / "store", overrides=overrides)
    assert outcome.exit_code == 0, outcome.problems
    record = outcome.results
    found = {target.name: target for target in record.targets}
    assert (record.task.compare, record.task.pooling, record.task.primary) == ("cosine", "mean", "spearman")
    assert found["small-int8"].metrics["validation"]["spearman"].n == 40
    assert {target.latencies[-1].lengths for target in found.values()} == {"task"}

    dev = pairs(40, 2)
    said_here = vectors(outcome.out / "fp32", [text for row in dev.rows for text in (row.text, row.text_pair or "")])
    value = primary(TASK, said(TASK, said_here), [row.label for row in dev.rows])
    assert found["fp32"].metrics["validation"]["spearman"].value == pytest.approx(value, abs=1e-4)
    findings = verify(outcome.out / "small-int8", data_dir=None, progress=lambda *_: None, backends=HERE)
    by = {finding.what: finding for finding in findings}
    assert by["files"].passed
    assert by["outputs"].passed
    assert by["outputs"].text.startswith("largest difference of a component")

    for stage in ("prune-structure", "finetune, force: true"):
        refused = recipe.read_text().replace("stages:\n", f"stages:\n  - {{kind: {stage}}}\n", 1)
        if stage.startswith("finetune"):
            refused = refused.replace("after: model", "after: finetune")
        (tmp_path / "refused.yaml").write_text(refused, encoding="utf-8")
        with pytest.raises(RecipeError, match="is not for models that embed"):
            run(tmp_path / "refused.yaml", tmp_path / "no", model=model, store=tmp_path / "store")
