"""Small real things for tests: random checkpoints of every family with a working tokenizer, toy rows, a stage context.

All of it is made offline and is the same for the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from onnxsqueeze.artifact import Artifact, folder_digest
from onnxsqueeze.stage import Call, Changed, Context, Progress, Stage
from onnxsqueeze.store import Store
from onnxsqueeze.tasks.rows import Row, SplitRows, TaskInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FamilyName = Literal["bert", "distilbert", "roberta", "electra"]
FAMILIES: tuple[FamilyName, ...] = get_args(FamilyName)

GOOD = ("good", "great", "wonderful", "brilliant")
BAD = ("bad", "awful", "dull", "boring")
_OTHER_WORDS = """
    the a an and or but not no very too so is was are were be of in on to with for it this that i we you he she they my his her
    movie film plot story actor music book scene ending director dog cat man woman house city day time way never always quite
    rather really one two first last old new long short small big said made went found has had have do did
"""
WORDS = (*GOOD, *BAD, *_OTHER_WORDS.split())


def random_checkpoint(
    folder: Path,
    family: FamilyName,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 2,
    outputs: int = 2,
    head: bool = True,
    seed: int = 0,
) -> Path:
    """Write config.json, model.safetensors and a working tokenizer.json into ``folder``; ``head=False``: the encoder alone."""
    import torch
    import transformers

    hf: Any = transformers  # most of its functions have no types

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_bpe() if family == "roberta" else _word_piece(types=family != "distilbert")
    common: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "num_labels": outputs,
        "pad_token_id": 1 if family == "roberta" else 0,
    }
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    config: Any
    if family == "distilbert":
        config = hf.DistilBertConfig(
            dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=4 * hidden, max_position_embeddings=160, **common
        )
    elif family == "roberta":
        ids = {"bos_token_id": 0, "eos_token_id": 2}
        config = hf.RobertaConfig(max_position_embeddings=162, type_vocab_size=1, layer_norm_eps=1e-5, **shape, **ids, **common)
    elif family == "electra":
        config = hf.ElectraConfig(embedding_size=hidden // 2, max_position_embeddings=160, **shape, **common)
    else:
        config = hf.BertConfig(max_position_embeddings=160, **shape, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = (hf.AutoModelForSequenceClassification if head else hf.AutoModel).from_config(config)
        for weight in model.parameters():  # wider than a fresh model's 0.02, so that outputs depend on the input
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder)

    roberta = family == "roberta"
    inputs = ["input_ids", "attention_mask"] if family in ("roberta", "distilbert") else ["input_ids", "token_type_ids", "attention_mask"]
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    if not roberta:
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, model_input_names=inputs, **names).save_pretrained(folder)
    return folder


def _word_piece(*, types: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *".,!?'-\"():;",
        *letters,
        *(f"##{c}" for c in letters),
        "##ing",
        "##ed",
        "##ly",
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106, the unknown token's name is no password
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    second = 1 if types else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair=f"[CLS]:0 $A:0 [SEP]:0 $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level_bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        prefix = "Ġ"  # the byte-level alphabet's space
        for letter in word:
            merges[(prefix, letter)] = None
            prefix += letter
            pieces.append(prefix)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))  # noqa: S106, the unknown token's name is no password
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    return tokenizer


def artifact(folder: Path, form: Literal["checkpoint", "onnx"] = "checkpoint") -> Artifact:
    """``folder`` as a finished artifact; its key is its digest."""
    digest = folder_digest(folder)
    return Artifact(folder, form, digest, digest)


def toy_task(outputs: int = 2) -> TaskInfo:
    """Sentiment by one word of the sentence; ``outputs=1``: a score between 0 and 1."""
    labels = {1: (), 2: ("negative", "positive"), 3: ("negative", "neutral", "positive")}[outputs]
    metric = "accuracy" if labels else "pearson"
    return TaskInfo(name="words", labels=labels, metrics=(metric,), primary=metric, max_length=32)


@cache
def toy_rows(n: int, seed: int, *, outputs: int = 2, pairs: bool = False) -> tuple[Row, ...]:
    """``n`` short sentences of unequal lengths whose one telling word decides the label."""
    import numpy as np

    random = np.random.default_rng(seed)
    neutral = [w for w in WORDS if w not in GOOD and w not in BAD]
    rows = []
    for _ in range(n):
        mood = int(random.integers(3 if outputs == 3 else 2))
        words = random.choice(neutral, size=int(random.integers(3, 12))).tolist()
        telling: tuple[str, ...] = (BAD, GOOD)[mood] if outputs != 3 else (BAD, (), GOOD)[mood]
        if telling:
            words.insert(int(random.integers(len(words))), str(random.choice(telling)))
        second = " ".join(random.choice(neutral, size=4).tolist()) if pairs else None
        rows.append(Row(" ".join(words) + " .", second, float(mood) if outputs == 1 else mood))
    return tuple(rows)


def silent(done: int, total: int, note: str = "") -> None:
    """A progress that shows nothing."""


def toy_context(
    folder: Path,
    *,
    rows: int = 64,
    outputs: int = 2,
    pairs: bool = False,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = silent,
) -> Context:
    """A stage's context over toy rows: ``rows`` to train on and ``rows`` to select on; its folders are ``folder/checkpoint`` and ``folder/kept``."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    selection = toy_rows(rows, seed=1001, outputs=outputs, pairs=pairs)
    return Context(
        task=toy_task(outputs),
        train=SplitRows("train", toy_rows(rows, seed=1000, outputs=outputs, pairs=pairs), "generated", "0" * 64, "train"),
        selection=SplitRows("selection", selection, "generated", "1" * 64, "selection"),
        select=_metric(selection, outputs),
        seed=seed,
        threads=threads,
        call=Call(batch=1, tokens=16, threads=1),
        checkpoint=checkpoint,
        kept=Store(folder / "kept"),
        progress=progress,
    )


def run_stage(
    stage: Stage, parent: Path, folder: Path, *, teacher: Path | None = None, context: Context | None = None
) -> tuple[Path, Changed]:
    """Run a stage as the pipeline would, over toy rows unless ``context`` is given: (``folder/out``, what it changed)."""
    out = folder / "out"
    out.mkdir(parents=True)
    changed = stage.run(artifact(parent), None if teacher is None else artifact(teacher), out, context or toy_context(folder))
    return out, changed


def _metric(rows: Sequence[Row], outputs: int) -> Callable[[NDArray[np.float32]], float]:
    import numpy as np

    labels = np.array([row.label for row in rows])

    def select(logits: NDArray[np.float32]) -> float:
        if outputs == 1:
            return float(np.corrcoef(logits[:, 0], labels)[0, 1])
        return float((logits.argmax(1) == labels).mean())

    return select
