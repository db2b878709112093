"""Durable functions: a handler that is replayed takes the claim that its own earlier attempt has left behind."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aidem import IdempotencyConfig, current_execution, idempotent, sync
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler
from aidem.config import current_lambda_context
from aidem.exceptions import IdempotencyAlreadyInProgressError, IdempotencyLeaseLostError
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import claim_of
from tests.support.aws_servers import EMULATORS, OTHER_URL, Database
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer, Till, only_record, real_now
from tests.support.records import put

CONFIG = IdempotencyConfig(event_key_jmespath="id")
EVENT = {"id": 1}
KEY = "durable#" + hashlib.sha256(b"1").hexdigest()


@dataclass
class Invocation:
    """Lambda's context, as far as it is read."""

    def get_remaining_time_in_millis(self) -> int:
        return 60_000


@dataclass
class DurableContext:
    """What a durable function gets: Lambda's context, and the operations recorded so far, itself being the first."""

    operations: int
    lambda_context: Invocation = field(default_factory=Invocation)

    @property
    def state(self) -> Any:
        return SimpleNamespace(operations={f"operation-{number}": object() for number in range(self.operations)})


FIRST_ATTEMPT, REPLAY = DurableContext(1), DurableContext(2)


@dataclass
class Store:
    """A store, and how another library would write to it."""

    make_layer: Callable[[], Any]
    disown: Callable[[], object]


def sqlite_store(path: Path) -> Store:
    def disown() -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE records SET owner = NULL")

    return Store(lambda: SQLitePersistenceLayer(path), disown)


def dynamodb_store(database: Database) -> Store:
    table = database.create_table()

    def disown() -> None:
        database.client.update_item(
            TableName=table,
            Key={"id": {"S": KEY}},
            UpdateExpression="REMOVE #owner",
            ExpressionAttributeNames={"#owner": "owner"},
        )

    return Store(lambda: DynamoDBPersistenceLayer(table), disown)


