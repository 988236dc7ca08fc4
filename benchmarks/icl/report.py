"""Tables and pages of the results, from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

from ..records import ROOT
from ..report import table, with_results
from . import figures
from .methods import ABLATIONS, LABELS, MAIN, PROMPTED, TAKEN
from .plan import CURVE, CURVE_SAMPLES, CURVES, LEARNING, LOOKED_AT, REFERENCE, VARIED
from .results import MODELS, Results, spread
from .rows import Job, Row

README_BEGIN = "<!-- results: begin, written by python -m benchmarks.icl -->"
README_END = "<!-- results: end -->"


def comparison(results: Results, world: str, methods: Sequence[str], tasks: Sequence[str] = ()) -> str:
    """A line a method: accuracy by task, share of the gap, and what it costs."""
    tasks = tasks or results.tasks(world)
    head = ["method", *tasks, "gap closed", "parameters", "bytes", "prompt tokens", "first token", "per token"]
    lines = []
    for label, method, shots in results.lines(world, methods):
        cells = [results.cell(world, task, method, shots) for task in tasks]
        parameters, size = (results.one(world, method, name, shots) for name in ("parameters", "bytes"))
        tokens = results.one(world, method, "prompt_tokens", shots)
        timed = method != "icl" or shots == results.most_shots(world)
        lines.append(
            [
                label,
                *cells,
                results.mean_share(world, method, shots, tasks),
                f"{parameters:,.0f}" if parameters else "-",
                f"{size:,.0f}" if size else "-",
                f"{tokens:.0f}",
                *(results.time(world, method, what) if timed else "-" for what in ("first token", "token")),
            ]
        )
    return table(head, lines)


def standing(results: Results, world: str) -> str:
    """Over all tasks: each method against MimIC, and its mean rank."""
    compared = ("zero-shot", *TAKEN, *MAIN)
    ranks, tasks = results.ranks(world, compared), results.tasks(world)
    lines = []
    for label, method, shots in results.lines(world, (*compared[:1], "icl", "best-of", "retrieval", *compared[1:])):
        found = None if method == REFERENCE else results.difference(world, method, tasks, shots)
        if found is None and method not in ranks:
            continue
        numbers = "-"
        if found is not None:
            text = f"{found.mean * 100:+.1f}"
            text = f"**{text}**" if found.counts else text
            numbers = f"{text} [{found.low * 100:.1f}, {found.high * 100:.1f}]"
        lines.append([label, numbers, f"{ranks[method]:.1f}" if method in ranks and not shots else "-"])
    return table(["method", "accuracy less MimIC's, points", "mean rank"], lines) if lines else ""


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


def text(rows: Iterable[Row], jobs: Iterable[Job] = ()) -> str:
    """The tables, for the terminal."""
    results = Results(rows, jobs)
    return "\n\n".join(part for world in results.worlds for part in tables(results, world))


def tables(results: Results, world: str) -> Iterator[str]:
    """The comparison of a world, and of the variations tried there, under headings."""
    yield f"## {MODELS[world]}"
    yield comparison(results, world, (*PROMPTED, *TAKEN, *MAIN, "mimic+lora"))
    against = standing(results, world)
    if against:
        yield "### Over all tasks"
        yield against
    tasks = [task for task in VARIED.get(world, ()) if task in results.tasks(world)]
    varied = [method for method in ABLATIONS if any(results.accuracies(world, task, method) for task in tasks)]
    if varied:
        yield "### Variations"
        yield comparison(results, world, ("mimic", "live", *varied), tasks)
    for title, part in (("Asked otherwise", asked_otherwise(results, world)), ("Training", training(results, world))):
        if part:
            yield f"### {title}"
            yield part
    curve = by_samples(results, world)
    if curve:
        yield "### By training samples"
        yield curve


def asked_otherwise(results: Results, world: str) -> str:
    """Accuracy on the same questions in another form, on which nothing was trained."""
    of = {(row.task, row.what) for row in results.rows if row.world == world and row.what.startswith("accuracy,")}
    tasks = [task for task in results.tasks(world) if any(task == one for one, _ in of)]
    columns = [(task, what) for task in tasks for what in ("accuracy", *sorted(w for one, w in of if one == task))]
    lines = []
    for label, method, shots in results.lines(world, (*PROMPTED, *TAKEN, *LEARNING)):
        cells = [results.cell(world, task, method, shots, what=what) for task, what in columns]
        if any(cell != "-" for (_, what), cell in zip(columns, cells, strict=True) if what != "accuracy"):
            lines.append([label, *cells])
    heads = [what.replace("accuracy", task) for task, what in columns]
    return table(["method", *heads], lines) if lines else ""


def training(results: Results, world: str) -> str:
    """Time and memory of a training step, and the steps to 95% of the demonstrations' accuracy."""
    tasks = [task for task in results.tasks(world) if (world, task) in LOOKED_AT]
    lines = []
    for method in LEARNING:
        steps = [results.steps_to(world, task, method) for task in tasks]
        step, memory = (results.number(world, method, what) for what in ("training step", "training memory"))
        if not any(steps) and step is None:
            continue
        cells = []
        for found in steps:
            reached = [one for one in found if one is not None]
            cells.append(" / ".join("-" if one is None else str(one) for one in found) or "-")
            is_known = found and len(reached) == len(found) and step is not None
            cells.append(f"{median(reached) * (step or 0):.0f}" if is_known else "-")
        costs = [f"{step:.2f}" if step else "-", f"{memory / 1e6:.1f}" if memory else "-"]
        lines.append([LABELS[method], *costs, *cells])
    heads = [f"{task}, {what}" for task in tasks for what in ("steps to 95%, by seed", "time to 95%, in steps of LoRA")]
    return table(["method", "a step over LoRA's", "MB of a step", *heads], lines) if lines else ""


