from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest

from aidem import (
    DataRecord,
    RecordStatus,
    idempotency_key,
    idempotent_function,
    operations,
)
from aidem._runtime.cancellation import Immediate
from aidem.asgi import IdempotencyMiddleware, StoredResponse, request_key
from aidem.exceptions import (
    IdempotencyConfigError,
    IdempotencyResultUnavailableError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.operations import OperationRefusedError, RecordState, diagnose, find, forget, look, purge, release, resolve
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock, claim_of, completed_of
from tests.support.records import clear, put

KEY = "shop#1"
IN_DOUBT, LAPSED = "in doubt", "lapsed"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def layer(clock: FakeClock) -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer(clock=clock)


async def claimed(layer: MemoryPersistenceLayer, key: str = KEY, **options: Any) -> DataRecord:
    now = layer.clock()
    return (await layer.acquire(claim_of(key, now=now, kept_seconds=60, **options), now=now)).record


async def abandoned(
    layer: MemoryPersistenceLayer,
    clock: FakeClock,
    key: str = KEY,
    *,
    state: str = IN_DOUBT,
    payload_hash: str = "hash",
) -> DataRecord:
    record = await claimed(layer, key, may_be_taken_over=state == LAPSED, payload_hash=payload_hash, note="order 7")
    clock.advance(3)
    return record


async def states(layer: MemoryPersistenceLayer, **options: Any) -> dict[str, RecordState]:
    return {found.record.idempotency_key: found.state async for found in find(layer, **options)}


# --- Looking ----------------------------------------------------------------------------------------------------------


async def test_records_are_found_with_their_states(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    now = clock()
    await layer.acquire(claim_of("shop#expired", now=now, kept_seconds=1), now=now)
    await abandoned(layer, clock, "shop#in doubt")
    await abandoned(layer, clock, "shop#lapsed", state=LAPSED)
    await claimed(layer, "shop#running")
    record = await claimed(layer, "other#completed")
    await layer.complete(completed_of(record, now=clock(), kept_seconds=60), now=clock())
    expected = {f"{'other' if state == 'completed' else 'shop'}#{state}": state for state in RecordState}
    assert await states(layer) == expected
    for state in RecordState:
        assert list((await states(layer, state=state)).values()) == [state]
    assert len(await states(layer, prefix="shop#")) == 4
    assert len(await states(layer, limit=2)) == 2
    assert await states(layer, limit=0) == {}
    assert await look(layer, "nothing#") is None
    found = await look(layer, "shop#running")
    assert found is not None
    assert found.state is RecordState.RUNNING
    seen = list[DataRecord]()
    assert len(await states(layer, state=RecordState.IN_DOUBT, seen=seen.append)) == 1
    assert len(seen) == 5


async def test_nothing_is_read_beyond_the_limit(layer: MemoryPersistenceLayer) -> None:
    for number in range(3):
        await claimed(layer, f"shop#{number}")
    seen = list[DataRecord]()
    assert len(await states(layer, limit=2, seen=seen.append)) == 2
    assert len(seen) == 2


# --- Resolving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [IN_DOUBT, LAPSED])
async def test_a_resolved_key_is_replayed(layer: MemoryPersistenceLayer, clock: FakeClock, state: str) -> None:
    @idempotent_function(persistence_store=layer)
    async def charge(order_id: str) -> dict[str, int]:
        raise AssertionError("it must not run")

    key = idempotency_key(charge, "o-1")
    found = await abandoned(layer, clock, key, state=state)
    record = await resolve(layer, key, result={"charged": 42}, kept_seconds=100)
    assert record == await layer.get(key)
    assert (record.payload_hash, record.note, record.fence) == ("hash", "order 7", found.fence + 1)
    assert record.expiry_timestamp == int(clock()) + 100
    assert await charge("o-1") == {"charged": 42}


async def test_a_key_is_resolved_without_a_result(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    @idempotent_function(persistence_store=layer)
    async def charge(order_id: str) -> None:
        raise AssertionError("it must not run")

    key = idempotency_key(charge, "o-1")
    await abandoned(layer, clock, key)
    await resolve(layer, key, unavailable=True)
    with pytest.raises(IdempotencyResultUnavailableError):
        await charge("o-1")


async def test_a_request_is_resolved_with_a_response(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    await abandoned(layer, clock, payload_hash="http:hash")
    response = StoredResponse(201, [(b"content-type", b"text/plain")], b"paid")
    record = await resolve(layer, KEY, result=response)
    assert record.payload_hash == "http:hash"
    assert record.response_json_as_dict() == {
        "body": "paid",
        "headers": [["content-type", "text/plain"]],
        "status": 201,
    }


async def test_a_request_is_resolved_with_nothing_but_a_response_and_a_function_with_nothing_but_json(
    layer: MemoryPersistenceLayer, clock: FakeClock
) -> None:
    response = StoredResponse(200, [], b"")
    for payload_hash, result, message in (
        ("http:hash", {"status": 200}, "is the key of an HTTP request; resolve it with its response: --status"),
        ("http:hash", None, "is the key of an HTTP request"),
        ("hash", response, "is the key of a function or a block, not of an HTTP request; resolve it with --result"),
        ("", response, "not of an HTTP request"),
    ):
        found = await abandoned(layer, clock, payload_hash=payload_hash)
        with pytest.raises(OperationRefusedError, match=message):
            await resolve(layer, KEY, result=result)
        assert await layer.get(KEY) == found
        await resolve(layer, KEY, unavailable=True)
        await layer.forget(KEY)


async def test_a_response_that_an_operator_has_stored_is_sent_to_the_client(layer: MemoryPersistenceLayer) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"of the app"})

    guarded = IdempotencyMiddleware(app, persistence_store=layer, key_prefix="shop", scope=None)
    key = request_key("k-1", key_prefix="shop")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://shop") as client:
        assert (await client.post("/pay", headers={"idempotency-key": "k-1"})).text == "of the app"
        record = await layer.get(key)
        assert record is not None
        assert operations.is_of_request(record)
        await layer.forget(key)
        now = layer.clock()
        claim = claim_of(key, now=now, kept_seconds=60, may_be_taken_over=False, payload_hash=record.payload_hash)
        await layer.acquire(claim, now=now)
        await layer.renew(claim.replace(lease_expiry_timestamp=0), now=now)
        await resolve(layer, key, result=StoredResponse(201, [(b"content-type", b"text/plain")], b"of the bank"))
        answer = await client.post("/pay", headers={"idempotency-key": "k-1"})
        assert (answer.status_code, answer.text) == (201, "of the bank")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("kept_seconds", value) for value in (0, -10, math.inf, math.nan, "1")),
        *(("max_clock_skew_seconds", value) for value in (-1, math.inf, math.nan)),
    ],
)
async def test_an_option_that_cannot_work_changes_nothing(
    layer: MemoryPersistenceLayer, clock: FakeClock, option: str, value: Any
) -> None:
    found = await abandoned(layer, clock)
    options: dict[str, Any] = {option: value}
    operations: list[Any] = [resolve] if option == "kept_seconds" else [resolve, release, forget]
    for operation in operations:
        with pytest.raises(IdempotencyConfigError, match=option):
            await operation(layer, KEY, **options)
    assert await layer.get(KEY) == found
    with pytest.raises(IdempotencyConfigError, match="limit"):
        await states(layer, limit=-1)


