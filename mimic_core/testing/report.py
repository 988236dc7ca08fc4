"""The report of the conformance kit: one row for each law."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Row:
    """The result of one law.

    Attributes:
        law: The name of the law.
        verdict: "passed", "failed" or "not applicable".
        detail: The findings with numbers, or why the law is not applicable.
        says: The law in a sentence.
        seconds: How long it took.
    """

    law: str
    verdict: Verdict
    detail: str
    says: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """The results of one model. `print(report)` shows them as a table.

    Attributes:
        name: The given name of the model, or else its class.
        adapter: The class of its adapter, or "none".
        attention: Its attention implementation.
        dtype: The dtype of its parameters.
        rows: One for each law, in the order in which they ran.
        versions: The versions of torch and transformers.
    """

    name: str
    adapter: str
    attention: str
    dtype: str
    rows: tuple[Row, ...]
    versions: dict[str, str]

    def __getitem__(self, law: str) -> Row:
        """The row of a law.

        Raises:
            KeyError: there is no law of that name.
        """
        for row in self.rows:
            if row.law == law:
                return row
        raise KeyError(f"no law is called {law!r}; the laws are: {', '.join(row.law for row in self.rows)}")

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.verdict == "failed")

    @property
    def ok(self) -> bool:
        """Whether no row failed. Rows may be not applicable."""
        return not self.failures

    @property
    def seconds(self) -> float:
        """How long all laws took."""
        return sum(row.seconds for row in self.rows)

    def raise_for_failures(self) -> None:
        """Raise an error if a law failed.

        Raises:
            AssertionError: a law failed. The message has the failed rows.
        """
        if not self.ok:
            raise AssertionError(
                f"{len(self.failures)} of {len(self.rows)} laws failed on {self._title()}:\n{_table(self.failures)}"
            )

    def __str__(self) -> str:
        counts = dict.fromkeys(("passed", "failed", "not applicable"), 0)
        for row in self.rows:
            counts[row.verdict] += 1
        summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
        return f"{self._title()}\n{_table(self.rows)}\n{summary}; {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data, with `ok` and `seconds`."""
        data = asdict(self)
        return data | {"rows": list(data["rows"]), "ok": self.ok, "seconds": self.seconds}

    def to_json(self) -> str:
        """`to_dict` as a string."""
        return json.dumps(self.to_dict(), indent=2)

    def _title(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.name}: {self.adapter}, {self.attention}, {self.dtype} ({versions})"


def _table(rows: tuple[Row, ...]) -> str:
    width = max((len(row.law) for row in rows), default=0)
    lines = []
    for row in rows:
        # Indent the further lines of a message to its column.
        detail = row.detail.replace("\n", f"\n{' ' * (width + 18)}")
        lines.append(f"{row.law:{width}}  {row.verdict:14}  {detail}".rstrip())
    return "\n".join(lines)
