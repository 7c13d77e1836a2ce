"""`onnxsqueeze verify`: whether a folder holds, or a server serves, the model that was measured, and whether it still answers, runs and scores as recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from onnxsqueeze import environment, graph
from onnxsqueeze.artifact import MODEL_FILE, file_sha256, models_in
from onnxsqueeze.backends import HERE, Answers, Backends
from onnxsqueeze.errors import UsageError
from onnxsqueeze.measure import golden
from onnxsqueeze.measure.contention import Reading
from onnxsqueeze.measure.contention import read as read_load
from onnxsqueeze.measure.latency import Candidate, measure_latency
from onnxsqueeze.measure.metric import evaluate, predict
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.statistics import nearest_rank
from onnxsqueeze.measure.work import FixedWork
from onnxsqueeze.nn.checkpoint import read_config
from onnxsqueeze.remote import Remote
from onnxsqueeze.results import RESULTS_FILE, Results, Target, read_results
from onnxsqueeze.stage import Progress
from onnxsqueeze.tasks.metrics import said
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.rows import as_read
from onnxsqueeze.tasks.settings import NAMES, TaskSettings

_SLOWER = 0.9  # of the recorded interval's lower end: two measurements of one file differ by a few percent
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SERVED_CALLS = 200
_SERVED_LIMIT = 1.5, 2.0  # × the recorded p50, and ms on top: more is wrong threads or a CPU that others use, not the way there


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``passed`` is None where it could not be judged, and the text says why. ``exit_code`` counts where it failed."""

    what: str
    passed: bool | None
    text: str
    exit_code: int


def verify(
    path: Path,
    *,
    data_dir: Path | None,
    progress: Progress,
    backends: Backends = HERE,
    reader: Callable[[], Reading | None] = read_load,
) -> Iterator[Finding]:
    """Compare a target's folder, a deployed one, or its model.onnx with what was written when it was measured.

    Files and outputs always; latency and metric where the record lies beside the folder, or in a deployed one. Raises DataError where
    golden.json is missing or damaged, MeasureError where the model does not run, Unavailable where its backend does not start, ModelError
    where its external data lies outside its folder.
    """
    place = _Place.of(path)
    known = golden.read(place.folder)
    if place.onnx.is_file():
        graph.files_of(place.onnx)
    yield _files(place, known)
    now = golden.answers(
        place.folder, known.backend, known.threads, known.max_length, known.sentences, backends, vectors=known.vectors, onnx=place.onnx
    )
    yield _outputs(known, now)
    yield _invariance(now)
    record, target = place.record, place.target
    if record is None or target is None or target.status != "ok":
        yield Finding("record", None, f"no record of it in {place.folder.parent / RESULTS_FILE}: latency and metric are not compared", 0)
        return
    yield _latency(place, record, target, progress, backends, reader)
    yield from _metrics(place, record, target, data_dir, progress, backends.open)


def verify_server(url: str, folder: Path, *, data_dir: Path | None, progress: Progress) -> Iterator[Finding]:
    """Compare a model behind ``url`` (see `Remote`) with the golden answers and the record in ``folder``, a target's or a deployed one.

    Which kernels the server has is not known: its answers may differ as they may on another CPU. Raises as `verify` and `Remote` do.
    """
    place = _Place.of(folder)
    known = golden.read(place.folder)
    with closing(Remote(url)) as server:
        said = golden.ask(server, place.folder, known.max_length, known.sentences)
        now = known.model_copy(update={"cpu": "", "runtime": "", **vars(said)})
        yield _outputs(known, now)
        yield _invariance(now)
        record, target = place.record, place.target
        if record is None or target is None or target.status != "ok":
            yield Finding(
                "record", None, f"no record of it in {place.folder.parent / RESULTS_FILE}: latency and metric are not compared", 0
            )
            return
        yield _served_latency(server, place.folder, record, target, known)
        yield from _metrics(place, record, target, data_dir, progress, lambda *_: server)


