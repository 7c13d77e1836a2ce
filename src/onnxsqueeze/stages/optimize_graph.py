"""optimize-graph: writes the same model in the form that runs fastest, found by measuring where ``tune`` is set."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field

from onnxsqueeze import backends, graph, weights
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.measure.latency import Candidate, LatencyResult, measure_latency
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.work import FixedWork
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration, ranges, scoring

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from onnxsqueeze.forms import Range

FormName = Literal[
    "constant-shapes",
    "compact-mask",
    "folded-scale",
    "first-token",
    "attention-operator",
    "sequence-first",
    "unfused-residual",
    "static-ranges",
]
_EVERY: tuple[FormName, ...] = get_args(FormName)
_ASKED_FOR: tuple[FormName, ...] = ("static-ranges",)  # quantizes otherwise: applied where it is named, or measured faster
_STATIC: FormName = "static-ranges"
_INT32 = "int32-inputs"  # a form, but a setting of its own: which inputs a file has is for those who call it
_WRITES = {_STATIC: ("com.microsoft.MatMulIntegerToFloat",)}

_AT_ONCE = 3  # graphs measured beside the one with all forms: each is a session with its own copy of the weights
_ROUNDS = 4  # of leaving forms out; the first finds what there is, the others what that has uncovered


class OptimizeGraph(Stage):
    """Rewrite the graph into forms that compute the same with less work, before or after quantization.

    Each form is proven: those that only move data give the same bits as the parent (sessions without optimization, three shapes), float
    graphs stay within float32 noise, and a quantized graph must hold the metric on the selection split. With ``tune`` a form goes
    where the graph without it, measured beside the one with it on this machine, is faster (`onnxsqueeze.measure.latency`). Forms: `onnxsqueeze.forms`.

    static-ranges quantizes otherwise, so it is applied only where ``forms`` names it, or with ``tune`` where the graph without it is
    slower. It starts with every activation; while the selection score falls by more than ``max_drop_pp``, those whose fixed range loses
    most stay dynamic, half of what is left at a time.
    """

    takes: ClassVar[tuple[State, ...]] = ("onnx", "onnx-int")
    gives: ClassVar[State] = "onnx"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnx-ir")
    uses_data: ClassVar[bool] = True

    version: ClassVar[int] = 3  # 2: Attention as one node, residuals subtracted; 3: tuning asks for more than equal files differ by

    kind: Literal["optimize-graph"] = "optimize-graph"
    forms: tuple[FormName, ...] | None = Field(
        None,
        min_length=1,
        description="Forms to apply, or with `tune` to choose from; default: all, static-ranges only with `tune`",
    )
    inputs: Literal["int64", "int32"] = Field("int64", description="Type of the file's inputs; int64: as they were exported")
    tune: bool = Field(default=False, description="Leave out the forms that are slower on this CPU, at the shape that the recipe measures")
    tune_seconds: float = Field(1.0, ge=0, le=60, description="Least measured time per graph and round of the tuning")
    max_drop_pp: float = Field(
        0.5,
        ge=0,
        description="Most points that a quantized graph may lose on the selection split; else activations stay dynamic, and the forms that round otherwise go",
    )

    def given(self, state: State) -> State:
        """A float graph stays one, and so does one with integers."""
        return state

    def machine_bound(self) -> bool:
        """True where it was tuned here."""
        return self.tune

    def timed(self) -> bool:
        """True where it was tuned: the shape joins the key."""
        return self.tune

    def integer_inputs(self) -> str | None:
        """The type that the recipe asks for."""
        return self.inputs if self.inputs != "int64" else None

    def refuses(self, backend: str) -> str | None:
        """Tuning measures on the CPU provider; static-ranges writes operators that not every backend has kernels for."""
        if self.tune and backend != "cpu":
            return "tune measures on the CPU; name the forms instead"
        return backends.get(backend).refusal(operator for name in self.wanted() for operator in _WRITES.get(name, ()))

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; counts the places in the graph that were rewritten."""
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            workshop = _Workshop(parent, Path(scratch), context, self.inputs == "int32")
            self._prove_same_bits(workshop)
            apart = [name for name in self.wanted() if workshop.effect(name) == "other quantization"]
            chosen = tuple(name for name in self.wanted() if name not in apart)
            trials: list[dict[str, Any]] = []
            if self.tune:
                chosen = self._tuned(workshop, chosen, trials)
            chosen, proof = self._held(workshop, chosen)
            fixed: dict[str, Range] = {}
            if apart:
                chosen, fixed, proof = self._fixed(workshop, chosen, proof, trials)
            changed = workshop.apply(chosen, out, fixed)
        idle = [name for name in chosen if name not in changed]
        if idle and self.forms is not None and not self.tune:
            raise StageError(
                f"{self.name}: forms: {', '.join(idle)} found nothing to change in this graph",
                remedy="leave out what finds nothing, or put this stage elsewhere; sequence-first finds nothing behind attention-operator, static-ranges before quantization",
            )
        copy_side_files(parent.path, out)
        left_out = [name for name in self.wanted() if name not in chosen]
        details = {"forms": changed, "left_out": left_out, "found_nothing": idle, **proof}
        if apart:
            dynamic = ranges.quantized_at_run_time(out / MODEL_FILE)
            details["activations"] = {"static": changed.get(_STATIC, 0), "dynamic": len(dynamic), "stayed_dynamic": list(dynamic)}
        return Changed(sum(changed.values()), "places", details | ({"trials": trials} if trials else {}))

    def wanted(self) -> tuple[FormName, ...]:
        """The forms to apply or to choose from, in the order in which they are applied.

        attention-operator and sequence-first exclude each other: the second finds nothing to do behind the first, which was the faster on all CPUs seen.
        """
        every = _EVERY if self.tune else tuple(name for name in _EVERY if name not in _ASKED_FOR)
        return every if self.forms is None else tuple(name for name in _EVERY if name in self.forms)

    # ── proof ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prove_same_bits(self, workshop: _Workshop) -> None:
        """Raise StageError where forms that only move data change a bit."""
        names = tuple(name for name in self.wanted() if workshop.effect(name) == "same bits")
        spoken = (*names, *workshop.always)
        if not spoken:
            return
        import numpy as np

        before, after = workshop.plain_logits(None), workshop.plain_logits(names)
        if not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
            off = calibration.furthest(before, after)
            raise StageError(
                f"{self.name}: {', '.join(spoken)} only move data, but the logits moved by {off:.3g}",
                remedy="leave forms out one by one to find the culprit, and report it with the recipe",
            )

    def _held(self, workshop: _Workshop, chosen: tuple[FormName, ...]) -> tuple[tuple[FormName, ...], dict[str, Any]]:
        """``chosen`` as far as it is proven, and the proof. Raises StageError where float forms leave the noise."""
        if not workshop.quantized:
            return chosen, self._within_noise(workshop, chosen)
        before, after = workshop.score(None), workshop.score(chosen)
        proof = {"selection_before": before, "selection_after": after}
        if before - after <= self.max_drop_pp / 100:
            return chosen, proof
        kept = tuple(name for name in chosen if workshop.effect(name) != "other rounding")
        again = workshop.score(kept)
        if before - again > self.max_drop_pp / 100:
            raise StageError(
                f"{self.name}: {', '.join(kept)}: the selection score falls from {before:.4f} to {again:.4f}, more than {self.max_drop_pp} points",
                remedy="name fewer forms, or raise max_drop_pp",
            )
        return kept, {**proof, "selection_after": again, "refused": {"forms": [n for n in chosen if n not in kept], "selection": after}}

    def _fixed(
        self, workshop: _Workshop, chosen: tuple[FormName, ...], proof: dict[str, Any], trials: list[dict[str, Any]]
    ) -> tuple[tuple[FormName, ...], dict[str, Range], dict[str, Any]]:
        """(forms with static-ranges where it holds, the ranges that are fixed, the proof): as many activations as the metric, and with ``tune`` the clock, allow."""
        left = workshop.activations(chosen)
        if not left:
            return (*chosen, _STATIC), {}, proof
        refused: list[dict[str, Any]] = []
        while left:
            fixed = {activation.name: activation.range for activation in left}
            if self.tune and not self._pays(workshop, chosen, fixed, trials):
                break
            after = workshop.score((*chosen, _STATIC), fixed)
            if proof["selection_before"] - after <= self.max_drop_pp / 100:
                return (*chosen, _STATIC), fixed, {**proof, "selection_after": after, **({"refused_static": refused} if refused else {})}
            refused.append({"static": len(left), "selection": after})
            left = left[: len(left) // 2]
        return chosen, {}, {**proof, **({"refused_static": refused} if refused else {})}

    def _within_noise(self, workshop: _Workshop, chosen: tuple[FormName, ...]) -> dict[str, Any]:
        exact = workshop.plain_logits(None)
        off, tolerance = calibration.furthest(exact, workshop.logits(chosen)), calibration.noise_tolerance(exact, workshop.logits(None))
        if not off <= tolerance:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: the logits moved by {off:.3g}, more than float32 noise explains ({tolerance:.3g})",
                remedy="leave forms out one by one to find the culprit, and report it with the recipe",
            )
        return {"max_abs_diff": off, "tolerance": tolerance}

    # ── tuning ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tuned(self, workshop: _Workshop, left: tuple[FormName, ...], trials: list[dict[str, Any]]) -> tuple[FormName, ...]:
        """``left`` without those whose absence was faster; every trial is added to ``trials``.

        Each round measures the graph without each form that is left against the one with all of them, a few at a time and interleaved; the
        first round the parent too. A form that found nothing to do beside the others is not tried, but stays: it may, when another goes.
        """
        for round_ in range(1, _ROUNDS + 1) if left else ():
            sets: dict[str, tuple[FormName, ...] | None] = {} if round_ > 1 else {"parent": None}
            without = {name: tuple(n for n in left if n != name) for name in left}
            sets |= {name: names for name, names in without.items() if not workshop.same(names, left)}
            found: dict[str, LatencyResult] = {}
            for start in range(0, len(sets), _AT_ONCE):
                group = list(sets)[start : start + _AT_ONCE]
                folders = {"all": workshop.folder(left)} | {name: workshop.folder(sets[name]) for name in group}
                results = workshop.race(folders, self.tune_seconds)
                found |= {name: result for name, result in results.items() if name not in found}
            faster = [name for name in left if name in found and found[name].verdict == "faster"]
            trials += [_trial(round_, (sets | {"all": left})[name] or (), result) for name, result in found.items()]
            if not faster:
                break
            best = max(faster, key=lambda name: found[name].speedup or 0.0)
            left = tuple(name for name in left if name != best)
        return left

    def _pays(self, workshop: _Workshop, without: tuple[FormName, ...], fixed: Mapping[str, Range], trials: list[dict[str, Any]]) -> bool:
        """Whether the graph without fixed ranges is slower: what quantizes otherwise must be worth it. The trial is added to ``trials``."""
        both = (*without, _STATIC)
        results = workshop.race({"all": workshop.folder(both, fixed), "without": workshop.folder(without)}, self.tune_seconds)
        round_ = trials[-1]["round"] + 1 if trials else 1
        trials += [_trial(round_, names, results[name]) for name, names in (("all", both), ("without", without))]
        return results["without"].verdict == "slower"


