"""Items and outcomes are one for each key, whatever happens to those who write them; without `completion_item` they
are not.

On ministack alone: it carries out one request after the other, so that a transaction is atomic.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.aws_servers import OTHER_URL, Database
from tests.support.paying import SECONDS, Torture

pytestmark = [pytest.mark.server, pytest.mark.timeout(SECONDS)]


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Database:
    return Database(OTHER_URL or request.getfixturevalue("ministack_url"))


@pytest.fixture
def client_environment(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)


class Tables:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.records, self.payments = database.create_table(), database.create_table()

    def tortured(self, log: Path, how: str) -> Torture:
        return Torture(f"dynamodb://{self.records}/{self.payments}", log, how, self.database.environment)

    def paid(self) -> list[tuple[str, str]]:
        return [(item["key"]["S"], item["id"]["S"]) for item in self.database.items(self.payments)]

    def outcomes(self) -> list[str]:
        items = self.database.items(self.records)
        return [item["data"]["S"] for item in items if item["status"]["S"] == "COMPLETED"]


@pytest.fixture
def tables(database: Database, client_environment: None) -> Tables:
    return Tables(database)


def test_items_and_outcomes_are_one_for_each_key_and_equal_every_answer(tables: Tables, tmp_path: Path) -> None:
    torture = tables.tortured(tmp_path / "answers", "together")
    torture.run()
    torture.drain()
    payments = tables.paid()
    torture.report(payments)
    torture.check(payments, tables.outcomes())


def test_without_completion_in_the_request_some_keys_are_paid_twice(tables: Tables, tmp_path: Path) -> None:
    torture = tables.tortured(tmp_path / "answers", "apart")
    torture.run()
    payments = tables.paid()
    torture.report(payments)
    assert len(payments) > len(dict(payments))
