"""From finished files to records: measures each target, compares it with its backend's baseline, judges its gates.

Measurements are found again by what they measured (digest of the files, backend, version of the runtime that ran them, CPU, threads, shape,
settings); ``fresh`` measures anew.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from onnxsqueeze import environment, graph, timing, weights
from onnxsqueeze.artifact import MODEL_FILE, Artifact
from onnxsqueeze.backends import Backends
from onnxsqueeze.errors import MeasureError, SqueezeError, Unavailable, without_paths
from onnxsqueeze.measure.golden import Golden, answers, sentences
from onnxsqueeze.measure.latency import Candidate, LatencyResult, measure_latency
from onnxsqueeze.measure.metric import compare, evaluate, predict, quality
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.size import measure_size
from onnxsqueeze.plan import Branch
from onnxsqueeze.recipe import Gates
from onnxsqueeze.results import FileRecord, Gate, MetricDelta, StageRecord, Target, VsBaseline, WeightClass
from onnxsqueeze.stage import Progress
from onnxsqueeze.store import Store, key_of
from onnxsqueeze.tasks.rows import SplitRows, TaskInfo, rows_sha256
from onnxsqueeze.timing import Timed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = Mapping[str, NDArray[np.float32]]  # per split: [rows, outputs]


class Teller(Protocol):
    """The part of a run's watcher that measuring needs."""

    def begin(self, title: str) -> Progress:
        """A piece of work starts."""

    def end(self, text: str) -> None:
        """The piece of work that began last is done."""


@dataclass(frozen=True)
class Made:
    """A target after its stages: its artifact, or why there is none."""

    branch: Branch
    artifact: Artifact | None
    stages: tuple[StageRecord, ...]
    problem: SqueezeError | None


SAMPLES_FOLDER = "samples"  # below the output folder
_CONTENT_VERSION = 2  # raise it when the same file is counted otherwise


class _Content(BaseModel):
    """What lies in a target's folder, by the names of its record; files relative to the folder."""

    size_bytes: int
    size_gzip_bytes: int
    tokenizer_bytes: int | None
    files: tuple[FileRecord, ...]
    weights: tuple[WeightClass, ...]
    operators: dict[str, int]


