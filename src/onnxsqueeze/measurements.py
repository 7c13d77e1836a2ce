"""Every measurement of a run's targets, each made once: the store finds it again by what was measured, with what, and where.

A measurement's key: digest of the files, backend, version of the runtime that ran them, CPU, threads, and what else its kind depends on.
``fresh`` measures anew.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel

from onnxsqueeze import environment, graph, timing, weights
from onnxsqueeze.artifact import MODEL_SUFFIX, Artifact, file_sha256
from onnxsqueeze.backends import Backends, Shared
from onnxsqueeze.entropy import bound_bytes, entropy_bytes
from onnxsqueeze.errors import MeasureError, SqueezeError
from onnxsqueeze.measure.golden import Golden, answers, sentences
from onnxsqueeze.measure.latency import Candidate, LatencyResult, measure_latency
from onnxsqueeze.measure.load import measure_load
from onnxsqueeze.measure.metric import evaluate, predict
from onnxsqueeze.measure.proof import proof
from onnxsqueeze.measure.settings import MeasureSettings
from onnxsqueeze.measure.size import measure_size
from onnxsqueeze.measure.work import FixedWork, TaskWork, Work
from onnxsqueeze.provenance import added_bytes
from onnxsqueeze.results import FileRecord, Load, Proof, SizeParts, WeightClass
from onnxsqueeze.stage import Progress
from onnxsqueeze.store import Store
from onnxsqueeze.tasks.metrics import said
from onnxsqueeze.tasks.rows import Row, SplitRows, TaskInfo, as_read, rows_sha256
from onnxsqueeze.timing import Timed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = Mapping[str, NDArray[np.float32]]  # per split: [rows, outputs]

SAMPLES_FOLDER = "samples"  # below the output folder
_CONTENT_VERSION = 4  # raise it when the same file is counted otherwise
_PROOF_RUNS, _PROOF_WARMUP = 20, 5
_LOAD_ROWS = 512  # of the task, in the file's order: enough for its mix of lengths, and quickly sent to a session's process

Record = TypeVar("Record", bound=BaseModel)


class Teller(Protocol):
    """The part of a run's watcher that measuring needs."""

    def begin(self, title: str) -> Progress:
        """A piece of work starts."""

    def end(self, text: str) -> None:
        """The piece of work that began last is done."""


class Content(BaseModel):
    """What lies in a target's folder, by the names of its record; files relative to the folder."""

    size_bytes: int
    size_gzip_bytes: int
    size_entropy_bytes: int
    size_dense_bytes: int
    size_dense_gzip_bytes: int
    size_dense_zstd_bytes: int
    size_bound_bytes: int | None
    size_parts_bytes: SizeParts
    tokenizer_bytes: int | None
    files: tuple[FileRecord, ...]
    weights: tuple[WeightClass, ...]
    operators: dict[str, int]


@dataclass(frozen=True)
class Subject:
    """What is measured: one target's files on its backend."""

    name: str
    backend: str
    artifact: Artifact