@dataclass(frozen=True)
class _Place:
    """Where a model lies: its .onnx, the folder of its tokenizer and golden answers, and its record, with one target where it was deployed."""

    onnx: Path
    folder: Path
    record: Results | None
    target: Target | None
    deployed: bool

    @classmethod
    def of(cls, path: Path) -> _Place:
        found = models_in(path if path.is_dir() else path.parent)
        if len(found) > 1:
            raise UsageError(f"{path}: holds {len(found)} models", remedy=f"name one of them, e.g. {found[0]}")
        onnx = next(iter(found), path / MODEL_FILE)
        # its tokenizer and answers lie beside it, or above: DIR/onnx/model.onnx, DIR/1/model.onnx, DIR/1/model.onnx/model.onnx
        above = (parent for parent in list(onnx.parents)[:3] if (parent / golden.GOLDEN_FILE).is_file())
        folder = next(above, onnx.parent)
        deployed = (folder / RESULTS_FILE).is_file() and (folder / golden.GOLDEN_FILE).is_file()
        beside = folder if deployed else folder.parent
        record = read_results(beside) if (beside / RESULTS_FILE).is_file() else None
        wanted = (target for target in record.targets if deployed or target.name == folder.name) if record else iter(())
        return cls(onnx, folder, record, next(wanted, None), deployed)


def _files(place: _Place, known: golden.Golden) -> Finding:
    """The model's files; of a deployed folder also those beside it."""
    found = golden.digests(place.onnx.parent)
    changed = sorted(name for name in known.sha256.keys() | found.keys() if known.sha256.get(name) != found.get(name))
    for file in place.target.files if place.deployed and place.target else ():
        here = place.folder / file.path
        if Path(file.path).name not in known.sha256 and (not here.is_file() or file_sha256(here) != file.sha256):
            changed.append(file.path)
    older = place.target.older if place.deployed and place.target else None
    if changed:
        text = f"{', '.join(changed)}: not what was measured (sha256 differs)"
    elif older and older.changed:
        text = f"the files that were made for {older.runtime} out of the measured ones ({', '.join(older.changed)})"
    else:
        text = "the files that were measured"
    return Finding("files", not changed, text, 1)


def _outputs(known: golden.Golden, now: golden.Golden) -> Finding:
    off, turned = golden.distance(known, now)
    limit = golden.tolerance(known, now)
    text = f"largest difference of a {'component' if known.vectors else 'logit'} {off:.3g} (allowed {limit:.3g})"
    if not known.vectors:
        text += f", {turned} of {len(known.sentences)} answers turned"
    if not now.cpu:
        text += "; not known what computes there"
    elif (known.cpu, known.runtime) != (now.cpu, now.runtime):
        text += f"; golden ones are of {known.cpu}, onnxruntime {known.runtime}"
    return Finding("outputs", off <= limit, text, 1)


def _invariance(now: golden.Golden) -> Finding:
    largest, what = max(abs(x) for row in now.logits for x in row), "component" if now.vectors else "logit"
    return Finding(
        "invariance",
        None,
        f"a full batch moves {what}s by up to {now.batch_spread:.3g}, padding by up to {now.padding_spread:.3g} (largest {what} {largest:.3g})",
        0,
    )


def _latency(
    place: _Place, record: Results, target: Target, progress: Progress, backends: Backends, reader: Callable[[], Reading | None]
) -> Finding:
    latency, versus = target.latency, target.vs_baseline
    if latency is None:
        return Finding("latency", None, "was not measured", 0)
    base = place.folder.parent / versus.baseline if versus and not place.deployed else None
    models = {target.name: place.onnx}
    if base is not None and (base / MODEL_FILE).is_file():
        models[base.name] = base / MODEL_FILE
    shape = Shape(batch=latency.batch, sequence=latency.sequence, threads=latency.threads)
    candidates = [Candidate(name, onnx, target.backend) for name, onnx in models.items()]
    elsewhere = _measured_elsewhere(record)
    found = measure_latency(
        candidates,
        base.name if len(models) > 1 and base else None,
        FixedWork(shape),
        MeasureSettings(min_seconds=0.2, processes=2) if elsewhere else MeasureSettings(min_seconds=1.0),
        progress,
        opener=backends.open,
        reader=reader,
    )
    now = found[target.name]
    text = f"p50 {now.latency.p50_ms:.2f} ms at {shape} (recorded {latency.p50_ms:.2f} ms)"
    if elsewhere:
        return Finding("latency", None, f"{text}; {elsewhere}", 0)
    if not all(result.latency.valid for result in found.values()):
        return Finding("latency", None, f"{text}; not judged: others used the CPU, or the times drifted", 0)
    if now.speedup is None or now.speedup_ci95 is None or versus is None or versus.speedup_ci95 is None:
        return Finding("latency", None, f"{text}; not judged: there is no baseline beside it to compare with", 0)
    passed = now.speedup_ci95[1] >= _SLOWER * versus.speedup_ci95[0]
    ratio = f"{now.speedup:.2f}× (95 %: {now.speedup_ci95[0]:.2f}–{now.speedup_ci95[1]:.2f}) as fast as {versus.baseline}, recorded {versus.speedup:.2f}×"
    return Finding("latency", passed, f"{text}; {ratio}", 3)