class Measurer:
    """Measures the targets of one run."""

    def __init__(
        self,
        store: Store,
        teller: Teller,
        settings: MeasureSettings,
        info: TaskInfo,
        dev: Sequence[SplitRows],
        baselines: Mapping[str, str],
        backends: Backends,
        *,
        fresh: bool,
    ) -> None:
        self.store, self.teller, self.settings, self.info, self.dev = store, teller, settings, info, dev
        self.baselines, self.backends, self.fresh = baselines, backends, fresh
        self.samples: dict[str, bytes] = {}  # file below the output folder → every run of one target at one shape
        self.goldens: dict[str, Golden] = {}  # target → what it says to a few generated sentences, for `onnxsqueeze verify`

    def models(self, made: Sequence[Made]) -> str:
        """One digest for the set of models that this run shows on the dev set."""
        return key_of({"models": sorted({one.artifact.digest for one in made if one.artifact})})

    def targets(self, made: Sequence[Made], gates: Gates) -> list[Target]:
        """The record of every target; a baseline stands before those that are compared with it."""
        records: list[Target] = []
        for backend in dict.fromkeys(one.branch.backend for one in made):
            group = [one for one in made if one.branch.backend == backend]
            records += self._backend(backend, group, gates)
        return records

    def _backend(self, backend: str, group: Sequence[Made], gates: Gates) -> list[Target]:
        absent = self.backends.get(backend).unavailable()
        ready = [one for one in group if one.artifact] if not absent else []
        logits: dict[str, Logits] = {}
        failed: dict[str, SqueezeError] = {}
        for one in ready:
            name = one.branch.target.name
            try:
                self._check_operators(backend, one)
                logits[name] = self._logits(backend, one)
                self.goldens[name] = self._golden(one)
            except MeasureError as error:
                failed[name] = error
        timed = self._latency(backend, [one for one in ready if one.branch.target.name not in failed], failed)
        base_name = self.baselines[backend]
        records: list[Target] = []
        base: Target | None = None
        for one in group:
            record = self._record(one, backend, absent, failed, logits, timed, base, logits.get(base_name), gates)
            if one.branch.target.name == base_name:
                base = record
            records.append(record)
        return records

    def _record(
        self,
        one: Made,
        backend: str,
        absent: tuple[str, str] | None,
        failed: Mapping[str, SqueezeError],
        logits: Mapping[str, Logits],
        timed: Mapping[str, Sequence[Timed]],
        base: Target | None,
        base_logits: Logits | None,
        gates: Gates,
    ) -> Target:
        target = one.branch.target
        name = target.name
        facts: dict[str, Any] = {
            "name": name,
            "backend": backend,
            "provider": self.backends.get(backend).provider,
            "baseline": target.name == self.baselines[backend],
            "stages": one.stages,
        }
        if one.artifact:
            content = self._content(one.artifact)
            files = tuple(f.model_copy(update={"path": f"{name}/{f.path}"}) for f in content.files)
            facts |= {**dict(content), "model": f"{name}/{MODEL_FILE}", "files": files}
        problem = one.problem or failed.get(name)
        if problem:
            status = "skipped" if isinstance(problem, Unavailable) else "failed"
            remedy = without_paths(problem.remedy) if problem.remedy else None
            return Target(status=status, reason=without_paths(problem.message), remedy=remedy, **facts)
        if absent:
            return Target(status="skipped", reason=without_paths(absent[0]), remedy=without_paths(absent[1]), **facts)
        facts["runtime"] = self._runtime(backend)
        metrics = {split.name: evaluate(self.info, logits[name][split.name], _labels(split)) for split in self.dev}
        shapes = timed[name]
        versus = self._versus(logits[name], base_logits, shapes[0], facts["size_bytes"], base) if base else None
        return Target(
            status="ok",
            latency=shapes[0].latency,
            latencies=tuple(shape.latency for shape in shapes[1:]),
            metrics=metrics,
            vs_baseline=versus,
            gates=_judge(target.gates or gates, versus, self.info.primary, self.dev[0].name) if versus else (),
            extra={"speedups": [timing.speedup(shape) for shape in shapes[1:]]} if versus else {},
            **facts,
        )

    def _versus(self, logits: Logits, base_logits: Logits | None, timed: Timed, size_bytes: int, base: Target) -> VsBaseline | None:
        if base_logits is None or base.size_bytes is None:
            return None
        deltas: dict[str, dict[str, MetricDelta]] = {
            split.name: compare(self.info, logits[split.name], base_logits[split.name], _labels(split)) for split in self.dev
        }
        return VsBaseline(
            baseline=base.name,
            size_ratio=base.size_bytes / size_bytes,
            speedup=timed.speedup,
            speedup_ci95=timed.speedup_ci95,
            speed=timed.verdict,
            metrics=deltas,
            quality=quality(deltas[self.dev[0].name][self.info.primary]),
        )

    def _content(self, artifact: Artifact) -> _Content:
        """Sizes and weights of a folder; packing a file with gzip takes seconds, so they are kept."""
        causes = {"model": artifact.digest, "zlib": zlib.ZLIB_RUNTIME_VERSION, "version": _CONTENT_VERSION}
        kept = self.store.measurement("content", causes)
        if kept is not None:
            return _Content.model_validate_json(kept)
        size = measure_size(artifact.path)
        content = _Content(
            size_bytes=size.size_bytes,
            size_gzip_bytes=size.size_gzip_bytes,
            tokenizer_bytes=size.tokenizer_bytes,
            files=size.files,
            weights=weights.by_class(artifact.onnx),
            operators=graph.operators(artifact.onnx),
        )
        self.store.keep_measurement("content", causes, content.model_dump_json(by_alias=True).encode())
        return content

    # ── metric ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _logits(self, backend: str, one: Made) -> Logits:
        import numpy as np

        assert one.artifact is not None  # noqa: S101  # callers pass targets that have a file
        name, found = one.branch.target.name, {}
        for split in self.dev:
            causes = self._causes(backend, one.artifact, threads=self.settings.threads) | {
                "rows": rows_sha256(split.rows),
                "tokenizers": environment.versions(("tokenizers",)),
                "batch": self.settings.batch,
                "max_length": self.info.max_length,
            }
            kept = None if self.fresh else self.store.measurement("logits", causes)
            if kept is None:
                progress = self.teller.begin(f"{name}: {self.info.primary} on {split.name}")
                values = predict(
                    one.artifact.path,
                    backend,
                    split,
                    self.info.max_length,
                    self.settings.batch,
                    self.settings.threads,
                    progress,
                    opener=self.backends.open,
                )
                buffer = io.BytesIO()
                np.save(buffer, values, allow_pickle=False)
                kept = buffer.getvalue()
                self.store.keep_measurement("logits", causes, kept)
                score = evaluate(self.info, values, _labels(split))[self.info.primary]
                self.teller.end(f"{name}: {self.info.primary} {score.value:.4f} on {split.name} ({score.n:,} rows)")
            found[split.name] = np.load(io.BytesIO(kept), allow_pickle=False)
        return found

    def _golden(self, one: Made) -> Golden:
        assert one.artifact is not None  # noqa: S101  # callers pass targets that have a file
        pairs = self.dev[0].rows[0].text_pair is not None
        causes = self._causes(one.branch.backend, one.artifact, threads=self.settings.threads) | {
            "max_length": self.info.max_length,
            "pairs": pairs,
            "version": Golden.model_fields["version"].default,
        }
        kept = None if self.fresh else self.store.measurement("golden", causes)
        if kept is not None:
            return Golden.model_validate_json(kept)
        asked, backend = sentences(pairs=pairs), one.branch.backend
        found = answers(one.artifact.path, backend, self.settings.threads, self.info.max_length, asked, self.backends)
        self.store.keep_measurement("golden", causes, found.model_dump_json().encode())
        return found

    # ── latency ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _latency(self, backend: str, ready: Sequence[Made], failed: dict[str, SqueezeError]) -> dict[str, list[Timed]]:
        """Per target, the measured shapes in order. What the store lacks is measured together, beside the baseline.

        A target that cannot be measured is put into ``failed``; the others go on without it.
        """
        base_name = self.baselines[backend]
        by_name = {one.branch.target.name: one for one in ready}
        base = by_name.get(base_name)
        base_digest = base.artifact.digest if base and base.artifact else None
        timed: dict[str, list[Timed]] = {name: [] for name in by_name}
        for shape in (self.settings.shape, *self.settings.shapes):
            causes = {name: self._latency_causes(backend, one, base_digest, shape) for name, one in by_name.items() if name not in failed}
            kept = {name: None if self.fresh else self.store.measurement("latency", cause) for name, cause in causes.items()}
            lacking = [name for name, content in kept.items() if content is None]
            for name, result in self._measured_together(backend, by_name, lacking, base_name, shape, failed).items():
                self.store.keep_measurement(
                    "samples", causes[name], timing.packed(result)
                )  # first: a latency that is found has its samples
                kept[name] = timing.timed(result).to_json()
                self.store.keep_measurement("latency", causes[name], kept[name] or b"")
            for name, content in kept.items():
                if content is not None:
                    timed[name].append(self._with_samples(Timed.from_json(content), name, shape, causes[name]))
        return timed

    def _with_samples(self, timed: Timed, name: str, shape: Shape, causes: Mapping[str, Any]) -> Timed:
        """The same, with the name of the file that keeps every run; its content goes into `samples`."""
        content = self.store.measurement("samples", causes)
        if content is None:
            return timed
        file = f"{SAMPLES_FOLDER}/{name}-{shape.batch}x{shape.sequence}x{shape.threads}.npz"
        self.samples[file] = content
        return replace(timed, latency=timed.latency.model_copy(update={"samples": file}))

    def _measured_together(
        self, backend: str, by_name: Mapping[str, Made], names: Sequence[str], base_name: str, shape: Shape, failed: dict[str, SqueezeError]
    ) -> dict[str, LatencyResult]:
        """The targets ``names`` in turns with the baseline; where that fails, each alone beside it, so that the culprit is known."""
        if not names:
            return {}
        has_base = base_name in by_name and base_name not in failed
        together = list(dict.fromkeys([*([base_name] if has_base else []), *names]))
        candidates = [Candidate(name, one.artifact.onnx, backend) for name in together if (one := by_name[name]).artifact]
        progress = self.teller.begin(f"latency on {backend}: {shape}")
        try:
            results = measure_latency(
                candidates, base_name if has_base else None, shape, self.settings, progress, opener=self.backends.open
            )
        except MeasureError as error:
            if len(names) == 1:
                failed[names[0]] = error
                self.teller.end(f"{names[0]}: failed: {error.message}")
                return {}
            alone: dict[str, LatencyResult] = {}
            for name in names:
                alone |= self._measured_together(backend, by_name, [name], base_name, shape, failed)
            return alone
        self.teller.end(
            f"latency on {backend}, {shape}: " + ", ".join(f"{name} {results[name].latency.p50_ms:.2f} ms" for name in together)
        )
        return {name: results[name] for name in names}

    def _latency_causes(self, backend: str, one: Made, base_digest: str | None, shape: Shape) -> dict[str, Any]:
        assert one.artifact is not None  # noqa: S101  # callers pass targets that have a file
        settings = self.settings.model_dump(mode="json", exclude={"shapes", "batch", "sequence", "threads"})
        return self._causes(backend, one.artifact, threads=shape.threads) | {
            "baseline": base_digest,
            "shape": shape.model_dump(mode="json"),
            "settings": settings,
        }

    def _check_operators(self, backend: str, one: Made) -> None:
        """Raise MeasureError where the file holds operators that the backend is known to have no kernel for."""
        assert one.artifact is not None  # noqa: S101  # callers pass targets that have a file
        refusal = self.backends.get(backend).refusal(self._content(one.artifact).operators)
        if refusal:
            raise MeasureError(f"{one.branch.target.name}: {refusal}", remedy="choose other stages for this backend")

    def _runtime(self, backend: str) -> str | None:
        """The ONNX Runtime that measures a backend's targets, by distribution and version."""
        runtime = self.backends.get(backend).runtime
        return runtime.name if runtime else None

    def _causes(self, backend: str, artifact: Artifact, *, threads: int) -> dict[str, Any]:
        return {
            "model": artifact.digest,
            "backend": backend,
            "runtime": self._runtime(backend),
            **environment.processors(),
            "threads": threads,
        }


def _labels(split: SplitRows) -> list[int | float]:
    return [row.label for row in split.rows]


def _judge(gates: Gates, versus: VsBaseline, primary: str, split: str) -> tuple[Gate, ...]:
    """Each gate that is set, judged by the point estimate."""
    drop = -100 * versus.metrics[split][primary].delta
    speedup = versus.speedup if versus.speedup is not None else 0.0
    judged = []
    if gates.metric_drop_pp is not None:
        judged.append(Gate(name="metric_drop_pp", limit=gates.metric_drop_pp, value=drop, passed=drop <= gates.metric_drop_pp))
    if gates.min_size_ratio is not None:
        judged.append(
            Gate(
                name="min_size_ratio", limit=gates.min_size_ratio, value=versus.size_ratio, passed=versus.size_ratio >= gates.min_size_ratio
            )
        )
    if gates.min_speedup is not None:
        judged.append(Gate(name="min_speedup", limit=gates.min_speedup, value=speedup, passed=speedup >= gates.min_speedup))
    return tuple(judged)
