"""Rows and outcomes are one for each key, whatever happens to those who write them; without `complete` they are not."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.paying import SECONDS, Torture

pytestmark = pytest.mark.timeout(SECONDS)
PAYMENTS = "SELECT key, CAST(number AS TEXT) FROM payments"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "application.sqlite3"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE payments (number INTEGER PRIMARY KEY, key TEXT)")
    return path


def rows(path: Path, query: str) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_rows_and_outcomes_are_one_for_each_key_and_equal_every_answer(path: Path, tmp_path: Path) -> None:
    torture = Torture(str(path), tmp_path / "answers")
    torture.run()
    torture.drain()
    payments = rows(path, PAYMENTS)
    torture.report(payments)
    outcomes = rows(path, "SELECT data, status FROM aidem_records WHERE status = 'COMPLETED'")
    torture.check(payments, [number for number, _ in outcomes])


def test_without_completion_in_the_transaction_some_keys_are_paid_twice(path: Path, tmp_path: Path) -> None:
    torture = Torture(str(path), tmp_path / "answers", "apart")
    torture.run()
    payments = rows(path, PAYMENTS)
    torture.report(payments)
    assert len(payments) > len(dict(payments))
