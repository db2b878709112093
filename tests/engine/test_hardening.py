"""Faults that come together: each of these once lost a result, ran a body twice, or held a key."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aidem import IdempotencyConfig, RecordStatus, current_execution, idempotency, idempotent, idempotent_function
from aidem._engine.call import Call
from aidem._engine.plan import CallKey, Plan
from aidem._runtime.cancellation import CancellationShield, UncancellableFuture
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.hooks import EventKind
from aidem.persistence import Blocked
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import (
    VIRTUAL_TIME,
    Fault,
    Listener,
    PlannedLayer,
    SettlingLayer,
    Till,
    VirtualTimeLoop,
    wall_clock,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ORDER = {"id": 7}
NO_ROUTE = IdempotencyPersistenceConnectionError("no route")
LAYERS = [PlannedLayer, SettlingLayer]


class DeclinedError(Exception):
    pass


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def made_idempotent(function: Any, layer: Any, **options: Any) -> Any:
    config = IdempotencyConfig(**options)
    return idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="charge"
    )(function)


def other_process(layer: PlannedLayer) -> PlannedLayer:
    return PlannedLayer(inner=layer.inner)


def only_record(layer: PlannedLayer) -> Any:
    [record] = layer.inner._records.values()
    return record


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


async def test_a_foreign_completion_under_our_own_token_counts() -> None:
    layer = PlannedLayer()

    async def body(order: Any) -> Any:
        theirs = only_record(layer).replace(status=RecordStatus.COMPLETED, response_data='"theirs"')
        layer.inner._records[theirs.idempotency_key] = theirs  # completed without touching our owner field
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


async def test_a_stored_exception_that_cannot_be_recorded_still_propagates() -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("complete", Fault(error=denied)), Till()
    till.error = DeclinedError("no")
    with pytest.raises(DeclinedError) as caught:
        await made_idempotent(till.charge, layer, stored_exceptions=(DeclinedError,))(ORDER)
    assert "access denied" in caught.value.__notes__[0]


async def test_a_follower_does_not_run_again_because_its_leaders_completion_failed() -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=NO_ROUTE) for _ in range(200))), Till()
    charge = made_idempotent(
        till.charge, layer, on_persistence_error="run", wait_timeout_seconds=20, lease_seconds=60, renew_lease=False
    )
    results: Any = await asyncio.gather(charge(ORDER), charge(ORDER), return_exceptions=True)
    first, second = results
    assert isinstance(first, IdempotencyPersistenceConnectionError)
    assert isinstance(second, IdempotencyAlreadyInProgressError)
    assert len(till.charges) == 1


async def test_a_body_does_not_start_on_a_lease_that_passed_before_the_answer_came() -> None:
    layer, till, other = PlannedLayer().plan("acquire", Fault(after_seconds=31)), Till(), Till()
    other.seconds = 20
    late = asyncio.ensure_future(made_idempotent(till.charge, layer, wait_timeout_seconds=60)(ORDER))
    await asyncio.sleep(30.5)
    winner = asyncio.ensure_future(made_idempotent(other.charge, other_process(layer))(ORDER))
    assert await late == await winner == {"receipt": 1}
    assert not till.charges


async def test_a_late_answer_whose_claim_is_still_ours_is_renewed_first() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(after_seconds=31)), Till()
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire", "renew", "complete"]


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


@pytest.mark.parametrize("kind", LAYERS)
async def test_a_completion_that_hangs_ends_with_the_lease(kind: Any) -> None:
    layer, till = kind().plan("complete", *(Fault(gate=asyncio.Event()) for _ in range(10))), Till()
    began = asyncio.get_running_loop().time()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="effect has happened"):
        await made_idempotent(till.charge, layer)(ORDER)
    assert asyncio.get_running_loop().time() - began == pytest.approx(30, abs=1)


async def test_a_cancellation_while_the_key_is_given_back_ends_a_retry_loop() -> None:
    layer, till = PlannedLayer().plan("release", *(Fault(before_seconds=0.1) for _ in range(50))), Till()
    till.error = ValueError("declined")
    charge = made_idempotent(till.charge, layer)
    attempts = 0

    async def retry() -> None:
        nonlocal attempts
        for _ in range(50):
            attempts += 1
            try:
                await charge(ORDER)
            except ValueError:
                continue

    async def fail_soon() -> None:
        await asyncio.sleep(0.25)
        raise RuntimeError("sibling")

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(retry())
            group.create_task(fail_soon())
    assert attempts < 6


async def test_a_timeout_that_the_body_outran_leaves_no_stray_cancellation() -> None:
    layer, till = PlannedLayer().plan("release", Fault(before_seconds=0.2)), Till()
    till.error = ValueError("declined")
    with pytest.raises(ValueError, match="declined"):
        async with asyncio.timeout(0.1):
            await made_idempotent(till.charge, layer)(ORDER)
    await asyncio.sleep(1)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


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


@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_a_release_that_fails_once_is_tried_again(on_abandoned: Any) -> None:
    layer, till = PlannedLayer().plan("release", Fault(error=NO_ROUTE)), Till()
    till.error = ValueError("declined")
    charge = made_idempotent(till.charge, layer, on_abandoned=on_abandoned)
    for _ in range(2):
        with pytest.raises(ValueError, match="declined"):
            await charge(ORDER)
    assert len(till.charges) == 2


async def test_a_release_of_a_claim_that_is_not_ours_any_more_is_a_loss() -> None:
    layer, listener = PlannedLayer(), Listener()

    async def body(order: Any) -> Any:
        await layer.inner.forget(only_record(layer).idempotency_key)
        raise ValueError("declined")

    with pytest.raises(ValueError, match="declined"):
        await made_idempotent(body, layer, hooks=(listener,))(ORDER)
    assert listener.kinds == [EventKind.LEASE_LOST]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("operation", ["acquire", "complete", "release"])
async def test_nothing_spins_while_a_cancelled_scope_waits_for_a_write(kind: Any, operation: str) -> None:
    layer, till = kind().plan(operation, Fault(before_seconds=1)), Till()
    till.error = ValueError("declined") if operation == "release" else None
    loop: Any = asyncio.get_running_loop()
    select, turns = loop._selector.select, 0

    def counting(timeout: float | None = None) -> Any:
        nonlocal turns
        turns += 1
        loop.pass_time_in_every_cycle(0.0001)
        return select(timeout)

    loop._selector.select = counting
    with anyio.CancelScope() as scope:
        loop.call_later(0.1, scope.cancel)
        with contextlib.suppress(ValueError):
            await made_idempotent(till.charge, layer)(ORDER)
        await asyncio.sleep(1)
    assert scope.cancelled_caught
    assert turns < 100


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_a_coroutine_closed_while_it_acquires_releases_after_the_claim_was_applied(
    kind: Any, on_abandoned: Any
) -> None:
    layer, till = kind().plan("acquire", Fault(before_seconds=1)), Till()
    coroutine = made_idempotent(till.charge, layer, on_abandoned=on_abandoned)(ORDER)
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(3)
    assert not layer.inner._records
    assert layer.calls == ["acquire", "release"]


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


def test_a_claim_whose_reply_was_lost_is_released_before_the_loop_ends() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=NO_ROUTE, applied=True)), Till()

    with pytest.raises(IdempotencyPersistenceConnectionError):
        asyncio.run(made_idempotent(till.charge, layer)(ORDER))
    assert not layer.inner._records


def test_a_key_is_given_back_though_the_loop_shuts_down() -> None:
    layer, till = PlannedLayer(latency_seconds=0.01), Till()
    till.seconds = 60

    async def main() -> None:
        asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))  # noqa: RUF006 - left to the shutdown
        await asyncio.sleep(0.1)
        assert layer.inner._records

    asyncio.run(main())
    assert not layer.inner._records


def test_a_coroutine_closed_after_its_loop_wakes_nobody() -> None:
    layer, till = PlannedLayer().inner, Till()
    till.seconds = 60
    charge = made_idempotent(till.charge, layer, wait_timeout_seconds=9)
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(charge(ORDER)) for _ in range(2)]
    for _ in range(3):
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()
    coroutines = [task.get_coro() for task in tasks]
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    for coroutine in coroutines:
        coroutine.close()


async def test_a_failing_release_never_replaces_the_error_of_the_claim() -> None:
    class Broken(PlannedLayer):
        def release(self, record: Any) -> Any:
            raise ValueError("release is broken too")

    layer, till = Broken().plan("acquire", Fault(error=NO_ROUTE)), Till()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="no route"):
        await made_idempotent(till.charge, layer)(ORDER)
    layer.plan("acquire", Fault(error=NO_ROUTE))
    assert await made_idempotent(till.charge, layer, on_persistence_error="run")(ORDER) == {"receipt": 1}


async def test_an_error_of_a_strange_class_keeps_its_meaning() -> None:
    class StrangeError(IdempotencyPersistenceConnectionError):
        def __init__(self, host: str, port: int) -> None:
            super().__init__(f"{host}:{port} does not answer")

    layer, till = PlannedLayer().plan("acquire", Fault(error=StrangeError("store", 1))), Till()
    assert await made_idempotent(till.charge, layer, on_persistence_error="run")(ORDER) == {"receipt": 1}
    layer.plan("acquire", Fault(error=StrangeError("store", 1), before_seconds=1))
    charge = made_idempotent(till.charge, layer, wait_timeout_seconds=9)
    errors = await asyncio.gather(charge({"id": 8}), charge({"id": 8}), return_exceptions=True)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 2


async def test_foreign_errors_of_every_operation_are_wrapped_and_show_no_data() -> None:
    secret = OSError("secret payload")
    for operation in ("acquire", "complete", "get"):
        layer, till = PlannedLayer().plan(operation, *(Fault(error=secret) for _ in range(200))), Till()
        till.seconds = 31 if operation == "get" else 0
        task = asyncio.ensure_future(made_idempotent(till.charge, layer, renew_lease=False)(ORDER))
        if operation == "get":
            await asyncio.sleep(30.5)
            await made_idempotent(Till().charge, other_process(layer))(ORDER)
        with pytest.raises(IdempotencyPersistenceLayerError) as caught:
            await task
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is secret


async def test_a_poll_in_vain_does_not_end_the_waiting() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 10
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(1)
    elsewhere = other_process(layer)
    charge = made_idempotent(till.charge, elsewhere, wait_timeout_seconds=60)
    waiters = asyncio.gather(*(charge(ORDER) for _ in range(4)))
    await asyncio.sleep(1)
    elsewhere.plan("acquire", Fault(error=NO_ROUTE), Fault(error=NO_ROUTE))
    assert await waiters == [await owner] * 4


class Telling(PlannedLayer):
    def __init__(self, *, error: Exception | None, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    async def wait_for_change(self, key: str, timeout_seconds: float) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, OSError("pubsub gone")])
async def test_a_layer_that_wakes_waiters_at_once_or_fails_to_is_polled_with_pauses(error: Exception | None) -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 2
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(0.01)
    telling = Telling(error=error, inner=layer.inner)
    assert await made_idempotent(till.charge, telling, wait_timeout_seconds=60)(ORDER) == await owner
    assert len(telling.calls) <= (20 if error else 250)


async def test_a_follower_that_then_runs_itself_has_waited() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds, till.error = 1, ValueError("declined")
    leader = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(0.1)
    await made_idempotent(Till().charge, layer, wait_timeout_seconds=9, hooks=(listener,))(ORDER)
    assert listener.kinds == [EventKind.WAITED, EventKind.EXECUTED]
    with pytest.raises(ValueError, match="declined"):
        await leader


async def test_every_loss_of_a_recovered_lease_is_told() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    down = [Fault(error=NO_ROUTE) for _ in range(10)]
    layer.plan("renew", *down, Fault(), *down)
    till.seconds = 120
    await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert listener.kinds.count(EventKind.LEASE_LOST) == 2


class DurableContext:
    """What a durable function gets: the operations it has recorded, and Lambda's own context."""

    def __init__(self, operations: int) -> None:
        self.state = type("State", (), {"operations": dict.fromkeys(range(operations))})()
        self.lambda_context = type("Context", (), {"get_remaining_time_in_millis": lambda _: 60_000})()


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
        await durable(ORDER, DurableContext(1))
    suspend = False
    began = asyncio.get_running_loop().time()
    assert await durable(ORDER, DurableContext(2)) == "done"
    assert asyncio.get_running_loop().time() == began


