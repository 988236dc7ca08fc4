"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .methods import LABELS, MAIN, TAKEN
from .plan import CURVE, CURVE_SAMPLES, CURVES
from .results import Results

# Colours of the Okabe-Ito palette, and shapes beside them: told apart without colour too.
STYLES = {
    "zero-shot": {"color": "#999999", "marker": "x"},
    "icl": {"color": "#444444", "marker": "s"},
    "task-vector": {"color": "#CC79A7", "marker": "v"},
    "function-vector": {"color": "#F0E442", "marker": "P"},
    "live": {"color": "#D55E00", "marker": "^"},
    "lora": {"color": "#009E73", "marker": "D"},
    "mimic": {"color": "#0072B2", "marker": "o"},
    "mimic+lora": {"color": "#56B4E9", "marker": "*"},
}


def draw(results: Results, folder: Path) -> list[Path]:
    """The pictures there are rows for. One of other rows does not stay."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"cost": _cost, "samples": _samples, "shots": _shots, "distance": _distance}
    drawn = []
    for name, make in pictures.items():
        figure, path = make(results), folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            drawn.append(path)
            figure.savefig(path, dpi=130)
    return drawn


def _figure(columns: int, title: str) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 3.4 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(1, columns, squeeze=False)[0]
    for axes in grid:
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _line(
    axes: Any, method: str, places: Sequence[int], values: Callable[[int], Sequence[float]], band: bool = True
) -> None:
    """Mean over seeds, and a band of a standard deviation."""
    found = {place: values(place) for place in places}
    xs = [place for place in places if found[place]]
    if not xs:
        return
    middle = [mean(found[x]) for x in xs]
    wide = [stdev(found[x]) if len(found[x]) > 1 else 0.0 for x in xs]
    low, high = ([m + sign * w for m, w in zip(middle, wide, strict=True)] for sign in (-1, 1))
    if band:
        axes.fill_between(xs, low, high, color=STYLES[method]["color"], alpha=0.15, linewidth=0)
    axes.plot(xs, middle, label=LABELS[method], markersize=5, linewidth=1.6, **STYLES[method])


def costs(results: Results, world: str) -> dict[str, tuple[float, float]]:
    """By method: the time to the first token, and the mean accuracy over tasks, if all of it has been measured."""
    found = {}
    for method in ("zero-shot", "icl", *TAKEN, *MAIN):
        shots = results.most_shots(world) if method == "icl" else 0
        time = results.number(world, method, "first token")
        if time is not None and results.whole(world, method, shots):
            tasks = [results.accuracies(world, task, method, shots) for task in results.tasks(world)]
            found[method] = time, mean(mean(task) for task in tasks if task)
    return found


def _cost(results: Results) -> Any:
    found = {world: points for world in results.worlds if len(points := costs(results, world)) > 1}
    if not found:
        return None
    figure, grid = _figure(len(found), "Accuracy, mean over tasks, against what a question costs")
    for axes, (world, points) in zip(grid, found.items(), strict=True):
        for place, (method, (time, accuracy)) in enumerate(sorted(points.items(), key=lambda point: point[1][1])):
            style = STYLES.get(method, {"color": "#777777", "marker": "."})
            axes.plot([time], [accuracy], linestyle="", markersize=6, **style)
            # Methods that cost the same are one above the other: their names take turns, left and right.
            side = 1 if place % 2 else -1
            axes.annotate(
                LABELS[method],
                (time, accuracy),
                (5 * side, 0),
                textcoords="offset points",
                fontsize=6,
                ha="left" if side > 0 else "right",
                va="center",
            )
        axes.set_title(world, fontsize=10)
        axes.margins(x=0.5)
        axes.set_xlabel("time to first token, unpatched = 1")
    grid[0].set_ylabel("held-out accuracy")
    return figure


def _samples(results: Results) -> Any:
    found = [
        (w, t) for w, t in sorted(CURVES) if any(results.accuracies(w, t, CURVE[0], 0, n) for n in CURVE_SAMPLES[:-2])
    ]
    if not found:
        return None
    figure, grid = _figure(len(found), "Accuracy by training samples")
    for axes, (world, task) in zip(grid, found, strict=True):
        for method in (*CURVE, "icl"):
            shots = results.most_shots(world) if method == "icl" else 0

            def values(n: int, one: tuple[str, str, str, int] = (world, task, method, shots)) -> Sequence[float]:
                return results.accuracies(*one, n)

            _line(axes, method, CURVE_SAMPLES, values)
        axes.set_title(f"{world}, {task}", fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks(CURVE_SAMPLES, [str(n) for n in CURVE_SAMPLES])
        axes.minorticks_off()
        axes.set_xlabel("training samples")
    grid[0].set_ylabel("held-out accuracy")
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def _shots(results: Results) -> Any:
    world = results.worlds[0]
    counts = sorted({r.shots or 0 for r in results.rows if r.world == world and r.what == "accuracy"})
    tasks = [task for task in results.tasks(world) if results.accuracies(world, task, "mimic")]
    if len(counts) < 3 or not tasks:
        return None
    figure, grid = _figure(len(tasks), f"Accuracy by demonstrations in the prompt, {world}")
    for axes, task in zip(grid, tasks, strict=True):
        for method in ("icl", "live", "mimic"):

            def values(k: int, method: str = method, task: str = task) -> Sequence[float]:
                return results.accuracies(world, task, "zero-shot" if method == "icl" and not k else method, k)

            _line(axes, method, counts, values)
        axes.set_title(task, fontsize=10)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("demonstrations")
    grid[0].set_ylabel("held-out accuracy")
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def _distance(results: Results) -> Any:
    worlds = [w for w in results.worlds if any(r.what == "distance" and r.world == w for r in results.rows)]
    if not worlds:
        return None
    figure, grid = _figure(len(worlds), "L2 distance, where the prompt ends, to states with demonstrations")
    for axes, world in zip(grid, worlds, strict=True):
        rows = [row for row in results.rows if row.world == world and row.what == "distance"]
        layers = sorted({row.layer or 0 for row in rows})
        for method in STYLES:
            of = [row for row in rows if row.method == method]
            at = {layer: [row.value or 0.0 for row in of if row.layer == layer] for layer in layers}
            _line(axes, method, layers, at.__getitem__, band=False)
        axes.set_title(f"{world}, mean over tasks", fontsize=10)
        axes.set_xlabel("layer")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel("distance")
    grid[0].legend(frameon=False, fontsize=8)
    return figure
