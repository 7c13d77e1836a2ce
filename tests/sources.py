"""What `deploy` takes, without a run: a real small model with real golden answers, and a FIXTURE record (its figures are invented)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from exports import build
from models import FamilyName, artifact, random_checkpoint, toy_context, toy_task
from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, SIDE_FILES, Artifact, file_sha256
from onnxsqueeze.backends import HERE
from onnxsqueeze.deploy.source import Source
from onnxsqueeze.measure import golden
from onnxsqueeze.provenance import Provenance, encode
from onnxsqueeze.results import FileRecord, Results, Target
from onnxsqueeze.stages.export import Export
from records import qdp_results

RECIPE = "schema: 1\nname: tried\n"


def provenance(target: str, backend: str) -> Provenance:
    return Provenance(
        onnxsqueeze="0.1.0", target=target, backend=backend, stages=("export",), recipe="tried", recipe_sha256="c0" * 32, model="tiny",
        model_sha256="53" * 32, task="words", rows=(), seed=0, versions={},
    )  # fmt: skip


def source_of(made: Artifact, folder: Path, *, pairs: bool = False, vectors: bool = False, target: dict[str, Any] | None = None) -> Source:
    """The published model ``made`` at ``folder``, as `find` would give it; ``target`` are changes to the record."""
    shutil.copytree(made.path, folder)
    noted = provenance("tried", "cpu")
    with (folder / MODEL_FILE).open("ab") as handle:
        handle.write(encode(noted, RECIPE))
    known = golden.answers(folder, "cpu", 1, 32, golden.sentences(pairs=pairs), HERE, vectors=vectors)
    (folder / golden.GOLDEN_FILE).write_text(known.to_json())
    beside = tuple(name for name in (*SIDE_FILES, golden.GOLDEN_FILE) if (folder / name).is_file())
    model = tuple(path.name for path in graph.files_of(folder / MODEL_FILE))
    record, one = record_of(folder, [*model, *beside], target or {})
    if vectors:
        record = record.model_copy(update={"task": record.task.model_copy(update={"compare": "cosine", "pooling": "mean"})})
    return Source(folder, record, one, None, model, beside, known, noted, RECIPE)


def record_of(folder: Path, names: list[str], changes: dict[str, Any]) -> tuple[Results, Target]:
    record = qdp_results()
    files = tuple(FileRecord(path=f"tried/{n}", sha256=file_sha256(folder / n), bytes=(folder / n).stat().st_size) for n in names)
    target = next(t for t in record.targets if t.name == "fp32").model_copy(
        update={
            "name": "tried",
            "model": f"tried/{MODEL_FILE}",
            "files": files,
            "size_bytes": (folder / MODEL_FILE).stat().st_size,
            **changes,
        }
    )
    task = record.task.model_copy(update={"name": "words", "max_length": 32})
    return record.model_copy(update={"targets": (target,), "task": task, "model": "tiny"}), target


def exported(place: Path, family: FamilyName, *, outputs: int = 2) -> Artifact:
    """A random one-layer model of ``family`` as `export` writes it."""
    from dataclasses import replace

    context = replace(toy_context(place / "context", outputs=outputs), task=toy_task(outputs))
    parent = artifact(named(random_checkpoint(place / "checkpoint", family, layers=1, outputs=outputs), context.task.labels))
    return build(Export(kind="export"), parent, place / "fp32", context)[0]


def named(folder: Path, labels: tuple[str, ...]) -> Path:
    """The checkpoint ``folder`` with names of its classes, where it has classes."""
    if labels:
        config = json.loads((folder / "config.json").read_text()) | {"id2label": {str(i): label for i, label in enumerate(labels)}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder
