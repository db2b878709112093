"""Waiting for a running execution, and taking over from one that failed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyValidationError,
)
from aidem.hooks import EventKind
from tests.support.planned import (
    NO_ROUTE,
    VIRTUAL_TIME,
    Fault,
    Listener,
    PlannedLayer,
    Till,
    VirtualTimeLoop,
    closed_when,
    made_idempotent,
    other_process,
)

ORDER = {"id": 7, "amount": 10}


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def charger(layer: Any, till: Till, **options: Any) -> Any:
    return made_idempotent(till.charge, layer, event_key_jmespath="id", **options)


async def started(call: Any) -> asyncio.Future[Any]:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.01)
    return task


async def test_without_wait_timeout_a_running_execution_is_an_error_at_once() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 1
    owner = await started(charger(layer, till)(ORDER))
    with pytest.raises(IdempotencyAlreadyInProgressError) as caught:
        await charger(layer, till)(ORDER)
    assert caught.value.retry_after_seconds == 1.0
    assert caught.value.record is not None
    assert caught.value.key == caught.value.record.idempotency_key
    assert await owner == {"receipt": 1}


async def test_a_waiter_gets_the_result_of_the_running_execution() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 2
    owner = await started(charger(layer, till)(ORDER))
    assert await charger(other_process(layer), till, wait_timeout_seconds=5)(ORDER) == {"receipt": 1}
    assert await owner == {"receipt": 1}
    assert len(till.charges) == 1


async def test_a_waiter_gives_up_at_its_timeout() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 20
    owner = await started(charger(layer, till)(ORDER))
    loop = asyncio.get_running_loop()
    for beside in (layer, other_process(layer)):
        waiting = charger(beside, till, wait_timeout_seconds=3)
        began = loop.time()
        with pytest.raises(IdempotencyAlreadyInProgressError):
            await waiting(ORDER)
        assert loop.time() - began == pytest.approx(3, abs=0.05)
    await owner


async def test_a_waiter_takes_over_when_the_owner_fails() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds, till.error = 2, RuntimeError("declined")
    owner = await started(charger(layer, till)(ORDER))
    succeeding = Till()
    here = await started(charger(layer, succeeding, wait_timeout_seconds=10)(ORDER))
    elsewhere = await started(charger(other_process(layer), succeeding, wait_timeout_seconds=10)(ORDER))
    with pytest.raises(RuntimeError, match="declined"):
        await owner
    assert await here == await elsewhere == {"receipt": 1}
    assert succeeding.charges == [ORDER]


@pytest.mark.parametrize("instant", range(20))
async def test_a_waiter_takes_over_as_soon_as_the_lease_of_a_vanished_owner_has_passed(instant: int) -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 3600
    await asyncio.sleep(instant * 0.1237)  # at some instants the last millisecond of the lease is rounded up
    vanished = await started(charger(other_process(layer), till, lease_seconds=4, renew_lease=False)(ORDER))
    began = asyncio.get_running_loop().time()
    succeeding = Till()
    listener = Listener()
    charge = charger(layer, succeeding, wait_timeout_seconds=60, hooks=(listener,))
    assert await charge(ORDER) == {"receipt": 1}
    assert asyncio.get_running_loop().time() - began == pytest.approx(4, abs=0.05)
    assert EventKind.TAKEN_OVER in listener.kinds
    vanished.cancel()


async def test_a_waiter_beside_the_owner_takes_over_too_once_its_lease_has_passed() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 50
    owner = await started(charger(layer, till, lease_seconds=4, renew_lease=False)(ORDER))
    succeeding = Till()
    assert await charger(layer, succeeding, wait_timeout_seconds=40)(ORDER) == {"receipt": 1}
    assert await owner == {"receipt": 1}  # the loser hands out the winner's outcome
    assert len(till.charges) == len(succeeding.charges) == 1


async def test_a_thousand_callers_of_one_key_are_one_execution_and_two_requests() -> None:
    layer, till = PlannedLayer(latency_seconds=0.001), Till()
    till.seconds = 20  # long enough for a renewal
    charge = charger(layer, till, wait_timeout_seconds=60, lease_seconds=90)
    assert await asyncio.gather(*(charge(ORDER) for _ in range(1000))) == [{"receipt": 1}] * 1000
    assert layer.calls == ["acquire", "complete"]


async def test_a_thousand_callers_ask_a_foreign_owner_twenty_times_in_five_seconds_and_then_once_a_second() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 30
    owner = await started(charger(layer, till, lease_seconds=90)(ORDER))
    elsewhere = other_process(layer)
    charge = charger(elsewhere, till, wait_timeout_seconds=60)
    waiters = asyncio.gather(*(charge(ORDER) for _ in range(1000)))
    await asyncio.sleep(5)
    assert 5 <= len(elsewhere.calls) <= 20
    asked = len(elsewhere.calls)
    await asyncio.sleep(10)
    assert 5 <= len(elsewhere.calls) - asked <= 10
    assert await waiters == [await owner] * 1000


async def test_a_poller_that_gives_up_hands_its_pace_on() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 30
    owner = await started(charger(layer, till, lease_seconds=90)(ORDER))
    elsewhere = other_process(layer)
    waiters = [await started(charger(elsewhere, till, wait_timeout_seconds=1 + n)(ORDER)) for n in range(5)]
    await asyncio.sleep(5)
    assert len(elsewhere.calls) <= 25
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert {type(result) for result in results} == {IdempotencyAlreadyInProgressError}
    await owner


async def test_waiters_compare_the_payload_before_they_wait() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 20
    options: dict[str, Any] = {"wait_timeout_seconds": 60, "payload_validation_jmespath": "amount"}
    owner = await started(charger(layer, till, **options)(ORDER))
    began = asyncio.get_running_loop().time()
    for beside in (layer, other_process(layer)):
        with pytest.raises(IdempotencyValidationError):
            await charger(beside, till, **options)(ORDER | {"amount": 11})
    assert asyncio.get_running_loop().time() == began
    assert await owner == {"receipt": 1}


async def test_a_follower_with_the_stored_payload_is_not_refused_because_its_leader_has_another() -> None:
    layer, till = PlannedLayer(), Till()
    options: dict[str, Any] = {"wait_timeout_seconds": 60, "payload_validation_jmespath": "amount"}
    await charger(layer, till, **options)(ORDER)
    slow = other_process(layer).plan("acquire", Fault(before_seconds=1))
    leader = await started(charger(slow, till, **options)(ORDER | {"amount": 11}))
    follower = await started(charger(slow, till, **options)(ORDER))
    with pytest.raises(IdempotencyValidationError):
        await leader
    assert await follower == {"receipt": 1}


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_line_of_callers_with_another_payload_is_refused_at_once(is_running: bool) -> None:
    layer, till = PlannedLayer(latency_seconds=0.1), Till()
    till.seconds = 100
    validated = {"payload_validation_jmespath": "amount"}
    owner = await started(charger(other_process(layer), till, **validated)(ORDER))
    if not is_running:
        await owner
    charge = charger(layer, till, wait_timeout_seconds=1, **validated)
    began = asyncio.get_running_loop().time()
    refused = [asyncio.ensure_future(charge({**ORDER, "amount": 11})) for _ in range(30)]
    same = asyncio.ensure_future(asyncio.wait_for(charge(ORDER), 0.5))
    answers = await asyncio.gather(*refused, return_exceptions=True)
    assert {type(answer) for answer in answers} == {IdempotencyValidationError}
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.1)
    assert layer.calls == ["acquire"] * 2  # one for those who are refused, and one for the caller behind them
    if is_running:
        with pytest.raises(TimeoutError):
            await same
    else:
        assert await same == {"receipt": 1}
    owner.cancel()
    await asyncio.wait([owner])


async def test_a_follower_gives_up_at_its_timeout_though_the_store_has_not_answered_its_leader() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(before_seconds=30)), Till()
    leader = await started(charger(layer, till, wait_timeout_seconds=60)(ORDER))
    with pytest.raises(IdempotencyAlreadyInProgressError) as caught:
        await charger(layer, till, wait_timeout_seconds=2)(ORDER)
    assert caught.value.record is None
    assert await leader == {"receipt": 1}


async def test_followers_share_the_error_of_a_store_that_is_down() -> None:
    down = IdempotencyPersistenceConnectionError("no route")
    layer, till = PlannedLayer().plan("acquire", Fault(error=down, before_seconds=1)), Till()
    charge = charger(layer, till, wait_timeout_seconds=60)
    results = await asyncio.gather(*(charge(ORDER) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {IdempotencyPersistenceConnectionError}
    assert len({id(result) for result in results}) == 20  # an error of its own for each
    assert {result.__cause__ for result in results} == {down}
    assert layer.calls.count("acquire") == 1
    assert not till.charges


async def test_what_a_caller_notes_on_its_error_is_not_on_those_of_others_in_line() -> None:
    layer = PlannedLayer().plan("acquire", Fault(error=NO_ROUTE, before_seconds=1))
    charge = charger(layer, Till(), wait_timeout_seconds=60)

    async def noted(note: str) -> Any:
        with pytest.raises(IdempotencyPersistenceConnectionError) as caught:
            await charge(ORDER)
        caught.value.add_note(note)
        return caught.value

    errors = await asyncio.gather(*(noted(note) for note in "abc"))
    assert [error.__notes__ for error in errors] == [["a"], ["b"], ["c"]]
    assert layer.calls.count("acquire") == 1


async def test_a_layer_that_tells_of_changes_wakes_its_waiters() -> None:
    class Telling(PlannedLayer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.waited: list[tuple[str, float]] = []
            self.changed = asyncio.Event()

        async def wait_for_change(self, key: str, timeout_seconds: float) -> None:
            self.waited.append((key, timeout_seconds))
            await self.changed.wait()

    layer, till = PlannedLayer(), Till()
    till.seconds = 2.2
    owner = await started(charger(layer, till)(ORDER))
    telling = Telling(inner=layer.inner)
    waiter = await started(charger(telling, till, wait_timeout_seconds=60)(ORDER))
    await owner
    assert telling.calls == ["acquire"]
    telling.changed.set()
    assert await waiter == {"receipt": 1}
    [(key, timeout_seconds)] = telling.waited
    assert key.startswith("charge#")
    assert 0 < timeout_seconds <= 1.25


@pytest.mark.parametrize("beside", [lambda layer: layer, other_process], ids=["this process", "another process"])
async def test_waiting_is_reported(beside: Any) -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds = 2
    owner = await started(charger(layer, till)(ORDER))
    await charger(beside(layer), till, wait_timeout_seconds=60, hooks=(listener,))(ORDER)
    assert sorted(listener.kinds) == [EventKind.REPLAYED, EventKind.WAITED]
    await owner


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


# --- In line ----------------------------------------------------------------------------------------------------------


class FailingTill(Till):
    """Every charge fails; remembers whose it was."""

    async def charge(self, order: Any) -> dict[str, Any]:
        self.charges.append(order["caller"])
        await asyncio.sleep(0.01)
        raise RuntimeError(order["caller"])


async def turns_of_the_loop_for(callers: int) -> int:
    """Let so many callers of one key fail one after the other; return how many callbacks that took."""
    till, callbacks = FailingTill(), 0
    loop = asyncio.get_running_loop()
    call_soon = loop.call_soon

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal callbacks
        callbacks += 1
        return call_soon(*args, **kwargs)

    charge = charger(PlannedLayer().inner, till, wait_timeout_seconds=3600)
    loop.call_soon = counting  # type: ignore[assignment]
    try:
        errors = await asyncio.gather(*(charge(ORDER | {"caller": n}) for n in range(callers)), return_exceptions=True)
    finally:
        del loop.call_soon
    assert [str(error) for error in errors] == [str(n) for n in range(callers)]
    assert till.charges == list(range(callers))  # first come, first served
    return callbacks


async def test_callers_of_a_key_that_keeps_failing_have_their_turns_in_order_and_none_wakes_all_others() -> None:
    # Twice as many callers are twice the work, not four times.
    assert await turns_of_the_loop_for(200) < 2.2 * await turns_of_the_loop_for(100)


def cancels_when_released(task: asyncio.Future[Any]) -> Any:
    """Return a hook that cancels a task just when a claim was released, before the task can have its turn."""

    class Canceller:
        def on_event(self, event: Any) -> None:
            if event.kind is EventKind.RELEASED:
                asyncio.get_running_loop().call_soon(task.cancel)

    return Canceller()


async def test_a_follower_that_is_cancelled_when_it_is_its_turn_passes_the_turn_on() -> None:
    layer, failing, till = PlannedLayer(), Till(), Till()
    failing.seconds, failing.error = 2, RuntimeError("declined")
    hooks: list[Any] = []

    class Hooks:
        def on_event(self, event: Any) -> None:
            for hook in hooks:
                hook.on_event(event)

    owner = await started(charger(layer, failing, hooks=(Hooks(),))(ORDER))
    first, second = [await started(charger(layer, till, wait_timeout_seconds=60)(ORDER)) for _ in range(2)]
    hooks.append(cancels_when_released(first))
    began = asyncio.get_running_loop().time()
    assert await second == {"receipt": 1}
    assert asyncio.get_running_loop().time() - began == pytest.approx(2, abs=0.1)
    assert first.cancelled()
    with pytest.raises(RuntimeError, match="declined"):
        await owner
    assert till.charges == [ORDER]


async def test_a_follower_that_is_closed_leaves_the_line() -> None:
    layer, failing, till = PlannedLayer(), Till(), Till()
    failing.seconds, failing.error = 2, RuntimeError("declined")
    owner = await started(charger(layer, failing)(ORDER))
    began = asyncio.get_running_loop().time()
    coroutine = charger(layer, till, wait_timeout_seconds=60)(ORDER)
    await closed_when(coroutine, lambda: asyncio.get_running_loop().time() > began + 1)
    assert await charger(layer, till, wait_timeout_seconds=60)(ORDER) == {"receipt": 1}
    assert asyncio.get_running_loop().time() - began == pytest.approx(2, abs=0.1)
    with pytest.raises(RuntimeError, match="declined"):
        await owner


async def test_followers_of_different_patience_wait_each_as_long_as_it_may() -> None:
    layer, failing, till = PlannedLayer(), Till(), Till()
    failing.seconds, failing.error = 5, RuntimeError("declined")
    owner = await started(charger(layer, failing)(ORDER))
    impatient, patient, last = [
        await started(charger(layer, till, wait_timeout_seconds=seconds)(ORDER)) for seconds in (3, 60, 4)
    ]
    for given_up in (impatient, last):
        with pytest.raises(IdempotencyAlreadyInProgressError) as caught:
            await given_up
        assert caught.value.record is not None
    assert await patient == {"receipt": 1}
    with pytest.raises(RuntimeError, match="declined"):
        await owner


async def test_a_claim_that_becomes_known_turns_away_who_has_another_payload_and_leaves_the_others_in_line() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(before_seconds=1)), Till()
    till.seconds = 20
    options: dict[str, Any] = {"wait_timeout_seconds": 60, "payload_validation_jmespath": "amount"}
    charge = charger(layer, till, **options)
    began = asyncio.get_running_loop().time()
    amounts = (10, 11, 10, 12, 11)
    leader, *line = [await started(charge(ORDER | {"amount": amount})) for amount in amounts]
    for different in (line[0], line[2], line[3]):
        with pytest.raises(IdempotencyValidationError):
            await different
    assert asyncio.get_running_loop().time() - began == pytest.approx(1, abs=0.1)
    assert await line[1] == await leader == {"receipt": 1}
    assert layer.calls.count("acquire") == 1


async def test_a_lapsed_claim_of_another_payload_is_taken_over_by_a_waiter_beside_its_owner() -> None:
    layer, hanging, till = PlannedLayer(), Till(), Till()
    hanging.seconds = 50
    options: dict[str, Any] = {"payload_validation_jmespath": "amount"}
    owner = await started(charger(layer, hanging, lease_seconds=4, renew_lease=False, **options)(ORDER))
    await asyncio.sleep(5)
    changed = ORDER | {"amount": 11}
    assert await charger(layer, till, wait_timeout_seconds=40, **options)(changed) == {"receipt": 1}
    assert till.charges == [changed]
    with pytest.raises(IdempotencyLeaseLostError):
        await owner


async def test_a_waiter_is_not_refused_for_a_foreign_claim_of_another_payload_that_has_lapsed() -> None:
    layer, hanging, till = PlannedLayer(), Till(), Till()
    hanging.seconds = 3600
    options: dict[str, Any] = {"payload_validation_jmespath": "amount"}
    elsewhere = other_process(layer)
    vanished = await started(charger(elsewhere, hanging, lease_seconds=4, renew_lease=False, **options)(ORDER))
    layer.plan("acquire", *(Fault() for _ in range(7)), *(Fault(before_seconds=30) for _ in range(9)))
    poller = await started(charger(layer, till, wait_timeout_seconds=100, **options)(ORDER))
    await asyncio.sleep(5)
    assert layer.faults["acquire"][0].before_seconds  # the poller has asked again and waits for its answer
    layer.faults["acquire"].clear()
    changed = ORDER | {"amount": 11}
    waiter = await started(charger(layer, till, wait_timeout_seconds=100, **options)(changed))
    assert not waiter.done()
    poller.cancel()
    assert await waiter == {"receipt": 1}
    assert till.charges == [changed]
    assert poller.cancelled()
    vanished.cancel()


async def test_a_waiter_beside_an_owner_without_a_lease_takes_over_once_the_record_has_expired() -> None:
    layer, hanging, till = PlannedLayer(), Till(), Till()
    hanging.seconds = 50
    owner = await started(charger(layer, hanging, lease_seconds=None, expires_after_seconds=5)(ORDER))
    began = asyncio.get_running_loop().time()
    assert await charger(layer, till, wait_timeout_seconds=40)(ORDER) == {"receipt": 1}
    assert asyncio.get_running_loop().time() - began == pytest.approx(6, abs=1.5)
    assert await owner == {"receipt": 1}


async def test_a_waiter_beside_an_owner_that_renews_its_lease_does_not_ask_the_store() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 20
    owner = await started(charger(layer, till, lease_seconds=4)(ORDER))
    assert await charger(layer, till, wait_timeout_seconds=60)(ORDER) == await owner == {"receipt": 1}
    assert layer.calls.count("renew") > 10
    assert layer.calls.count("acquire") == 1


def test_callers_of_a_loop_that_was_closed_can_be_closed_in_any_order() -> None:
    for first in (0, 1):
        layer, till, loop = PlannedLayer().inner, Till(), VirtualTimeLoop()
        till.seconds = 3600
        calls = [charger(layer, till, wait_timeout_seconds=60)(ORDER) for _ in range(2)]

        async def begin(calls: Any = calls) -> None:
            for call in calls:
                call.send(None)

        loop.run_until_complete(begin())
        loop.close()
        calls[first].close()
        calls[1 - first].close()
        assert till.charges == [ORDER]


async def test_a_follower_that_then_runs_itself_has_waited() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds, till.error = 1, ValueError("declined")
    leader = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(0.1)
    await made_idempotent(Till().charge, layer, wait_timeout_seconds=9, hooks=(listener,))(ORDER)
    assert listener.kinds == [EventKind.WAITED, EventKind.CLAIMED, EventKind.EXECUTED]
    with pytest.raises(ValueError, match="declined"):
        await leader


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
