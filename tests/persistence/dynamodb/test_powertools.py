"""Two fleets on one table: functions on AWS Powertools, and the same functions on aidem."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer as TheirLayer
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig as TheirConfig
from aws_lambda_powertools.utilities.idempotency import exceptions as theirs
from aws_lambda_powertools.utilities.idempotency import idempotent_function as their_idempotent_function
from aws_lambda_powertools.utilities.idempotency.persistence.datarecord import DataRecord as TheirRecord
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
from tests.support.aws_servers import Database, client_of

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


@dataclass
class Invocation:
    """The part of a Lambda context that Powertools asks."""

    remaining_seconds: float

    def get_remaining_time_in_millis(self) -> int:
        return int(self.remaining_seconds * 1000)


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
        self.body = body
        their_config = TheirConfig(lambda_context=Invocation(LEASE_SECONDS if lease else 30), **config)  # type: ignore[arg-type]
        layer = TheirLayer(table, boto3_client=their_client(), **(names or {}))

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
        self.body = body
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
both_directions = pytest.mark.parametrize(("first_fleet", "second_fleet"), FLEETS, ids=["they-first", "we-first"])


@both_directions
@pytest.mark.parametrize("names", [{}, NAMES], ids=["simple", "composite"])
async def test_each_replays_what_the_other_completed(
    first_fleet: Any, second_fleet: Any, names: dict[str, Any], database: Database
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
        first_result = await first_fleet(table, Body(result), names=names).call({"id": number})
        second_result = await second_fleet(table, second_body, names=names).call({"id": number})
        plain = {"exact": "12345678901234567890.10"} if number == 1 else result
        assert second_result == plain
        assert first_result == (result if first_fleet is Powertools else plain)
    assert second_body.calls == []


@both_directions
@pytest.mark.parametrize("result", [0, False, "", [], {}])
async def test_a_falsy_result_of_the_other_is_a_result(
    first_fleet: Any, second_fleet: Any, result: Any, table: str
) -> None:
    second_body = Body("ran again")
    await first_fleet(table, Body(result)).call({"id": 1})
    assert await second_fleet(table, second_body).call({"id": 1}) == (result if second_fleet is Aidem else None)
    assert second_body.calls == []


@both_directions
async def test_each_respects_what_the_other_runs(first_fleet: Any, second_fleet: Any, table: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(30)

    first = asyncio.ensure_future(first_fleet(table, Body("first", hold)).call({"id": 1}))
    assert await asyncio.to_thread(entered.wait, 30)
    second_body = Body("second")
    with pytest.raises(CONFLICTS):
        await second_fleet(table, second_body).call({"id": 1})
    go_on.set()
    assert await first == "first"
    assert await second_fleet(table, second_body).call({"id": 1}) == "first"
    assert second_body.calls == []


@both_directions
async def test_each_takes_over_what_the_other_abandoned_once_its_lease_has_passed(
    first_fleet: Any, second_fleet: Any, table: str, database: Database
) -> None:
    await abandon(first_fleet, table)
    (item,) = database.items(table)
    assert item["status"] == {"S": "INPROGRESS"}
    wait_until_after(int(item["in_progress_expiration"]["N"]))
    assert await second_fleet(table, Body("second")).call({"id": 1}) == "second"
    assert await first_fleet(table, Body("first")).call({"id": 1}) == "second"


@both_directions
async def test_each_refuses_a_payload_that_differs_from_the_one_the_other_saw(
    first_fleet: Any, second_fleet: Any, table: str
) -> None:
    options = {"event_key_jmespath": "id", "payload_validation_jmespath": "amount"}
    second_body = Body("second")
    await first_fleet(table, Body("first"), **options).call({"id": 1, "amount": 2})
    second = second_fleet(table, second_body, **options)
    with pytest.raises(MISMATCHES):
        await second.call({"id": 1, "amount": 3})
    assert await second.call({"id": 1, "amount": 2, "note": "other"}) == "first"
    assert second_body.calls == []


async def test_they_do_not_take_over_a_claim_of_ours_that_must_not_be(table: str) -> None:
    ours = Aidem(table, Body())
    now = time.time()
    await ours.layer.acquire(
        claim_of(key_of({"id": 1}), now=now - 3, kept_seconds=60, may_be_taken_over=False), now=now
    )
    their_body = Body()
    with pytest.raises(theirs.IdempotencyAlreadyInProgressError):
        await Powertools(table, their_body, lease=True).call({"id": 1})
    assert their_body.calls == []


# --- Outcomes that are no results -------------------------------------------------------------------------------------


async def test_they_do_not_replay_an_exception_that_we_stored_and_run_nothing(table: str) -> None:
    ours = Aidem(table, Body(act=fail), stored_exceptions=(LookupError,))
    their_body = Body()
    with pytest.raises(LookupError, match="no such order"):
        await ours.call({"id": 1})
    with pytest.raises(json.JSONDecodeError):
        await Powertools(table, their_body).call({"id": 1})
    assert their_body.calls == []
    with pytest.raises(LookupError, match="no such order"):
        await ours.call({"id": 1})


async def test_they_do_not_replay_a_result_that_we_could_not_store_and_run_nothing(table: str) -> None:
    body, their_body = Body({1: "keys", "of mixed": "types"}), Body()
    ours = Aidem(table, body)
    await ours.call({"id": 1})
    with pytest.raises(IdempotencyResultUnavailableError):
        await ours.call({"id": 1})
    with pytest.raises(json.JSONDecodeError):
        await Powertools(table, their_body).call({"id": 1})
    assert (len(body.calls), their_body.calls) == (1, [])


# --- W14: they write without asking whose the record is ---------------------------------------------------------------


@dataclass
class LateOwner:
    """A call of theirs whose lease has passed and whose body still runs, and one of ours that took over."""

    table: str
    theirs_goes_on: threading.Event = field(default_factory=threading.Event)
    ours_goes_on: threading.Event = field(default_factory=threading.Event)
    fails: bool = False

    async def start(self, database: Database) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
        their_body = Body("theirs", self.hold)
        theirs = asyncio.ensure_future(Powertools(self.table, their_body, lease=True).call({"id": 1}))
        await until(lambda: their_body.calls)
        (item,) = database.items(self.table)
        wait_until_after(int(item["in_progress_expiration"]["N"]))
        our_body = Body("ours", lambda: self.ours_goes_on.wait(30))
        ours = asyncio.ensure_future(Aidem(self.table, our_body).call({"id": 1}))
        await until(lambda: our_body.calls)
        return theirs, ours

    def hold(self) -> None:
        assert self.theirs_goes_on.wait(30)
        if self.fails:
            fail()


async def test_w14_who_lost_to_a_late_powertools_owner_gets_its_result(table: str, database: Database) -> None:
    late = LateOwner(table)
    theirs, ours = await late.start(database)
    late.theirs_goes_on.set()
    assert await theirs == "theirs"
    late.ours_goes_on.set()
    assert await ours == "theirs"


async def test_w14_a_late_powertools_owner_overwrites_our_result(table: str, database: Database) -> None:
    late = LateOwner(table)
    theirs, ours = await late.start(database)
    late.ours_goes_on.set()
    assert await ours == "ours"
    late.theirs_goes_on.set()
    assert await theirs == "theirs"
    assert await Aidem(table, Body("ran again")).call({"id": 1}) == "theirs"


async def test_w14_our_outcome_is_stored_though_a_late_powertools_owner_deleted_our_claim(
    table: str, database: Database
) -> None:
    late = LateOwner(table, fails=True)
    theirs, ours = await late.start(database)
    late.theirs_goes_on.set()
    with pytest.raises(LookupError):
        await theirs
    assert database.items(table) == []
    late.ours_goes_on.set()
    assert await ours == "ours"
    assert await Powertools(table, Body("ran again")).call({"id": 1}) == "ours"


async def test_w14_a_result_that_overwrote_our_exception_is_no_second_run(table: str, database: Database) -> None:
    ours = Aidem(table, Body(act=fail), stored_exceptions=(LookupError,))
    with pytest.raises(LookupError):
        await ours.call({"id": 1})
    TheirLayer(table, boto3_client=their_client())._update_record(their_late_record())
    body = Body("ran again")
    with pytest.raises(IdempotencyResultUnavailableError):
        await Aidem(table, body, stored_exceptions=(LookupError,)).call({"id": 1})
    assert body.calls == []


# --- Any payload ------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
payloads = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


@pytest.mark.parametrize("first_fleet", [Powertools, Aidem], ids=["they-first", "we-first"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=payloads)
def test_both_compute_the_same_key_for_a_payload(
    first_fleet: Any, payload: Any, runner: asyncio.Runner, fleets: Any
) -> None:
    fleet = {type(fleet): fleet for fleet in fleets}
    second_fleet = Aidem if first_fleet is Powertools else Powertools
    order = {"order": payload, "first": first_fleet.__name__}
    assert runner.run(fleet[first_fleet].call(order)) == "done"
    calls = len(fleet[second_fleet].body.calls)
    assert runner.run(fleet[second_fleet].call(order)) == "done"
    assert len(fleet[second_fleet].body.calls) == calls


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def fleets(table: str) -> list[Any]:
    return [Powertools(table, Body("done")), Aidem(table, Body("done"))]


# --- What the tests are made of ---------------------------------------------------------------------------------------


async def abandon(fleet: Any, table: str) -> None:
    """Leave a claim behind, as a process does that is killed."""
    if fleet is Powertools:
        with pytest.raises(Abandoned):
            Powertools(table, Body(act=die), lease=True).run(order={"id": 1})
    else:
        now = time.time()
        lease_end = int((now + LEASE_SECONDS) * 1000)
        claim = claim_of(key_of({"id": 1}), now=now).replace(in_progress_expiry_timestamp=lease_end)
        await DynamoDBPersistenceLayer(table).acquire(claim, now=now)


def their_client() -> Any:
    return client_of(os.environ["AWS_ENDPOINT_URL_DYNAMODB"])


def key_of(order: Any) -> str:
    return "pay#" + hashlib.md5(json.dumps(order, sort_keys=True).encode()).hexdigest()


def their_late_record() -> TheirRecord:
    return TheirRecord(key_of({"id": 1}), "COMPLETED", int(time.time()) + 60, response_data='"theirs"')


def die() -> None:
    raise Abandoned


def fail() -> None:
    raise LookupError("no such order")


def wait_until_after(milliseconds: int) -> None:
    while time.time() * 1000 <= milliseconds + 1:
        time.sleep(0.001)


async def until(has_happened: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not has_happened():  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.002)
