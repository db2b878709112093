"""Events: each claim that is reported has one ending, whatever becomes of it, which says how long its body ran."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from aidem import DidNotHappen, Happened, IdempotencyConfig, StillUnknown, idempotency, idempotent_function, sync
from aidem.asgi import StoredResponse
from aidem.exceptions import (
    IdempotencyInDoubtError,
    IdempotencyPersistenceConfigError,
)
from aidem.hooks import ENDINGS, EventKind, IdempotencyEvent
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import completed_of
from tests.support.asgi import Shop, front_of, request
from tests.support.planned import (
    VIRTUAL_TIME,
    Fault,
    Listener,
    PlannedLayer,
    Till,
    made_idempotent,
    only_record,
    other_process,
    real_now,
)
from tests.support.records import clear, put

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 20.0
DENIED = IdempotencyPersistenceConfigError("denied")  # which is not tried again
CLAIMED, EXECUTED, RELEASED = EventKind.CLAIMED, EventKind.EXECUTED, EventKind.RELEASED
IN_DOUBT, ABANDONED, REPLAYED = EventKind.IN_DOUBT, EventKind.ABANDONED, EventKind.REPLAYED
POLICIES = pytest.mark.parametrize("policy", ["run_again", "raise"])


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def left_so(policy: str) -> EventKind:
    """The ending of a claim that is neither completed nor released."""
    return IN_DOUBT if policy == "raise" else ABANDONED


def ending_of(events: list[IdempotencyEvent]) -> IdempotencyEvent:
    """Return the one ending of the one claim among these events."""
    [claimed] = [event for event in events if event.kind is CLAIMED]
    [ending] = [event for event in events if event.kind in ENDINGS]
    assert events.index(claimed) < events.index(ending)
    assert (claimed.key, claimed.fence, claimed.function) == (ending.key, ending.fence, ending.function)
    assert ending.body_seconds is not None
    assert 0 <= ending.body_seconds <= ending.duration_seconds + 100_000  # of a clock that tests move
    assert [event for event in events if event.body_seconds is not None] == [ending]
    return ending


# --- What a body does -------------------------------------------------------------------------------------------------


class DeclinedError(Exception):
    """An outcome, as the config says."""


def take_over(layer: PlannedLayer, *, with_outcome: bool = False) -> None:
    """Let another call have the claim."""
    record = only_record(layer).replace(owner="theirs")
    if with_outcome:
        record = completed_of(record, now=layer.clock())
    put(layer.inner, record)


def returns(_layer: PlannedLayer) -> str:
    return "receipt"


def raises(_layer: PlannedLayer) -> str:
    raise ValueError("declined")


def raises_an_outcome(_layer: PlannedLayer) -> str:
    raise DeclinedError


def is_cancelled(_layer: PlannedLayer) -> str:
    raise asyncio.CancelledError


def is_interrupted(_layer: PlannedLayer) -> str:
    raise KeyboardInterrupt


def returns_an_object(_layer: PlannedLayer) -> Any:
    return object()


def is_lost(layer: PlannedLayer) -> str:
    take_over(layer)
    return "receipt"


def is_lost_to_an_outcome(layer: PlannedLayer) -> str:
    take_over(layer, with_outcome=True)
    return "receipt"


def is_lost_and_raises(layer: PlannedLayer) -> str:
    take_over(layer)
    raise ValueError("declined")


def cannot_be_recorded(layer: PlannedLayer) -> str:
    layer.plan("complete", Fault(error=DENIED))
    return "receipt"


def cannot_be_released(layer: PlannedLayer) -> str:
    layer.plan("release", Fault(error=DENIED))
    raise ValueError("declined")


ALWAYS: dict[Callable[[PlannedLayer], Any], EventKind] = {
    returns: EXECUTED,
    returns_an_object: EXECUTED,
    raises: RELEASED,
    raises_an_outcome: EXECUTED,
    is_lost: ABANDONED,
    is_lost_to_an_outcome: ABANDONED,
    is_lost_and_raises: ABANDONED,
}
BY_POLICY: dict[Callable[[PlannedLayer], Any], dict[str, EventKind]] = {
    is_cancelled: {"run_again": RELEASED, "raise": IN_DOUBT},
    is_interrupted: {"run_again": RELEASED, "raise": IN_DOUBT},
    cannot_be_recorded: {"run_again": ABANDONED, "raise": IN_DOUBT},
    cannot_be_released: {"run_again": ABANDONED, "raise": IN_DOUBT},
}
BODIES = pytest.mark.parametrize("body", [*ALWAYS, *BY_POLICY], ids=lambda body: body.__name__)


def expected(body: Callable[[PlannedLayer], Any], policy: str) -> EventKind:
    """Return the ending of a claim with this body."""
    return BY_POLICY[body][policy] if body in BY_POLICY else ALWAYS[body]


# --- Fronts -----------------------------------------------------------------------------------------------------------

Run = Callable[[Any, IdempotencyConfig, Callable[[], Any]], Any]


async def in_function(layer: Any, config: IdempotencyConfig, body: Callable[[], Any]) -> None:
    async def charge() -> Any:
        return body()

    await idempotent_function(persistence_store=layer, config=config, key_prefix="charge")(charge)()


async def in_block(layer: Any, config: IdempotencyConfig, body: Callable[[], Any]) -> None:
    async with idempotency("order", persistence_store=layer, config=config) as execution:
        execution.result = body()


async def in_request(layer: Any, config: IdempotencyConfig, body: Callable[[], Any]) -> None:
    shop = Shop()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body()
        await shop(scope, receive, send)

    settings = {"hooks": config.hooks, "on_abandoned": config.on_abandoned}
    await request(front_of(app, layer=layer, settings=settings))


def in_blocking_function(layer: Any, config: IdempotencyConfig, body: Callable[[], Any]) -> None:
    sync.idempotent_function(persistence_store=layer, config=config, key_prefix="charge")(body)()


def in_blocking_block(layer: Any, config: IdempotencyConfig, body: Callable[[], Any]) -> None:
    with sync.idempotency("order", persistence_store=layer, config=config) as execution:
        execution.result = body()


async def events_of(run: Run, layer: PlannedLayer, policy: Any, body: Callable[[], Any]) -> list[IdempotencyEvent]:
    listener = Listener()
    config = IdempotencyConfig(hooks=(listener,), on_abandoned=policy, stored_exceptions=(DeclinedError,))
    with contextlib.suppress(BaseException):  # whatever becomes of the caller, the claim has its ending
        await run(layer, config, body)
    return listener.events


# --- Each claim has one ending ----------------------------------------------------------------------------------------


@POLICIES
@BODIES
@pytest.mark.parametrize("run", [in_function, in_block, in_request])
@pytest.mark.filterwarnings("ignore:the result of .* could not be stored")
async def test_a_claim_has_one_ending(run: Run, body: Any, policy: str) -> None:
    layer = PlannedLayer()
    ending = ending_of(await events_of(run, layer, policy, lambda: body(layer)))
    kind = expected(body, policy)
    if run is in_request and body is raises_an_outcome:
        kind = RELEASED  # responses are outcomes, not exceptions
    assert ending.kind is kind


@POLICIES
@BODIES
@pytest.mark.parametrize("run", [in_blocking_function, in_blocking_block])
@pytest.mark.filterwarnings("ignore:the result of .* could not be stored")
def test_a_claim_of_blocking_code_has_one_ending(run: Run, body: Any, policy: Any) -> None:
    layer, listener = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now), Listener()
    config = IdempotencyConfig(hooks=(listener,), on_abandoned=policy, stored_exceptions=(DeclinedError,))
    with contextlib.suppress(BaseException):  # whatever becomes of the caller, the claim has its ending
        run(layer, config, lambda: body(layer))
    assert ending_of(listener.events).kind is expected(body, policy)


@POLICIES
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("run", [in_function, in_block, in_request])
async def test_a_claim_is_released_if_a_hook_ends_the_call_before_its_body_has_begun(
    run: Run, error: type[BaseException], policy: Any
) -> None:
    layer, listener = PlannedLayer(), Listener()
    config = IdempotencyConfig(hooks=(listener, RaisingAtClaims(error)), on_abandoned=policy)
    with pytest.raises(error):
        await run(layer, config, must_not_run)
    assert not layer.inner.records()
    assert listener.kinds == [CLAIMED, RELEASED]


@POLICIES
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("run", [in_blocking_function, in_blocking_block])
def test_a_claim_of_blocking_code_is_released_if_a_hook_ends_the_call_before_its_body_has_begun(
    run: Run, error: type[BaseException], policy: Any
) -> None:
    layer, listener = MemoryPersistenceLayer(), Listener()
    config = IdempotencyConfig(hooks=(listener, RaisingAtClaims(error)), on_abandoned=policy)
    with pytest.raises(error):
        run(layer, config, must_not_run)
    assert not layer.records()
    assert listener.kinds == [CLAIMED, RELEASED]


class RaisingAtClaims:
    """A hook that exits when a key is claimed."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_event(self, event: IdempotencyEvent) -> None:
        if event.kind is CLAIMED:
            raise self.error


