"""What a deployed folder's README.md says: what was measured, how to load it, with which threads, and the recipe."""

from __future__ import annotations

import json
from typing import Any

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE
from onnxsqueeze.deploy.source import TEXT_FILE, Source
from onnxsqueeze.nn.checkpoint import read_config
from onnxsqueeze.report import numbers
from onnxsqueeze.results import Target

_FENCE = "````"  # no recipe holds four

# Names that the Hub knows: of metrics (https://huggingface.co/metrics), and of GLUE's data set (https://huggingface.co/datasets/nyu-mll/glue).
_HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_GLUE = "nyu-mll/glue"
_GLUE_TASKS = ("sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def folder_readme(source: Source, model: str) -> str:
    """README.md of a plain folder whose .onnx lies at ``model``."""
    return (
        "\n\n".join(
            [
                f"# {title(source)}",
                _origin(source),
                _measured(source),
                _stock_session(source, model),
                *_text(source, model),
                _check(),
                _recipe(source),
            ]
        )
        + "\n"
    )


def model_card(source: Source, model: str) -> str:
    """README.md of a Hugging Face folder: the front matter that the Hub reads, with model-index, and the same below it."""
    use = _stock_session(source, model) if source.embeds else _optimum(source)
    parts = [f"# {title(source)}", _origin(source), _measured(source), use, *_text(source, model), _check(), _recipe(source)]
    return f"---\n{_front_matter(source)}\n---\n\n" + "\n\n".join(parts) + "\n"


def triton_readme(source: Source, name: str, max_batch_size: int, *, mounted: str) -> str:
    """README.md of a Triton repository with the model ``name``, which containers see at ``mounted``."""
    parts = [
        f"# {title(source)}",
        _origin(source),
        _measured(source),
        _triton(source, name, max_batch_size, mounted),
        _check(),
        _recipe(source),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(source: Source) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task, provenance = source.record.task, source.provenance
    glue = task.name in _GLUE_TASKS
    dataset = _GLUE if glue else task.name
    kind = "feature-extraction" if source.embeds else "text-classification"
    scores = [
        EvalResult(
            task_type=kind,
            dataset_type=dataset,
            dataset_name=f"GLUE {task.name}" if glue else task.name,
            dataset_config=task.name if glue else None,
            dataset_split=split,
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=f"{name}, 95 % from {value.ci95[0]:.4f} to {value.ci95[1]:.4f}, {value.n} rows",
            metric_value=round(value.value, 4),
        )
        for split, found in source.target.metrics.items()
        for name, value in found.items()
    ]
    on_hub = "/" in provenance.model
    quantized = on_hub and any(name.startswith("quantize") for name in provenance.stages)
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if quantized else {}
    data = ModelCardData(
        license=provenance.license,
        base_model=provenance.model if on_hub else None,
        datasets=[_GLUE] if glue else None,
        metrics=list(dict.fromkeys(score.metric_type for score in scores)),
        pipeline_tag=kind,
        tags=["onnx", "onnxruntime", "onnxsqueeze", source.target.backend],
        model_name=title(source),
        eval_results=scores,
        **relation,
    )
    return data.to_yaml().strip()


def title(source: Source) -> str:
    """The deployed model's name: of the start model, the task and the target."""
    return f"{source.record.model.split('/')[-1]}-{source.record.task.name}-{source.target.name}"


def _origin(source: Source) -> str:
    made = source.provenance
    said = (
        f"Licence of `{made.model}`: {made.license}."
        if made.license
        else f"The licence of `{made.model}` is not known to the tool that wrote this."
    )
    rows = source.record.task
    note = " Its rows are generated, not written by people: the figures are no measure of use." if rows.generated else ""
    return (
        f"`{made.model}`, made small and fast by onnxsqueeze {made.onnxsqueeze} for `{source.target.provider}`: {' → '.join(made.stages)}. "
        f"Task {rows.name}, at most {rows.max_length} tokens.{note} {said}"
    )


def _measured(source: Source) -> str:
    """The table: this file, and the baseline that it was compared with."""
    record, target = source.record, source.target
    split = record.task.splits[0]
    head = f"| | MB | smaller | p50, ms | faster (95 %) | {record.task.primary} × 100 (95 %) | change, points (95 %) |\n| --- | --- | --- | --- | --- | --- | --- |"
    rows = [_row(source, one) for one in (source.baseline, target) if one]
    latency = target.latency
    machine = f"{record.environment.cpu} ({record.environment.instruction_set}), {target.runtime}"
    times = (
        f"Times: p50 of {latency.n:,} runs at batch {latency.batch}, {latency.sequence} tokens, {_threads_in_words(latency.threads)}, {machine}."
        if latency
        else f"Measured on {machine}; no times were taken."
    )
    notes = f"The metric: {split.name} ({split.source}, {split.n:,} rows). {times} All of it: results.json."
    return "\n".join(["## Measured\n", head, *rows, "", notes, *_made_for(target)])


def _made_for(target: Target) -> list[str]:
    """What must be said where the file is not the measured one, or was tried in another ONNX Runtime."""
    older = target.older
    if older is None:
        return []
    tried = f"In {older.runtime} it gives the golden answers within {older.max_abs_diff:.2g} (allowed {older.tolerance:.2g}; {older.turned} of them turned); neither its speed nor its metric was measured there."
    if not older.changed:
        return ["", f"**Tried in {older.runtime}**, which takes the measured file as it is. {tried}"]
    was = ", ".join(f"`{file.path}` {file.bytes:,} bytes, sha256 {file.sha256}" for file in older.measured)
    return [
        "",
        f"**The file here is not the one that was measured**: it was made for {older.runtime} ({', '.join(older.changed)}). {tried} Measured was {was}.",
    ]


def _threads_in_words(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


def _row(source: Source, one: Target) -> str:
    split, primary = source.record.task.splits[0].name, source.record.task.primary
    value, versus = one.metrics[split][primary], one.vs_baseline
    cells = [
        f"{one.name}{' (the baseline)' if one is source.baseline else ''}",
        numbers.megabytes(one.size_bytes),
        numbers.ratio(versus.size_ratio) if versus else numbers.MISSING,
        numbers.milliseconds(one.latency.p50_ms if one.latency else None),
        f"{numbers.ratio(versus.speedup)} {numbers.ratio_interval(versus.speedup_ci95)}".strip() if versus else numbers.MISSING,
        f"{numbers.hundredths(value.value)} {numbers.hundredths_interval(value.ci95)}",
        f"{numbers.points(versus.metrics[split][primary].delta)} {numbers.points_interval(versus.metrics[split][primary].ci95)}"
        if versus
        else numbers.MISSING,
    ]
    return f"| {' | '.join(cells)} |"


def _stock_session(source: Source, model: str) -> str:
    """How to load it with onnxruntime and tokenizers alone."""
    signature = graph.signature(source.folder / MODEL_FILE)
    inputs = {name: kind for name, (side, kind) in signature.items() if side == "input"}
    output = next(name for name, (side, _) in signature.items() if side == "output")
    ids = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    feed = ", ".join(f'"{name}": np.array([row.{ids[name]} for row in rows], np.{kind})' for name, kind in inputs.items())
    pairs = source.golden.sentences[0][1] is not None
    texts = '[("a first text", "a second one")]' if pairs else '["a text", "and another one"]'
    pad_id = int(read_config(source.folder).get("pad_token_id") or 0)
    shown = "print(outputs)"
    if source.labels and not source.embeds:
        shown = f"labels = {list(source.labels)!r}\nprint([labels[i] for i in outputs.argmax(1)])"
    return f"""## Use

```python
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({source.record.task.max_length})
tokenizer.enable_padding(pad_id={pad_id})
options = ort.SessionOptions()
options.intra_op_num_threads = {source.golden.threads}
session = ort.InferenceSession("{model}", options, providers=["{source.target.provider}"])

rows = tokenizer.encode_batch({texts})
outputs = session.run(["{output}"], {{{feed}}})[0]
{shown}
```

{_threads(source)}"""


def _optimum(source: Source) -> str:
    return f"""## Use

```python
import onnxruntime as ort
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

options = ort.SessionOptions()
options.intra_op_num_threads = {source.golden.threads}
model = ORTModelForSequenceClassification.from_pretrained(".", session_options=options, provider="{source.target.provider}")
tokenizer = AutoTokenizer.from_pretrained(".")
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(classify("a text", truncation=True, max_length={source.record.task.max_length}))
```

`"."` is this folder; on the Hub it is the repository's name. {_threads(source)}"""


def _triton(source: Source, name: str, max_batch_size: int, mounted: str) -> str:
    gpus = "--gpus all " if source.target.backend in ("cuda", "tensorrt") else ""
    run = f'docker run --rm {gpus}-v "$PWD":{mounted}'
    joined = (
        f"Requests have up to {max_batch_size} rows, padded to one width. Triton joins requests of equal width alone: clients that pad to a few widths (16, 32, 64, 128) are batched more often."
        if max_batch_size
        else "Requests have exactly the dims of config.pbtxt; Triton does not join them."
    )
    return f"""## Use

Here, with NN.NN the release of Triton that you have:

```sh
{run} -p 8000:8000 -p 8001:8001 nvcr.io/nvidia/tritonserver:NN.NN-py3 \\
  tritonserver --model-repository={mounted} --exit-on-error=true --disable-auto-complete-config
curl -f localhost:8000/v2/models/{name}/ready && echo ready
```

The server ends where it does not take the model; the second line answers once the warm-up is through. Nothing here was run in Triton: the configuration was
read back by Triton's own protobuf, and a session of the same ONNX Runtime provider was driven by it. {joined}

| file | for |
| --- | --- |
| `{name}/config.pbtxt` | Triton; a comment says where each number comes from, and all may be tuned |
| `{name}/1/` | Triton: the model |
| `{name}/labels.txt` | Triton: names for the classification extension (where the model classifies) |
| `{name}/warmup/` | Triton: token ids that it warms up with |
| `{name}/tokenizer.json`, `config.json` and others | clients: the server takes token ids, not text |
| `{name}/golden.json`, `results.json` | `onnxsqueeze verify`; the record |
| `model_analyzer.yaml`, `perf_input.json` | Triton Model Analyzer: `model-analyzer profile -f {mounted}/model_analyzer.yaml` in the SDK's container, mounted alike |

Triton reads folders alone at the top, and of a model's folder what config.pbtxt names. `{name}/` can be copied into another repository as it is.

config.pbtxt sets what was measured: one instance with {_threads_in_words(source.golden.threads)}. For more requests at once raise `instance_group`'s count, not the threads, to at most the
cores that the container has."""


def _text(source: Source, model: str) -> list[str]:
    """How to ask the model that takes text, where there is one, and what is known of how it tokenizes."""
    if source.text is None:
        return []
    file = model.removesuffix(MODEL_FILE) + TEXT_FILE
    providers = json.dumps(list(dict.fromkeys([source.target.provider, "CPUExecutionProvider"])))  # the tokenizer runs on the CPU
    output = next(name for name, (side, _) in graph.signature(source.folder / MODEL_FILE).items() if side == "output")
    return [
        f"""## Text in

`{file}` is the same model with the tokenizer in its graph: `text` string[batch] in, `{output}` out. Sessions need the operators of onnxruntime-extensions.

```python
import numpy as np
import onnxruntime as ort
from onnxruntime_extensions import get_library_path  # pip install onnxruntime-extensions

options = ort.SessionOptions()
options.register_custom_ops_library(get_library_path())
options.intra_op_num_threads = {source.golden.threads}
session = ort.InferenceSession("{file}", options, providers={providers})
print(session.run(["{output}"], {{"text": np.array(["a text", "and another one"], object)}})[0])
```

A row is cut at {source.text.note.max_length} tokens, as above. Asked when this folder was written, each inside a word: {source.text.note.said()} (letters, marks,
numbers and punctuation of Unicode's Basic Multilingual Plane). A text ends at its first NUL character, which tokenizer.json takes out."""
    ]


def _threads(source: Source) -> str:
    n = source.golden.threads
    return (
        f"It was measured with {_threads_in_words(n)}. ONNX Runtime's own default is a thread for each core of the host, whatever the container may use: "
        "set `intra_op_num_threads` to the cores that this process has for one request, and send a few requests of real length before the first that counts."
    )


def _check() -> str:
    return (
        "## Is it the same model?\n\n    onnxsqueeze verify .                      # files, outputs and metric against golden.json and results.json\n"
        "    onnxsqueeze inspect . --recipe            # the recipe, out of the .onnx"
    )


def _recipe(source: Source) -> str:
    return f"## Recipe\n\n{_FENCE}yaml\n{source.recipe.rstrip()}\n{_FENCE}"
