"""Run recipes/size.yaml on SST-2 and MRPC, from the project's root; keep the records, and one page of file size against metric.

    python benchmarks/size.py --data-dir glue --out reports/size
    python benchmarks/size.py --data-dir glue --out reports/size --tasks mrpc --train-only
    python benchmarks/size.py --out reports/size --table-only            draws the page again from the records

Writes <out>/<task>/results.json with its samples, <out>/size.md, and <out>/report.html, in which each task's targets are drawn, size across, metric upwards.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from onnxsqueeze.report.write import write_reports
from onnxsqueeze.results import Results, Target, read_results

RECIPE = Path("recipes") / "size.yaml"
# What a task's trainings are, within what two cores can do: rows, epochs and batches.
OVERRIDES = {
    "sst2": (
        "stages.finetune.epochs=2", "stages.finetune.batch_size=128", "stages.finetune.freeze_embeddings=true",
        "stages.table.batch_size=128", "stages.table.train_rows=20000", "stages.table.epochs=1",
        "stages.cut-quarter.batch_size=128", "stages.cut-quarter.train_rows=20000", "stages.cut-quarter.epochs=2",
        "stages.quarter.batch_size=128", "stages.quarter.epochs=2",
        "stages.cut-eighth.batch_size=128", "stages.cut-eighth.train_rows=20000", "stages.cut-eighth.epochs=1",
        "stages.eighth.batch_size=128", "stages.eighth.train_rows=20000", "stages.eighth.epochs=2",
        *(f"targets.{name}.stages.codes.{one}" for name in ("quarter-4", "quarter-3", "eighth-4", "eighth-3") for one in ("batch_size=128", "train_rows=20000", "epochs=1")),
        *(f"targets.{name}.stages.distill-small.{one}" for name in ("cnn", "bilstm") for one in ("batch_size=128", "train_rows=20000")),
    ),
    "mrpc": (
        "stages.finetune.epochs=5", "stages.finetune.freeze_embeddings=true",
        "stages.quarter.other_words=1", "stages.quarter.epochs=2",
        "stages.cut-eighth.epochs=1",
        *(f"targets.{name}.stages.codes.epochs=1" for name in ("eighth-4", "eighth-3")),
    ),
}  # fmt: skip


def run(task: str, asked: argparse.Namespace) -> None:
    """Run the recipe on one task, and keep its record."""
    out = asked.work / task
    words = [sys.executable, "-m", "onnxsqueeze", "run", RECIPE.as_posix(), "--task", task, "--data-dir", str(asked.data_dir)]
    words += ["--out", str(out), *(["--any-machine"] if asked.any_machine else []), *(["--train-only"] if asked.train_only else [])]
    words += [word for override in [*OVERRIDES.get(task, ()), *asked.set] for word in ("--set", override)]
    subprocess.run(words, check=True)
    if asked.train_only:
        return
    kept = asked.out / task
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "results.json", kept / "results.json")
    if (out / "samples").is_dir():
        shutil.copytree(out / "samples", kept / "samples", dirs_exist_ok=True)


def table(record: Results) -> str:
    """One line per target, the largest file first."""
    primary, split = record.task.primary, record.task.splits[0]
    made = sorted((one for one in record.targets if one.status == "ok"), key=lambda one: -(one.size_bytes or 0))
    head = f"| target | file, MB | times smaller | its bound, MB | dense twin, MB | {primary}, % | change, points (95 %) | p50 at 128 tokens, ms |"
    lines = [f"## {record.task.name}", "", f"{split.source} ({split.n} rows), seed {record.seed}, {record.environment.cpu}.", "", head]
    lines += ["| --- " * 8 + "|", *(_line(one, primary, split.name) for one in made), "", f"    {record.command}", ""]
    return "\n".join(lines)


def _line(target: Target, primary: str, split: str) -> str:
    versus, size = target.vs_baseline, target.size_bytes or 0
    cells = [target.name, f"{size / 1e6:.2f}", f"{versus.size_ratio:.1f}×" if versus else "1×"]
    cells += [f"{one / 1e6:.2f}" if one else "–" for one in (target.size_bound_bytes, target.size_dense_bytes)]
    cells.append(f"{100 * target.metrics[split][primary].value:.1f}")
    if versus:
        delta = versus.metrics[split][primary]
        cells.append(f"{100 * delta.delta:+.1f} ({100 * delta.ci95[0]:+.1f} to {100 * delta.ci95[1]:+.1f})")
    else:
        cells.append("–")
    cells.append(f"{target.latency.p50_ms:.2f}" if target.latency else "–")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what is asked for, then draw the page of all records that are there."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--data-dir", type=Path)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--work", type=Path, default=Path("runs/size"), help="where the models go")
    cli.add_argument("--tasks", nargs="+", default=list(OVERRIDES))
    cli.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    cli.add_argument("--any-machine", action="store_true", help="as `onnxsqueeze run` has it")
    cli.add_argument("--train-only", action="store_true", help="as `onnxsqueeze run` has it: no record, no page")
    cli.add_argument("--table-only", action="store_true")
    asked = cli.parse_args()
    if not asked.table_only:
        if asked.data_dir is None:
            raise SystemExit("--data-dir: name the folder with GLUE's files")
        for task in asked.tasks:
            run(task, asked)
    if asked.train_only:
        return
    records = [read_results(file.parent) for file in sorted(asked.out.glob("*/results.json"))]
    page = "\n".join(["# File size against metric\n", *map(table, records)])
    (asked.out / "size.md").write_text(page, encoding="utf-8")
    write_reports(records, asked.out)
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
