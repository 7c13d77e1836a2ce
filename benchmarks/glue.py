"""Run a recipe on all nine GLUE tasks, from the project's root, and keep the records; with --scorer, check every file with a program that is not ours.

    python benchmarks/glue.py --data-dir glue --out reports/glue-2000 --train-rows 2000
    python benchmarks/glue.py --data-dir glue --out reports/glue-2000 --train-rows 2000 --scorer score_onnx.py
    python benchmarks/glue.py --data-dir glue --out reports/qdp-sst2 --score runs/qdp-sst2 --scorer score_onnx.py   only checks a finished run

Writes <out>/<task>/results.json with its samples, and one report.md and report.html for all. What a scorer must be: `SCORER MODEL.onnx TOKENIZER.json TASK
FILE.tsv --max-length N --batch N`, printing one JSON line with "metrics"; <out>/scorer.md says how far it and the records agree:
accuracy within one row, F1 and Matthews within what one changed prediction can move them, correlations within 0.001. Exit 1 where not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def run(task: str, asked: argparse.Namespace) -> Path:
    """Run the recipe on one task; its output folder."""
    out = asked.work / task
    words = [
        sys.executable,
        "-m",
        "onnxsqueeze",
        "run",
        str(asked.recipe),
        "--task",
        task,
        "--data-dir",
        str(asked.data_dir),
        "--out",
        str(out),
    ]
    sets = [f"task.train_rows={asked.train_rows}"] if asked.train_rows else []
    words += [word for override in [*sets, *asked.set] for word in ("--set", override)]
    subprocess.run(words, check=True)
    kept = asked.out / task
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "results.json", kept / "results.json")
    shutil.copytree(out / "samples", kept / "samples", dirs_exist_ok=True)
    return Path(out)


def tolerance(metric: str, n: int, labels_of_one: int) -> float:
    """What one changed prediction can move a metric; correlations: 0.001."""
    if metric in ("pearson", "spearman"):
        return 0.001
    if metric == "accuracy":
        return 1 / n
    return 2 / max(
        1, labels_of_one
    )  # F1 = 2TP/(P+P'): one row moves TP by 1 and P' by 1; Matthews moves less than 2 over the smaller class


def compare(task: str, out: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Score every measured file of a task with the scorer, beside the record."""
    record = json.loads((out / "results.json").read_text())
    rows = []
    for target in record["targets"]:
        if target["status"] != "ok":
            continue
        folder = out / target["name"]
        for split in record["task"]["splits"]:
            words = [sys.executable, asked.scorer, folder / "model.onnx", folder / "tokenizer.json", task, asked.data_dir / split["source"]]
            words += ["--max-length", str(record["task"]["max_length"]), "--batch", str(record["task"]["batch"])]
            scored = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            for metric, value in target["metrics"][split["name"]].items():
                other = scored["metrics"].get(metric)
                if other is None and metric != record["task"]["primary"]:
                    continue  # a scorer may know fewer metrics, but never lack the one that decides
                if other is None:
                    raise SystemExit(f"{asked.scorer.name}: gives no {metric} for {task}, got {', '.join(scored['metrics'])}")
                allowed = tolerance(metric, split["n"], smaller_class(task, asked.data_dir / split["source"]))
                rows.append(
                    {
                        "task": task,
                        "target": target["name"],
                        "split": split["name"],
                        "metric": metric,
                        "record": value["value"],
                        "scorer": other,
                        "allowed": allowed,
                    }
                )
    return rows


def smaller_class(task: str, file: Path) -> int:
    """Rows of the rarer class in a two-class dev file; 0 where the task has others."""
    column = {"cola": 1, "mrpc": 0, "qqp": -1}.get(task)
    if column is None:
        return 0
    labels = [line.split("\t")[column] for line in file.read_text(encoding="utf-8-sig").splitlines()]
    ones = sum(label == "1" for label in labels)
    return min(ones, sum(label == "0" for label in labels))


def main() -> int:
    """Run, compare, report."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--data-dir", type=Path, required=True)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--work", type=Path, default=Path("runs/glue"), help="where the models go")
    cli.add_argument("--recipe", type=Path, default=Path("recipes/qdp.yaml"))
    cli.add_argument("--train-rows", type=int, default=0)
    cli.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    cli.add_argument("--scorer", type=Path)
    cli.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    cli.add_argument("--score", nargs="+", type=Path, default=[], metavar="RUN_DIR", help="finished runs to score; nothing is run")
    asked = cli.parse_args()
    if asked.score and not asked.scorer:
        raise SystemExit("--score: needs --scorer, the program to score with")
    rows: list[dict[str, Any]] = []
    for out in asked.score or (run(task, asked) for task in asked.tasks):
        if asked.scorer:
            rows += compare(json.loads((out / "results.json").read_text())["task"]["name"], out, asked)
    if not asked.score:
        folders = [str(asked.out / task) for task in asked.tasks]
        for name in ("report.md", "report.html"):
            subprocess.run([sys.executable, "-m", "onnxsqueeze", "report", *folders, "-o", str(asked.out / name)], check=True)
    off = [row for row in rows if abs(row["record"] - row["scorer"]) > row["allowed"] + 1e-12]
    if asked.scorer:
        lines = [
            f"{len(rows) - len(off)} of {len(rows)} metrics agree.",
            "",
            "| task | target | split | metric | record | scorer | allowed |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['task']} | {r['target']} | {r['split']} | {r['metric']} | {r['record']:.6f} | {r['scorer']:.6f} | {r['allowed']:.6f} |"
            for r in rows
        ]
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "scorer.md").write_text("# The records beside an independent scorer\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
        sys.stdout.write(lines[0] + "\n")
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
