"""model_text.onnx of a target: made, probed, and asked the golden sentences before anything is written."""

from __future__ import annotations

from onnxsqueeze import environment, graph
from onnxsqueeze.artifact import MODEL_FILE, file_sha256
from onnxsqueeze.deploy.source import Source, TextModel
from onnxsqueeze.errors import MeasureError, ModelError
from onnxsqueeze.measure import golden
from onnxsqueeze.text import note, probe, rules
from onnxsqueeze.text.front import TEXT
from onnxsqueeze.text.joined import join
from onnxsqueeze.text.session import open_text, require_extensions
from onnxsqueeze.tokens import Encoder


def make(source: Source) -> TextModel:
    """The target's model with its tokenizer before it; external data is that of model.onnx, beside which it is to lie.

    Raises UsageError where onnxruntime-extensions is missing, ModelError where this model or tokenizer cannot be done, MeasureError where the
    golden sentences do not get the golden answers.
    """
    version = require_extensions().__version__
    if any(second is not None for _, second in source.golden.sentences):
        raise ModelError(
            f"--text: the task {source.record.task.name} is about pairs, and the input would be one text a row",
            remedy="leave out --text, and tokenize outside the graph as the README shows",
        )
    encoder = Encoder(source.folder, source.record.task.max_length)
    found = rules.read(source.folder, source.record.task.max_length, encoder.pad_id)
    model = graph.read(source.folder / MODEL_FILE)
    join(model, found)
    difference = probe.on_code_points(probe.InGraph(found, encoder))
    told = note.TextNote(
        model_sha256=file_sha256(source.folder / MODEL_FILE),
        tokenizer_sha256=file_sha256(source.folder / "tokenizer.json"),
        max_length=found.max_length,
        onnxruntime_extensions=version,
        code_points=difference.asked,
        differ=difference.differ,
        blocks=difference.blocks,
    )
    note.write(told, model)
    content = bytes(model.SerializeToString())
    _require_golden_answers(source, content)
    return TextModel(content, told)


def _require_golden_answers(source: Source, content: bytes) -> None:
    """By the target's own provider where this Python has it, else by the CPU's, within what another machine is allowed."""
    import numpy as np
    import onnxruntime as ort

    known, provider = source.golden, source.target.provider
    here = provider in ort.get_available_providers()
    session = open_text(content, source.folder, threads=known.threads, provider=provider if here else "CPUExecutionProvider")
    said = [session.run(None, {TEXT: np.array([text], object)})[0] for text, _ in known.sentences]
    machine = environment.processors()
    now = known.model_copy(
        update={
            "logits": tuple(tuple(float(x) for x in row) for row in np.concatenate(said)),
            "cpu": machine["cpu"],
            "instruction_set": machine["instruction_set"],
            "runtime": ort.__version__ if here else "",
        }
    )
    off, limit = golden.distance(known, now)[0], golden.tolerance(known, now)
    if off > limit:
        raise MeasureError(
            f"--text: with its tokenizer in the graph {source.target.name} is {off:.3g} off the golden answers (allowed {limit:.3g})",
            remedy="leave out --text, and please report the recipe",
        )