def too_deep() -> list[Any]:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    "result",
    [object(), too_deep(), StoredResponse(99, [], b"")],
    ids=["no JSON", "too deep", "no response"],
)
async def test_a_result_that_cannot_be_stored_changes_nothing(
    layer: MemoryPersistenceLayer, clock: FakeClock, result: object
) -> None:
    found = await abandoned(layer, clock)
    with pytest.raises(IdempotencySerializationError, match="cannot be stored"):
        await resolve(layer, KEY, result=result)
    assert await layer.get(KEY) == found


@pytest.mark.parametrize("state", [IN_DOUBT, LAPSED])
async def test_a_released_key_runs_again(layer: MemoryPersistenceLayer, clock: FakeClock, state: str) -> None:
    await abandoned(layer, clock, state=state)
    await release(layer, KEY)
    assert await layer.get(KEY) is None


async def refusals(layer: MemoryPersistenceLayer, message: str) -> None:
    before = await layer.get(KEY)
    for operation in (resolve, release):
        with pytest.raises(OperationRefusedError, match=message) as refused:
            await operation(layer, KEY)
        assert refused.value.key == KEY
    assert await layer.get(KEY) == before


@pytest.mark.parametrize("options", [{}, {"may_be_taken_over": False}, {"lease_seconds": None}])
async def test_a_running_claim_is_refused_and_force_does_it(
    layer: MemoryPersistenceLayer, options: dict[str, Any]
) -> None:
    await claimed(layer, note="order 7", **options)
    end = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    message = (
        rf"is running \(note: order 7\): its lease holds until {end}, or longer if its owner renews it; wait until the "
        "lease has passed, or force it, and then its effect may come twice"
    )
    await refusals(layer, message)
    with pytest.raises(OperationRefusedError, match="is running"):
        await forget(layer, KEY)
    await release(layer, KEY, force=True)
    assert await layer.get(KEY) is None
    await claimed(layer, **options)
    await forget(layer, KEY, force=True)
    assert await layer.get(KEY) is None
    await claimed(layer, **options)
    assert (await resolve(layer, KEY, force=True)).status is RecordStatus.COMPLETED


