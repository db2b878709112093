"""Leases: renewed while the body runs and not a moment longer, lost without harm, measured from before the request."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import time
import weakref
from contextvars import ContextVar
from typing import Any

import pytest

from aidem import (
    IdempotencyConfig,
    RecordStatus,
    current_execution,
    idempotency,
    idempotent_function,
    register_lambda_context,
)
from aidem._engine.call import Call
from aidem._engine.plan import CallKey, Plan
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyUsageError,
)
from aidem.hooks import EventKind
from aidem.persistence import Blocked
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import (
    EPOCH,
    NO_ROUTE,
    VIRTUAL_TIME,
    DeclinedError,
    Fault,
    InMemory,
    Listener,
    PlannedLayer,
    Till,
    VirtualTimeLoop,
    closed_when,
    made_idempotent,
    only_record,
    other_process,
    wall_clock,
)
from tests.support.records import clear, put

ORDER = {"id": 7}


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


class LambdaContext:
    def __init__(self, milliseconds: int) -> None:
        self.milliseconds = milliseconds

    def get_remaining_time_in_millis(self) -> int:
        return self.milliseconds


async def test_a_lease_is_renewed_at_a_third_while_the_body_runs() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 100
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, lease_seconds=30)(ORDER))
    await asyncio.sleep(95)
    assert layer.calls == ["acquire"] + ["renew"] * 9
    with pytest.raises(Exception, match="already in progress"):
        await made_idempotent(till.charge, other_process(layer))(ORDER)
    assert await task == {"receipt": 1}


async def test_nothing_is_renewed_after_the_body_has_ended() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 25
    await made_idempotent(till.charge, layer, lease_seconds=30)(ORDER)
    asked = list(layer.calls)
    assert asked.count("renew") == 2
    await asyncio.sleep(1000)
    assert layer.calls == asked


async def test_a_short_call_pays_for_no_task() -> None:
    layer, till = PlannedLayer().inner, Till()
    tasks: list[Any] = []

    async def charge(order: Any) -> Any:
        tasks.extend(asyncio.all_tasks())
        return await till.charge(order)

    before = asyncio.all_tasks()
    await made_idempotent(charge, layer)(ORDER)
    assert set(tasks) == before


async def test_a_lease_that_is_not_renewed_lapses_at_its_end() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 100
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer, lease_seconds=30, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    succeeding = Till()
    assert await made_idempotent(succeeding.charge, other_process(layer))(ORDER) == {"receipt": 1}
    assert "renew" not in layer.calls
    await owner


async def test_without_a_lease_a_claim_holds_until_its_record_expires() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 2000
    options: dict[str, Any] = {"lease_seconds": None, "expires_after_seconds": 1000}
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer, **options)(ORDER))
    await asyncio.sleep(999)
    record = only_record(layer)
    assert record.in_progress_expiry_timestamp is None
    assert record.lease_expiry_timestamp is None
    with pytest.raises(Exception, match="already in progress"):
        await made_idempotent(till.charge, other_process(layer))(ORDER)
    await asyncio.sleep(3)
    assert await made_idempotent(Till().charge, other_process(layer))(ORDER) == {"receipt": 1}
    assert "renew" not in layer.calls
    owner.cancel()


async def test_a_held_lease_is_never_past_its_records_expiry() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 10
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, lease_seconds=9, expires_after_seconds=1)(ORDER))
    await asyncio.sleep(1)
    for _ in range(2):
        record = only_record(layer)
        assert record.expiry_timestamp * 1000 >= record.in_progress_expiry_timestamp
        await asyncio.sleep(5)
    assert await task == {"receipt": 1}


async def test_the_window_counts_from_completion() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 50
    await made_idempotent(till.charge, layer, expires_after_seconds=100)(ORDER)
    assert only_record(layer).expiry_timestamp == int(EPOCH + asyncio.get_running_loop().time()) + 100


async def test_the_lambda_context_sets_the_lease_and_nothing_renews_it() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 80

    async def invocation() -> Any:
        register_lambda_context(LambdaContext(90_000))
        return await made_idempotent(till.charge, layer, lease_seconds=3)(ORDER)

    began = EPOCH + asyncio.get_running_loop().time()
    task = asyncio.ensure_future(invocation())
    await asyncio.sleep(70)
    assert only_record(layer).in_progress_expiry_timestamp == int((began + 90) * 1000)
    assert layer.calls == ["acquire"]
    assert await task == {"receipt": 1}


async def test_a_lambda_lease_is_at_least_a_second_long() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 0.5
    began = EPOCH + asyncio.get_running_loop().time()
    config = IdempotencyConfig(lambda_context=LambdaContext(0))
    charge = idempotent_function(persistence_store=layer, config=config)(till.charge)
    task = asyncio.ensure_future(charge(ORDER))
    await asyncio.sleep(0.1)
    assert only_record(layer).in_progress_expiry_timestamp == int((began + 1) * 1000)
    await task


async def test_a_loser_hands_out_the_winners_outcome_and_changes_nothing(caplog: Any) -> None:
    layer, listener = PlannedLayer(), Listener()
    loser, winner = Till(), Till()
    loser.seconds, winner.charges = 60, ["earlier"]
    options: dict[str, Any] = {"lease_seconds": 30, "renew_lease": False, "hooks": (listener,)}
    task = asyncio.ensure_future(made_idempotent(loser.charge, layer, **options)(ORDER))
    await asyncio.sleep(31)
    assert await made_idempotent(winner.charge, other_process(layer))(ORDER) == {"receipt": 2}
    stored = only_record(layer)
    assert await task == {"receipt": 2}
    assert only_record(layer) == stored
    assert listener.kinds == [
        EventKind.CLAIMED,
        EventKind.LEASE_LOST,
        EventKind.ABANDONED,
        EventKind.REPLAYED,
    ]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_a_loser_waits_for_the_winner_as_a_waiter_does() -> None:
    layer, loser, winner = PlannedLayer(), Till(), Till()
    loser.seconds, winner.seconds, winner.charges = 60, 60, ["earlier"]
    options: dict[str, Any] = {"lease_seconds": 30, "renew_lease": False, "wait_timeout_seconds": 100}
    task = asyncio.ensure_future(made_idempotent(loser.charge, layer, **options)(ORDER))
    await asyncio.sleep(31)
    winning = asyncio.ensure_future(made_idempotent(winner.charge, other_process(layer))(ORDER))
    assert await task == await winning == {"receipt": 2}


@pytest.mark.parametrize("winner_ends", ["runs on", "fails"])
async def test_a_loser_whose_winner_has_no_outcome_raises(winner_ends: str) -> None:
    layer, loser, winner = PlannedLayer(), Till(), Till()
    loser.seconds = 60
    if winner_ends == "runs on":
        winner.seconds = 60
    else:
        winner.error = RuntimeError("declined")
    options: dict[str, Any] = {"lease_seconds": 30, "renew_lease": False, "wait_timeout_seconds": 10}
    task = asyncio.ensure_future(made_idempotent(loser.charge, layer, **options)(ORDER))
    await asyncio.sleep(31)
    winning = asyncio.ensure_future(made_idempotent(winner.charge, other_process(layer))(ORDER))
    await asyncio.sleep(0)
    if winner_ends == "runs on":
        with pytest.raises(IdempotencyLeaseLostError, match="effect may have happened") as caught:
            await task
        assert caught.value.record is not None
        assert await winning == {"receipt": 1}
    else:
        with pytest.raises(RuntimeError):
            await winning
        assert await task == {"receipt": 1}  # nobody's record is there, so the outcome is ours to store
        assert only_record(layer).status is RecordStatus.COMPLETED


async def test_a_loser_in_a_block_that_has_handed_its_result_out_raises() -> None:
    layer, loser, winner = PlannedLayer(), Till(), Till()
    loser.seconds, winner.charges = 60, ["earlier"]
    config = IdempotencyConfig(lease_seconds=30, renew_lease=False)

    async def block() -> Any:
        async with idempotency(ORDER, persistence_store=layer, config=config, key_prefix="charge") as execution:
            return await execution.run(loser.charge, ORDER)

    task = asyncio.ensure_future(block())
    await asyncio.sleep(31)
    await made_idempotent(winner.charge, other_process(layer))(ORDER)
    with pytest.raises(IdempotencyLeaseLostError, match="another outcome") as caught:
        await task
    assert caught.value.record == only_record(layer)


async def test_a_lost_lease_is_told_at_once_and_the_body_is_left_to_finish(caplog: Any) -> None:
    layer, listener, till = PlannedLayer(), Listener(), Till()
    till.seconds = 60
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, hooks=(listener,), lease_seconds=30)(ORDER))
    await asyncio.sleep(5)
    await layer.inner.forget(only_record(layer).idempotency_key)
    await asyncio.sleep(6)
    assert listener.kinds == [EventKind.CLAIMED, EventKind.LEASE_LOST]
    assert "has lost its lease" in caplog.text
    assert layer.calls.count("renew") == 1
    assert not task.done()
    assert await task == {"receipt": 1}
    assert listener.kinds == [EventKind.CLAIMED, EventKind.LEASE_LOST, EventKind.EXECUTED]


async def test_a_renewal_that_fails_is_tried_again_before_the_lease_passes() -> None:
    layer, listener, till = PlannedLayer(), Listener(), Till()
    down = IdempotencyPersistenceConnectionError("no route")
    layer.plan("renew", Fault(error=down), Fault(error=down))
    till.seconds = 40
    await made_idempotent(till.charge, layer, hooks=(listener,), lease_seconds=30)(ORDER)
    assert EventKind.LEASE_LOST not in listener.kinds
    assert listener.kinds.count(EventKind.PERSISTENCE_ERROR) == 2
    assert layer.calls.count("renew") >= 4


async def test_a_lease_that_passes_while_the_store_is_down_is_told_once() -> None:
    layer, listener, till = PlannedLayer(), Listener(), Till()
    down = IdempotencyPersistenceConnectionError("no route")
    layer.plan("renew", *(Fault(error=down) for _ in range(20)))
    till.seconds = 60
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, hooks=(listener,), lease_seconds=30)(ORDER))
    await asyncio.sleep(29)
    assert EventKind.LEASE_LOST not in listener.kinds
    await asyncio.sleep(5)
    assert listener.kinds.count(EventKind.LEASE_LOST) == 1
    assert await task == {"receipt": 1}


async def test_renewal_ends_when_the_task_of_its_body_is_dead() -> None:
    layer = PlannedLayer()
    config = IdempotencyConfig(lease_seconds=30)
    manager = idempotency("k", persistence_store=layer, config=config)

    async def enter_and_die() -> None:
        await manager.__aenter__()

    await asyncio.ensure_future(enter_and_die())
    await asyncio.sleep(1000)
    assert "renew" not in layer.calls


async def test_renewal_ends_when_the_task_of_its_body_dies_between_two_renewals() -> None:
    layer = PlannedLayer()
    manager = idempotency("k", persistence_store=layer, config=IdempotencyConfig(lease_seconds=30))

    async def enter_and_die() -> None:
        await manager.__aenter__()
        await asyncio.sleep(15)

    await asyncio.ensure_future(enter_and_die())
    await asyncio.sleep(1000)
    assert layer.calls == ["acquire", "renew"]


async def test_claims_of_one_loop_are_renewed_each_at_its_own_time() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 10
    long, short = (made_idempotent(till.charge, layer, lease_seconds=seconds) for seconds in (27, 9))
    await asyncio.gather(long({"id": 1}), short({"id": 2}), long({"id": 3}))
    assert layer.calls.count("renew") == 1 + 3 + 1


async def test_a_claim_without_a_lease_can_be_confirmed() -> None:
    layer = PlannedLayer()

    async def charge(order: Any) -> Any:
        await current_execution().ensure_owned()
        return only_record(layer).in_progress_expiry_timestamp

    assert await made_idempotent(charge, layer, lease_seconds=None)(ORDER) is None


async def test_renewal_ends_when_its_call_is_gone() -> None:
    layer = PlannedLayer()
    config = IdempotencyConfig(lease_seconds=30)
    await idempotency("k", persistence_store=layer, config=config).__aenter__()
    gc.collect()
    await asyncio.sleep(1000)
    assert "renew" not in layer.calls


async def test_finished_calls_leave_no_cycles_for_the_collector() -> None:
    layer, till = PlannedLayer().inner, Till()
    charge = made_idempotent(till.charge, layer, wait_timeout_seconds=1)
    await charge(0)
    gc.collect()
    gc.freeze()  # what other tests have left is not looked at
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await charge(1)
        await charge(1)
        gc.collect()
        garbage = {type(thing).__name__ for thing in gc.garbage if type(thing).__module__.startswith("aidem")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert garbage == set()


async def test_ensure_owned_renews_at_the_store() -> None:
    layer = PlannedLayer()

    async def charge(order: Any) -> Any:
        await asyncio.sleep(5)
        before = only_record(layer)
        await current_execution().ensure_owned()
        assert only_record(layer).in_progress_expiry_timestamp == before.in_progress_expiry_timestamp + 5000
        assert current_execution().record == only_record(layer)
        return 1

    assert await made_idempotent(charge, layer)(ORDER) == 1
    assert layer.calls == ["acquire", "renew", "complete"]


async def test_ensure_owned_raises_when_the_claim_is_not_ours_any_more() -> None:
    layer, listener, winner = PlannedLayer(), Listener(), Till()

    async def charge(order: Any) -> Any:
        await asyncio.sleep(31)
        await made_idempotent(winner.charge, other_process(layer))(ORDER)
        await current_execution().ensure_owned()

    options: dict[str, Any] = {"renew_lease": False, "hooks": (listener,)}
    with pytest.raises(IdempotencyLeaseLostError):
        await made_idempotent(charge, layer, **options)(ORDER)
    assert EventKind.LEASE_LOST in listener.kinds
    assert only_record(layer).status is RecordStatus.COMPLETED  # the winner's: the loser released nothing


async def test_ensure_owned_never_guesses_when_the_store_does_not_answer() -> None:
    layer = PlannedLayer().plan("renew", Fault(error=OSError("no route")))

    async def charge(order: Any) -> Any:
        with pytest.raises(Exception, match="OSError; the function is running"):
            await current_execution().ensure_owned()
        return 1

    assert await made_idempotent(charge, layer)(ORDER) == 1


async def test_ensure_owned_is_for_a_running_body() -> None:
    layer = PlannedLayer()
    async with idempotency("k", persistence_store=layer) as execution:
        assert not execution.replayed
    with pytest.raises(IdempotencyUsageError):
        await execution.ensure_owned()
    async with idempotency("k", persistence_store=layer) as execution:
        assert execution.replayed
        with pytest.raises(IdempotencyUsageError):
            await execution.ensure_owned()


FORKING = """
import asyncio, json, os, sys
from aidem import current_execution, idempotent_function
from tests.support.planned import PlannedLayer, real_now

