"""Texts in; labels with their scores, values, or vectors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsqueeze.serving.answer import Refused
from onnxsqueeze.tokens import Encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxsqueeze.serving.model import Model

LARGE_CHARACTERS = 4096  # of all texts: about a millisecond of tokenizing, longer than others should wait for the event loop
_KEPT_CHARACTERS = 32  # a token has four or five in English
_TEXTS = 'send {"texts": ["one", "two"]}, or [["one", "its second"], …] where the model reads pairs'

Texts = Sequence[tuple[str, str | None]]


def texts_of(asked: Mapping[str, Any], model: Model) -> Texts:
    """The texts of a body, each with its second one or None. Raises Refused."""
    unknown = sorted(asked.keys() - {"texts"})
    if unknown:
        raise Refused(400, f"body: {unknown[0][:100]!r} is not understood here; {_TEXTS}")
    listed = asked.get("texts")
    if not isinstance(listed, list) or not listed:
        raise Refused(400, f"texts: must be a list of at least one text; {_TEXTS}")
    if len(listed) > model.limits.rows:
        raise Refused(
            400,
            f"texts: at most {model.limits.rows} a request, got {len(listed)}; send several requests, or start with a larger --max-batch",
        )
    pairs = model.golden.sentences[0][1] is not None
    return [_text(one, f"texts[{i}]", pairs=pairs) for i, one in enumerate(listed)]


def _text(one: Any, where: str, *, pairs: bool) -> tuple[str, str | None]:
    parts = one if isinstance(one, list) else [one]
    if not all(isinstance(part, str) for part in parts) or len(parts) not in (1, 2):
        raise Refused(400, f"{where}: must be a text or a list of two; {_TEXTS}")
    if pairs != (len(parts) == 2):
        raise Refused(400, f"{where}: this model reads {'two texts a row, got one' if pairs else 'one text a row, got two'}; {_TEXTS}")
    for part in parts:
        if not part.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in part):
            raise Refused(400, f"{where}: holds half of a surrogate pair, which is no character; send whole ones")
    return parts[0], parts[1] if pairs else None


def tokens_of(texts: Texts, model: Model) -> list[Encoded]:
    """The rows as the model was measured on them: cut at the length that it was measured with.

    Of a long text no more is tokenized than can be kept, since a token takes a hundred bytes while it is made: a beginning that ends at
    a space, and a longer one while the row is not full.
    """
    rows: list[Encoded | None] = [None] * len(texts)
    left, length = list(range(len(texts))), _KEPT_CHARACTERS * model.max_length
    while left:
        heads = [tuple(part if part is None else _head(part, length) for part in texts[i]) for i in left]
        encoded = model.encoder.encode([str(first) for first, _ in heads], [second for _, second in heads])
        for i, head, row in zip(left, heads, encoded, strict=True):
            if head == texts[i] or len(row) == model.max_length:
                rows[i] = row
        left, length = [i for i in left if rows[i] is None], 4 * length
    return [row for row in rows if row is not None]


def _head(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    space = text.rfind(" ", length // 2, length)
    return text[: space if space > 0 else length]


def results(said: NDArray[np.float32], model: Model) -> list[dict[str, Any]]:
    """One object a row, of ``said[rows, classes or components]``: label, score and all scores; or value; or vector."""
    if model.says == "vector":
        return [{"vector": row} for row in said.tolist()]
    if model.says == "value":
        return [{"value": float(row[0])} for row in said]
    logits = said.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = powers / powers.sum(axis=1, keepdims=True)
    best = scores.argmax(axis=1)
    return [
        {"label": model.labels[top], "score": float(row[top]), "scores": dict(zip(model.labels, row.tolist(), strict=True))}
        for row, top in zip(scores, best, strict=True)
    ]
