"""Rows and outcomes are one for each key, whatever happens to those who write them; without `complete` they are not."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.paying import start_worker

WORKERS = 4
KEYS = 50
MAX_LIVES = 400


class Service:
    """Workers on one file, each replaced when it dies, until as many have lived to the end."""

    def __init__(self, directory: Path, how: str) -> None:
        self.path = directory / "application.sqlite3"
        self.log = directory / "answers"
        self.how = how
        self.lives = 0
        self.kills = 0
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE payments (number INTEGER PRIMARY KEY, key TEXT)")

    def start(self) -> subprocess.Popen[bytes]:
        self.lives += 1
        assert self.lives < MAX_LIVES
        return start_worker(self.path, self.log, seed=self.lives, keys=KEYS, how=self.how)

    def run(self) -> None:
        workers = [self.start() for _ in range(WORKERS)]
        while workers:
            worker = workers.pop(0)
            ended = worker.wait(timeout=60)
            assert ended in {0, -signal.SIGKILL}
            if ended != 0:
                self.kills += 1
                workers.append(self.start())

    def answers(self) -> list[tuple[str, str]]:
        return [(key, answer) for key, answer in map(str.split, self.log.read_text().splitlines())]

    def rows(self, query: str) -> list[tuple[str, str]]:
        with closing(sqlite3.connect(self.path)) as connection:
            return [(key, str(value)) for key, value in connection.execute(query)]


@pytest.mark.timeout(150)
def test_rows_and_outcomes_are_one_for_each_key_and_equal_every_answer(tmp_path: Path) -> None:
    service = Service(tmp_path, "together")
    service.run()
    payments = service.rows("SELECT key, number FROM payments")
    assert service.kills > 0
    answers = service.answers()
    told = [(key, answer) for key, answer in answers if answer.isdigit()]
    errors = Counter(answer for _, answer in answers if not answer.isdigit())
    print(f"\nSQLite: {len(answers)} answers, {service.kills} kills, {dict(errors)}")  # noqa: T201
    assert set(told) <= set(payments)
    assert len(payments) == len(dict(payments)) == KEYS
    outcomes = service.rows("SELECT data, status FROM aidem_records")
    assert sorted(number for number, status in outcomes if status == "COMPLETED") == sorted(n for _, n in payments)
    assert errors["BrokenOffError"] > 0
    assert errors["TimeoutError"] > 0
    assert errors["IdempotencyLeaseLostError"] > 0


@pytest.mark.timeout(150)
def test_without_completion_in_the_transaction_some_keys_are_paid_twice(tmp_path: Path) -> None:
    service = Service(tmp_path, "apart")
    service.run()
    payments = service.rows("SELECT key, number FROM payments")
    assert len(payments) > len(dict(payments))
