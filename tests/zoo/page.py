"""The support matrix: a line for each model type, and the page made of the lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimic_core.testing import LAWS
from mimic_core.types import ATTENTION_SITES

Row = Mapping[str, Any]
Line = Mapping[str, Any]
_TITLES = {"image-text-to-text": "Image-text-to-text", "causal-lm": "Causal language models"}
_MARKS = {"passed": "✓", "failed": "✗", "not applicable": "-"}
SERVED = ("MimIC and LIVE", "without the gate", "outputs alone")
"""What a type can be served with, the most first."""


def serves(row: Row) -> str:
    """What a type passes every applicable law with: one of `SERVED`, "refused" or "failed"."""
    if row.get("refused"):
        return "refused"
    laws = _laws(row)
    if row.get("crashed") or "failed" in laws.values() or laws.get("LIVE") != "passed":
        return "failed"
    if not any(set(ATTENTION_SITES) <= set(layer["sites"]) for layer in row["layers"]):
        return SERVED[2]
    return SERVED[0] if laws["lse"] == "passed" and laws["MimIC"] == "passed" else SERVED[1]


def lines_of(newest: Iterable[Row], lowest: Iterable[Row]) -> list[Line]:
    """What is kept of the rows: first the versions, then a line for each type of the newest transformers.

    Of the oldest transformers only the outcome is kept.
    """
    newest, lowest = list(newest), list(lowest)
    others = {(row["task"], row["type"]): serves(row) for row in lowest}
    versions = {"newest": _versions(newest), "lowest": _versions(lowest)}
    ordered = sorted(newest, key=lambda row: (row["task"] != "image-text-to-text", row["type"]))
    return [versions, *(_line(row, others.get((row["task"], row["type"]), "not there")) for row in ordered)]


def _line(row: Row, lowest: str) -> Line:
    laws, layers = _laws(row), row.get("layers", [])
    attended = sum(1 for layer in layers if set(ATTENTION_SITES) <= set(layer["sites"]))
    return {
        "type": row["type"],
        "task": row["task"],
        "class": row.get("class", ""),
        "served": serves(row),
        "lowest": lowest,
        "attention": f"{attended}/{len(layers)}" if layers else "",
        "laws": "".join(_MARKS.get(laws.get(law.name, ""), " ") for law in LAWS).rstrip(),
        "why": _why(row),
    }


def updated(before: Sequence[Line], found: Sequence[Line]) -> list[Line]:
    """The lines of a page with those of some types anew. What is known of the oldest transformers stays.

    Raises:
        ValueError: the new lines are of other versions than the page.
    """
    if before[0]["newest"] != found[0]["newest"]:
        raise ValueError(f"the page is of {before[0]['newest']}, these types ran with {found[0]['newest']}")
    again = {(line["task"], line["type"]): line for line in found[1:]}
    lines = [(line, again.pop((line["task"], line["type"]), line)) for line in before[1:]]
    lines = [{**new, "lowest": old["lowest"]} for old, new in lines] + list(again.values())
    return [before[0], *sorted(lines, key=lambda line: (line["task"] != "image-text-to-text", line["type"]))]


def write(lines: Iterable[Line], path: Path) -> None:
    """The lines as JSON, and the page beside them."""
    lines = list(lines)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    path.write_text(page(lines))


def read(path: Path) -> list[Line]:
    """The lines that `write` has left beside a page."""
    return [json.loads(text) for text in path.with_suffix(".jsonl").read_text().splitlines()]


def summary(lines: Iterable[Line]) -> str:
    """How many types are served with what, for each mapping."""
    found = []
    for task, title in _TITLES.items():
        counts = Counter(line["served"] for line in lines if line.get("task") == task)
        if counts:
            parts = [f"{counts[name]} {name}" for name in (*SERVED, "refused", "failed") if counts[name]]
            found.append(f"{title}: {sum(counts.values())} types; {', '.join(parts)}")
    return "\n".join(found)


def _of_lowest(types: Iterable[Line]) -> str:
    counts = Counter(line["lowest"] for line in types)
    return ", ".join(f"{counts[name]} {name}" for name in (*SERVED, "refused", "failed", "not there") if counts[name])


def page(lines: Sequence[Line]) -> str:
    """The page in Markdown: the types that work completely, the others and why, then every law."""
    versions, types = lines[0], lines[1:]
    parts = [
        "# Support matrix\n",
        "`python -m tests.zoo` writes this page. It runs the conformance kit over a tiny random model of every model "
        f"type that transformers loads, with {versions['newest']}. The column `lowest` has the result with "
        f"{versions['lowest']}.\n",
        summary(types).replace("\n", "\n\n") + "\n",
        f"Of these types, with the lowest versions: {_of_lowest(types)}.\n",
    ]
    for task, title in _TITLES.items():
        whole = [f"`{line['type']}`" for line in types if line["task"] == task and line["served"] == SERVED[0]]
        parts.append(f"**{title}, everything works** (MimIC and LIVE): {', '.join(whole)}.\n")
    parts += [
        "## What works only in part or not at all, and why\n",
        _short([line for line in types if line["served"] != SERVED[0]]),
    ]
    parts += ["## Every law\n", _legend()]
    for task, title in _TITLES.items():
        parts += [f"### {title}\n", _table([line for line in types if line["task"] == task])]
    return "\n".join(parts)


def _versions(rows: Iterable[Row]) -> str:
    return " and ".join(
        sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows if "versions" in row})
    )


def _legend() -> str:
    laws = "\n".join(f"{n}. **{law.name}**: {law.says}" for n, law in enumerate(LAWS, 1))
    return (
        "Each type runs with sdpa and with eager attention, on text, and with images if it supports them. A mark is "
        "the worst result of these runs: ✓ passed, - not applicable in all runs, ✗ failed; none: not run yet. "
        "*Attention* is the number of decoder layers with all attention sites, of all decoder layers of the tiny "
        "model. *Served* is what works: everything; everything but the gate, because the LSE is refused with an error; "
        "only the output sites.\n\n"
        f"{laws}\n"
    )


def _short(lines: Iterable[Line]) -> str:
    return _markdown(
        ["type", "served", "lowest", "why"], [[_type(x), x["served"], x["lowest"], x["why"]] for x in lines]
    )


def _table(lines: Iterable[Line]) -> str:
    head = ["type", "class", "served", "lowest", "attention", *(str(n) for n in range(1, len(LAWS) + 1)), "why"]
    cells = []
    for x in lines:
        marks = [mark.strip() for mark in x["laws"].ljust(len(LAWS))]
        cells.append([_type(x), x["class"], x["served"], x["lowest"], x["attention"], *marks, x["why"]])
    return _markdown(head, cells)


def _type(line: Line) -> str:
    return f"`{line['type']}`"


def _markdown(head: list[str], cells: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells]) + "\n"


def _laws(row: Row) -> dict[str, str]:
    """The worst verdict of each law over the runs."""
    runs = [run["laws"] for run in row["runs"] if "laws" in run]
    worst = {}
    for law in {name for run in runs for name in run}:
        seen = {run[law] for run in runs if law in run}
        worst[law] = next(verdict for verdict in ("failed", "passed", "not applicable") if verdict in seen)
    return worst


def _why(row: Row) -> str:
    reasons = [row.get("refused", ""), row.get("crashed", "")]
    reasons += [layer["missing"] for layer in row.get("layers", [])]
    reasons += [run["skipped"] for run in row["runs"] if "skipped" in run]
    for run in row["runs"]:
        laws = run.get("laws", {})
        details = run.get("details", {})
        reasons += [f"{law}: {details[law]}" for law in laws if laws[law] == "failed"]
        reasons += [details["lse"]] if laws.get("lse") == "not applicable" and "refused" in details["lse"] else []
    text = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 300 else f"{text[:297]}..."
