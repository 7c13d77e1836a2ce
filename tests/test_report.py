"""Reports: drawn from records alone, saying what they must, the same each time."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from onnxsqueeze.errors import StoreError
from onnxsqueeze.report.details import ONE_PROCESS, run_grids
from onnxsqueeze.report.html import html
from onnxsqueeze.report.markdown import markdown
from onnxsqueeze.report.summary import Row, tables, useless_zeros
from onnxsqueeze.report.terminal import print_summary
from onnxsqueeze.report.write import write_reports
from onnxsqueeze.results import Gate, Results, StageRecord, Target, VsParent, WeightClass
from records import cpu_targets, drop, latency, measured, qdp_results, stage, versus, weights

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str, text: str) -> None:
    """Compare with a kept file; ``UPDATE_GOLDEN=1 pytest`` writes it anew."""
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{name}: differs; look at it, then UPDATE_GOLDEN=1"


def printed(results: Results, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        print_summary([results], Console(file=file, width=width, highlight=False))
        file.flush()
        return "\n".join(line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()) + "\n"


def row_of(results: Results, name: str) -> Row:
    return next(row for table in tables(results) for row in table.rows if row.name == name)


def only(target: Target, **changes: object) -> Results:
    return qdp_results(targets=(target.model_copy(update=changes),))


def test_markdown_is_as_kept() -> None:
    golden("report.md", markdown([qdp_results()]))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_table_is_as_kept(width: int) -> None:
    golden(f"report-terminal-{width}.txt", printed(qdp_results(), width))


@pytest.mark.parametrize("width", range(24, 181, 12))
def test_terminal_breaks_no_number_and_no_line_at_any_width(width: int) -> None:
    lines = printed(qdp_results(), width).splitlines()
    assert max(map(len, lines)) <= width
    start = next(i for i, line in enumerate(lines) if line.startswith("target"))
    table = lines[start + 1 : lines.index("", start)]
    assert len(table) == 6, "one line a target"
    shown = {
        text
        for row in tables(qdp_results())[0].measured
        for text in (row.size, row.smaller, row.p50, row.faster, row.metric, row.delta, row.gzip, *row.p.split())
    }
    numbers = [text for line in table for text in re.sub(r"\[[^]]*\]", "", line).split()[1:] if re.search(r"\d", text)]
    assert numbers
    assert set(numbers) <= shown


def test_terminal_without_unicode_gets_ascii() -> None:
    text = printed(qdp_results(), 80, encoding="ascii")
    assert "3.94x" in text
    assert "?" not in text


def test_terminal_obeys_no_escape_sequence_of_a_record() -> None:
    target = cpu_targets()[0].model_copy(update={"name": "a\x1b[2Jb[red]"})
    assert "\x1b" not in printed(qdp_results(targets=(target,)), 80)
    assert "b[red]" in printed(qdp_results(targets=(target,)), 80)


def test_baseline_stands_first_wherever_the_recipe_has_it() -> None:
    results = qdp_results()
    assert results.targets[0].name == "int8-ort"
    assert [row.name for row in tables(results)[0].rows][:2] == ["fp32", "int8-ort"]


def test_skipped_and_failed_rows_carry_reason_and_remedy() -> None:
    results = qdp_results()
    for text in (markdown([results]), " ".join(printed(results, 80).split())):
        assert "no CUDA provider" in text
        assert "install onnxruntime-gpu on a machine with an NVIDIA GPU" in text
        assert "minmax calibration met a NaN in layer 4" in text
        assert "or take quantize-dynamic" in text


def test_a_record_from_before_sizes_were_told_apart_is_drawn_without_them() -> None:
    record = json.loads(only(cpu_targets()[0]).to_json())
    for name in [name for name in record["targets"][0] if name.startswith(("size_dense", "size_bound", "size_parts"))]:
        del record["targets"][0][name]
    old = Results.model_validate(record)
    grids = {one.title: one for one in run_grids(old)}
    assert "What the bytes are" not in grids
    assert grids["Sizes"].rows == (("int8-ort", "23.1", "23,104,512", "19.2", *"––––", "18.5", "0.712"),)


def test_what_the_bytes_are_sums_to_the_file() -> None:
    (parts,) = (one for one in run_grids(qdp_results()) if one.title == "What the bytes are")
    sizes = {t.name: t.size_bytes for t in cpu_targets()}
    assert {row[0]: sum(int(cell.replace(",", "")) for cell in row[1:]) for row in parts.rows} == {
        name: size for name, size in sizes.items() if size is not None
    }


def test_a_slower_target_is_marked_so() -> None:
    assert "slower than its baseline fp32" in row_of(qdp_results(), "int4-ort").warnings
    assert not any("slower" in w for w in row_of(qdp_results(), "qdp-ort").warnings)


def test_sensitivities_are_a_table_and_bars_and_trials_say_what_stayed_in_float() -> None:
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")
    found = [
        {"module": "bert.encoder.layer.1.output.dense", "sensitivity": 0.02, "float_bytes": 2_359_296, "float": True},
        {"module": "classifier", "sensitivity": 0.005, "float_bytes": 3_072, "float": False},
    ]
    trials = [
        {"float": [], "selection": 0.8, "holds": False},
        {"float": ["bert.encoder.layer.1.output.dense"], "selection": 0.9, "holds": True},
    ]
    auto = StageRecord(id="auto", kind="quantize-auto", seconds=1, changed={"details": {"sensitivities": found, "trials": trials}})
    text = markdown([only(target, stages=(auto,))])
    assert f"| qdp-ort | bert.encoder.layer.1.output.dense | 0.02 | 2.36 | float32 | {'█' * 24} |" in text
    assert re.search(r"\| classifier \| 0.005 \| 0\.\d+ \| int8 \| █{6} \|", text)
    assert "| qdp-ort | 1 | nothing | 80.00 | too low |" in text
    assert "| qdp-ort | 2 | bert.encoder.layer.1.output.dense | 90.00 | holds |" in text


def test_a_target_slower_than_what_it_was_made_from_says_so() -> None:
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")
    slower = VsParent(parent="student-fp32", speedup=0.8, speedup_ci95=(0.75, 0.85), speed="slower")
    row = row_of(only(target, vs_parent=slower, gates=(Gate(name="min_speedup_vs_parent", limit=0.78, value=0.8, passed=True),)), "qdp-ort")
    assert any(w.startswith("slower than student-fp32, which it was made from: 0.800× as fast [0.750, 0.850]") for w in row.warnings)
    assert not row.gates[0].proven
    level = slower.model_copy(update={"speed": "tie"})
    assert not any("made from" in w for w in row_of(only(target, vs_parent=level), "qdp-ort").warnings)


def test_a_missed_gate_says_by_how_much_and_a_narrow_pass_is_not_called_proven() -> None:
    missed, narrow, safe = (row_of(qdp_results(), name) for name in ("int4-ort", "qdp-ort", "int8-inc"))
    assert (missed.status, missed.gates[0].verdict) == ("gate missed", "missed by 3.39")
    assert (narrow.status, narrow.gates[0].verdict) == ("ok", "passed by 1.02, not proven")
    assert safe.gates[0].verdict == "passed by 2.00"


def test_a_speed_gate_is_proven_by_the_low_end_of_its_interval() -> None:
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")  # 3.673 [3.563, 3.802]
    proven = {
        limit: row_of(only(target, gates=(Gate(name="min_speedup", limit=limit, value=3.673, passed=True),)), "qdp-ort").gates[0].proven
        for limit in (3.5, 3.6)
    }
    assert proven == {3.5: True, 3.6: False}


def test_zeros_that_save_no_bytes_are_named_and_packed_ones_are_not() -> None:
    assert any("zeros save no bytes: 61.0 %" in remark for remark in row_of(qdp_results(), "qdp-ort").remarks)
    assert not any("zeros" in remark for remark in row_of(qdp_results(), "int8-ort").remarks), "3 % are no reason to hope"
    dense = WeightClass(class_="attention", dtype="int8", n=1000, zeros=600, bytes=1000)
    assert useless_zeros([dense, dense.model_copy(update={"bytes": 525}), dense.model_copy(update={"zeros": 100})]) == (dense,)


def test_the_smallest_and_the_fastest_are_chosen_among_those_that_hold_their_gates() -> None:
    table = tables(qdp_results())[0]
    assert [(f.label, f.row.name) for f in table.findings] == [("Smallest", "qdp-inc"), ("Fastest", "qdp-ort")]
    assert table.condition == "passes every gate"
    best = max(cpu_targets(), key=lambda t: t.vs_baseline.size_ratio if t.vs_baseline else 0)
    assert best.name == "int4-ort", "smaller still, but it missed"


def test_without_gates_a_worse_target_is_no_finding() -> None:
    table = tables(qdp_results(targets=tuple(t.model_copy(update={"gates": ()}) for t in cpu_targets())))[0]
    assert "int4-ort" not in [f.row.name for f in table.findings]
    assert table.condition == "is not measurably worse than the baseline"


def test_no_finding_is_said_plainly() -> None:
    base = next(t for t in cpu_targets() if t.baseline)
    bad = next(t for t in cpu_targets() if t.name == "int4-ort")
    results = qdp_results(targets=(base, bad))
    assert "No target is smaller or faster than the baseline and passes every gate." in markdown([results])


def test_a_reused_latency_names_its_day_and_a_drifting_one_is_not_trusted() -> None:
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")
    assert "its latency was measured on 2026-11-12 and is reused" in row_of(qdp_results(), "int8-inc").remarks
    assert "not valid" in row_of(only(target, latency=latency(9.1, valid=False)), "qdp-ort").warnings[-1]
    assert "its warm-up ended before the times were steady" in row_of(only(target, latency=latency(9.1, steady=False)), "qdp-ort").remarks


def test_generated_data_and_looks_at_the_dev_set_are_stated() -> None:
    results = qdp_results()
    assert "looked at 3 times before" in markdown([results])
    generated = results.task.model_copy(update={"generated": True})
    assert "generated by a grammar" in markdown([qdp_results(task=generated)])
    assert "generated by a grammar" not in markdown([results])


def test_correlations_and_fractions_both_count_in_points() -> None:
    results = qdp_results()
    metrics = {"dev": {"matthews": results.targets[0].metrics["dev"]["accuracy"]}}
    task = results.task.model_copy(update={"primary": "matthews"})
    table = tables(qdp_results(task=task, targets=(results.targets[0].model_copy(update={"metrics": metrics}),)))[0]
    assert (table.metric, table.rows[0].metric) == ("matthews, ×100", "77.9")


def test_hostile_text_cannot_leave_its_markdown_cell() -> None:
    name = "x|y\n| z <script>alert(1)</script> `a` [l](http://e) **b** _c_"
    text = markdown([only(cpu_targets()[0], name=name)])
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| x")]
    assert rows
    assert all(
        line.startswith(r"| x\|y \| z &lt;script&gt;alert(1)&lt;/script&gt; \`a\` \[l\](http://e) \*\*b\*\* \_c\_ |") for line in rows
    )


def test_a_command_with_backticks_stays_in_its_fence() -> None:
    text = markdown([qdp_results(command="onnxsqueeze run a.yaml ```\n# title")])
    assert "````text\nonnxsqueeze run a.yaml ``` # title\n````" in text


def test_several_runs_share_one_page_with_an_overview() -> None:
    text = markdown([qdp_results(), qdp_results(seed=1)])
    assert text.startswith("# 2 runs of onnxsqueeze\n\n## All runs\n")
    assert "\n## qdp on mrpc, seed 0\n" in text
    assert "\n## qdp on mrpc, seed 1\n" in text
    other = qdp_results().environment.model_copy(update={"cpu": "FIXTURE EPYC"})
    assert "Latencies of different processors do not compare" in markdown([qdp_results(), qdp_results(environment=other)])


def test_a_target_whose_latency_or_metric_is_missing_is_still_drawn() -> None:
    bare = Target(name="bare", backend="cpu", provider="CPUExecutionProvider", status="ok", size_bytes=12_345)
    row = row_of(qdp_results(targets=(bare,)), "bare")
    assert (row.size, row.p50, row.metric, row.delta) == ("0.012", "–", "–", "–")
    assert "bare" in markdown([qdp_results(targets=(bare,))])


def test_a_stage_that_two_targets_share_stands_once() -> None:
    text = markdown([qdp_results()])
    assert text.count("| distill | distill | qdp-ort, qdp-inc |") == 1
    assert text.count("| export | export |") == 2, "the teacher's and the student's"


def test_pages_are_written_whole_beside_the_record_and_name_no_folder(tmp_path: Path) -> None:
    paths = write_reports([qdp_results()], tmp_path)
    assert [p.name for p in paths] == ["report.md", "report.html"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"], "no draft is left"
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert not re.search(r"(?<![\w.<:/])/(home|root|tmp|work|usr|var|mnt|Users)/", text)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        write_reports([qdp_results()], tmp_path / "file")


def test_a_record_that_was_read_back_draws_the_same_pages(tmp_path: Path) -> None:
    from onnxsqueeze.report.html import html
    from onnxsqueeze.results import read_results

    (tmp_path / "results.json").write_text(qdp_results().to_json(), encoding="utf-8")
    again = read_results(tmp_path)
    assert markdown([again]) == markdown([qdp_results()])
    assert html([again]) == html([qdp_results()])


def test_reports_are_drawn_without_any_machine_learning_library() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "transformers", "numpy", "scipy", "sklearn", "datasets", "pandas")
    code = (
        "import sys\nfrom records import qdp_results\nfrom onnxsqueeze.report.write import write_reports\nfrom onnxsqueeze.report.terminal import print_summary\n"
        "from onnxsqueeze.report.html import html\nfrom onnxsqueeze.report.markdown import markdown\nhtml([qdp_results()]); markdown([qdp_results()])\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_a_gate_on_a_rise_is_passed_by_the_whole_distance() -> None:
    target = measured(
        "t",
        size=10,
        p50=1.0,
        accuracy=0.8,
        f1=0.8,
        stages=(),
        weight_classes=weights("int8", 1),
        versus=versus(2, 2, "faster", 0.0125, 0.004, 0.01, "better"),
        gates=drop(-1.25),
    )
    gate = row_of(qdp_results(targets=(target,)), "t").gates[0]
    assert (gate.value, gate.verdict) == ("−1.25", "passed by 3.25")
    assert row_of(only(target, gates=drop(-0.0)), "t").gates[0].value == "0.00"


def test_what_a_pruned_vocabulary_makes_of_texts_is_drawn() -> None:
    found = {"texts": 2700, "changed_pct": 0.0}
    found |= {f"{key}{suffix}": 1.5 for key in ("tokens_per_text", "unknown_pct", "cut_pct") for suffix in ("", "_before")}
    other = {**found, "texts": 3, "tokens_per_text": 2.25, "changed_pct": 100.0, "same_class_pct": 66.666}
    pruned = stage("prune-vocabulary", "prune-vocabulary", 3.1, 28_251, "rows", train=found, out_of_domain=other)
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")
    results = qdp_results(targets=(target.model_copy(update={"stages": (*target.stages, pruned)}),))
    grid = next(grid for grid in run_grids(results) if grid.title == "Vocabulary")
    assert list(grid.rows) == [
        ("prune-vocabulary", "train", "2,700", "0.0", "1.50 → 1.50", "1.50 → 1.50", "1.50 → 1.50", "–"),
        ("prune-vocabulary", "out of domain", "3", "100.0", "1.50 → 2.25", "1.50 → 1.50", "1.50 → 1.50", "66.7"),
    ]
    assert "Vocabulary" not in markdown([qdp_results()])


def test_every_trial_of_a_tuning_is_drawn_with_what_its_graph_lacked() -> None:
    trials = [
        {"round": 1, "forms": ["a", "b"], "p50_ms": 10.0, "speedup": None, "speedup_ci95": None, "verdict": "tie"},
        {"round": 1, "forms": [], "p50_ms": 12.0, "speedup": 0.833, "speedup_ci95": [0.82, 0.84], "verdict": "slower"},
        {"round": 1, "forms": ["a"], "p50_ms": 9.5, "speedup": 1.053, "speedup_ci95": [1.04, 1.06], "verdict": "faster"},
    ]
    tuned = stage("optimize-graph", "optimize-graph", 9.1, 80, "places", trials=trials)
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")
    results = qdp_results(targets=(target.model_copy(update={"stages": (*target.stages, tuned)}),))
    grid = next(grid for grid in run_grids(results) if grid.title == "Tuning")
    assert [row[2:] for row in grid.rows] == [
        ("all forms", "10.0", "–"),
        ("the parent, no form", "12.0", "0.833 [0.820, 0.840]"),
        ("without b", "9.50", "1.053 [1.040, 1.060]"),
    ]
    assert "Tuning" in markdown([results])
    assert "Tuning" not in markdown([qdp_results()])


def test_every_configuration_that_a_search_tried_is_drawn_with_its_verdict() -> None:
    common = {
        "quantized": {"Gather": 3, "MatMul": 14},
        "to_float": [],
        "to_integers": [],
        "settings": {"kl per_channel": 17},
        "seconds": 61.2,
    }
    trials = [
        {**common, "trial": 1, "float_weights": 69, "score": 0.8805, "kept": False, "why": "loses 1.20 points, more than 0.5"},
        {**common, "trial": 2, "float_weights": 1157, "score": None, "kept": False, "why": "it does not load", "to_float": ["/a", "/b"]},
        {**common, "trial": 3, "float_weights": 645, "score": 0.892, "kept": True, "why": "loses 0.05 points of at most 0.5", "to_integers": ["/b"]},
    ]  # fmt: skip
    tuned = stage("quantize-inc", "quantize-inc", 190.0, 17, "weights", trials=trials)
    target = next(t for t in cpu_targets() if t.name == "qdp-ort")
    results = qdp_results(targets=(target.model_copy(update={"stages": (*target.stages, tuned)}),))
    grid = next(grid for grid in run_grids(results) if grid.title == "Configurations tried")
    same = ("3 Gather, 14 MatMul", "17 kl per_channel")
    assert list(grid.rows) == [
        ("qdp-ort", "1", *same, "–", "69", "88.05", "1 min 01 s", "rejected: loses 1.20 points, more than 0.5"),
        ("qdp-ort", "2", *same, "to float: /a, /b", "1,157", "–", "1 min 01 s", "rejected: it does not load"),
        ("qdp-ort", "3", *same, "to integers: /b", "645", "89.20", "1 min 01 s", "kept: loses 0.05 points of at most 0.5"),
    ]
    assert "Tuning" not in markdown([results])


def test_a_record_of_one_process_says_what_its_intervals_lack() -> None:
    target = next(t for t in qdp_results().targets if t.latency)
    assert target.latency is not None
    old = only(target, latency=target.latency.model_copy(update={"processes": 1}))
    assert ONE_PROCESS in markdown([old])
    assert ONE_PROCESS not in markdown([qdp_results()])


def test_a_report_names_the_gpu_beside_the_cpu() -> None:
    record = qdp_results()
    there = record.model_copy(update={"environment": record.environment.model_copy(update={"accelerator": "NVIDIA H100"})})
    assert f" on {record.environment.cpu}, {record.date}." in markdown([record])
    for text in (markdown([there]), html([there])):
        assert f" on NVIDIA H100 and {record.environment.cpu}, {record.date}." in text.replace("\\", "")