def must_not_run() -> str:
    raise AssertionError("not to be run")


@POLICIES
async def test_a_lost_claim_whose_outcome_is_replayed_is_abandoned_before(policy: str) -> None:
    layer = PlannedLayer()
    events = await events_of(in_function, layer, policy, lambda: is_lost_to_an_outcome(layer))
    assert [event.kind for event in events] == [CLAIMED, EventKind.LEASE_LOST, ABANDONED, REPLAYED]


async def test_an_ending_has_the_exception_of_the_body_else_the_reason_why_the_claim_was_abandoned() -> None:
    layer = PlannedLayer()
    for body, error in (
        (returns, type(None)),
        (raises_an_outcome, DeclinedError),
        (raises, ValueError),
        (is_cancelled, asyncio.CancelledError),
        (cannot_be_released, ValueError),
        (cannot_be_recorded, IdempotencyPersistenceConfigError),
    ):
        clear(layer.inner)
        events = await events_of(in_function, layer, "run_again", lambda body=body: body(layer))  # type: ignore[misc]
        assert type(ending_of(events).error) is error


@POLICIES
@pytest.mark.parametrize("is_away", [False, True])
async def test_a_claim_of_a_closed_generator_has_one_ending_also_where_its_store_is_away(
    policy: Any, is_away: bool
) -> None:
    layer, listener = PlannedLayer(), Listener()
    config = IdempotencyConfig(hooks=(listener,), on_abandoned=policy)
    if is_away:
        layer.plan("release", Fault(error=DENIED)).plan("renew", Fault(error=DENIED))

    async def steps() -> AsyncGenerator[None]:
        async with idempotency("order", persistence_store=layer, config=config) as execution:
            if not execution.replayed:
                yield

    generator = steps()
    await anext(generator)
    await generator.aclose()
    await asyncio.sleep(1)
    given_back = IN_DOUBT if policy == "raise" else RELEASED
    assert ending_of(listener.events).kind is (left_so(policy) if is_away else given_back)


