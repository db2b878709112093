"""taskiq, arq and Celery with real worker processes: one is killed behind its charge, and its task comes again.

The bank knows the key that it gets, so that the second request of a task charges nothing. The time-outs of the page
pass on the clock of the server, by which leases, idle time-outs and the expiry of its keys are judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.aws_servers import python_beside_servers
from tests.support.recipes import ASYNC_BANK, BLOCKING_BANK, DEADLINE_SECONDS, Bank, Directory, load
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.server

ARQ_PRODUCER = """
import asyncio
import os

from arq import create_pool
from arq.connections import RedisSettings

async def main():
    queue = await create_pool(RedisSettings.from_dsn(os.environ["REDIS_URL"]))
    first = await queue.enqueue_job("charge", "o-1", 4200)
    again = await queue.enqueue_job("charge", order_id="o-1", cents=4200)
    for job in (first, again):
        print((await job.result(timeout=60)).replace(" ", "-"))
    await queue.aclose()

asyncio.run(main())
"""
LATER_SECONDS = 120  # all leases and time-outs of the page have passed


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with started("valkey", movable_clock=time.time()) as server:
        server.shift_clock(0)
        yield server


def program(path: Path, name: str, bank: str, redis: RedisServer) -> Directory:
    return Directory.of(path, name, bank, REDIS_URL=redis.url, AIDEM_PERSISTENCE=redis.url)


@contextlib.contextmanager
def working(program: Directory, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker until the end of the block; what it says goes to a file."""
    with (
        (program.path / "log").open("ab") as log,
        subprocess.Popen(command, cwd=program.path, env=program.environment, stdout=log, stderr=log) as worker,
    ):
        try:
            yield worker
        finally:
            worker.terminate()
            try:
                worker.wait(DEADLINE_SECONDS)
            finally:
                worker.kill()


async def until(program: Directory, has_happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not has_happened():
        assert time.monotonic() < deadline, program.log()
        await asyncio.sleep(0.05)


@contextlib.contextmanager
def producing(program: Directory, python: str, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the code of a producer, which prints the results."""
    with subprocess.Popen(
        [python, "-c", code], cwd=program.path, env=program.environment, stdout=subprocess.PIPE
    ) as producer:
        try:
            yield producer
        finally:
            producer.kill()


def assert_charged_once_by_two(program: Directory, killed: int) -> None:
    """One worker was killed behind its charge, another one asked again, and the bank knew the key."""
    charges = [charge for charge in program.charges() if charge[1] == "o-1"]
    assert len(charges) == 2, charges
    assert charges[0][0] == killed
    assert charges[1][0] != killed
    assert len({key for _, _, key in charges}) == 1


async def test_a_task_of_taskiq_whose_worker_is_killed_is_charged_once(
    tmp_path: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = program(tmp_path, "taskiq_tasks.py", ASYNC_BANK, redis)
    sender = load("taskiq_tasks.py", Bank(), monkeypatch, **shop.settings)
    shop.hold()
    await sender.broker.startup()
    with working(shop, sys.executable, "-m", "taskiq", "worker", "taskiq_tasks:broker", "--workers", "1"):
        first = await sender.charge.kiq("o-1", 4200)
        await until(shop, lambda: len(shop.charges()) == 1)
        [(killed, _, _)] = shop.charges()
        again = await sender.charge.kiq(order_id="o-1", cents=4200)
        os.kill(killed, signal.SIGKILL)
        shop.go_on()
        redis.shift_clock(LATER_SECONDS)
        await sender.charge.kiq("o-2", 1)  # taskiq-redis asks for what was lost when something new comes
        for task in (first, again):
            result = await task.wait_result(timeout=DEADLINE_SECONDS)
            assert result.return_value == "charged 4200", shop.log()
    await sender.broker.shutdown()
    assert_charged_once_by_two(shop, killed)


async def test_a_job_of_arq_whose_worker_is_killed_is_charged_once(tmp_path: Path, redis: RedisServer) -> None:
    shop = program(tmp_path, "arq_worker.py", ASYNC_BANK, redis)
    python = python_beside_servers()
    command = [python, "-m", "arq", "arq_worker.WorkerSettings"]
    shop.hold()
    with working(shop, *command) as worker, producing(shop, python, ARQ_PRODUCER) as producer:
        await until(shop, lambda: len(shop.charges()) == 1)
        os.kill(worker.pid, signal.SIGKILL)
        shop.go_on()
        redis.shift_clock(LATER_SECONDS)
        with working(shop, *command):
            output, _ = await asyncio.to_thread(producer.communicate, timeout=DEADLINE_SECONDS)
    assert output.split() == [b"charged-4200", b"charged-4200"], shop.log()
    assert_charged_once_by_two(shop, worker.pid)


async def test_a_task_of_celery_whose_worker_is_killed_is_charged_once(
    tmp_path: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = program(tmp_path, "celery_tasks.py", BLOCKING_BANK, redis)
    sender = load("celery_tasks.py", Bank(), monkeypatch, **shop.settings)
    shop.hold()
    quiet = ["--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    with working(shop, sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-c", "1", *quiet):
        first = sender.charge.delay("o-1", 4200)
        await until(shop, lambda: len(shop.charges()) == 1)
        [(killed, _, _)] = shop.charges()
        again = sender.charge.delay(order_id="o-1", cents=4200)
        os.kill(killed, signal.SIGKILL)
        await until(shop, lambda: "IdempotencyAlreadyInProgressError" in shop.log())  # it is retried
        shop.go_on()
        redis.shift_clock(LATER_SECONDS)
        for task in (first, again):
            assert await asyncio.to_thread(task.get, timeout=DEADLINE_SECONDS) == "charged 4200"
    sender.app.close()
    assert_charged_once_by_two(shop, killed)