@pytest.fixture(params=["sqlite", pytest.param(EMULATORS[0], marks=pytest.mark.server)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "sqlite":
        return sqlite_store(tmp_path / "records.sqlite3")
    database = Database(OTHER_URL or request.getfixturevalue(f"{request.param}_url"))
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)
    return dynamodb_store(database)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Let time jump, except beside a store, whose threads and sockets take real time."""
    return "asyncio" if "store" in request.fixturenames else VIRTUAL_TIME


@pytest.fixture(autouse=True)
def _no_loop_is_left() -> Iterator[None]:
    yield
    sync.close()
    lambda_loop.close()


class Steps:
    """The body of a durable function; remembers its attempts."""

    def __init__(self) -> None:
        self.attempts: list[int] = []
        self.registered: list[Any] = []
        self.fences: list[int] = []

    def run(self, context: DurableContext) -> str:
        self.attempts.append(context.operations)
        self.registered.append(current_lambda_context(CONFIG))
        self.fences.append(current_execution().fence)
        return f"done with {context.operations} operations"


def by_lambda_handler(layer: Any, steps: Steps, config: IdempotencyConfig = CONFIG) -> Any:
    @lambda_handler
    @idempotent(persistence_store=layer, config=config, key_prefix="durable")
    async def handler(event: Any, context: DurableContext) -> str:
        return steps.run(context)

    return handler


def by_sync(layer: Any, steps: Steps, config: IdempotencyConfig = CONFIG) -> Any:
    @sync.idempotent(persistence_store=layer, config=config, key_prefix="durable")
    def handler(event: Any, context: DurableContext) -> str:
        return steps.run(context)

    return handler


both_fronts = pytest.mark.parametrize("front", [by_lambda_handler, by_sync])


def abandon(store: Store) -> None:
    """Leave the claim of a first attempt behind, as a process does that is killed."""

    async def claim() -> None:
        async with store.make_layer() as layer:
            now = time.time()
            await layer.acquire(claim_of(KEY, now=now, owner="first attempt", lease_seconds=600), now=now)

    asyncio.run(claim())


def stored(store: Store) -> Any:
    async def get() -> Any:
        async with store.make_layer() as layer:
            return await layer.get(KEY)

    return asyncio.run(get())


@both_fronts
def test_a_first_attempt_runs_and_a_replay_of_it_gets_its_result(front: Any, store: Store) -> None:
    steps = Steps()
    handler = front(store.make_layer(), steps)
    assert handler(EVENT, FIRST_ATTEMPT) == handler(EVENT, REPLAY) == "done with 1 operations"
    assert steps.attempts == [1]
    assert steps.registered == [FIRST_ATTEMPT.lambda_context]


@both_fronts
def test_a_replay_releases_what_its_first_attempt_left_in_progress_and_claims_anew(front: Any, store: Store) -> None:
    abandon(store)
    steps = Steps()
    handler = front(store.make_layer(), steps)
    left = stored(store)
    assert handler(EVENT, REPLAY) == "done with 2 operations"
    assert steps.attempts == [2]
    assert steps.registered == [REPLAY.lambda_context]
    now = stored(store)
    assert now.status == "COMPLETED"
    assert now.owner != left.owner == "first attempt"
    assert steps.fences == [now.fence]
    assert now.fence > left.fence
    assert handler(EVENT, FIRST_ATTEMPT) == "done with 2 operations"


@both_fronts
def test_another_first_attempt_is_no_replay_and_respects_the_claim(front: Any, store: Store) -> None:
    abandon(store)
    steps = Steps()
    left = stored(store)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        front(store.make_layer(), steps)(EVENT, FIRST_ATTEMPT)
    assert stored(store) == left
    assert steps.attempts == []


@both_fronts
def test_a_replay_refuses_a_record_without_an_owner_and_does_not_wait_for_it(front: Any, store: Store) -> None:
    abandon(store)
    store.disown()
    steps = Steps()
    left = stored(store)
    patient = IdempotencyConfig(event_key_jmespath="id", wait_timeout_seconds=600)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        front(store.make_layer(), steps, patient)(EVENT, REPLAY)
    assert left.owner is None
    assert stored(store) == left
    assert steps.attempts == []


async def test_of_two_replays_that_find_the_same_record_one_wins(store: Store) -> None:
    await asyncio.to_thread(abandon, store)
    steps, both_have_found_it = Steps(), asyncio.Event()
    async with store.make_layer() as inner:
        layer = PlannedLayer(inner=inner, clock=real_now)
        layer.plan("release", Fault(gate=both_have_found_it), Fault(gate=both_have_found_it))

        @idempotent(persistence_store=layer, config=CONFIG, key_prefix="durable")
        async def handler(event: Any, context: DurableContext) -> str:
            steps.run(context)
            await other_is_refused.wait()
            return "done"

        other_is_refused = asyncio.Event()
        replays = [asyncio.ensure_future(handler(EVENT, REPLAY)) for _ in range(2)]
        for replay in replays:
            replay.add_done_callback(lambda _: other_is_refused.set())
        async with asyncio.timeout(30):
            while layer.calls.count("release") < 2:  # noqa: ASYNC110 - of both, through the store
                await asyncio.sleep(0.002)
            both_have_found_it.set()
            results = await asyncio.gather(*replays, return_exceptions=True)
    assert sorted((type(result) for result in results), key=str) == [IdempotencyAlreadyInProgressError, str]
    assert steps.attempts == [2]


async def test_a_first_attempt_that_was_only_slow_gets_the_outcome_of_its_replay(store: Store) -> None:
    steps, entered, go_on = Steps(), asyncio.Event(), asyncio.Event()
    async with store.make_layer() as layer:

        @idempotent(persistence_store=layer, config=CONFIG, key_prefix="durable")
        async def handler(event: Any, context: DurableContext) -> str:
            if context is FIRST_ATTEMPT:
                entered.set()
                await go_on.wait()
            return steps.run(context)

        async with asyncio.timeout(30):
            slow = asyncio.ensure_future(handler(EVENT, FIRST_ATTEMPT))
            await entered.wait()
            assert await handler(EVENT, REPLAY) == "done with 2 operations"
            go_on.set()
            assert await slow == "done with 2 operations"
    assert steps.attempts == [2, 1]


async def test_a_first_attempt_that_ends_before_its_replay_has_lost_its_claim(store: Store) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()
    async with store.make_layer() as layer:

        @idempotent(persistence_store=layer, config=CONFIG, key_prefix="durable")
        async def handler(event: Any, context: DurableContext) -> str:
            if context is FIRST_ATTEMPT:
                entered.set()
                await replay_runs.wait()
                return "first"
            replay_runs.set()
            await go_on.wait()
            return "replay"

        replay_runs = asyncio.Event()
        async with asyncio.timeout(30):
            first = asyncio.ensure_future(handler(EVENT, FIRST_ATTEMPT))
            await entered.wait()
            replay = asyncio.ensure_future(handler(EVENT, REPLAY))
            with pytest.raises(IdempotencyLeaseLostError):
                await first
            go_on.set()
            assert await replay == "replay"
            assert await handler(EVENT, REPLAY) == "replay"


# --- In memory, where time jumps --------------------------------------------------------------------------------------


class Suspended(BaseException):
    pass


@pytest.mark.parametrize("options", [{}, {"on_abandoned": "raise"}, {"wait_timeout_seconds": 20.0}])
async def test_a_durable_function_continues_its_own_execution(options: Any) -> None:
    layer = PlannedLayer()
    suspend = True

    async def handler(event: Any, context: Any) -> Any:
        if suspend:
            raise Suspended
        return "done"

    durable = idempotent(persistence_store=layer, config=IdempotencyConfig(**options), key_prefix="h")(handler)
    with pytest.raises(Suspended):
        await durable(EVENT, DurableContext(1))
    suspend = False
    began = asyncio.get_running_loop().time()
    assert await durable(EVENT, DurableContext(2)) == "done"
    assert asyncio.get_running_loop().time() == began


async def test_of_two_replays_of_a_durable_function_one_wins() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 5

    async def handler(event: Any, context: Any) -> Any:
        return await till.charge(event)

    durable = idempotent(persistence_store=layer, key_prefix="h")(handler)
    first = asyncio.ensure_future(durable(EVENT, DurableContext(1)))
    await asyncio.sleep(1)
    replays = await asyncio.gather(*(durable(EVENT, DurableContext(2)) for _ in range(2)), return_exceptions=True)
    assert sorted(type(replay).__name__ for replay in replays) == ["IdempotencyAlreadyInProgressError", "dict"]
    first.cancel()


async def test_a_record_without_an_owner_is_not_superseded() -> None:
    layer = PlannedLayer()
    handler = idempotent(persistence_store=layer, key_prefix="h", config=IdempotencyConfig(wait_timeout_seconds=20))

    async def body(event: Any, context: Any) -> Any:
        raise AssertionError

    blocked = idempotent(persistence_store=layer, key_prefix="h")(Till().charge_event)
    running = asyncio.ensure_future(blocked(EVENT, None))
    await asyncio.sleep(0.1)
    foreign = only_record(layer).replace(owner=None)
    put(layer.inner, foreign)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await handler(body)(EVENT, DurableContext(2))
    running.cancel()
