"""optimize-graph: writes the same model in the form that runs fastest, found by measuring where ``tune`` is set."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.measure.latency import Candidate, LatencyResult, measure_latency
from onnxsqueeze.measure.metric import predict
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.work import FixedWork
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.stages import calibration

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FormName = Literal[
    "constant-shapes", "compact-mask", "folded-scale", "first-token", "attention-operator", "sequence-first", "unfused-residual"
]
_EVERY: tuple[FormName, ...] = (
    "constant-shapes",
    "compact-mask",
    "folded-scale",
    "first-token",
    "attention-operator",
    "sequence-first",
    "unfused-residual",
)

_AT_ONCE = 3  # graphs measured beside the one with all forms: each is a session with its own copy of the weights
_ROUNDS = 4  # of leaving forms out; the first finds what there is, the others what that has uncovered


class OptimizeGraph(Stage):
    """Rewrite the graph into forms that compute the same with less work, before or after quantization.

    Each form is proven: those that only move data give the same bits as the parent (sessions without optimization, three shapes), float
    graphs stay within float32 noise, and a quantized graph must hold the metric on the selection split. With ``tune`` a form goes
    where the graph without it, measured beside the one with it on this machine, is faster (`onnxsqueeze.measure.latency`). Forms: `onnxsqueeze.forms`.
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
        description="Forms to apply, or with `tune` to choose from; default: all",
    )
    tune: bool = Field(default=False, description="Leave out the forms that are slower on this CPU, at the shape that the recipe measures")
    tune_seconds: float = Field(1.0, ge=0, le=60, description="Least measured time per graph and round of the tuning")
    max_drop_pp: float = Field(
        0.5, ge=0, description="Most points that a quantized graph may lose on the selection split; else the forms that round otherwise go"
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

    def refuses(self, backend: str) -> str | None:
        """Tuning measures on the CPU provider."""
        return "tune measures on the CPU; name the forms instead" if self.tune and backend != "cpu" else None

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, the contract's arguments
        """Write ``out/model.onnx``; counts the places in the graph that were rewritten."""
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            workshop = _Workshop(parent, Path(scratch), context)
            self._prove_same_bits(workshop)
            chosen, trials = self._tuned(workshop) if self.tune else (self.wanted(), [])
            chosen, proof = self._held(workshop, chosen)
            changed = workshop.apply(chosen, out)
        idle = [name for name in chosen if name not in changed]
        if idle and self.forms is not None and not self.tune:
            raise StageError(
                f"{self.name}: forms: {', '.join(idle)} found nothing to change in this graph",
                remedy="leave out what finds nothing, or put this stage elsewhere; sequence-first finds nothing behind attention-operator",
            )
        copy_side_files(parent.path, out)
        left_out = [name for name in self.wanted() if name not in chosen]
        details = {"forms": changed, "left_out": left_out, "found_nothing": idle, **proof}
        return Changed(sum(changed.values()), "places", details | ({"trials": trials} if trials else {}))

    def wanted(self) -> tuple[FormName, ...]:
        """The forms to apply or to choose from, in the order in which they are applied.

        attention-operator and sequence-first exclude each other: the second finds nothing to do behind the first, which was the faster on all CPUs seen.
        """
        return tuple(name for name in _EVERY if self.forms is None or name in self.forms)

    # ── proof ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prove_same_bits(self, workshop: _Workshop) -> None:
        """Raise StageError where forms that only move data change a bit."""
        names = tuple(name for name in self.wanted() if workshop.effect(name) == "same bits")
        if not names:
            return
        import numpy as np

        before, after = workshop.plain_logits(()), workshop.plain_logits(names)
        if not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
            off = calibration.furthest(before, after)
            raise StageError(
                f"{self.name}: {', '.join(names)} only move data, but the logits moved by {off:.3g}",
                remedy="leave forms out one by one to find the culprit, and report it with the recipe",
            )

    def _held(self, workshop: _Workshop, chosen: tuple[FormName, ...]) -> tuple[tuple[FormName, ...], dict[str, Any]]:
        """``chosen`` as far as it is proven, and the proof. Raises StageError where float forms leave the noise."""
        if not workshop.quantized:
            return chosen, self._within_noise(workshop, chosen)
        before, after = workshop.score(()), workshop.score(chosen)
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

    def _within_noise(self, workshop: _Workshop, chosen: tuple[FormName, ...]) -> dict[str, Any]:
        exact = workshop.plain_logits(())
        off, tolerance = calibration.furthest(exact, workshop.logits(chosen)), calibration.noise_tolerance(exact, workshop.logits(()))
        if not off <= tolerance:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: the logits moved by {off:.3g}, more than float32 noise explains ({tolerance:.3g})",
                remedy="leave forms out one by one to find the culprit, and report it with the recipe",
            )
        return {"max_abs_diff": off, "tolerance": tolerance}

    # ── tuning ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tuned(self, workshop: _Workshop) -> tuple[tuple[FormName, ...], list[dict[str, Any]]]:
        """The forms without those whose absence was faster, and every trial.

        Each round measures the graph without each form that is left against the one with all of them, a few at a time and interleaved; the
        first round the parent too. A form that found nothing to do beside the others is not tried, but stays: it may, when another goes.
        """
        left, trials = self.wanted(), []
        for round_ in range(1, _ROUNDS + 1):
            sets: dict[str, tuple[FormName, ...]] = {} if round_ > 1 else {"parent": ()}
            without = {name: tuple(n for n in left if n != name) for name in left}
            sets |= {name: names for name, names in without.items() if not workshop.same(names, left)}
            found: dict[str, LatencyResult] = {}
            for start in range(0, len(sets), _AT_ONCE):
                group = list(sets)[start : start + _AT_ONCE]
                results = workshop.race({"all": left} | {name: sets[name] for name in group}, self.tune_seconds)
                found |= {name: result for name, result in results.items() if name not in found}
            faster = [name for name in left if name in found and found[name].verdict == "faster"]
            trials += [_trial(round_, (sets | {"all": left})[name], result) for name, result in found.items()]
            if not faster:
                break
            best = max(faster, key=lambda name: found[name].speedup or 0.0)
            left = tuple(name for name in left if name != best)
        return left, trials


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
    """Graphs of one parent in a scratch folder, each made once, and what they give."""

    parent: Artifact
    scratch: Path
    context: Context

    @property
    def quantized(self) -> bool:
        return bool(weights.integers(self.parent.onnx))

    def effect(self, name: FormName) -> str:
        """What a form may do to this parent's outputs."""
        from onnxsqueeze.forms import FORMS

        form = next(form for form in FORMS if form.name == name)
        return form.quantized if self.quantized else form.effect

    def apply(self, names: Sequence[FormName], folder: Path) -> dict[str, int]:
        """Write the parent in these forms into ``folder``; places changed per form that found any."""
        from onnxsqueeze import forms

        model = forms.read(graph.load(self.parent.onnx))
        changed = {form.name: form.apply(model) for form in forms.FORMS if form.name in names}
        graph.save(forms.write(model), folder)
        return {name: count for name, count in changed.items() if count}

    def folder(self, names: Sequence[FormName]) -> Path:
        """The folder with the parent in these forms; the parent's own for none."""
        if not names:
            return self.parent.path
        made = self.scratch / "+".join(names)
        if not made.is_dir():
            made.mkdir()
            copy_side_files(self.parent.path, made)
            self.apply(names, made)
        return made

    def same(self, names: Sequence[FormName], others: Sequence[FormName]) -> bool:
        """Whether two sets of forms give the same file."""
        return (self.folder(names) / MODEL_FILE).read_bytes() == (self.folder(others) / MODEL_FILE).read_bytes()

    def logits(self, names: Sequence[FormName]) -> list[NDArray[np.float32]]:
        """Logits of real rows at three shapes, in a stock session."""
        return calibration.logits(self.folder(names) / MODEL_FILE, calibration.shapes(self.parent.path, self.context), self.context.threads)

    def plain_logits(self, names: Sequence[FormName]) -> list[NDArray[np.float32]]:
        """The same in a session that fuses nothing."""
        batches = calibration.shapes(self.parent.path, self.context)
        return calibration.logits(self.folder(names) / MODEL_FILE, batches, self.context.threads, optimized=False)

    def score(self, names: Sequence[FormName]) -> float:
        """The primary metric on the selection rows, at the batch at which the model will be served."""
        context = self.context
        rows = predict(
            self.folder(names),
            "cpu",
            context.selection,
            context.task.max_length,
            context.call.batch,
            context.call.threads,
            context.progress,
        )
        return context.select(rows)

    def race(self, sets: Mapping[str, Sequence[FormName]], seconds: float) -> dict[str, LatencyResult]:
        """Measure the graphs interleaved, at the call that the recipe measures; ratios are to the first."""
        candidates = [Candidate(name, self.folder(names) / MODEL_FILE, "cpu") for name, names in sets.items()]
        call = self.context.call
        shape = Shape(batch=call.batch, sequence=call.tokens, threads=call.threads)
        settings = MeasureSettings(min_runs=60, min_seconds=seconds)
        return measure_latency(candidates, next(iter(sets)), FixedWork(shape), settings, self.context.progress)
