"""Every error that onnxsqueeze raises on purpose, and the exit code of each.

SqueezeError                exit 1   the base: one message, and what to do about it
├── UsageError              exit 2   wrong input: nothing was started
│   ├── RecipeError                  faults of a recipe or of the configuration file, all at once
│   ├── DataError                    rows that are missing, broken or mislabelled
│   └── ModelError                   a model that cannot be loaded or is of an unknown family
├── StageError              exit 1   a stage failed, or changed nothing
├── MeasureError            exit 1   a measurement failed
├── StoreError              exit 1   the store or the output folder cannot be written or is damaged
├── GateMissed              exit 3   a gate of the recipe was missed
└── Unavailable             exit 1   something is not installed or not on this machine: a skipped row
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

# Kept as they are: URLs of other machines, and closing tags such as RoBERTa's "</s>". A path begins where no word, fraction or
# glob goes on ("int8/uint8", "(a+b)/2", "../x", "**/x" are none), and ends at a space, a quote, or a separator before the next path.
_KEPT = r"(?P<kept>[A-Za-z][A-Za-z0-9+.-]*(?<!file)://(?!/)(?:(?![,;|]/|:/(?!/))[^\s\"'`<>])*|</\w+>)"
_PATH = r"(?:(?<=\\[nrt])|(?<![\w.*+)\]}/~%$#\\-]))(?:~(?:[^\W\d][\w.-]*)?)?/(?:(?![:,;=|&(\[{]/)[^\s\"'`<>])+"
_KEPT_OR_PATH = re.compile(f"{_KEPT}|{_PATH}")


class SqueezeError(Exception):
    """What went wrong in one sentence, and in ``remedy`` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class UsageError(SqueezeError):
    """The command line, a path or a file that the user named is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe or of the configuration file: where it stands and what is wrong there."""

    file: str
    line: int | None
    path: str  # "stages[1].quantize-static.samples"; empty for the file as a whole
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class RecipeError(UsageError):
    """All faults of a recipe or of the configuration file."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


class DataError(UsageError):
    """A file of rows is missing, broken, or its labels do not fit."""


class ModelError(UsageError):
    """A model folder cannot be loaded, or its architecture is unknown."""


class StageError(SqueezeError):
    """A stage failed, or left its parent as it was."""


class MeasureError(SqueezeError):
    """A measurement could not be made."""


class StoreError(SqueezeError):
    """The store or the output folder cannot be written, or what it holds is damaged."""


class GateMissed(SqueezeError):  # noqa: N818  # what happened, not a mistake of the program
    """A target missed a gate of its recipe."""

    exit_code = 3


class Unavailable(SqueezeError):  # noqa: N818  # a fact about the machine
    """Something is not installed or not on this machine: the row is reported as skipped.

    ``message`` is the row's reason; ``remedy`` is what the user can do.
    """


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` for the nearest of ``known``, or the list of them."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def without_paths(text: str) -> str:
    """``text`` with the last part alone of every absolute POSIX path in it: ``File "/home/alice/x.py", line 3`` → ``File "x.py", line 3``.

    For messages that go into records, which name no machine. ``~/x`` and ``file:`` URLs count as paths; a path ends at a space.
    What looks like a path is taken for one: of an ONNX node ``/encoder/MatMul`` remains ``MatMul``.
    """
    return _KEPT_OR_PATH.sub(lambda found: found[0] if found["kept"] else _last_part(found[0]), text)


def _last_part(path: str) -> str:
    """The last part with a letter or digit in it, and the punctuation after it; ``path`` itself where it has none."""
    parts = path.split("/")
    named = [i for i, part in enumerate(parts) if i > 0 and any(letter.isalnum() for letter in part)]
    return "".join(parts[named[-1] :]) if named else path
