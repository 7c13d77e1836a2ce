"""A recipe: its schema, its loader, and every fault at once with file, line and nearest word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxsqueeze import backends
from onnxsqueeze.document import Document, Place
from onnxsqueeze.errors import Fault, RecipeError, UsageError, nearest
from onnxsqueeze.measure.settings import MeasureSettings
from onnxsqueeze.stage import Stage, State
from onnxsqueeze.stages import AnyStage, Finetune
from onnxsqueeze.tasks.settings import NAMES, TaskSettings

MODEL = "model"  # what `after:` and `teacher:` call the checkpoint that the run starts from
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"

_FILES_OF_A_RUN = ("results.json", "report.md", "report.html", "samples")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gates(_Part):
    """Limits that each target must hold on the run's record; missing one ends the run with exit code 3."""

    metric_drop_pp: float | None = Field(
        None, ge=0, description="Most points that the primary metric may lie below the baseline's (point estimate)"
    )
    min_size_ratio: float | None = Field(None, gt=0, description="Least baseline bytes ÷ target bytes")
    min_speedup: float | None = Field(None, gt=0, description="Least baseline p50 ÷ target p50 at the measured shape")
    min_speedup_vs_parent: float | None = Field(
        None,
        gt=0,
        description="The same against the target that holds the file this one was made from (1: its own stages must not slow it); where there is such a target",
    )


class Target(_Part):
    """One .onnx file and one row of the report: a branch of stages for one backend."""

    name: str = Field(pattern=_NAME, description="Name of the row and of its folder below --out")
    backend: str = Field("cpu", description="cpu, cuda, tensorrt, openvino, or the full name of an execution provider")
    after: str | None = Field(
        None, description="Id of the shared stage that this branch starts after; 'model' is the start; default: the last shared stage"
    )
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    baseline: bool = Field(
        default=False, description="Whether the other targets of this backend are compared with this one: the teacher, export alone"
    )
    gates: Gates | None = Field(None, description="Instead of the recipe's gates")


class Recipe(_Part):
    """How to squeeze; task and model say what."""

    schema_: Literal[1] = Field(alias="schema", description="Version of this format")
    name: str = Field(pattern=_NAME)
    description: str = ""
    task: TaskSettings = Field(description="A GLUE task's name, 'toy', or files of your own")
    model: str = Field(
        "minilm", description="Checkpoint to start from: a folder, 'minilm', or a name on the Hub; with a trained head it is the teacher"
    )
    seed: int = Field(0, ge=0, lt=2**31)
    stages: tuple[AnyStage, ...] = Field((), description="In PyTorch, shared by all targets")
    targets: tuple[Target, ...] = Field(min_length=1, description="One .onnx and one row of the report each")
    measure: MeasureSettings = MeasureSettings()
    gates: Gates = Gates()


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, the text it came from and its digest, the document (for later messages), and the folder it lies in."""

    recipe: Recipe
    text: str
    sha256: str
    document: Document
    folder: Path

    def fault(self, place: Place, message: str) -> Fault:
        """A fault at ``place`` of this recipe."""
        return self.document.fault(place, message)


def load(file: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe; ``overrides`` are ``PATH=VALUE`` as `--set` takes them.

    PATH is keys and list places joined by dots; in a list of stages or targets an id or name stands for its place:
    ``stages.finetune.epochs=2``, ``targets.int8-ort.stages.0.per_channel=true``. VALUE is YAML.
    ``recipe_sha256`` is of the file's bytes followed by the overrides, one a line.

    Raises RecipeError with every fault that can be told, UsageError where the file or an override cannot be read.
    """
    name = file.name if file.is_absolute() else file.as_posix()
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        near = [p.as_posix() for p in (*sorted(Path("recipes").glob("*.y*ml")), *sorted(file.parent.glob("*.y*ml")))]
        raise UsageError(
            f"recipe {name}: there is no such file{nearest(file.as_posix(), near) if near else ''}",
            remedy="name a recipe file, e.g. recipes/qdp.yaml",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"recipe {name}: cannot be read as UTF-8 text: {error}", remedy="name a YAML recipe, e.g. recipes/qdp.yaml"
        ) from error
    document = Document.read(text, name)
    faults = list(document.faults)
    if not isinstance(document.data, dict):
        got = type(document.data).__name__
        raise RecipeError([*faults, Fault(name, 1, "", f"a recipe is a mapping with 'schema', 'name', 'task' and 'targets', got {got}")])
    document.override_all(overrides)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        faults += [_from_pydantic(e, document) for e in error.errors(include_url=False)]
        raise RecipeError(_in_order(faults)) from error
    sha256 = hashlib.sha256(content + "".join(f"\n{o}" for o in overrides).encode()).hexdigest()
    loaded = LoadedRecipe(recipe, text, sha256, document, file.parent)
    faults += _check_order(loaded)
    if faults:
        raise RecipeError(_in_order(faults))
    return loaded


