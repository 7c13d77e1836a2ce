"""Run the recipe of every single method, and those that combine them, on real tasks, from the project's root; keep the records and one table of them.

    python benchmarks/methods.py --data-dir glue --out reports/methods
    python benchmarks/methods.py --data-dir glue --out reports/methods --tasks mrpc --methods factorize --seeds 0 1 2
    python benchmarks/methods.py --data-dir glue --out reports/methods --tasks sst2 --methods smallest --rows 0
    python benchmarks/methods.py --out reports/methods --table-only      draws the table again from the records

The teacher is trained on all rows. Students and stages of SST-2 train on 10,000 of them, those of the other tasks on all; --rows says otherwise (0: all).
Writes <out>/<task>/<method>-<seed>/results.json with its samples (<task>-all-rows where SST-2's stages got all), and <out>/methods.md: a line per target, the mean over
seeds, and each seed's value.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from onnxsqueeze.recipe import load
from onnxsqueeze.results import Latency, MetricDelta, Results, Target, read_results
from onnxsqueeze.stages import Finetune

ROOT = Path(__file__).parent.parent
SINGLE = {file.stem: file for file in sorted((ROOT / "recipes" / "methods").glob("*.yaml"))}
RECIPES = SINGLE | {name: ROOT / "recipes" / f"{name}.yaml" for name in ("qd", "dp", "qdp", "smallest", "fastest")}
ROWS = {"sst2": 10_000}
# What tells a task from the recipes' defaults: on SST-2, whose rows are many and short, large batches, and few epochs for the teacher.
BATCH = {"sst2": 64}
TEACHER = {"sst2": ("epochs=2", "freeze_embeddings=true"), "mrpc": ("epochs=5",)}


def overrides(task: str, method: str, rows: int) -> list[str]:
    """The teacher as the task wants it, and every other stage that trains on ``rows`` rows (0: all)."""
    sets = [f"stages.finetune.{one}" for one in TEACHER.get(task, ())]
    recipe = load(RECIPES[method]).recipe
    places = [("stages", recipe.stages), *((f"targets.{target.name}.stages", target.stages) for target in recipe.targets)]
    trained = [(f"{place}.{stage.name}", stage) for place, stages in places for stage in stages if "train_rows" in type(stage).model_fields]
    sets += [f"{path}.batch_size={BATCH[task]}" for path, _ in trained if task in BATCH]
    return [*sets, *(f"{path}.train_rows={rows}" for path, stage in trained if rows and not isinstance(stage, Finetune))]


def run(task: str, method: str, seed: int, asked: argparse.Namespace) -> None:
    """Run one recipe on one task with one seed, and keep its record."""
    rows = ROWS.get(task, 0) if asked.rows is None else asked.rows
    folder = f"{task}-all-rows" if task in ROWS and not rows else task
    out = asked.work / f"{folder}-{method}-{seed}"
    file = RECIPES[method].relative_to(ROOT)
    words = [sys.executable, "-m", "onnxsqueeze", "run", str(file), "--task", task, "--data-dir", str(asked.data_dir)]
    words += ["--seed", str(seed), "--out", str(out), *(["--any-machine"] if asked.any_machine else [])]
    words += [word for override in [*overrides(task, method, rows), *asked.set] for word in ("--set", override)]
    subprocess.run([*words, *(["--train-only"] if asked.train_only else [])], check=True)
    if asked.train_only:
        return
    kept = asked.out / folder / f"{method}-{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "results.json", kept / "results.json")
    if (out / "samples").is_dir():  # not where nothing was timed
        shutil.copytree(out / "samples", kept / "samples", dirs_exist_ok=True)


def table(title: str, folders: Sequence[Path]) -> str:
    """One line per target of one task: sizes and times of the first seed, the metric of all."""
    records = sorted((read_results(folder) for folder in folders), key=lambda record: (record.recipe, record.seed))
    first = next((record for record in records if any(target.latency for target in record.targets)), records[0])
    primary, split = first.task.primary, first.task.splits[0]
    elsewhere: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        if _machine(record) != _machine(first):
            elsewhere[_machine(record)].append(f"{record.recipe} {record.seed}")
    about = (
        f"{split.source} ({split.n} rows), {_machine(first)}; times at batch 1, 1 thread. Trained on: rows and epochs of each"
        " stage behind the teacher. Change: the paired difference from the fp32 teacher of the same seed, the mean over seeds, and each with its interval. ÷: the mean time of"
        " int8 (the teacher's) by this one's, on the task's rows, each at its own length, both by way of fp32, beside which each was timed in turns. Entropy: the weights by how often each value occurs (order 0), about what packing could reach."
        + "".join(f" On another CPU, {machine}: {', '.join(runs)}." for machine, runs in sorted(elsewhere.items()))
    )
    head = f"| target | trained on | MB | entropy, MB | smaller | p50 128, ms | faster | p50 32, ms | real lengths: mean, ms | int8's ÷ | {primary}, % | change, points | each seed's (95 %) | each seed's {primary} |"
    lines = [f"## {title}", "", about, "", head, "| --- " * 14 + "|"]
    found: defaultdict[str, list[tuple[Results, Target]]] = defaultdict(list)
    for record in records:
        for target in record.targets:
            if target.status == "ok" and target.backend == "cpu":
                found[target.name].append((record, target))
    for every in found.values():
        record, target = next((one for one in every if one[1].latency), every[0])
        lines.append(_line(record, target, [other for run, other in every if run.recipe == record.recipe]))
    commands = [f"    {record.command}" for record in records]
    return "\n".join([*lines, "", *dict.fromkeys(commands)]) + "\n"


def _machine(record: Results) -> str:
    return f"{record.environment.cpu} ({record.environment.instruction_set})"


def _line(record: Results, target: Target, same: Sequence[Target]) -> str:
    primary, split = record.task.primary, record.task.splits[0].name
    short = next((x for x in target.latencies if (x.lengths, x.sequence) == ("fixed", 32)), None)
    task, versus = _at_own_lengths(target), target.vs_baseline
    cells = [
        target.name,
        _trained(target),
        _megabytes(target.size_bytes),
        _megabytes(target.size_entropy_bytes),
        f"{versus.size_ratio:.2f}×" if versus else "–",
    ]
    cells += [_ms(target.latency, target.latency.p50_ms) if target.latency else "–"]
    cells += [_ratio(versus.speedup, versus.speedup_ci95) if versus else "–"]
    cells += [
        _ms(short, short.p50_ms) if short else "–",
        _ms(task, task.mean_ms) if task and task.mean_ms else "–",
        _by_int8(record, target),
    ]
    values = [t.metrics[split][primary].value for t in same]
    cells.append(f"{100 * statistics.fmean(values):.1f}")
    changes = [t.vs_baseline.metrics[split][primary] for t in same if t.vs_baseline]
    cells.append(f"{100 * statistics.fmean(change.delta for change in changes):+.1f}" if changes else "–")
    cells.append("; ".join(_change(change) for change in changes) or "–")
    cells.append(", ".join(f"{100 * value:.1f}" for value in values))
    return "| " + " | ".join(cells) + " |"


def _change(change: MetricDelta) -> str:
    low, high = change.ci95
    return f"{100 * change.delta:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.1f}" if size is not None else "–"


def _ms(latency: Latency, value: float) -> str:
    return f"{value:.2f}" + ("" if latency.valid else " (others used the CPU)")


def _ratio(value: float | None, interval: Sequence[float] | None) -> str:
    return f"{value:.2f}× ({interval[0]:.2f}–{interval[1]:.2f})" if value is not None and interval else "–"


def _trained(target: Target) -> str:
    """Of each stage that trained behind the teacher: its kind, rows and epochs."""
    trained = [(stage.kind, stage.changed["details"]) for stage in target.stages if "history" in stage.changed.get("details", {})]
    return (
        "; ".join(f"{kind}: {details['trained_rows']:,} × {len(details['history'])}" for kind, details in trained if kind != "finetune")
        or "–"
    )


def _at_own_lengths(target: Target) -> Latency | None:
    return next((x for x in target.latencies if x.lengths == "task"), None)


def _by_int8(record: Results, target: Target) -> str:
    """int8's mean time by the target's on the task's rows, both by their ratio to the baseline that each was timed in turns with; it is found again from run to run, so their own times may be of other hours."""
    plain = next((t for t in record.targets if t.name == "int8"), None)
    if plain is None or target is plain or "fp32" in target.name:
        return "–"
    over, under = _mean_speedup(target), _mean_speedup(plain)
    if over is None or under is None:
        return "–"
    ratio = over[0] / under[0]
    reach = math.exp(math.hypot(*(math.log(high / value) for value, high in (over, under))))
    return _ratio(ratio, (ratio / reach, ratio * reach))