async def test_of_two_replays_of_a_durable_function_one_wins() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 5

    async def handler(event: Any, context: Any) -> Any:
        return await till.charge(event)

    durable = idempotent(persistence_store=layer, key_prefix="h")(handler)
    first = asyncio.ensure_future(durable(ORDER, DurableContext(1)))
    await asyncio.sleep(1)
    replays = await asyncio.gather(*(durable(ORDER, DurableContext(2)) for _ in range(2)), return_exceptions=True)
    assert sorted(type(replay).__name__ for replay in replays) == ["IdempotencyAlreadyInProgressError", "dict"]
    first.cancel()


async def test_a_record_without_an_owner_is_not_superseded() -> None:
    layer = PlannedLayer()
    handler = idempotent(persistence_store=layer, key_prefix="h", config=IdempotencyConfig(wait_timeout_seconds=20))

    async def body(event: Any, context: Any) -> Any:
        raise AssertionError

    blocked = idempotent(persistence_store=layer, key_prefix="h")(Till().charge_event)
    running = asyncio.ensure_future(blocked(ORDER, None))
    await asyncio.sleep(0.1)
    foreign = only_record(layer).replace(owner=None)
    layer.inner._records[foreign.idempotency_key] = foreign
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await handler(body)(ORDER, DurableContext(2))
    running.cancel()


