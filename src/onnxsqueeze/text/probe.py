"""How far a tokenizer in a graph is from the tokenizer.json that it was made of: on any texts, and on code points without any."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from onnxsqueeze.text.front import TEXT
from onnxsqueeze.text.joined import alone
from onnxsqueeze.text.rules import Rules
from onnxsqueeze.text.session import open_text
from onnxsqueeze.tokens import INPUT_NAMES, Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AT_ONCE = 512  # rows a call
_WORD = "ab{}cd"
_CATEGORIES = "LMNP"  # letters, marks, numbers, punctuation
_EXAMPLES = 8


@dataclass(frozen=True)
class Difference:
    """Of ``asked`` code points, each inside a word, ``differ`` get other ids; ``blocks`` are where most of these lie, 256 code points each ("U+1E00")."""

    asked: int
    differ: int
    blocks: tuple[str, ...]


class InGraph:
    """The tokenizer in the graph, run alone, beside the tokenizer that it was made of."""

    def __init__(self, rules: Rules, encoder: Encoder) -> None:
        self._session, self._encoder = open_text(alone(rules).SerializeToString()), encoder

    def inputs(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """What the graph makes of them: ``{input_ids, attention_mask, token_type_ids}[batch, tokens] int64``."""
        import numpy as np

        return dict(zip(INPUT_NAMES, self._session.run(INPUT_NAMES, {TEXT: np.array(texts, object)}), strict=True))

    def expected(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The same by tokenizer.json."""
        return pad(self._encoder.encode(texts, [None] * len(texts)), self._encoder.pad_id)

    def differing(self, texts: Iterable[str]) -> Iterator[str]:
        """Those of ``texts`` that do not get the same ids, mask and types. They are asked together, and one by one where that does not agree."""
        rest = iter(texts)
        while some := list(islice(rest, _AT_ONCE)):
            if not self._agree(some):
                yield from (text for text in some if not self._agree([text]))

    def _agree(self, texts: Sequence[str]) -> bool:
        here, there = self.inputs(texts), self.expected(texts)
        return all(here[name].tolist() == there[name].tolist() for name in INPUT_NAMES)


def on_code_points(graph: InGraph) -> Difference:
    """Every assigned letter, mark, number and punctuation character of the Basic Multilingual Plane inside a word; needs no data."""
    asked = {_WORD.format(one): one for one in map(chr, range(0x10000)) if unicodedata.category(one)[0] in _CATEGORIES}
    found = [asked[word] for word in graph.differing(asked)]
    most = Counter(ord(one) >> 8 for one in found).most_common(_EXAMPLES)
    return Difference(len(asked), len(found), tuple(f"U+{block:02X}00" for block, _ in most))
