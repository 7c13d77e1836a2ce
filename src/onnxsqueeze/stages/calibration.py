"""Real training rows as inputs of an .onnx file: for calibration, and for comparing a file with the model it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze import graph
from onnxsqueeze.stage import Context
from onnxsqueeze.tasks.rows import Row, spread
from onnxsqueeze.tokens import Encoded, Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort
    from numpy.typing import NDArray

_NOISE_FACTOR, _NOISE_FLOOR = 16, 2.0**-16
CALIBRATION_BATCH = 8  # bounds the memory for the activations that a calibrator keeps of one call


def feeds(
    model: Path, context: Context, samples: int, batch: int = CALIBRATION_BATCH, *, one_length: bool = True
) -> Iterator[dict[str, NDArray[Any]]]:
    """``samples`` training rows, spread evenly over the file, as inputs of ``model``, all padded to one length or each batch to its own.

    One at a time, so that calibration of any size needs the memory of one batch. Yields ``{name: array[batch, tokens]}`` of the
    model's own types, int64 or int32.
    """
    types = input_types(model)
    for padded in padded_rows(model.parent, context, samples, batch, one_length=one_length):
        yield given(types, padded)


def padded_rows(
    folder: Path, context: Context, samples: int, batch: int = CALIBRATION_BATCH, *, one_length: bool = True
) -> Iterator[dict[str, NDArray[np.int64]]]:
    """The same rows by the tokenizer in ``folder``, with every input that a model may have."""
    encoder = Encoder(folder, context.task.max_length)
    rows = encode(encoder, spread(context.train.rows, samples))
    width = max(len(row) for row in rows) if one_length else None
    for start in range(0, len(rows), batch):
        yield pad(rows[start : start + batch], encoder.pad_id, width)


def shapes(folder: Path, context: Context) -> list[dict[str, NDArray[np.int64]]]:
    """Three batches of training rows as a server may send them: one row, four short rows, two at the full length."""
    encoder = Encoder(folder, context.task.max_length)
    rows = sorted(encode(encoder, spread(context.train.rows, 64)), key=len)
    longest, middle = rows[-2:], rows[len(rows) // 2 : len(rows) // 2 + 1]
    return [pad(middle, encoder.pad_id), pad(rows[:4], encoder.pad_id), pad(longest, encoder.pad_id, context.task.max_length)]


def furthest(one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> float:
    """The largest difference of a logit between two models' answers to the same batches; NaN where one of them is."""
    import numpy as np

    return float(np.max([np.abs(a - b).max() for a, b in zip(one, other, strict=True)]))  # unlike max(), keeps NaN


def noise_tolerance(exact: Sequence[NDArray[Any]], usual: Sequence[NDArray[Any]]) -> float:
    """How far logits in float32 may lie from ``exact``: 16 times as far as ``usual``, which adds in another order, and no more.

    At least 2^-16 of the largest logit: float32 has 24 bits, and one layer adds thousands of terms (2^-24 · 2^8).
    """
    import numpy as np

    scale = max(float(np.abs(a).max()) for a in exact)
    return max(_NOISE_FACTOR * furthest(exact, usual), _NOISE_FLOOR * scale)


def encode(encoder: Encoder, rows: Sequence[Row]) -> list[Encoded]:
    """The ids of ``rows``."""
    return encoder.encode([row.text for row in rows], [row.text_pair for row in rows])


def input_types(model: Path) -> dict[str, str]:
    """The inputs of ``model`` in its order, and their types: ``{"input_ids": "int64", …}``."""
    return {name: kind for name, (side, kind) in graph.signature(model).items() if side == "input"}


def given(types: Mapping[str, str], batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What of ``batch`` a model with inputs of these ``types`` takes."""
    return {name: batch[name].astype(kind, copy=False) for name, kind in types.items()}


def session(model: Path, threads: int, *, optimized: bool = True) -> ort.InferenceSession:
    """A CPU session on ``threads`` threads, with default optimizations or with none."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def logits(
    model: Path, batches: Sequence[dict[str, NDArray[np.int64]]], threads: int, *, optimized: bool = True
) -> list[NDArray[np.float32]]:
    """The outputs of ``model`` for every batch, side by side ``[batch, outputs]``: the logits, and those of exits behind them.

    Inputs that it does not have are left out, int64 is cast where it wants int32.
    """
    import numpy as np

    types = input_types(model)
    running = session(model, threads, optimized=optimized)
    return [np.concatenate(running.run(None, given(types, batch)), axis=1) for batch in batches]
