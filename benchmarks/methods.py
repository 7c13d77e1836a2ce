"""Run the recipe of every single method on real tasks, from the project's root; keep the records and one table of them.

    python benchmarks/methods.py --data-dir glue --out reports/methods
    python benchmarks/methods.py --data-dir glue --out reports/methods --tasks mrpc --methods factorize --seeds 0 1 2
    python benchmarks/methods.py --out reports/methods --table-only      draws the table again from the records

Students and stages of SST-2 train on 10,000 rows unless --train-rows says otherwise; the other tasks on all of theirs. Writes
<out>/<task>/<method>-<seed>/results.json with its samples, and <out>/methods.md: a line per target, the mean over seeds, and each seed's value.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onnxsqueeze.results import Results, Target, read_results

ROOT = Path(__file__).parent.parent
METHODS = sorted(file.stem for file in (ROOT / "recipes" / "methods").glob("*.yaml"))
ROWS = {"sst2": 10_000}


def run(task: str, method: str, seed: int, asked: argparse.Namespace) -> None:
    """Run one recipe on one task with one seed, and keep its record."""
    out = asked.work / f"{task}-{method}-{seed}"
    words = [
        sys.executable,
        "-m",
        "onnxsqueeze",
        "run",
        f"recipes/methods/{method}.yaml",
        "--task",
        task,
        "--data-dir",
        str(asked.data_dir),
    ]
    words += ["--seed", str(seed), "--out", str(out)]
    rows = asked.train_rows or ROWS.get(task)
    sets = [f"task.train_rows={rows}"] if rows else []
    words += [word for override in [*sets, *asked.set] for word in ("--set", override)]
    subprocess.run(words, check=True)
    kept = asked.out / task / f"{method}-{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "results.json", kept / "results.json")
    shutil.copytree(out / "samples", kept / "samples", dirs_exist_ok=True)


def table(records: Sequence[Results]) -> str:
    """One line per target of one task: sizes and times of the first seed, the metric of all."""
    first = records[0]
    primary, split = first.task.primary, first.task.splits[0]
    about = (
        f"{split.source} ({split.n} rows), {first.task.training[0].n:,} training rows, {first.environment.cpu} ({first.environment.instruction_set}); times at"
        f" batch 1, 1 thread; change: the paired difference from the fp32 teacher, mean of {len({r.seed for r in records})} seeds, interval of the first."
    )
    head = (
        f"| target | MB | smaller | p50 128, ms | p50 32, ms | real lengths: mean, ms | {primary}, % | change, points (95 %) | each seed |"
    )
    lines = [f"## {first.task.name}", "", about, "", head, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    seen: set[str] = set()
    for record in records:
        for target in record.targets:
            same = [t for other in records for t in other.targets if t.name == target.name and t.status == "ok"]
            if target.status != "ok" or target.backend != "cpu" or target.name in seen:
                continue
            seen.add(target.name)
            lines.append(_line(target, same, primary, split.name))
    return "\n".join(lines) + "\n"


def _line(target: Target, same: Sequence[Target], primary: str, split: str) -> str:
    assert target.latency is not None  # noqa: S101  # it was measured
    by_shape = {(x.lengths, x.sequence): x for x in (target.latency, *target.latencies)}
    task = next((x for x in by_shape.values() if x.lengths == "task"), None)
    short = by_shape.get(("fixed", 32))
    values = list(dict.fromkeys(t.metrics[split][primary].value for t in same))
    cells = [target.name, f"{(target.size_bytes or 0) / 1e6:.1f}"]
    versus = target.vs_baseline
    cells.append(f"{versus.size_ratio:.2f}×" if versus else "–")
    cells += [
        f"{target.latency.p50_ms:.2f}",
        f"{short.p50_ms:.2f}" if short else "–",
        f"{task.mean_ms:.2f}" if task and task.mean_ms else "–",
    ]
    cells.append(f"{100 * statistics.fmean(values):.1f}")
    if versus:
        deltas = [t.vs_baseline.metrics[split][primary].delta for t in same if t.vs_baseline]
        low, high = versus.metrics[split][primary].ci95
        cells.append(f"{100 * statistics.fmean(deltas):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    else:
        cells.append("–")
    cells.append(", ".join(f"{100 * value:.1f}" for value in values))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what is asked for, then draw the table of all records that are there."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--data-dir", type=Path)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--work", type=Path, default=Path("runs/methods"), help="where the models go")
    cli.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"])
    cli.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    cli.add_argument("--seeds", nargs="+", type=int, default=[0])
    cli.add_argument("--train-rows", type=int, default=0)
    cli.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    cli.add_argument("--table-only", action="store_true")
    asked = cli.parse_args()
    if not asked.table_only:
        if asked.data_dir is None:
            raise SystemExit("--data-dir: name the folder with GLUE's files")
        for task in asked.tasks:
            for seed in asked.seeds:
                for method in asked.methods:
                    run(task, method, seed, asked)
    parts = ["# Single methods, each on the same teacher\n"]
    folders = sorted(path for path in asked.out.iterdir() if path.is_dir())
    parts += [table([read_results(file.parent) for file in sorted(folder.glob("*/results.json"))]) for folder in folders]
    (asked.out / "methods.md").write_text("\n".join(parts), encoding="utf-8")
    sys.stdout.write("\n".join(parts))


if __name__ == "__main__":
    main()
