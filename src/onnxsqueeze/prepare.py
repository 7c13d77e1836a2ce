"""Everything that can be wrong with the input of a run is found here, before anything is made."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from onnxsqueeze import backends, environment, models
from onnxsqueeze.backends import HERE, Backends
from onnxsqueeze.errors import RecipeError, UsageError, nearest, without_paths
from onnxsqueeze.models import Start
from onnxsqueeze.nn.checkpoint import has_trained_head, id2label, read_config
from onnxsqueeze.nn.family import family_of
from onnxsqueeze.plan import Plan, make_plan
from onnxsqueeze.recipe import LoadedRecipe, chain, load
from onnxsqueeze.stage import Stage
from onnxsqueeze.stages import Finetune
from onnxsqueeze.tasks.open import Task, open_task
from onnxsqueeze.tasks.settings import NAMES, TaskSettings


@dataclass(frozen=True)
class Request:
    """What a user asks of one run. Values of None are the recipe's."""

    recipe: Path
    task: str | None = None
    model: str | None = None
    data_dir: Path | None = None
    overrides: Sequence[str] = ()
    out: Path | None = None
    seed: int | None = None
    fresh: bool = False
    any_machine: bool = False
    require: Sequence[str] = ()
    backends: Backends = HERE


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything that can be wrong with its input has been looked at."""

    request: Request
    loaded: LoadedRecipe
    task: Task
    start: Start
    seed: int
    threads: int
    plan: Plan
    out: Path


def prepare(request: Request) -> Prepared:
    """Check recipe, task, rows, model and output folder, and plan the run; nothing is made. Raises UsageError."""
    loaded = load(request.recipe, request.overrides)
    recipe = loaded.recipe
    settings = recipe.task.beside(request.recipe.parent)
    if request.task not in (None, settings.name):
        if request.task not in NAMES:
            raise UsageError(
                f"--task {request.task}: unknown task {request.task!r}{nearest(str(request.task), NAMES)}",
                remedy="name a GLUE task or toy; files of your own are named in the recipe",
            )
        settings = _other_task(request.task, settings)
    seed = recipe.seed if request.seed is None else request.seed
    start = models.resolve(request.model or recipe.model)
    task = open_task(settings, data_dir=request.data_dir, seed=seed)
    if (
        not task.info.embeds
        and has_trained_head(start.artifact.path)
        and any(_uses_head(chain(recipe, target)) for target in recipe.targets)
    ):
        task = task.in_order_of(id2label(start.artifact.path))
    threads = threads_to_use()
    plan = make_plan(loaded, start, task, seed, threads, any_machine=request.any_machine)
    planned = sorted({branch.backend for branch in plan.branches})
    for name in request.require:
        if backends.get(name).name not in planned:
            raise UsageError(f"--require {name}: the recipe has no target for this backend", remedy=f"its backends: {', '.join(planned)}")
    _check_lengths(loaded, task, start)
    out = request.out or Path("runs") / f"{recipe.name}-{task.info.name}"
    return Prepared(request, loaded, task, start, seed, threads, plan, out)


def _other_task(name: str, settings: TaskSettings) -> TaskSettings:
    """The named task with what the recipe says of any task. Raises UsageError where that does not fit."""
    kept = settings.model_dump(include={"max_length", "train_rows", "compare", "pooling"})
    try:
        return TaskSettings(name=name, **kept)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"]
        raise UsageError(f"--task {name}: {said}", remedy="take a recipe that is not about embedding, or --task stsb") from error


def threads_to_use() -> int:
    """The cores that this process may use, or fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = environment.default_threads()
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def _uses_head(stages: tuple[tuple[Stage, ...], tuple[Stage, ...]]) -> bool:
    """Whether a chain starts from the model's own head; one whose first stage with a head is a forced finetune trains it anew."""
    first = next((stage for stage in (*stages[0], *stages[1]) if stage.needs_head), None)
    return not (isinstance(first, Finetune) and first.force)


def _check_lengths(loaded: LoadedRecipe, task: Task, start: Start) -> None:
    """Raise RecipeError where the task or a measured shape is longer than the model's positions, or than a stage leaves them."""
    recipe, config = loaded.recipe, read_config(start.artifact.path)
    longest, whose = family_of(config["model_type"]).max_tokens(config), f"the model {start.name!r}"
    measure = recipe.measure
    faults = []
    if task.info.max_length > longest:
        faults.append(loaded.fault(("task",), f"max_length: {whose} reads at most {longest} tokens, got {task.info.max_length}"))
    for stage in (stage for target in recipe.targets for stages in chain(recipe, target) for stage in stages):
        left = stage.reads_at_most(task.info.max_length)
        if left is not None and left < longest:
            longest, whose = left, f"a model behind {stage.name}"
    for path, tokens in (
        (("measure", "sequence"), measure.sequence),
        *((("measure", "shapes", i, "sequence"), s.sequence) for i, s in enumerate(measure.shapes)),
        *((("measure", "sweep", "sequence", i), n) for i, n in enumerate(measure.sweep.sequence if measure.sweep else ())),
    ):
        if tokens > longest:
            faults.append(loaded.fault(path, f"{whose} reads at most {longest} tokens, got {tokens}"))
    if faults:
        raise RecipeError(faults)


def command_of(request: Request) -> str:
    """The command that makes this record again; of absolute paths only the last part, since a record names no machine.

    ``--require`` and ``--out`` are left out: they change nothing that is recorded.
    """
    words = ["onnxsqueeze", "run", _nameless(request.recipe)]
    options: Mapping[str, object] = {
        "--task": request.task,
        "--model": _nameless(Path(request.model)) if request.model else None,
        "--data-dir": _nameless(request.data_dir) if request.data_dir else None,
        "--seed": request.seed,
    }
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    for override in request.overrides:
        words += ["--set", without_paths(override)]
    for backend, python in sorted(request.backends.pythons.items()):
        words += ["--python", f"{backend}={_nameless(Path(python))}"]
    return shlex.join([*words, *(["--any-machine"] if request.any_machine else []), *(["--fresh"] if request.fresh else [])])


def changed_by_options(request: Request, loaded: LoadedRecipe) -> dict[str, object]:
    """What the options of the command line put in place of the recipe's own values, by key of the recipe; None where they leave it. No absolute path."""
    settings = loaded.recipe.task
    named = request.task if request.task not in (None, settings.name) else None
    return {
        "task": _other_task(named, settings).model_dump(mode="json", exclude_defaults=True) if named else None,
        "model": _nameless(Path(request.model)) if request.model else None,
        "seed": request.seed,
    }


def _nameless(path: Path) -> str:
    return path.as_posix() if not path.is_absolute() and ".." not in path.parts and not path.as_posix().startswith("~") else path.name
