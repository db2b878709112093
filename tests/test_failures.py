"""The persistence layer fails, before and after it has applied what it was asked."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from aidem import IdempotencyConfig, RecordStatus, idempotency, idempotent_function
from aidem._cancellation import CLEANUP_SECONDS
from aidem._claimed_record import GIVING_BACK_SECONDS
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencyResultUnavailableError,
    IdempotencySerializationError,
    IdempotencyWarning,
)
from aidem.hooks import EventKind
from tests.support import VIRTUAL_TIME, Fault, Listener, PlannedLayer, Till

ORDER = {"id": 7}
NO_ROUTE = IdempotencyPersistenceConnectionError("no route")


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def charger(layer: Any, till: Till, **options: Any) -> Any:
    config = IdempotencyConfig(**options)
    return idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="charge"
    )(till.charge)


def only_record(layer: PlannedLayer) -> Any:
    [record] = layer.inner._records.values()
    return record


@pytest.mark.parametrize("error", [OSError("boom"), NO_ROUTE, IdempotencyPersistenceConfigError("no such table")])
async def test_a_layer_that_fails_before_the_call_is_an_error_and_nothing_runs(error: Exception) -> None:
    layer, till, listener = PlannedLayer().plan("acquire", Fault(error=error)), Till(), Listener()
    told = str(error) if isinstance(error, IdempotencyError) else "OSError"  # foreign text may show data
    with pytest.raises(IdempotencyPersistenceLayerError, match=f"^{told}; the function was not run") as caught:
        await charger(layer, till, hooks=(listener,))(ORDER)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, type(error) if isinstance(error, IdempotencyError) else IdempotencyError)
    assert caught.value.key == listener.events[0].key
    assert not till.charges
    assert listener.kinds == [EventKind.PERSISTENCE_ERROR]


@pytest.mark.parametrize("error", [OSError("boom"), NO_ROUTE])
async def test_a_claim_whose_reply_was_lost_is_released_so_that_a_retry_runs_at_once(error: Exception) -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=error, applied=True)), Till()
    with pytest.raises(IdempotencyPersistenceLayerError):
        await charger(layer, till)(ORDER)
    await asyncio.sleep(0.1)
    assert layer.calls == ["acquire", "release"]
    assert await charger(layer, till)(ORDER) == {"receipt": 1}


async def test_fail_open_runs_unprotected_when_the_store_is_unreachable(caplog: Any) -> None:
    layer, till, listener = PlannedLayer().plan("acquire", Fault(error=NO_ROUTE)), Till(), Listener()
    charge = charger(layer, till, on_persistence_error="run", hooks=(listener,))
    assert await charge(ORDER) == {"receipt": 1}
    assert listener.kinds == [EventKind.PERSISTENCE_ERROR, EventKind.BYPASSED]
    assert "without idempotency" in caplog.text
    assert "complete" not in layer.calls
    assert await charge(ORDER) == {"receipt": 2}
    assert await charge(ORDER) == {"receipt": 2}


@pytest.mark.parametrize("error", [OSError("boom"), IdempotencyPersistenceConfigError("access denied")])
async def test_fail_open_never_covers_what_a_retry_would_not_help(error: Exception) -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=error)), Till()
    with pytest.raises(IdempotencyPersistenceLayerError):
        await charger(layer, till, on_persistence_error="run")(ORDER)
    assert not till.charges


@pytest.mark.parametrize("applied", [False, True])
async def test_a_completion_that_fails_is_tried_again_while_the_lease_is_held(applied: bool) -> None:
    faults = [Fault(error=NO_ROUTE, applied=applied) for _ in range(4)]
    layer, till, listener = PlannedLayer().plan("complete", *faults), Till(), Listener()
    assert await charger(layer, till, hooks=(listener,))(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire"] + ["complete"] * 5
    assert only_record(layer).status is RecordStatus.COMPLETED
    assert listener.kinds == [EventKind.PERSISTENCE_ERROR] * 4 + [EventKind.EXECUTED]
    assert len(till.charges) == 1


@pytest.mark.parametrize("lease_seconds", [10.0, None])
async def test_a_completion_that_never_succeeds_is_an_error_that_says_the_effect_has_happened(
    lease_seconds: float | None,
) -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=OSError("no route")) for _ in range(100))), Till()
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(IdempotencyPersistenceLayerError, match="effect has happened"):
        await charger(layer, till, lease_seconds=lease_seconds)(ORDER)
    assert loop.time() - began == pytest.approx(lease_seconds or 30.0, abs=1.5)
    assert len(till.charges) == 1
    assert only_record(layer).status is RecordStatus.INPROGRESS  # it lapses, and is not given back: the effect happened


async def test_a_completion_that_is_refused_for_good_is_not_tried_again() -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("complete", Fault(error=denied)), Till()
    with pytest.raises(IdempotencyPersistenceConfigError, match="effect has happened"):
        await charger(layer, till)(ORDER)
    assert layer.calls == ["acquire", "complete"]


async def test_a_result_too_large_for_the_layer_is_completed_as_unavailable(caplog: Any) -> None:
    too_large = IdempotencySerializationError("the item is larger than 400 KB")
    layer, till, listener = PlannedLayer().plan("complete", Fault(error=too_large)), Till(), Listener()
    charge = charger(layer, till, hooks=(listener,))
    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert await charge(ORDER) == {"receipt": 1}
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert EventKind.RESULT_UNAVAILABLE in listener.kinds
    with pytest.raises(IdempotencyResultUnavailableError):
        await charge(ORDER)
    assert len(till.charges) == 1


async def test_a_layer_that_finds_even_the_short_text_too_large_is_an_error() -> None:
    too_large = IdempotencySerializationError("too large")
    layer, till = PlannedLayer().plan("complete", Fault(error=too_large), Fault(error=too_large)), Till()
    with pytest.raises(IdempotencyPersistenceLayerError, match="effect has happened"):
        await charger(layer, till)(ORDER)


async def test_the_users_exception_wins_over_a_failure_to_give_the_key_back(caplog: Any) -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    layer.plan("release", *(Fault(error=OSError("no route")) for _ in range(100)))
    till.error = RuntimeError("declined")
    began = asyncio.get_running_loop().time()
    with pytest.raises(RuntimeError, match="declined") as caught:
        await charger(layer, till, hooks=(listener,))(ORDER)
    assert caught.value is till.error
    assert caught.value.__cause__ is None
    [note] = caught.value.__notes__
    assert "could not give back idempotency key" in note
    assert "OSError" in note
    assert "could not give its idempotency key back" in caplog.text
    assert set(listener.kinds) == {EventKind.PERSISTENCE_ERROR}
    assert asyncio.get_running_loop().time() - began <= GIVING_BACK_SECONDS


async def test_the_users_exception_propagates_unchanged() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.error = RuntimeError("declined")
    with pytest.raises(RuntimeError) as caught:
        await charger(layer, till, hooks=(listener,))(ORDER)
    assert caught.value is till.error
    assert not hasattr(caught.value, "__notes__")
    assert listener.kinds == [EventKind.RELEASED]
    assert not layer.inner._records


async def test_a_loser_whose_store_is_down_says_that_the_effect_has_happened() -> None:
    layer, loser, winner = PlannedLayer().plan("get", Fault(error=OSError("no route"))), Till(), Till()
    loser.seconds = 60
    task = asyncio.ensure_future(charger(layer, loser, lease_seconds=30, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    await charger(PlannedLayer(inner=layer.inner), winner)(ORDER)
    with pytest.raises(IdempotencyPersistenceLayerError, match=r"OSError.*effect has happened"):
        await task


async def test_a_coroutine_that_is_closed_gives_its_key_back_in_the_background() -> None:
    layer = PlannedLayer()
    gate = asyncio.Event()

    async def charge(order: Any) -> Any:
        await gate.wait()

    function = idempotent_function(persistence_store=layer, key_prefix="charge")(charge)
    coroutine = function(ORDER)
    step = coroutine.send(None)
    while not (layer.inner._records and "acquire" in layer.calls and gate._waiters):
        await asyncio.sleep(0)
        if step is None or step.done():
            step = coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(0.1)
    assert layer.calls == ["acquire", "release"]
    assert not layer.inner._records


async def test_a_failing_hook_is_logged_and_changes_nothing(caplog: Any) -> None:
    class Broken:
        def on_event(self, event: Any) -> None:
            raise ValueError("hook")

    layer, till, listener = PlannedLayer(), Till(), Listener()
    assert await charger(layer, till, hooks=(Broken(), listener))(ORDER) == {"receipt": 1}
    assert listener.kinds == [EventKind.EXECUTED]
    assert "a hook failed on the event executed" in caplog.text


async def test_events_say_what_happened_to_which_key_and_how_long_it_took() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    charge = charger(layer, till, hooks=(listener,))
    await charge(ORDER)
    await charge(ORDER)
    executed, replayed = listener.events
    assert (executed.kind, replayed.kind) == (EventKind.EXECUTED, EventKind.REPLAYED)
    assert executed.key == replayed.key == only_record(layer).idempotency_key
    assert executed.fence == replayed.fence == only_record(layer).fence > 0
    assert executed.function == "tests.support.Till.charge"
    assert 0 <= executed.duration_seconds < 60


async def test_a_conflict_is_reported() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds = 1
    owner = asyncio.ensure_future(charger(layer, till)(ORDER))
    await asyncio.sleep(0.1)
    with pytest.raises(IdempotencyError) as caught:
        await charger(layer, till, hooks=(listener,))(ORDER)
    assert listener.kinds == [EventKind.CONFLICT]
    assert listener.events[0].error is caught.value
    await owner


async def test_cancelled_while_an_unused_claim_cannot_be_released_is_still_a_cancellation(caplog: Any) -> None:
    layer, till = PlannedLayer(latency_seconds=1), Till()
    layer.plan("release", *(Fault(error=OSError("no route")) for _ in range(100)))
    task = asyncio.ensure_future(charger(layer, till)(ORDER))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "it lapses with its lease" in caplog.text
    assert only_record(layer).status is RecordStatus.INPROGRESS


async def test_a_cancelled_completion_stops_trying_after_the_bound() -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=NO_ROUTE) for _ in range(100))), Till()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(charger(layer, till)(ORDER))
    await asyncio.sleep(1)
    began = loop.time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.time() - began <= CLEANUP_SECONDS + 0.1


async def test_a_block_whose_outcome_cannot_be_recorded_says_so_when_it_is_left() -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("complete", Fault(error=denied)), Till()
    with pytest.raises(IdempotencyPersistenceConfigError, match="effect has happened"):
        async with idempotency("k", persistence_store=layer) as execution:
            await execution.run(till.charge, ORDER)
