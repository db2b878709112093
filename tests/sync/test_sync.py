"""`aidem.sync`: what blocking code gets, and which thread does what."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from aidem import DataRecord, IdempotencyConfig, RecordStatus, current_execution, sync
from aidem.config import current_lambda_context
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyConfigError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyResultUnavailableError,
    IdempotencyUsageError,
    IdempotencyValidationError,
    IdempotencyWarning,
)
from aidem.hooks import EventKind, IdempotencyEvent
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import FakeClock
from tests.support.planned import Fault, PlannedLayer, real_now
from tests.support.records import put

PATIENCE_SECONDS = 20.0


@pytest.fixture(autouse=True)
def _fresh_loop() -> Iterator[None]:
    sync.close()
    yield
    sync.close()


@pytest.fixture
def layer() -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer()


def slow_layer(**settings: Any) -> PlannedLayer:
    """A layer of coroutines whose operations can wait and fail; remembers what was asked."""
    return PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now, **settings)


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "aidem.sync"]


def wait_until(has_happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not has_happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def stored(layer: Any, key: str) -> DataRecord | None:
    return asyncio.run(_get(layer, key))


async def _get(layer: Any, key: str) -> DataRecord | None:
    record: DataRecord | None = await layer.get(key)
    return record


@dataclass
class Shop:
    """Counts what it charges."""

    charged: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def charge(self, order: Any) -> dict[str, Any]:
        self.charged.append(order)
        if self.error is not None:
            raise self.error
        return {"receipt": len(self.charged)}


@dataclass
class ThreadsSeen:
    """A hook that remembers who told it what."""

    events: list[tuple[EventKind, threading.Thread]] = field(default_factory=list)

    def on_event(self, event: IdempotencyEvent) -> None:
        self.events.append((event.kind, threading.current_thread()))

    def told_by(self, kind: EventKind) -> list[threading.Thread]:
        return [thread for told, thread in self.events if told is kind]


# --- Functions --------------------------------------------------------------------------------------------------------


def test_a_function_runs_once_and_its_first_caller_gets_what_a_replay_gets(layer: MemoryPersistenceLayer) -> None:
    runs: list[int] = []

    @sync.idempotent_function(persistence_store=layer)
    def pair(number: int) -> Any:
        """Pair a number with its successor."""
        runs.append(number)
        return number, number + 1

    assert [pair(1), pair(number=1), pair(2)] == [[1, 2], [1, 2], [2, 3]]
    assert runs == [1, 2]
    assert pair.__name__ == "pair"
    assert pair.__doc__ == "Pair a number with its successor."


def test_the_body_runs_in_the_calling_thread_and_the_layer_on_one_thread_beside_it() -> None:
    layer_threads: list[threading.Thread] = []

    class WatchedLayer(PlannedLayer):
        async def _do(self, operation: str, apply: Any) -> Any:
            layer_threads.append(threading.current_thread())
            return await super()._do(operation, apply)

    @sync.idempotent_function(persistence_store=WatchedLayer(inner=MemoryPersistenceLayer(), clock=real_now))
    def body(number: int) -> int:
        assert threading.current_thread() is threading.main_thread()
        return number

    for number in (1, 2, 1):
        body(number)
    assert len(layer_threads) == 5
    assert set(layer_threads) == set(background_threads())
    assert len(background_threads()) == 1


class Till:
    def method(self, order: str) -> str:
        return order

    decorated_method = sync.idempotent_function(method)

    @sync.idempotent_function
    @classmethod
    def class_above(cls, order: str) -> str:
        return f"{cls.__name__} {order}"

    @classmethod
    @sync.idempotent_function(key_prefix="class-below")
    def class_below(cls, order: str) -> str:
        return f"{cls.__name__} {order}"

    @sync.idempotent_function(key_prefix="static-above")
    @staticmethod
    def static_above(order: str) -> str:
        return order

    @staticmethod
    @sync.idempotent_function
    def static_below(order: str) -> str:
        return order

    def __call__(self, order: str) -> str:
        return order


def join(first: str, order: str) -> str:
    return first + order


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Till().decorated_method, "a"),
        (Till.class_above, "Till a"),
        (Till().class_below, "Till a"),
        (Till.static_above, "a"),
        (Till().static_below, "a"),
        (sync.idempotent_function(key_prefix="partial")(functools.partial(join, "an ")), "an a"),
        (sync.idempotent_function(key_prefix="object")(Till()), "a"),
    ],
    ids=["method", "class above", "class below", "static above", "static below", "partial", "object"],
)
def test_every_kind_of_callable_can_be_decorated(function: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDEM_PERSISTENCE", "memory://")
    assert [function("a"), function(order="a")] == [expected, expected]


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_a_class_or_static_method_stays_one(kind: Any) -> None:
    def charge(order: str) -> str:
        return order

    assert type(sync.idempotent_function(kind(charge))) is kind


def test_options_are_those_of_the_async_decorator(layer: MemoryPersistenceLayer) -> None:
    shop = Shop()
    by_name = sync.idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=IdempotencyConfig(event_key_jmespath="id")
    )(shop.charge)
    by_key = sync.idempotent_function(key=lambda order: order["id"], persistence_store=layer)(shop.charge)
    assert by_name({"id": 1, "note": "a"}) == by_name({"id": 1, "note": "b"}) == {"receipt": 1}
    assert by_key({"id": 2, "note": "a"}) == by_key({"id": 2, "note": "b"}) == {"receipt": 2}
    with pytest.raises(TypeError, match="event_key"):
        sync.idempotent_function(event_key="id")  # type: ignore[call-overload]


def test_the_exception_of_a_body_is_the_callers_and_the_key_is_given_back(layer: MemoryPersistenceLayer) -> None:
    shop = Shop(error=ValueError("no money"))
    charge = sync.idempotent_function(persistence_store=layer)(shop.charge)
    with pytest.raises(ValueError, match="no money") as caught:
        charge(1)
    assert caught.value is shop.error
    shop.error = None
    assert charge(1) == {"receipt": 2}


def test_a_stored_exception_is_raised_again(layer: MemoryPersistenceLayer) -> None:
    shop = Shop(error=KeyError("no money"))
    config = IdempotencyConfig(stored_exceptions=(KeyError,))
    charge = sync.idempotent_function(persistence_store=layer, config=config)(shop.charge)
    for _ in range(2):
        with pytest.raises(KeyError, match="no money"):
            charge(1)
    assert shop.charged == [1]


def test_a_result_that_cannot_be_stored_is_returned_once(layer: MemoryPersistenceLayer) -> None:
    result = object()

    @sync.idempotent_function(persistence_store=layer)
    def make() -> object:
        return result

    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert make() is result
    with pytest.raises(IdempotencyResultUnavailableError):
        make()


@pytest.mark.parametrize("outcome", ["result", "exception"])
def test_who_lost_its_claim_gets_the_outcome_of_the_winner(outcome: str) -> None:
    layer = slow_layer()
    config = IdempotencyConfig(stored_exceptions=(ValueError,))

    def charge() -> str:
        if current_execution().fence == fences.setdefault("first", current_execution().fence):
            asyncio.run(layer.forget(current_execution().key))
            assert decorated() == "the winner's"
            if outcome == "exception":
                raise ValueError("the loser's")
            return "the loser's"
        return "the winner's"

    fences: dict[str, int] = {}
    decorated = sync.idempotent_function(persistence_store=layer, config=config)(charge)
    assert decorated() == "the winner's"


def test_a_running_call_is_a_conflict_for_others(layer: MemoryPersistenceLayer) -> None:
    @sync.idempotent_function(persistence_store=layer)
    def charge() -> None:
        with pytest.raises(IdempotencyAlreadyInProgressError):
            charge()

    charge()


def test_calls_can_be_nested_on_one_layer(layer: MemoryPersistenceLayer) -> None:
    @sync.idempotent_function(persistence_store=layer)
    def inner(number: int) -> list[Any]:
        return [number, current_execution().key]

    @sync.idempotent_function(persistence_store=layer)
    def outer(number: int) -> list[Any]:
        found = inner(number)
        return [found, current_execution().key]

    (number, inner_key), outer_key = outer(1)
    assert number == 1
    assert inner_key != outer_key
    assert outer(1) == [inner(1), outer_key]
    with pytest.raises(IdempotencyUsageError):
        current_execution()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_many_threads_on_one_layer_run_each_key_once(kind: str, tmp_path: Any) -> None:
    layer = MemoryPersistenceLayer() if kind == "memory" else SQLitePersistenceLayer(tmp_path / "records.db")
    shop = Shop()
    config = IdempotencyConfig(wait_timeout_seconds=PATIENCE_SECONDS)

    @sync.idempotent_function(persistence_store=layer, config=config, output_serializer=None)
    def charge(order: int) -> int:
        shop.charged.append(order)
        return order

    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append([charge(order) for order in range(25)])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert results == [list(range(25))] * 8
    assert sorted(shop.charged) == list(range(25))


# --- Handlers ---------------------------------------------------------------------------------------------------------


@dataclass
class LambdaContext:
    remaining_seconds: float = 10.0

    def get_remaining_time_in_millis(self) -> int:
        return int(self.remaining_seconds * 1000)


def test_a_handler_is_keyed_by_its_event_and_leased_for_its_invocation() -> None:
    clock = FakeClock()
    layer = MemoryPersistenceLayer(clock=clock)
    seen: list[Any] = []

    @sync.idempotent(persistence_store=layer)
    def handler(event: dict[str, str], context: LambdaContext, *, tenant: str = "") -> str:
        record = current_execution().record
        assert record is not None
        seen.append((record.in_progress_expiry_timestamp, current_lambda_context(IdempotencyConfig())))
        return event["id"] + tenant

    context = LambdaContext(7.0)
    now = clock()
    assert handler({"id": "a"}, context, tenant="b") == handler({"id": "a"}, LambdaContext(), tenant="c") == "ab"
    assert seen == [(int(now * 1000) + 7000, context)]
    assert current_lambda_context(IdempotencyConfig()) is None


def test_a_handler_can_be_decorated_bare_and_called_without_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDEM_PERSISTENCE", "memory://")

    @sync.idempotent
    def handler(event: str, context: None) -> str:
        return event

    assert [handler("a", None), handler("a", None)] == ["a", "a"]


def test_a_durable_function_that_replays_takes_the_claim_of_its_earlier_attempt(layer: MemoryPersistenceLayer) -> None:
    @sync.idempotent(persistence_store=layer)
    def handler(event: str, context: Any) -> str:
        if len(context.state.operations) == 1:
            retry = SimpleNamespace(state=SimpleNamespace(operations=[1, 2]), lambda_context=LambdaContext())
            with pytest.raises(IdempotencyAlreadyInProgressError):
                handler(event, context)
            return "first, " + handler(event, retry)
        assert isinstance(current_lambda_context(IdempotencyConfig()), LambdaContext)
        return "second"

    first = SimpleNamespace(state=SimpleNamespace(operations=[1]), lambda_context=LambdaContext())
    assert handler("a", first) == "second"


# --- What is refused --------------------------------------------------------------------------------------------------


async def async_function(order: int) -> int:
    return order


async def async_handler(event: Any, context: Any) -> None: ...


def generator(order: int) -> Iterator[int]:
    yield order


async def async_generator(order: int) -> AsyncIterator[int]:
    yield order


@pytest.mark.parametrize(
    ("decorator", "function", "says"),
    [
        (sync.idempotent_function, async_function, "aidem.idempotent_function"),
        (sync.idempotent, async_handler, "aidem.idempotent "),
        (sync.idempotent_function, generator, "generator"),
        (sync.idempotent_function, async_generator, "generator"),
        (sync.idempotent, lambda event: event, "key_prefix"),
        (sync.idempotent, Shop().charge, "idempotent_function"),
    ],
)
def test_what_cannot_be_decorated_is_refused_at_once(decorator: Any, function: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        decorator(function)


@pytest.mark.filterwarnings("error")
def test_a_function_that_returns_a_coroutine_is_refused_and_its_key_given_back(layer: MemoryPersistenceLayer) -> None:
    config = IdempotencyConfig(stored_exceptions=())

    @sync.idempotent_function(persistence_store=layer, config=config)
    def start(order: int) -> Coroutine[Any, Any, int]:
        keys.append(current_execution().key)
        return async_function(order)

    keys: list[str] = []
    with pytest.raises(TypeError, match="returned a coroutine"):
        _ = start(1)
    assert stored(layer, keys[0]) is None


@pytest.mark.parametrize("front", ["function", "handler", "block", "close"])
async def test_a_thread_that_runs_an_event_loop_is_refused_before_anything_is_asked(front: str) -> None:
    layer = slow_layer()
    shop = Shop()
    fronts: dict[str, tuple[Callable[[], Any], str]] = {
        "function": (
            lambda: sync.idempotent_function(persistence_store=layer)(shop.charge)(1),
            r"decorate it with aidem\.idempotent_function",
        ),
        "handler": (
            lambda: sync.idempotent(persistence_store=layer)(lambda_handler)({}, None),
            r"decorate it with aidem\.idempotent$",
        ),
        "block": (
            lambda: sync.idempotency("a", persistence_store=layer).__enter__(),
            r"`async with aidem\.idempotency\(\.\.\.\)`",
        ),
        "close": (sync.close, r"asyncio\.to_thread\(sync\.close\)"),
    }
    call, says = fronts[front]
    with pytest.raises(IdempotencyUsageError, match=says):
        call()
    assert layer.calls == []
    assert shop.charged == []
    assert background_threads() == []


def lambda_handler(event: Any, context: Any) -> None:
    raise AssertionError("not to be run")


async def test_a_thread_beside_an_event_loop_is_welcome(layer: MemoryPersistenceLayer) -> None:
    charge = sync.idempotent_function(persistence_store=layer)(Shop().charge)
    assert await asyncio.to_thread(charge, 1) == await asyncio.to_thread(charge, 1) == {"receipt": 1}
    await asyncio.to_thread(sync.close)


# --- Context variables ------------------------------------------------------------------------------------------------

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


def test_body_and_layer_see_the_callers_context_and_the_body_may_change_it() -> None:
    seen: list[str] = []

    class TenantLayer(PlannedLayer):
        async def _do(self, operation: str, apply: Any) -> Any:
            seen.append(f"{operation} for {tenant.get()}")
            return await super()._do(operation, apply)

    @sync.idempotent_function(persistence_store=TenantLayer(inner=MemoryPersistenceLayer(), clock=real_now))
    def body() -> str:
        found = tenant.get()
        tenant.set("b")
        return found

    token = tenant.set("a")
    try:
        assert body() == "a"
        assert tenant.get() == "b"
    finally:
        tenant.reset(token)
    assert seen == ["acquire for a", "complete for b"]


# --- Blocks -----------------------------------------------------------------------------------------------------------


def test_a_block_runs_once_and_replays(layer: MemoryPersistenceLayer) -> None:
    shop = Shop()
    for replayed in (False, True):
        with sync.idempotency("a", persistence_store=layer) as execution:
            assert execution.replayed is replayed
            assert execution.run(shop.charge, 1) == {"receipt": 1}
            assert execution.key
            assert execution.key_for("charge")
            assert execution.fence > 0
            assert execution.record is not None
        assert execution.result == {"receipt": 1}
    assert shop.charged == [1]


def test_a_block_can_go_step_by_step(layer: MemoryPersistenceLayer) -> None:
    results = []
    for number in (1, 2):
        with sync.idempotency("a", payload={"b": 1}, persistence_store=layer) as execution:
            if not execution.replayed:
                assert current_execution() is execution
                execution.ensure_owned()
                execution.result = (number,)
        results.append(execution.result)
    assert results == [[1], [1]]
    with pytest.raises(IdempotencyValidationError), sync.idempotency("a", payload=2, persistence_store=layer):
        raise AssertionError("not to be entered")


def test_a_block_that_fails_gives_its_key_back(layer: MemoryPersistenceLayer) -> None:
    with pytest.raises(ValueError, match="no money"), sync.idempotency("a", persistence_store=layer) as execution:
        execution.run(Shop(error=ValueError("no money")).charge, 1)
    with sync.idempotency("a", persistence_store=layer) as execution:
        assert not execution.replayed
        execution.result = 1


def test_a_block_that_looks_at_nothing_is_refused(layer: MemoryPersistenceLayer) -> None:
    with pytest.raises(IdempotencyUsageError, match="never asked"), sync.idempotency("a", persistence_store=layer):
        pass


def test_a_block_can_be_entered_once(layer: MemoryPersistenceLayer) -> None:
    block = sync.idempotency("a", persistence_store=layer)
    with block as execution:
        execution.run(Shop().charge, 1)
    with pytest.raises(IdempotencyUsageError, match="entered before"), block:
        raise AssertionError("not to be entered")


def complete_for_another(layer: MemoryPersistenceLayer, response_data: str) -> None:
    """Let another owner take the only claim over, and complete it."""
    (record,) = layer.records().values()
    winner = record.replace(owner="winner")
    put(layer, winner)
    completed = winner.replace(status=RecordStatus.COMPLETED, response_data=response_data)
    assert layer.complete(completed, now=layer.clock()).answer


def test_a_block_that_lost_its_claim_has_the_winners_result(layer: MemoryPersistenceLayer) -> None:
    with sync.idempotency("a", persistence_store=layer) as execution:
        assert not execution.replayed
        execution.result = Shop().charge(1)
        complete_for_another(layer, '"the winner\'s"')
    assert execution.result == "the winner's"


def test_a_block_that_handed_out_another_result_than_the_winners_raises(layer: MemoryPersistenceLayer) -> None:
    with (
        pytest.raises(IdempotencyLeaseLostError, match="has another outcome"),
        sync.idempotency("a", persistence_store=layer) as execution,
    ):
        execution.run(Shop().charge, 1)
        complete_for_another(layer, '"the winner\'s"')


def test_a_block_whose_stored_exception_does_not_count_says_that_another_outcome_does(
    layer: MemoryPersistenceLayer,
) -> None:
    config = IdempotencyConfig(stored_exceptions=(LookupError,))
    with (
        pytest.raises(IdempotencyLeaseLostError, match="has another outcome") as caught,
        sync.idempotency("a", persistence_store=layer, config=config) as execution,
    ):
        assert not execution.replayed
        complete_for_another(layer, '"the winner\'s"')
        raise LookupError("o-1")
    assert isinstance(caught.value.__cause__, LookupError)


def test_run_calls_no_async_function(layer: MemoryPersistenceLayer) -> None:
    async def waits() -> None:
        await asyncio.Future()

    class Waiter:
        def __await__(self) -> Any:
            yield

    def returns_an_awaitable() -> Any:
        return Waiter()

    for function, says in ((waits, "async with aidem.idempotency"), (returns_an_awaitable, "awaits")):
        with (
            pytest.raises(TypeError, match=says),
            sync.idempotency("a", persistence_store=layer) as execution,
        ):
            execution.run(function)
    with sync.idempotency("a", persistence_store=layer) as execution:
        assert not execution.replayed


def test_run_lets_every_exception_pass_unchanged(layer: MemoryPersistenceLayer) -> None:
    def stops() -> None:
        next(iter(()))

    def breaks() -> None:
        raise RuntimeError("broken") from StopIteration()

    with pytest.raises(StopIteration), sync.idempotency("a", persistence_store=layer) as execution:
        execution.run(stops)
    with pytest.raises(RuntimeError, match="broken"), sync.idempotency("a", persistence_store=layer) as execution:
        execution.run(breaks)


def test_a_claim_that_was_lost_is_found_out_by_asking(layer: MemoryPersistenceLayer) -> None:
    @sync.idempotent_function(persistence_store=layer)
    def charge() -> None:
        execution = current_execution()
        assert isinstance(execution, sync.Execution)
        execution.ensure_owned()
        asyncio.run(_forget(layer, execution.key))
        execution.ensure_owned()

    with pytest.raises(IdempotencyLeaseLostError):
        charge()


async def _forget(layer: Any, key: str) -> None:
    await layer.forget(key)


# --- Which thread calls what ------------------------------------------------------------------------------------------


def test_serializers_key_functions_and_hooks_run_in_the_calling_thread(layer: MemoryPersistenceLayer) -> None:
    calling: list[threading.Thread] = []

    def note(value: Any, *_: Any) -> Any:
        calling.append(threading.current_thread())
        return value

    serializer = SimpleNamespace(to_dict=note, from_dict=note)
    hook = ThreadsSeen()
    config = IdempotencyConfig(hooks=(hook,), response_hook=note)

    @sync.idempotent_function(
        key=lambda **arguments: note(arguments), persistence_store=layer, config=config, output_serializer=serializer
    )
    def charge(order: int) -> int:
        return order

    def work() -> None:
        assert [charge(1), charge(1)] == [1, 1]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert len(calling) == 6  # twice the key; to and from the text; from the text and through the response hook
    kinds = (EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED)
    assert hook.events == [(kind, thread) for kind in kinds]
    assert set(calling) == {thread}


def test_hooks_are_told_of_conflicts_before_the_caller_is(layer: MemoryPersistenceLayer) -> None:
    hook = ThreadsSeen()

    @sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(hooks=(hook,)))
    def charge() -> None:
        with pytest.raises(IdempotencyAlreadyInProgressError):
            charge()
        assert hook.events == [(kind, threading.main_thread()) for kind in (EventKind.CLAIMED, EventKind.CONFLICT)]

    charge()


def test_a_lease_that_is_lost_while_the_body_blocks_is_told_at_once_by_the_background_thread() -> None:
    layer = slow_layer()
    hook = ThreadsSeen()
    config = IdempotencyConfig(hooks=(hook,), lease_seconds=1.0)

    @sync.idempotent_function(persistence_store=layer, config=config)
    def charge() -> int:
        asyncio.run(layer.forget(current_execution().key))
        wait_until(lambda: hook.told_by(EventKind.LEASE_LOST))
        return 1

    assert charge() == 1  # no record is there, so the outcome is stored
    assert hook.told_by(EventKind.LEASE_LOST) == background_threads()
    assert hook.told_by(EventKind.EXECUTED) == [threading.main_thread()]


def test_an_async_response_hook_is_awaited_on_the_background_loop(layer: MemoryPersistenceLayer) -> None:
    seen: list[Any] = []

    async def hook(response: Any, record: DataRecord) -> Any:
        await asyncio.sleep(0)
        seen.append((threading.current_thread(), tenant.get()))
        return {"replayed": response}

    config = IdempotencyConfig(response_hook=hook)
    charge = sync.idempotent_function(persistence_store=layer, config=config)(Shop().charge)
    token = tenant.set("a")
    try:
        assert [charge(1), charge(1)] == [{"receipt": 1}, {"replayed": {"receipt": 1}}]
    finally:
        tenant.reset(token)
    with sync.idempotency("a", persistence_store=layer, config=config) as execution:
        assert execution.run(Shop().charge, 1) == {"receipt": 1}
    with sync.idempotency("a", persistence_store=layer, config=config) as execution:
        assert execution.result == {"replayed": {"receipt": 1}}
    assert seen == [(background_threads()[0], "a"), (background_threads()[0], "nobody")]


def test_what_an_async_response_hook_raises_is_the_callers(layer: MemoryPersistenceLayer) -> None:
    async def hook(response: Any, record: DataRecord) -> Any:
        raise SystemExit(3)

    charge = sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(response_hook=hook))(
        Shop().charge
    )
    charge(1)
    with pytest.raises(SystemExit):
        charge(1)
    assert charge(2) == {"receipt": 2}


# --- Without the background loop --------------------------------------------------------------------------------------


def test_a_replay_from_the_local_cache_needs_no_background_loop(layer: MemoryPersistenceLayer) -> None:
    hook = ThreadsSeen()
    config = IdempotencyConfig(
        use_local_cache=True, hooks=(hook,), event_key_jmespath="id", payload_validation_jmespath="sum"
    )
    charge = sync.idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config)(
        Shop().charge
    )
    assert charge({"id": 1, "sum": 1}) == {"receipt": 1}
    sync.close()
    assert charge({"id": 1, "sum": 1}) == {"receipt": 1}
    assert background_threads() == []
    with pytest.raises(IdempotencyValidationError):
        charge({"id": 1, "sum": 2})
    kinds = (EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED, EventKind.CONFLICT)
    assert hook.events == [(kind, threading.main_thread()) for kind in kinds]


def test_a_call_that_is_switched_off_needs_no_background_loop(
    layer: MemoryPersistenceLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "1")

    @sync.idempotent_function(persistence_store=layer)
    def charge(order: int) -> int:
        execution = current_execution()
        assert isinstance(execution, sync.Execution)
        execution.ensure_owned()
        return order

    with pytest.warns(IdempotencyWarning, match="AIDEM_IDEMPOTENCY_DISABLED"):
        assert charge(1) == 1
    with (
        pytest.warns(IdempotencyWarning, match="AIDEM_IDEMPOTENCY_DISABLED"),
        sync.idempotency("a", persistence_store=layer) as execution,
    ):
        assert execution.run(Shop().charge, 1) == {"receipt": 1}
    assert background_threads() == []


# --- Leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_while_the_body_blocks() -> None:
    layer = slow_layer()

    @sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(lease_seconds=1.0))
    def charge() -> int:
        wait_until(lambda: layer.calls.count("renew") >= 3)
        return 1

    assert charge() == 1
    calls = list(layer.calls)
    assert calls[0] == "acquire"
    assert calls[-1] == "complete"


def test_renewal_ends_when_the_thread_of_the_body_is_dead() -> None:
    layer = slow_layer()
    config = IdempotencyConfig(lease_seconds=1.0)
    block = sync.idempotency("a", persistence_store=layer, config=config)
    left = threading.Event()

    def enter_and_never_leave() -> None:
        block.__enter__()
        wait_until(lambda: layer.calls.count("renew") >= 2)
        left.set()

    thread = threading.Thread(target=enter_and_never_leave)
    thread.start()
    assert left.wait(PATIENCE_SECONDS)
    thread.join(PATIENCE_SECONDS)
    patient = IdempotencyConfig(wait_timeout_seconds=PATIENCE_SECONDS)
    with sync.idempotency("a", persistence_store=layer, config=patient) as execution:
        assert not execution.replayed
        execution.result = 1


# --- The background loop ----------------------------------------------------------------------------------------------


def test_the_loop_can_be_closed_at_any_time_and_is_started_anew(layer: MemoryPersistenceLayer) -> None:
    sync.close()
    charge = sync.idempotent_function(persistence_store=layer)(Shop().charge)
    assert charge(1) == {"receipt": 1}
    first = background_threads()
    sync.close()
    sync.close()
    assert background_threads() == []
    assert charge(1) == {"receipt": 1}
    assert charge(2) == {"receipt": 2}
    assert len(first) == len(background_threads()) == 1
    assert first != background_threads()


def test_a_body_over_which_the_loop_is_closed_completes() -> None:
    layer = slow_layer()

    @sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(lease_seconds=1.0))
    def charge() -> int:
        wait_until(lambda: "renew" in layer.calls)
        sync.close()
        return 1

    assert charge() == charge() == 1


def test_closing_lets_the_calls_that_wait_for_their_layer_end() -> None:
    layer = slow_layer().plan("acquire", Fault(after_seconds=0.3))
    charge = sync.idempotent_function(persistence_store=layer)(Shop().charge)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(charge(1)))
    thread.start()
    wait_until(lambda: layer.calls)
    sync.close()
    thread.join(PATIENCE_SECONDS)
    assert results == [{"receipt": 1}]


def test_a_call_that_waits_for_too_long_is_told_that_the_loop_was_closed(layer: MemoryPersistenceLayer) -> None:
    others = PlannedLayer(inner=layer, clock=real_now)
    config = IdempotencyConfig(wait_timeout_seconds=3600.0)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            with sync.idempotency("a", persistence_store=others, config=config):
                errors.append(AssertionError("not to be entered"))
        except IdempotencyUsageError as error:
            errors.append(error)

    with sync.idempotency("a", persistence_store=layer) as execution:
        assert not execution.replayed
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: others.calls)
        sync.close()
        thread.join(PATIENCE_SECONDS)
    assert "aidem.sync was closed" in str(errors[0])
    assert "the function was not run" in str(errors[0])


def test_a_call_over_which_the_loop_is_closed_is_told_whether_its_body_has_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Fault(before_seconds=3600)  # longer than closing waits before it cancels
    completing, failing = slow_layer().plan("complete", slow), slow_layer().plan("complete", slow)
    config = IdempotencyConfig(stored_exceptions=(LookupError,))
    declined = LookupError("declined")
    errors: dict[str, BaseException] = {}

    def call(name: str, layer: Any, error: Exception | None = None) -> None:
        @sync.idempotent_function(persistence_store=layer, config=config, key_prefix=name)
        def charge() -> int:
            if error is not None:
                raise error
            return 1

        try:
            charge()
        except Exception as caught:  # noqa: BLE001 - which one it is, is what the test is about
            errors[name] = caught

    threads = [
        threading.Thread(target=call, args=("completes", completing)),
        threading.Thread(target=call, args=("fails", failing, declined)),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: "complete" in completing.calls and "complete" in failing.calls)
    sync.close()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert isinstance(errors["completes"], IdempotencyUsageError)
    assert "aidem.sync was closed" in str(errors["completes"])
    assert "its effect has happened" in str(errors["completes"])
    assert errors["fails"] is declined  # the body's own exception goes first
    assert "aidem.sync was closed" in declined.__notes__[0]
    assert "aidem.sync was closed" in caplog.text


class OpenedLayer(PlannedLayer):
    """Takes note of the thread that opens it; some cannot be opened."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(inner=MemoryPersistenceLayer(), clock=real_now)
        self.error = error
        self.opened_by: list[str] = []

    async def open(self) -> None:
        self.opened_by.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error


