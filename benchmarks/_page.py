"""The page of the documentation: the last results of every subject, in tables by question, and as drawings.

`results.json` keeps what was measured last of each subject, so that a run of some subjects leaves the others alone. In
the page, each `<!-- table: NAME -->` is followed by the table of a subject, or one of `_TABLES`, up to `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import _plots, _report
from benchmarks._rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

RESULTS = Path(__file__).with_name("results.json")
DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(?<=<!-- table: )(?P<name>\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
NAMES = {"aidem-idempotency": "aidem", "aws-lambda-powertools": "Powertools"}
LAYERS = {
    "memory": "memory",
    "sqlite": "SQLite",
    "redis": "Redis",
    "postgres": "PostgreSQL",
    "dynamodb": "DynamoDB",
}
"""The subjects of persistence layers, whose calls cost what the page's first question asks."""


def write(measured: Mapping[str, Iterable[Row]], *, results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Keep what was measured, and write the page and its drawings from all that is kept."""
    kept: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    for subject, rows in measured.items():
        kept[subject] = _report.facts() | {"rows": [row.as_json() for row in rows]}
    text = json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False)
    results.write_text(f"{text}\n", encoding="utf-8")
    rows_of = {subject: [Row.from_json(row) for row in run["rows"]] for subject, run in kept.items()}
    page = docs / "benchmarks.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(
        BLOCK.sub(lambda block: f"{block[1]}{block[2]}\n{_block(block[1], kept, rows_of)}\n\n", before), "utf-8"
    )
    _plots.draw_costs(
        {LAYERS[name]: rows_of[name] for name in LAYERS if name in rows_of}, docs / "diagrams" / "cost.svg"
    )
    _plots.draw_growth(
        {LAYERS[name]: rows_of[name] for name in LAYERS if name in rows_of}, docs / "diagrams" / "growth.svg"
    )


def _block(name: str, kept: Mapping[str, Any], rows_of: Mapping[str, list[Row]]) -> str:
    if name in _TABLES:
        return _TABLES[name](kept, rows_of)
    if name not in rows_of:
        return "Not measured yet."
    return _comparison([row for row in rows_of[name] if not row.is_growth])


def _comparison(rows: Iterable[Row]) -> str:
    return _table(
        ("what", "aidem", "compared with", "ratio", "target"),
        (
            (
                row.what,
                figure(row.ours, row.unit),
                "" if row.theirs is None else f"{row.against}: {figure(row.theirs, row.unit)}",
                ratio(row),
                target(row),
            )
            for row in rows
        ),
    )


def _costs(_kept: Mapping[str, Any], rows_of: Mapping[str, list[Row]]) -> str:
    """Return what a call costs on each layer, one at a time, and how often it asks the store."""
    return _table(
        ("layer", "first call", "replay", "requests of each"),
        (
            (
                LAYERS[name],
                _first_figure(rows_of[name], r"first call.*"),
                _first_figure(rows_of[name], r"replay.*"),
                _requests(rows_of[name]),
            )
            for name in LAYERS
            if name in rows_of
        ),
    )


def _requests(rows: list[Row]) -> str:
    counts = [_first_figure(rows, rf"\w+ of a {what}").partition(" ")[0] for what in ("first call", "replay")]
    return " and ".join(filter(None, counts))


def _first_figure(rows: Iterable[Row], what: str) -> str:
    """Return the figure of the first such row that is no rate and not about growth."""
    found = (row for row in rows if re.fullmatch(what, row.what) and row.unit != "calls/s" and not row.is_growth)
    return next((figure(row.ours, row.unit) for row in found), "")


def _growth(_kept: Mapping[str, Any], rows_of: Mapping[str, list[Row]]) -> str:
    return _table(
        ("layer", "what", "time", "among a thousand", "ratio", "target"),
        (
            (
                LAYERS[name],
                row.what,
                figure(row.ours, row.unit),
                figure(row.theirs or 0, row.unit),
                ratio(row),
                target(row),
            )
            for name in LAYERS
            for row in rows_of.get(name, [])
            if row.is_growth
        ),
    )


def _runs(kept: Mapping[str, Any], _rows_of: Mapping[str, list[Row]]) -> str:
    """Return when and on what the subjects were measured, those of one run together."""
    runs: dict[str, list[str]] = {}
    for subject, run in kept.items():
        machine = run["machine"]
        packages = ", ".join(f"{NAMES.get(name, name)} {version}" for name, version in run["versions"].items())
        facts = (
            f"{run['measured']}: {machine['python']}, {machine['system']} on {machine['architecture']}, "
            f"{machine['cores']} cores; {packages}."
        )
        runs.setdefault(facts, []).append(subject)
    return "\n".join(f"- `{'`, `'.join(sorted(subjects))}` on {facts}" for facts, subjects in runs.items())


_TABLES: dict[str, Callable[[Mapping[str, Any], Mapping[str, list[Row]]], str]] = {
    "costs": _costs,
    "growth": _growth,
    "runs": _runs,
}


def _table(headings: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [headings, tuple("---" for _ in headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figure(value: float, unit: str) -> str:
    """Return a figure as one would say it: three digits, times in the unit that suits them."""
    if unit == "µs":
        scale, unit = next(
            (scale, unit) for scale, unit in ((1e6, "s"), (1e3, "ms"), (1, "µs")) if value >= scale or scale == 1
        )
        value /= scale
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def ratio(row: Row) -> str:
    """Return the ratio with its meaning, as less is better for times and more for rates."""
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2f} of its {'rate' if row.unit == 'calls/s' else 'time'}"


def target(row: Row) -> str:
    """Return the target, and whether it was met."""
    return "" if row.target is None else f"{row.target}: {'met' if row.is_met else '**missed**'}"
