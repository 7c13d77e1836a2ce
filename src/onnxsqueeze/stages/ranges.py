"""What ranges the activations of a dynamically quantized graph have on training rows, and what it would cost to fix them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsqueeze import graph
from onnxsqueeze.stage import Context
from onnxsqueeze.stages import calibration

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from onnxsqueeze.forms import Range

_ROWS = 128  # as many as quantize-static takes
_COST_ROWS = 16  # of them, to weigh the ranges by: for a ranking


@dataclass(frozen=True)
class Activation:
    """A tensor that the graph quantizes at run time. ``cost``: how much more of its energy (sum of squares) rounding loses with the range fixed."""

    name: str
    range: Range
    cost: float


def measured(model: Path, scratch: Path, context: Context) -> tuple[Activation, ...]:
    """Every input of a DynamicQuantizeLinear of ``model``, the one that a fixed range costs least first.

    The range is from the smallest to the largest value on 128 training rows, each alone at its own length: what padding holds does
    not count. ``scratch`` is an empty folder for a graph that gives the activations out.
    """
    probe = _Probe(model, scratch, context.threads)
    ranges = extremes(probe, context)
    costs = _costs(probe, ranges, context)
    return tuple(sorted((Activation(name, ranges[name], costs[name]) for name in probe.names), key=lambda found: (found.cost, found.name)))


def quantized_at_run_time(model: Path) -> tuple[str, ...]:
    """The inputs of the DynamicQuantizeLinear nodes of ``model``, in the order of the graph."""
    return tuple(dict.fromkeys(node.input[0] for node in graph.load(model).graph.node if node.op_type == "DynamicQuantizeLinear"))


def extremes(probe: _Probe, context: Context) -> dict[str, Range]:
    """The smallest and the largest value of each activation on training rows."""
    found: dict[str, Range] = {}
    for feed in calibration.feeds(probe.model, context, _ROWS, batch=1, one_length=False):
        for name, values in probe.run(feed).items():
            low, high = found.get(name, (0.0, 0.0))
            found[name] = (min(low, float(values.min())), max(high, float(values.max())))
    return found


def _costs(probe: _Probe, ranges: Mapping[str, Range], context: Context) -> dict[str, float]:
    energy, fixed, dynamic = (dict.fromkeys(probe.names, 0.0) for _ in range(3))
    for feed in calibration.feeds(probe.model, context, _COST_ROWS, batch=1, one_length=False):
        for name, values in probe.run(feed).items():
            energy[name] += float((values**2).sum(dtype="float64"))
            fixed[name] += _lost(values, ranges[name])
            dynamic[name] += _lost(values, (float(values.min()), float(values.max())))
    return {name: (fixed[name] - dynamic[name]) / energy[name] if energy[name] else 0.0 for name in probe.names}


def _lost(values: NDArray[np.float32], known: Range) -> float:
    """The sum of the squares of what rounding to uint8 within ``known`` takes from ``values``."""
    import numpy as np

    from onnxsqueeze.forms.static_ranges import parameters

    scale, zero = parameters(*known)
    back = (np.clip(np.rint(values / scale) + np.float32(zero), 0, 255) - np.float32(zero)) * scale
    return float(((values - back) ** 2).sum(dtype=np.float64))


class _Probe:
    """``model`` in a session that also gives out what it quantizes at run time: ``names``."""

    def __init__(self, model: Path, scratch: Path, threads: int) -> None:
        from onnx import TensorProto, helper

        self.model = model
        self.names = quantized_at_run_time(model)
        opened = graph.load(model)
        opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.names)
        self._session = calibration.session(graph.save(opened, scratch), threads)

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
        """What each activation holds for ``feed``."""
        return dict(zip(self.names, self._session.run(list(self.names), dict(feed)), strict=True)) if self.names else {}
