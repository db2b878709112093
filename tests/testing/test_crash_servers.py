"""`crash_everywhere` on layers whose store is elsewhere, by their `clock=`."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from aidem import current_execution, idempotent_function
from aidem.persistence import PersistenceLayer
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.testing import CrashReport, FakeClock, crash_everywhere
from tests.support.aws_servers import EMULATORS, Database
from tests.support.servers import started

pytestmark = [pytest.mark.server, pytest.mark.timeout(120, func_only=True)]


async def charged_on(layer: PersistenceLayer, clock: FakeClock) -> CrashReport:
    """Prove a handler that is wrong in one way: its effect has no key."""
    charges: list[str] = []

    @idempotent_function(key_prefix="charge", persistence_store=layer)
    async def charge(order_id: str) -> str:
        charges.append(order_id)
        await asyncio.sleep(0)
        return current_execution().key_for("bank")

    return await crash_everywhere(
        lambda: charge("o-1"), clock=clock, reset=charges.clear, effects=lambda: len(charges), timeout_seconds=30
    )


def check(report: CrashReport) -> None:
    assert [point for point in report.points if not point.reached] == []
    wrong = [point for point in report.points if point.effects != 1]
    assert {(point.way, point.line) for point in wrong} == {
        ("vanish", "await asyncio.sleep(0)"),
        ("vanish", 'return current_execution().key_for("bank")'),
        ("cancel", "await asyncio.sleep(0)"),
    }
    assert {point.effects for point in wrong} == {2}
    assert Counter(point.outcome for point in report.points) == {"returned": len(report.points)}


@pytest.mark.parametrize("server", ["redis", "valkey"])
async def test_a_handler_on_redis(server: str) -> None:
    clock = FakeClock()
    with started(server) as running:
        async with RedisPersistenceLayer(running.url, clock=clock) as layer:
            check(await charged_on(layer, clock))


@pytest.mark.parametrize("database", EMULATORS[:1], indirect=True)
async def test_a_handler_on_dynamodb(database: Database) -> None:
    clock = FakeClock()
    async with DynamoDBPersistenceLayer(database.create_table("id"), clock=clock) as layer:
        check(await charged_on(layer, clock))