def test_layers_can_be_opened_before_the_first_call(caplog: pytest.LogCaptureFixture) -> None:
    layers = OpenedLayer(), OpenedLayer(IdempotencyPersistenceConnectionError("the store is down"))
    sync.warm(*layers)
    assert [layer.opened_by for layer in layers] == [["aidem.sync"], ["aidem.sync"]]
    assert "OpenedLayer could not be opened yet" in caplog.text
    assert "the store is down" in caplog.text
    assert sync.idempotent_function(persistence_store=layers[1], key_prefix="charge")(lambda: 1)() == 1


def test_only_layers_can_be_opened_before_the_first_call() -> None:
    opened = OpenedLayer()
    with pytest.raises(IdempotencyConfigError, match=r"a list of persistence layers; <str> in it must be .*open_per"):
        sync.warm(opened, "redis://localhost")  # type: ignore[arg-type]
    assert not opened.opened_by


async def test_a_thread_that_runs_an_event_loop_cannot_open_layers() -> None:
    opened = OpenedLayer()
    with pytest.raises(IdempotencyUsageError, match=r"asyncio\.to_thread"):
        sync.warm(opened)
    assert not opened.opened_by
    await asyncio.to_thread(sync.warm, opened)
    assert opened.opened_by == ["aidem.sync"]


