"""Golden answers: what a model said to a few generated sentences when it was measured, and how far what shares a call moves that.

The sentences are from the toy grammar whatever the task, so the file may travel with the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from onnxsqueeze import environment
from onnxsqueeze.artifact import EXTERNAL_DATA_FILE, MODEL_FILE, file_sha256
from onnxsqueeze.backends import Answers, Backends
from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.toy import toy_rows
from onnxsqueeze.tokens import Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GOLDEN_FILE = "golden.json"
_SENTENCES, _SEED = 16, 20_261_121
_PADDING = 16  # tokens more than the longest sentence has
_SAME_MACHINE = 2.0**-16  # of the largest logit: the same kernels add in the same order, up to threads
_OTHER_MACHINE = 2.0**-10  # other kernels add in another order; an integer graph may round otherwise on top, see `Golden.spread`


class Golden(BaseModel):
    """``logits`` of each sentence alone; ``batch_spread`` and ``padding_spread`` are how far a full batch, and padding, move them at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sha256: dict[str, str]  # of model.onnx and its external data
    backend: str
    threads: int
    max_length: int
    cpu: str
    instruction_set: str
    runtime: str
    sentences: tuple[tuple[str, str | None], ...]
    logits: tuple[tuple[float, ...], ...]
    vectors: bool = False  # of a model that embeds, in place of logits
    batch_spread: float
    padding_spread: float

    def to_json(self) -> str:
        """The text of golden.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def beside(self, folder: Path, provenance: bytes) -> Golden:
        """The same, for the model in ``folder`` with ``provenance`` appended to its .onnx."""
        return self.model_copy(update={"sha256": self.sha256 | {MODEL_FILE: file_sha256(folder / MODEL_FILE, provenance)}})

    @property
    def spread(self) -> float:
        """The largest change of a logit by what shares its call."""
        return max(self.batch_spread, self.padding_spread)


def sentences(*, pairs: bool) -> tuple[tuple[str, str | None], ...]:
    """The sentences that a run asks: generated, the same on every machine."""
    texts = [row.text for row in toy_rows(_SENTENCES, seed=_SEED)]
    return tuple((text, texts[i - 1] if pairs else None) for i, text in enumerate(texts))


def answers(
    folder: Path,
    backend: str,
    threads: int,
    max_length: int,
    asked: tuple[tuple[str, str | None], ...],
    backends: Backends,
    *,
    vectors: bool = False,
    onnx: Path | None = None,
    opener: Callable[[str, Path, int], Answers] | None = None,
) -> Golden:
    """What the model in ``folder`` says now to the sentences ``asked``; ``onnx`` is its file where that lies elsewhere, ``opener`` opens it in place of ``backends``.

    Raises MeasureError and Unavailable.
    """
    onnx = onnx or folder / MODEL_FILE
    with closing((opener or backends.open)(backend, onnx, threads)) as session:
        said = ask(session, folder, max_length, asked)
    runtime = backends.get(backend).runtime
    machine = environment.processors()
    return Golden(
        sha256=digests(onnx.parent),
        backend=backend,
        threads=threads,
        max_length=max_length,
        cpu=machine["cpu"],
        instruction_set=machine["instruction_set"],
        runtime=runtime.version if runtime else "",
        sentences=asked,
        vectors=vectors,
        logits=said.logits,
        batch_spread=said.batch_spread,
        padding_spread=said.padding_spread,
    )


@dataclass(frozen=True)
class Said:
    """What a session said to some sentences, each alone, and how far a full batch and padding move that at most."""

    logits: tuple[tuple[float, ...], ...]
    batch_spread: float
    padding_spread: float


def ask(session: Answers, folder: Path, max_length: int, asked: Sequence[tuple[str, str | None]]) -> Said:
    """Put the sentences ``asked`` to a session, in tokens of the tokenizer in ``folder``: each alone, all in one call, and padded."""
    import numpy as np

    encoder = Encoder(folder, max_length)
    rows = encoder.encode([first for first, _ in asked], [second for _, second in asked])
    alone = np.concatenate([session.run(pad([row], encoder.pad_id)) for row in rows])
    together = session.run(pad(rows, encoder.pad_id))
    width = min(max(len(row) for row in rows) + _PADDING, max_length)
    padded = np.concatenate([session.run(pad([row], encoder.pad_id, max(width, len(row)))) for row in rows])
    return Said(
        logits=tuple(tuple(float(x) for x in row) for row in alone),
        batch_spread=float(np.abs(together - alone).max()),
        padding_spread=float(np.abs(padded - alone).max()),
    )


def running_text(folder: Path, known: Golden, tokens: int) -> NDArray[np.int64]:
    """``ids[tokens]`` of the golden sentences one after the other, from the start again where they end."""
    import numpy as np

    encoder = Encoder(folder, known.max_length)
    rows = encoder.encode([first for first, _ in known.sentences], [second for _, second in known.sentences])
    return np.resize(np.array([i for row in rows for i in row.ids], np.int64), tokens)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the model's files in ``folder``."""
    return {name: file_sha256(folder / name) for name in (MODEL_FILE, EXTERNAL_DATA_FILE) if (folder / name).is_file()}


def read(folder: Path) -> Golden:
    """The golden answers beside a model. Raises DataError where there are none."""
    file = folder / GOLDEN_FILE
    try:
        return Golden.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read: {error.strerror}",
            remedy="name a target's folder as `onnxsqueeze run` or `onnxsqueeze deploy` wrote it",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{file}: {place}: {first['msg']}", remedy="write it again with `onnxsqueeze run`") from error


def tolerance(golden: Golden, now: Golden) -> float:
    """How far a logit may lie from the golden one: float noise on the same machine; elsewhere also what rounding does to a shared call."""
    largest = max(abs(x) for row in golden.logits for x in row)
    same = (golden.cpu, golden.instruction_set, golden.runtime) == (now.cpu, now.instruction_set, now.runtime)
    return _SAME_MACHINE * largest if same else shared_tolerance(golden)


def shared_tolerance(golden: Golden) -> float:
    """The same where kernels, the batch or the padding are others: float noise, or what rounding does to a shared call."""
    return max(_OTHER_MACHINE * max(abs(x) for row in golden.logits for x in row), 4 * golden.spread)


def distance(golden: Golden, now: Golden) -> tuple[float, int]:
    """(largest difference of a logit, sentences whose answer is another one; vectors answer nothing). Raises DataError where the shapes differ."""
    import numpy as np

    before: NDArray[np.float64] = np.array(golden.logits)
    after: NDArray[np.float64] = np.array(now.logits)
    if before.shape != after.shape:
        raise DataError(
            f"{GOLDEN_FILE}: logits are {list(before.shape)}, the model gives {list(after.shape)}", remedy="this is another model"
        )
    turned = int((before.argmax(1) != after.argmax(1)).sum()) if before.shape[1] > 1 and not golden.vectors else 0
    return float(np.abs(before - after).max()), turned
