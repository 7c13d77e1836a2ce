"""Small exported models with rows to run them on, and how far two files' logits lie apart."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from models import FamilyName, artifact, random_checkpoint, toy_context
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.stage import Changed, Context, Stage
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.int8 import seven_bits


def export(folder: Path, family: FamilyName) -> tuple[Artifact, Context]:
    """A random two-layer model of ``family`` as exported into ``folder``, and the context it was exported in."""
    shutil.copytree(_exported(family).name, folder, dirs_exist_ok=True)
    return artifact(folder / "fp32", "onnx"), toy_context(folder)


@cache
def _exported(family: FamilyName) -> TemporaryDirectory[str]:
    """Made once a process: most tests of quantizers and forms start from it."""
    place = TemporaryDirectory()
    folder = Path(place.name)
    parent = artifact(random_checkpoint(folder / "checkpoint-folder", family))
    build(Export(kind="export"), parent, folder / "fp32", toy_context(folder / "scratch"))
    shutil.rmtree(folder / "scratch")
    return place


def build(stage: Stage, parent: Artifact, out: Path, context: Context) -> tuple[Artifact, Changed]:
    """Run ``stage`` into the new folder ``out``."""
    out.mkdir(parents=True)
    changed = stage.run(parent, None, out, context)
    return artifact(out, "onnx"), changed


def distance(one: Artifact, other: Artifact, context: Context) -> float:
    """Largest difference of two files' logits over all training rows, as a share of the first one's spread of logits."""
    feeds = list(calibration.feeds(one.onnx, context, len(context.train.rows)))
    a, b = (np.concatenate(calibration.logits(model.onnx, feeds, threads=1)) for model in (one, other))
    return float(np.abs(a - b).max() / np.ptp(a, axis=0).max())


def near(limit: float) -> float:
    """A limit on `distance` for weights of 8 bits; where this CPU wants 7, steps are twice as large."""
    return 2 * limit if seven_bits("auto") else limit