@POLICIES
@pytest.mark.parametrize("parts", [0, 1])
async def test_a_claim_of_a_request_that_is_closed_has_one_ending(policy: Any, parts: int) -> None:
    layer, listener, gate = PlannedLayer(), Listener(), asyncio.Event()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if parts:  # of a stream: from here on the claim is not released
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await gate.wait()

    coroutine: Any = request(front_of(app, layer=layer, settings={"on_abandoned": policy, "hooks": (listener,)}))
    await driven_until(coroutine, lambda: bool(gate._waiters))
    coroutine.close()
    await asyncio.sleep(1)
    at_rest = IN_DOUBT if policy == "raise" else RELEASED
    assert ending_of(listener.events).kind is (EXECUTED if parts else at_rest)


async def driven_until(coroutine: Any, is_time: Callable[[], bool]) -> None:
    """Run a coroutine without a task, so that it can be closed."""
    step = coroutine.send(None)
    while not is_time():
        await asyncio.sleep(0)
        if step is None or step.done():
            step = coroutine.send(None)


# --- Dropped calls ----------------------------------------------------------------------------------------------------


@POLICIES
@pytest.mark.parametrize("renew_lease", [True, False])
async def test_a_claim_of_a_block_that_is_never_left_ends_when_the_block_is_dropped(
    policy: Any, renew_lease: bool
) -> None:
    layer, listener = PlannedLayer(), Listener()
    config = IdempotencyConfig(hooks=(listener,), on_abandoned=policy, renew_lease=renew_lease)
    block = idempotency("order", persistence_store=layer, config=config)
    await block.__aenter__()
    await asyncio.sleep(5)
    del block
    await asyncio.sleep(60)  # a renewal would come after a third of the lease, and holds the claim until then
    gc.collect()
    await asyncio.sleep(0)
    assert ending_of(listener.events).kind is left_so(policy)