async def test_a_claim_that_holds_for_ever_is_refused(layer: MemoryPersistenceLayer) -> None:
    record = await claimed(layer, lease_seconds=None)
    put(layer, record.replace(expiry_timestamp=None))
    await refusals(layer, "is running: its lease holds for ever, or")


async def test_a_claim_that_an_open_transaction_holds_is_refused_even_by_force(clock: FakeClock) -> None:
    layer = Held(clock=clock)
    await claimed(layer)
    for operation in (resolve, release):
        with pytest.raises(OperationRefusedError, match="is held by an open transaction; try again when"):
            await operation(layer, KEY, force=True)


async def test_a_key_without_a_claim_is_refused(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    await refusals(layer, "there is no record of shop#1")
    with pytest.raises(OperationRefusedError, match="there is no record"):
        await forget(layer, KEY)
    record = await claimed(layer)
    await layer.complete(completed_of(record, now=clock(), kept_seconds=60), now=clock())
    await refusals(layer, "has an outcome; drop it with forget")
    clock.advance(100)
    await refusals(layer, "has expired: its function runs at the next call")


async def test_forget_drops_what_does_not_run(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    for state in (IN_DOUBT, LAPSED):
        await abandoned(layer, clock, state=state)
        await forget(layer, KEY)
        assert await layer.get(KEY) is None
    record = await claimed(layer)
    await layer.complete(completed_of(record, now=clock(), kept_seconds=60), now=clock())
    await forget(layer, KEY)
    assert await layer.get(KEY) is None


async def test_forget_drops_an_expired_record_and_not_the_claim_of_a_call_that_comes_meanwhile(
    clock: FakeClock,
) -> None:
    layer = Racing(clock=clock)
    for _ in range(2):
        record = await claimed(layer)
        await layer.complete(completed_of(record, now=clock(), kept_seconds=1), now=clock())
        clock.advance(3)
    await forget(layer, KEY)
    assert await layer.get(KEY) is None

    await claimed(layer)
    clock.advance(100)
    layer.before_acquire = lambda layer: put(layer, claim_of(KEY, now=clock(), owner="a call"))
    with pytest.raises(OperationRefusedError, match="is running"):
        await forget(layer, KEY)
    found = await layer.get(KEY)
    assert found is not None
    assert found.owner == "a call"


async def test_forget_drops_an_outcome_that_has_expired_here_and_not_yet_by_the_clock_of_the_store(
    clock: FakeClock,
) -> None:
    layer = Racing(clock=clock)
    record = await claimed(layer)
    await layer.complete(completed_of(record, now=clock(), kept_seconds=10), now=clock())
    clock.advance(20)
    layer.before_acquire = lambda _layer: clock.advance(-20)
    await forget(layer, KEY)
    assert await layer.get(KEY) is None


async def test_purge_removes_what_has_expired(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    await claimed(layer)
    clock.advance(100)
    await claimed(layer, "shop#2")
    assert await purge(layer) == 1


# --- Races ------------------------------------------------------------------------------------------------------------


class Racing(MemoryPersistenceLayer):
    """Lets somebody else do something just before an operation."""

    before_acquire: Any = staticmethod(lambda _layer: None)
    before_take_over = before_complete = before_release = staticmethod(lambda _layer: None)

    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Any]:
        before, self.before_acquire = self.before_acquire, lambda _layer: None
        before(self)
        return super().acquire(record, **options)

    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        self.before_take_over(self)
        return super().take_over(found, record, **options)

    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        self.before_complete(self)
        return super().complete(record, now=now)

    def release(self, record: DataRecord) -> Immediate[bool]:
        self.before_release(self)
        return super().release(record)


class Held(MemoryPersistenceLayer):
    """Every record of it is held by an open transaction."""

    def take_over(self, *_arguments: Any, **_options: Any) -> Immediate[DataRecord | None]:
        return Immediate(None)


def renewed(layer: MemoryPersistenceLayer) -> None:
    put(layer, layer.records()[KEY].replace(lease_expiry_timestamp=int(layer.clock() + 60) * 1000))


def completed(layer: MemoryPersistenceLayer) -> None:
    put(layer, completed_of(layer.records()[KEY], now=layer.clock()))


def dropped(layer: MemoryPersistenceLayer) -> None:
    clear(layer)


def taken(layer: MemoryPersistenceLayer) -> None:
    put(layer, layer.records()[KEY].replace(owner="another operator"))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (renewed, "is running"),
        (completed, "has an outcome"),
        (dropped, "is gone: somebody else was quicker"),
        (taken, "was changed by somebody else, has hardly lapsed, or"),
    ],
)
async def test_an_owner_or_an_operator_who_is_quicker_is_left_alone(clock: FakeClock, event: Any, message: str) -> None:
    for operation in (resolve, release):
        layer = Racing(clock=clock)
        await abandoned(layer, clock)
        layer.before_take_over = event
        with pytest.raises(OperationRefusedError, match=message):
            await operation(layer, KEY)


