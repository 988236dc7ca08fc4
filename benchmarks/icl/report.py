"""Tables and pages of the results, from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..records import ROOT
from ..report import table, with_results
from . import figures
from .methods import ABLATIONS, LABELS, MAIN, TAKEN
from .plan import VARIED
from .results import MODELS, Results, spread
from .rows import Row
from .setups import SETUPS

README_BEGIN = "<!-- results: begin, written by python -m benchmarks.icl -->"
README_END = "<!-- results: end -->"


def comparison(results: Results, world: str, methods: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line a method: accuracy by task, share of the gap, and what it costs."""
    tasks = tasks or results.tasks(world)
    head = ["method", *tasks, "gap closed", "parameters", "samples", "seconds", "prompt tokens"]
    head += ["first token", "per token"]
    lines = []
    for label, method, shots in results.lines(world, methods):
        found = [results.accuracies(world, task, method, shots) for task in tasks]
        cells = [spread(values) if values else "-" for values in found]
        parameters, seconds = (results.one(world, method, name, shots) for name in ("parameters", "seconds"))
        tokens = results.one(world, method, "prompt_tokens", shots)
        timed = method != "icl" or shots == results.most_shots(world)
        lines.append(
            [
                label,
                *cells,
                results.mean_share(world, method, shots, tasks),
                f"{parameters:,.0f}" if parameters else "-",
                str(SETUPS[world].samples) if method != "zero-shot" else "0",
                f"{seconds:.0f}" if seconds else "-",
                f"{tokens:.0f}",
                *(results.time(world, method, what) if timed else "-" for what in ("first token", "token")),
            ]
        )
    return table(head, lines)


def added_demonstrations(results: Results, world: str) -> str:
    """Accuracy of shifted models that get demonstrations as well."""
    counts = sorted({row.shots or 0 for row in results.rows if row.world == world and row.also == "distance shots"})
    lines = []
    for method in ("live", "mimic"):
        for task in results.tasks(world):
            found = [results.accuracies(world, task, method, count) for count in counts]
            if any(found):
                lines.append([LABELS[method], task, *(spread(values) if values else "-" for values in found)])
    return table(["method", "task", *(f"{count} added" for count in counts)], lines, left=2)


def text(rows: Iterable[Row]) -> str:
    """The tables, for the terminal."""
    results = Results(rows)
    return "\n\n".join(part for world in results.worlds for part in tables(results, world))


def tables(results: Results, world: str) -> Iterator[str]:
    """The comparison of a world, and of the variations tried there, under headings."""
    yield f"## {MODELS[world]}"
    yield comparison(results, world, ("zero-shot", "icl", "retrieval", *TAKEN, *MAIN))
    if list(results.lines(world, ABLATIONS)):
        yield "### Variations"
        yield comparison(results, world, ("mimic", "live", *ABLATIONS), VARIED)


def page(rows: Sequence[Row], pictures: Sequence[Path]) -> str:
    """The results, readable by themselves."""
    results = Results(rows)
    first = rows[0]
    seeds = [len({r.seed for r in rows if r.world == world and r.seed is not None}) for world in results.worlds]
    many = f"{max(seeds)} seeds" + (f" ({min(seeds)} with words)" if min(seeds) < max(seeds) else "")
    parts = [
        "# In-context learning, recovered",
        "Written by `python -m benchmarks.icl` from [icl.csv](icl.csv), which has every seed and task. What was "
        "measured, and what it says, is in [../in-context.md](../in-context.md).",
        f"Held-out accuracy in percent; mean ± standard deviation over {many}, which draw rules, samples and "
        f"demonstrations. **Gap closed**: (accuracy - zero-shot) / (most demonstrations - zero-shot), mean over tasks. "
        f"**Seconds** of training, or of taking a vector, on one thread. **First token**, **per token**: time over the "
        f"unpatched model's without demonstrations, one question at a time, one thread. {first.device}, torch "
        f"{first.torch}, transformers {first.transformers}, {first.date}.",
    ]
    for world in results.worlds:
        parts += tables(results, world)
        if any(row.world == world and row.also == "distance shots" for row in rows):
            parts += [
                "### Demonstrations added to a shifted model",
                added_demonstrations(results, world),
            ]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def headline(rows: Iterable[Row]) -> str:
    """A short table for the README."""
    results = Results(rows)
    methods = ("task-vector", "function-vector", "live", "lora", "mimic")
    head = ["share of the gap closed, percent", *(MODELS[world] for world in results.worlds)]
    lines = []
    for method in methods:
        lines.append([LABELS[method], *(results.mean_share(world, method) for world in results.worlds)])
    return table(head, lines)


def write(rows: Sequence[Row], folder: Path, into_readme: bool) -> list[Path]:
    """The page and its pictures; the README's table too, if they are the project's results."""
    pictures = figures.draw(Results(rows), folder)
    written = folder / "README.md"
    written.write_text(page(rows, pictures))
    if into_readme:
        readme = ROOT / "README.md"
        readme.write_text(with_results(readme.read_text(), headline(rows), README_BEGIN, README_END))
    return [written, *pictures]
