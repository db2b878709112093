"""The AMQP consumer against a broker, which delivers again what a connection leaves without an acknowledgement."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from aidem import idempotency_key, operations
from tests.support.amqp import started_amqp
from tests.support.proxy import Proxy
from tests.support.recipes import DEADLINE_SECONDS, Bank, load, until

pytestmark = pytest.mark.server

ORDER = {"order_id": "o-1", "cents": 4200}


@pytest.fixture
def broker_port() -> Iterator[int]:
    with started_amqp() as port:
        yield port


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture
def program(broker_port: int, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> Any:
    program = load("amqp_consumer.py", bank, monkeypatch, AMQP_URL=url_of(broker_port))
    program.LATER_SECONDS = 0.1
    return program


def url_of(port: int) -> str:
    return f"amqp://guest:guest@127.0.0.1:{port}/"


@dataclass
class Queues:
    """The queue of the orders and that of the dead letters, by a connection that is not the consumer's."""

    channel: AbstractChannel

    async def send(self, order: dict[str, Any]) -> None:
        message = aio_pika.Message(json.dumps(order).encode())
        await self.channel.default_exchange.publish(message, routing_key="orders")

    async def take(self, queue: str = "orders") -> Any:
        """Take a message, which stays without an acknowledgement, or None."""
        return await (await self.channel.get_queue(queue)).get(fail=False)

    async def dead_letters(self) -> list[Any]:
        dead = []
        while (message := await self.take("orders.dead")) is not None:
            dead.append(json.loads(message.body))
        return dead


@pytest.fixture
async def queues(broker_port: int) -> AsyncGenerator[Queues]:
    async with await aio_pika.connect(url_of(broker_port)) as connection:
        channel = await connection.channel()
        for name in ("orders", "orders.dead"):
            await channel.declare_queue(name, durable=True)
        yield Queues(channel)


@contextlib.asynccontextmanager
async def consuming(program: Any) -> AsyncGenerator[None]:
    """Run a consumer, and stop it at the end; it ends what it has."""
    stopping = asyncio.Event()
    consumer = asyncio.create_task(program.consume(stopping))
    try:
        yield
    finally:
        stopping.set()
        await asyncio.wait_for(consumer, DEADLINE_SECONDS)


async def test_an_order_that_was_sent_twice_is_charged_once_and_both_messages_are_acknowledged(
    program: Any, queues: Queues, bank: Bank
) -> None:
    async def is_done() -> bool:
        return [record.status for record in program.layer.records().values()] == ["COMPLETED"]

    async def has_come_to_the_last() -> bool:
        return "o-2" in bank.charges

    async with consuming(program):
        await queues.send(ORDER)
        await until(is_done)
        await queues.send(ORDER)
        await queues.send(ORDER | {"order_id": "o-2"})
        await until(has_come_to_the_last)
    assert sorted(bank.charges) == ["o-1", "o-2"]
    assert await queues.take() is None
    assert await queues.dead_letters() == []


async def test_a_message_whose_connection_breaks_comes_again_while_its_order_is_charged_and_then_as_a_replay(
    program: Any, queues: Queues, broker_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bank = program.bank
    bank.is_open.clear()

    async def has_come_again() -> bool:
        return "IdempotencyAlreadyInProgressError" in caplog.text

    async with Proxy.to(broker_port) as proxy:
        monkeypatch.setenv("AMQP_URL", url_of(proxy.port) + "?reconnect_interval=0.1")
        async with consuming(program):
            await queues.send(ORDER)
            await bank.has_charged.wait()
            proxy.cut()
            await until(has_come_again)
            bank.is_open.set()
            await until(lambda: are_taken(queues))
        assert proxy.connections == 2
    assert "ChannelInvalidStateError" in caplog.text  # so the first delivery could not be acknowledged
    assert bank.charges == ["o-1"]


async def are_taken(queues: Queues) -> bool:
    queue = await queues.channel.declare_queue("orders", passive=True)
    return queue.declaration_result.message_count == 0


async def test_an_order_that_the_bank_refuses_is_delivered_again(
    program: Any, queues: Queues, bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.send({"order_id": "refused", "cents": 1})

    async def has_come_again() -> bool:
        return caplog.text.count("BankIsDownError") >= 3

    async with consuming(program):
        await until(has_come_again)
    message = await queues.take()  # it stays until the bank takes it
    await message.ack()


async def test_an_order_in_doubt_is_a_dead_letter_and_a_replay_when_it_is_resolved(
    program: Any, queues: Queues, bank: Bank
) -> None:
    async with program.layer:
        await bank.lose(program.charge(ORDER))
        await queues.send(ORDER)

        parked = list[Any]()

        async def is_parked() -> bool:
            parked.extend(await queues.dead_letters())
            return len(parked) in {1, 3}

        async with consuming(program):
            await until(is_parked)
            assert parked == [ORDER]
            await operations.resolve(program.layer, idempotency_key(program.charge, ORDER), result="charged 4200")
            await queues.send(ORDER)  # from the dead letters
            await queues.send(ORDER | {"cents": 1})  # another amount
            await queues.send({"cents": 1})  # no order

            async def are_parked() -> bool:
                return await is_parked() and len(parked) == 3

            await until(are_parked)
    assert bank.charges == ["o-1"]
    assert parked[0] == ORDER
    assert sorted(parked[1:], key=len) == [{"cents": 1}, ORDER | {"cents": 1}]
    assert await queues.take() is None
