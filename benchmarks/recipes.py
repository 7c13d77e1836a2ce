"""Run one recipe on several tasks, from the project's root; keep the records, and one page of all.

    python benchmarks/recipes.py size --data-dir glue --any-machine
    python benchmarks/recipes.py quantization --data-dir glue --tasks sst2 --set measure.latency=false
    python benchmarks/recipes.py size --data-dir glue --tasks mrpc --train-only
    python benchmarks/recipes.py size --table-only                       draws the page again from the records

Writes reports/<recipe>/<task>/results.json with its samples, <recipe>.md (a line per target) and report.html, in which each task's targets are drawn, size across,
metric upwards; --out names another folder than reports/<recipe>.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from onnxsqueeze.report.write import write_reports
from onnxsqueeze.results import Latency, Results, Target, read_results

ROOT = Path(__file__).parent.parent
_TEACHER = {
    "sst2": ("stages.finetune.epochs=2", "stages.finetune.batch_size=128", "stages.finetune.freeze_embeddings=true"),
    "mrpc": ("stages.finetune.epochs=5", "stages.finetune.freeze_embeddings=true"),
}
# Recipe → task → what the task's trainings are, within what two cores can do: rows, epochs and batches.
OVERRIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "quantization": {**_TEACHER, "cola": (), "stsb": ()},
    "size": {
        "sst2": (
            *_TEACHER["sst2"],
            "stages.table.batch_size=128", "stages.table.train_rows=20000", "stages.table.epochs=1",
            "stages.cut-quarter.batch_size=128", "stages.cut-quarter.train_rows=20000", "stages.cut-quarter.epochs=2",
            "stages.quarter.batch_size=128", "stages.quarter.epochs=2",
            "stages.cut-eighth.batch_size=128", "stages.cut-eighth.train_rows=20000", "stages.cut-eighth.epochs=1",
            "stages.eighth.batch_size=128", "stages.eighth.train_rows=20000", "stages.eighth.epochs=2",
            *(f"targets.{name}.stages.codes.{one}" for name in ("quarter-4", "quarter-3", "eighth-4", "eighth-3")
              for one in ("batch_size=128", "train_rows=20000", "epochs=1")),
            *(f"targets.{name}.stages.distill-small.{one}" for name in ("cnn", "bilstm") for one in ("batch_size=128", "train_rows=20000")),
        ),
        "mrpc": (
            *_TEACHER["mrpc"],
            "stages.quarter.other_words=1", "stages.quarter.epochs=2", "stages.cut-eighth.epochs=1",
            *(f"targets.{name}.stages.codes.epochs=1" for name in ("eighth-4", "eighth-3")),
        ),
    },
}  # fmt: skip


def run(task: str, asked: argparse.Namespace) -> None:
    """Run the recipe on one task, and keep its record."""
    made = Path("runs") / asked.recipe / task
    words = [sys.executable, "-m", "onnxsqueeze", "run", f"recipes/{asked.recipe}.yaml", "--task", task, "--data-dir", str(asked.data_dir)]
    words += ["--out", str(made), *(["--any-machine"] if asked.any_machine else []), *(["--train-only"] if asked.train_only else [])]
    words += [word for override in [*OVERRIDES[asked.recipe][task], *asked.set] for word in ("--set", override)]
    code = subprocess.run(words, check=False).returncode
    if code not in (0, *((1, 3) if not asked.train_only else ())):  # 1, 3: a target failed or missed its gate, which its row says
        raise SystemExit(code)
    if asked.train_only:
        return
    kept = asked.out / task
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    shutil.copyfile(made / "results.json", kept / "results.json")
    if (made / "samples").is_dir():  # not where nothing was timed
        shutil.copytree(made / "samples", kept / "samples")


def table(record: Results) -> str:
    """One line per target, the largest file first."""
    primary, split = record.task.primary, record.task.splits[0]
    made = sorted((one for one in record.targets if one.status == "ok"), key=lambda one: -(one.size_bytes or 0))
    head = f"| target | file, MB | smaller | its bound, MB | unpacked, MB | {primary} × 100 | change, points (95 %) | so it is | p50, 128 tokens, ms | 32 tokens, ms |"
    lines = [f"## {record.task.name}", ""]
    lines += [f"{split.source} ({split.n} rows), seed {record.seed}, {record.environment.cpu} ({record.environment.instruction_set})."]
    lines += ["", head, "| --- " * 10 + "|", *(_line(one, primary, split.name) for one in made), "", f"    {record.command}", ""]
    return "\n".join(lines)


def _line(target: Target, primary: str, split: str) -> str:
    versus = target.vs_baseline
    cells = [target.name, f"{(target.size_bytes or 0) / 1e6:.2f}", f"{versus.size_ratio:.1f}×" if versus else "–"]
    cells += [f"{one / 1e6:.2f}" if one else "–" for one in (target.size_bound_bytes, target.size_dense_bytes)]
    cells.append(f"{100 * target.metrics[split][primary].value:.1f}")
    if versus:
        delta = versus.metrics[split][primary]
        cells += [f"{100 * delta.delta:+.1f} ({100 * delta.ci95[0]:+.1f} to {100 * delta.ci95[1]:+.1f})", versus.quality]
    else:
        cells += ["–", "–"]
    short = next((one for one in target.latencies if (one.lengths, one.sequence) == ("fixed", 32)), None)
    return "| " + " | ".join([*cells, _ms(target.latency), _ms(short)]) + " |"


def _ms(latency: Latency | None) -> str:
    return f"{latency.p50_ms:.2f}" + ("" if latency.valid else " (not valid)") if latency else "–"


def main() -> None:
    """Run what is asked for, then draw the page of all records that are there."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("recipe", choices=list(OVERRIDES))
    cli.add_argument("--data-dir", type=Path)
    cli.add_argument("--out", type=Path)
    cli.add_argument("--tasks", nargs="+")
    cli.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    cli.add_argument("--any-machine", action="store_true", help="as `onnxsqueeze run` has it")
    cli.add_argument("--train-only", action="store_true", help="as `onnxsqueeze run` has it: no record, no page")
    cli.add_argument("--table-only", action="store_true")
    asked = cli.parse_args()
    asked.out = asked.out or ROOT / "reports" / asked.recipe
    if not asked.table_only:
        if asked.data_dir is None:
            raise SystemExit("--data-dir: name the folder with GLUE's files")
        for task in asked.tasks or OVERRIDES[asked.recipe]:
            run(task, asked)
    if asked.train_only:
        return
    records = [read_results(file.parent) for file in sorted(asked.out.glob("*/results.json"))]
    page = "\n".join([f"# recipes/{asked.recipe}.yaml on several tasks\n", *map(table, records)])
    (asked.out / f"{asked.recipe}.md").write_text(page, encoding="utf-8")
    write_reports(records, asked.out)
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
