"""The same MiniLM-L6 in int8 by six makers, timed in turns on this machine; `ours` is what a stock ONNX Runtime session makes of our file.

    python benchmarks/peers/peers.py --out reports/backends

Makes what it needs below --work: the runs of peers.yaml (`fp32`, `int8` = export + quantize_dynamic, `ours`, which is tuned for each shape), the usual
advice (onnxruntime.transformers' optimizer, then quantize_dynamic), optimum's avx512_vnni preset, OpenVINO with NNCF's post-training int8, CTranslate2's
int8, the last two in environments of their own. Every engine runs in processes of its own (engine.py), five one after the other, and idles while another
is timed. A block during which other processes used more than 5 % of the cores is run again, once; where they did so again, the row says "disturbed".
Writes <out>/peers.json and <out>/peers.md. A peer that cannot be made is a row "skipped" with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxsqueeze import environment
from onnxsqueeze.errors import without_paths
from onnxsqueeze.measure.contention import OTHERS_SHARE, Reading, others_share, read
from onnxsqueeze.measure.statistics import nearest_rank, ratio_of_medians_interval
from onnxsqueeze.results import read_results
from onnxsqueeze.store import Store
from onnxsqueeze.tasks.toy import toy_rows
from onnxsqueeze.tokens import Encoder

HERE = Path(__file__).parent
ROUNDS, PROCESSES = 20, 5  # rounds in all; processes that each engine gets, one after the other
Shape = tuple[int, int, int]  # batch, tokens, threads
SHAPES: tuple[Shape, ...] = ((1, 128, 1), (1, 32, 1), (8, 128, 2))


@dataclass(frozen=True)
class Peer:
    """An engine and its model; ``python`` runs engine.py, ``reason`` says why there is none."""

    name: str
    what: str
    engine: str = "onnxruntime"
    model: Path | None = None
    python: Path = Path(sys.executable)
    reason: str | None = None


def environment_with(work: Path, name: str, *packages: str) -> Path:
    """The Python of an environment that has ``packages``; made where it is not there."""
    place = work / f"env-{name}"
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (place / ".ready").touch()
    return python


def usual_advice(fp32: Path, out: Path) -> Path:
    """BERT's fusions by onnxruntime.transformers, then quantize_dynamic per tensor."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    out.mkdir(parents=True, exist_ok=True)
    optimizer.optimize_model(str(fp32), "bert", num_heads=12, hidden_size=384).save_model_to_file(str(out / "fused.onnx"))
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(out / "fused.onnx", out / "model.onnx", weight_type=QuantType.QInt8, extra_options=extra)
    return out / "model.onnx"


def optimum_preset(fp32: Path, out: Path) -> Path:
    """Optimum's dynamic avx512_vnni preset on the export."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(fp32.parent, file_name=fp32.name)
    preset = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    quantizer.quantize(save_dir=out, quantization_config=preset, file_suffix="")
    return out / "model.onnx"


_NNCF = """
import sys, nncf, openvino as ov, numpy as np
model, rows, out = ov.Core().read_model(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
feeds = [dict(zip(("input_ids", "attention_mask", "token_type_ids"), (r[None], np.ones_like(r[None]), np.zeros_like(r[None])))) for r in (rows[k] for k in rows)]
ov.save_model(nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)), out, compress_to_fp16=False)
"""


def openvino_int8(fp32: Path, rows: Path, out: Path, python: Path) -> Path:
    """NNCF's post-training quantization for transformers, calibrated on sentences of the toy grammar."""
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-c", _NNCF, fp32, rows, out / "model.xml"], check=True, capture_output=True)
    return out / "model.xml"


_CONVERT = """
import sys, ctranslate2.converters as c
c.TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization="int8", force=True)
"""