def by_samples(results: Results, world: str) -> str:
    """Accuracy of some methods by the number of training samples."""
    lines = []
    for task in results.tasks(world):
        for method in (*CURVE, "icl") if (world, task) in CURVES else ():
            shots = results.most_shots(world) if method == "icl" else 0
            cells = [results.cell(world, task, method, shots, count) for count in CURVE_SAMPLES]
            if any(cell != "-" for cell in cells[:-1]):
                lines.append([LABELS[method], task, *cells])
    return table(["method", "task", *(f"{count} samples" for count in CURVE_SAMPLES)], lines, left=2) if lines else ""


def missing(results: Results) -> str:
    """What of the plan has not been run, in a sentence; empty if nothing is missing."""
    short = [f"{count} of {of} for {MODELS[world]}" for world, (count, of) in results.missing().items() if count]
    if not short:
        return ""
    return (
        f"**This run is not complete.** Jobs that are missing: {'; '.join(short)}. A cell with fewer seeds than "
        f"planned says how many it has. A number over several tasks is there only if all of its jobs are."
    )


def page(rows: Sequence[Row], pictures: Sequence[Path], jobs: Iterable[Job] = ()) -> str:
    """The results, readable by themselves."""
    results = Results(rows, jobs)
    dates = sorted({row.date for row in rows})
    first = rows[0]
    parts = [
        "# In-context learning, recovered",
        "Written by `python -m benchmarks.icl` from [icl.csv](icl.csv), which has every seed and task. What was "
        "measured, and what it says, is in [../in-context.md](../in-context.md).",
        missing(results),
        f"Held-out accuracy in percent; mean ± standard deviation over seeds, which draw rules, samples and "
        f"demonstrations. **Bold**: differs from MimIC on the same questions; a difference counts if the 95% interval "
        f"of a paired bootstrap over seeds and questions leaves out zero. Where the rows do not say which questions "
        f"were answered right, nothing is bold. **Gap closed**: (accuracy - zero-shot) / (most demonstrations - "
        f"zero-shot), mean over tasks. **Bytes**: size of the files. **First token**, **per token**: time over the "
        f"unpatched model's without demonstrations, one question at a time, one thread, where it was measured. "
        f"{first.device}, torch {first.torch}, transformers {first.transformers}, {dates[0]} to {dates[-1]}.",
    ]
    parts = [part for part in parts if part]
    for world in results.worlds:
        parts += tables(results, world)
        if any(row.world == world and row.also == "distance shots" for row in rows):
            parts += [
                "### Demonstrations added to a shifted model",
                added_demonstrations(results, world),
            ]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def headline(rows: Iterable[Row], jobs: Iterable[Job] = ()) -> str:
    """A short table for the README."""
    results = Results(rows, jobs)
    methods = ("task-vector", "function-vector", "live", "lora", "mimic")
    head = ["share of the gap closed, percent", *(MODELS[world] for world in results.worlds)]
    lines = []
    for method in methods:
        lines.append([LABELS[method], *(results.mean_share(world, method) for world in results.worlds)])
    return table(head, lines)


def write(rows: Sequence[Row], folder: Path, into_readme: bool, jobs: Sequence[Job] = ()) -> list[Path]:
    """The page and its pictures; the README's table too, if they are the project's results."""
    pictures = figures.draw(Results(rows, jobs), folder)
    written = folder / "README.md"
    written.write_text(page(rows, pictures, jobs))
    if into_readme:
        readme = ROOT / "README.md"
        readme.write_text(with_results(readme.read_text(), headline(rows, jobs), README_BEGIN, README_END))
    return [written, *pictures]
