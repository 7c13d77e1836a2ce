"""One target of a finished run: its files, checked against the record, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, SIDE_FILES, file_sha256
from onnxsqueeze.errors import UsageError, nearest
from onnxsqueeze.measure import golden
from onnxsqueeze.measure.golden import GOLDEN_FILE, Golden
from onnxsqueeze.nn.checkpoint import read_config
from onnxsqueeze.provenance import Provenance, decode, recipe_of
from onnxsqueeze.results import FileRecord, Latency, MetricValue, Results, Target, read_results
from onnxsqueeze.text.note import TextNote

TEXT_FILE = "model_text.onnx"


@dataclass(frozen=True)
class TextModel:
    """The same model with its tokenizer in the graph: the bytes of the .onnx, and what is known of how it tokenizes."""

    content: bytes
    note: TextNote


@dataclass(frozen=True)
class Source:
    """A measured target. ``model`` are the .onnx and its external data, ``beside`` its tokenizer and configuration, by their name below ``folder``.

    ``baseline`` is its backend's baseline as it was measured in the same run, None where this is it or where there was none.
    """

    folder: Path
    record: Results
    target: Target
    baseline: Target | None
    model: tuple[str, ...]
    beside: tuple[str, ...]
    golden: Golden
    provenance: Provenance
    recipe: str
    text: TextModel | None = None

    @property
    def metric(self) -> MetricValue:
        """The primary metric on the first dev split."""
        return self.target.metrics[self.record.task.splits[0].name][self.record.task.primary]

    @property
    def embeds(self) -> bool:
        """Whether the model gives vectors."""
        return self.record.task.compare is not None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes by index, as config.json names them; empty where it names none."""
        names = read_config(self.folder).get("id2label") or {}
        return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))

    def files(self, model_folder: str = "") -> dict[str, Path | bytes]:
        """Where each file goes (relative, with ``/``) → where it lies: the model below ``model_folder``, the others at the top."""
        inside = f"{model_folder}/" if model_folder else ""
        moved: dict[str, Path | bytes] = {f"{inside}{name}": self.folder / name for name in self.model}
        if self.text:
            moved[f"{inside}{TEXT_FILE}"] = self.text.content
        return moved | {name: self.folder / name for name in self.beside}

    def results(self, moved: Mapping[str, Path | bytes], model: str) -> Results:
        """The record of this target alone, for a folder that holds the files ``moved`` with the .onnx at ``model``; see `files`."""
        files = tuple(_recorded(name, content) for name, content in sorted(moved.items()))
        target = self.target.model_copy(
            update={
                "model": model,
                "files": files,
                "latency": _without_samples(self.target.latency),
                "latencies": tuple(one for one in map(_without_samples, self.target.latencies) if one),
            }
        )
        return self.record.model_copy(update={"targets": (target,)})


def find(run: Path, name: str) -> Source:
    """The target ``name`` of the run whose output folder (or results.json) is ``run``.

    Raises DataError where there is no record, UsageError where it has no such target, where that was not measured, or where its files are
    not those that were, ModelError where its external data lies outside its folder.
    """
    record = read_results(run)
    folder = (run if run.is_dir() else run.parent) / name
    target = next((one for one in record.targets if one.name == name), None)
    if target is None:
        raise UsageError(f"--target {name}: the run has no such target{nearest(name, [one.name for one in record.targets])}")
    if target.status != "ok":
        raise UsageError(
            f"--target {name}: was not measured ({target.status}: {target.reason}); what has no record is not deployed",
            remedy=target.remedy or "run it again where its backend starts",
        )
    if not (folder / MODEL_FILE).is_file():
        raise UsageError(
            f"{folder / MODEL_FILE}: is not there", remedy="name the output folder of `onnxsqueeze run`, with its folder per target"
        )
    model = tuple(path.relative_to(folder).as_posix() for path in graph.files_of(folder / MODEL_FILE))
    recorded = {file.path.removeprefix(f"{name}/"): file.sha256 for file in target.files}
    wrong = [one for one, digest in recorded.items() if not (folder / one).is_file() or file_sha256(folder / one) != digest]
    if wrong or not set(model) <= recorded.keys():
        named = ", ".join(wrong or sorted(set(model) - recorded.keys()))
        raise UsageError(
            f"{name}: {named}: not what was measured (missing, or sha256 differs)",
            remedy="run it again: the same `onnxsqueeze run` puts the measured files back from the store",
        )
    provenance, text = decode(graph.read(folder / MODEL_FILE), f"{name}/{MODEL_FILE}")
    return Source(
        folder=folder,
        record=record,
        target=target,
        baseline=next((one for one in record.targets if target.vs_baseline and one.name == target.vs_baseline.baseline), None),
        model=model,
        beside=tuple(one for one in (*SIDE_FILES, GOLDEN_FILE) if (folder / one).is_file()),
        golden=golden.read(folder),
        provenance=provenance,
        recipe=recipe_of(provenance, text, f"{name}/{MODEL_FILE}"),
    )


def _recorded(name: str, content: Path | bytes) -> FileRecord:
    if isinstance(content, Path):
        return FileRecord(path=name, sha256=file_sha256(content), bytes=content.stat().st_size)
    return FileRecord(path=name, sha256=sha256(content).hexdigest(), bytes=len(content))


def _without_samples(latency: Latency | None) -> Latency | None:
    """Every single run stays in the run's folder."""
    return latency and latency.model_copy(update={"samples": None})
