"""Two fleets on one table: functions on AWS Powertools, and the same functions on aidem."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer as TheirLayer
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig as TheirConfig
from aws_lambda_powertools.utilities.idempotency import exceptions as theirs
from aws_lambda_powertools.utilities.idempotency import idempotent_function as their_idempotent_function
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidem import IdempotencyConfig, idempotent_function
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyResultUnavailableError,
    IdempotencyValidationError,
)
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import claim_of
from tests.aws_servers import Database

pytestmark = [pytest.mark.server, pytest.mark.timeout(60, func_only=True)]

CONFLICTS = (theirs.IdempotencyAlreadyInProgressError, IdempotencyAlreadyInProgressError)
MISMATCHES = (theirs.IdempotencyValidationError, IdempotencyValidationError)
NAMES: dict[str, Any] = {
    "key_attr": "partition",
    "sort_key_attr": "key",
    "static_pk_value": "payments",
    "expiry_attr": "ttl",
    "in_progress_expiry_attr": "in-progress",
    "status_attr": "state",
    "data_attr": "values",
    "validation_key_attr": "hash",
}
LEASE_SECONDS = 0.02


class Abandoned(BaseException):
    """The process dies: Powertools gives the key back for `Exception` alone."""


class Invocation:
    """The part of a Lambda context that Powertools asks."""

    def get_remaining_time_in_millis(self) -> int:
        return int(LEASE_SECONDS * 1000)


@dataclass
class Body:
    """What the function of a fleet does; returns what it is told."""

    result: Any = None
    act: Callable[[], Any] = lambda: None
    calls: list[Any] = field(default_factory=list)

    def __call__(self, order: Any) -> Any:
        self.calls.append(order)
        self.act()
        return self.result


class Powertools:
    """The fleet that is there already."""

    def __init__(self, table: str, body: Body, *, lease: bool = False, names: Any = None, **config: Any) -> None:
        their_config = TheirConfig(lambda_context=Invocation() if lease else None, **config)  # type: ignore[arg-type]
        layer = TheirLayer(table, **(names or {}))

        @their_idempotent_function(
            data_keyword_argument="order", persistence_store=layer, config=their_config, key_prefix="pay"
        )
        def pay(order: Any) -> Any:
            return body(order)

        self.run = pay

    async def call(self, order: Any) -> Any:
        return await asyncio.to_thread(self.run, order=order)


class Aidem:
    """The fleet that moves over."""

    def __init__(self, table: str, body: Body, *, lease: bool = False, names: Any = None, **config: Any) -> None:
        self.layer = DynamoDBPersistenceLayer(table, **(names or {}))
        our_config = IdempotencyConfig(
            hash_function="md5", lease_seconds=LEASE_SECONDS if lease else 30.0, renew_lease=False, **config
        )

        @idempotent_function(
            data_keyword_argument="order", persistence_store=self.layer, config=our_config, key_prefix="pay"
        )
        async def pay(order: Any) -> Any:
            return await asyncio.to_thread(body, order)

        self.call = pay


FLEETS = [(Powertools, Aidem), (Aidem, Powertools)]
both_directions = pytest.mark.parametrize(("First", "Second"), FLEETS, ids=["they-first", "we-first"])


@both_directions
@pytest.mark.parametrize("names", [{}, NAMES], ids=["simple", "composite"])
async def test_each_replays_what_the_other_completed(
    First: Any, Second: Any, names: dict[str, Any], database: Database
) -> None:
    table = database.create_table("partition", "key") if names else database.create_table()
    results = [
        {"text": "Zürich 東京 🐙 \u0000", "nested": {"none": None, "list": [None, 1, 2.5, True]}},
        {"exact": Decimal("12345678901234567890.10")},
        [1, "two", None],
        9_007_199_254_740_993,
        "text",
        None,
    ]
    second_body = Body()
    for number, result in enumerate(results):
        first_result = await First(table, Body(result), names=names).call({"id": number})
        second_result = await Second(table, second_body, names=names).call({"id": number})
        plain = {"exact": "12345678901234567890.10"} if number == 1 else result
        assert second_result == plain
        assert first_result == (result if First is Powertools else plain)
    assert second_body.calls == []


@both_directions
@pytest.mark.parametrize("result", [0, False, "", [], {}])
async def test_a_falsy_result_of_the_other_is_a_result(First: Any, Second: Any, result: Any, table: str) -> None:
    second_body = Body("ran again")
    await First(table, Body(result)).call({"id": 1})
    assert await Second(table, second_body).call({"id": 1}) == (result if Second is Aidem else None)
    assert second_body.calls == []


@both_directions
async def test_each_respects_what_the_other_runs(First: Any, Second: Any, table: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(30)

    first = asyncio.ensure_future(First(table, Body("first", hold)).call({"id": 1}))
    assert await asyncio.to_thread(entered.wait, 30)
    second_body = Body("second")
    with pytest.raises(CONFLICTS):
        await Second(table, second_body).call({"id": 1})
    go_on.set()
    assert await first == "first"
    assert await Second(table, second_body).call({"id": 1}) == "first"
    assert second_body.calls == []


@both_directions
async def test_each_takes_over_what_the_other_abandoned_once_its_lease_has_passed(
    First: Any, Second: Any, table: str, database: Database
) -> None:
    await abandon(First, table)
    (item,) = database.items(table)
    wait_until_after(int(item["in_progress_expiration"]["N"]))
    assert await Second(table, Body("second")).call({"id": 1}) == "second"
    assert await First(table, Body("first")).call({"id": 1}) == "second"


async def abandon(First: Any, table: str) -> None:
    """Leave a claim behind, as a process that is killed does."""
    fleet = First(table, Body(act=die), lease=True)
    if First is Powertools:
        with pytest.raises(Abandoned):
            fleet.run(order={"id": 1})
    else:
        probe = Body()
        await fleet.call({"id": 1})
        (item,) = [record async for record in keys_of(fleet.layer, {"id": 1})]
        await fleet.layer.forget(item)
        assert probe.calls == []
        now = time.time()
        claim = claim_of(item, now=now).replace(in_progress_expiry_timestamp=int((now + LEASE_SECONDS) * 1000))
        await fleet.layer.acquire(claim, now=now)
