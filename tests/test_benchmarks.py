"""The runner of `benchmarks/`: how it measures, what it prints and writes; not how fast anything is."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import _report
from benchmarks._fresh import result_of
from benchmarks._measure import Effort, Lap, Race, Stopwatch, race
from benchmarks._rows import Row, Target, at_least, at_most, exactly
from benchmarks._subjects import SUBJECTS, measured, rows_of

DOCS_PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def timed(laps: Iterator[Lap]) -> Callable[[Stopwatch], None]:
    """Return a contender whose rounds take what they are told."""

    def contender(stopwatch: Stopwatch) -> None:
        stopwatch.laps["first"] = next(laps)

    return contender


def test_a_row_compares_medians_by_the_median_of_the_ratios_of_the_rounds() -> None:
    ours = iter([Lap(9, 9), Lap(1, 0.5), Lap(2, 0.5), Lap(30, 0.5)])
    theirs = iter([Lap(9, 9), Lap(2, 1), Lap(2, 1), Lap(2, 1)])
    result = race({"aidem": timed(ours), "other": timed(theirs)}, rounds=3)
    row = result.times("call", lap="first", against="other", by="wall", target=at_most(1.0))
    assert (row.ours, row.theirs, row.ratio, row.other_ratio) == (2e6, 2e6, 1.0, 0.5)
    assert row.is_met


def test_a_rate_is_the_higher_the_faster() -> None:
    result = Race({"aidem": [{"first": Lap(0.01, 0.01)}], "other": [{"first": Lap(0.02, 0.01)}]})
    row = result.rates("call", lap="first", against="other", by="wall", target=at_least(1.5))
    assert (row.ours, row.theirs, row.ratio, row.other_ratio) == (100, 50, 2, 1)
    assert row.is_met


def test_the_first_round_warms_up_and_the_order_changes() -> None:
    order: list[str] = []
    names = ("aidem", "other", "third")

    def noted(name: str) -> Callable[[Stopwatch], None]:
        return lambda _stopwatch: order.append(name)

    result = race({name: noted(name) for name in names}, rounds=2)
    assert "".join(name[0] for name in order) == "aototatao"
    assert all(len(result.rounds[name]) == 2 for name in names)


def test_a_lap_is_seconds_a_call_by_both_clocks() -> None:
    stopwatch = Stopwatch()
    with stopwatch.lap("first", calls=10):
        time.sleep(0.05)
    assert stopwatch.laps["first"].wall >= 0.005
    assert stopwatch.laps["first"].cpu < stopwatch.laps["first"].wall


@pytest.mark.parametrize(
    ("target", "met", "missed"),
    [(at_most(0.6), 0.6, 0.61), (at_least(1.6), 1.6, 1.59), (exactly(2), 2.0, 2.01)],
    ids=str,
)
def test_a_target_is_met_up_to_its_bound(target: Target, met: float, missed: float) -> None:
    assert target.is_met(met)
    assert not target.is_met(missed)


def test_a_row_without_a_ratio_is_judged_by_its_figure_and_one_without_a_target_is_not_judged() -> None:
    assert Row(what="requests", ours=2, unit="requests", target=exactly(2)).is_met
    assert Row(what="requests", ours=2, unit="requests").is_met is None


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that a fresh interpreter can import, where bytecode is not to be written."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "not_compiled_before.py"
    path.write_text("answer = 42")
    return path


def test_a_fresh_interpreter_compiles_what_it_imports(module: Path) -> None:
    assert result_of("import sys, not_compiled_before; result = not_compiled_before.answer") == 42
    assert [path.name.partition(".")[0] for path in (module.parent / "__pycache__").iterdir()] == [module.stem]


def test_times_of_modules_that_cannot_be_compiled_are_refused(module: Path) -> None:
    (module.parent / "__pycache__").write_text("a file where the directory belongs")
    with pytest.raises(RuntimeError, match="no bytecode could be written"):
        result_of("import sys, not_compiled_before; result = None")


def test_the_table_is_aligned_and_says_what_is_met() -> None:
    rows = {
        "memory": [
            Row(
                what="call",
                against="x",
                ours=1234.5,
                theirs=2,
                unit="µs",
                ratio=0.614,
                clock="cpu",
                other_ratio=0.7,
                target=at_most(0.6),
            )
        ],
        "waiting": [Row(what="requests", ours=0, unit="requests", target=exactly(0))],
    }
    lines = _report.table(rows).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["memory", "call", "x", "1,234 µs", "2 µs", "0.61", "cpu", "0.70", "≤ 0.6", "no"],
        ["waiting", "requests", "", "0 requests", "", "", "", "", "= 0", "yes"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_file_holds_the_rows_the_versions_and_no_path() -> None:
    row = Row(what="call", against="x", ours=1, theirs=2, unit="µs", ratio=0.5, target=at_most(0.6), clock="cpu")
    text = json.dumps(_report.as_json({"memory": [row]}, quick=False))
    report = json.loads(text)
    assert report["rows"][0].items() >= {"subject": "memory", "what": "call", "target": "≤ 0.6", "is_met": True}.items()
    assert report["versions"].keys() >= {"aidem-idempotency", "aws-lambda-powertools", "redis"}
    assert report["machine"].keys() == {"python", "system", "architecture", "cores"}
    assert "/" not in text


def test_a_row_is_the_same_after_it_was_kept() -> None:
    for target in (at_most(0.6), exactly(2), None):
        row = Row(what="call", against="x", ours=1, theirs=2, unit="µs", ratio=0.5, target=target, clock="cpu")
        assert Row.from_json(json.loads(json.dumps(row.as_json()))) == row


def test_a_subject_that_fails_does_not_cost_the_others_their_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(["no_such_subject", "waiting"], Effort(quick=True))
    assert list(rows) == ["waiting"]
    assert "no_such_subject" in capsys.readouterr().err


def test_waiters_ask_the_store_as_little_as_is_promised() -> None:
    assert all(row.is_met for row in rows_of("waiting", Effort()))


def test_every_subject_is_described() -> None:
    described = re.findall(r"^### `(\w+)`$", DOCS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(described) == SUBJECTS
