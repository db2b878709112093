"""The page of benchmarks is written from the results that are kept; no run of some subjects loses those of others."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import _page
from benchmarks._rows import A_THOUSAND, Row, at_least, at_most
from benchmarks._subjects import SUBJECTS

PAGE = _page.DOCS / "benchmarks.md"
ROW = Row(
    what="first call",
    against="a peer",
    ours=1234,
    theirs=98765,
    unit="µs",
    ratio=0.0125,
    target=at_most(1),
    clock="cpu",
)
REPLAY = dataclasses.replace(ROW, what="replay")


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """The results and the page, to be changed."""
    results = Path(shutil.copy(_page.RESULTS, tmp_path))
    (tmp_path / "diagrams").mkdir()
    shutil.copy(PAGE, tmp_path)
    return results, tmp_path


def table_of(page: Path, name: str) -> list[str]:
    [block] = re.findall(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", page.read_text("utf-8"), re.DOTALL)
    return [line for line in block.splitlines() if line]


def test_the_page_is_that_of_the_results(copies: tuple[Path, Path]) -> None:
    results, docs = copies
    _page.write({}, results=results, docs=docs)
    assert (docs / PAGE.name).read_text("utf-8") == PAGE.read_text("utf-8")
    assert results.read_text("utf-8") == _page.RESULTS.read_text("utf-8")


def test_a_run_of_one_subject_replaces_its_rows_and_no_others(copies: tuple[Path, Path]) -> None:
    results, docs = copies
    _page.write({"memory": [ROW, REPLAY]}, results=results, docs=docs)
    assert table_of(docs / PAGE.name, "memory")[2:] == [
        f"| {what} | 1.23 ms | a peer: 98.8 ms | 0.01 of its time | ≤ 1: met |" for what in ("first call", "replay")
    ]
    assert table_of(docs / PAGE.name, "redis") == table_of(PAGE, "redis")
    before, after = (json.loads(path.read_text("utf-8")) for path in (_page.RESULTS, results))
    assert after.pop("memory")["rows"] == [ROW.as_json(), REPLAY.as_json()]
    del before["memory"]
    assert after == before


def test_the_page_has_a_table_for_every_subject() -> None:
    named = re.findall(r"<!-- table: (\w+) -->", PAGE.read_text("utf-8"))
    assert sorted(named) == sorted([*SUBJECTS, "costs", "growth", "runs"])


def test_times_and_rates_are_drawn_and_growth_is_drawn_up_to_a_million(copies: tuple[Path, Path]) -> None:
    results, docs = copies
    grown = [
        Row(what=f"first call among {size:,} records", against=A_THOUSAND, ours=2, theirs=1, unit="µs", ratio=2.0)
        for size in (10_000, 1_000_000)
    ]
    _page.write({"memory": [ROW, REPLAY, *grown]}, results=results, docs=docs)
    costs, growth = ((docs / "diagrams" / f"{name}.svg").read_text("utf-8") for name in ("cost", "growth"))
    assert [f">{text}<" in costs for text in ("1.23 ms", "98.77 ms", "a peer")] == [True] * 3
    assert [f">{text}<" in growth for text in ("1,000,000", "memory, first call")] == [True] * 2


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (8.04, "µs", "8.04 µs"),
        (405.2, "µs", "405 µs"),
        (1982, "µs", "1.98 ms"),
        (590_730, "µs", "591 ms"),
        (17_151.3, "calls/s", "17,151 calls/s"),
        (2, "requests", "2 requests"),
    ],
)
def test_a_figure_has_three_digits_in_a_unit_that_suits_it(value: float, unit: str, said: str) -> None:
    assert _page.figure(value, unit) == said


def test_a_ratio_says_of_what_it_is_and_a_target_whether_it_is_met() -> None:
    rate = Row(what="calls", against="x", ours=1, theirs=2, unit="calls/s", ratio=0.5, target=at_least(1))
    assert (_page.ratio(rate), _page.target(rate)) == ("0.50 of its rate", "≥ 1: **missed**")
    assert (_page.ratio(ROW), _page.target(ROW)) == ("0.01 of its time", "≤ 1: met")
