"""Records → one HTML page: no script, no font, no image, nothing fetched; light and dark; fit for paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxsqueeze.report import chart
from onnxsqueeze.report.details import caveats, overview, run_grids
from onnxsqueeze.report.markdown import LEGEND
from onnxsqueeze.report.summary import origin, run_title, tables
from onnxsqueeze.results import Results

TEMPLATE = "page.html.j2"


def html(results: Sequence[Results]) -> str:
    """The report of one run, or of several with an overview first. Needs nothing but the records; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    runs = [
        {
            "results": run,
            "title": run_title(run),
            "origin": origin(run),
            "sentences": caveats(run),
            "backends": [{"table": table, "charts": chart.charts(run, table)} for table in tables(run)],
            "grids": run_grids(run),
        }
        for run in results
    ]
    page = environment.get_template(TEMPLATE).render(
        title=run_title(results[0]) if len(results) == 1 else f"{len(results)} runs",
        runs=runs,
        overview=overview(results) if len(results) > 1 else None,
        legend=LEGEND,
        chart=chart,
    )
    return page.strip("\n") + "\n"
