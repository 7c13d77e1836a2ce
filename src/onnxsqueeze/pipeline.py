"""One run: load, plan, make every stage, measure every target, write the record and its reports.

The dev set is opened after the last stage, by the measuring alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from onnxsqueeze import __version__, backends, environment, graph
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import GateMissed, SqueezeError, StageError, StoreError, Unavailable, without_paths
from onnxsqueeze.measure.golden import GOLDEN_FILE
from onnxsqueeze.measurements import SAMPLES_FOLDER, Measurements
from onnxsqueeze.output import check_writable, publish, put_samples, remove_stale
from onnxsqueeze.plan import Branch, Step
from onnxsqueeze.prepare import Prepared, Request, changed_by_options, command_of
from onnxsqueeze.provenance import Provenance, Rows, Score, as_options, encode
from onnxsqueeze.record import Made, Measurer
from onnxsqueeze.report.write import write_reports
from onnxsqueeze.results import RESULTS_FILE, MetricValue, Results, Split, StageRecord, Target, TaskRecord
from onnxsqueeze.stage import Changed, Context, Progress
from onnxsqueeze.store import Entry, Store, exclusive, write_atomically
from onnxsqueeze.tasks.metrics import primary, said
from onnxsqueeze.tasks.rows import SplitRows, as_read


class Watcher(Protocol):
    """Who is told how far a run is."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def begin(self, title: str) -> Progress:
        """A piece of work starts; the result is called with how far it is."""

    def end(self, text: str) -> None:
        """The piece of work that began last is done."""