async def test_run_takes_a_function_that_turns_out_not_to_be_async() -> None:
    layer = PlannedLayer()
    calls: list[int] = []

    def charge() -> Any:
        calls.append(1)
        return {"receipt": 1}

    async def pay() -> Any:
        async with idempotency("k", persistence_store=layer) as execution:
            return await execution.run(charge)

    assert await pay() == await pay() == {"receipt": 1}
    assert calls == [1]


async def test_a_block_that_swallows_the_failure_of_run_records_nothing() -> None:
    layer, till = PlannedLayer(), Till()
    till.error = ValueError("declined")
    with pytest.raises(IdempotencyUsageError, match="swallowed"):
        async with idempotency("k", persistence_store=layer) as execution:
            with pytest.raises(ValueError, match="declined"):
                await execution.run(till.charge, ORDER)
    assert not layer.inner._records


async def test_a_block_may_turn_the_failure_of_run_into_a_result() -> None:
    layer, till = PlannedLayer(), Till()
    till.error = ValueError("declined")
    for _ in range(2):
        async with idempotency("k", persistence_store=layer) as execution:
            if not execution.replayed:
                with pytest.raises(ValueError, match="declined"):
                    await execution.run(till.charge, ORDER)
                execution.result = "declined"
        assert execution.result == "declined"
    assert len(till.charges) == 1