def test_closing_closes_clients_that_a_layer_keeps_in_async_generators() -> None:
    closed_by: list[threading.Thread] = []

    class ClientLayer(PlannedLayer):
        client: Any = None

        async def _connect(self) -> AsyncIterator[None]:
            try:
                yield
            finally:
                await asyncio.sleep(0)
                closed_by.append(threading.current_thread())

        async def _do(self, operation: str, apply: Any) -> Any:
            if self.client is None:
                self.client = self._connect()
                await anext(self.client)
            return await super()._do(operation, apply)

    layer = ClientLayer(inner=MemoryPersistenceLayer(), clock=real_now)
    sync.idempotent_function(persistence_store=layer)(Shop().charge)(1)
    threads = background_threads()
    assert closed_by == []
    sync.close()
    assert closed_by == threads


def test_a_layer_that_raises_system_exit_does_not_stop_the_loop() -> None:
    layer = slow_layer()
    layer.plan("acquire", Fault(error=SystemExit(3)))  # type: ignore[arg-type]
    charge = sync.idempotent_function(persistence_store=layer)(Shop().charge)
    with pytest.raises(SystemExit):
        charge(1)
    threads = background_threads()
    assert charge(2) == {"receipt": 1}
    assert background_threads() == threads


def test_a_block_that_was_never_left_gives_its_key_back_when_it_is_dropped(layer: MemoryPersistenceLayer) -> None:
    sync.idempotency("a", persistence_store=layer).__enter__()
    with sync.idempotency("a", persistence_store=layer) as execution:
        assert not execution.replayed


def test_a_block_that_is_dropped_after_the_loop_was_closed_starts_none(layer: MemoryPersistenceLayer) -> None:
    block = sync.idempotency("a", persistence_store=layer)
    block.__enter__()
    sync.close()
    del block
    assert background_threads() == []


def test_closing_lets_a_key_be_given_back_for_which_nobody_waits(layer: MemoryPersistenceLayer) -> None:
    slow = PlannedLayer(inner=layer, clock=real_now).plan("release", Fault(before_seconds=0.2))

    def steps() -> Generator[int]:
        with sync.idempotency("a", persistence_store=slow):
            yield 1

    running = steps()
    next(running)
    running.close()
    sync.close()
    assert slow.calls == ["acquire", "release"]
    with sync.idempotency("a", persistence_store=layer) as execution:
        assert not execution.replayed
