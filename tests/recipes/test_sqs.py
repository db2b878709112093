"""The SQS consumer against an SQS over HTTP, whose messages come again when their visibility time-out has passed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import pytest
from aiobotocore.session import get_session

from aidem import idempotency_key, operations
from tests.support.aws_servers import CREDENTIALS, ministack_url
from tests.support.recipes import Bank, load, until

__all__ = ["ministack_url"]

pytestmark = pytest.mark.server

ORDER = {"order_id": "o-1", "cents": 4200}
VISIBILITY_SECONDS = 1
MAX_DELIVERIES = 3


@pytest.fixture
def bank() -> Bank:
    return Bank()


@dataclass
class Queues:
    """The queue of the orders and that of the dead letters, by a client that is not the consumer's."""

    sqs: Any
    orders: str
    dead_letters: str

    async def send(self, order: dict[str, Any]) -> None:
        await self.sqs.send_message(QueueUrl=self.orders, MessageBody=json.dumps(order))

    async def count(self, queue: str) -> int:
        """Return how many messages there are, whether they can be seen or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = await self.sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=names)
        return sum(int(answer["Attributes"][name]) for name in names)

    async def are_settled(self) -> bool:
        return await self.count(self.orders) == 0

    async def received(self, queue: str) -> list[Any]:
        answer = await self.sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, WaitTimeSeconds=1)
        messages: list[Any] = answer.get("Messages", [])
        return messages


@pytest.fixture
async def queues(ministack_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Queues]:
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL_SQS": ministack_url}).items():
        monkeypatch.setenv(name, value)
    async with get_session().create_client("sqs") as sqs:
        name = f"orders-{secrets.token_hex(4)}"
        dead_letters = (await sqs.create_queue(QueueName=f"{name}-dead"))["QueueUrl"]
        answer = await sqs.get_queue_attributes(QueueUrl=dead_letters, AttributeNames=["QueueArn"])
        redrive = {"deadLetterTargetArn": answer["Attributes"]["QueueArn"], "maxReceiveCount": MAX_DELIVERIES}
        attributes = {"VisibilityTimeout": str(VISIBILITY_SECONDS), "RedrivePolicy": json.dumps(redrive)}
        orders = (await sqs.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"]
        yield Queues(sqs, orders, dead_letters)


@pytest.fixture
def program(queues: Queues, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> Any:
    urls = {"ORDERS_QUEUE_URL": queues.orders, "DEAD_LETTERS_QUEUE_URL": queues.dead_letters}
    return load("sqs_consumer.py", bank, monkeypatch, **urls)


@contextlib.asynccontextmanager
async def consuming(program: Any) -> AsyncGenerator[None]:
    """Run a consumer, and cut it off at the end, where it waits for messages."""
    consumer = asyncio.create_task(program.consume(asyncio.Event()))
    yield
    consumer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await consumer


async def test_an_order_that_was_sent_twice_is_charged_once_and_both_messages_are_deleted(
    program: Any, queues: Queues, bank: Bank
) -> None:
    await queues.send(ORDER)
    await queues.send(ORDER)
    async with consuming(program):
        await until(queues.are_settled)
    assert bank.charges == ["o-1"]
    assert await queues.count(queues.dead_letters) == 0


async def test_a_message_that_comes_again_while_its_order_is_charged_is_left_for_later(
    program: Any, queues: Queues, bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    bank.is_open.clear()
    await queues.send(ORDER)

    async def has_come_again() -> bool:
        return "IdempotencyAlreadyInProgressError" in caplog.text

    async with consuming(program), consuming(program):
        await until(has_come_again)
        bank.is_open.set()
        await until(queues.are_settled)
    assert bank.charges == ["o-1"]
    assert await queues.count(queues.dead_letters) == 0


async def test_a_message_whose_deletion_was_lost_comes_again_and_is_a_replay(
    program: Any, queues: Queues, bank: Bank
) -> None:
    await queues.send(ORDER)
    async with program.layer:
        [delivered] = await queues.received(queues.orders)
        await program.charge(json.loads(delivered["Body"]))  # and here its consumer is lost
        assert bank.charges == ["o-1"]
        async with consuming(program):
            await until(queues.are_settled)
    assert bank.charges == ["o-1"]


async def test_an_order_that_the_bank_refuses_is_tried_again_and_is_a_dead_letter_in_the_end(
    program: Any, queues: Queues, bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.send({"order_id": "refused", "cents": 1})
    async with consuming(program):
        await until(queues.are_settled)
    assert caplog.text.count("BankIsDownError") >= MAX_DELIVERIES
    [dead] = await queues.received(queues.dead_letters)
    assert json.loads(dead["Body"])["order_id"] == "refused"


async def test_an_order_in_doubt_is_a_dead_letter_at_once_and_a_replay_when_it_is_resolved(
    program: Any, queues: Queues, bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    async with program.layer:
        await bank.lose(program.charge(ORDER))
        await queues.send(ORDER)
        async with consuming(program):
            await until(queues.are_settled)
            [dead] = await queues.received(queues.dead_letters)
            assert json.loads(dead["Body"]) == ORDER
            await operations.resolve(program.layer, idempotency_key(program.charge, ORDER), result="charged 4200")
            await queues.send(ORDER)  # the redrive
            await until(queues.are_settled)
    assert bank.charges == ["o-1"]
    assert "comes again" not in caplog.text


async def test_a_message_with_another_amount_and_one_without_an_order_are_dead_letters_at_once(
    program: Any, queues: Queues, bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.send(ORDER)
    async with consuming(program):
        await until(queues.are_settled)
        await queues.send(ORDER | {"cents": 1})
        await queues.send({"cents": 1})
        await until(queues.are_settled)
    assert bank.charges == ["o-1"]
    assert len(await queues.received(queues.dead_letters)) == 2
    assert "comes again" not in caplog.text


async def test_a_consumer_that_is_to_stop_ends_what_it_has_received(program: Any, queues: Queues, bank: Bank) -> None:
    bank.is_open.clear()
    await queues.send(ORDER)
    stopping = asyncio.Event()
    consumer = asyncio.create_task(program.consume(stopping))
    await bank.has_charged.wait()
    stopping.set()
    await asyncio.sleep(0)
    bank.is_open.set()
    await consumer
    assert await queues.count(queues.orders) == 0