def teacher_of(stage: Stage) -> str | None:
    """The id that a stage names in ``teacher:``, where its kind has one and it names one."""
    named = getattr(stage, "teacher", None)
    return str(named) if named is not None else None


def chain(recipe: Recipe, target: Target) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """(shared stages up to ``after``, the branch's own) of a target."""
    if target.after == MODEL:
        return (), target.stages
    names = [stage.name for stage in recipe.stages]
    until = names.index(target.after) + 1 if target.after in names else len(names)
    return recipe.stages[:until], target.stages


# ── what a single part cannot know: order, names, baselines ─────────────────────────────────────────────────────────


def _check_speed_gates(loaded: LoadedRecipe) -> Iterator[Fault]:
    if loaded.recipe.measure.latency:
        return
    places: list[tuple[Place, Gates | None]] = [(("gates",), loaded.recipe.gates)]
    places += [(("targets", i, "gates"), target.gates) for i, target in enumerate(loaded.recipe.targets)]
    for place, gates in places:
        for name in ("min_speedup", "min_speedup_vs_parent"):
            if gates and getattr(gates, name) is not None:
                yield loaded.fault((*place, name), f"{name}: nothing is timed with `measure: {{latency: false}}`; take one of them out")


def _check_order(loaded: LoadedRecipe) -> Iterator[Fault]:
    recipe = loaded.recipe
    yield from _check_speed_gates(loaded)
    yield from _check_chain(loaded, (), recipe.stages, ("stages",), "cpu", shared=True)
    shared = [stage.name for stage in recipe.stages]
    seen: dict[str, int] = {}
    baselines: dict[str, str] = {}
    for i, target in enumerate(recipe.targets):
        place: Place = ("targets", i)
        if target.name in seen:
            yield loaded.fault((*place, "name"), f"{target.name!r} is the name of targets[{seen[target.name]}] too; give each its own")
        seen[target.name] = i
        if target.name in _FILES_OF_A_RUN:
            yield loaded.fault((*place, "name"), f"{target.name!r} is the name of a file that every run writes; name the target otherwise")
        try:
            backend = backends.get(target.backend).name
        except UsageError as error:
            yield loaded.fault((*place, "backend"), error.message)
            continue
        if target.after not in (None, MODEL, *shared):
            yield loaded.fault(
                (*place, "after"), f"no shared stage has the id {target.after!r}{nearest(str(target.after), [MODEL, *shared])}"
            )
            continue
        above, own = chain(recipe, target)
        yield from _check_chain(loaded, above, own, (*place, "stages"), backend, shared=False)
        whole = (*above, *own)
        for j, stage in enumerate(whole):
            clash = stage.clashes(whole[j + 1 :])
            if clash:
                yield loaded.fault((*place, "stages", max(j - len(above), 0)), f"{stage.name}: {clash}")
        if own[-1].gives == "checkpoint":
            yield loaded.fault((*place, "stages"), f"ends in PyTorch ({own[-1].kind}); a target is an .onnx file: add {{kind: export}}")
        if target.baseline:
            if backend in baselines:
                yield loaded.fault(
                    (*place, "baseline"), f"backend {backend} has the baseline {baselines[backend]!r} already; a backend has exactly one"
                )
            baselines[backend] = target.name
            teacher = _teacher_stage(recipe)
            at = above[-1].name if above else MODEL
            if [stage.kind for stage in own] != ["export"] or at != teacher:
                yield loaded.fault(
                    (*place, "baseline"),
                    f"a baseline is the teacher exported, untouched: `after: {teacher}` and `stages: [{{kind: export}}]`, got after: {at} and {[s.kind for s in own]}",
                )


def _teacher_stage(recipe: Recipe) -> str:
    """The id of the stage whose result is the teacher: the last shared finetune, else the start."""
    return next((stage.name for stage in reversed(recipe.stages) if isinstance(stage, Finetune)), MODEL)


