"""What a run will make: every stage of every chain with the key of its result, before anything is made.

A stage's key chains causes: settings, stage version, the keys of parent and teacher, digests of the rows, seed, and the
versions of the tools that can change the bytes. So a dry run sees through stages that are not built yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from onnxsqueeze import backends, environment, models
from onnxsqueeze.artifact import Format, file_sha256
from onnxsqueeze.document import Place
from onnxsqueeze.errors import Fault, ModelError, RecipeError
from onnxsqueeze.models import Start
from onnxsqueeze.nn.checkpoint import has_trained_head, read_config
from onnxsqueeze.recipe import MODEL, LoadedRecipe, Target, chain, teacher_of
from onnxsqueeze.stage import Stage
from onnxsqueeze.stages import Export, Finetune
from onnxsqueeze.store import key_of
from onnxsqueeze.tasks.open import Task
from onnxsqueeze.tasks.rows import rows_sha256
from onnxsqueeze.tasks.tables import read_texts

_ADDED: Place = ("targets",)  # where the faults of a baseline stand that the run adds


@dataclass(frozen=True)
class Step:
    """One stage in its place: what it reads (None: the starting checkpoint) and the key of what it will make."""

    stage: Stage
    key: str
    parent: Step | None
    teacher: Step | None
    has_teacher: bool
    causes: Mapping[str, Any]
    skipped: str | None = None

    @property
    def made_by(self) -> Step | None:
        """The step whose artifact this one hands on: itself, or for a skipped one what its parent hands on."""
        if self.skipped is None:
            return self
        return self.parent.made_by if self.parent else None

    @property
    def format(self) -> Format:
        """What kind of artifact this step makes."""
        return "checkpoint" if self.stage.gives == "checkpoint" else "onnx"


@dataclass(frozen=True)
class Branch:
    """One target: its whole chain from the start, and which part of it is its own."""

    target: Target
    backend: str
    steps: tuple[Step, ...]
    shared: int  # how many of `steps` are shared stages
    added: bool = False  # the run added this baseline, the recipe has none


@dataclass(frozen=True)
class Plan:
    """Everything that a run will make. ``baselines`` maps a backend to the name of its baseline."""

    shared: tuple[Step, ...]
    branches: tuple[Branch, ...]
    baselines: Mapping[str, str]

    @property
    def parents(self) -> dict[str, str]:
        """Target → the target of the same backend that holds the nearest file it was made from, where there is one."""
        found = {}
        for branch in self.branches:
            above = [step.key for step in branch.steps[:-1] if step.format == "onnx"]
            holders = {other.steps[-1].key: other.target.name for other in self.branches if other.backend == branch.backend}
            nearest = next((holders[key] for key in reversed(above) if key in holders), None)
            if nearest is not None:
                found[branch.target.name] = nearest
        return found


def make_plan(loaded: LoadedRecipe, start: Start, task: Task, seed: int, threads: int, *, any_machine: bool = False) -> Plan:
    """Put every stage in its place. With ``any_machine`` a PyTorch stage's key leaves out who made it: the machine and the versions of the tools.

    Raises RecipeError where the recipe does not fit the model.
    """
    recipe = loaded.recipe
    planner = _Planner(loaded, start, task, seed, threads, any_machine=any_machine)
    shared = planner.chain((), recipe.stages, ("stages",))
    targets: list[tuple[Target, bool]] = [(target, False) for target in recipe.targets]
    baselines = {backends.get(t.backend).name: t.name for t in recipe.targets if t.baseline}
    teacher = next((s.stage.name for s in reversed(shared) if isinstance(s.stage, Finetune)), MODEL)
    for backend in dict.fromkeys(backends.get(t.backend).name for t in recipe.targets):
        if backend not in baselines:
            baselines[backend] = f"baseline-{backend}"
            targets.append(
                (Target(name=baselines[backend], backend=backend, after=teacher, stages=(Export(kind="export"),), baseline=True), True)
            )
    branches = []
    for i, (target, added) in enumerate(targets):
        if added and planner.faults:
            break  # the user's own targets have them too
        above, own = chain(recipe, target)
        steps = (*shared[: len(above)], *planner.chain(shared[: len(above)], own, _ADDED if added else ("targets", i, "stages")))
        branches.append(Branch(target, backends.get(target.backend).name, steps, len(above), added))
    order = sorted(branches, key=lambda b: (list(baselines).index(b.backend), not b.target.baseline))
    planned = Plan(shared, tuple(order), baselines)
    faults = planner.faults or _without_parent(loaded, planned)
    if faults:
        raise RecipeError(faults)
    return planned


def _without_parent(loaded: LoadedRecipe, plan: Plan) -> list[Fault]:
    """Gates that compare a target with the one it was made from, where there is none."""
    recipe, word = loaded.recipe, "min_speedup_vs_parent"
    message = f"{word}: no other target holds a file that this one is made from; add one whose stages are the first of its stages"
    faults = [
        loaded.fault(("targets", i, "gates", word), message)
        for i, target in enumerate(recipe.targets)
        if target.gates and target.gates.min_speedup_vs_parent is not None and target.name not in plan.parents
    ]
    if recipe.gates.min_speedup_vs_parent is not None and not plan.parents:
        faults.append(
            loaded.fault(
                ("gates", word),
                f"{word}: no target holds a file that another is made from; add one whose stages are the first of the other's",
            )
        )
    return faults


class _Planner:
    def __init__(self, loaded: LoadedRecipe, start: Start, task: Task, seed: int, threads: int, *, any_machine: bool) -> None:
        self.loaded, self.start, self.seed, self.any_machine = loaded, start, seed, any_machine
        self.embeds = task.info.embeds
        self.trained = self.embeds or has_trained_head(start.artifact.path)
        self.faults: list[Fault] = []
        info = task.info
        self._data = {
            "labels": info.labels,
            "primary": info.primary,
            "max_length": info.max_length,
            "train": rows_sha256(task.train.rows),
            "selection": rows_sha256(task.selection.rows),
            **({"compare": info.compare, "pooling": info.pooling} if info.embeds else {}),
            **({"positive": info.positive_index} if info.labels and info.positive_index != 1 else {}),
        }
        self._machine = {**environment.processors(), "threads": threads}

    def chain(self, above: Sequence[Step], stages: Sequence[Stage], place: Place) -> tuple[Step, ...]:
        """The steps of ``stages`` put after ``above``."""
        steps = list(above)
        for i, stage in enumerate(stages):
            steps.append(self._step(steps, stage, (*place, i)))
        return tuple(steps[len(above) :])

    def _step(self, above: Sequence[Step], stage: Stage, place: Place) -> Step:
        files, others = self._digests(stage, place), self._models(stage, place)
        stage = stage.beside(self.loaded.folder)
        parent = above[-1] if above else None
        parent_key = parent.key if parent else self.start.artifact.key
        finetuned = [step for step in above if isinstance(step.stage, Finetune)]
        if self.embeds and (not stage.embeds or (isinstance(stage, Finetune) and stage.force)):
            self.faults.append(self.loaded.fault(place, f"{stage.kind}: is not for models that embed (the task's `compare`); take it out"))
        if isinstance(stage, Finetune) and self.trained and not stage.force:
            return Step(
                stage,
                parent_key,
                parent,
                None,
                has_teacher=False,
                causes={},
                skipped="a model that embeds is the teacher as it is"
                if self.embeds
                else "the model has a trained head, so it is the teacher as it is (`force: true` trains it anyway)",
            )
        first = stage.needs_head and not any(step.stage.needs_head for step in above)
        if first and not self.trained and not isinstance(stage, Finetune) and not stage.needs_teacher:
            self.faults.append(self._headless(stage, place))
        config = read_config(self.start.artifact.path)
        if not any(step.stage.kind == stage.kind for step in above):  # an earlier one may have changed what the next one finds
            misfit = stage.misfit(config)
            if misfit:
                self.faults.append(self.loaded.fault(place, f"{stage.kind}: {misfit}"))
        teacher, has_teacher = self._teacher(above, stage, finetuned, place)
        causes: dict[str, Any] = {
            "kind": stage.kind,
            "version": stage.version,
            # a setting that says nothing is no cause: a new one, None by default, leaves older results valid
            "settings": stage.model_dump(mode="json", exclude={"id", "teacher", *stage.text_files, *stage.models}, exclude_none=True),
            "parent": parent_key,
        }
        if stage.parts():
            causes["parts"] = {part.kind: part.version for part in stage.parts()}
        if not (self.any_machine and stage.gives == "checkpoint"):
            causes["tools"] = {name: _version(name) for name in stage.tools}
            if stage.machine_bound():
                causes["machine"] = self._machine
        if has_teacher:
            causes["teacher"] = teacher.key if teacher else self.start.artifact.key
        if stage.uses_data:
            causes["data"] = self._data
        if stage.uses_seed:
            causes["seed"] = self.seed
        if files:
            causes["files"] = files
        if others:
            causes["models"] = others
        if stage.timed():
            causes["call"] = asdict(self.loaded.recipe.measure.call)
        return Step(stage, key_of(causes), parent, teacher, has_teacher, causes)

    def _digests(self, stage: Stage, place: Place) -> dict[str, str]:
        """Field → sha256 of the text file that it names; a missing file is a fault. Raises DataError for a file that is no text."""
        found = {}
        for field, path in stage.files().items():
            file = self.loaded.folder / path
            if file.is_file():
                read_texts(file)
                found[field] = file_sha256(file)
            else:
                message = f"{stage.kind}: there is no file {path}; a path in a recipe is relative to the recipe"
                self.faults.append(self.loaded.fault((*place, field), message))
        return found

    def _models(self, stage: Stage, place: Place) -> dict[str, str]:
        """Field → key of the model that it names; one that cannot be had is a fault."""
        found = {}
        for field, name in stage.named_models().items():
            try:
                found[field] = models.resolve(name).artifact.key
            except ModelError as error:
                self.faults.append(self.loaded.fault((*place, field), f"{stage.kind}: {error.message}; {error.remedy}"))
        return found

    def _headless(self, stage: Stage, place: Place) -> Fault:
        if "stages" not in place:  # a baseline that the run adds
            return self.loaded.fault(
                place,
                "a backend without a baseline gets the teacher's export, but no shared stage makes a teacher; put {kind: finetune} into `stages:`",
            )
        return self.loaded.fault(
            place,
            f"{stage.kind}: the model {self.start.name!r} has no trained head; put {{kind: finetune}} above, or start from a trained classifier",
        )

    def _teacher(self, above: Sequence[Step], stage: Stage, finetuned: Sequence[Step], place: Place) -> tuple[Step | None, bool]:
        """(the step that made the teacher, whether there is one); the start as a teacher is (None, True)."""
        if "teacher" not in type(stage).model_fields:
            return None, False
        named = teacher_of(stage)
        if named is not None and named != MODEL:
            return next((step for step in above if step.stage.name == named), None), True
        if named is None and finetuned:
            return finetuned[-1], True
        if self.trained:
            return None, True
        if stage.needs_teacher or named == MODEL:
            self.faults.append(
                self.loaded.fault(
                    place,
                    f"{stage.kind} learns from a teacher, but there is no finetune above it and the model {self.start.name!r} has no trained head; put {{kind: finetune}} above it",
                )
            )
        return None, False


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
