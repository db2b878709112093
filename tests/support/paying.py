"""Workers of `paying_worker.py` on one database, and what must hold when they are done.

With four workers and fifty keys, as in the test suite. A longer run, which prints what happened:

    AIDEM_TORTURE_WORKERS=8 AIDEM_TORTURE_KEYS=500 python -m pytest -s tests/persistence/sqlite/test_torture.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aidem

WORKER = Path(__file__).with_name("paying_worker.py")
WORKERS = int(os.environ.get("AIDEM_TORTURE_WORKERS", "4"))
KEYS = int(os.environ.get("AIDEM_TORTURE_KEYS", "50"))
SECONDS = 6 * KEYS
CRASHES = KEYS // 25
POLL_SECONDS = 0.1
OVERLAPS = ("IdempotencyLeaseLostError", "TransactionCanceledException")


@dataclass
class Torture:
    """Workers on one database, each replaced when it dies, until as many have lived to the end.

    Attributes:
        database: What the workers are told.
        log: The file of their answers.
        how: See `paying_worker.py`.
        environment: What they need to reach the database.
    """

    database: str
    log: Path
    how: str = "together"
    environment: dict[str, str] = field(default_factory=dict)
    lives: int = 0
    kills: int = 0
    crashes: int = 0

    def run(self, crash: Callable[[], object] | None = None) -> None:
        """Let them pay all keys; meanwhile the server crashes and is started again, if there is a way."""
        self.log.touch()
        workers = [self._start(self.log, self.how) for _ in range(WORKERS)]
        try:
            self._replace(workers, crash)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()

    def _replace(self, workers: list[subprocess.Popen[bytes]], crash: Callable[[], object] | None) -> None:
        crashes_to_come = CRASHES if crash else 0
        while workers:
            is_to_crash = self.crashes < crashes_to_come
            # In the end there is an answer of each worker to each key: it crashes on the way there.
            if crash and is_to_crash and len(self.answers()) > WORKERS * KEYS * (1 + self.crashes) / (2 + CRASHES):
                crash()
                self.crashes += 1
            worker = workers[0]
            try:
                ended = worker.wait(timeout=POLL_SECONDS if is_to_crash else SECONDS)
            except subprocess.TimeoutExpired:
                assert is_to_crash, "a worker hangs"
                continue
            workers.remove(worker)
            assert ended in {0, -signal.SIGKILL}
            if ended != 0:
                self.kills += 1
                workers.append(self._start(self.log, self.how))
        assert self.crashes == crashes_to_come

    def check(self, payments: list[tuple[str, str]], outcomes: list[str]) -> None:
        """Rows are outcomes are one for each key, and equal every answer; and everything did happen."""
        assert {(key, answer) for key, answer in self.answers() if answer.isdigit()} <= set(payments)
        assert len(payments) == len(dict(payments)) == KEYS
        assert sorted(outcomes) == sorted(number for _, number in payments)
        errors = self.errors()
        assert self.kills > 0
        assert errors["BrokenOffError"] > 0
        assert errors["TimeoutError"] > 0
        assert self.overlaps() > 0, "no lease was lost"

    def drain(self) -> None:
        """Let one more, which is left in peace, pay what was not paid; it gets an answer for each key."""
        log = self.log.with_suffix(".drained")
        assert self._start(log, "undisturbed").wait(timeout=SECONDS) == 0
        answers = log.read_text()
        assert [answer.isdigit() for answer in answers.split()[1::2]] == [True] * KEYS, answers
        with self.log.open("a") as all_answers:
            all_answers.write(answers)

    def answers(self) -> list[tuple[str, str]]:
        return [(key, answer) for key, answer in map(str.split, self.log.read_text().splitlines())]

    def errors(self) -> Counter[str]:
        return Counter(answer for _, answer in self.answers() if not answer.isdigit())

    def overlaps(self) -> int:
        """Return how many bodies found, when they came to commit, that another had taken their key over."""
        return sum(self.errors()[name] for name in OVERLAPS)

    def report(self, payments: list[tuple[str, str]]) -> None:
        errors = self.errors()
        columns = {
            "calls": len(self.answers()) + self.kills,
            "kills": self.kills,
            "lost commits": errors["LostCommitError"],
            "cancelled": errors["TimeoutError"],
            "broken off": errors["BrokenOffError"],
            "server crashes": self.crashes,
            "overlaps": self.overlaps(),
            "payments": len(payments),
            "keys": KEYS,
            "duplicates": len(payments) - len(dict(payments)),
        }
        scheme = self.database.partition("://")[0] if "://" in self.database else "sqlite"
        row = " · ".join(f"{name} {count}" for name, count in columns.items())
        print(f"\n{scheme}, {self.how}, {WORKERS} workers: {row}; all that was raised: {dict(errors)}")  # noqa: T201

    def _start(self, log: Path, how: str) -> subprocess.Popen[bytes]:
        self.lives += 1
        assert self.lives < 8 * KEYS, "they die before they get anywhere"
        return subprocess.Popen(
            [sys.executable, str(WORKER), self.database, str(log), str(self.lives), str(KEYS), how],
            env=os.environ | self.environment | {"PYTHONPATH": str(Path(aidem.__file__).parents[1])},
        )
