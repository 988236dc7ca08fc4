"""Draw the pictures of a CSV file: `python -m benchmarks.plots benchmarks/results/cpu.csv`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import NEUTRAL, SHAPES
from .contestants import OURS, PUBLISHED, YARDSTICK
from .records import ROOT, Row, read

IMAGES = ROOT / "docs" / "images"
STAGES = ("forward", "forward+backward")
# Colours of the Okabe-Ito palette, and shapes beside them: told apart without colour too.
STYLES = {
    YARDSTICK: {"color": "#444444", "marker": "s", "label": "attention alone (SDPA)"},
    OURS: {"color": "#0072B2", "marker": "o", "label": "mimic_core"},
    PUBLISHED: {"color": "#D55E00", "marker": "^", "label": "as published"},
}


def draw(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Two pictures, `time-NAME.png` and `memory-NAME.png`: a column each neutral shape, a row each stage."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = _main_dtype(rows)
    shapes = [shape for shape in NEUTRAL if _line(rows, shape, dtype, STAGES[0], YARDSTICK)]
    if not shapes:
        return []
    drawn = []
    for kind, title in (("time", "Time over attention alone"), ("memory", "Peak memory of a call, above its inputs")):
        figure = _figure(rows, shapes, dtype, kind, title)
        drawn.append(folder / f"{kind}-{name}.png")
        figure.savefig(drawn[-1], dpi=150)
    return drawn


def _main_dtype(rows: Sequence[Row]) -> str:
    """The dtype with the most lengths: fp32 on a CPU, half precision on a GPU where both have all."""
    cases = {(r.dtype, r.t) for r in rows if r.what == "forward" and r.model in NEUTRAL and r.mask == "causal"}
    return max(("bf16", "fp32"), key=lambda dtype: len([1 for d, _ in cases if d == dtype]))


def _line(rows: Sequence[Row], shape: str, dtype: str, what: str, contestant: str) -> list[Row]:
    wanted = (shape, dtype, "causal", what, contestant)
    found = [row for row in rows if (row.model, row.dtype, row.mask, row.what, row.contestant) == wanted]
    return sorted(found, key=lambda row: row.t or 0)


def _figure(rows: Sequence[Row], shapes: Sequence[str], dtype: str, kind: str, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 3.4 * len(shapes), 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(shapes), squeeze=False, sharex=True, sharey="row")
    for axes_row, what in zip(grid, STAGES, strict=True):
        for axes, shape in zip(axes_row, shapes, strict=True):
            for contestant in STYLES:
                _plot(axes, _line(rows, shape, dtype, what, contestant), contestant, kind)
            sizes = SHAPES[shape]
            axes.set_title(f"{what}, {sizes.h} heads of {sizes.d}", fontsize=10)
            if kind == "memory":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
                axes.yaxis.get_major_locator().set_params(integer=True)
            axes.set_xscale("log", base=2)
            axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            lengths = sorted({row.t for row in _line(rows, shape, dtype, what, YARDSTICK) if row.t})
            axes.set_xticks(lengths, [str(t) for t in lengths])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if what == STAGES[-1]:
                axes.set_xlabel("sequence length")
        axes_row[0].set_ylabel("times SDPA" if kind == "time" else "MiB")
    grid[0][0].legend(frameon=False, fontsize=9)
    first = rows[0]
    below = f"{first.device}, threads: {first.threads}\n{dtype}, causal, torch {first.torch}, {first.date}"
    figure.suptitle(f"{title}\n{below}", fontsize=10)
    return figure


def _plot(axes: Any, line: Sequence[Row], contestant: str, kind: str) -> None:
    lengths = [row.t for row in line]
    if kind == "memory":
        values = [(row.peak_bytes or 0) / 2**20 for row in line]
    else:
        values = [row.ratio or 0 for row in line]
        low, high = [row.ratio_p20 or 0 for row in line], [row.ratio_p80 or 0 for row in line]
        axes.fill_between(lengths, low, high, color=STYLES[contestant]["color"], alpha=0.15, linewidth=0)
        if contestant == OURS:  # so close to the yardstick that only numbers tell them apart
            for length, value in zip(lengths, values, strict=True):
                place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(f"{value:.2f}", (length, value), color=STYLES[contestant]["color"], **place)
    axes.plot(lengths, values, markersize=5, linewidth=1.6, **STYLES[contestant])


def main() -> None:
    """Draw the pictures of one CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("csv", type=Path, help="file that `python -m benchmarks` has written")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder for the pictures (default: docs/images)")
    options = parser.parse_args()
    for path in draw(read(options.csv), options.out, options.csv.stem):
        print(path)


if __name__ == "__main__":
    main()