def _mean_speedup(target: Target) -> tuple[float, float] | None:
    """(ratio of mean times to the baseline on the task's rows, the upper end of its interval)."""
    found = next((one for one in target.extra.get("speedups", ()) if one["lengths"] == "task"), None)
    return (found["mean_speedup"], found["mean_speedup_ci95"][1]) if found and found.get("mean_speedup") else None


def main() -> None:
    """Run what is asked for, then draw the table of all records that are there."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--data-dir", type=Path)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--work", type=Path, default=Path("runs/methods"), help="where the models go")
    cli.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"])
    cli.add_argument("--methods", nargs="+", default=list(SINGLE), choices=list(RECIPES))
    cli.add_argument("--seeds", nargs="+", type=int, default=[0])
    cli.add_argument("--rows", type=int, help="training rows of each stage behind the teacher; 0: all")
    cli.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    cli.add_argument("--any-machine", action="store_true", help="as `onnxsqueeze run` has it")
    cli.add_argument("--train-only", action="store_true", help="as `onnxsqueeze run` has it: no record, no table")
    cli.add_argument("--table-only", action="store_true")
    asked = cli.parse_args()
    if not asked.table_only:
        if asked.data_dir is None:
            raise SystemExit("--data-dir: name the folder with GLUE's files")
        for task in asked.tasks:
            for seed in asked.seeds:
                for method in asked.methods:
                    run(task, method, seed, asked)
    if asked.train_only:
        return
    parts = ["# Methods, each on the same teacher\n"]
    folders = sorted(path for path in asked.out.iterdir() if path.is_dir())
    parts += [table(folder.name, [file.parent for file in sorted(folder.glob("*/results.json"))]) for folder in folders]
    (asked.out / "methods.md").write_text("\n".join(parts), encoding="utf-8")
    sys.stdout.write("\n".join(parts))


if __name__ == "__main__":
    main()
