"""What a latency is the time of: one made-up call of a fixed shape, over and over, or the task's own rows, each at its own length."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from onnxsqueeze.backends import Block, Replay
from onnxsqueeze.errors import MeasureError
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.tokens import Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[np.int64]]

ROUNDS = 20
_SEED = 0
_ROUND_CALLS = 40  # calls of the task's rows a round: 800 in all, enough for the 99 % point, and as many for every model
_TEXT_CALLS = 200  # calls whose tokenizing is timed


class Runs(Protocol):
    """A session that keeps the time of its own runs."""

    def hold(self, feeds: Sequence[Feed]) -> None:
        """Keep ``feeds`` for `time` (which runs the first) and `replay`."""

    def time(self, least_runs: int, least_ms: float, *, uncounted: int = 0) -> Block:
        """Run until there are enough runs and they took long enough, after some that do not count."""

    def replay(self, order: Sequence[int], arrivals_s: Sequence[float] | None = None) -> Replay:
        """Run the held feeds in this order."""


@dataclass(frozen=True)
class Text:
    """Beside the model: ``tokenize_ms[calls]`` from text to arrays, and ``whole_ms[calls]`` from text to logits, for the same calls."""

    tokenize_ms: NDArray[np.float64]
    whole_ms: NDArray[np.float64]


class Work(Protocol):
    """What every model of a measurement does."""

    @property
    def shape(self) -> Shape:
        """Rows a call, tokens a row (their median where they differ), threads."""

    @property
    def lengths(self) -> Literal["fixed", "task"]:
        """Whether all calls are alike."""

    def hold(self, onnx: Path, session: Runs) -> None:
        """Give a session, whose file is ``onnx``, what it will run."""

    def block(self, session: Runs, round_: int, settings: MeasureSettings) -> Block:
        """The counted runs of one round, after one that is not counted."""


@dataclass(frozen=True)
class FixedWork:
    """Random ids of the model's vocabulary with a full attention mask, the same in every run."""

    shape: Shape
    lengths: Literal["fixed", "task"] = "fixed"

    def __str__(self) -> str:
        return str(self.shape)

    def hold(self, onnx: Path, session: Runs) -> None:
        """Raises MeasureError where the model reads fewer tokens."""
        session.hold([_made_up(onnx, self.shape)])

    def block(self, session: Runs, round_: int, settings: MeasureSettings) -> Block:  # noqa: ARG002  # every round is alike
        """A part of the least runs and of the least time."""
        return session.time(-(-settings.min_runs // ROUNDS), 1000 * settings.min_seconds / ROUNDS, uncounted=1)


@dataclass(frozen=True)
class TaskWork:
    """The task's rows in a drawn order, ``batch`` a call, padded to the longest of the call; in one round the same calls for every model."""

    calls: tuple[tuple[tuple[str, str | None], ...], ...]
    max_length: int
    shape: Shape
    lengths: Literal["fixed", "task"] = "task"

    def __str__(self) -> str:
        threads = f"{self.shape.threads} thread{'s' if self.shape.threads > 1 else ''}"
        return f"{self.shape.batch} × the task's lengths (median {self.shape.sequence} tokens), {threads}"

    @staticmethod
    def of(texts: Sequence[tuple[str, str | None]], folder: Path, max_length: int, batch: int, threads: int) -> TaskWork:
        """Draw the calls; the median length is that of the tokenizer in ``folder``."""
        import numpy as np

        wanted = ROUNDS * _ROUND_CALLS * batch
        order = np.random.default_rng(_SEED).permutation(len(texts)).tolist()
        rows = [texts[i] for i in (order * math.ceil(wanted / len(texts)))[:wanted]]
        encoded = Encoder(folder, max_length).encode(*_columns(rows))
        calls = tuple(tuple(rows[at : at + batch]) for at in range(0, wanted, batch))
        median = int(np.median([len(row) for row in encoded]))
        return TaskWork(calls, max_length, Shape(batch=batch, sequence=median, threads=threads))

    def hold(self, onnx: Path, session: Runs) -> None:
        """The calls as the tokenizer beside the model reads them."""
        encoder = Encoder(onnx.parent, self.max_length)
        session.hold([_fed(encoder, call) for call in self.calls])

    def block(self, session: Runs, round_: int, settings: MeasureSettings) -> Block:  # noqa: ARG002  # as many calls as every model runs
        """The calls of this round; the last one of the round before goes first, uncounted."""
        first = round_ * _ROUND_CALLS
        block = session.replay([first - 1 if first else len(self.calls) - 1, *range(first, first + _ROUND_CALLS)])
        return Block(block.times_ms[1:], block.cpu_s)

    def text(self, onnx: Path, model_ms: NDArray[np.float64]) -> Text:
        """Time the way from text to arrays for the first calls; ``model_ms`` are the model's times of all calls in order."""
        import numpy as np

        encoder = Encoder(onnx.parent, self.max_length)
        times = []
        for call in (*self.calls[-10:], *self.calls[:_TEXT_CALLS]):  # ten to warm up
            began = time.perf_counter_ns()
            _fed(encoder, call)
            times.append((time.perf_counter_ns() - began) / 1e6)
        tokenize = np.array(times[10:])
        return Text(tokenize, tokenize + model_ms[: len(tokenize)])


def _made_up(onnx: Path, shape: Shape) -> Feed:
    import numpy as np

    place = f"{onnx.parent.name}: config.json"
    # beside it; of a deployed folder (DIR/onnx/model.onnx, DIR/1/model.onnx, DIR/1/model.onnx/model.onnx) above it
    file = next(
        (folder / "config.json" for folder in list(onnx.parents)[:3] if (folder / "config.json").is_file()), onnx.parent / "config.json"
    )
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = int(config["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise MeasureError(
            f"{place}: no vocab_size can be read beside the model", remedy="copy the model's config.json to its .onnx"
        ) from error
    pad_id, longest = config.get("pad_token_id") or 0, config.get("max_position_embeddings")
    if longest is not None and "roberta" in config.get("model_type", ""):
        longest -= pad_id + 1  # its first position is pad_id + 1
    if longest is not None and shape.sequence > longest:
        raise MeasureError(
            f"{place}: the model takes at most {longest} tokens, measure asks for {shape.sequence}",
            remedy=f"set measure.sequence (and each of measure.shapes) to {longest} or less",
        )
    ids = np.random.default_rng(_SEED).integers(vocabulary, size=(shape.batch, shape.sequence))
    ids[ids == pad_id] = (pad_id + 1) % vocabulary
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _columns(rows: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[str | None]]:
    return [first for first, _ in rows], [second for _, second in rows]


def _fed(encoder: Encoder, call: Sequence[tuple[str, str | None]]) -> Feed:
    return pad(encoder.encode(*_columns(call)), encoder.pad_id)