@POLICIES
def test_a_claim_of_a_blocking_block_that_is_never_left_ends_when_the_block_is_dropped(policy: Any) -> None:
    listener = Notifying()
    config = IdempotencyConfig(hooks=(listener,), on_abandoned=policy)
    block = sync.idempotency("order", persistence_store=MemoryPersistenceLayer(), config=config)
    block.__enter__()
    del block
    gc.collect()
    assert listener.has_ended.wait(PATIENCE_SECONDS)
    assert ending_of(listener.events).kind is (IN_DOUBT if policy == "raise" else RELEASED)


class Notifying(Listener):
    """Tells other threads when a claim has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.has_ended = Event()

    def on_event(self, event: IdempotencyEvent) -> None:
        super().on_event(event)
        if event.kind in ENDINGS:
            self.has_ended.set()


@POLICIES
def test_a_claim_whose_loop_is_closed_ends_when_its_call_is_dropped(policy: Any) -> None:
    layer, listener = MemoryPersistenceLayer(), Notifying()

    async def hang(order: Any) -> None:
        await asyncio.get_running_loop().create_future()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # a pending task is destroyed
    task = loop.create_task(made_idempotent(hang, layer, on_abandoned=policy, hooks=(listener,))("o-1"))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del task, loop
    assert listener.kinds == [CLAIMED]
    # The layer keeps what the calls of a loop share until it is used on another one.
    asyncio.run(made_idempotent(Till().charge, layer)("o-2"))
    gc.collect()
    assert listener.has_ended.wait(PATIENCE_SECONDS)
    assert ending_of(listener.events).kind is left_so(policy)


FORK = r"""
import os, sys
from aidem import IdempotencyConfig, sync
from aidem.persistence.memory import MemoryPersistenceLayer

class Listener:
    def on_event(self, event):
        os.write(1, f"{who} {event.kind}\n".encode())

who, layer = "parent", MemoryPersistenceLayer()

@sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(hooks=(Listener(),)))
def charge():
    global who
    child = os.fork()
    if not child:
        who = "child"
        raise SystemExit
    os.waitpid(child, 0)

