"""Small files in GLUE's TSV layout, with invented rows, written for one test."""

from __future__ import annotations

from pathlib import Path

# Header, and how a row is written: {a} and {b} are texts, {y} is the label.
LAYOUT = {
    "sst2": ("SST-2", "sentence\tlabel", "{a} \t{y}", ("0", "1")),
    "cola": ("CoLA", "", "zz01\t{y}\t\t{a}", ("0", "1")),
    "mrpc": ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t10\t11\t{a}\t{b}", ("0", "1")),
    "stsb": ("STS-B", "index\tgenre\tsentence1\tsentence2\tscore", "0\tnews\t{a}\t{b}\t{y}", ("0.000", "2.500", "5.0")),
    "qqp": ("QQP", "id\tquestion1\tquestion2\tis_duplicate", "0\t{a}\t{b}\t{y}", ("0", "1")),
    "mnli": ("MNLI", "index\tsentence1\tsentence2\tgold_label", "0\t{a}\t{b}\t{y}", ("entailment", "neutral", "contradiction")),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}", ("entailment", "not_entailment")),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}", ("entailment", "not_entailment")),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}", ("0", "1")),
}
DEV_FILES = {"mnli": ("dev_matched.tsv", "dev_mismatched.tsv")}


def write_task(root: Path, task: str, *, train: int = 600, dev: int = 12, train_file: str = "train.tsv") -> Path:
    """Write one task below ``root``; row i has the i-th label in turn. Returns the task's folder."""
    folder = root / LAYOUT[task][0]
    folder.mkdir(parents=True)
    (folder / train_file).write_text(table(task, train, "train"), encoding="utf-8", newline="")
    for name in DEV_FILES.get(task, ("dev.tsv",)):
        (folder / name).write_text(table(task, dev, name), encoding="utf-8", newline="")
    return folder


def table(task: str, rows: int, word: str) -> str:
    """The text of a file whose row i holds "the {word} item {i}" with the i-th label in turn."""
    _, header, row, written = LAYOUT[task]
    lines = [row.format(a=f"the {word} item {i} .", b=f"a {word} thing {i} .", y=written[i % len(written)]) for i in range(rows)]
    return "\n".join([*([header] if header else []), *lines]) + "\n"
