"""The table of a run, and the JSON file."""

from __future__ import annotations

import datetime
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from benchmarks._rows import Row

HEADINGS = ("subject", "what", "against", "ours", "theirs", "ratio", "by", "other clock", "target", "met")
PACKAGES = (
    "aidem-idempotency",
    "aioboto3",
    "aiobotocore",
    "aiosqlite",
    "anyio",
    "asyncpg",
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
    return facts() | {
        "quick": quick,
        "rows": [{"subject": subject} | row.as_json() for subject, of_it in rows.items() for row in of_it],
    }


def facts() -> dict[str, Any]:
    """Return when and on what it is measured."""
    measured = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"measured": measured, "machine": machine(), "versions": versions()}


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
