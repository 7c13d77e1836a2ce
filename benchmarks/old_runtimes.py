"""Which files of a run load in which old versions of ONNX Runtime, by `deploy --ort`: a table in Markdown, on the standard output.

    onnxsqueeze run benchmarks/old_runtimes.yaml --out runs/old-runtimes
    python benchmarks/old_runtimes.py runs/old-runtimes [--work runs/old-environments] [1.17.3 1.18.1 …]

An environment of each version is made with pip below --work, and kept; one that is there already is taken as it is. Every file is rewritten for the version where
it must be, loaded in it, and asked the golden sentences: the number is the largest distance of a logit from the one here, as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from onnxsqueeze.deploy.older import limits, made_for
from onnxsqueeze.deploy.source import Source, find
from onnxsqueeze.errors import SqueezeError
from onnxsqueeze.results import read_results

VERSIONS = ("1.17.3", "1.18.1", "1.20.1", "1.23.2", "1.31.1")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("run", type=Path)
    ask.add_argument("versions", nargs="*", default=list(VERSIONS))
    ask.add_argument("--work", type=Path, default=Path("runs/old-environments"))
    asked = ask.parse_args()
    pythons = {version: environment(asked.work / version, version) for version in asked.versions}
    highest = {version: limits(str(python)) for version, python in pythons.items()}
    heads = [f"{version} (IR {ir}, opset {opset})" for version, (ir, opset) in highest.items()]
    print(f"| file | {' | '.join(heads)} |")
    print(f"| --- |{' --- |' * len(heads)}")
    notes: list[str] = []
    for target in (one for one in read_results(asked.run).targets if one.status == "ok"):
        source = find(asked.run, target.name)
        cells = [tried(source, version, pythons[version], notes) for version in asked.versions]
        print(f"| {target.name} | {' | '.join(cells)} |", flush=True)
    print()
    for i, note in enumerate(notes, 1):
        print(f"{i}. {note}")


def tried(source: Source, version: str, python: Path, notes: list[str]) -> str:
    """One cell; a refusal gets the number of its note."""
    try:
        with made_for(source, version, str(python)) as made:
            older = made.target.older
            assert older is not None  # noqa: S101  # made_for sets it
            largest = max(abs(x) for row in source.golden.logits for x in row)
            return f"{', '.join(older.changed) or 'as it is'}: {older.max_abs_diff / largest:.0e}"
    except SqueezeError as error:
        said = error.message.replace(f" {version}", "")
        if said not in notes:
            notes.append(said)
        return f"refused [{notes.index(said) + 1}]"


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with this onnxruntime."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"onnxruntime=={version}", "numpy<2"], check=True)
    return python


if __name__ == "__main__":
    main()
