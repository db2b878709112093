"""The table, the JSON file, and the place in the docs where the table stands."""

from __future__ import annotations

import datetime
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from benchmarks._rows import Row

DOCS_PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADINGS = ("subject", "what", "against", "ours", "theirs", "ratio", "by", "other clock", "target", "met")
PACKAGES = (
    "aidem-idempotency",
    "aioboto3",
    "aiobotocore",
    "aiosqlite",
    "anyio",
    "aws-lambda-powertools",
    "boto3",
    "fastapi",
    "hiredis",
    "idemkit",
    "redis",
    "starlette",
    "uvicorn",
)


def table(rows: Mapping[str, Iterable[Row]]) -> str:
    """Return the rows of all subjects as one Markdown table."""
    lines = [HEADINGS, *(_cells(subject, row) for subject, of_it in rows.items() for row in of_it)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _cells(subject: str, row: Row) -> tuple[str, ...]:
    return (
        subject,
        row.what,
        row.against,
        f"{_figure(row.ours)} {row.unit}",
        "" if row.theirs is None else f"{_figure(row.theirs)} {row.unit}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        row.clock,
        "" if row.other_ratio is None else f"{row.other_ratio:.2f}",
        "" if row.target is None else str(row.target),
        {None: "", True: "yes", False: "no"}[row.is_met],
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def as_json(rows: Mapping[str, Iterable[Row]], *, quick: bool) -> dict[str, Any]:
    """Return everything there is to know about a run."""
    return {
        "measured": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "quick": quick,
        "machine": machine(),
        "versions": versions(),
        "rows": [{"subject": subject} | row.as_json() for subject, of_it in rows.items() for row in of_it],
    }


def machine() -> dict[str, str | int]:
    """Return what the figures depend on and names nobody's machine."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that are measured, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def caption() -> str:
    """Return the sentence that stands above the table in the docs."""
    facts = machine()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"Measured on {datetime.datetime.now(tz=datetime.UTC).date()}: {facts['python']}, {facts['system']} on "
        f"{facts['architecture']}, {facts['cores']} cores; {packages}."
    )


def write_docs(rows: Mapping[str, Iterable[Row]], *, page: Path = DOCS_PAGE) -> None:
    """Put the table into the page, in place of the one before."""
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    text, found = between.subn(lambda _: f"\n{caption()}\n\n{table(rows)}\n\n", page.read_text(encoding="utf-8"))
    if found != 1:
        raise SystemExit(f"{page.name} must have the lines {BEGIN} and {END} once, one after the other")
    page.write_text(text, encoding="utf-8")
