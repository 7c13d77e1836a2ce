"""A YAML file as plain data that remembers where each part stands, and takes changes from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from onnxsqueeze.errors import Fault, RecipeError, UsageError, nearest

Place = tuple[str | int, ...]  # ("stages", 0, "epochs")


@dataclass(frozen=True)
class Document:
    """Data of one YAML file; ``lines`` maps each place to its line, ``faults`` are keys that stand twice and tags of somebody's own."""

    file: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def read(cls, text: str, file: str) -> Document:
        """The data in ``text``; ``file`` is its name in messages. Raises RecipeError where it is not YAML."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or str(error)
            raise RecipeError(
                [Fault(file, mark.line + 1 if mark else None, "", f"is not YAML: {problem}; mend the indentation or quotes near here")]
            ) from error
        lines: dict[Place, int] = {}
        faults: list[Fault] = []
        data = _plain(node, (), lines, faults, file) if node else None
        return cls(file, data, lines, faults)

    def fault(self, place: Place, message: str, *, shown: Place | None = None) -> Fault:
        """A fault at ``place``, or in the nearest part above it that the file has; ``shown`` is how the message spells the place."""
        line = next((self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines), None)
        return Fault(self.file, line, _spell(place if shown is None else shown), message)

    def override_all(self, overrides: Iterable[str]) -> None:
        """Put several ``PATH=VALUE`` of a recipe into the data, in order; a task given by its name alone becomes a mapping where one looks into it."""
        for override in overrides:
            if override.startswith("task.") and isinstance(self.data.get("task"), str):
                self.data["task"] = {"name": self.data["task"]}
            self.override(override)

    def override(self, override: str) -> None:
        """Put one ``PATH=VALUE`` into the data, which must be a mapping. Raises UsageError where it cannot be."""
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {override}: must be PATH=VALUE", remedy="for example --set stages.finetune.epochs=2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override}: the value is not YAML: {error}", remedy="quote it, or see the recipe reference") from error
        here = self.data
        *parents, last = (step for step in re.split(r"\.|\[(\d+)\]", path) if step)
        for at, step in enumerate([*parents, last]):
            is_last = at == len(parents)
            if isinstance(here, list):
                names = [str(i.get("id") or i.get("name") or i.get("kind")) if isinstance(i, dict) else str(i) for i in here]
                index = names.index(step) if step in names else int(step) if step.isdigit() and int(step) < len(here) else None
                if index is None:
                    raise UsageError(
                        f"--set {override}: nothing here is called {step!r}{nearest(step, names)}",
                        remedy="name a stage by its id, a target by its name, or either by its place (from 0)",
                    )
                if is_last:
                    here[index] = value
                else:
                    here = here[index]
            elif isinstance(here, dict):
                if is_last:
                    here[step] = value
                else:
                    here = here.setdefault(step, {})
            else:
                raise UsageError(
                    f"--set {override}: {'.'.join(parents[:at])!r} is a value, it has no {step!r}",
                    remedy="see the recipe reference for what can be set",
                )


def _plain(node: yaml.Node, place: Place, lines: dict[Place, int], faults: list[Fault], file: str) -> Any:
    """Plain data of a YAML node; ``lines`` and ``faults`` grow."""
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in data:
                faults.append(
                    Fault(file, line, _spell((*place, key)), f"the key {key!r} stands twice; the first is in line {lines[(*place, key)]}")
                )
                continue
            data[key] = _plain(value_node, (*place, key), lines, faults, file)
            lines[(*place, key)] = line
        return data
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*place, i), lines, faults, file) for i, item in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:  # a tag of somebody's own
        problem = getattr(error, "problem", None) or "cannot be read"
        faults.append(Fault(file, node.start_mark.line + 1, _spell(place), f"{problem}; write a plain value"))
        return None
    except ValueError:  # a date that is none: its text, for the schema to judge
        return node.value
    finally:
        loader.dispose()


def _spell(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")
