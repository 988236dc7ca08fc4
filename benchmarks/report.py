"""Tables made of rows, for the terminal and for docs/benchmark-results.md: `python -m benchmarks.report` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .bench_heads import CONFIGS, LONGER, PAIRS, of_pairs
from .bench_host import ADD, PLAIN_ADD, PUBLISHED_LIVE
from .bench_patch import LIVE, MIMIC, UNPATCHED, ZERO
from .bench_stacks import HEADS, LORA, STACKS, of
from .cases import CACHED, LENGTHS, NEUTRAL, SHAPES
from .contestants import OURS, PUBLISHED, YARDSTICK
from .plots import IMAGES
from .records import RESULTS, ROOT, Row, read
from .serve_rows import section as served
from .targets import TARGETS

PAGE = ROOT / "docs" / "benchmark-results.md"
BEGIN, END = "<!-- results: begin, written by python -m benchmarks -->", "<!-- results: end -->"
NO_GPU = "No GPU figures have been measured yet."


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers. "" without lines."""
    rows = [list(head), *(list(line) for line in lines)]
    if len(rows) == 1:
        return ""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * w}" if i < left else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def everything(rows: Iterable[Row]) -> str:
    """Every timed row, for the terminal."""
    lines = [
        [
            row.case,
            row.what,
            row.contestant,
            _spread(row),
            _time(row.time_us),
            _number(row.added_us, ".0f"),
            _number(row.speed_up, ".2f"),
            _mib(row.peak_bytes),
            _number(row.extra_over_yardstick, ".2f"),
        ]
        for row in rows
        if row.time_us is not None
    ]
    head = ["case", "what", "contestant", "ratio [p20, p80]", "time", "added us", "speed-up", "peak MiB", "x yardstick"]
    return table(head, lines, left=3)


def targets(rows: Sequence[Row], measured_only: bool = False) -> str:
    """For every target the worst case that was measured, and whether it holds there."""
    lines = []
    for target in TARGETS:
        limit = f"{'>=' if target.at_least else '<='} {target.limit:g}"
        worst = target.worst(rows)
        if worst is None and not measured_only:
            lines.append([target.name, "", "not measured", limit, ""])
        if worst is None:
            continue
        value, row = worst
        case = f"{row.case}, {row.of}" if row.of else row.case
        lines.append([target.name, case, "holds" if target.holds(value) else "**missed**", limit, f"{value:.3g}"])
    return table(["target", "worst case", "", "limit", "measured"], lines, left=3)


def section(rows: Sequence[Row], name: str) -> str:
    """What the docs say of one CSV, given the name its pictures go by."""
    parts = [f"### {rows[0].device}", _measured_with(rows)]
    if headlines := [_headline(rows, shape, dtype) for shape in NEUTRAL for dtype in _dtypes(rows, shape)]:
        pictures = {kind: f"{kind}-{name}.png" for kind in ("time", "memory")}
        parts += [
            *(f"![{kind} against length]({IMAGES.name}/{file})" for kind, file in pictures.items() if _drawn(file)),
            "#### Attention with the shift, causal",
            f"Ratios are to the time of {YARDSTICK} on the same inputs (in brackets p20 and p80); speed-up is the time "
            f"of {PUBLISHED} over that of {OURS}; MiB are what a call holds at its peak above its inputs.",
            *headlines,
        ]
    tables = {
        "The host: microseconds a call of 4 tokens": _host_calls(rows),
        "The host: microseconds a layer of tiny models": _host_layers(rows),
        "Attention shapes of models, causal": _shapes(rows),
        "Decoding one token, per attention call": _decode(rows),
        "LIVE's addition, against adding alone": _live(rows),
        "Virtual keys and values, against attention without them": _pairs(rows),
        "All heads, against the unpatched model": _heads(rows),
        "Whole models, against the unpatched one": _whole_models(rows),
        "A training step of MimIC": _training(rows),
        "Many stacks in one batch, against the unpatched model": _stacks(rows),
        # Rows from before there were host rows were not measured against the targets of today.
        "Targets": targets(rows, measured_only=True) if any(row.bench == "host" for row in rows) else "",
    }
    parts += [f"#### {title}\n\n{body}" for title, body in tables.items() if body]
    return "\n\n".join(part for part in parts if part)


def _drawn(picture: str) -> bool:
    return (IMAGES / picture).is_file()


def _measured_with(rows: Sequence[Row]) -> str:
    first = rows[0]
    dates = sorted({row.date for row in rows})
    commits = sorted({row.commit for row in rows if row.commit})
    versions = f"torch {first.torch}, transformers {first.transformers}, Python {first.python}"
    where = f"{first.cores} cores, {first.threads} threads"
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"Measured {when}, commit {', '.join(commits) or 'unknown'}; {versions}; {where}."


def _dtypes(rows: Iterable[Row], shape: str) -> list[str]:
    """Without fp16, which is bf16 again in time and memory."""
    found = dict.fromkeys(r.dtype for r in rows if r.model == shape and r.what == "forward" and r.mask == "causal")
    return [dtype for dtype in found if dtype != "fp16"]