charge()
"""


def test_a_fork_reports_no_ending_of_its_parents_claim() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["parent claimed", "parent executed"]


async def test_a_claim_that_no_hook_was_told_of_has_no_ending() -> None:
    layer, listener = PlannedLayer(), Listener()

    class Interrupting:
        def on_event(self, event: IdempotencyEvent) -> None:
            if event.kind is EventKind.TAKEN_OVER:
                raise KeyboardInterrupt

    hang = made_idempotent(lambda_of(asyncio.Event().wait), other_process(layer), renew_lease=False)
    owner = asyncio.ensure_future(hang("o-1"))
    await asyncio.sleep(31)
    with pytest.raises(KeyboardInterrupt):
        await made_idempotent(lambda_of(asyncio.sleep, 0), layer, hooks=(Interrupting(), listener))("o-1")
    assert not layer.inner.records()  # it was released
    assert listener.kinds == []
    owner.cancel()


def lambda_of(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    async def body(order: Any) -> None:
        await function(*args)

    return body


# --- Checks -----------------------------------------------------------------------------------------------------------


async def checked(answer: Any, *, is_lost: bool = False) -> Listener:
    """Let a call find a claim in doubt, and ask a check."""
    layer, listener = PlannedLayer(), Listener()
    hang = made_idempotent(
        lambda_of(asyncio.Event().wait), other_process(layer), on_abandoned="raise", renew_lease=False
    )
    owner = asyncio.ensure_future(hang("o-1"))
    await asyncio.sleep(31)

    async def check(_abandoned: Any) -> Any:
        if is_lost:
            clear(layer.inner)
        if isinstance(answer, Exception):
            raise answer
        return answer

    charge = made_idempotent(lambda_of(asyncio.sleep, 2), layer, on_abandoned=check, hooks=(listener,))
    try:
        await charge("o-1")
    except IdempotencyInDoubtError:
        assert isinstance(answer, StillUnknown | Exception)
    owner.cancel()
    return listener


@pytest.mark.parametrize(
    ("answer", "verdict", "then"),
    [
        (Happened(), "happened", [REPLAYED]),
        (DidNotHappen(), "did_not_happen", [CLAIMED, EXECUTED]),
        (StillUnknown(), "still_unknown", [EventKind.CONFLICT]),
        (ValueError("away"), "still_unknown", [EventKind.CONFLICT]),
    ],
)
async def test_a_check_is_reported_with_its_verdict_and_a_claim_only_if_the_body_runs(
    answer: Any, verdict: str, then: list[EventKind]
) -> None:
    listener = await checked(answer)
    assert listener.kinds == [EventKind.TAKEN_OVER, EventKind.CHECKED, *then]
    event = listener.events[1]
    assert event.verdict == verdict
    assert event.error is (answer if isinstance(answer, Exception) else None)
    assert event.fence > 0
    assert [other.verdict for other in listener.events if other is not event] == [None] * (len(then) + 1)
    if CLAIMED in then:
        assert ending_of(listener.events).body_seconds == pytest.approx(2)


async def test_a_hook_that_ends_the_program_when_a_check_has_answered_leaves_the_claim_in_doubt() -> None:
    class Ending:
        def on_event(self, event: IdempotencyEvent) -> None:
            if event.kind is EventKind.CHECKED:
                raise SystemExit

    layer = PlannedLayer()
    hang = made_idempotent(
        lambda_of(asyncio.Event().wait), other_process(layer), on_abandoned="raise", renew_lease=False
    )
    owner = asyncio.ensure_future(hang("o-1"))
    await asyncio.sleep(31)
    found = only_record(layer)
    with pytest.raises(SystemExit):
        await made_idempotent(Till().charge, layer, on_abandoned=lambda _abandoned: DidNotHappen(), hooks=(Ending(),))(
            "o-1"
        )
    await asyncio.sleep(1)
    put_back = only_record(layer)
    assert put_back.owner != found.owner
    assert put_back.lease_expiry_timestamp == found.lease_expiry_timestamp
    owner.cancel()


async def test_a_claim_that_is_lost_while_it_is_checked_is_not_reported_but_the_next_one() -> None:
    listener = await checked(DidNotHappen(), is_lost=True)
    lost = [EventKind.TAKEN_OVER, EventKind.CHECKED, EventKind.LEASE_LOST]
    assert listener.kinds == [*lost, CLAIMED, EXECUTED]
    ending_of(listener.events)


@pytest.mark.parametrize(
    ("answer", "then"),
    [
        (Happened(StoredResponse(201, [], b'{"paid": 42}')), [REPLAYED]),
        (DidNotHappen(), [CLAIMED, EXECUTED]),
        (StillUnknown(), [EventKind.CONFLICT]),
    ],
)
async def test_a_check_of_a_request_is_reported_too(answer: Any, then: list[EventKind]) -> None:
    layer, listener = PlannedLayer(), Listener()

    async def hang(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.Event().wait()

    settings = {"on_abandoned": "raise", "renew_lease": False}
    owner = asyncio.ensure_future(request(front_of(hang, layer=other_process(layer), settings=settings)))
    await asyncio.sleep(31)
    settings = {"on_abandoned": lambda _abandoned: answer, "hooks": (listener,)}
    await request(front_of(Shop(), layer=layer, settings=settings))
    assert listener.kinds == [EventKind.TAKEN_OVER, EventKind.CHECKED, *then]
    owner.cancel()


# --- How long the body ran --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["returns", "raises", "is cancelled"])
@pytest.mark.parametrize("run", [in_function, in_block, in_request])
async def test_the_seconds_of_a_body_are_without_those_in_line_and_at_the_store(run: Run, how: str) -> None:
    layer, listener = PlannedLayer(latency_seconds=2), Listener()
    config = IdempotencyConfig(hooks=(listener,), wait_timeout_seconds=60)

    async def body() -> Any:
        await asyncio.sleep(3)
        if how == "raises":
            raise ValueError("declined")

    async def wait_and_run() -> None:
        if run is in_function:
            await idempotent_function(persistence_store=layer, config=config, key_prefix="charge")(body)()
        elif run is in_block:
            async with idempotency("order", persistence_store=layer, config=config) as execution:
                execution.result = await body()
        else:
            shop = Shop()

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await body()
                await shop(scope, receive, send)

            settings = {"hooks": config.hooks, "wait_timeout_seconds": 60}
            await request(front_of(app, layer=layer, settings=settings))

    task = asyncio.ensure_future(wait_and_run())
    if how == "is cancelled":
        await asyncio.sleep(2 + 3 - 0.5)
        task.cancel()
    await asyncio.wait([task])
    ending = ending_of(listener.events)
    assert ending.body_seconds == pytest.approx(2.5 if how == "is cancelled" else 3)
    assert ending.duration_seconds < PATIENCE_SECONDS


async def test_the_seconds_of_a_body_are_without_those_of_the_execution_that_was_waited_for() -> None:
    layer, listener = PlannedLayer(), Listener()
    first = asyncio.ensure_future(made_idempotent(failing_after(10), layer)("o-1"))
    await asyncio.sleep(1)
    charge = made_idempotent(lambda_of(asyncio.sleep, 3), layer, wait_timeout_seconds=60, hooks=(listener,))
    await charge("o-1")
    assert listener.kinds == [EventKind.WAITED, CLAIMED, EXECUTED]
    assert ending_of(listener.events).body_seconds == pytest.approx(3)
    with pytest.raises(ValueError, match="declined"):
        await first


def failing_after(seconds: float) -> Any:
    async def body(order: Any) -> None:
        await asyncio.sleep(seconds)
        raise ValueError("declined")

    return body


def test_the_seconds_of_a_blocking_body_are_without_those_at_the_store() -> None:
    layer = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now, latency_seconds=1.5)
    listener = Listener()
    in_blocking_function(layer, IdempotencyConfig(hooks=(listener,)), lambda: None)
    ending = ending_of(listener.events)
    assert ending.body_seconds is not None
    assert ending.body_seconds < 1.5
    assert ending.duration_seconds >= 3
