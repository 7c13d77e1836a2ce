"""How often equal files are told apart: one file, measured as four candidates. About one comparison in twenty may be, at most.

    python benchmarks/equal_files.py runs/qdp-toy/qdp-ort

Prints a line per comparison, how many had which verdict, and the largest ratio, either way, that a valid one gave.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from onnxsqueeze.measure.latency import Candidate, measure_latency
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.work import FixedWork


def _no_progress(done: int, total: int, note: str = "") -> None:
    pass


def main() -> None:
    """Measure copies of a target's folder beside each other."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("target", type=Path, help="a target's folder below --out")
    cli.add_argument("--repeats", type=int, default=3)
    asked = cli.parse_args()
    largest, verdicts = 1.0, Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"copy {i}" for i in range(4)]
        for name in names:
            shutil.copytree(asked.target, Path(scratch) / name)
        candidates = [Candidate(name, Path(scratch) / name / "model.onnx", "cpu") for name in names]
        for shape in (Shape(batch=1, sequence=128, threads=1), Shape(batch=1, sequence=32, threads=1)):
            for _ in range(asked.repeats):
                found = measure_latency(candidates, names[0], FixedWork(shape), MeasureSettings(), _no_progress)
                for name, result in found.items():
                    if result.speedup is None or result.speedup_ci95 is None:
                        continue
                    low, high = result.speedup_ci95
                    print(f"{shape}: {name}: {result.speedup:.3f} ({low:.3f} to {high:.3f}), {result.verdict}")
                    verdicts[result.verdict] += 1
                    if result.verdict != "unproven":
                        largest = max(largest, result.speedup, 1 / result.speedup)
    print(f"{dict(verdicts)}; largest ratio of equal files: {largest:.3f}")


if __name__ == "__main__":
    main()