async def test_a_claim_that_is_lost_after_it_was_taken_over_is_told(clock: FakeClock) -> None:
    for operation, moment in ((resolve, "before_complete"), (release, "before_release")):
        layer = Racing(clock=clock)
        await abandoned(layer, clock)
        setattr(layer, moment, taken)
        with pytest.raises(OperationRefusedError, match="was taken over by somebody else meanwhile"):
            await operation(layer, KEY)


async def test_of_operators_at_once_one_resolves(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    await abandoned(layer, clock)
    answers = await asyncio.gather(*(resolve(layer, KEY, result=n) for n in range(5)), return_exceptions=True)
    records = [answer for answer in answers if isinstance(answer, DataRecord)]
    assert records == [await layer.get(KEY)]
    assert sum(isinstance(answer, OperationRefusedError) for answer in answers) == 4


@pytest.mark.parametrize("state", [IN_DOUBT, LAPSED])
async def test_an_operator_who_dies_half_way_leaves_what_was_there(clock: FakeClock, state: str) -> None:
    def dies(_layer: MemoryPersistenceLayer) -> None:
        raise SystemExit

    layer = Racing(clock=clock)
    await abandoned(layer, clock, state=state)
    layer.before_complete = dies
    with pytest.raises(SystemExit):
        await resolve(layer, KEY)
    found = await look(layer, KEY)
    assert found is not None
    assert (found.state, found.record.note) == (RecordState.RUNNING, "order 7")
    clock.advance(operations.HELD_SECONDS + 0.001)
    assert list((await states(layer)).values()) == [state]


# --- Layers without the operations ------------------------------------------------------------------------------------


class Bare:
    """A layer with nothing optional."""

    clock = staticmethod(lambda: 0.0)

    async def open(self) -> None:
        self.is_open = True

    async def get(self, key: str) -> DataRecord:
        return claim_of(key, now=-100, kept_seconds=1000)

    async def forget(self, key: str) -> None:
        self.forgotten = key


async def test_a_layer_that_cannot_do_it_is_told() -> None:
    layer: Any = Bare()
    with pytest.raises(IdempotencyUsageError, match=r"Bare cannot list its records: it has no scan"):
        await states(layer)
    with pytest.raises(IdempotencyUsageError, match=r"Bare cannot take claims over: it has no take_over"):
        await release(layer, KEY)
    with pytest.raises(IdempotencyUsageError, match="the store of Bare removes expired records by itself"):
        await purge(layer)
    assert await diagnose(layer) == ({}, ())
    assert layer.is_open
    await forget(layer, KEY)
    assert layer.forgotten == KEY