@dataclass(frozen=True)
class Measurements:
    """Measures subjects on one task's dev splits. Methods raise MeasureError where a model does not run, Unavailable where a backend does not start."""

    store: Store
    teller: Teller
    settings: MeasureSettings
    info: TaskInfo
    dev: Sequence[SplitRows]
    backends: Backends
    fresh: bool
    samples: dict[str, bytes] = field(default_factory=dict)  # file below the output folder → every run of one target at one work

    def content(self, artifact: Artifact) -> Content:
        """Sizes and weights of a folder; packing a file with gzip and zstd takes many seconds."""
        packers = {"zlib": zlib.ZLIB_RUNTIME_VERSION, **environment.versions(("pyarrow",))}
        causes = {"model": artifact.digest, "version": _CONTENT_VERSION, **packers}
        kept = self.store.measurement("content", causes)  # also where fresh: counting again gives the same
        if kept is not None:
            return Content.model_validate_json(kept)
        from onnxsqueeze.packing import files as packing

        size, file = measure_size(artifact.path), artifact.onnx
        dense = packing.dense(file)
        found = Content(
            **vars(size),
            size_entropy_bytes=entropy_bytes(file, dense),
            size_bound_bytes=bound_bytes(file, dense),
            size_parts_bytes=weights.by_part(file, dense),
            weights=weights.by_class(file, dense),
            operators=graph.operators(file),
        )
        self.store.keep_measurement("content", causes, found.model_dump_json(by_alias=True).encode())
        return found

    def published(self, artifact: Artifact, provenance: bytes) -> Content:
        """The content of the folder once ``provenance`` is appended to each of its .onnx files; nothing is packed again for it."""
        found, added = self.content(artifact), added_bytes(provenance)
        parts = found.size_parts_bytes
        return found.model_copy(
            update={
                "size_bytes": found.size_bytes + added["plain"],
                "size_gzip_bytes": found.size_gzip_bytes + added["gzip"],
                "size_dense_bytes": found.size_dense_bytes + added["plain"],
                "size_dense_gzip_bytes": found.size_dense_gzip_bytes + added["gzip"],
                "size_dense_zstd_bytes": found.size_dense_zstd_bytes + added["zstd"],
                "size_parts_bytes": parts.model_copy(update={"graph": parts.graph + added["plain"]}),
                "files": tuple(_appended(file, artifact, provenance) for file in found.files),
            }
        )

    def check_operators(self, subject: Subject) -> None:
        """Raise MeasureError where the file holds operators that the backend is known to have no kernel for."""
        refusal = self.backends.get(subject.backend).refusal(self.content(subject.artifact).operators)
        if refusal:
            raise MeasureError(f"{subject.name}: {refusal}", remedy="choose other stages for this backend")

    def runtime(self, backend: str) -> str | None:
        """The ONNX Runtime that measures a backend's targets, by distribution and version."""
        runtime = self.backends.get(backend).runtime
        return runtime.name if runtime else None

    def answers(self, subject: Subject) -> tuple[Logits, Golden]:
        """What one session of it says: to every row of the dev splits, and to a few generated sentences, for `onnxsqueeze verify`."""
        with closing(Shared(lambda: self.backends.open(subject.backend, subject.artifact.onnx, self.settings.threads))) as session:
            return self._logits(subject, session), self._golden(subject, session)

    def _logits(self, subject: Subject, session: Shared) -> Logits:
        """Per dev split, the logits of every row at the serving batch."""
        import numpy as np

        found = {}
        for split in self.dev:
            causes = self._causes(subject) | self._rows_causes(split) | {"batch": self.settings.batch}
            kept = self._kept("logits", causes)
            if kept is None:
                progress = self.teller.begin(f"{subject.name}: {self.info.primary} on {split.name}")
                values = predict(
                    subject.artifact.path,
                    subject.backend,
                    as_read(self.info, split),
                    self.info.max_length,
                    self.settings.batch,
                    self.settings.threads,
                    progress,
                    opener=session.open,
                )
                values = said(self.info, values)
                buffer = io.BytesIO()
                np.save(buffer, values, allow_pickle=False)
                kept = buffer.getvalue()
                self.store.keep_measurement("logits", causes, kept)
                score = evaluate(self.info, values, [row.label for row in split.rows])[self.info.primary]
                self.teller.end(f"{subject.name}: {self.info.primary} {score.value:.4f} on {split.name} ({score.n:,} rows)")
            found[split.name] = np.load(io.BytesIO(kept), allow_pickle=False)
        return found

    def _golden(self, subject: Subject, session: Shared) -> Golden:
        pairs = self._read()[0].text_pair is not None
        causes = {
            "max_length": self.info.max_length,
            "pairs": pairs,
            "vectors": self.info.embeds,
            "version": Golden.model_fields["version"].default,
        }

        def ask() -> Golden:
            asked = sentences(pairs=pairs)
            place, threads, longest = subject.artifact.path, self.settings.threads, self.info.max_length
            vectors = self.info.embeds
            return answers(place, subject.backend, threads, longest, asked, self.backends, vectors=vectors, opener=session.open)

        return self._recorded("golden", Golden, self._causes(subject) | causes, ask)

    def proof(self, subject: Subject) -> Proof:
        """What ran, at the shape that decides."""
        shape = self.settings.shape
        causes = {"shape": shape.model_dump(mode="json"), "runs": _PROOF_RUNS, "warmup": _PROOF_WARMUP}

        def profile() -> Proof:
            with closing(self.backends.open(subject.backend, subject.artifact.onnx, shape.threads)) as session:
                FixedWork(shape).hold(subject.artifact.onnx, session)
                nodes = session.profile(_PROOF_RUNS, uncounted=_PROOF_WARMUP)
            return proof(nodes, _PROOF_RUNS, self.content(subject.artifact).operators)

        return self._recorded("proof", Proof, self._causes(subject) | causes, profile)

    def load(self, subject: Subject) -> Load | None:
        """The scenarios of `measure_load` on rows of the first dev split; None where the settings do not ask for it."""
        settings = self.settings.load
        if settings is None:
            return None

        def run() -> Load:
            from onnxsqueeze.tokens import Encoder, pad

            progress = self.teller.begin(f"{subject.name}: under load")
            encoder = Encoder(subject.artifact.path, self.info.max_length)
            texts = self._read()[:_LOAD_ROWS]
            rows = encoder.encode([row.text for row in texts], [row.text_pair for row in texts])
            singles = [pad([row], encoder.pad_id) for row in rows]
            longest_first = sorted(rows, key=len, reverse=True)
            full = [pad(longest_first[at : at + settings.batch], encoder.pad_id) for at in range(0, len(rows), settings.batch)]
            with closing(self.backends.open(subject.backend, subject.artifact.onnx, self.settings.threads)) as session:
                found = measure_load(session, singles, full, settings, self.settings.threads, progress)
            self.teller.end(
                f"{subject.name}: one caller {found.single_stream_p90_ms:.2f} ms (p90), backlog {found.offline_rows_per_s:.0f} rows a second"
            )
            return found

        causes = (
            self._causes(subject) | self._rows_causes(self.dev[0]) | {"settings": settings.model_dump(mode="json"), "rows_used": _LOAD_ROWS}
        )
        return self._recorded("load", Load, causes, run)

    # ── latency ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def latencies(self, subjects: Sequence[Subject], baseline: str, failed: dict[str, SqueezeError]) -> dict[str, list[Timed]]:
        """Per subject of one backend, the measured works in order. What the store lacks is measured together, beside the baseline.

        A subject that cannot be measured is put into ``failed``; the others go on without it.
        """
        by_name = {subject.name: subject for subject in subjects}
        timed: dict[str, list[Timed]] = {name: [] for name in by_name}
        for work in self._works(by_name.get(baseline) or next(iter(subjects), None)):
            causes = {name: self._latency_causes(one, by_name.get(baseline), work) for name, one in by_name.items() if name not in failed}
            kept = {name: self._kept("latency", cause) for name, cause in causes.items()}
            lacking = [name for name, content in kept.items() if content is None]
            for name, result in self._measured_together(by_name, lacking, baseline, work, failed).items():
                # samples first: a latency that is found has its samples
                self.store.keep_measurement("samples", causes[name], timing.packed(result))
                kept[name] = timing.timed(result).to_json()
                self.store.keep_measurement("latency", causes[name], kept[name] or b"")
            for name, content in kept.items():
                if content is not None:
                    timed[name].append(self._with_samples(Timed.from_json(content), name, causes[name]))
        return timed

    def _works(self, by: Subject | None) -> list[Work]:
        """The shape that decides, then the others, then the task's rows; their median length by the tokenizer of ``by``. None where latency is not asked for."""
        if not self.settings.latency:
            return []
        works: list[Work] = [FixedWork(shape) for shape in self.settings.all_shapes]
        if self.settings.task_lengths and by is not None:
            texts = [(row.text, row.text_pair) for row in self._read()]
            works.append(TaskWork.of(texts, by.artifact.path, self.info.max_length, self.settings.batch, self.settings.threads))
        return works

    def _read(self) -> Sequence[Row]:
        """The rows of the first dev split as the models read them."""
        return as_read(self.info, self.dev[0]).rows

    def _with_samples(self, timed: Timed, name: str, causes: Mapping[str, Any]) -> Timed:
        """The same, with the name of the file that keeps every run; its content goes into `samples`."""
        content, latency = self.store.measurement("samples", causes), timed.latency
        if content is None:
            return timed
        tokens = latency.sequence if latency.lengths == "fixed" else latency.lengths
        file = f"{SAMPLES_FOLDER}/{name}-{latency.batch}x{tokens}x{latency.threads}.npz"
        self.samples[file] = content
        return replace(timed, latency=latency.model_copy(update={"samples": file}))

    def _measured_together(
        self, by_name: Mapping[str, Subject], names: Sequence[str], baseline: str, work: Work, failed: dict[str, SqueezeError]
    ) -> dict[str, LatencyResult]:
        """The subjects ``names`` in turns with the baseline; where that fails, each alone beside it, so that the culprit is known."""
        if not names:
            return {}
        has_base = baseline in by_name and baseline not in failed
        together = [by_name[name] for name in dict.fromkeys([*([baseline] if has_base else []), *names])]
        candidates = [Candidate(one.name, one.artifact.onnx, one.backend) for one in together]
        title = f"latency on {together[0].backend}: {work}"
        progress = self.teller.begin(title)
        try:
            results = measure_latency(candidates, baseline if has_base else None, work, self.settings, progress, opener=self.backends.open)
        except MeasureError as error:
            if len(names) == 1:
                failed[names[0]] = error
                self.teller.end(f"{names[0]}: failed: {error.message}")
                return {}
            alone: dict[str, LatencyResult] = {}
            for name in names:
                alone |= self._measured_together(by_name, [name], baseline, work, failed)
            return alone
        self.teller.end(f"{title}: " + ", ".join(f"{one.name} {results[one.name].latency.p50_ms:.2f} ms" for one in together))
        return {name: _with_text(results[name], by_name[name], work) for name in names}

    def _latency_causes(self, subject: Subject, base: Subject | None, work: Work) -> dict[str, Any]:
        causes: dict[str, Any] = self._causes(subject) | {
            "threads": work.shape.threads,
            "baseline": base.artifact.digest if base else None,
            "shape": work.shape.model_dump(mode="json"),
            "settings": self.settings.model_dump(mode="json", include={"processes", "min_runs", "min_seconds"}),
        }
        return causes | (self._rows_causes(self.dev[0]) | {"lengths": "task"} if isinstance(work, TaskWork) else {})

    # ── the store ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _recorded(self, kind: str, record: type[Record], causes: Mapping[str, Any], make: Callable[[], Record]) -> Record:
        """The record of these causes, found or made."""
        kept = self._kept(kind, causes)
        if kept is not None:
            return record.model_validate_json(kept)
        found = make()
        self.store.keep_measurement(kind, causes, found.model_dump_json(by_alias=True).encode())
        return found

    def _kept(self, kind: str, causes: Mapping[str, Any]) -> bytes | None:
        return None if self.fresh else self.store.measurement(kind, causes)

    def _causes(self, subject: Subject) -> dict[str, Any]:
        return {
            "model": subject.artifact.digest,
            "backend": subject.backend,
            "runtime": self.runtime(subject.backend),
            **environment.processors(),
            "threads": self.settings.threads,
        }

    def _rows_causes(self, split: SplitRows) -> dict[str, Any]:
        tokenizers = environment.versions(("tokenizers",))
        return {
            "rows": rows_sha256(split.rows),
            "tokenizers": tokenizers,
            "max_length": self.info.max_length,
            **({"compare": self.info.compare} if self.info.embeds else {}),
        }


def _appended(file: FileRecord, artifact: Artifact, provenance: bytes) -> FileRecord:
    if not file.path.endswith(MODEL_SUFFIX):
        return file
    return FileRecord(path=file.path, sha256=file_sha256(artifact.path / file.path, provenance), bytes=file.bytes + len(provenance))


def _with_text(result: LatencyResult, subject: Subject, work: Work) -> LatencyResult:
    """With the times from text to ids and from text to logits beside the model's, where the work begins with text."""
    if not isinstance(work, TaskWork):
        return result
    import numpy as np

    from onnxsqueeze.measure.statistics import nearest_rank

    text = work.text(subject.artifact.onnx, np.concatenate(result.samples_ms))
    found = {"text_p50_ms": nearest_rank(text.tokenize_ms, 50), "whole_p50_ms": nearest_rank(text.whole_ms, 50)}
    return replace(result, latency=result.latency.model_copy(update=found))