def _find(rows: Iterable[Row], contestant: str, what: str, **wanted: object) -> Row | None:
    for row in rows:
        if (row.contestant, row.what) == (contestant, what) and all(getattr(row, k) == v for k, v in wanted.items()):
            return row
    return None


def _headline(rows: Sequence[Row], shape: str, dtype: str) -> str:
    lines = []
    for what in ("forward", "forward+backward"):
        for t in (*LENGTHS[:2], LENGTHS[-1]):  # the page would be long with all of them; the pictures have them
            where = {"model": shape, "dtype": dtype, "mask": "causal", "t": t}
            plain, ours, published = (_find(rows, name, what, **where) for name in (YARDSTICK, OURS, PUBLISHED))
            if plain is None or ours is None or published is None:
                continue
            memory = " / ".join(_mib(row.peak_bytes) for row in (plain, ours, published))
            times = [_time(plain.time_us), _spread(ours), _number(published.ratio, ".2f")]
            lines.append([what, str(t), *times, _number(ours.speed_up, ".1f"), memory])
    if not lines:
        return ""
    head = ["", "t", YARDSTICK, OURS, PUBLISHED, "speed-up", f"MiB: {YARDSTICK} / {OURS} / {PUBLISHED}"]
    sizes = SHAPES[shape]
    return f"{sizes.h} heads of {sizes.d}, {dtype}, backend {_backend(rows, shape, dtype)}:\n\n{table(head, lines)}"


def _backend(rows: Iterable[Row], shape: str, dtype: str) -> str:
    found = _find(rows, OURS, "forward", model=shape, dtype=dtype)
    return f"`{found.backend}`" if found else ""


