"""The persistence layer fails, before and after it has applied what it was asked."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import socket
import ssl
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from aidem import IdempotencyConfig, RecordStatus, current_execution, idempotency, idempotent_function
from aidem._engine.claim import RELEASE_SECONDS
from aidem._runtime.cancellation import CLEANUP_SECONDS
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
from tests.support.planned import (
    LAYERS,
    NO_ROUTE,
    VIRTUAL_TIME,
    DeclinedError,
    Fault,
    InMemory,
    Listener,
    PlannedLayer,
    SettlingLayer,
    Till,
    VirtualTimeLoop,
    closed_when,
    made_idempotent,
    only_record,
    other_process,
)
from tests.support.records import clear

ORDER = {"id": 7}


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


@pytest.mark.parametrize("error", [OSError("boom"), NO_ROUTE, IdempotencyPersistenceConfigError("no such table")])
async def test_a_layer_that_fails_before_the_call_is_an_error_and_nothing_runs(error: Exception) -> None:
    layer, till, listener = PlannedLayer().plan("acquire", Fault(error=error)), Till(), Listener()
    told = str(error) if isinstance(error, IdempotencyError) else "OSError"  # foreign text may show data
    with pytest.raises(IdempotencyPersistenceLayerError, match=f"^{told}; the function was not run") as caught:
        await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, type(error) if isinstance(error, IdempotencyError) else IdempotencyError)
    assert caught.value.key == listener.events[0].key
    assert not till.charges
    assert listener.kinds == [EventKind.PERSISTENCE_ERROR]


@pytest.mark.parametrize("error", [OSError("boom"), NO_ROUTE])
async def test_a_claim_whose_reply_was_lost_is_released_so_that_a_retry_runs_at_once(error: Exception) -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=error, applied=True)), Till()
    with pytest.raises(IdempotencyPersistenceLayerError):
        await made_idempotent(till.charge, layer)(ORDER)
    await asyncio.sleep(0.1)
    assert layer.calls == ["acquire", "release"]
    assert await made_idempotent(till.charge, layer)(ORDER) == {"receipt": 1}


async def test_fail_open_runs_unprotected_when_the_store_is_unreachable(caplog: Any) -> None:
    layer, till, listener = PlannedLayer().plan("acquire", Fault(error=NO_ROUTE)), Till(), Listener()
    charge = made_idempotent(till.charge, layer, on_persistence_error="run", hooks=(listener,))
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
        await made_idempotent(till.charge, layer, on_persistence_error="run")(ORDER)
    assert not till.charges


@pytest.mark.parametrize("applied", [False, True])
async def test_a_completion_that_fails_is_tried_again_while_the_lease_is_held(applied: bool) -> None:
    faults = [Fault(error=NO_ROUTE, applied=applied) for _ in range(4)]
    layer, till, listener = PlannedLayer().plan("complete", *faults), Till(), Listener()
    assert await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire"] + ["complete"] * 5
    assert only_record(layer).status is RecordStatus.COMPLETED
    assert listener.kinds == [EventKind.CLAIMED, *[EventKind.PERSISTENCE_ERROR] * 4, EventKind.EXECUTED]
    assert len(till.charges) == 1


@pytest.mark.parametrize("lease_seconds", [10.0, None])
async def test_a_completion_that_never_succeeds_is_an_error_that_says_the_effect_has_happened(
    lease_seconds: float | None,
) -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=OSError("no route")) for _ in range(100))), Till()
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(IdempotencyPersistenceLayerError, match="effect has happened"):
        await made_idempotent(till.charge, layer, lease_seconds=lease_seconds)(ORDER)
    # The last try is made when there is no time for another delay, of up to 2 s, before the lease has passed.
    assert (lease_seconds or 30.0) - 2.0 <= loop.time() - began <= (lease_seconds or 30.0) + 0.1
    assert len(till.charges) == 1
    assert only_record(layer).status is RecordStatus.INPROGRESS  # it lapses, and is not released: the effect happened


async def test_a_completion_that_is_refused_for_good_is_not_tried_again() -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("complete", Fault(error=denied)), Till()
    with pytest.raises(IdempotencyPersistenceConfigError, match="effect has happened"):
        await made_idempotent(till.charge, layer)(ORDER)
    assert layer.calls == ["acquire", "complete"]


async def test_a_result_too_large_for_the_layer_is_completed_as_unavailable(caplog: Any) -> None:
    too_large = IdempotencySerializationError("the item is larger than 400 KB")
    layer, till, listener = PlannedLayer().plan("complete", Fault(error=too_large)), Till(), Listener()
    charge = made_idempotent(till.charge, layer, hooks=(listener,))
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
        await made_idempotent(till.charge, layer)(ORDER)


async def test_the_users_exception_wins_over_a_failure_to_give_the_key_back(caplog: Any) -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    layer.plan("release", *(Fault(error=OSError("no route")) for _ in range(100)))
    till.error = RuntimeError("declined")
    began = asyncio.get_running_loop().time()
    with pytest.raises(RuntimeError, match="declined") as caught:
        await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert caught.value is till.error
    assert caught.value.__cause__ is None
    [note] = caught.value.__notes__
    assert "could not release the claim of idempotency key" in note
    assert "OSError" in note
    assert "could not be released" in caplog.text
    assert set(listener.kinds[1:-1]) == {EventKind.PERSISTENCE_ERROR}
    assert (listener.kinds[0], listener.kinds[-1]) == (EventKind.CLAIMED, EventKind.ABANDONED)
    assert listener.events[-1].error is till.error
    assert asyncio.get_running_loop().time() - began <= RELEASE_SECONDS


async def test_the_users_exception_propagates_unchanged() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.error = RuntimeError("declined")
    with pytest.raises(RuntimeError) as caught:
        await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert caught.value is till.error
    assert not hasattr(caught.value, "__notes__")
    assert listener.kinds == [EventKind.CLAIMED, EventKind.RELEASED]
    assert listener.events[-1].error is till.error
    assert not layer.inner.records()


async def test_a_loser_whose_store_is_down_says_that_the_effect_has_happened() -> None:
    layer, loser, winner = PlannedLayer().plan("get", Fault(error=OSError("no route"))), Till(), Till()
    loser.seconds = 60
    task = asyncio.ensure_future(made_idempotent(loser.charge, layer, lease_seconds=30, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    await made_idempotent(winner.charge, other_process(layer))(ORDER)
    with pytest.raises(IdempotencyPersistenceLayerError, match=r"OSError.*effect has happened"):
        await task


async def test_a_coroutine_that_is_closed_gives_its_key_back_in_the_background() -> None:
    layer, listener = PlannedLayer(), Listener()
    gate = asyncio.Event()

    async def charge(order: Any) -> Any:
        await gate.wait()

    config = IdempotencyConfig(hooks=(listener,))
    function = idempotent_function(persistence_store=layer, config=config, key_prefix="charge")(charge)
    coroutine = function(ORDER)
    step = coroutine.send(None)
    while not (layer.inner.records() and "acquire" in layer.calls and gate._waiters):
        await asyncio.sleep(0)
        if step is None or step.done():
            step = coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(0.1)
    assert layer.calls == ["acquire", "release"]
    assert not layer.inner.records()
    assert listener.kinds == [EventKind.CLAIMED, EventKind.RELEASED]


async def test_a_block_that_is_closed_with_its_generator_tells_that_its_key_was_released_or_lost() -> None:
    layer, listener = PlannedLayer(), Listener()

    async def steps(key: str) -> AsyncGenerator[str]:
        config = IdempotencyConfig(hooks=(listener,))
        async with idempotency(key, persistence_store=layer, config=config) as execution:
            if not execution.replayed:
                yield "charging"

    for told in ([EventKind.RELEASED], [EventKind.LEASE_LOST, EventKind.ABANDONED]):
        generator = steps("order-1")
        assert await anext(generator) == "charging"
        if EventKind.LEASE_LOST in told:
            clear(layer.inner)
        await generator.aclose()
        await asyncio.sleep(0.1)
        assert listener.kinds == [EventKind.CLAIMED, *told]
        listener.events.clear()
    assert layer.calls == ["acquire", "release"] * 2


async def test_a_failing_hook_is_logged_and_changes_nothing(caplog: Any) -> None:
    class Broken:
        def on_event(self, event: Any) -> None:
            raise ValueError("hook")

    layer, till, listener = PlannedLayer(), Till(), Listener()
    assert await made_idempotent(till.charge, layer, hooks=(Broken(), listener))(ORDER) == {"receipt": 1}
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED]
    assert "a hook failed on the event executed" in caplog.text


async def test_events_say_what_happened_to_which_key_and_how_long_it_took() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    charge = made_idempotent(till.charge, layer, hooks=(listener,))
    await charge(ORDER)
    await charge(ORDER)
    claimed, executed, replayed = listener.events
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED]
    assert claimed.key == executed.key == replayed.key == only_record(layer).idempotency_key
    assert claimed.fence == executed.fence == replayed.fence == only_record(layer).fence > 0
    assert executed.function == "tests.support.planned.Till.charge"
    assert 0 <= executed.duration_seconds < 60


async def test_a_conflict_is_reported() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds = 1
    owner = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(0.1)
    with pytest.raises(IdempotencyError) as caught:
        await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert listener.kinds == [EventKind.CONFLICT]
    assert listener.events[0].error is caught.value
    await owner


async def test_cancelled_while_an_unused_claim_cannot_be_released_is_still_a_cancellation(caplog: Any) -> None:
    layer, till = PlannedLayer(latency_seconds=1), Till()
    layer.plan("release", *(Fault(error=OSError("no route")) for _ in range(100)))
    task = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "it lapses with its lease" in caplog.text
    assert only_record(layer).status is RecordStatus.INPROGRESS


async def test_a_cancelled_completion_stops_trying_after_the_bound() -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=NO_ROUTE) for _ in range(100))), Till()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))
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


async def test_a_layer_that_finds_a_claim_too_large_has_failed() -> None:
    too_large = IdempotencySerializationError("too large")
    for operation in ("acquire", "renew", "release"):
        layer, till, listener = PlannedLayer().plan(operation, Fault(error=too_large)), Till(), Listener()
        till.seconds, till.error = 25, ValueError("declined")
        expected = IdempotencyPersistenceLayerError if operation == "acquire" else ValueError
        with pytest.raises(expected):
            await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
        assert next(kind for kind in listener.kinds if kind is not EventKind.CLAIMED) is EventKind.PERSISTENCE_ERROR
        assert not layer.inner.records()


@pytest.mark.parametrize("kind", LAYERS)
async def test_a_completion_that_hangs_ends_with_the_lease(kind: Any) -> None:
    layer, till = kind().plan("complete", *(Fault(gate=asyncio.Event()) for _ in range(10))), Till()
    began = asyncio.get_running_loop().time()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="effect has happened"):
        await made_idempotent(till.charge, layer)(ORDER)
    assert asyncio.get_running_loop().time() - began == pytest.approx(30, abs=1)


async def test_a_stored_exception_that_cannot_be_recorded_still_propagates() -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("complete", Fault(error=denied)), Till()
    till.error = DeclinedError("no")
    with pytest.raises(DeclinedError) as caught:
        await made_idempotent(till.charge, layer, stored_exceptions=(DeclinedError,))(ORDER)
    assert "access denied" in caught.value.__notes__[0]


# --- Outages, told apart from faults ----------------------------------------------------------------------------------

UNREACHABLE = [
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    BrokenPipeError(errno.EPIPE, "broken"),
    TimeoutError("no answer"),
    socket.gaierror(socket.EAI_NONAME, "unknown host"),
    OSError(errno.EHOSTUNREACH, "no route"),
    OSError(errno.ENETUNREACH, "no network"),
]
FAULTS = [
    OSError("boom"),
    OSError(errno.ENOSPC, "disk full"),
    PermissionError(errno.EACCES, "denied"),
    FileNotFoundError(errno.ENOENT, "no such file"),
    ssl.SSLCertVerificationError(1, "not trusted"),
    ValueError("bug"),
]


@pytest.mark.parametrize("error", UNREACHABLE, ids=repr)
async def test_network_errors_of_a_layer_are_outages(error: Exception) -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=error), Fault(error=error)), Till()
    with pytest.raises(IdempotencyPersistenceConnectionError, match=f"^{type(error).__name__}; the function was not"):
        await made_idempotent(till.charge, layer)(ORDER)
    assert await made_idempotent(till.charge, layer, on_persistence_error="run")(ORDER) == {"receipt": 1}
    assert layer.calls.count("acquire") == 2
    assert not layer.inner.records()


@pytest.mark.parametrize("error", FAULTS, ids=repr)
async def test_other_errors_of_a_layer_are_no_outages(error: Exception) -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=error)), Till()
    with pytest.raises(IdempotencyPersistenceLayerError) as caught:
        await made_idempotent(till.charge, layer, on_persistence_error="run")(ORDER)
    assert type(caught.value) is IdempotencyPersistenceLayerError
    assert not till.charges


async def test_a_host_with_several_addresses_that_all_refuse_the_connection_is_an_outage() -> None:
    loop = asyncio.get_running_loop()

    async def two_addresses(*_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", 1)) for number in (1, 2)]

    class Networked(PlannedLayer):
        async def acquire(self, record: Any, *, now: float, max_clock_skew_seconds: float = 0.0) -> Any:
            await loop.create_connection(asyncio.Protocol, "store.test", 1)

    loop.getaddrinfo = two_addresses  # type: ignore[method-assign]
    with pytest.raises(IdempotencyPersistenceConnectionError) as caught:
        await made_idempotent(Till().charge, Networked())(ORDER)
    assert "127.0.0.2" in str(caught.value.__cause__)


# --- One line a fault -------------------------------------------------------------------------------------------------


def not_applied(error: IdempotencyPersistenceConnectionError) -> IdempotencyPersistenceConnectionError:
    error.may_be_applied = False
    return error


@pytest.mark.parametrize(
    "error",
    [
        IdempotencyPersistenceConfigError("no such table"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        socket.gaierror(socket.EAI_NONAME, "unknown host"),
        not_applied(IdempotencyPersistenceConnectionError("cannot be reached")),
    ],
    ids=repr,
)
async def test_a_claim_that_cannot_be_there_is_neither_released_nor_logged(error: Exception, caplog: Any) -> None:
    layer, till = PlannedLayer(), Till()
    for operation in ("acquire", "release"):
        layer.plan(operation, *(Fault(error=error) for _ in range(9)))
    with pytest.raises(IdempotencyPersistenceLayerError) as caught:
        await made_idempotent(till.charge, layer)(ORDER)
    assert caught.value.may_be_applied is False
    await asyncio.sleep(10)
    assert layer.calls == ["acquire"]
    assert not caplog.messages


async def test_a_claim_that_may_be_there_and_cannot_be_released_is_one_line(caplog: Any) -> None:
    layer, till = PlannedLayer(), Till()
    for operation in ("acquire", "release"):
        layer.plan(operation, *(Fault(error=NO_ROUTE) for _ in range(9)))
    with pytest.raises(IdempotencyPersistenceConnectionError) as caught:
        await made_idempotent(till.charge, layer)(ORDER)
    assert caught.value.may_be_applied is True
    [message] = caplog.messages
    assert "could not be released" in message


@pytest.mark.parametrize("error", [NO_ROUTE, IdempotencyPersistenceLayerError("unknown answer"), ValueError("bug")])
async def test_what_keeps_failing_is_tried_ever_more_slowly_and_told_once(error: Exception, caplog: Any) -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=error) for _ in range(8))), Till()
    task = asyncio.ensure_future(made_idempotent(till.charge, layer, lease_seconds=60)(ORDER))
    await asyncio.sleep(1)
    assert 3 <= layer.calls.count("complete") <= 5
    assert await task == {"receipt": 1}
    assert layer.calls.count("complete") == 9
    [message] = caplog.messages
    assert "at try 9" in message
    assert ("bug" in message) is False  # foreign text may show data


async def test_an_error_says_how_often_it_was_tried(caplog: Any) -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=NO_ROUTE) for _ in range(99))), Till()
    with pytest.raises(IdempotencyPersistenceConnectionError) as caught:
        await made_idempotent(till.charge, layer)(ORDER)
    tries = layer.calls.count("complete")
    assert 10 < tries < 40
    assert f"no route (tried {tries} times); the function has run and its effect has happened" in str(caught.value)
    assert not caplog.messages  # the caller has it


# --- After the body ---------------------------------------------------------------------------------------------------


async def test_an_error_after_a_loop_was_blocked_between_two_tries_says_that_the_effect_has_happened() -> None:
    layer, till = PlannedLayer().plan("complete", *(Fault(error=NO_ROUTE) for _ in range(9))), Till()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    block = loop.jump

    class Blocking:
        def on_event(self, event: Any) -> None:
            if event.kind is EventKind.PERSISTENCE_ERROR:
                loop.call_later(0.01, block, 100.0)

    with pytest.raises(IdempotencyPersistenceConnectionError) as caught:
        await made_idempotent(till.charge, layer, lease_seconds=3, hooks=(Blocking(),))(ORDER)
    assert layer.calls == ["acquire", "complete"]
    assert str(caught.value).startswith("no route; the function has run and its effect has happened")
    assert caught.value.key == only_record(layer).idempotency_key


async def loser_of(layer: PlannedLayer, **options: Any) -> asyncio.Future[Any]:
    """Return a call that has lost its lease to one that has completed, and that looks for its outcome in a second."""
    loser, winner = Till(), Till()
    loser.seconds, winner.charges = 60, ["earlier"]
    task = asyncio.ensure_future(
        made_idempotent(loser.charge, layer, lease_seconds=30, renew_lease=False, **options)(ORDER)
    )
    await asyncio.sleep(31)
    await made_idempotent(winner.charge, other_process(layer))(ORDER)
    await asyncio.sleep(28)
    return task


async def test_a_loser_whose_layer_cannot_read_the_winners_record_says_that_the_effect_has_happened() -> None:
    unreadable = IdempotencySerializationError("not a record")
    layer = PlannedLayer().plan("get", Fault(error=unreadable))
    with pytest.raises(IdempotencyPersistenceLayerError, match="effect has happened"):
        await (await loser_of(layer))


@pytest.mark.parametrize("error", [NO_ROUTE, OSError("boom")])
async def test_a_loser_looks_again_while_a_waiter_would(error: Exception) -> None:
    layer = PlannedLayer().plan("get", *(Fault(error=error) for _ in range(5)))
    assert await (await loser_of(layer, wait_timeout_seconds=20)) == {"receipt": 2}
    assert layer.calls.count("get") == 6


async def test_a_loser_gives_up_looking_when_a_waiter_would() -> None:
    layer = PlannedLayer().plan("get", *(Fault(error=NO_ROUTE) for _ in range(99)))
    task = await loser_of(layer, wait_timeout_seconds=20)
    began = asyncio.get_running_loop().time()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="effect has happened"):
        await task
    assert asyncio.get_running_loop().time() - began == pytest.approx(21, abs=1.5)


async def test_a_loser_does_not_look_again_where_it_is_denied() -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer = PlannedLayer().plan("get", *(Fault(error=denied) for _ in range(9)))
    with pytest.raises(IdempotencyPersistenceConfigError, match="effect has happened"):
        await (await loser_of(layer, wait_timeout_seconds=20))
    assert layer.calls.count("get") == 1


# --- Closed while it waits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PlannedLayer, SettlingLayer])
@pytest.mark.parametrize("operation", ["acquire", "complete", "renew", "release", "get"])
async def test_a_coroutine_closed_while_it_waits_for_a_store_that_then_fails_leaves_no_complaint(
    operation: str, kind: Any
) -> None:
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["message"]))
    layer = kind().plan(operation, *(Fault(error=OSError("no route"), before_seconds=1) for _ in range(50)))

    async def charge(order: Any) -> None:
        if operation == "renew":
            await current_execution().ensure_owned()
        if operation == "release":
            raise RuntimeError("declined")
        if operation == "get":  # somebody else takes it over, and completes
            clear(layer.inner)
            await made_idempotent(Till().charge, other_process(layer))(order)

    function = idempotent_function(data_keyword_argument="order", persistence_store=layer, key_prefix="charge")(charge)
    await closed_when(function(ORDER), lambda: layer.calls[-1:] == [operation])
    await asyncio.sleep(60)
    gc.collect()
    assert not told
    assert layer.calls.count(operation) >= 1


@pytest.mark.parametrize("tries", [1, 2, 3])
@pytest.mark.parametrize("moment", ["at the store", "in the back-off"])
@pytest.mark.parametrize("operation", ["release", "complete"])
async def test_what_is_tried_again_goes_on_in_the_background_when_its_coroutine_is_closed(
    operation: str, moment: str, tries: int, caplog: Any
) -> None:
    faults = [Fault(error=NO_ROUTE, before_seconds=0.01) for _ in range(3)]
    layer, till, listener = PlannedLayer().plan(operation, *faults), Till(), Listener()
    if operation == "release":
        till.error = RuntimeError("declined")

    def is_time() -> bool:
        failures = tries if moment == "in the back-off" else tries - 1
        return layer.calls.count(operation) == tries and listener.kinds.count(EventKind.PERSISTENCE_ERROR) == failures

    await closed_when(made_idempotent(till.charge, layer, hooks=(listener,))(ORDER), is_time)
    assert layer.calls.count(operation) == tries
    await asyncio.sleep(6)
    if operation == "release":
        assert not layer.inner.records()
    else:
        assert only_record(layer).status is RecordStatus.COMPLETED
    assert len(caplog.messages) <= 1


async def test_a_claim_whose_coroutine_was_closed_is_released_though_the_store_fails_at_first(caplog: Any) -> None:
    faults = [Fault(error=NO_ROUTE) for _ in range(3)]
    layer, till = PlannedLayer(latency_seconds=0.01).plan("release", *faults), Till()
    await closed_when(made_idempotent(till.charge, layer)(ORDER), lambda: layer.calls)
    await asyncio.sleep(6)
    assert layer.calls == ["acquire", *["release"] * 4]
    assert not layer.inner.records()
    assert not till.charges
    assert len(caplog.messages) == 1


async def test_a_claim_that_stays_because_its_coroutine_was_closed_is_told_in_one_line(caplog: Any) -> None:
    layer, till = (
        PlannedLayer(latency_seconds=0.01).plan("release", *(Fault(error=NO_ROUTE) for _ in range(99))),
        Till(),
    )
    await closed_when(made_idempotent(till.charge, layer)(ORDER), lambda: layer.calls)
    await asyncio.sleep(60)
    [message] = caplog.messages
    assert "lapses with its lease" in message
    assert "no route (tried" in message


async def test_a_coroutine_closed_while_its_claim_is_refused_releases_nothing(caplog: Any) -> None:
    refused = Fault(error=IdempotencyPersistenceConfigError("no such table"), before_seconds=1)
    layer, till = PlannedLayer().plan("acquire", refused), Till()
    await closed_when(made_idempotent(till.charge, layer)(ORDER), lambda: layer.calls)
    await asyncio.sleep(60)
    assert layer.calls == ["acquire"]
    assert not caplog.messages


def test_a_coroutine_that_another_loop_closes_is_given_back_there() -> None:
    layer, till = PlannedLayer(), Till()
    first, second = VirtualTimeLoop(), VirtualTimeLoop()
    layer.plan("acquire", Fault(before_seconds=3600))
    coroutine = made_idempotent(till.charge, layer)(ORDER)

    async def begin() -> None:
        coroutine.send(None)
        await asyncio.sleep(1)

    async def close() -> None:
        coroutine.close()
        await asyncio.sleep(1)

    first.run_until_complete(begin())
    second.run_until_complete(close())
    assert layer.calls == ["acquire", "release"]
    for loop in (first, second):
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


async def test_a_background_release_that_fails_is_logged(caplog: Any) -> None:
    denied = IdempotencyPersistenceConfigError("access denied")
    layer, till = PlannedLayer().plan("release", Fault(error=denied)), Till()
    coroutine = made_idempotent(till.charge, layer)(ORDER)
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(1)
    assert layer.calls == ["acquire", "release"]
    assert "lapses with its lease: access denied" in caplog.text


# --- Releases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_a_release_that_fails_once_is_tried_again(on_abandoned: Any) -> None:
    layer, till = PlannedLayer().plan("release", Fault(error=NO_ROUTE)), Till()
    till.error = ValueError("declined")
    charge = made_idempotent(till.charge, layer, on_abandoned=on_abandoned)
    for _ in range(2):
        with pytest.raises(ValueError, match="declined"):
            await charge(ORDER)
    assert len(till.charges) == 2


async def test_a_release_whose_reply_was_lost_is_no_lost_lease() -> None:
    layer, till, listener = PlannedLayer().plan("release", Fault(error=NO_ROUTE, applied=True)), Till(), Listener()
    till.error = ValueError("declined")
    with pytest.raises(ValueError, match="declined"):
        await made_idempotent(till.charge, layer, hooks=(listener,))(ORDER)
    assert layer.calls == ["acquire", "release", "release"]
    assert EventKind.RELEASED in listener.kinds
    assert EventKind.LEASE_LOST not in listener.kinds


async def test_a_failing_release_never_replaces_the_error_of_the_claim() -> None:
    class Broken(PlannedLayer):
        def release(self, record: Any) -> Any:
            raise ValueError("release is broken too")

    layer, till = Broken().plan("acquire", Fault(error=NO_ROUTE)), Till()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="no route"):
        await made_idempotent(till.charge, layer)(ORDER)
    layer.plan("acquire", Fault(error=NO_ROUTE))
    assert await made_idempotent(till.charge, layer, on_persistence_error="run")(ORDER) == {"receipt": 1}


async def test_two_blips_leave_no_doubt_about_what_never_ran() -> None:
    layer, till = PlannedLayer(), Till()
    layer.plan("acquire", Fault(error=NO_ROUTE, applied=True)).plan("release", Fault(error=NO_ROUTE))
    with pytest.raises(IdempotencyPersistenceConnectionError):
        await made_idempotent(till.charge, layer, on_abandoned="raise")(ORDER)
    assert not layer.inner.records()


def test_a_claim_whose_reply_was_lost_is_released_before_the_loop_ends() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(error=NO_ROUTE, applied=True)), Till()

    with pytest.raises(IdempotencyPersistenceConnectionError):
        asyncio.run(made_idempotent(till.charge, layer)(ORDER))
    assert not layer.inner.records()


def interrupt() -> None:
    """Do what the handler of a signal does."""
    raise KeyboardInterrupt


async def test_an_interrupt_while_a_layer_answers_at_once_leaves_no_claim() -> None:
    layer, till = InMemory(interrupt), Till()
    with pytest.raises(KeyboardInterrupt):
        await made_idempotent(till.charge, layer)(ORDER)
    assert len(layer.records()) == 1
    await asyncio.sleep(0.1)
    assert not layer.records()
    assert not till.charges