async def test_a_background_release_that_fails_is_logged(caplog: Any) -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("release", Fault(error=denied)), Till()
    coroutine = made_idempotent(till.charge, layer)(ORDER)
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(1)
    assert layer.calls == ["acquire", "release"]
    assert "lapses with its lease: access denied" in caplog.text


async def test_a_future_that_is_done_already_is_an_answer() -> None:
    future: UncancellableFuture[int] = UncancellableFuture(loop=asyncio.get_running_loop())
    future.settle(1)
    future.settle(2)
    future.fail(ValueError())
    with CancellationShield() as shield:
        assert await shield.settle(future) == 1


async def test_a_call_without_a_record_or_claim_says_so() -> None:
    plan = Plan(layer=PlannedLayer(), config=IdempotencyConfig(), function="f", prefix="f")
    call = Call(plan, CallKey(""))
    with pytest.raises(IdempotencyUsageError, match="no record"):
        call.held_record()
    with pytest.raises(IdempotencyUsageError, match="no claim"):
        await call.complete("1")


async def test_a_loser_whose_winner_gave_the_key_back_raises() -> None:
    class GivenBack(PlannedLayer):
        async def get(self, key: str) -> Any:
            return None

    layer, till = GivenBack(), Till()
    till.seconds = 60
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    await made_idempotent(Till().charge, other_process(layer))(ORDER)
    with pytest.raises(IdempotencyLeaseLostError, match="given back"):
        await task


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


