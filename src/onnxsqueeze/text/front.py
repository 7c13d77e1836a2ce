"""The rules of a tokenizer as nodes: ``text[batch] string`` → ``input_ids``, ``attention_mask``, ``token_type_ids``, each ``[batch, tokens]``.

All rows are one string with a mark before each, so that operators made for one text take a batch without a loop: BertTokenizer alone takes two
strings for a pair. It is told to do nothing but WordPiece (``do_basic_tokenize: 0``); everything before that is done by the table here.
Source: onnxruntime-extensions 0.15, operators/text and operators/tokenizer/bert_tokenizer.cc.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnxsqueeze.text.rules import BREAKS, GONE, MARKS, ROW, WORD, Rules
from onnxsqueeze.tokens import INPUT_NAMES

if TYPE_CHECKING:
    import onnx

TEXT = "text"
DOMAIN = "ai.onnx.contrib"
OPSET = 13  # the lowest in which every standard operator here has the form that is written
_INT64 = 7  # as TensorProto counts types
_ALL = 2**62  # an end for Slice
_HERE = "onnxsqueeze.text/"  # before every name of a value: no exporter writes such


class _Graph:
    """Nodes and constants that are put together; each method gives the name of what a node makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any) -> str:
        """A node; the name of its first output, ``name`` where one is given, and others with ``:1``, ``:2`` … behind it."""
        from onnx import helper

        first = name or f"{_HERE}{len(self.nodes)}"
        made = [first, *(f"{first}:{i}" for i in range(1, outputs))]
        self.nodes.append(
            helper.make_node(operator, inputs, made, name=f"{_HERE}{operator}_{len(self.nodes)}", domain=domain, **attributes)
        )
        return first

    def extension(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        return self.add(operator, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def words(self, *texts: str) -> str:
        """A constant ``[len(texts)] string``."""
        from onnx import TensorProto, helper

        return self._constant(helper.make_tensor("", TensorProto.STRING, [len(texts)], [text.encode() for text in texts]))

    def integers(self, *values: int) -> str:
        """A constant ``[len(values)] int64``."""
        import numpy as np
        from onnx import numpy_helper

        return self._constant(numpy_helper.from_array(np.array(values, np.int64)))

    def no(self) -> str:
        """A constant ``[False]``."""
        import numpy as np
        from onnx import numpy_helper

        return self._constant(numpy_helper.from_array(np.zeros(1, np.bool_)))

    def integer(self, value: int) -> str:
        """A scalar int64."""
        import numpy as np
        from onnx import numpy_helper

        return self._constant(numpy_helper.from_array(np.array(value, np.int64)))

    def _constant(self, tensor: onnx.TensorProto) -> str:
        tensor.name = f"{_HERE}constant_{len(self.constants)}"
        self.constants.append(tensor)
        return tensor.name


def build(rules: Rules, inputs: Mapping[str, int]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """(nodes, initializers) that make ``inputs`` (name → ONNX's number of its type) out of the value ``text``."""
    graph = _Graph()
    ids = _ids(graph, _normalized(graph, rules), rules)
    made = dict(zip(INPUT_NAMES, _padded(graph, ids, rules), strict=True))
    for name, kind in inputs.items():
        graph.add("Cast", made[name], name=name, to=kind)
    return graph.nodes, graph.constants


def _normalized(graph: _Graph, rules: Rules) -> str:
    """``[1] string``: a row's mark, then for each row a row's mark and its words, all of them parted by a word's mark."""
    text = graph.extension("StringRegexReplace", TEXT, graph.words(f"[{''.join(MARKS)}{_ranges(rules.gone)}]"), graph.words(""))
    rows = graph.add("Concat", graph.words(ROW), text, axis=0)
    whole = graph.extension("StringJoin", rows, graph.words(f" {ROW} "), graph.integers(0))
    each = "|".join([*map(re.escape, rules.whole), f"[^{rules.safe}]"])
    parts = graph.extension("StringRegexSplitWithOffsets", whole, graph.words(f"({each})"), graph.words("(?s).+"), outputs=4)
    table = dict(rules.table) | {one: f" {one} " for one in rules.whole}
    lines = "\n".join(f"{one}\t{other}" for one, other in table.items())
    mapped = graph.extension("StringMapping", parts, map=lines)
    done = graph.extension("StringJoin", mapped, graph.words(""), graph.integers(0))
    if rules.apart:
        done = graph.extension("StringRegexReplace", done, graph.words(f"([{_ranges(rules.apart)}])"), graph.words(r" \1 "))
    done = graph.extension("StringRegexReplace", done, graph.words(GONE), graph.words(""))
    return graph.extension("StringRegexReplace", done, graph.words(f"[ {BREAKS}]+"), graph.words(f" {WORD} "))


def _ranges(ranges: tuple[tuple[int, int], ...]) -> str:
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges)


def _ids(graph: _Graph, text: str, rules: Rules) -> str:
    """``[all] int64``: the pieces of all words, a row's mark being one more than the last piece.

    Of a word that cannot be cut to its end BertTokenizer gives the pieces before, and then the unknown one; WordPiece gives the unknown one alone.
    """
    special = {f"{name}_token": rules.pieces[id_] for name, id_ in (("cls", rules.start), ("sep", rules.end))}
    row = graph.extension(
        "BertTokenizer",
        text,
        outputs=3,
        vocab_file="\n".join((*rules.pieces, ROW, WORD)),
        do_lower_case=0,
        do_basic_tokenize=0,
        strip_accents=0,
        tokenize_chinese_chars=0,
        suffix_indicator=rules.prefix,
        unk_token=rules.unknown,
        pad_token=rules.unknown,
        mask_token=rules.unknown,
        **special,
    )
    ids = graph.add("Slice", row, graph.integers(1), graph.integers(-1))  # without the tokens that one text begins and ends with
    unknown = graph.add("Equal", ids, graph.integer(rules.pieces.index(rules.unknown)))
    mark = graph.add("Equal", ids, graph.integer(len(rules.pieces) + 1))
    begins = graph.add("Reshape", graph.add("NonZero", mark), graph.integers(-1))
    next_ = graph.add("Slice", begins, graph.integers(1), graph.integers(_ALL))
    behind = graph.add("Concat", next_, graph.add("Shape", ids), axis=0)
    lasts = graph.add("Sub", behind, graph.integers(1))  # where the last piece of each word stands
    cut_short = graph.add(
        "Concat", graph.add("Gather", unknown, lasts), graph.no(), axis=0
    )  # at the end, no: index -1 is what stands before any word
    of_word = graph.add("Sub", graph.add("CumSum", graph.add("Cast", mark, to=_INT64), graph.integer(0)), graph.integer(1))
    whole = graph.add("Not", graph.add("Gather", cut_short, of_word))
    kept = graph.add("And", graph.add("Not", mark), graph.add("Or", whole, unknown))
    return graph.add("Compress", ids, kept, axis=0)


def _padded(graph: _Graph, flat: str, rules: Rules) -> tuple[str, str, str]:
    """The ids of all rows, a mark before each → (ids, mask, types) ``[batch, tokens] int64``, cut at the most tokens and padded to the longest row."""
    minus, one, two = graph.integers(-1), graph.integers(1), graph.integers(2)
    marks = graph.add("Reshape", graph.add("NonZero", graph.add("Equal", flat, graph.integer(len(rules.pieces)))), minus)
    length = graph.add("Shape", flat)
    ends = graph.add("Concat", marks, length, axis=0)  # [i + 1]: where the row behind the i-th mark ends; that of the first is no row
    most = graph.integers(_ALL)
    begins = graph.add("Slice", marks, one, most)
    room = graph.add("Sub", graph.add("Sub", graph.add("Slice", ends, two, most), begins), one)
    held = graph.add("Min", room, graph.integers(rules.max_length - 2))
    longest = graph.add("ReduceMax", graph.add("Concat", held, graph.integers(0), axis=0), keepdims=0)
    width = graph.add("Add", longest, graph.integer(2))
    places = graph.add("Range", graph.integer(0), width, graph.integer(1))
    column = graph.integers(-1, 1)
    behind = graph.add("Add", graph.add("Reshape", held, column), one)  # where a row's last token stands
    found = graph.add("Min", graph.add("Add", graph.add("Reshape", begins, column), places), graph.add("Sub", length, one))
    ids = graph.add("Gather", flat, found)
    ids = graph.add("Where", graph.add("Less", places, behind), ids, graph.integer(rules.pad))
    ids = graph.add("Where", graph.add("Equal", places, behind), graph.integer(rules.end), ids)
    ids = graph.add("Where", graph.add("Equal", places, graph.integer(0)), graph.integer(rules.start), ids)
    mask = graph.add("Cast", graph.add("LessOrEqual", places, behind), to=_INT64)
    return ids, mask, graph.add("Mul", mask, graph.integer(0))