@dataclass(frozen=True)
class Outcome:
    """A finished run: its record, where it lies, and what its exit code should say."""

    results: Results
    out: Path
    problems: tuple[SqueezeError, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 where something failed, else 3 where a gate was missed, else 0."""
        codes = {problem.exit_code for problem in self.problems}
        return 1 if codes - {GateMissed.exit_code} else max(codes, default=0)


def run(prepared: Prepared, store: Store, watcher: Watcher) -> Outcome:
    """Make and measure every target; write results.json, the reports and a folder per target below ``out``.

    A failing stage makes the targets below it rows "failed", and the others go on.
    Raises StoreError for a full or read-only disk, UsageError for an output folder that cannot be written and for broken dev files.
    """
    check_writable(prepared.out)
    with exclusive(prepared.out / ".lock", waiting=lambda: watcher.say(f"{prepared.out}: another run is writing here; waiting for it")):
        maker = _Maker(prepared, store, watcher)
        made = [maker.branch(branch) for branch in prepared.plan.branches]
        return _measure(prepared, store, watcher, maker, made)


def train(prepared: Prepared, store: Store, watcher: Watcher) -> tuple[str, ...]:
    """Make every PyTorch stage of every chain, and nothing behind it; their keys in the store, in the order of the chains.

    Raises what the first stage that fails raises.
    """
    maker = _Maker(prepared, store, watcher)
    trained = [[step for step in branch.steps if step.format == "checkpoint"] for branch in prepared.plan.branches]
    for steps in trained:
        maker.chain(steps)
    return tuple(dict.fromkeys(step.key for steps in trained for step in steps if not step.skipped))


@dataclass
class _Maker:
    """Makes steps through the store, each once a run.

    What stands above a finished step, and is read by nothing else, need not be there any more: its note is enough (``noted``).
    """

    prepared: Prepared
    store: Store
    watcher: Watcher
    done: dict[str, tuple[Entry, bool]] = field(default_factory=dict)
    noted: dict[str, Entry] = field(default_factory=dict)
    failed: dict[str, SqueezeError] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def artifact(self, step: Step | None) -> Artifact:
        """What a step handed on; the start for None."""
        source = step.made_by if step else None
        return self.done[source.key][0].artifact if source else self.prepared.start.artifact

    def chain(self, steps: Sequence[Step]) -> None:
        """Make or find the steps of a chain; above the last finished one, only what a later one reads. Raises what a stage raises."""
        finished = next((i for i in reversed(range(len(steps))) if self._find(steps[i])), 0)
        read = {step.teacher.key for step in steps[finished + 1 :] if step.teacher}
        for i, step in enumerate(steps):
            noted = self.store.note(step.key) if i < finished and step.key not in read and not step.skipped else None
            if noted is None or step.key in self.done:
                self.make(step)
            elif step.key not in self.noted:
                self.noted[step.key] = noted
                self._say_found(step, noted)

    def _find(self, step: Step) -> bool:
        """Whether a step is finished."""
        if step.skipped or step.key in self.failed:
            return False
        if step.key not in self.done:
            found = self.store.find(step.key)
            if found is None:
                return False
            self.done[step.key] = (found, True)
            self._say_found(step, found)
        return True

    def _say_found(self, step: Step, found: Entry) -> None:
        self.watcher.say(f"{step.stage.name}: in the store ({step.key[:12]}; made in {found.seconds:.0f} s)")

    def make(self, step: Step) -> None:
        """Make one step, or find it. Raises what the stage raises."""
        if step.skipped:
            if step.stage.name not in self.told:
                self.told.add(step.stage.name)
                self.watcher.say(f"{step.stage.name}: skipped: {step.skipped}")
            return
        if step.key in self.failed:
            raise self.failed[step.key]
        if self._find(step):
            return
        missing = step.stage.unavailable()
        if missing:
            raise Unavailable(missing[0], remedy=missing[1])
        progress = self.watcher.begin(step.stage.name)
        try:
            entry, was_there = self.store.make(
                step.key, step.format, step.causes, lambda draft, checkpoint: self._build(step, draft, checkpoint, progress)
            )
        except StoreError:
            raise
        except SqueezeError as error:
            self.failed[step.key] = error
            raise
        self.done[step.key] = (entry, was_there)
        self.watcher.end(f"{step.stage.name}: {entry.changed.count:,} {entry.changed.what} in {entry.seconds:.1f} s{_resumed(entry)}")

    def _build(self, step: Step, draft: Path, checkpoint: Path, progress: Progress) -> Changed:
        task = self.prepared.task
        labels = [row.label for row in task.selection.rows]
        context = Context(
            task=task.info,
            train=step.stage.reads(as_read(task.info, task.train), self.prepared.seed),
            selection=as_read(task.info, task.selection),
            select=lambda outputs: primary(task.info, said(task.info, outputs), labels),
            seed=self.prepared.seed,
            threads=self.prepared.threads,
            call=self.prepared.loaded.recipe.measure.call,
            checkpoint=checkpoint,
            kept=self.store,
            progress=progress,
        )
        parent = self.artifact(step.parent)
        teacher = self.artifact(step.teacher) if step.has_teacher else None
        changed = step.stage.run(parent, teacher, draft, context)
        if changed.count == 0:
            raise StageError(
                f"{step.stage.name}: changed no {changed.what}",
                remedy=f"see the settings of {step.stage.kind} in the recipe reference, or take the stage out",
            )
        if step.format == "onnx":
            like = parent.onnx if parent.format == "onnx" else None
            graph.check(draft / "model.onnx", like=like, inputs=step.stage.integer_inputs(), outputs=step.stage.outputs())
        return changed

    def branch(self, branch: Branch) -> Made:
        """Make one target's own steps. A failure is kept as its reason: the other targets go on."""
        problem: SqueezeError | None = None
        try:
            self.chain(branch.steps)
        except StoreError:
            raise
        except SqueezeError as error:
            problem = error
            self.watcher.end(f"{branch.target.name}: {'skipped' if isinstance(error, Unavailable) else 'failed'}: {error.message}")
        artifact = None if problem else self.artifact(branch.steps[-1])
        return Made(branch, artifact, self.records(branch.steps), problem)

    def records(self, steps: Sequence[Step]) -> tuple[StageRecord, ...]:
        """What results.json says of those steps that were made, found or skipped."""
        return tuple(self._record(step) for step in steps if step.skipped or step.key in self.done or step.key in self.noted)

    def _record(self, step: Step) -> StageRecord:
        if step.skipped:
            return StageRecord(id=step.stage.name, kind=step.stage.kind, seconds=0.0, changed={}, skipped=step.skipped)
        entry, reused = self.done.get(step.key) or (self.noted[step.key], True)
        changed = {"count": entry.changed.count, "what": entry.changed.what, "details": dict(entry.changed.details)}
        return StageRecord(id=step.stage.name, kind=step.stage.kind, seconds=entry.seconds, changed=changed, reused=reused, key=step.key)


def _resumed(entry: Entry) -> str:
    at = entry.changed.details.get("resumed_at_epoch")
    return f" (resumed in epoch {at})" if at else ""


def _measure(prepared: Prepared, store: Store, watcher: Watcher, maker: _Maker, made: Sequence[Made]) -> Outcome:
    recipe, task = prepared.loaded.recipe, prepared.task
    dev = task.dev()
    registry = prepared.request.backends
    measurements = Measurements(store, watcher, recipe.measure, task.info, dev, registry, prepared.request.fresh)

    def provenance(one: Made, runtime: str | None, metrics: Mapping[str, Mapping[str, MetricValue]]) -> bytes:
        return encode(_provenance(prepared, dev, one, runtime, metrics), prepared.loaded.text)

    measurer = Measurer(measurements, prepared.plan.baselines, prepared.plan.parents, provenance)
    targets = measurer.targets(made, recipe.gates)
    looks = {split.name: store.looks(split.sha256, measurer.models(made)) for split in dev}
    results = Results(
        recipe=recipe.name,
        recipe_sha256=prepared.loaded.sha256,
        seed=prepared.seed,
        command=command_of(prepared.request),
        model=prepared.start.name,
        model_sha256=prepared.start.artifact.digest,
        task=TaskRecord(
            name=task.info.name,
            primary=task.info.primary,
            max_length=task.info.max_length,
            batch=recipe.measure.batch,
            splits=tuple(_split(split, looks[split.name]) for split in dev),
            training=(_split(task.train), _split(task.selection)),
            generated=task.info.generated,
            note=task.info.note,
            compare=task.info.compare,
            pooling=task.info.pooling if task.info.embeds else None,
        ),
        environment=environment.describe(registry.started_providers()),
        stages=maker.records(prepared.plan.shared),
        targets=tuple(targets),
        date=datetime.now(UTC).date().isoformat(),
        threads=prepared.threads,
    )
    remove_stale(prepared.out, [one.branch.target.name for one in made if one.artifact])
    measured = {target.name for target in targets if target.status == "ok"}
    for one in made:
        if one.artifact:
            name = one.branch.target.name
            note = measurer.provenance[name]
            beside = {GOLDEN_FILE: measurer.goldens[name].beside(one.artifact.path, note).to_json().encode()} if name in measured else {}
            publish(one.artifact.path, prepared.out / name, beside, note)
    put_samples(prepared.out / SAMPLES_FOLDER, measurements.samples)
    write_atomically(prepared.out / RESULTS_FILE, results.to_json().encode())
    write_reports([results], prepared.out)
    return Outcome(results, prepared.out, tuple(_problems(prepared.request, targets)))


def _provenance(
    prepared: Prepared, dev: Sequence[SplitRows], one: Made, runtime: str | None, metrics: Mapping[str, Mapping[str, MetricValue]]
) -> Provenance:
    """Where a target's file comes from; ``metrics`` are empty where it was not measured."""
    task, request, kept = prepared.task, prepared.request, environment.versions(environment.TOOLS)
    first = dev[0].name
    value = metrics[first][task.info.primary] if metrics else None
    return Provenance(
        onnxsqueeze=__version__,
        target=one.branch.target.name,
        backend=one.branch.backend,
        stages=tuple(stage.id for stage in one.stages if not stage.skipped),
        recipe=prepared.loaded.recipe.name,
        recipe_sha256=prepared.loaded.sha256,
        overrides=tuple(without_paths(override) for override in request.overrides),
        options=as_options(changed_by_options(request, prepared.loaded)),
        model=prepared.start.name,
        model_sha256=prepared.start.artifact.digest,
        license=prepared.start.license,
        task=task.info.name,
        rows=tuple(
            Rows(split=split.name, role=split.role, n=len(split.rows), sha256=split.sha256) for split in (task.train, task.selection, *dev)
        ),
        seed=prepared.seed,
        metric=Score(
            name=task.info.primary,
            split=first,
            value=round(value.value, 6),
            ci95=(round(value.ci95[0], 6), round(value.ci95[1], 6)),
            n=value.n,
        )
        if value
        else None,
        runtime=runtime,
        versions={name: version for name, version in kept.items() if name != "onnxsqueeze"},
    )


def _problems(request: Request, targets: Sequence[Target]) -> list[SqueezeError]:
    problems: list[SqueezeError] = []
    required = {backends.get(name).name for name in request.require}
    for target in targets:
        if target.status == "failed":
            problems.append(StageError(f"target {target.name} failed: {target.reason}", remedy=target.remedy))
        elif target.status == "skipped" and target.backend in required:
            problems.append(
                Unavailable(
                    f"target {target.name} was skipped, but --require {target.backend} asks for it: {target.reason}", remedy=target.remedy
                )
            )
        missed = [
            f"{gate.name} is {gate.value:.4g}, the limit is {gate.limit:.4g} (missed by {abs(gate.value - gate.limit):.3g})"
            for gate in target.gates
            if not gate.passed
        ]
        if missed:
            problems.append(
                GateMissed(
                    f"target {target.name} missed {len(missed)} of its gates: {'; '.join(missed)}",
                    remedy="loosen the compression of this target, or the gate",
                )
            )
    return problems


def _split(split: SplitRows, looks: int = 0) -> Split:
    return Split(
        name=split.name, n=len(split.rows), source=split.source, sha256=split.sha256, role=split.role, dropped=split.dropped, looks=looks
    )
