"""What a head and a neuron cost in milliseconds on this machine: found by measuring exports of a few shapes beside each other."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsqueeze.artifact import MODEL_FILE, copy_side_files
from onnxsqueeze.measure.latency import Candidate, measure_latency
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.work import FixedWork
from onnxsqueeze.nn import exporting, structure
from onnxsqueeze.nn.budget import Costs
from onnxsqueeze.nn.structure import Structure
from onnxsqueeze.stages.chatter import captured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.stage import Context

_SECONDS, _PROCESSES = 1.0, 3
_FREE = 1e-9  # milliseconds: nothing is quite free


class LayerTimes:
    """Measures structures of a model on one backend, at the call that the recipe measures, in float32.

    ``folder`` holds config.json and the tokenizer. Exports lie in ``scratch``.
    """

    def __init__(self, folder: Path, scratch: Path, backend: str, context: Context) -> None:
        self._folder, self._scratch, self._backend, self._context = folder, scratch, backend, context

    def milliseconds(self, model: PreTrainedModel, family: Family, shapes: Sequence[Structure]) -> list[float]:
        """The median time of each structure, measured in turns; the model must have as many heads and neurons at least, and is not changed."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            files = [self._exported(model, family, shape, Path(scratch) / str(i)) for i, shape in enumerate(shapes)]
            candidates = [Candidate(file.parent.name, file, self._backend) for file in files]
            call = self._context.call
            work = FixedWork(Shape(batch=call.batch, sequence=call.tokens, threads=call.threads))
            found = measure_latency(
                candidates, None, work, MeasureSettings(processes=_PROCESSES, min_runs=60, min_seconds=_SECONDS), self._context.progress
            )
        return [found[candidate.name].latency.p50_ms for candidate in candidates]

    def costs(self, model: PreTrainedModel, family: Family, full: Structure) -> Costs:
        """Of a head and of a neuron, by least squares over the full structure, one with half the heads, one with half the neurons, and one with a quarter of both."""
        import numpy as np

        shapes = [full, _part(full, 2, 1), _part(full, 1, 2), _part(full, 4, 4)]
        times = self.milliseconds(model, family, shapes)
        known = np.array([[1.0, sum(shape.heads), sum(shape.neurons)] for shape in shapes])
        fixed, head, neuron = np.linalg.lstsq(known, np.array(times), rcond=None)[0]
        return Costs(head=max(float(head), _FREE), neuron=max(float(neuron), _FREE), fixed=max(float(fixed), 0.0))

    def _exported(self, model: PreTrainedModel, family: Family, shape: Structure, place: Path) -> Path:
        place.mkdir()
        copy_side_files(self._folder, place)
        smaller: PreTrainedModel = copy.deepcopy(model).cpu()
        smaller.train(mode=False)
        for module in smaller.modules():
            module._forward_pre_hooks.clear()  # the masks of a training
        structure.shrink(smaller, family, [range(n) for n in shape.heads], [range(n) for n in shape.neurons])
        with captured():
            exporting.write(smaller, place / MODEL_FILE)
        return place / MODEL_FILE


def _part(shape: Structure, heads: int, neurons: int) -> Structure:
    return Structure(shape.head_size, tuple(max(1, n // heads) for n in shape.heads), tuple(max(1, n // neurons) for n in shape.neurons))
