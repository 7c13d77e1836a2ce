"""The command line: parse, call, print, exit code. What it calls is imported when a command needs it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from onnxsqueeze import __version__
from onnxsqueeze.errors import SqueezeError, UsageError, nearest

if TYPE_CHECKING:
    from onnxsqueeze.prepare import Prepared

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="onnxsqueeze",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an encoder model into the smallest and fastest [b].onnx[/b] that still does its job, per hardware backend, with the evidence.",
    epilog="Examples:\n\n"
    "  onnxsqueeze run recipes/qdp.yaml\n\n"
    "  onnxsqueeze run recipes/qdp.yaml --task sst2 --data-dir glue/ --model sentence-transformers/all-MiniLM-L6-v2\n\n"
    "  onnxsqueeze check recipes/qdp.yaml && onnxsqueeze doctor\n\n"
    "Exit codes: 0 done, 1 a stage or measurement failed, 2 wrong recipe or usage, 3 a gate was missed, 130 interrupted.",
)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML, e.g. recipes/qdp.yaml", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Put one value into the recipe, e.g. [b]stages.finetune.epochs=2[/b] or [b]targets.int8-ort.stages.0.opset=17[/b]; repeatable",
        show_default=False,
    ),
]


def _tasks(incomplete: str) -> list[str]:
    from onnxsqueeze.tasks.settings import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def _backends(incomplete: str) -> list[str]:
    from onnxsqueeze import backends

    return [name for name in backends.known() if name.startswith(incomplete)]


Pythons = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        metavar="BACKEND=PATH",
        help="Python whose onnxruntime runs a backend's models, e.g. [b]openvino=ov/bin/python[/b]; else as $ONNXSQUEEZE_CONFIG has it, else this one; repeatable",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def _main(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"onnxsqueeze {__version__}")
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n"
    "  onnxsqueeze run recipes/qdp.yaml                          the embedded model and task, offline\n\n"
    "  onnxsqueeze run recipes/q.yaml --task mrpc --data-dir glue/   GLUE's TSV files from a folder\n\n"
    "  onnxsqueeze run recipes/qdp.yaml --model ./my-bert --dry-run  what would be made, and what the store has\n\n"
    "  onnxsqueeze run recipes/qdp.yaml --set stages.distill.layers=4 --out runs/four\n\n"
    "  onnxsqueeze run r.yaml --python openvino=ov/bin/python    onnxruntime-openvino, from its own environment\n\n"
    "  onnxsqueeze run r.yaml --any-machine --train-only         on a machine with a GPU; then copy its store's artifacts/, and here\n\n"
    "  onnxsqueeze run r.yaml --any-machine                      takes what was trained there, exports, quantizes and measures\n\n"
    "A run that was killed goes on where it was: give the same command again."
)
def run(
    recipe: Recipe,
    *,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",  # named: typer 0.27.2 calls it --TASK, after the metavar
            metavar="TASK",
            help="GLUE task (sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli) or toy, instead of the recipe's",
            autocompletion=_tasks,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_DIR", help="Checkpoint to start from: a folder, 'minilm', or a name on the Hub", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of GLUE files (SST-2/train.tsv, …); default: $ONNXSQUEEZE_GLUE_DIR, else the Hub",
            show_default=False,
        ),
    ] = None,
    set_: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where results.json, the reports and a folder per target go; default: runs/RECIPE-TASK", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**31 - 1, help="Instead of the recipe's seed", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be made and stop")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the store has measurements of")] = False,
    any_machine: Annotated[
        bool,
        typer.Option(
            "--any-machine", help="Take PyTorch stages from the store whichever machine and library versions made them; recorded with each"
        ),
    ] = False,
    train_only: Annotated[bool, typer.Option("--train-only", help="Make the PyTorch stages, leave them in the store, and stop")] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BACKEND",
            help="Fail (exit 1) where a target of this backend is skipped; repeatable",
            autocompletion=_backends,
            show_default=False,
        ),
    ] = None,
    python: Pythons = None,
) -> None:
    """Make every target of a recipe, measure it, and write the record and its reports."""
    # Read by libgomp when torch is loaded: a team that spins stalls for whole time slices where another process takes one of its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from onnxsqueeze import config, pipeline, prepare
    from onnxsqueeze.console import Watcher
    from onnxsqueeze.report.terminal import print_summary
    from onnxsqueeze.store import Store

    backends = config.load(python or ())
    request = prepare.Request(
        recipe,
        task,
        model,
        data_dir,
        tuple(set_ or ()),
        out,
        seed,
        fresh=fresh,
        any_machine=any_machine,
        require=tuple(require or ()),
        backends=backends,
    )
    prepared = prepare.prepare(request)
    with Watcher() as watcher:
        store = Store(Store.default_root(), tell=watcher.say)
        if dry_run:
            _print_plan(prepared, store)
            return
        try:
            if train_only:
                keys = pipeline.train(prepared, store, watcher)
                watcher.say("in the store, below artifacts/: " + ", ".join(keys))
                return
            outcome = pipeline.run(prepared, store, watcher)
        except KeyboardInterrupt:
            watcher.end("interrupted: finished stages and epochs are in the store; the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from None
    print_summary([outcome.results], Console(highlight=False))
    typer.echo(f"record and reports: {outcome.out}/results.json, report.md, report.html")
    for problem in outcome.problems:
        _complain(problem)
    raise typer.Exit(outcome.exit_code)


@app.command(epilog="Example:\n\n  onnxsqueeze check recipes/qdp.yaml --set stages.distill.layers=4")
def check(recipe: Recipe, *, set_: Sets = None) -> None:
    """Read a recipe and report every fault in it at once, with line and nearest word; nothing is made."""
    from onnxsqueeze.recipe import load

    loaded = load(recipe, set_ or ()).recipe
    shared = " → ".join(stage.name for stage in loaded.stages) or "no shared stage"
    typer.echo(
        f"{recipe}: fine: {shared}; {len(loaded.targets)} target{'s' if len(loaded.targets) != 1 else ''}: {', '.join(target.name for target in loaded.targets)}"
    )


@app.command(
    epilog="Examples:\n\n  onnxsqueeze report runs/qdp-toy                           a table on the terminal\n\n"
    "  onnxsqueeze report runs/qdp-mrpc runs/qdp-sst2 -o both.html   one page for both runs"
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR…", help="Output folders of `run`, or their results.json", show_default=False)
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="A page to write: .html or .md; default: a table on the terminal", show_default=False
        ),
    ] = None,
) -> None:
    """Draw the report of one or more runs again, from their records alone."""
    from onnxsqueeze.report.html import html
    from onnxsqueeze.report.markdown import markdown
    from onnxsqueeze.report.terminal import print_summary
    from onnxsqueeze.results import read_results

    results = [read_results(folder) for folder in runs]
    if output is None:
        print_summary(results, Console(highlight=False))
        return
    forms = {".html": html, ".md": markdown}
    if output.suffix not in forms:
        raise UsageError(
            f"-o {output}: unknown kind of report {output.suffix!r}{nearest(output.suffix, list(forms))}",
            remedy="name a file that ends in .html or .md",
        )
    from onnxsqueeze.store import write_atomically

    write_atomically(output, forms[output.suffix](results).encode())
    typer.echo(f"wrote {output}")


@app.command(
    epilog="Examples:\n\n  onnxsqueeze verify runs/qdp-toy/qdp-ort                     files, outputs, latency, metric\n\n"
    "  onnxsqueeze verify runs/qdp-sst2/qdp-ort --data-dir glue/   with the metric on GLUE's dev file\n\n"
    "  onnxsqueeze verify deployed/                                a folder of `deploy`\n\n"
    "  onnxsqueeze verify http://localhost:8080 --record deployed/  what a server answers, against that folder\n\n"
    "Exit codes: 0 as recorded, 1 other files or other outputs, 3 slower or worse than recorded."
)
def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_DIR_OR_URL",
            help="A target's folder below --out, a folder of `deploy`, the model.onnx in one, or the URL of a server that speaks the Open Inference Protocol v2 (/v2/models/NAME where it has several)",
            show_default=False,
        ),
    ],
    *,
    record: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With a URL: the folder whose golden answers and record it is compared with", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of GLUE files: compares the metric, too", show_default=False)
    ] = None,
    python: Pythons = None,
) -> None:
    """Replay the sentences that a run kept beside a model, and compare outputs, latency and metric with the record."""
    from onnxsqueeze import config
    from onnxsqueeze.console import Watcher
    from onnxsqueeze.verify import verify as findings
    from onnxsqueeze.verify import verify_server

    served = "://" in target
    if served and record is None:
        raise UsageError(f"{target}: is compared with nothing", remedy="name the folder that it serves: --record DIR")
    if record is not None and not served:
        raise UsageError(f"--record {record}: goes with a URL, got {target}", remedy="a folder has its record beside it")

    marks = {True: "ok", False: "FAILED", None: "note"}
    failed = set()
    backends = config.load(python or ())
    with Watcher() as watcher:
        tell = watcher.begin(f"verify {target if served else Path(target).name}")
        found = (
            verify_server(target, record, data_dir=data_dir, progress=tell)
            if record is not None
            else findings(Path(target), data_dir=data_dir, progress=tell, backends=backends)
        )
        for finding in found:
            typer.echo(f"{marks[finding.passed]:<7}{finding.what}: {finding.text}")
            if finding.passed is False:
                failed.add(finding.exit_code)
    raise typer.Exit(min(failed, default=0))


@app.command(
    epilog="Examples:\n\n  onnxsqueeze inspect runs/qdp-toy/qdp-ort/model.onnx                   what it is, and where it comes from\n\n"
    "  onnxsqueeze inspect model.onnx --recipe > r.yaml && onnxsqueeze check r.yaml"
)
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An .onnx file, or a folder that holds one", show_default=False)],
    *,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the recipe that made it, as YAML, and nothing else")] = False,
) -> None:
    """Show an .onnx file: inputs, outputs, operators, digests, and the provenance that `run` wrote into it. Nothing of it is run."""
    from onnxsqueeze import inspection

    text = inspection.recipe(model) if recipe else "\n".join(inspection.lines(inspection.inspect(model))) + "\n"
    typer.echo(text, nl=False)


@app.command(
    epilog="Examples:\n\n"
    "  onnxsqueeze deploy runs/qdp-sst2 --target qdp-ort --to hf --out my-model       for optimum, transformers and the Hub\n\n"
    "  onnxsqueeze deploy runs/qdp-sst2 --target qdp-ort --to folder --out my-model   for a session of your own\n\n"
    "  onnxsqueeze deploy runs/qdp-sst2 --target qdp-ort --to hf --out my-model --push me/my-model   to the Hub, too\n\n"
    "  onnxsqueeze deploy runs/qdp-sst2 --target qdp-ort --to triton --out models     a repository for Triton\n\n"
    "  onnxsqueeze deploy runs/qdp-sst2 --target qdp-ort --to folder --out my-model --text   a second file that takes text, too\n\n"
    "  onnxsqueeze deploy runs/qdp-sst2 --target qdp-ort --to folder --out old --ort 1.18   for an older ONNX Runtime\n\n"
    "Then: onnxsqueeze verify my-model"
)
def deploy(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Output folder of `run`", show_default=False)],
    *,
    target: Annotated[str, typer.Option(metavar="NAME", help="Which of its targets", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="folder (model, tokenizer, record, README), hf (a Hugging Face repository with its model card) or triton (a model repository)",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write: a new or an empty one", show_default=False)],
    text: Annotated[
        bool,
        typer.Option(
            "--text",
            help="Write model_text.onnx, too: text in, the tokenizer inside the graph. Needs the extra [b]text[/b], sessions need onnxruntime-extensions",
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Send the folder to this model repository of the Hub, too; a new one is made private",
            show_default=False,
        ),
    ] = None,
    ort: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="Make the file for this older ONNX Runtime, e.g. [b]1.18[/b], and try it there",
            show_default=False,
        ),
    ] = None,
    ort_python: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Python with that ONNX Runtime; default: pip makes one for the moment", show_default=False),
    ] = None,
    python: Pythons = None,
) -> None:
    """Write one measured target as a folder that others load, with its record, its golden answers and a README."""
    from onnxsqueeze import config
    from onnxsqueeze.deploy.older import made_for
    from onnxsqueeze.deploy.source import find
    from onnxsqueeze.deploy.write import deploy as write

    if push is not None:
        from onnxsqueeze.deploy.push import check_name
        from onnxsqueeze.deploy.push import push as send

        if to != "hf":
            raise UsageError(f"--push goes with --to hf, got --to {to}", remedy="the Hub takes a Hugging Face folder")
        check_name(push)
    if ort_python is not None and ort is None:
        raise UsageError("--ort-python goes with --ort", remedy="name the version, too: --ort 1.18")
    if text and ort is not None:
        raise UsageError(
            "--text goes without --ort: the file with the tokenizer is not tried in an older ONNX Runtime", remedy="leave one out"
        )
    source, backends = find(run, target), config.load(python or ())
    with made_for(source, ort, ort_python) if ort is not None else nullcontext(source) as made:
        files = write(made, to, out, backends, text=text)
    typer.echo(f"wrote {out}: {', '.join(sorted(files))}")
    if push is not None:
        typer.echo(f"pushed: {send(out, push)}")


@app.command(
    epilog="Examples:\n\n"
    "  onnxsqueeze serve my-model                                a folder of `deploy`, on http://127.0.0.1:8080\n\n"
    "  onnxsqueeze serve models/sst2 --workers 4 --max-batch 16  a folder of versions (1/, 2/, …): the highest, and each new one\n\n"
    "Endpoints: /v2 (Open Inference Protocol), /classify, /metrics; see docs/serve.md. SIGTERM: answers what it accepted, exit code 0."
)
def serve(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder of `deploy`, a target's folder below --out, or a folder of numbered versions", show_default=False
        ),
    ],
    *,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in URLs; default: the folder's", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine only behind something that checks who asks")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: a free one, which is printed")] = 8080,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Processes, each with the model in memory")] = 1,
    max_batch: Annotated[
        int, typer.Option(metavar="ROWS", min=1, max=4096, help="Most rows in a request, and in a call of the model")
    ] = 32,
    max_delay_ms: Annotated[
        float, typer.Option(metavar="MS", min=0, max=1000, help="How long a request that waits already may wait for a fuller call")
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Of each process's session; default: the cores that may be used ÷ workers",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(
            metavar="ROWS", min=1, help="Rows that may wait, a process; more get 429; default: 8 × --max-batch", show_default=False
        ),
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option(metavar="S", min=0.1, max=3600, help="How long a request may take to arrive (408), and how long it may wait (504)"),
    ] = 10,
) -> None:
    """Answer over HTTP with a deployed model: batched by length, watched for new versions, counted for Prometheus."""
    from onnxsqueeze.serving.start import start

    code = start(
        folder,
        name=name,
        host=host,
        port=port,
        workers=workers,
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        threads=threads,
        queue=queue,
        timeout_s=timeout_s,
    )
    raise typer.Exit(code)


@app.command(
    epilog="Examples:\n\n  onnxsqueeze doctor\n\n  onnxsqueeze doctor --python openvino=ov/bin/python   what that environment's onnxruntime starts"
)
def doctor(*, python: Pythons = None) -> None:
    """Show versions, CPU features, the cores this process may use, and the providers that really start a session, in which Python."""
    from onnxsqueeze import config
    from onnxsqueeze.doctor import print_doctor

    print_doctor(Console(highlight=False), config.load(python or ()))


def _print_plan(prepared: Prepared, store: Any) -> None:
    """What a run would make, a line a stage."""
    console = Console(highlight=False, soft_wrap=True)
    plan = prepared.plan
    info = prepared.task.info
    console.print(
        f"task {info.name} ({len(prepared.task.train.rows):,} training rows, {len(prepared.task.selection.rows):,} selection rows), model {prepared.start.name}, seed {prepared.seed}"
    )

    def line(step: Any, indent: str) -> None:
        state = "skipped" if step.skipped else "in the store" if store.has(step.key) else "to be made"
        console.print(f"{indent}{step.stage.name:<20} {step.key.removeprefix('model:')[:12]}  {state}")

    console.print("shared stages:")
    for step in plan.shared:
        line(step, "  ")
    for branch in plan.branches:
        after = branch.steps[branch.shared - 1].stage.name if branch.shared else "model"
        notes = ", the baseline" if branch.target.baseline else ""
        console.print(f"target {branch.target.name} ({branch.backend}{notes}), after {after}:")
        for step in branch.steps[branch.shared :]:
            line(step, "  ")
    console.print(f"results would go to {prepared.out}")


def _complain(error: SqueezeError) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/bold red] {escape(str(error))}")


def main() -> None:
    """Entry point: turns errors into one message and the right exit code."""
    try:
        app()
    except SqueezeError as error:
        _complain(error)
        sys.exit(error.exit_code)