def _trial(round_: int, forms: Sequence[FormName], result: LatencyResult) -> dict[str, Any]:
    """One measured graph; the ratio is to the graph with all forms of its round, measured in turns with it."""
    return {
        "round": round_,
        "forms": list(forms),
        "p50_ms": result.latency.p50_ms,
        "speedup": result.speedup,
        "speedup_ci95": result.speedup_ci95,
        "verdict": result.verdict,
    }


@dataclass(frozen=True)
class _Workshop:
    """Graphs of one parent in a scratch folder, each made once, and what they give. No names at all (None) stand for the parent as it is."""

    parent: Artifact
    scratch: Path
    context: Context
    int32: bool

    @property
    def quantized(self) -> bool:
        return bool(weights.integers(self.parent.onnx))

    @property
    def always(self) -> tuple[str, ...]:
        """Forms that every graph gets."""
        return (_INT32,) if self.int32 else ()

    def effect(self, name: FormName) -> str:
        """What a form may do to this parent's outputs."""
        from onnxsqueeze.forms import FORMS

        form = next(form for form in FORMS if form.name == name)
        return form.quantized if self.quantized else form.effect

    @cached_property
    def _shaped(self) -> onnx.ModelProto:
        from onnxsqueeze import forms

        return forms.with_shapes(graph.load(self.parent.onnx))

    def apply(self, names: Sequence[FormName], folder: Path, fixed: Mapping[str, Range] | None = None) -> dict[str, int]:
        """Write the parent in these forms into ``folder``, with the ranges of static-ranges; places changed per form that found any."""
        from onnxsqueeze import forms

        model = forms.opened(self._shaped)
        changed = {}
        for form in forms.FORMS:
            if form.name in (*names, *self.always):
                forms.note_ranges(model, fixed or {})  # anew each time: forms make values and rename none
                changed[form.name] = form.apply(model)
        graph.save(forms.write(model), folder)
        return {name: count for name, count in changed.items() if count}

    def folder(self, names: Sequence[FormName] | None, fixed: Mapping[str, Range] | None = None) -> Path:
        """The folder with the parent in these forms."""
        if names is None:
            return self.parent.path
        made = self.scratch / "+".join(["forms", *names, *([f"{len(fixed)}"] if fixed else [])])
        if not made.is_dir():
            made.mkdir()
            copy_side_files(self.parent.path, made)
            self.apply(names, made, fixed)
        return made

    def same(self, names: Sequence[FormName], others: Sequence[FormName]) -> bool:
        """Whether two sets of forms give the same file."""
        return (self.folder(names) / MODEL_FILE).read_bytes() == (self.folder(others) / MODEL_FILE).read_bytes()

    def activations(self, names: Sequence[FormName]) -> tuple[ranges.Activation, ...]:
        """What the graph in these forms quantizes at run time and static-ranges can fix, that which loses least first."""
        scratch = self.scratch / "probe"
        scratch.mkdir()
        copy_side_files(self.parent.path, scratch)
        found = ranges.measured(self.folder(names) / MODEL_FILE, scratch, self.context)
        whole = {activation.name: activation.range for activation in found}
        left = ranges.quantized_at_run_time(self.folder((*names, _STATIC), whole) / MODEL_FILE) if whole else ()
        return tuple(activation for activation in found if activation.name not in left)

    def logits(self, names: Sequence[FormName] | None) -> list[NDArray[np.float32]]:
        """Logits of real rows at three shapes, in a stock session."""
        return calibration.logits(self.folder(names) / MODEL_FILE, calibration.shapes(self.parent.path, self.context), self.context.threads)

    def plain_logits(self, names: Sequence[FormName] | None) -> list[NDArray[np.float32]]:
        """The same in a session that fuses nothing."""
        batches = calibration.shapes(self.parent.path, self.context)
        return calibration.logits(self.folder(names) / MODEL_FILE, batches, self.context.threads, optimized=False)

    def score(self, names: Sequence[FormName] | None, fixed: Mapping[str, Range] | None = None) -> float:
        """The primary metric on the selection rows."""
        return scoring.selection_score(self.folder(names, fixed), self.context)

    def race(self, folders: Mapping[str, Path], seconds: float) -> dict[str, LatencyResult]:
        """Measure the graphs interleaved, at the call that the recipe measures; ratios are to the first."""
        candidates = [Candidate(name, folder / MODEL_FILE, "cpu") for name, folder in folders.items()]
        call = self.context.call
        shape = Shape(batch=call.batch, sequence=call.tokens, threads=call.threads)
        settings = MeasureSettings(min_runs=60, min_seconds=seconds)
        return measure_latency(candidates, next(iter(folders)), FixedWork(shape), settings, self.context.progress)