def _check_chain(
    loaded: LoadedRecipe, above: Sequence[Stage], own: Sequence[Stage], place: Place, backend: str, *, shared: bool
) -> Iterator[Fault]:
    names = [MODEL, *(stage.name for stage in above)]
    state: State = above[-1].gives if above else "checkpoint"
    for i, stage in enumerate(own):
        here: Place = (*place, i)
        if stage.name in names:
            yield loaded.fault(here, f"two stages in this chain have the id {stage.name!r}; give one of them an `id:` of its own")
        if state not in stage.takes:
            yield loaded.fault(here, _misplaced(stage, state, names[-1]))
        elif shared and stage.gives != "checkpoint":
            yield loaded.fault(here, f"{stage.kind} gives an .onnx file; shared stages are in PyTorch: move it into `targets`")
        reason = None if shared else stage.refuses(backend)
        if reason:
            yield loaded.fault(here, f"{stage.kind} for backend {backend}: {reason}")
        named = teacher_of(stage)
        if named is not None and named not in names:
            yield loaded.fault((*here, "teacher"), f"no stage above has the id {named!r}{nearest(named, names)}")
        if (
            stage.needs_teacher
            and named is None
            and any(isinstance(later, Finetune) for later in own[i + 1 :])
            and not any(isinstance(s, Finetune) for s in (*above, *own[:i]))
        ):
            yield loaded.fault(here, f"{stage.kind} learns from a teacher, but finetune stands below it; move finetune above it")
        names.append(stage.name)
        state = stage.given(state)


_STATE_WORDS: dict[State, str] = {
    "checkpoint": "a PyTorch checkpoint",
    "onnx": "a float32 .onnx",
    "onnx-int": "a quantized .onnx",
    "onnx-fp16": "a float16 .onnx",
    "onnx-packed": "a packed .onnx",
}


def _misplaced(stage: Stage, state: State, before: str) -> str:
    takes = " or ".join(_STATE_WORDS[s] for s in stage.takes)
    message = f"{stage.kind} takes {takes}, but {before!r} before it gives {_STATE_WORDS[state]}"
    if state == "checkpoint":
        return f"{message}; add {{kind: export}} before it"
    if "checkpoint" in stage.takes:
        return f"{message}; move it above the export"
    return f"{message}; take one of the two out"


# ── pydantic's faults in our words ───────────────────────────────────────────────────────────────────────────────────


def _kinds() -> dict[str, type[Stage]]:
    return {get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(get_args(AnyStage)[0])}


def _from_pydantic(error: Any, document: Document) -> Fault:
    loc: Place = tuple(error["loc"])
    kinds = _kinds()
    real: list[str | int] = []  # the place in the YAML: without the tag that pydantic puts in for the kind of a stage
    shown: list[str | int] = []
    here = document.data
    model: Any = Recipe
    for part in loc:
        shown.append(part)
        if isinstance(here, Mapping) and part in kinds and here.get("kind") == part and part not in here:
            model = kinds[str(part)]
            continue
        real.append(part)
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
        if isinstance(part, int):
            model = Target if "targets" in real and "stages" not in real else None
        elif model is not None and part in model.model_fields:
            model = _mapping_of(model.model_fields[part].annotation)
    kind, got = error["type"], error.get("input")
    if kind == "extra_forbidden":
        last = str(loc[-1])
        known = [f.alias or n for n, f in model.model_fields.items()] if model else []
        message = f"unknown key {last!r}{nearest(last, known)}"
    elif kind == "missing":
        message = f"{str(loc[-1])!r} is missing; add it"
    elif kind == "union_tag_invalid":
        message = f"unknown kind {str(error['ctx']['tag'])!r}{nearest(str(error['ctx']['tag']), list(kinds))}"
        shown.append("kind")
        real.append("kind")
    elif kind in ("union_tag_not_found", "model_attributes_type") and "stages" in loc:
        message = f"a stage is a mapping with a `kind:`, got {_brief(got)}; known: {', '.join(kinds)}"
    elif kind in ("model_attributes_type", "model_type"):
        message = f"must be a mapping, got {_brief(got)}"
    else:
        message = f"{_lower(error['msg'])}, got {_brief(got)}"
    return document.fault(tuple(real), message, shown=tuple(shown))


def _mapping_of(annotation: Any) -> type[BaseModel] | None:
    """The settings that a field holds as a mapping of its own (a stage's `budget`, the recipe's `measure`), or None."""
    types = (annotation, *get_args(annotation))
    return next((one for one in types if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return (
        f"must be {message}"
        if not message.startswith(("must", "Value", "unknown")) and re.match(r"(a|greater|less|one|'|\d|either)", message)
        else message[:1].lower() + message[1:]
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _in_order(faults: Sequence[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: fault.line or 0)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; docs/recipe.schema.json is made from it."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["properties"]["task"] = {
        "anyOf": [{"enum": list(NAMES)}, {"$ref": "#/$defs/TaskSettings"}]
    }  # `task: sst2` is short for {name: sst2}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "onnxsqueeze recipe", **schema}
