"""From finished files to records: has each target measured, compares it with its backend's baseline, judges its gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxsqueeze import timing
from onnxsqueeze.artifact import MODEL_FILE, Artifact
from onnxsqueeze.errors import MeasureError, SqueezeError, Unavailable, without_paths
from onnxsqueeze.measure.golden import Golden
from onnxsqueeze.measure.metric import compare, evaluate, quality
from onnxsqueeze.measurements import Measurements, Subject
from onnxsqueeze.plan import Branch
from onnxsqueeze.recipe import Gates
from onnxsqueeze.results import Gate, MetricDelta, MetricValue, StageRecord, Target, VsBaseline, VsParent
from onnxsqueeze.store import key_of
from onnxsqueeze.tasks.rows import SplitRows
from onnxsqueeze.timing import Timed

if TYPE_CHECKING:
    from onnxsqueeze.measurements import Logits


@dataclass(frozen=True)
class Made:
    """A target after its stages: its artifact, or why there is none."""

    branch: Branch
    artifact: Artifact | None
    stages: tuple[StageRecord, ...]
    problem: SqueezeError | None


@dataclass(frozen=True)
class _Found:
    """What was measured of one target; ``ran`` holds fields of its record as they are."""

    logits: Logits
    timed: Sequence[Timed]
    ran: Mapping[str, Any]


class Measurer:
    """Makes the records of one run's targets out of `Measurements`."""

    def __init__(
        self,
        measurements: Measurements,
        baselines: Mapping[str, str],
        parents: Mapping[str, str],
        provenance: Callable[[Made, str | None, Mapping[str, Mapping[str, MetricValue]]], bytes],
    ) -> None:
        """``provenance(made, runtime, metrics)`` are the bytes that a target's published files end with."""
        self.measurements, self.baselines, self.parents = measurements, baselines, parents
        self._provenance = provenance
        self.provenance: dict[str, bytes] = {}  # target → what its .onnx files end with
        self.info, self.dev = measurements.info, measurements.dev
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
        measure = self.measurements
        absent = measure.backends.get(backend).unavailable()
        subjects = [Subject(one.branch.target.name, backend, one.artifact) for one in group if one.artifact] if not absent else []
        logits: dict[str, Logits] = {}
        failed: dict[str, SqueezeError] = {}
        for subject in subjects:
            try:
                measure.check_operators(subject)
                logits[subject.name], self.goldens[subject.name] = measure.answers(subject)
            except MeasureError as error:
                failed[subject.name] = error
        timed = measure.latencies([one for one in subjects if one.name not in failed], self.baselines[backend], failed)
        found: dict[str, _Found] = {}
        for subject in (one for one in subjects if one.name not in failed):
            try:
                ran = {
                    "runtime": measure.runtime(backend),
                    "proof": measure.proof(subject) if measure.settings.profile else None,
                    "load": measure.load(subject),
                }
                found[subject.name] = _Found(logits[subject.name], timed[subject.name], ran)
            except MeasureError as error:
                failed[subject.name] = error
        records: list[Target] = []
        base: Target | None = None
        for one in group:
            record = self._record(one, backend, absent, failed, found, base, gates)
            if record.baseline:
                base = record
            records.append(record)
        return records

    def _record(
        self,
        one: Made,
        backend: str,
        absent: tuple[str, str] | None,
        failed: Mapping[str, SqueezeError],
        found: Mapping[str, _Found],
        base: Target | None,
        gates: Gates,
    ) -> Target:
        target = one.branch.target
        name = target.name
        facts: dict[str, Any] = {
            "name": name,
            "backend": backend,
            "provider": self.measurements.backends.get(backend).provider,
            "baseline": target.name == self.baselines[backend],
            "stages": one.stages,
        }
        problem = one.problem or failed.get(name)
        metrics: dict[str, dict[str, MetricValue]] = {}
        if name in found and not problem:
            metrics = {split.name: evaluate(self.info, found[name].logits[split.name], _labels(split)) for split in self.dev}
        if one.artifact:
            self.provenance[name] = self._provenance(one, found[name].ran["runtime"] if metrics else None, metrics)
            content = self.measurements.published(one.artifact, self.provenance[name])
            files = tuple(f.model_copy(update={"path": f"{name}/{f.path}"}) for f in content.files)
            facts |= {**dict(content), "model": f"{name}/{MODEL_FILE}", "files": files, "size_provenance_bytes": len(self.provenance[name])}
        if problem:
            status = "skipped" if isinstance(problem, Unavailable) else "failed"
            remedy = without_paths(problem.remedy) if problem.remedy else None
            return Target(status=status, reason=without_paths(problem.message), remedy=remedy, **facts)
        if absent:
            return Target(status="skipped", reason=without_paths(absent[0]), remedy=without_paths(absent[1]), **facts)
        logits, shapes = found[name].logits, found[name].timed
        base_logits = found[base.name].logits if base and base.name in found else None
        timed = shapes[0] if shapes else None
        versus = self._versus(logits, base_logits, timed, facts["size_bytes"], base) if base else None
        parent = self._vs_parent(name, found)
        return Target(
            status="ok",
            latency=timed.latency if timed else None,
            latencies=tuple(shape.latency for shape in shapes[1:]),
            metrics=metrics,
            vs_baseline=versus,
            vs_parent=parent,
            gates=_judge(target.gates or gates, versus, parent, self.info.primary, self.dev[0].name) if versus else (),
            extra={"speedups": [timing.speedup(shape) for shape in shapes[1:]]} if versus else {},
            **found[name].ran,
            **facts,
        )

    def _versus(self, logits: Logits, base_logits: Logits | None, timed: Timed | None, size_bytes: int, base: Target) -> VsBaseline | None:
        if base_logits is None or base.size_bytes is None:
            return None
        deltas: dict[str, dict[str, MetricDelta]] = {
            split.name: compare(self.info, logits[split.name], base_logits[split.name], _labels(split)) for split in self.dev
        }
        return VsBaseline(
            baseline=base.name,
            size_ratio=base.size_bytes / size_bytes,
            speedup=timed.speedup if timed else None,
            speedup_ci95=timed.speedup_ci95 if timed else None,
            speed=timed.verdict if timed else "unproven",
            metrics=deltas,
            quality=quality(deltas[self.dev[0].name][self.info.primary]),
        )

    def _vs_parent(self, name: str, found: Mapping[str, _Found]) -> VsParent | None:
        parent = self.parents.get(name)
        if parent is None or parent not in found or not self.measurements.settings.latency:
            return None
        above, own = found[parent].timed[0], found[name].timed[0]
        runs = [self.measurements.samples.get(one.latency.samples or "", b"") for one in (above, own)]
        speedup, interval, speed = timing.against(above, runs[0], own, runs[1])
        return VsParent(parent=parent, speedup=speedup, speedup_ci95=interval, speed=speed)


def _labels(split: SplitRows) -> list[int | float]:
    return [row.label for row in split.rows]


def _judge(gates: Gates, versus: VsBaseline, parent: VsParent | None, primary: str, split: str) -> tuple[Gate, ...]:
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
    if gates.min_speedup_vs_parent is not None and parent:
        passed = parent.speedup >= gates.min_speedup_vs_parent
        judged.append(Gate(name="min_speedup_vs_parent", limit=gates.min_speedup_vs_parent, value=parent.speedup, passed=passed))
    return tuple(judged)