def _of(record: Results) -> str:
    return f"not judged: the record is of {record.environment.cpu} ({record.environment.instruction_set})"


def _measured_elsewhere(record: Results) -> str:
    """Why a time that is taken here says nothing of the record's; empty where it does."""
    here, there = environment.processors(), record.environment
    return "" if (there.cpu, there.instruction_set) == (here["cpu"], here["instruction_set"]) else _of(record)


def _served_latency(server: Remote, folder: Path, record: Results, target: Target, known: golden.Golden) -> Finding:
    """One caller's time from request to answer at the shape of the record, whose own time is of the session alone."""
    import numpy as np

    latency = target.latency
    if latency is None:
        return Finding("latency", None, "was not measured", 0)
    ids = golden.running_text(folder, known, latency.sequence)
    feed = {"input_ids": np.tile(ids, (latency.batch, 1))}
    feed |= {"attention_mask": np.ones_like(feed["input_ids"]), "token_type_ids": np.zeros_like(feed["input_ids"])}
    times = []
    for _ in range(_SERVED_CALLS):
        begin = time.perf_counter()
        server.run(feed)
        times.append(1000 * (time.perf_counter() - begin))
    p50 = nearest_rank(np.array(times[_SERVED_CALLS // 10 :]), 50)
    shape = Shape(batch=latency.batch, sequence=latency.sequence, threads=latency.threads)
    text = f"p50 {p50:.2f} ms at {shape} from request to answer, recorded {latency.p50_ms:.2f} ms in the session alone"
    elsewhere = _measured_elsewhere(record)
    if server.host not in _LOOPBACK or elsewhere:
        return Finding("latency", None, f"{text}; {elsewhere or _of(record)}", 0)
    times_over, more_ms = _SERVED_LIMIT
    limit = times_over * latency.p50_ms + more_ms
    return Finding("latency", p50 <= limit, f"{text} (allowed {limit:.2f}: {times_over}× and {more_ms} ms for the way)", 3)


def _metrics(
    place: _Place,
    record: Results,
    target: Target,
    data_dir: Path | None,
    progress: Progress,
    opener: Callable[[str, Path, int], Answers],
) -> Iterator[Finding]:
    task = record.task
    if task.name not in NAMES:
        yield Finding("metric", None, f"not compared: the rows of {task.name!r} are the user's own files", 0)
        return
    if data_dir is None and not task.generated:
        yield Finding("metric", None, "not compared: name the folder of GLUE files with --data-dir", 0)
        return
    settings = TaskSettings(name=task.name, max_length=task.max_length, compare=task.compare, pooling=task.pooling or "mean")
    opened = open_task(settings, data_dir=data_dir, seed=record.seed)
    if opened.info.labels:
        opened = opened.with_label_order(
            [name for _, name in sorted(read_config(place.folder)["id2label"].items(), key=lambda item: int(item[0]))]
        )
    threads = target.latency.threads if target.latency else 1
    recorded_digests = {split.name: split.sha256 for split in task.splits}
    for split in opened.dev():
        recorded = target.metrics[split.name][task.primary]
        if recorded_digests.get(split.name) != split.sha256:
            raise UsageError(
                f"{split.source}: not the rows of the record (sha256 differs)",
                remedy="name the folder of files that the record was made with",
            )
        rows = as_read(opened.info, split)
        outputs = predict(
            place.folder, target.backend, rows, task.max_length, task.batch, threads, progress, opener=opener, onnx=place.onnx
        )
        value = evaluate(opened.info, said(opened.info, outputs), [row.label for row in split.rows])[task.primary].value
        passed = value >= recorded.ci95[0]
        yield Finding(
            "metric",
            passed,
            f"{task.primary} {value:.4f} on {split.name}, recorded {recorded.value:.4f} (95 %: from {recorded.ci95[0]:.4f})",
            3,
        )
