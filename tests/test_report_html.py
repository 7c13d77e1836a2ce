"""The HTML page: one file, offline, escaped, readable in both colour schemes, with charts whose labels do not collide."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsqueeze.report import chart
from onnxsqueeze.report.html import html
from onnxsqueeze.report.summary import tables
from onnxsqueeze.results import Results
from records import cpu_targets, qdp_results

VOID = {"meta", "link", "br", "path", "line", "circle"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails where a tag is closed that was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.table_text: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        elif {"table", "dl"} & set(self.open):
            self.table_text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_well_formed_and_refers_to_nothing_outside() -> None:
    text = html([qdp_results(), qdp_results(seed=1)])
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert page.all("script") == []
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    assert not re.search(r"@import|url\(", page.style)
    assert not any(name in attributes for _, attributes in page.tags for name in ("src", "srcset", "onclick", "onload"))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_every_reference_has_its_element() -> None:
    page = Page(html([qdp_results(), qdp_results(seed=1)]))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)


def test_tables_and_charts_have_what_a_screen_reader_needs() -> None:
    page = Page(html([qdp_results()]))
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in page.all("th"))
    assert len([a for a in page.all("svg") if a.get("role") == "img" and a.get("aria-labelledby")]) == 2, (
        "one chart each for size and latency; none for CUDA"
    )
    assert page.all("html") == [{"lang": "en"}]
    assert all(a.get("aria-label") and a.get("tabindex") == "0" for a in page.all("div") if a.get("class") == "scroll"), (
        "what scrolls can be reached by keyboard"
    )


def test_hostile_names_are_text_everywhere() -> None:
    name = "<script>alert(1)</script>\"'&{{ 7*7 }}"
    target = cpu_targets()[0].model_copy(update={"name": name, "reason": name})
    results = qdp_results(targets=(target, *cpu_targets()[1:]), command=name, recipe=name, model=name)
    text = html([results])
    assert Page(text).all("script") == []
    assert "<script" not in text
    assert "{{ 7*7 }}" in text, "shown, not computed"


def test_both_colour_schemes_are_there_and_every_text_colour_is_readable() -> None:
    style = Page(html([qdp_results()])).style
    light, dark, paper = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    assert "@media (prefers-color-scheme: dark)" in style
    assert light.keys() == dark.keys() == paper.keys()
    for scheme in (light, dark, paper):
        pairs = [(ink, back) for ink in ("ink", "muted", "accent", "bad", "warn") for back in ("page", "card")]
        pairs += [("good", "good-back"), ("bad", "bad-back"), ("warn", "warn-back"), ("muted", "calm-back"), ("ink", "calm-back")]
        assert {pair: ratio for pair in pairs if (ratio := contrast(scheme[pair[0]], scheme[pair[1]])) < 4.5} == {}


def contrast(a: str, b: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_number_in_the_tables_comes_from_the_records() -> None:
    results = qdp_results()
    allowed = numbers_of(results)
    shown = [n for text in Page(html([results])).table_text for n in re.findall(r"(?<![\w.])(?<!e-)\d[\d,]*(?:\.\d+)?", text)]
    assert len(shown) > 500
    constants = {"95", "100", "9", "12", "0.001", "256"}  # intervals, ×100, gzip -9, zstd -12, p < 0.001
    assert {n for n in shown if n.replace(",", "") not in allowed | constants} == set()


def numbers_of(results: Results) -> set[str]:
    """Each number of the record as it is, in hundredths, in millions, in thousand millions; with 0 to 3 decimals; and all digits in its texts."""
    values: list[float] = []
    texts: set[str] = set()

    def collect(part: object) -> None:
        if isinstance(part, dict):
            for key, item in part.items():
                collect(item)
                texts.update(re.findall(r"\d+(?:\.\d+)?", key))
        elif isinstance(part, list):
            for item in part:
                collect(item)
        elif isinstance(part, str):
            texts.update(re.findall(r"\d+(?:\.\d+)?", part))
            texts.update(re.findall(r"\d+", part[:16]))
        elif isinstance(part, int | float) and not isinstance(part, bool):
            values.append(part)

    record = json.loads(results.to_json())
    collect(record)
    for target in record["targets"]:
        values += [abs(gate["value"] - gate["limit"]) for gate in target["gates"]]
        values += [w["zeros"] / w["n"] for w in target["weights"]]
        for latency in [target["latency"], *target["latencies"]] if target["latency"] else []:
            rate = 1000 * latency["batch"] / latency["p50_ms"]
            values += [rate, rate / latency["threads"]]
        times = [one["ms"] for one in target["proof"]["operators"]] if target["proof"] else []
        values += [time / sum(times) for time in times] + [sum(times[i:]) / sum(times) for i in range(len(times))]
    for stage in [*record["stages"], *(s for t in record["targets"] for s in t["stages"])]:
        minutes, rest = divmod(round(stage["seconds"]), 60)
        texts |= {str(minutes), f"{rest:02}"}
    forms = {f"{abs(value) * factor:.{digits}f}" for value in values for factor in (1, 100, 1e-6, 1e-9) for digits in range(4)}
    return forms | texts | {f"{abs(value):g}" for value in values}


def no_collision(drawn: chart.Chart) -> None:
    boxes = [mark.box for mark in drawn.marks if mark.box]
    marks = [chart.Box(m.x - chart.MARKER, m.y - chart.MARKER, m.x + chart.MARKER, m.y + chart.MARKER) for m in drawn.marks]
    plot = chart.Box(chart.LEFT, 0, chart.WIDTH, chart.HEIGHT - chart.BOTTOM)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [(box, mark) for box in boxes for mark in marks if box.overlaps(mark)]
    assert all(box.inside(plot) for box in boxes)
    assert all(box.right - box.left >= chart.text_width(m.label) - 1e-6 for m in drawn.marks if (box := m.box))


def test_labels_of_close_points_do_not_collide_and_none_is_lost() -> None:
    results = qdp_results()
    size, time = chart.charts(results, tables(results)[0])
    near = [chart.Point(f"cpu-int8-variant-{i}", 23.0 + i / 50, 89.9 + (i % 3) / 20, 87.9, 91.8, "good", "") for i in range(8)]
    close = chart.lay_out("t", "x", "y", near)
    for drawn in (size, time, close):
        no_collision(drawn)
        assert all(mark.box for mark in drawn.marks)


points = st.lists(
    st.tuples(st.floats(0.01, 1e4), st.floats(-100, 100), st.floats(0, 30), st.text(min_size=1, max_size=30)), min_size=1, max_size=9
)


@given(points)
@settings(max_examples=40, deadline=None)
def test_any_points_fit_the_plot_and_no_labels_collide(given_points: list[tuple[float, float, float, str]]) -> None:
    drawn = chart.lay_out("t", "x", "y", [chart.Point(name, x, y, y - half, y + half, "good", "") for x, y, half, name in given_points])
    no_collision(drawn)
    for mark in drawn.marks:
        assert chart.LEFT <= mark.x <= chart.WIDTH - chart.RIGHT
        assert chart.TOP <= mark.high <= mark.y <= mark.low <= chart.HEIGHT - chart.BOTTOM
    for ticks in (drawn.x_ticks, drawn.y_ticks):
        assert len({text for _, text in ticks}) == len(ticks) >= 2


def test_marks_lie_where_the_axes_say() -> None:
    results = qdp_results()
    size, _ = chart.charts(results, tables(results)[0])
    ticks = {float(text): place for place, text in size.y_ticks}
    (low, low_y), (high, high_y) = min(ticks.items()), max(ticks.items())
    fp32 = size.marks[0]
    assert fp32.label == "fp32"
    assert low + (fp32.y - low_y) / (high_y - low_y) * (high - low) == pytest.approx(78.19)
    assert size.gate_y is not None
    assert low + (size.gate_y - low_y) / (high_y - low_y) * (high - low) == pytest.approx(76.19), (
        "the gate lies two points below the baseline"
    )
    across = {float(text): place for place, text in size.x_ticks}
    assert across[50] < fp32.x < across[100], "91.0 MB"


def test_a_backend_with_fewer_than_two_measured_targets_has_no_chart() -> None:
    assert chart.charts(qdp_results(), tables(qdp_results())[1]) == ()
    assert "<figure>" not in html([qdp_results(targets=cpu_targets()[:1])])


@pytest.mark.full
@pytest.mark.parametrize(("scheme", "size"), [("light", "1200,2400"), ("dark", "1200,2400"), ("light", "500,2400")])
def test_a_real_browser_draws_the_page_and_complains_of_nothing(tmp_path: Path, scheme: str, size: str) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(html([qdp_results()]), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    flags += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={shot}",
        f"--window-size={size}",
        "--enable-logging=stderr",
        "--v=0",
        "--hide-scrollbars",
    ]
    flags += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    pixels = greys(shot)
    assert (pixels[0] < 60) == (scheme == "dark"), "the page's first pixel shows its scheme"
    assert min(pixels) < 60
    assert max(pixels) > 200
    assert len(set(pixels)) > 50, "text and curves leave many shades"


def greys(file: Path) -> bytes:
    """The red channel of an 8-bit RGB(A) PNG, row by row. Source: PNG specification, filtering."""
    content, at, data = file.read_bytes(), 8, b""
    width = height = channels = 0
    while at < len(content):
        (length,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            channels = {2: 3, 6: 4}[colour]
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    raw, stride, red = zlib.decompress(data), width * channels, bytearray()
    above = bytearray(stride)
    for y in range(height):
        start = y * (stride + 1)
        line, how = bytearray(raw[start + 1 : start + 1 + stride]), raw[start]
        for i in range(stride):
            left, up, corner = (line[i - channels] if i >= channels else 0), above[i], (above[i - channels] if i >= channels else 0)
            line[i] = (line[i] + (0, left, up, (left + up) // 2, paeth(left, up, corner))[how]) & 255
        red += line[::channels]
        above = line
    return bytes(red)


def paeth(left: int, up: int, corner: int) -> int:
    near = left + up - corner
    return min((abs(near - left), 0, left), (abs(near - up), 1, up), (abs(near - corner), 2, corner))[2]
