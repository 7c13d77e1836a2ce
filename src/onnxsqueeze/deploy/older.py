"""`--ort VERSION`: the file in a form that an older ONNX Runtime loads, tried in that very version.

What a version takes is asked of itself. A file with too new an IR version gets the version's own, appended to its bytes: protobuf takes the last one, so the
graph, the weights and the provenance stay as they were. Too new an operator set is lowered where every operator of the graph is the same one in the older
set; anything else is refused, with the operator. The golden answers are then replayed in that version.

Source: onnxruntime, docs/Versioning.md; ONNX, docs/Versioning.md ("IR versioning", "Operator sets"), docs/Changelog.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsqueeze import backends, graph
from onnxsqueeze.artifact import MODEL_FILE, file_sha256
from onnxsqueeze.backends import Backends
from onnxsqueeze.backends.backend import Runtime, look
from onnxsqueeze.backends.process import Worker
from onnxsqueeze.deploy.source import Source
from onnxsqueeze.errors import MeasureError, ModelError, Unavailable, UsageError, without_paths
from onnxsqueeze.measure import golden
from onnxsqueeze.results import FileRecord, Older
from onnxsqueeze.tokens import Encoder, pad

if TYPE_CHECKING:
    import onnx

_VERSION = re.compile(r"\d+\.\d+(\.\d+)?")
_NUMPY_2_FROM = (1, 19)  # older wheels are built against numpy 1 and do not import with 2
_PIP_S = 900.0
_SPREAD = 2  # times what rounding does here: once for the kernels there, once for those here
_HIGHEST_IR, _HIGHEST_OPSET, _LOWEST_OPSET = 20, 40, 13  # asked from above; nothing that this tool writes is below 13

# Operators whose versions from 13 on differ in the types they admit, in optional attributes or in an attribute that became an input, which are looked at
# node by node. Read one by one in ONNX, docs/Changelog.md; what is not here is another operator, or was not read.
_SAME_OPERATOR = frozenset(
    {"Add", "Cast", "CastLike", "Constant", "ConstantOfShape", "Cos", "CumSum", "DequantizeLinear", "Div", "Dropout", "Equal", "Flatten"}
    | {"GreaterOrEqual", "Identity", "If", "IsInf", "IsNaN", "LessOrEqual", "Loop", "Mul", "Pad", "Pow", "QuantizeLinear", "ReduceL2"}
    | {
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "Relu",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Sin",
        "Size",
        "Split",
    }
    | {"Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
)


@contextmanager
def made_for(source: Source, version: str, python: str | None = None) -> Iterator[Source]:
    """``source`` as ONNX Runtime ``version`` ("1.18", or "1.18.1") loads it, in a folder that is gone afterwards.

    ``python`` is a Python with that version; without one pip makes an environment for the moment. Raises UsageError where the version is none or
    ``python`` has another one, Unavailable where it cannot be installed, ModelError where the file cannot be lowered or does not load there, MeasureError
    where its answers there are others.
    """
    if not _VERSION.fullmatch(version):
        raise UsageError(f"--ort {version}: is no version of ONNX Runtime", remedy="name it as 1.18 or 1.18.1")
    with tempfile.TemporaryDirectory(prefix="onnxsqueeze-ort-") as scratch:
        used = python or _installed(version, backends.get(source.golden.backend).wheel or "onnxruntime", Path(scratch) / "venv")
        runtime = _runtime(used, version)
        folder = Path(scratch) / source.target.name
        folder.mkdir()
        for name in (*source.model, *source.beside):
            shutil.copyfile(source.folder / name, folder / name)
        lowered = _lowered(folder / MODEL_FILE, source.target.name, runtime, *limits(used))
        known = source.golden.model_copy(update={"sha256": golden.digests(folder)})
        (folder / golden.GOLDEN_FILE).write_text(known.to_json(), encoding="utf-8")
        off, limit, turned = _replayed(folder, source.target.name, known, Backends({backends.get(known.backend).name: used}))
        measured = tuple(
            FileRecord(path=name, sha256=file_sha256(source.folder / name), bytes=(source.folder / name).stat().st_size)
            for name in source.model
        )
        older = Older(runtime=runtime.name, changed=lowered, measured=measured, max_abs_diff=off, tolerance=limit, turned=turned)
        yield replace(source, folder=folder, golden=known, target=source.target.model_copy(update={"older": older}))


def limits(python: str) -> tuple[int, int]:
    """(highest IR version, highest set of ONNX's operators) that the ONNX Runtime of a Python loads: asked of itself, with a model of one Identity."""
    with closing(Worker(python, "a session")) as worker:

        def loads(ir: int, opset: int) -> bool:
            import numpy as np

            tiny = {"model": np.frombuffer(_identity(ir, opset), np.uint8)}
            return "error" not in worker.ask("open", tiny, provider="CPUExecutionProvider", threads=1, options={})[0]

        # an older IR version is always taken, and so is an older set, so the first that loads is the highest
        opset = next((n for n in range(_HIGHEST_OPSET, _LOWEST_OPSET - 1, -1) if loads(7, n)), _LOWEST_OPSET)
        ir = next((n for n in range(_HIGHEST_IR, 6, -1) if loads(n, _LOWEST_OPSET)), 7)
    return ir, opset


def lower_opset(model: onnx.ModelProto, opset: int, where: str) -> None:
    """Give ``model`` the set ``opset`` of ONNX's operators. Raises ModelError, beginning with ``where``, where one of its operators is another one there."""
    from onnx import defs

    entry = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if entry.version > defs.onnx_opset_version():
        raise ModelError(
            f"{where}: has opset {entry.version}; the onnx here knows {defs.onnx_opset_version()} at most, so what differs is not known"
        )
    for part in (*graph.graphs(model.graph), *model.functions):
        for node in part.node:
            if node.domain in ("", "ai.onnx"):
                reason = _differs(node, entry.version, opset)
                if reason:
                    raise ModelError(f"{where}: {node.op_type}{f' ({node.name})' if node.name else ''} {reason}", remedy=_otherwise(node))
    entry.version = opset


def _differs(node: onnx.NodeProto, version: int, opset: int) -> str | None:
    """Why the operator of ``node`` in ``version`` is not the one of the older ``opset``, or None."""
    from onnx import defs

    now = defs.get_schema(node.op_type, version, "")
    if not defs.has(node.op_type, opset, ""):
        return f"is an operator of opset {now.since_version}"
    then = defs.get_schema(node.op_type, opset, "")
    if then.since_version == now.since_version:
        return None
    if node.op_type not in _SAME_OPERATOR:
        return f"of opset {now.since_version} is not known to be the one of opset {then.since_version}"
    unknown = sorted({attribute.name for attribute in node.attribute} - set(then.attributes))
    if unknown:
        return f"has {', '.join(unknown)}, which the one of opset {then.since_version} has not"
    if len(node.input) > then.max_input:
        return f"has {len(node.input)} inputs, the one of opset {then.since_version} {then.max_input}"
    return None


def _otherwise(node: onnx.NodeProto) -> str:
    if node.op_type == "Attention":
        return "make the target with `optimize-graph` and `forms:` without attention-operator"
    return "export with an older `opset:`, or leave out the stage that wrote this operator"


def _lowered(file: Path, target: str, runtime: Runtime, ir: int, opset: int) -> tuple[str, ...]:
    """Rewrite ``file`` in place for a runtime that takes ``ir`` and ``opset``; what changed, in words."""
    import onnx

    model = graph.read(file)
    where = f"{target}: {runtime.name} takes opset {opset} at most"
    before = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    changed = []
    if before > opset:
        lower_opset(model, opset, where)
        changed.append(f"opset {before} → {opset}")
    if model.ir_version > ir:
        changed.append(f"IR version {model.ir_version} → {ir}")
    if before > opset:
        model.ir_version = min(ir, model.ir_version)
        file.write_bytes(model.SerializeToString())
    elif model.ir_version > ir:
        with file.open("ab") as handle:
            handle.write(onnx.ModelProto(ir_version=ir).SerializeToString())
    return tuple(changed)


def _replayed(folder: Path, target: str, known: golden.Golden, there: Backends) -> tuple[float, float, int]:
    """(how far the answers in that version lie from the golden ones, how far they may, how many turned)."""
    try:
        now = golden.answers(folder, known.backend, known.threads, known.max_length, known.sentences, there, vectors=known.vectors)
    except MeasureError as error:  # it says which operator, in the words of that version
        runtime = there.get(known.backend).runtime
        raise ModelError(
            f"{target}: does not run in {runtime.name if runtime else 'that ONNX Runtime'}: {error.message}",
            remedy="leave out the stage that wrote what it lacks, or name a newer version",
        ) from error
    off, turned = golden.distance(known, now)
    limit = max(golden.shared_tolerance(known), _SPREAD * _rounding(folder, known))
    if not off <= limit:
        raise MeasureError(
            f"{target}: in onnxruntime {now.runtime} its answers are {off:.3g} from the golden ones (allowed {limit:.3g}), {turned} of {len(known.sentences)} turned",
            remedy="do not serve it there: name a newer version, or quantize otherwise",
        )
    return off, limit, turned


def _rounding(folder: Path, known: golden.Golden) -> float:
    """How far the answers here move without graph optimizations: other kernels round otherwise on the way, as those of another version do. 0 but for the CPU.

    An integer graph with fixed ranges gives the same bits in every batch, so its spread says nothing of that.
    """
    import numpy as np
    import onnxruntime as ort

    if backends.get(known.backend).name != "cpu":
        return 0.0
    encoder = Encoder(folder, known.max_length)
    rows = encoder.encode([first for first, _ in known.sentences], [second for _, second in known.sentences])
    found = []
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level, options.graph_optimization_level = known.threads, 3, level
        session = ort.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
        kinds = {given.name: np.int32 if given.type == "tensor(int32)" else np.int64 for given in session.get_inputs()}
        names = [given.name for given in session.get_outputs()]
        output = "logits" if "logits" in names else names[0]
        feeds = [{name: values.astype(kinds[name]) for name, values in pad([row], encoder.pad_id).items() if name in kinds} for row in rows]
        found.append(np.concatenate([session.run([output], feed)[0] for feed in feeds]))
    return float(np.abs(found[0] - found[1]).max())


def _runtime(python: str, version: str) -> Runtime:
    found = look(python)
    if isinstance(found, str):
        raise UsageError(f"--ort-python: that Python {found}", remedy=f"pip install onnxruntime=={version} in it, or leave the option out")
    if found.version != version and not found.version.startswith(f"{version}."):
        raise UsageError(
            f"--ort {version}: that Python has {found.name}",
            remedy="name a Python with that version, or leave --ort-python out: pip makes one",
        )
    return found


def _installed(version: str, wheel: str, folder: Path) -> str:
    """The Python of a new environment with this version, by pip; Raises Unavailable with pip's last words."""
    wanted = f"{wheel}=={version}" if version.count(".") == 2 else f"{wheel}=={version}.*"
    numpy = "numpy<2" if tuple(int(part) for part in version.split(".")[:2]) < _NUMPY_2_FROM else "numpy"
    python = folder / "bin" / "python"
    for words in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted, numpy],
    ):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_PIP_S, check=False)  # noqa: S603  # this Python, and the one it makes
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"--ort {version}: pip took more than {_PIP_S:.0f} s", remedy="name a Python that has it: --ort-python PATH"
            ) from error
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or [""]
            raise Unavailable(
                f"--ort {version}: {wanted} cannot be installed for Python {sys.version_info[0]}.{sys.version_info[1]}: {without_paths(said[-1])}",
                remedy="name a Python that has it: --ort-python PATH",
            )
    return str(python)


def _identity(ir: int, opset: int) -> bytes:
    from onnx import TensorProto, helper

    side = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    tiny = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "tiny", side[:1], side[1:])
    return bytes(helper.make_model(tiny, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir).SerializeToString())