async def test_a_follower_does_not_replay_what_had_expired_before_it_asked() -> None:
    layer, till = PlannedLayer(), Till()
    slow = other_process(layer).plan("acquire", Fault(after_seconds=100))
    options: dict[str, Any] = {"expires_after_seconds": 60, "wait_timeout_seconds": 200}
    assert await made_idempotent(till.charge, layer, **options)(ORDER) == {"receipt": 1}
    leader = asyncio.ensure_future(made_idempotent(till.charge, slow, **options)(ORDER))
    await asyncio.sleep(70)
    assert await made_idempotent(till.charge, layer, **options)(ORDER) == {"receipt": 2}  # the window has passed
    assert await made_idempotent(till.charge, slow, **options)(ORDER) == {"receipt": 2}
    assert await leader == {"receipt": 1}


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


async def test_a_request_that_hangs_does_not_use_up_the_lease() -> None:
    for operation in ("renew", "complete"):
        layer, till, listener = PlannedLayer().plan(operation, Fault(gate=asyncio.Event())), Till(), Listener()
        till.seconds = 60
        assert await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER) == {"receipt": 1}
        assert listener.kinds == [EventKind.PERSISTENCE_ERROR, EventKind.EXECUTED]


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
    assert not layer.inner._records
    assert layer.calls == ["acquire", "renew", "release"]
    assert listener.kinds == [EventKind.PERSISTENCE_ERROR]


async def test_ensure_owned_on_a_store_slower_than_the_lease_is_an_error() -> None:
    layer = PlannedLayer().plan("renew", *(Fault(before_seconds=0.6, after_seconds=0.6) for _ in range(9)))

    async def body(order: Any) -> Any:
        with pytest.raises(IdempotencyPersistenceConnectionError, match="later than the lease lasts"):
            await current_execution().ensure_owned()
        return 1

    assert await made_idempotent(body, layer, lease_seconds=1, renew_lease=False)(ORDER) == 1


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
        layer.inner._records.clear()
        assert await task == {"receipt": 1}
        assert listener.kinds == [EventKind.EXECUTED]
    assert len(till.charges) == (fault == "lost")
    assert [record.status for record in layer.inner._records.values()] == [RecordStatus.COMPLETED] * len(till.charges)


async def test_two_blips_leave_no_doubt_about_what_never_ran() -> None:
    layer, till = PlannedLayer(), Till()
    layer.plan("acquire", Fault(error=NO_ROUTE, applied=True)).plan("release", Fault(error=NO_ROUTE))
    with pytest.raises(IdempotencyPersistenceConnectionError):
        await made_idempotent(till.charge, layer, on_abandoned="raise")(ORDER)
    assert not layer.inner._records


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


async def test_a_cancellation_that_was_withdrawn_does_not_come_back() -> None:
    layer, till = PlannedLayer().plan("release", Fault(before_seconds=0.2)), Till()
    till.error = ValueError("declined")
    cleaned_up = False

    async def swallows() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:  # its clean-up has a timeout of its own
            with pytest.raises(ValueError, match="declined"):
                async with asyncio.timeout(0.1):
                    await made_idempotent(till.charge, layer)(ORDER)
            await asyncio.sleep(1)
            cleaned_up = True
            raise

    task = asyncio.ensure_future(swallows())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned_up


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