def _shapes(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.contestant != OURS or row.what != "forward" or row.mask != "causal" or row.model in NEUTRAL:
            continue
        both = _find(rows, OURS, "forward+backward", case=row.case)
        if both is not None:
            sizes = f"{row.h} / {row.g} / {row.d}"
            numbers = [_spread(row), _number(row.speed_up, ".1f"), _spread(both), _number(both.speed_up, ".1f")]
            lines.append([row.model, sizes, row.dtype, str(row.t), *numbers])
    head = ["model", "h / g / d", "", "t", "forward", "speed-up", "forward+backward", "speed-up"]
    return table(head, lines, left=3)


def _decode(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        # The page would be long with all of them.
        if row.what == "decode" and row.contestant == OURS and row.s in (CACHED[0], CACHED[-1]):
            plain, published = (_find(rows, name, "decode", case=row.case) for name in (YARDSTICK, PUBLISHED))
            if plain is not None and published is not None:
                added = [_number(r.added_us, ".0f") for r in (row, published)]
                lines.append([row.model, row.dtype, str(row.s), _time(plain.time_us), _spread(row), *added])
    head = ["shape", "", "keys", YARDSTICK, OURS, "added us", f"added us, {PUBLISHED}"]
    return table(head, lines, left=2)


def _host_calls(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.bench == "host" and row.contestant in (YARDSTICK, ADD) and row.time_us is not None:
            added = [_added(rows, row, name) for name in (OURS, PUBLISHED)]
            lines.append([row.what, row.contestant, _number(row.time_us, ".1f"), *added])
    return table(["", "beside", "its us", f"added, {OURS}", f"added, {PUBLISHED}"], lines, left=2)


def _host_layers(rows: Sequence[Row]) -> str:
    names = (MIMIC, PUBLISHED, LIVE, PUBLISHED_LIVE, PLAIN_ADD)
    lines = []
    for row in rows:
        if row.bench == "host" and row.contestant == UNPATCHED and row.time_us is not None:
            lines.append([row.model, row.what, _number(row.time_us, ".0f"), *(_added(rows, row, n) for n in names)])
    return table(["model", "", f"{UNPATCHED}, us", *(f"added, {name}" for name in names)], lines, left=2)


def _added(rows: Sequence[Row], yardstick: Row, name: str) -> str:
    """Microseconds, and in brackets the launches, that a contestant adds."""
    where = {"case": yardstick.case, "bench": "host"}
    timed = _find(rows, name, yardstick.what, **where, of="")
    launched = _find(rows, name, yardstick.what, **where, of="launches")
    if timed is None or launched is None:
        return "" if name == PLAIN_ADD else "refused"  # older rows have none
    return f"{_number(timed.added_us, '.1f')} ({_number(launched.count, '+.3g')})"


def _live(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.contestant == OURS and row.what == "live forward":
            both = _find(rows, OURS, "live forward+backward", case=row.case)
            numbers = [_number(row.added_us, ".0f"), _spread(row), _spread(both) if both else ""]
            lines.append([str(row.d), row.dtype, str(row.t), *numbers])
    return table(["width", "", "tokens", "added us, forward", "forward", "forward+backward"], lines, left=2)


def _pairs(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.bench == "heads" and row.contestant == YARDSTICK:
            others = [_find(rows, name, row.what, case=row.case) for name in (OURS, *map(of_pairs, PAIRS), LONGER)]
            ratios = [_spread(other) if other else "refused" for other in others]
            lines.append([row.what, row.dtype, str(row.s), _time(row.time_us), *ratios])
    names = ["MimIC", *(of_pairs(n).removeprefix(f"{OURS}: ") for n in PAIRS), f"{LONGER}, {PAIRS[-1]}"]
    return table(["", "", "keys", YARDSTICK, *names], lines, left=2)


def _heads(rows: Sequence[Row]) -> str:
    stages = [row for row in rows if row.bench == "heads" and row.contestant == UNPATCHED]
    lines = []
    for name in CONFIGS if stages else ():
        found = [_find(rows, name, stage.what, case=stage.case) for stage in stages]
        numbers = next((f"{row.count:,.0f}" for row in found if row is not None and row.count is not None), "")
        lines.append([f"`{name}`", numbers, *(_spread(row) if row else "" for row in found)])
    head = ["", "parameters", *(f"{stage.what}, {stage.t} tokens" for stage in stages)]
    return table(head, lines)


def _whole_models(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.contestant == UNPATCHED and row.bench == "patch":
            others = (_find(rows, name, row.what, case=row.case) for name in (MIMIC, ZERO, LIVE, PUBLISHED))
            ratios = [_spread(other) if other else "refused" for other in others]
            lines.append([row.model, row.dtype, row.what, str(row.s), _time(row.time_us), *ratios])
    names = [name.removeprefix(f"{OURS}: ") for name in (MIMIC, ZERO, LIVE)]
    return table(["model", "", "", "tokens", UNPATCHED, *names, PUBLISHED], lines, left=3)


def _stacks(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.contestant == UNPATCHED and row.bench == "stacks":
            for kind in (*HEADS, LORA):
                counts = (0, *STACKS)
                others = (_find(rows, of(kind, count), row.what, case=row.case) for count in counts)
                ratios = [_spread(other) if other else "" for other in others]
                lines.append([row.what, kind, str(row.b), _time(row.time_us), *ratios])
    head = ["", "", "rows", UNPATCHED, "one patch", *(f"{n} stack{'s' if n > 1 else ''}" for n in STACKS)]
    return table(head, lines, left=2)


def _training(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if (row.bench, row.what) != ("patch", "training step") or not row.contestant.startswith(PUBLISHED):
            continue
        rest = row.contestant.removeprefix(PUBLISHED)
        ours = _find(rows, OURS + rest, row.what, case=row.case)
        if ours is not None and row.time_us and ours.time_us and row.peak_bytes and ours.peak_bytes:
            times = [_time(row.time_us), _time(ours.time_us), f"{row.time_us / ours.time_us:.2f}"]
            memory = [_mib(row.peak_bytes), _mib(ours.peak_bytes), f"{row.peak_bytes / ours.peak_bytes:.1f}"]
            lines.append([row.model, row.dtype, rest.removeprefix(", "), str(row.s), *times, *memory])
    head = [
        "model",
        "",
        "",
        "context",
        PUBLISHED,
        OURS,
        "times faster",
        f"MiB, {PUBLISHED}",
        f"MiB, {OURS}",
        "times less",
    ]
    return table(head, lines, left=3)


def _spread(row: Row) -> str:
    if row.ratio is None or row.ratio_p20 is None or row.ratio_p80 is None:
        return ""
    if row.contestant == row.yardstick:
        return "1"
    return f"{row.ratio:.2f} [{row.ratio_p20:.2f}, {row.ratio_p80:.2f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(us: float | None) -> str:
    if us is None:
        return ""
    for limit, factor, unit in ((1e3, 1, "us"), (1e6, 1e3, "ms")):
        if us < limit:
            return f"{us / factor:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def _mib(size: int | None) -> str:
    if size is None:
        return ""
    mib = size / 2**20
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.3g}"


def rendered(folder: Path = RESULTS) -> str:
    """What stands between the markers of the page: one section a CSV, and whether a GPU is among them."""
    files = sorted(folder.glob("cpu.csv")) + sorted(folder.glob("cuda-*.csv"))
    sections = [section(list(rows), file.stem) for file in files for rows in _by_device(read(file))]
    if not any(file.name.startswith("cuda-") for file in files):
        sections.insert(0, NO_GPU)
    return "\n\n".join([*sections, *served(folder, table)])


def _by_device(rows: Sequence[Row]) -> list[list[Row]]:
    """Apart, what different machines gave: a part of the benchmark can be run again alone."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.device, []).append(row)
    return list(found.values())


def with_results(page: str, results: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with what stands between its markers replaced."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{results}\n\n{end}{after}"


def update(page: Path = PAGE) -> Path:
    """Write the results of all CSV files into the page."""
    page.write_text(with_results(page.read_text(), rendered()))
    return page


if __name__ == "__main__":
    print(update())
