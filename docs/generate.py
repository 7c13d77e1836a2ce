"""Write the generated pages of docs/ (command line, recipe reference, schemas) and the measured parts of README.md.

`make docs` runs this; a test checks that the pages say what the code says.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, get_args

import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console

from onnxsqueeze.cli import app
from onnxsqueeze.forms import FORMS
from onnxsqueeze.measure.settings import MeasureSettings
from onnxsqueeze.recipe import Gates, Recipe, Target, json_schema
from onnxsqueeze.report.details import ONE_PROCESS
from onnxsqueeze.report.terminal import print_summary
from onnxsqueeze.results import Results, read_results
from onnxsqueeze.results import Target as Row
from onnxsqueeze.stage import Stage
from onnxsqueeze.stages import AnyStage
from onnxsqueeze.tasks.settings import TaskSettings

DOCS = Path(__file__).parent
ROOT = DOCS.parent
_SHOWN = ROOT / "reports" / "qdp-sst2"  # the measured table of the README's first screen
_FIRST = ROOT / "reports" / "qdp-toy"  # the record of `make run`
_METHODS = ROOT / "reports" / "methods" / "sst2-all-rows"
# Of each recipe there the target that the README shows, behind the fp32 teacher.
_BEST = {"prune-structure-0": "prune-structure-fp32", "early-exit-0": "early-exit-int8", "fastest-0": "fastest"}
_SIZES = ROOT / "reports" / "size"
_PEERS = ROOT / "reports" / "backends" / "peers.json"
_MADE = "<!-- made by docs/generate.py (`make docs`); do not edit -->\n\n"


def pages() -> dict[str, str]:
    """File name → content of every generated page."""
    return {
        "cli.md": _cli(),
        "recipe.md": _recipe(),
        "recipe.schema.json": json.dumps(json_schema(), indent=2) + "\n",
        "results.schema.json": json.dumps(Results.model_json_schema(by_alias=True), indent=2) + "\n",
        "../README.md": _readme((ROOT / "README.md").read_text(encoding="utf-8")),
    }


def _readme(text: str) -> str:
    """README.md with its measured parts drawn from the published records again."""
    for name, part in (("table", _measured()), ("output", _output()), ("methods", _methods()), ("sizes", _sizes()), ("peers", _peers())):
        begin, end = f"<!-- {name}: made by docs/generate.py from reports/ -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{part}{end}{after}"
    return text


def _measured() -> str:
    """The CPU targets of one record as a Markdown table, with the command that made it."""
    results = read_results(_SHOWN)
    lines = [
        _head(results),
        "| --- " * 7 + "|",
        *(_row(results, target) for target in results.targets if target.backend == "cpu" and target.latency),
    ]
    notes = [f"\n{ONE_PROCESS}\n"] if any(t.latency and t.latency.processes == 1 for t in results.targets) else []
    return f"{_where(results)} ([the whole report](reports/qdp-sst2/report.md)):\n\n" + "\n".join([*lines, *notes]) + "\n\n"


def _where(results: Results) -> str:
    split, environment = results.task.splits[0], results.environment
    return f"{results.model.split('/')[-1]} on {split.source} ({split.n} rows), {environment.cpu} ({environment.instruction_set}), batch 1, 128 tokens, 1 thread"


def _head(results: Results, more: str = "") -> str:
    return f"| target | MB | smaller | p50 | faster (95 %) |{more} {results.task.primary}, % | change, points (95 %) |"


def _row(results: Results, target: Row, *more: str) -> str:
    """One target's line below `_head`; ``more`` are the cells in front of the metric."""
    assert target.latency is not None  # noqa: S101  # it was measured
    primary, split, versus = results.task.primary, results.task.splits[0].name, target.vs_baseline
    p50, value = f"{target.latency.p50_ms:.1f} ms", f"{100 * target.metrics[split][primary].value:.1f}"
    cells = [target.name, f"{(target.size_bytes or 0) / 1e6:.1f}"]
    if versus and versus.speedup and versus.speedup_ci95:
        delta, (low, high) = versus.metrics[split][primary], versus.speedup_ci95
        change = f"{100 * delta.delta:+.1f} ({100 * delta.ci95[0]:+.1f} to {100 * delta.ci95[1]:+.1f})"
        faster = (
            f"{versus.speedup:.2f}× ({low:.2f}–{high:.2f})" if target.latency.valid else "–"
        )  # other programs used the CPU, or the times drifted
        cells += [f"{versus.size_ratio:.2f}×", p50, faster, *more, value, change]
    else:
        cells += ["–", p50, "–", *more, value, "–"]
    return "| " + " | ".join(cells) + " |"


