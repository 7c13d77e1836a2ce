"""What a file with a tokenizer in its graph says of that, in an entry ``onnxsqueeze.text`` of its ``metadata_props``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxsqueeze.errors import ModelError

if TYPE_CHECKING:
    import onnx

KEY = "onnxsqueeze.text"


class TextNote(BaseModel):
    """Which model and tokenizer it is of, and how many code points of Unicode's first plane, each inside a word, got other ids than by tokenizer.json."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)  # ignore: a later version may say more

    schema_: Literal[1] = Field(1, alias="schema")
    model_sha256: str
    tokenizer_sha256: str
    max_length: int
    onnxruntime_extensions: str
    code_points: int = Field(description="Assigned letters, marks, numbers and punctuation characters that were asked")
    differ: int
    blocks: tuple[str, ...] = Field((), description="Where most of those that differ are: U+1E00 for U+1E00 to U+1EFF")

    def said(self) -> str:
        """The probe in words."""
        where = f", most of them in {', '.join(self.blocks)}" if self.blocks else ""
        return f"{self.differ:,} of {self.code_points:,} code points are tokenized otherwise than by tokenizer.json{where}"


def write(note: TextNote, model: onnx.ModelProto) -> None:
    """Put the note into ``model``."""
    model.metadata_props.add(key=KEY, value=note.model_dump_json(by_alias=True))


def read(model: onnx.ModelProto, name: str) -> TextNote | None:
    """The note of a file, None where it has none. Raises ModelError where it cannot be read; ``name`` is the file's in messages."""
    found = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if found is None:
        return None
    try:
        return TextNote.model_validate_json(found)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise ModelError(
            f"{name}: its note on text cannot be read: {reason}", remedy="write the file again with `onnxsqueeze deploy --text`"
        ) from error
