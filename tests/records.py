"""FIXTURE records with invented, plausible numbers: nothing here was measured. For tests of what is drawn from records."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Literal

from onnxsqueeze.results import (
    Environment,
    FileRecord,
    Gate,
    Latency,
    Load,
    MetricDelta,
    MetricValue,
    OperatorTime,
    Proof,
    Results,
    ServerTrial,
    SizeParts,
    Split,
    StageRecord,
    Target,
    TaskRecord,
    VsBaseline,
    WeightClass,
)

FIXTURE_NOTE = "FIXTURE: every number of this record is invented for tests."
DATE = "2026-11-20"
DEV_ROWS = 408
LAYER_WEIGHTS = 10_616_832
VOCABULARY = 11_720_448
NO_CUDA = {"reason": "no CUDA provider", "remedy": "install onnxruntime-gpu on a machine with an NVIDIA GPU"}


def latency(p50: float, *, sequence: int = 128, n: int = 612, date: str = DATE, valid: bool = True, steady: bool = True) -> Latency:
    return Latency(
        p50_ms=p50, p90_ms=round(p50 * 1.06, 3), p99_ms=round(p50 * 1.21, 3) if n >= 459 else None, n=n, batch=1, sequence=sequence, threads=1,
        mean_ms=round(p50 * 1.02, 3), processes=5, load_s=0.184, first_run_ms=round(p50 * 2.3, 3), min_ms=round(p50 * 0.97, 3), max_ms=round(p50 * 1.62, 3), warmup=24, steady=steady, valid=valid, date=date,
    )  # fmt: skip


def task_latency(p50: float) -> Latency:
    alone = latency(round(p50 * 0.29, 3), sequence=26, n=800)
    return alone.model_copy(
        update={"lengths": "task", "text_p50_ms": 0.071, "whole_p50_ms": round(p50 * 0.29 + 0.074, 3), "peak_memory_bytes": 131_072_000}
    )


def stage(id_: str, kind: str, seconds: float, count: int, what: str, *, of: str = "student", **details: Any) -> StageRecord:
    changed = {"count": count, "what": what, "details": details}
    return StageRecord(id=id_, kind=kind, seconds=seconds, changed=changed, key=f"{of}/{id_}/{kind}")


FINETUNE = stage("finetune", "finetune", 361.4, 22_713_986, "weights", of="shared", epochs=3, scores=[0.7513, 0.7921, 0.8042], kept_epoch=3)
DISTILL = stage("distill", "distill", 284.9, 17_389_058, "weights", of="shared", layers=[0, 2, 5], scores=[0.7711, 0.7969])
PRUNE = stage("prune-weights", "prune-weights", 190.2, 3_185_049, "weights", of="shared", sparsity=0.6)
SHARED = (FINETUNE, DISTILL, PRUNE)
EXPORT_TEACHER = stage("export", "export", 6.8, 1, "graph", of="teacher", opset=18, largest_difference=3.1e-06)
EXPORT_STUDENT = stage("export", "export", 4.1, 1, "graph", opset=18, largest_difference=2.4e-06)


def weights(dtype: str, item_bytes: float, *, layers: int = LAYER_WEIGHTS, zeros: float = 0.0) -> tuple[WeightClass, ...]:
    attention, feed_forward = layers // 3, layers - layers // 3
    return (
        WeightClass(class_="embedding", dtype=dtype, n=VOCABULARY, zeros=1204, bytes=int(VOCABULARY * item_bytes)),
        WeightClass(class_="attention", dtype=dtype, n=attention, zeros=round(attention * zeros), bytes=int(attention * item_bytes)),
        WeightClass(
            class_="feed_forward", dtype=dtype, n=feed_forward, zeros=round(feed_forward * zeros), bytes=int(feed_forward * item_bytes)
        ),
        WeightClass(class_="norm", dtype="float32", n=9984, zeros=0, bytes=39_936),
    )


def parts(size: int) -> SizeParts:
    others = {"scales": 89_004, "biases_and_norms": 40_960, "constants": 9_216, "decoders": 0, "graph": 102_117}
    left = size - sum(others.values())
    return SizeParts(layers=left // 2, embeddings=left - left // 2, **others)


def proof(p50: float, *, copies: int = 0) -> Proof:
    times = [("MatMulIntegerToFloat", 24, 0.4), ("DynamicQuantizeMatMul", 12, 0.3), ("LayerNormalization", 13, 0.1), ("Softmax", 6, 0.08)]
    times += [("Gelu", 6, 0.06), ("Transpose", 24, 0.04), ("Add", 13, 0.02)]
    operators = tuple(OperatorTime(operator=n, provider="CPUExecutionProvider", nodes=k, ms=round(share * p50, 4)) for n, k, share in times)
    return Proof(
        runs=20, total_ms=round(1.02 * p50, 3), nodes_per_provider={"CPUExecutionProvider": 98}, operators=operators, fusions={"MatMulIntegerToFloat": 24, "Gelu": 6}, memcpy_nodes=copies,
    )  # fmt: skip


def load(p50: float) -> Load:
    trials = (
        ServerTrial(rate_per_s=400 / p50, n=400, p99_ms=2.9 * p50, held=True),
        ServerTrial(rate_per_s=600 / p50, n=600, p99_ms=9.3 * p50, held=False),
    )
    return Load(
        single_stream_p90_ms=round(0.31 * p50, 3), single_stream_n=2000, offline_rows_per_s=round(4100 / p50, 1), offline_batch=32, server_rows_per_s=400 / p50,
        server_bound_ms=5 * p50, server_trials=trials, threads=1, mean_tokens=25.2,
    )  # fmt: skip


def measured(
    name: str,
    *,
    size: int,
    p50: float,
    accuracy: float,
    f1: float,
    stages: tuple[StageRecord, ...],
    weight_classes: tuple[WeightClass, ...],
    versus: VsBaseline | None = None,
    gates: tuple[Gate, ...] = (),
    date: str = DATE,
    operators: dict[str, int] | None = None,
) -> Target:
    model = f"{name}/model.onnx"
    return Target(
        name=name, backend="cpu", provider="CPUExecutionProvider", runtime="onnxruntime 1.31.1", status="ok", baseline=versus is None, model=model,
        size_bytes=size, size_gzip_bytes=int(size * 0.83), size_entropy_bytes=int(size * 0.8), size_dense_bytes=size,
        size_dense_gzip_bytes=int(size * 0.83), size_dense_zstd_bytes=int(size * 0.79), size_bound_bytes=int(size * 0.76) if size < 5e7 else None, size_parts_bytes=parts(size), tokenizer_bytes=711_661,
        latency=latency(p50, date=date), latencies=(latency(round(p50 * 0.34, 3), sequence=32, n=1480), latency(round(p50 * 1.03, 3), sequence=127, n=301), task_latency(p50)),
        metrics={"dev": {"accuracy": MetricValue(value=accuracy, ci95=(accuracy - 0.041, accuracy + 0.038), n=DEV_ROWS),
                         "f1": MetricValue(value=f1, ci95=(f1 - 0.033, f1 + 0.03), n=DEV_ROWS)}},
        vs_baseline=versus, files=(FileRecord(path=model, sha256=sha256(name.encode()).hexdigest(), bytes=size),), weights=weight_classes,
        operators=operators or {"MatMul": 48, "Gelu": 6}, stages=stages, gates=gates, proof=proof(p50), load=load(p50) if versus else None,
        extra={"speedups": [other_speedup(versus, sequence) for sequence in (32, 127)]} if versus else {},
    )  # fmt: skip


def versus(
    size_ratio: float,
    speedup: float,
    speed: Literal["faster", "slower", "tie", "unproven"],
    delta: float,
    half: float,
    p: float,
    quality: Literal["better", "worse", "tie"] = "tie",
) -> VsBaseline:
    return VsBaseline(
        baseline="fp32", size_ratio=size_ratio, speedup=speedup, speedup_ci95=(round(speedup * 0.97, 4), round(speedup * 1.035, 4)), speed=speed, quality=quality,
        metrics={"dev": {"accuracy": MetricDelta(delta=delta, ci95=(delta - half, delta + half), p_value=p),
                         "f1": MetricDelta(delta=round(delta * 0.8, 4), ci95=(delta * 0.8 - half, delta * 0.8 + half), p_value=p)}},
    )  # fmt: skip


def other_speedup(versus: VsBaseline, sequence: int) -> dict[str, Any]:
    assert versus.speedup is not None
    ratio = round(versus.speedup * 1.07, 4)
    return {
        "batch": 1,
        "sequence": sequence,
        "threads": 1,
        "speedup": ratio,
        "speedup_ci95": [round(ratio * 0.96, 4), round(ratio * 1.03, 4)],
        "speed": versus.speed,
        "mean_speedup": round(ratio * 0.99, 4),
        "mean_speedup_ci95": [round(ratio * 0.94, 4), round(ratio * 1.04, 4)],
    }


def drop(value: float, limit: float = 2.0) -> tuple[Gate, ...]:
    return (Gate(name="metric_drop_pp", limit=limit, value=value, passed=value <= limit),)


def cpu_targets() -> tuple[Target, ...]:
    int8 = {"DynamicQuantizeLinear": 25, "MatMulInteger": 37}
    dynamic = stage("quantize-dynamic", "quantize-dynamic", 3.6, 37, "nodes", of="teacher", per_channel=True)
    teacher, student = (FINETUNE, EXPORT_TEACHER), (*SHARED, EXPORT_STUDENT)
    small = LAYER_WEIGHTS // 2
    return (
        measured("int8-ort", size=23_104_512, p50=17.94, accuracy=0.7794, f1=0.8548, stages=(*teacher, dynamic), weight_classes=weights("int8", 1, zeros=0.031),
                 versus=versus(3.938, 1.867, "faster", -0.0025, 0.0178, 0.864), gates=drop(0.25), operators=int8),
        measured("int8-inc", size=22_987_310, p50=20.31, accuracy=0.7819, f1=0.8569, date="2026-11-12", stages=teacher, weight_classes=weights("int8", 1, zeros=0.028),
                 versus=versus(3.958, 1.649, "faster", 0.0, 0.0155, 1.0), gates=drop(0.0)),
        measured("int4-ort", size=16_350_200, p50=41.2, accuracy=0.7279, f1=0.8102, stages=teacher, weight_classes=weights("int4", 0.5),
                 versus=versus(5.565, 0.813, "slower", -0.0539, 0.0301, 0.0004, "worse"), gates=drop(5.39)),
        measured("qdp-ort", size=17_702_144, p50=9.12, accuracy=0.7721, f1=0.8486, stages=student, weight_classes=weights("int8", 1, layers=small, zeros=0.61),
                 versus=versus(5.140, 3.673, "faster", -0.0098, 0.0221, 0.453), gates=drop(0.98), operators=int8),
        measured("qdp-inc", size=17_688_020, p50=10.4, accuracy=0.7672, f1=0.8431, stages=student, weight_classes=weights("int8", 1, layers=small, zeros=0.61),
                 versus=versus(5.144, 3.221, "faster", -0.0147, 0.0231, 0.268), gates=drop(1.47)),
        # the baseline stands last on purpose: reports put it first
        measured("fp32", size=90_986_112, p50=33.5, accuracy=0.7819, f1=0.8541, stages=teacher, weight_classes=weights("float32", 4)),
        Target(name="int8-static", backend="cpu", provider="CPUExecutionProvider", status="failed",
               reason="quantize-static: minmax calibration met a NaN in layer 4", remedy="raise `samples`, or take quantize-dynamic"),
    )  # fmt: skip


def cuda_targets() -> tuple[Target, ...]:
    return tuple(
        Target(name=name, backend="cuda", provider="CUDAExecutionProvider", status="skipped", baseline=name == "cuda-fp32", **NO_CUDA)
        for name in ("cuda-fp32", "cuda-fp16", "cuda-w8")
    )


def qdp_results(**changes: Any) -> Results:
    """One run of qdp on a CPU: six measured targets (one slower and worse), one failed, three skipped. Fields of Results can be replaced."""
    dev = Split(name="dev", n=DEV_ROWS, source="dev.tsv", sha256="d1" * 32, looks=3)
    training = (
        Split(name="train", n=3260, source="train.tsv", sha256="7a" * 32, role="train", dropped=42),
        Split(name="selection", n=366, source="train.tsv", sha256="7a" * 32, role="selection"),
    )
    results = Results(
        recipe="qdp", recipe_sha256="c0ffee" + "0" * 58, seed=0, command="onnxsqueeze run recipes/qdp.yaml --task mrpc --model minilm", model="minilm", model_sha256="53aa" + "1" * 60,
        task=TaskRecord(name="mrpc", primary="accuracy", max_length=128, batch=1, splits=(dev,), training=training, note=FIXTURE_NOTE),
        environment=Environment(
            cpu="FIXTURE Xeon CPU @ 2.50GHz", instruction_set="avx512_vnni", features=("avx2", "avx512f", "avx512_vnni"), cores=2.0, memory_bytes=8_323_000_000, os="Linux 6.1",
            python="3.11.9", versions={"onnxruntime": "1.31.1", "torch": "2.13.0", "transformers": "4.57.6", "neural-compressor": "3.7.1"}, providers=("CPUExecutionProvider",),
        ),
        stages=SHARED, targets=(*cpu_targets(), *cuda_targets()), date=DATE,
    )  # fmt: skip
    return results.model_copy(update=changes)