layer = PlannedLayer(clock=real_now)
layer.inner.clock = real_now
parent = os.getpid()
seen = []

async def charge(ending):
    if os.fork():
        os.wait()
        return "parent"
    try:
        await current_execution().ensure_owned()
    except Exception as error:
        seen.append(type(error).__name__)
    if ending == "raises":
        raise RuntimeError
    return "child"

try:
    seen.append(asyncio.run(idempotent_function(persistence_store=layer)(charge)(sys.argv[1])))
except BaseException as error:
    seen.append(type(error).__name__)
record, = layer.inner.records().values()
print(json.dumps([os.getpid() == parent, seen, layer.calls, record.status]), flush=True)
"""


@pytest.mark.parametrize(("ending", "error"), [("returns", "IdempotencyLeaseLostError"), ("raises", "RuntimeError")])
def test_a_fork_neither_renews_nor_completes_nor_releases_its_parents_claim(ending: str, error: str) -> None:
    run = subprocess.run([sys.executable, "-c", FORKING, ending], capture_output=True, text=True, check=True)
    child, parent = map(json.loads, run.stdout.splitlines())
    assert child == [False, ["IdempotencyLeaseLostError", error], ["acquire"], "INPROGRESS"]
    assert parent == [True, ["parent"], ["acquire", "complete"], "COMPLETED"]


async def test_the_first_renewal_counts_from_before_the_request() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(after_seconds=25)), Till()
    till.seconds = 20
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire", "renew", "renew", "complete"]


async def test_a_renewal_that_hangs_does_not_hide_that_the_lease_has_passed() -> None:
    hangs = [Fault(gate=asyncio.Event()) for _ in range(10)]
    layer, till, listener = PlannedLayer().plan("renew", *hangs), Till(), Listener()
    till.seconds = 60
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, hooks=(listener,))(ORDER))
    await asyncio.sleep(31)
    assert EventKind.LEASE_LOST in listener.kinds
    assert await task == {"receipt": 1}


async def test_a_request_that_hangs_does_not_use_up_the_lease() -> None:
    for operation in ("renew", "complete"):
        layer, till, listener = PlannedLayer().plan(operation, Fault(gate=asyncio.Event())), Till(), Listener()
        till.seconds = 60
        assert await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER) == {"receipt": 1}
        assert listener.kinds == [EventKind.CLAIMED, EventKind.PERSISTENCE_ERROR, EventKind.EXECUTED]


async def test_a_claim_does_not_expire_while_others_still_hold_its_lease_for_held() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 1
    settings = {"expires_after_seconds": 35, "lease_seconds": 30, "max_clock_skew_seconds": 10}
    running = asyncio.ensure_future(made_idempotent(till.charge, layer, **settings)(ORDER))
    await asyncio.sleep(0.5)
    claim = only_record(layer)
    assert claim.expiry_timestamp * 1000 >= claim.in_progress_expiry_timestamp + 10_000
    await running


async def test_ensure_owned_that_timed_out_does_not_shorten_the_completion() -> None:
    layer, till = PlannedLayer().plan("renew", Fault(before_seconds=0.5)), Till()

    async def body(order: Any) -> Any:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await current_execution().ensure_owned()
        await asyncio.sleep(6)
        return await till.charge(order)

    layer.plan("complete", Fault(before_seconds=0.5))
    assert await made_idempotent(body, layer)(ORDER) == {"receipt": 1}


async def test_ensure_owned_does_not_pass_when_its_answer_came_after_the_lease() -> None:
    layer, successor = PlannedLayer().plan("renew", Fault(after_seconds=40)), Till()
    successor.seconds = 25
    passed: list[Any] = []

    async def body(order: Any) -> None:
        await current_execution().ensure_owned()
        passed.append(order)

    first = asyncio.ensure_future(made_idempotent(body, layer, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    second = asyncio.ensure_future(made_idempotent(successor.charge, other_process(layer))(ORDER))
    with pytest.raises(IdempotencyLeaseLostError):
        await first
    assert not second.done()
    assert not passed
    await second


async def test_ensure_owned_on_a_store_slower_than_the_lease_is_an_error() -> None:
    layer = PlannedLayer().plan("renew", *(Fault(before_seconds=0.6, after_seconds=0.6) for _ in range(9)))

    async def body(order: Any) -> Any:
        with pytest.raises(IdempotencyPersistenceConnectionError, match="later than the lease lasts"):
            await current_execution().ensure_owned()
        return 1

    assert await made_idempotent(body, layer, lease_seconds=1, renew_lease=False)(ORDER) == 1


async def test_a_call_without_a_record_or_claim_says_so() -> None:
    plan = Plan(layer=PlannedLayer(), config=IdempotencyConfig(), function="f", prefix="f")
    call = Call(plan, CallKey(""))
    with pytest.raises(IdempotencyUsageError, match="no record"):
        call.held_record()
    with pytest.raises(IdempotencyUsageError, match="no claim"):
        await call.complete("1")


# --- At most once ---


async def test_under_raise_a_running_claim_is_in_progress_and_a_lapsed_one_in_doubt() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 50
    options: dict[str, Any] = {"on_abandoned": "raise", "lease_seconds": 30, "renew_lease": False}
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer, **options)(ORDER))
    await asyncio.sleep(29)
    assert only_record(layer).in_progress_expiry_timestamp is None
    with pytest.raises(Exception, match="already in progress"):
        await made_idempotent(till.charge, other_process(layer))(ORDER)
    await asyncio.sleep(2)
    with pytest.raises(IdempotencyInDoubtError) as caught:
        await made_idempotent(till.charge, other_process(layer))(ORDER)
    assert caught.value.record == only_record(layer)
    assert len(till.charges) == 1
    assert await owner == {"receipt": 1}  # it was only slow, and still the owner


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, BaseException, asyncio.CancelledError])
async def test_under_raise_an_exit_that_is_no_exception_leaves_the_key_in_doubt_at_once(error: Any) -> None:
    layer, till = PlannedLayer(), Till()
    seen: list[BaseException] = []

    async def charge(order: Any) -> Any:
        till.charges.append(order)
        raise error

    async def call() -> None:
        try:
            await made_idempotent(charge, layer, on_abandoned="raise")(ORDER)
        except BaseException as caught:  # noqa: BLE001 - SystemExit too
            seen.append(caught)

    await call()
    assert [type(caught) for caught in seen] == [error]
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(till.charge, layer)(ORDER)


async def test_under_raise_an_ordinary_exception_gives_the_key_back() -> None:
    layer, till = PlannedLayer(), Till()
    till.error = RuntimeError("declined")
    with pytest.raises(RuntimeError):
        await made_idempotent(till.charge, layer, on_abandoned="raise")(ORDER)
    assert not layer.inner.records()


async def test_a_key_in_doubt_is_resolved_by_releasing_completing_or_forgetting_it() -> None:
    async def doubt() -> tuple[PlannedLayer, IdempotencyInDoubtError]:
        layer = PlannedLayer()

        async def charge(order: Any) -> Any:
            raise SystemExit

        with pytest.raises(SystemExit):
            await made_idempotent(charge, layer, on_abandoned="raise")(ORDER)
        with pytest.raises(IdempotencyInDoubtError) as caught:
            await made_idempotent(charge, layer, on_abandoned="raise")(ORDER)
        return layer, caught.value

    layer, error = await doubt()
    assert await layer.release(error.record)
    assert await made_idempotent(Till().charge, layer)(ORDER) == {"receipt": 1}

    layer, error = await doubt()
    now = layer.clock()
    done = error.record.replace(
        status=RecordStatus.COMPLETED, response_data='{"receipt": 9}', expiry_timestamp=int(now) + 100
    )
    assert await layer.complete(done, now=now)
    assert await made_idempotent(Till().charge, layer)(ORDER) == {"receipt": 9}

    layer, error = await doubt()
    await layer.forget(str(error.key))
    assert await made_idempotent(Till().charge, layer)(ORDER) == {"receipt": 1}


async def test_where_clients_clocks_judge_a_claim_is_in_doubt_only_after_the_skew() -> None:
    class JudgedByClients(PlannedLayer):
        async def acquire(self, record: Any, *, now: float, max_clock_skew_seconds: float = 0.0) -> Any:
            answer = await super().acquire(record, now=now)
            return Blocked(answer.record) if isinstance(answer, Blocked) else answer

    layer, till = JudgedByClients(), Till()
    till.seconds = 100
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer, on_abandoned="raise", renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await made_idempotent(till.charge, layer, max_clock_skew_seconds=5)(ORDER)
    await asyncio.sleep(5)
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(till.charge, layer, max_clock_skew_seconds=5)(ORDER)
    owner.cancel()


# --- Whose context, and what is kept alive ----------------------------------------------------------------------------

REQUEST: ContextVar[object] = ContextVar("request", default=None)


async def test_renewals_and_their_hooks_run_in_the_context_of_their_own_call() -> None:
    seen: list[tuple[str, object]] = []

    class Looking(PlannedLayer):
        async def renew(self, record: Any, *, now: float) -> Any:
            seen.append((record.idempotency_key, REQUEST.get()))
            return await super().renew(record, now=now)

    class Hook:
        def on_event(self, event: Any) -> None:
            if event.kind is EventKind.PERSISTENCE_ERROR:
                seen.append((event.key, REQUEST.get()))

    requests: dict[str, object] = {}

    async def charge(number: int) -> None:
        requests[current_execution().key] = REQUEST.get()
        await asyncio.sleep(15)

    async def call(number: int) -> None:
        REQUEST.set(f"request {number}")
        await idempotent_function(persistence_store=layer, config=config, key_prefix="charge")(charge)(number)

    down = IdempotencyPersistenceConnectionError("no route")
    layer = Looking().plan("renew", Fault(error=down), Fault(error=down))
    config = IdempotencyConfig(lease_seconds=30, hooks=(Hook(),))
    await asyncio.gather(call(1), call(2))
    assert len(seen) >= 6
    assert {key for key, _ in seen} == set(requests)
    assert all(request is requests[key] for key, request in seen)


class Request:
    """Something large that a call has in its context."""


async def weak_request_of(call: Any) -> weakref.ref[Request]:
    """Make a call in a task that has a request in its context; return a weak reference to the request."""

    async def with_request() -> weakref.ref[Request]:
        request = Request()
        REQUEST.set(request)
        await call()
        return weakref.ref(request)

    reference = await asyncio.ensure_future(with_request())
    await asyncio.sleep(0)  # for the loop still holds the task, in this turn
    gc.collect()
    return reference


async def test_the_first_call_of_a_loop_is_not_kept_alive_by_what_the_others_share() -> None:
    layer, till, short = PlannedLayer(), Till(), Till()
    till.seconds = 9
    await made_idempotent(short.charge, layer)(0)  # imports, and whatever else happens once
    charge, quick = (made_idempotent(each.charge, layer, lease_seconds=30) for each in (till, short))
    first = await weak_request_of(lambda: quick(1))
    second = asyncio.ensure_future(charge(2))
    third = await weak_request_of(lambda: quick(3))
    assert first() is None
    assert third() is None
    await second


async def test_callers_in_line_are_not_kept_alive_by_the_one_that_leads() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 5
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(1)

    async def give_up() -> None:
        with pytest.raises(IdempotencyAlreadyInProgressError):
            await made_idempotent(till.charge, layer, wait_timeout_seconds=1)(ORDER)

    in_line = await weak_request_of(give_up)
    assert in_line() is None
    assert await owner == {"receipt": 1}


def test_a_coroutine_closed_after_its_loop_leaves_the_task_of_its_renewal_alone() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 60
    loop = VirtualTimeLoop()
    task = loop.create_task(made_idempotent(till.charge, layer)(ORDER))
    loop.run_until_complete(asyncio.sleep(15))
    assert layer.calls == ["acquire", "renew"]
    left = asyncio.all_tasks(loop)
    assert len(left) == 2
    loop.close()
    for pending in left:
        pending._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    coroutine.close()


# --- A machine that was suspended -------------------------------------------------------------------------------------


class SuspendingLayer(PlannedLayer):
    """Suspends the machine for an hour within operations: the loop's clock stands still, and the server's goes on."""

    def __init__(self, monkeypatch: Any, **operations: int) -> None:
        super().__init__(inner=MemoryPersistenceLayer(clock=self._now))
        self.clock = self._now
        self.suspended_seconds = 0.0
        self.operations = operations
        clock_gettime = time.clock_gettime
        monkeypatch.setattr(time, "clock_gettime", lambda clock: clock_gettime(clock) + self.suspended_seconds)

    __hash__ = object.__hash__

    def _now(self) -> float:
        return wall_clock() + self.suspended_seconds

    async def _do(self, operation: str, apply: Any) -> Any:
        answer = await super()._do(operation, apply)
        if self.operations.get(operation, 0):
            self.operations[operation] -= 1
            self.suspended_seconds += 3600.0
        return answer


async def test_a_claim_over_which_the_machine_was_suspended_is_renewed_before_its_body_runs(monkeypatch: Any) -> None:
    layer, till = SuspendingLayer(monkeypatch, acquire=1), Till()
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire", "renew", "complete"]


async def test_ensure_owned_asks_again_when_the_machine_was_suspended_before_the_answer(monkeypatch: Any) -> None:
    layer = SuspendingLayer(monkeypatch, renew=1)

    async def charge(order: Any) -> None:
        await current_execution().ensure_owned()

    await made_idempotent(charge, layer)(ORDER)
    assert layer.calls == ["acquire", "renew", "renew", "complete"]


# --- Failing renewals -------------------------------------------------------------------------------------------------


async def test_an_outage_over_many_renewals_is_one_line_and_another_when_it_is_over(caplog: Any) -> None:
    layer, till = PlannedLayer(), Till()
    down = IdempotencyPersistenceConnectionError("no route")
    layer.plan("renew", *(Fault(error=down) for _ in range(5)))
    till.seconds = 40
    await made_idempotent(till.charge, layer, lease_seconds=30)(ORDER)
    assert layer.calls.count("renew") > 5
    failed, renewed = caplog.messages
    assert "could not be renewed" in failed
    assert "no route" in failed
    assert "renewed at try 6" in renewed


async def test_every_loss_of_a_recovered_lease_is_told() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    down = [Fault(error=NO_ROUTE) for _ in range(10)]
    layer.plan("renew", *down, Fault(), *down)
    till.seconds = 120
    await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert listener.kinds.count(EventKind.LEASE_LOST) == 2


async def test_a_pause_with_the_store_down_is_followed_by_one_renewal_and_not_by_many() -> None:
    layer, till = PlannedLayer().plan("renew", *(Fault(error=NO_ROUTE) for _ in range(999))), Till()
    till.seconds = 4000
    task = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(11)
    loop: Any = asyncio.get_running_loop()
    loop.jumping_selector.virtual_time += 3600  # the loop stood still
    asked = layer.calls.count("renew")
    await asyncio.sleep(1)
    assert layer.calls.count("renew") - asked <= 1
    task.cancel()


# --- In doubt at once -------------------------------------------------------------------------------------------------


class Odd(BaseException):
    """No `Exception`."""


async def broken_off(layer: PlannedLayer) -> Odd:
    """Make a call whose body is broken off while it is renewed."""
    till = Till()
    till.seconds, till.error = 11, Odd()
    with pytest.raises(Odd) as caught:
        await made_idempotent(till.charge, layer, lease_seconds=30, on_abandoned="raise")(ORDER)
    return caught.value


async def test_a_renewal_that_hangs_does_not_keep_a_broken_off_body_from_being_in_doubt_at_once() -> None:
    layer = PlannedLayer().plan("renew", Fault(before_seconds=3600))
    began = asyncio.get_running_loop().time()
    assert not hasattr(await broken_off(layer), "__notes__")
    assert asyncio.get_running_loop().time() - began == pytest.approx(11, abs=0.1)
    assert layer.calls == ["acquire", "renew", "renew"]  # the second one is the mark
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(Till().charge, layer, on_abandoned="raise")(ORDER)


async def test_a_renewal_that_is_applied_after_the_mark_of_doubt_changes_nothing() -> None:
    layer = PlannedLayer().plan("renew", Fault(before_seconds=4))
    await broken_off(layer)
    assert layer.calls == ["acquire", "renew", "renew"]
    marked = only_record(layer)
    await asyncio.sleep(10)
    assert only_record(layer) == marked
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(Till().charge, layer, on_abandoned="raise")(ORDER)


async def test_a_body_closed_while_its_mark_of_doubt_is_on_its_way_is_in_doubt_all_the_same() -> None:
    layer, till = PlannedLayer().plan("renew", Fault(before_seconds=4), Fault(before_seconds=1)), Till()
    till.seconds, till.error = 11, Odd()
    coroutine = made_idempotent(till.charge, layer, lease_seconds=30, on_abandoned="raise")(ORDER)
    await closed_when(coroutine, lambda: layer.calls.count("renew") == 2)
    await asyncio.sleep(10)
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(till.charge, layer, on_abandoned="raise")(ORDER)


async def test_a_closed_body_is_in_doubt_where_it_must_not_run_again() -> None:
    layer = PlannedLayer().inner

    async def body(order: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    coroutine = made_idempotent(body, layer, on_abandoned="raise")(ORDER)
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(1)
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(body, layer)(ORDER)


async def test_a_body_closed_during_a_renewal_is_in_doubt_at_once() -> None:
    layer = PlannedLayer().plan("renew", Fault(before_seconds=1))

    async def enter() -> None:
        await block.__aenter__()
        await asyncio.sleep(100)

    config = IdempotencyConfig(on_abandoned="raise")
    block: Any = idempotency(ORDER, persistence_store=layer, config=config, key_prefix="charge")
    entered = asyncio.ensure_future(enter())
    await asyncio.sleep(10.5)
    assert layer.calls == ["acquire", "renew"]
    await block.__aexit__(GeneratorExit, GeneratorExit(), None)
    await asyncio.sleep(2)
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(Till().charge, layer)(ORDER)
    entered.cancel()


async def test_a_renewal_under_way_does_not_undo_that_a_key_is_in_doubt() -> None:
    layer, till = PlannedLayer().plan("renew", Fault(before_seconds=1)), Till()
    till.seconds = 100
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, on_abandoned="raise")(ORDER))
    await asyncio.sleep(10.5)
    assert layer.calls == ["acquire", "renew"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(2)
    with pytest.raises(IdempotencyInDoubtError):
        await made_idempotent(till.charge, layer)(ORDER)


# --- Answers that come late -------------------------------------------------------------------------------------------


async def test_a_body_does_not_start_on_a_lease_that_passed_before_the_answer_came() -> None:
    layer, till, other = PlannedLayer().plan("acquire", Fault(after_seconds=31)), Till(), Till()
    other.seconds = 20
    late = asyncio.ensure_future(made_idempotent(till.charge, layer, wait_timeout_seconds=60)(ORDER))
    await asyncio.sleep(30.5)
    winner = asyncio.ensure_future(made_idempotent(other.charge, other_process(layer))(ORDER))
    assert await late == await winner == {"receipt": 1}
    assert not till.charges


def stand_still() -> None:
    """Let time pass as it does for a process that is stopped."""
    loop: Any = asyncio.get_running_loop()
    loop.jumping_selector.virtual_time += 31


async def test_a_body_does_not_start_on_a_lease_that_passed_while_a_layer_answered_at_once() -> None:
    layer, till = InMemory(stand_still), Till()
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}
    assert layer.renewals == 1


async def test_a_late_answer_whose_claim_is_still_ours_is_renewed_first() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(after_seconds=31)), Till()
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire", "renew", "complete"]


@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_a_store_slower_than_the_lease_is_an_error_and_leaves_nothing(on_abandoned: Any) -> None:
    layer, till, listener = PlannedLayer(latency_seconds=1.2), Till(), Listener()
    layer.plan("release", Fault(before_seconds=-1.0))  # which alone answers within its bound
    charge = made_idempotent(
        till.charge, layer, lease_seconds=1, wait_timeout_seconds=3, on_abandoned=on_abandoned, hooks=(listener,)
    )
    with pytest.raises(IdempotencyPersistenceConnectionError, match="later than a lease lasts; the function was not"):
        await charge(ORDER)
    assert not till.charges
    assert not layer.inner.records()
    assert layer.calls == ["acquire", "renew", "release"]
    assert listener.kinds == [EventKind.PERSISTENCE_ERROR]


@pytest.mark.parametrize("fault", ["cancelled", "fails", "lost"])
async def test_what_interrupts_the_late_confirmation_leaves_no_claim(fault: str) -> None:
    layer, till, listener = PlannedLayer().plan("acquire", Fault(after_seconds=31)), Till(), Listener()
    layer.plan("renew", Fault(error=NO_ROUTE if fault == "fails" else None, before_seconds=5))
    charge = made_idempotent(till.charge, layer, on_abandoned="raise", hooks=(listener,))
    task = asyncio.ensure_future(charge(ORDER))
    await asyncio.sleep(33)
    if fault == "cancelled":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif fault == "fails":
        with pytest.raises(IdempotencyPersistenceConnectionError, match="was not run"):
            await task
    else:
        clear(layer.inner)
        assert await task == {"receipt": 1}
        assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED]
    assert len(till.charges) == (fault == "lost")
    assert [record.status for record in layer.inner.records().values()] == [RecordStatus.COMPLETED] * len(till.charges)


# --- Lost claims ------------------------------------------------------------------------------------------------------


async def test_a_foreign_completion_under_our_own_token_counts() -> None:
    layer = PlannedLayer()

    async def body(order: Any) -> Any:
        theirs = only_record(layer).replace(status=RecordStatus.COMPLETED, response_data='"theirs"')
        put(layer.inner, theirs)  # completed without touching our owner field
        return "ours"

    assert await made_idempotent(body, layer)(ORDER) == "theirs"
    assert await made_idempotent(body, layer)(ORDER) == "theirs"


@pytest.mark.parametrize("form", ["function", "block"])
async def test_a_stored_exception_of_a_loser_does_not_count(form: str) -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    options: dict[str, Any] = {"stored_exceptions": (DeclinedError,), "renew_lease": False, "hooks": (listener,)}

    async def body(order: Any) -> Any:
        await asyncio.sleep(31)
        assert await made_idempotent(till.charge, other_process(layer))(ORDER) == {"receipt": 1}
        raise DeclinedError("no")

    if form == "function":
        assert await made_idempotent(body, layer, **options)(ORDER) == {"receipt": 1}
    else:
        with pytest.raises(IdempotencyLeaseLostError, match="another outcome") as caught:
            async with idempotency(
                ORDER, persistence_store=layer, config=IdempotencyConfig(**options), key_prefix="charge"
            ) as execution:
                await execution.run(body, ORDER)
        assert isinstance(caught.value.__cause__, DeclinedError)
    assert EventKind.LEASE_LOST in listener.kinds


async def test_a_loser_whose_winner_gave_the_key_back_raises() -> None:
    class GivenBack(PlannedLayer):
        async def get(self, key: str) -> Any:
            return None

    layer, till = GivenBack(), Till()
    till.seconds = 60
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    await made_idempotent(Till().charge, other_process(layer))(ORDER)
    with pytest.raises(IdempotencyLeaseLostError, match="taken over and released"):
        await task


async def test_a_release_of_a_claim_that_is_not_ours_any_more_is_a_loss() -> None:
    layer, listener = PlannedLayer(), Listener()

    async def body(order: Any) -> Any:
        await layer.inner.forget(only_record(layer).idempotency_key)
        raise ValueError("declined")

    with pytest.raises(ValueError, match="declined"):
        await made_idempotent(body, layer, hooks=(listener,))(ORDER)
    assert listener.kinds == [EventKind.CLAIMED, EventKind.LEASE_LOST, EventKind.ABANDONED]


async def test_a_release_that_finds_another_claim_after_the_lease_has_lost_it() -> None:
    layer, till, listener = (
        PlannedLayer().plan("release", Fault(error=NO_ROUTE, before_seconds=0.5)),
        Till(),
        Listener(),
    )
    other = Till()
    till.seconds, till.error, other.seconds = 0.8, ValueError("declined"), 20
    late = asyncio.ensure_future(
        made_idempotent(till.charge, layer, lease_seconds=1, renew_lease=False, hooks=(listener,))(ORDER)
    )
    await asyncio.sleep(1.1)
    successor = asyncio.ensure_future(made_idempotent(other.charge, other_process(layer))(ORDER))
    with pytest.raises(ValueError, match="declined"):
        await late
    assert layer.calls.count("release") == 2
    assert EventKind.LEASE_LOST in listener.kinds
    assert EventKind.RELEASED not in listener.kinds
    assert await successor == {"receipt": 1}
