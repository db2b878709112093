"""The programs of the page, killed at every await: what this showed is written below each of them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from aidem.testing import FakeClock, crash_everywhere
from tests.support.aws_servers import python_beside_servers
from tests.support.recipes import PROGRAMS, Bank, Directory, load

ORDER = {"order_id": "o-1", "cents": 4200}


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_every_program_of_the_page_is_run_and_every_async_one_is_killed_here() -> None:
    here = Path(__file__)
    texts = {path: path.read_text("utf-8") for path in here.parent.glob("test_*.py")}
    killed = {name for name in PROGRAMS if f'"{name}", bank' in texts[here] or f'"{name}", BANK' in texts[here]}
    run = {name for path in {*texts} - {here} for name in PROGRAMS if f'"{name}"' in texts[path]}
    assert run == {*PROGRAMS}
    assert killed == {*PROGRAMS} - {"celery_tasks.py"}  # a function that is not async


@dataclass
class Delivery:
    """A message as SQS and AMQP clients see it, and what became of it."""

    body: bytes = json.dumps(ORDER).encode()
    delivery_tag: int = 1
    settled: list[str] = field(default_factory=list)

    @property
    def default_exchange(self) -> Delivery:
        return self

    async def _answered(self, answer: str) -> None:
        await asyncio.sleep(0)
        self.settled.append(answer)
        await asyncio.sleep(0)

    async def ack(self) -> None:
        await self._answered("done")

    async def nack(self, *, requeue: bool) -> None:
        await self._answered("later")

    async def publish(self, message: Any, *, routing_key: str) -> None:
        await self._answered("dead letter")

    async def delete_message(self, **_: str) -> None:
        await self._answered("done")

    async def send_message(self, **_: str) -> None:
        await self._answered("dead letter")


async def prove_delivery(
    deliver: Callable[[], Awaitable[object]], delivery: Delivery, bank: Bank, clock: FakeClock
) -> None:
    """Prove a delivery that comes again after it was disturbed: charged at most once, and lost never."""
    ends = set[tuple[int, bool, bool]]()

    def reset() -> None:
        delivery.settled.clear()
        bank.clear()

    def effects() -> int:
        ends.add((len(bank.charges), "done" in delivery.settled, "dead letter" in delivery.settled))
        return len(bank.charges)

    report = await crash_everywhere(deliver, clock=clock, reset=reset, effects=effects)
    report.check(at_least=0, at_most=1)
    # It is done, or it is in doubt, and then it is a dead letter, whether the bank was asked or not.
    assert ends == {(1, True, False), (1, True, True), (0, True, True)}


async def test_a_delivery_of_sqs_is_charged_at_most_once_and_deleted_when_it_is_charged_or_a_dead_letter(
    clock: FakeClock, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("sqs_consumer.py", bank, monkeypatch, ORDERS_QUEUE_URL="orders", DEAD_LETTERS_QUEUE_URL="dead")
    program.layer.clock = clock
    delivery = Delivery()
    message = {"MessageId": "m-1", "ReceiptHandle": "r-1", "Body": delivery.body.decode()}
    await prove_delivery(lambda: program.settle(delivery, message), delivery, bank, clock)


async def test_a_delivery_of_amqp_is_charged_at_most_once_and_acknowledged_when_it_is_charged_or_a_dead_letter(
    clock: FakeClock, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("amqp_consumer.py", bank, monkeypatch)
    program.layer.clock = clock
    delivery = Delivery()
    await prove_delivery(lambda: program.settle(delivery, delivery), delivery, bank, clock)


async def test_an_event_is_charged_at_most_once_and_its_sender_hears_of_doubt(
    clock: FakeClock, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("webhooks.py", bank, monkeypatch, WEBHOOK_SECRET="secret")
    program.layer.clock = clock
    body = json.dumps({"id": "evt_1", "type": "order.placed"} | ORDER).encode()
    headers = {"signature": hmac.new(b"secret", body, hashlib.sha256).hexdigest()}
    statuses = list[int]()
    ends = set[tuple[int, int]]()

    async def deliver() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(program.app), base_url="https://shop") as sender:
            response = await sender.post("/webhooks", content=body, headers=headers)
            statuses.append(response.status_code)

    def effects() -> int:
        ends.add((len(bank.charges), statuses[-1]))
        return len(bank.charges)

    report = await crash_everywhere(deliver, clock=clock, reset=bank.clear, effects=effects)
    report.check(at_least=0, at_most=1)
    assert ends == {(1, 204), (1, 503), (0, 503)}


async def test_an_mcp_tool_charges_at_most_once_and_tells_the_model_of_doubt(
    clock: FakeClock, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("mcp_server.py", bank, monkeypatch)
    program.layer.clock = clock
    report = await crash_everywhere(
        lambda: program.charge("o-1", 4200), clock=clock, reset=bank.clear, effects=lambda: len(bank.charges)
    )
    report.check(at_least=0, at_most=1)
    assert {point.outcome for point in report.points} == {"returned", "raised ToolError"}


async def test_a_task_of_taskiq_asks_the_bank_twice_in_one_place_and_then_under_the_same_key(
    clock: FakeClock, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("taskiq_tasks.py", bank, monkeypatch, REDIS_URL="redis://127.0.0.1:1")
    program.layer.clock = clock
    requests = set[int]()

    def effects() -> int:
        requests.add(len(bank.charges))
        return len(bank.keys)

    report = await crash_everywhere(lambda: program.charge("o-1", 4200), clock=clock, reset=bank.clear, effects=effects)
    report.check()
    assert requests == {1, 2}


PROOF_OF_ARQ = """
import asyncio

import arq_worker, bank
from aidem.testing import FakeClock, crash_everywhere

arq_worker.layer.clock = clock = FakeClock()
report = asyncio.run(crash_everywhere(
    lambda: arq_worker.charge({}, "o-1", 4200), clock=clock, reset=bank.keys.clear, effects=lambda: len(bank.keys)
))
report.check()
print(len(report.points))
"""
BANK_IN_MEMORY = """
import asyncio

keys = set()

async def charge(order_id, cents, key):
    await asyncio.sleep(0)
    keys.add(key)
    return f"charged {cents}"
"""


@pytest.mark.server
def test_a_job_of_arq_charges_once_wherever_it_dies(tmp_path: Path) -> None:
    settings = {"REDIS_URL": "redis://127.0.0.1:1", "AIDEM_PERSISTENCE": "memory://"}
    shop = Directory.of(tmp_path, "arq_worker.py", BANK_IN_MEMORY, **settings)
    command = [python_beside_servers(), "-c", PROOF_OF_ARQ]
    proof = subprocess.run(command, cwd=shop.path, env=shop.environment, capture_output=True, text=True)
    assert proof.returncode == 0, proof.stderr
    assert int(proof.stdout) >= 15