def ctranslate2_int8(checkpoint: Path, out: Path, python: Path) -> Path:
    """The encoder by CTranslate2's converter, which borrows transformers from our environment; the head beside it."""
    from safetensors.numpy import load_file

    site = next(path for path in sys.path if path.endswith("site-packages"))
    encoder = out.parent / "encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (encoder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (checkpoint / name).is_file() and not (encoder / name).exists():
            (encoder / name).symlink_to((checkpoint / name).resolve())
    subprocess.run([python, "-c", _CONVERT, encoder, out], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": site})
    tensors = load_file(checkpoint / "model.safetensors")
    names = {
        "pooler_weight": "bert.pooler.dense.weight",
        "pooler_bias": "bert.pooler.dense.bias",
        "weight": "classifier.weight",
        "bias": "classifier.bias",
    }
    np.savez(out / "head.npz", **{key: tensors[name] for key, name in names.items()})
    return out


def sentences(folder: Path, out: Path) -> Path:
    """Ids of 128 toy sentences, for calibration."""
    encoded = Encoder(folder, 128).encode([row.text for row in toy_rows(128, seed=0)], [None] * 128)
    np.savez(out, *[np.array(row.ids, np.int64) for row in encoded])
    return out


def tried(name: str, what: str, make: Any, **options: Any) -> Peer:
    """The peer that ``make`` makes, or why it cannot be made."""
    try:
        return Peer(name, what, model=make(), **options)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return Peer(name, what, reason=said[-1] if said else f"exit code {error.returncode}")
    except (ImportError, RuntimeError, ValueError, KeyError, OSError) as error:
        return Peer(name, what, reason=f"{type(error).__name__}: {error}")


def run_recipe(work: Path, shape: Shape) -> Path:
    """The folder of the run of peers.yaml at ``shape``: what does not depend on it is taken from the store."""
    out = work / ("run-" + "x".join(map(str, shape)))
    values = [f"measure.{name}={number}" for name, number in zip(("batch", "sequence", "threads"), shape, strict=True)]
    words = [sys.executable, "-m", "onnxsqueeze", "run", str(HERE / "peers.yaml"), "--out", str(out)]
    subprocess.run([*words, *(word for value in values for word in ("--set", value))], check=True)
    return out


def make_peers(asked: argparse.Namespace) -> dict[Shape, list[Peer]]:
    """Everything that is raced at each shape, `ours` first."""
    work: Path = asked.work.resolve()
    runs = {shape: run_recipe(work, shape) for shape in SHAPES}
    run = runs[SHAPES[0]]
    teacher = next(stage for stage in read_results(run).stages if stage.kind == "finetune")
    others = made_elsewhere(work, run / "fp32" / "model.onnx", Store.default_root() / "artifacts" / str(teacher.key) / "files")
    int8 = Peer("quantize_dynamic", "export, quantize_dynamic per channel", model=run / "int8" / "model.onnx")
    ours = Peer("ours", "export, quantize-dynamic, optimize-graph tuned here for this shape")
    return {shape: [replace(ours, model=runs[shape] / "ours" / "model.onnx"), int8, *others] for shape in SHAPES}


def made_elsewhere(work: Path, fp32: Path, checkpoint: Path) -> list[Peer]:
    """The export, and what other tools make of it or of the checkpoint."""
    rows = sentences(fp32.parent, work / "rows.npz")
    peers = [
        tried("optimizer first", "onnxruntime.transformers' optimizer, quantize_dynamic", lambda: usual_advice(fp32, work / "advice")),
        tried("optimum", "optimum's avx512_vnni preset, dynamic", lambda: optimum_preset(fp32, work / "optimum")),
        Peer("fp32", "export", model=fp32),
    ]
    isolated: dict[str, tuple[str, tuple[str, ...], Callable[[Path], Path]]] = {
        "openvino": ("OpenVINO, NNCF int8", ("openvino", "nncf", "onnx"), lambda it: openvino_int8(fp32, rows, work / "openvino", it)),
        "ctranslate2": ("CTranslate2 int8", ("ctranslate2",), lambda it: ctranslate2_int8(checkpoint, work / "ctranslate2", it)),
    }
    for engine, (what, packages, make) in isolated.items():
        try:
            python = environment_with(work, engine, *packages)
        except subprocess.CalledProcessError as error:
            peers.append(Peer(engine, what, reason=f"{', '.join(packages)} cannot be installed: pip's exit code {error.returncode}"))
            continue
        peers.append(tried(engine, what, lambda make=make, python=python: make(python), engine=engine, python=python))
    return peers


class Engine:
    """A running engine.py."""

    def __init__(self, peer: Peer, threads: int) -> None:
        words = [str(word) for word in (peer.python, HERE / "engine.py", peer.engine, peer.model, threads)]
        environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """One question, one answer."""
        assert self.process.stdin is not None  # noqa: S101  # both are pipes
        assert self.process.stdout is not None  # noqa: S101
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine stopped with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_s(self) -> float:
        """CPU time that the process has used so far, all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None  # noqa: S101
        self.process.stdin.close()
        self.process.wait(timeout=30)


def race(peers: Sequence[Peer], shape: Shape, seconds: float) -> list[dict[str, Any]]:
    """One row per peer at one shape; every ratio is of blocks that took turns, in `PROCESSES` processes of each engine."""
    runners = [peer for peer in peers if peer.model]
    found = {peer.name: _Timed() for peer in runners}
    for process in range(PROCESSES):
        engines = {peer.name: Engine(peer, shape[2]) for peer in runners}
        try:
            for name, engine in engines.items():
                found[name].start(engine.ask(shape=list(shape[:2])))
            for round_ in range(-1, ROUNDS // PROCESSES):  # the first round warms up
                for name in np.random.default_rng((process, round_ + 1)).permutation(list(engines)).tolist():
                    block = _block(name, engines, seconds)
                    repeated = round_ >= 0 and block.disturbed
                    block = _block(name, engines, seconds) if repeated else block
                    if round_ >= 0:
                        found[name].add(process, block, repeated=repeated)
        finally:
            for engine in engines.values():
                engine.close()
    return [_row(peer, shape, found) for peer in peers]


@dataclass(frozen=True)
class _Block:
    """Counted runs, whether others disturbed them, and the CPU seconds of the engines that waited."""

    times_ms: list[float]
    disturbed: bool
    waiting_cpu_s: float


def _block(name: str, engines: dict[str, Engine], seconds: float) -> _Block:
    waiting = [engine for other, engine in engines.items() if other != name]

    def now() -> Reading | None:
        reading = read()
        return reading and replace(reading, own_s=time.process_time() + sum(engine.cpu_s() for engine in engines.values()))

    spent, before = sum(engine.cpu_s() for engine in waiting), now()
    times_ms = engines[name].ask(runs=5, seconds=seconds)["ms"]
    disturbed = others_share(before, now(), environment.default_threads()) > OTHERS_SHARE
    return _Block(times_ms, disturbed, sum(engine.cpu_s() for engine in waiting) - spent)


class _Timed:
    """What is known of one engine: its first answer, and all runs of each of its processes."""

    def __init__(self) -> None:
        self.ready: list[dict[str, Any]] = []
        self.by_process: list[list[float]] = [[] for _ in range(PROCESSES)]
        self.repeated = self.disturbed = 0
        self.waiting_cpu_s = 0.0

    def start(self, ready: dict[str, Any]) -> None:
        """A process has answered for the first time."""
        self.ready.append(ready)

    def add(self, process: int, block: _Block, *, repeated: bool) -> None:
        """A block that counts."""
        self.by_process[process] += block.times_ms
        self.repeated += repeated
        self.disturbed += block.disturbed
        self.waiting_cpu_s += block.waiting_cpu_s

    @property
    def blocks(self) -> tuple[Any, ...]:
        """All runs, an array per process."""
        return tuple(np.array(times) for times in self.by_process)


def _row(peer: Peer, shape: Shape, found: dict[str, _Timed]) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": peer.name, "what": peer.what, **dict(zip(("batch", "tokens", "threads"), shape, strict=True))}
    if not peer.model:
        return row | {"status": "skipped", "reason": peer.reason}
    own, ours = found[peer.name], found["ours"]
    runs = np.concatenate(own.blocks)
    p50 = nearest_rank(runs, 50)
    off = np.abs(np.subtract(own.ready[0]["logits"], found["fp32"].ready[0]["logits"])).max()
    return row | {
        "status": "ok",
        "version": own.ready[0]["version"].partition("-")[0],
        "max_logit_diff_to_fp32": float(off),
        "p50_ms": p50,
        "p90_ms": nearest_rank(runs, 90),
        "n": len(runs),
        "ratio_to_ours": p50 / nearest_rank(np.concatenate(ours.blocks), 50),
        "ratio_ci95": None if own is ours else ratio_of_medians_interval(own.blocks, ours.blocks),
        "load_s": nearest_rank(np.array([ready["ready"] for ready in own.ready]), 50),
        "cpu_s_that_others_used_meanwhile": own.waiting_cpu_s,
        "repeated_blocks": own.repeated,
        "disturbed_blocks": own.disturbed,
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# The same MiniLM-L6 in int8, by maker",
        "",
        f"{record['cpu']} ({record['instruction_set']}), {record['date']}; engines took turns. `{record['command']}`",
        "",
        "Ratios are the peer's median time ÷ ours, with a 95 % interval: above 1 ours is faster. Each engine had",
        f"{record['processes']} processes one after the other, and the interval knows how far they differ. Disturbed counts blocks, of",
        f"{record['rounds']}, during which other processes used more than 5 % of the cores, again after a second try.",
    ]
    for shape in SHAPES:
        rows = [row for row in record["rows"] if (row["batch"], row["tokens"], row["threads"]) == shape]
        lines += ["", f"## batch {shape[0]}, {shape[1]} tokens, {shape[2]} thread{'s' if shape[2] > 1 else ''}", ""]
        lines += ["| engine | model | version | p50, ms | ÷ ours (95 %) | largest logit difference to fp32 | disturbed |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in rows:
            if row["status"] != "ok":
                lines.append(f"| {row['engine']} | {row['what']} | – | skipped: {row['reason']} | | | |")
                continue
            ci = row["ratio_ci95"]
            ratio = "–" if ci is None else f"{row['ratio_to_ours']:.2f} ({ci[0]:.2f}–{ci[1]:.2f})"
            lines.append(
                f"| {row['engine']} | {row['what']} | {row['version']} | {row['p50_ms']:.2f} | {ratio} | "
                f"{row['max_logit_diff_to_fp32']:.3f} | {row['disturbed_blocks']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make, race, write."""
    from datetime import UTC, datetime

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--work", type=Path, default=Path("runs/peers"), help="where models and environments go")
    cli.add_argument("--seconds", type=float, default=0.25, help="least time of a block")
    asked = cli.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    peers = make_peers(asked)
    rows = [row for shape in SHAPES for row in race(peers[shape], shape, asked.seconds)]
    record = {
        "schema": 1,
        "command": without_paths(shlex.join(["python", "benchmarks/peers/peers.py", *sys.argv[1:]])),
        "date": datetime.now(UTC).date().isoformat(),
        **environment.processors(),
        "cores": environment.usable_cores(),
        "versions": environment.versions(environment.TOOLS),
        "rounds": ROUNDS,
        "processes": PROCESSES,
        "rows": rows,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "peers.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (asked.out / "peers.md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
