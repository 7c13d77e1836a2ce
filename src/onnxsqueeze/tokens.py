"""Text to token ids, by the tokenizer.json that lies beside the weights: the same ids in training, measuring and serving."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsqueeze.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Encoded:
    """The ids of one row: ``ids`` and ``types`` (0 first text, 1 second), both as long as the row, unpadded."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """The tokenizer of one model folder, truncating at ``max_length`` tokens, special tokens included."""

    def __init__(self, folder: Path, max_length: int) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a missing or broken file
            raise ModelError(
                f"{folder.name}: tokenizer.json cannot be read: {error}",
                remedy="save the model's fast tokenizer beside its weights (tokenizer.save_pretrained)",
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        config = folder / "config.json"
        self.pad_id = int(json.loads(config.read_text(encoding="utf-8")).get("pad_token_id") or 0) if config.is_file() else 0

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None]) -> list[Encoded]:
        """Encode rows; ``pairs[i]`` is None for a single text."""
        inputs = [text if pair is None else (text, pair) for text, pair in zip(texts, pairs, strict=True)]
        return [Encoded(tuple(e.ids), tuple(e.type_ids)) for e in self._tokenizer.encode_batch(inputs)]

    def spans(self, texts: Sequence[str], pairs: Sequence[str | None]) -> list[tuple[tuple[int, int], ...]]:
        """Where in its text each token of `encode` stands, as (begin, end) in characters; (0, 0) for special tokens."""
        inputs = [text if pair is None else (text, pair) for text, pair in zip(texts, pairs, strict=True)]
        return [tuple(e.offsets) for e in self._tokenizer.encode_batch(inputs)]


def pad(rows: Sequence[Encoded], pad_id: int, width: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Right-pad to one width (default: the longest row): ``{input_ids, attention_mask, token_type_ids}[batch, width] int64``."""
    import numpy as np

    width = width or max(len(row) for row in rows)
    batch = {
        "input_ids": np.full((len(rows), width), pad_id, np.int64),
        "attention_mask": np.zeros((len(rows), width), np.int64),
        "token_type_ids": np.zeros((len(rows), width), np.int64),
    }
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row)] = row.ids
        batch["attention_mask"][i, : len(row)] = 1
        batch["token_type_ids"][i, : len(row)] = row.types
    return batch
