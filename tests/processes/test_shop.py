"""The shop in docs/examples, run as it is: a payment for each key, and every answer tells of that one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.support import postgres
from tests.support.served import HEALTH_CHECK_SECONDS
from tests.support.servers import free_port

pytestmark = pytest.mark.timeout(180)
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE_SECONDS = 60.0
KILLS = 4  # of two workers, which are replaced
KEYS = 100


@dataclass
class Shop:
    """The shop under uvicorn with two workers."""

    directory: Path
    url: str
    port: int = field(default_factory=free_port)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"DATABASE_URL": self.url}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        options = [f"--port={self.port}", "--workers=2", f"--timeout-worker-healthcheck={HEALTH_CHECK_SECONDS}"]
        with (self.directory / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "shop:app", "--app-dir", str(EXAMPLES), *options],
                cwd=self.directory,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for_workers(process)
            yield
            process.terminate()
            process.wait(DEADLINE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def workers(self) -> list[int]:
        """Return the process ids of all workers so far."""
        output = (self.directory / "output.txt").read_text()
        return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", output)]

    def _wait_for_workers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (output := (self.directory / "output.txt").read_text()).count("startup complete") < 2:
            assert process.poll() is None, output
            assert time.monotonic() < deadline, output
            time.sleep(0.02)

    async def payments(self) -> list[tuple[int, str, int]]:
        statement = "SELECT number, order_id, cents FROM payments ORDER BY number"
        if not self.url:
            with contextlib.closing(sqlite3.connect(self.directory / "shop.sqlite3")) as database:
                return database.execute(statement).fetchall()
        connection = await asyncpg.connect(self.url)
        try:
            return [tuple(row) for row in await connection.fetch(statement)]
        finally:
            await connection.close()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.server)])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with contextlib.ExitStack() as stack:
        url = ""
        if request.param == "postgres":
            url = stack.enter_context(postgres.started()).url.replace(
                "postgresql://", "postgres://"
            )  # as some hosts write
            assert "?sslmode=" in url
        shop = Shop(tmp_path_factory.mktemp(request.param), url)
        command = [sys.executable, str(EXAMPLES / "shop.py")]
        subprocess.run(command, cwd=shop.directory, env=shop.environment, check=True)
        stack.enter_context(shop.running())
        yield shop


def client_of(shop: Shop) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{shop.port}", timeout=DEADLINE_SECONDS)


async def paid(client: httpx.AsyncClient, key: str, *, cents: int = 4200) -> httpx.Response:
    """Send a payment until it is answered; a worker may be killed meanwhile."""
    while True:
        try:
            payment = {"order_id": key, "cents": cents}
            response: httpx.Response = await client.post("/payments", json=payment, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            await asyncio.sleep(0.1)
            continue
        if response.status_code not in {409, 500}:
            return response
        await asyncio.sleep(0.1)


async def test_workers_that_are_killed_leave_a_payment_for_each_key(shop: Shop) -> None:
    answers = dict[str, list[Any]]()
    killed = set[int]()

    async def retry(client: httpx.AsyncClient) -> None:
        while len(killed) < KILLS or len(answers) < KEYS:
            key = f"o-{random.randrange(KEYS)}"
            response = await paid(client, key)
            assert response.status_code == 201, response.text
            answers.setdefault(key, []).append(response.json())

    async def kill() -> None:
        while len(killed) < KILLS:
            await asyncio.sleep(random.uniform(0.05, 0.2))
            if alive := set(shop.workers()) - killed:
                worker = alive.pop()
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)

    async with client_of(shop) as client, asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(retry(client))
        group.create_task(kill())

    rows = [row for row in await shop.payments() if row[1].startswith("o-")]
    receipts = {order_id: {"number": number, "order_id": order_id, "cents": cents} for number, order_id, cents in rows}
    assert sorted(order_id for _, order_id, _ in rows) == sorted(answers)
    assert answers == {order_id: [receipts[order_id]] * len(given) for order_id, given in answers.items()}


async def test_another_payment_under_a_key_is_refused(shop: Shop) -> None:
    async with client_of(shop) as client:
        assert (await paid(client, "other")).status_code == 201
        assert (await paid(client, "other", cents=1)).status_code == 422
        assert (await client.post("/payments", json={"order_id": "none", "cents": 1})).status_code == 422  # no key
    assert [row[1] for row in await shop.payments() if not row[1].startswith("o-")] == ["other"]
