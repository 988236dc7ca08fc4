"""The support matrix as a page: a row for each model type, a column for each law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..types import ATTENTION_SITES
from .check import LAWS

Row = Mapping[str, Any]
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


def summary(rows: Iterable[Row]) -> str:
    """How many types are served with what, for each mapping."""
    lines = []
    for task, title in _TITLES.items():
        counts = Counter(serves(row) for row in rows if row["task"] == task)
        if counts:
            parts = [f"{counts[name]} {name}" for name in (*SERVED, "refused", "failed") if counts[name]]
            lines.append(f"{title}: {sum(counts.values())} types; {', '.join(parts)}")
    return "\n".join(lines)


def page(newest: list[Row], lowest: list[Row]) -> str:
    """The page in Markdown; of `lowest`, the rows of the oldest transformers there is, only the outcome is shown."""
    versions = _versions(newest)
    others = {(row["task"], row["type"]): serves(row) for row in lowest}
    parts = [
        "# Support matrix\n",
        "Written by `python -m mimic_core.testing`, which runs the conformance kit over a tiny random model of every "
        f"model type that transformers loads. {versions}"
        + (f" The column `lowest` is the same with {_versions(lowest)}\n" if lowest else "\n"),
        summary(newest).replace("\n", "\n\n") + "\n",
        _legend(),
    ]
    for task, title in _TITLES.items():
        chosen = [row for row in newest if row["task"] == task]
        if chosen:
            parts += [f"## {title}\n", _table(chosen, others if lowest else None)]
    return "\n".join(parts)


def _versions(rows: Iterable[Row]) -> str:
    found = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows if "versions" in row})
    return f"{' and '.join(found)}."


def _legend() -> str:
    laws = "\n".join(f"{n}. **{law.name}**: {law.says}" for n, law in enumerate(LAWS, 1))
    return (
        "Each type runs with sdpa and with eager attention, on text and, where it takes them, with images. A mark is "
        "the worst of these runs: ✓ passed, - not applicable in any (the JSON beside this page has the reasons), ✗ "
        "failed. *Attention* counts the layers with all sites of attention among all decoder layers of the tiny model. "
        "*Served* is what works: everything; all but the gate, where the LSE is refused with an error; the output "
        "sites alone.\n\n"
        f"{laws}\n"
    )


def _table(rows: Iterable[Row], others: Mapping[tuple[str, str], str] | None) -> str:
    head = ["type", "class", "served", *(["lowest"] if others is not None else []), "attention"]
    head += [str(n) for n in range(1, len(LAWS) + 1)] + ["why"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        marks = _laws(row)
        layers = row.get("layers", [])
        attended = sum(1 for layer in layers if set(ATTENTION_SITES) <= set(layer["sites"]))
        cells = [f"`{row['type']}`", row.get("class", ""), serves(row)]
        if others is not None:
            cells.append(others.get((row["task"], row["type"]), "not there"))
        cells.append(f"{attended}/{len(layers)}" if layers else "")
        cells += [_MARKS.get(marks.get(law.name, ""), "") for law in LAWS]
        lines.append([*cells, _why(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


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