def _methods() -> str:
    """What single methods and combined ones make of one teacher, trained on all rows."""
    first = read_results(_METHODS / next(iter(_BEST)))
    lines = [_head(first, " mean at real lengths |"), "| --- " * 8 + "|"]
    shown = [(first, "fp32"), *((read_results(_METHODS / folder), name) for folder, name in _BEST.items())]
    for results, name in shown:
        target = next(target for target in results.targets if target.name == name)
        own = next(latency for latency in target.latencies if latency.lengths == "task")
        lines.append(_row(results, target, f"{own.mean_ms:.2f} ms"))
    return f"{_where(first)}:\n\n" + "\n".join(lines) + "\n\n"


def _sizes() -> str:
    """The targets of recipes/size.yaml on every task that it was measured on."""
    parts = []
    for folder in sorted(file.parent for file in _SIZES.glob("*/results.json")):
        results = read_results(folder)
        lines = [_head(results), "| --- " * 7 + "|", *(_row(results, target) for target in results.targets if target.latency)]
        parts.append(f"{_where(results)}:\n\n" + "\n".join(lines) + "\n\n")
    return "".join(parts)


def _peers() -> str:
    """How long each other maker's int8 takes beside ours, per shape."""
    record = json.loads(_PEERS.read_text(encoding="utf-8"))
    rows = [row for row in record["rows"] if row["status"] == "ok" and row["engine"] != "ours"]
    shapes = list(dict.fromkeys((row["batch"], row["tokens"], row["threads"]) for row in rows))
    heads = [f"{batch} × {tokens}, {threads} thread{'s' if threads > 1 else ''}" for batch, tokens, threads in shapes]
    cells = {(row["engine"], row["batch"], row["tokens"], row["threads"]): _times(row) for row in rows}
    lines = [f"| its time ÷ ours (95 %) | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for what, engine in dict.fromkeys((row["what"], row["engine"]) for row in rows):
        lines.append(f"| {what} | {' | '.join(cells.get((engine, *shape), '–') for shape in shapes)} |")
    notes = [] if record.get("processes", 1) > 1 else [f"\n{ONE_PROCESS}\n"]
    return f"{record['cpu']} ({record['instruction_set']}), batch × tokens:\n\n" + "\n".join([*lines, *notes]) + "\n\n"


def _times(row: dict[str, Any]) -> str:
    low, high = row["ratio_ci95"]
    return f"{row['ratio_to_ours']:.2f} ({low:.2f}–{high:.2f})"


def _output() -> str:
    """What the record of `make run` looks like on a terminal of 80 columns."""
    text = io.StringIO()
    print_summary([read_results(_FIRST)], Console(file=text, width=80, color_system=None, highlight=False))
    return "".join(f"    {line}".rstrip() + "\n" for line in text.getvalue().splitlines()) + "\n"


def _cli() -> str:
    root: Any = typer.main.get_command(app)
    parts = [_MADE, "# Command line\n\n", f"{_plain(root.help)}\n\n", _block(root.epilog)]
    for name, command in root.commands.items():
        parts.append(f"## onnxsqueeze {name}\n\n{_plain(command.help)}\n\n")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        parts.append(
            f"    onnxsqueeze {name} {' '.join(p.metavar or p.name.upper() for p in arguments)}{' [OPTIONS]' if options else ''}\n\n"
        )
        if options:
            parts.append("| option | meaning |\n| --- | --- |\n")
            parts += [
                f"| `{', '.join(p.opts)}{_metavar(p)}` | {_plain(p.help)}{' Repeatable.' if p.multiple and 'repeatable' not in p.help else ''} |\n"
                for p in options
            ]
            parts.append("\n")
        parts.append(_block(command.epilog))
    return "".join(parts).rstrip() + "\n"


def _metavar(option: Any) -> str:
    if option.is_flag:
        return ""
    return f" {option.metavar}"


def _plain(text: str | None) -> str:
    return (text or "").replace("[b]", "`").replace("[/b]", "`").strip()


def _block(epilog: str | None) -> str:
    lines = [line for line in (epilog or "").split("\n") if line.strip()]
    return (
        "".join(f"    {line.strip()}\n" if line.startswith("  ") else f"\n{line}\n\n" for line in lines).strip("\n") + "\n\n"
        if lines
        else ""
    )


def _recipe() -> str:
    parts = [
        _MADE,
        "# Recipe reference\n\n",
        "A recipe says how to squeeze; `--task` and `--model` say what. Every key below; unknown keys are errors.\n\n",
    ]
    sections: list[tuple[str, str, type[BaseModel]]] = [
        ("The recipe", "", Recipe),
        ("targets[]", "", Target),
        ("task", "A task's name alone (`task: sst2`) stands for `{name: sst2}`.", TaskSettings),
        ("measure", "", MeasureSettings),
        ("gates", "", Gates),
    ]
    for title, note, model in sections:
        parts.append(f"## {title}\n\n{_first(model)}{' ' + note if note else ''}\n\n{_table(model)}\n")
    parts.append("## Stages\n\nEvery stage takes `kind` and, where two of a chain are alike, `id`.\n\n")
    parts += [_stage(stage) for stage in get_args(get_args(AnyStage)[0])]
    parts += ["## Forms of optimize-graph\n\n", "What each may do to the outputs of a float graph, and of a quantized one.\n\n"]
    parts.append("| form | meaning | float | quantized |\n| --- | --- | --- | --- |\n")
    for form in FORMS:
        first = str(sys.modules[form.apply.__module__].__doc__).splitlines()[0]
        parts.append(f"| `{form.name}` | {first.partition(': ')[2]} | {form.effect} | {form.quantized} |\n")
    return "".join(parts).rstrip() + "\n"


def _stage(stage: type[Stage]) -> str:
    kind = get_args(stage.model_fields["kind"].annotation)[0]
    same = len(stage.takes) > 1 and all(stage.model_construct().given(state) == state for state in stage.takes)
    flow = f"takes {' or '.join(stage.takes)}, gives {'the same' if same else stage.gives}"
    table = _table(stage, skip=("kind", "id"))
    return f"### {kind}\n\n{_first(stage)} ({flow})\n\n{table or 'No settings.'}\n"


def _first(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


def _table(model: type[BaseModel], skip: tuple[str, ...] = ()) -> str:
    rows = []
    schema = model.model_json_schema(by_alias=True)["properties"]
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        key = field.alias or name
        default = (
            "required"
            if field.is_required()
            else _default(field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True))
        )
        rows.append(f"| `{key}` | {_type(schema[key])} | {default} | {field.description or ''} |\n")
    return "| key | type | default | meaning |\n| --- | --- | --- | --- |\n" + "".join(rows) if rows else ""


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if value is None or value in ((), ""):
        return "–"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        value = [json.loads(v.model_dump_json(exclude_defaults=True)) for v in value]
    return f"`{json.dumps(value)}`"


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = [_type(s) for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "mapping"
    if schema.get("type") == "array":
        return "list"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true/false", "object": "mapping"}
    text = words.get(str(schema.get("type")), "stage" if "discriminator" in schema else "value")
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return f"{text} {', '.join(limits)}".strip()


if __name__ == "__main__":
    for file, text in pages().items():
        (DOCS / file).write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote docs/{file}\n")