@pytest.mark.parametrize("kind", [EventKind.TAKEN_OVER, EventKind.WAITED])
@pytest.mark.parametrize("form", ["function", "block"])
async def test_an_observer_that_ends_the_program_leaves_no_claim(kind: EventKind, form: str) -> None:
    class Ending:
        def on_event(self, event: Any) -> None:
            if event.kind is kind:
                raise SystemExit

    layer, till = PlannedLayer(), Till()
    till.seconds = 100
    options: dict[str, Any] = {"lease_seconds": 5, "renew_lease": False}
    vanished = asyncio.ensure_future(made_idempotent(till.charge, other_process(layer), **options)(ORDER))
    await asyncio.sleep(1)
    config = IdempotencyConfig(wait_timeout_seconds=60, hooks=(Ending(),))
    block = idempotency(ORDER, persistence_store=layer, config=config, key_prefix="charge")
    call = made_idempotent(Till().charge, layer, wait_timeout_seconds=60, hooks=(Ending(),))
    with pytest.raises(SystemExit):
        await (block.__aenter__() if form == "block" else call(ORDER))
    assert not layer.inner._records
    vanished.cancel()


class InMemory(MemoryPersistenceLayer):
    """Answers at once, after something that a plan says."""

    def __init__(self, *before_answers: Callable[[], object]) -> None:
        super().__init__(clock=wall_clock)
        self.before_answers = list(before_answers)
        self.renewals = 0

    def acquire(self, *args: Any, **options: Any) -> Any:
        answer = super().acquire(*args, **options)
        self.before_answers.pop(0)()
        return answer

    def renew(self, *args: Any, **options: Any) -> Any:
        self.renewals += 1
        return super().renew(*args, **options)


def interrupt() -> None:
    """Do what the handler of a signal does."""
    raise KeyboardInterrupt


def stand_still() -> None:
    """Let time pass as it does for a process that is stopped."""
    loop: Any = asyncio.get_running_loop()
    loop.jumping_selector.virtual_time += 31


async def test_an_interrupt_while_a_layer_answers_at_once_leaves_no_claim() -> None:
    layer, till = InMemory(interrupt), Till()
    with pytest.raises(KeyboardInterrupt):
        await made_idempotent(till.charge, layer)(ORDER)
    assert len(layer._records) == 1
    await asyncio.sleep(0.1)
    assert not layer._records
    assert not till.charges


async def test_a_body_does_not_start_on_a_lease_that_passed_while_a_layer_answered_at_once() -> None:
    layer, till = InMemory(stand_still), Till()
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}
    assert layer.renewals == 1


async def test_a_claim_does_not_expire_while_others_still_hold_its_lease_for_held() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 1
    settings = {"expires_after_seconds": 35, "lease_seconds": 30, "max_clock_skew_seconds": 10}
    running = asyncio.ensure_future(made_idempotent(till.charge, layer, **settings)(ORDER))
    await asyncio.sleep(0.5)
    claim = only_record(layer)
    assert claim.expiry_timestamp * 1000 >= claim.in_progress_expiry_timestamp + 10_000
    await running


async def test_a_release_whose_reply_was_lost_is_no_lost_lease() -> None:
    layer, till, listener = PlannedLayer().plan("release", Fault(error=NO_ROUTE, applied=True)), Till(), Listener()
    till.error = ValueError("declined")
    with pytest.raises(ValueError, match="declined"):
        await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert layer.calls == ["acquire", "release", "release"]
    assert EventKind.RELEASED in listener.kinds
    assert EventKind.LEASE_LOST not in listener.kinds


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


async def test_a_layer_that_finds_a_claim_too_large_has_failed() -> None:
    too_large = IdempotencySerializationError("too large")
    for operation in ("acquire", "renew", "release"):
        layer, till, listener = PlannedLayer().plan(operation, Fault(error=too_large)), Till(), Listener()
        till.seconds, till.error = 25, ValueError("declined")
        expected = IdempotencyPersistenceLayerError if operation == "acquire" else ValueError
        with pytest.raises(expected):
            await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
        assert listener.kinds[0] is EventKind.PERSISTENCE_ERROR
        assert not layer.inner._records


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
