"""`idempotent` and `idempotent_function`: what they decorate, what survives, what a call runs and replays."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Header
from pydantic import BaseModel

import aidem
from aidem import (
    IdempotencyConfig,
    RecordStatus,
    _checks,
    configure,
    current_execution,
    idempotency,
    idempotent,
    idempotent_function,
    sync,
)
from aidem.config import current_lambda_context
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyConfigError,
    IdempotencyError,
    IdempotencyLeaseLostError,
    IdempotencyUsageError,
    IdempotencyValidationError,
)
from aidem.persistence import PersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock
from tests.support.records import put

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aidem import DataRecord


@dataclass
class LambdaContext:
    """What Lambda hands to a handler, as far as aidem reads it."""

    remaining_seconds: float = 10.0

    def get_remaining_time_in_millis(self) -> int:
        return int(self.remaining_seconds * 1000)


@dataclass
class DurableContext:
    """What a durable function gets: the real context, and the operations recorded so far."""

    lambda_context: LambdaContext = field(default_factory=LambdaContext)
    operations: int = 1

    @property
    def state(self) -> Any:
        return SimpleNamespace(operations=dict.fromkeys(range(self.operations)))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def layer(clock: FakeClock) -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer(clock=clock)


@pytest.fixture(autouse=True)
def defaults(layer: MemoryPersistenceLayer) -> Iterator[None]:
    configure(persistence_store=layer)
    yield
    configure()


def stored(layer: MemoryPersistenceLayer) -> list[DataRecord]:
    return list(layer.records().values())


# --- idempotent -------------------------------------------------------------------------------------------------------


async def test_a_handler_runs_once_per_event() -> None:
    events: list[Any] = []

    @idempotent
    async def handler(event: dict[str, Any], context: object) -> int:
        events.append(event)
        return len(events)

    assert [await handler({"id": 1}, None), await handler({"id": 1}, None), await handler({"id": 2}, None)] == [1, 1, 2]
    assert events == [{"id": 1}, {"id": 2}]


async def test_a_handler_may_be_called_by_keyword_and_gets_its_extra_arguments() -> None:
    @idempotent()
    async def handler(event: Any, context: object, *more: str, tenant: str = "none") -> list[str]:
        return [*more, tenant]

    assert await handler(event=1, context=None, tenant="a") == ["a"]  # type: ignore[call-arg]
    assert await handler(2, None, "b", tenant="c") == ["b", "c"]


async def test_extra_arguments_are_not_part_of_the_key_of_an_event() -> None:
    @idempotent()
    async def handler(event: Any, context: object, *, tenant: str) -> str:
        return tenant

    assert await handler({"id": 1}, None, tenant="a") == "a"
    assert await handler({"id": 1}, None, tenant="b") == "a"


async def test_a_handler_that_mutates_its_event_cannot_change_its_key(layer: MemoryPersistenceLayer) -> None:
    runs = 0

    @idempotent(config=IdempotencyConfig(payload_validation_jmespath="amount"))
    async def handler(event: dict[str, Any], context: object) -> int:
        nonlocal runs
        runs += 1
        event["amount"] = 0
        event["seen"] = True
        return runs

    assert await handler({"id": 1, "amount": 5}, None) == 1
    assert await handler({"id": 1, "amount": 5}, None) == 1
    assert len(stored(layer)) == 1


async def test_the_options_of_a_handler_are_used(clock: FakeClock) -> None:
    mine = MemoryPersistenceLayer(clock=clock)
    config = IdempotencyConfig(event_key_jmespath="id", expires_after_seconds=5)

    @idempotent(persistence_store=mine, config=config, key_prefix="mine")
    async def handler(event: Any, context: object) -> None: ...

    await handler({"id": 1, "at": 1}, None)
    await handler({"id": 1, "at": 2}, None)
    (record,) = stored(mine)
    assert record.idempotency_key.startswith("mine#")
    assert record.expiry_timestamp == int(clock() + 5)


async def test_the_lambda_context_sets_the_lease_of_the_call_and_is_forgotten_after_it(
    layer: MemoryPersistenceLayer, clock: FakeClock
) -> None:
    config = IdempotencyConfig(lease_seconds=500)
    leases: list[float] = []

    @idempotent(config=config)
    async def handler(event: Any, context: object) -> None:
        (record,) = [record for record in stored(layer) if record.response_data is None]
        assert record.in_progress_expiry_timestamp is not None
        leases.append(record.in_progress_expiry_timestamp / 1000 - clock())

    await handler(1, LambdaContext(remaining_seconds=10))
    await handler(2, None)
    await handler(3, LambdaContext(remaining_seconds=0.1))
    assert leases == pytest.approx([10, 500, 1])
    assert current_lambda_context(config) is None


async def test_the_lambda_context_is_forgotten_after_a_failure_and_the_one_before_is_restored() -> None:
    outer, inner = LambdaContext(), LambdaContext()
    config = IdempotencyConfig()
    seen: list[object] = []

    @idempotent(config=config, key_prefix="inner")
    async def failing(event: Any, context: object) -> None:
        seen.append(current_lambda_context(config))
        raise LookupError

    @idempotent(config=config)
    async def handler(event: Any, context: object) -> None:
        with contextlib.suppress(LookupError):
            await failing(event, inner)
        seen.append(current_lambda_context(config))

    await handler(1, outer)
    assert seen == [inner, outer]
    assert seen[0] is inner
    assert seen[1] is outer
    assert current_lambda_context(config) is None


async def test_two_invocations_at_a_time_have_each_their_own_lambda_context() -> None:
    config = IdempotencyConfig()
    seen: dict[int, object] = {}

    @idempotent(config=config)
    async def handler(event: int, context: object) -> None:
        await asyncio.sleep(0)
        seen[event] = current_lambda_context(config)

    contexts = [LambdaContext() for _ in range(3)]
    await asyncio.gather(*(handler(event, context) for event, context in enumerate(contexts)))
    assert all(seen[event] is context for event, context in enumerate(contexts))


def test_a_handler_that_is_closed_from_another_context_ends_without_an_error_of_ours() -> None:
    closed: list[str] = []

    @idempotent
    async def handler(event: Any, context: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closed.append("body")

    async def main() -> None:
        coroutine = handler(1, LambdaContext())
        contextvars.copy_context().run(coroutine.send, None)
        coroutine.close()

    asyncio.run(main())
    assert closed == ["body"]


async def test_of_a_durable_context_the_inner_one_is_registered() -> None:
    config = IdempotencyConfig()
    context = DurableContext()

    @idempotent(config=config)
    async def handler(event: Any, context: object) -> bool:
        return current_lambda_context(config) is context.lambda_context  # type: ignore[attr-defined]

    assert await handler(1, context)


async def test_a_durable_context_without_a_lambda_context_inside_registers_nothing() -> None:
    config = IdempotencyConfig()

    @idempotent(config=config)
    async def handler(event: Any, context: object) -> bool:
        return current_lambda_context(config) is None

    assert await handler(1, SimpleNamespace(state=SimpleNamespace(), lambda_context=object()))


def durable_handler(gate: asyncio.Event, runs: list[Any]) -> Any:
    @idempotent(config=IdempotencyConfig(event_key_jmespath="id"), key_prefix="durable")
    async def handler(event: Any, context: object) -> Any:
        runs.append(event["attempt"])
        await gate.wait()
        return event["attempt"]

    return handler


async def started(call: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.ensure_future(call)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def test_a_durable_replay_takes_the_claim_over_and_the_superseded_attempt_does_not_count() -> None:
    gate, runs = asyncio.Event(), list[Any]()
    handler = durable_handler(gate, runs)
    first = await started(handler({"id": 1, "attempt": "first"}, DurableContext(operations=1)))
    with pytest.raises(IdempotencyAlreadyInProgressError):  # no replay: its only operation is the first
        await handler({"id": 1, "attempt": "other"}, DurableContext(operations=1))
    replay = await started(handler({"id": 1, "attempt": "replay"}, DurableContext(operations=2)))
    gate.set()
    with pytest.raises(IdempotencyLeaseLostError):
        await first
    assert await replay == "replay"
    assert await handler({"id": 1, "attempt": "late"}, None) == "replay"
    assert runs == ["first", "replay"]


async def test_two_durable_replays_at_the_same_instant_are_one_execution(clock: FakeClock) -> None:
    """Both have found the first attempt before either has released it."""
    gate, runs = asyncio.Event(), list[Any]()
    handler = durable_handler(gate, runs)
    layer = Rendezvous(clock=clock)
    configure(persistence_store=layer)
    first = await started(handler({"id": 1, "attempt": "first"}, DurableContext(operations=1)))
    layer.barrier = asyncio.Barrier(2)
    replays = [
        await started(handler({"id": 1, "attempt": number}, DurableContext(operations=2))) for number in range(2)
    ]
    gate.set()
    results = await asyncio.gather(*replays, return_exceptions=True)
    assert sorted(map(type, results), key=repr) == sorted([int, IdempotencyAlreadyInProgressError], key=repr)
    assert len(runs) == 2
    with pytest.raises(IdempotencyLeaseLostError):
        await first


class Rendezvous(MemoryPersistenceLayer):
    """A layer on which two calls meet before either release is applied."""

    barrier: asyncio.Barrier | None = None

    def release(self, record: DataRecord) -> Any:
        return self._release(record)

    async def _release(self, record: DataRecord) -> bool:
        if self.barrier is not None:
            await self.barrier.wait()
        return await super().release(record)


async def test_a_durable_replay_does_not_take_a_record_without_an_owner(
    layer: MemoryPersistenceLayer,
) -> None:
    gate, runs = asyncio.Event(), list[Any]()
    handler = durable_handler(gate, runs)
    first = await started(handler({"id": 1, "attempt": "first"}, DurableContext(operations=1)))
    (record,) = stored(layer)
    foreign = record.replace(owner=None)
    put(layer, foreign)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await handler({"id": 1, "attempt": "replay"}, DurableContext(operations=2))
    assert stored(layer) == [foreign]
    assert runs == ["first"]
    first.cancel()


async def test_a_durable_replay_of_a_completed_execution_gets_its_result() -> None:
    gate, runs = asyncio.Event(), list[Any]()
    gate.set()
    handler = durable_handler(gate, runs)
    assert await handler({"id": 1, "attempt": "first"}, DurableContext(operations=1)) == "first"
    assert await handler({"id": 1, "attempt": "replay"}, DurableContext(operations=2)) == "first"


# --- idempotent_function: what it decorates ---------------------------------------------------------------------------


class Shop:
    """Async callables of every kind."""

    def __init__(self) -> None:
        self.runs = 0

    @idempotent_function
    async def method(self, order: int) -> list[int]:
        """Charge."""
        self.runs += 1
        return [order, self.runs]

    @idempotent_function(data_keyword_argument="order")
    async def named(self, order: int) -> list[int]:
        self.runs += 1
        return [order, self.runs]

    class_runs = 0

    @classmethod
    @idempotent_function
    async def class_below(cls, order: int) -> list[int]:
        cls.class_runs += 1
        return [order, cls.class_runs]

    @idempotent_function(key_prefix="class_above")
    @classmethod
    async def class_above(cls, order: int) -> list[int]:
        cls.class_runs += 1
        return [order, cls.class_runs]

    @staticmethod
    @idempotent_function
    async def static_below(order: int) -> list[int]:
        Shop.class_runs += 1
        return [order, Shop.class_runs]

    @idempotent_function(data_keyword_argument="order")
    @staticmethod
    async def static_above(order: int) -> list[int]:
        Shop.class_runs += 1
        return [order, Shop.class_runs]

    async def __call__(self, order: int) -> list[int]:
        self.runs += 1
        return [order, self.runs]


@pytest.mark.parametrize("name", ["method", "named", "class_below", "class_above", "static_below", "static_above"])
async def test_methods_of_every_kind_are_idempotent(name: str) -> None:
    shop = Shop()
    call = getattr(shop, name)
    first = await call(7)
    assert first[0] == 7
    assert await call(7) == await call(order=7) == first
    assert (await call(8)) == [8, first[1] + 1]


@pytest.mark.parametrize("name", ["class_below", "class_above", "static_below", "static_above"])
async def test_class_and_static_methods_are_called_on_the_class(name: str) -> None:
    assert await getattr(Shop, name)(1) == await getattr(Shop(), name)(1)


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_a_class_or_static_method_stays_one(kind: Any) -> None:
    async def charge(order: int) -> int:
        return order

    assert type(idempotent_function(kind(charge))) is kind


async def test_self_is_not_part_of_the_key() -> None:
    one, other = Shop(), Shop()
    assert await one.method(1) == await other.method(1) == [1, 1]
    assert other.runs == 0


async def test_instances_that_differ_have_a_key_of_their_own_by_key() -> None:
    @dataclass
    class Account:
        number: int
        balance: int = 0

        @idempotent_function(key=lambda self, amount: [self.number, amount])
        async def add(self, amount: int) -> int:
            self.balance += amount
            return self.balance

    one, other = Account(1), Account(2, balance=100)
    assert [await one.add(5), await one.add(5), await other.add(5)] == [5, 5, 105]


async def test_a_bound_method_can_be_decorated() -> None:
    shop = Shop()
    charge = idempotent_function(key_prefix="bound")(shop.__call__)
    assert await charge(1) == await charge(order=1) == [1, 1]


async def test_a_partial_and_a_callable_object_run_once_with_a_key_prefix() -> None:
    shop = Shop()
    for charge in (
        idempotent_function(key_prefix="object")(shop),
        idempotent_function(key_prefix="partial")(functools.partial(shop, 3)),
        idempotent_function(key_prefix="partials", data_keyword_argument="order")(functools.partial(shop, order=3)),
    ):
        before = shop.runs
        arguments = inspect.signature(charge).parameters
        options = {"order": 3} if arguments else {}
        assert await charge(**options) == await charge(**options) == [3, before + 1]


@pytest.mark.parametrize("nameless", [Shop(), functools.partial(Shop().__call__, 1)])
@pytest.mark.parametrize("key_prefix", [None, ""])
def test_what_has_no_stable_name_needs_a_key_prefix(nameless: Any, key_prefix: str | None) -> None:
    with pytest.raises(IdempotencyConfigError, match="idempotent_function a key_prefix"):
        idempotent_function(key_prefix=key_prefix)(nameless)


def test_a_function_inside_a_lambda_has_no_stable_name_either() -> None:
    def make() -> Any:
        async def charge() -> None: ...

        charge.__qualname__ = "<lambda>.<locals>.charge"
        return charge

    with pytest.raises(IdempotencyConfigError, match="key_prefix"):
        idempotent_function(make())
    assert callable(idempotent_function(key_prefix="charge")(make()))


def plain(order: int) -> int:
    return order


def generator() -> Any:
    yield 1


async def async_generator() -> Any:
    yield 1


async def of_one(event: Any) -> None: ...


class AsyncIterated:
    async def __call__(self) -> Any:
        yield 1


@pytest.mark.parametrize("decorator", [idempotent, idempotent_function])
@pytest.mark.parametrize("function", [plain, lambda event, context: event, functools.partial(plain, 1), print])
def test_a_plain_function_is_refused_and_aidem_sync_is_named(decorator: Any, function: Any) -> None:
    with pytest.raises(TypeError, match=rf"is not an async function; .*aidem\.sync\.{decorator.__name__}"):
        decorator(function)
    with pytest.raises(TypeError, match=rf"aidem\.sync\.{decorator.__name__}"):
        decorator(key_prefix="plain")(function)


def returns_a_coroutine(event: Any, context: Any = None) -> Any:
    return handler_of_all(event, context)


async def handler_of_all(event: Any, context: Any) -> None: ...


@pytest.mark.parametrize("decorator", [idempotent, idempotent_function])
@pytest.mark.parametrize("function", [returns_a_coroutine, lambda event, _: handler_of_all(event, None)])
def test_the_advice_about_a_function_that_returns_a_coroutine_does_not_go_in_circles(
    decorator: Any, function: Any
) -> None:
    with pytest.raises(TypeError, match=r"if it returns a coroutine.*, write an `async def` that awaits it"):
        decorator(key_prefix="charge")(function)
    blocking = getattr(sync, decorator.__name__)(key_prefix="charge", persistence_store=MemoryPersistenceLayer())
    with pytest.raises(TypeError, match="returned a coroutine, which has not run; write an `async def` that awaits it"):
        blocking(function)(1, None)


@contextlib.asynccontextmanager
async def transaction(event: Any, context: Any) -> Any:
    yield event


@contextlib.contextmanager
def opened(event: Any, context: Any) -> Any:
    yield event


@pytest.mark.parametrize("name", ["idempotent", "idempotent_function"])
@pytest.mark.parametrize("function", [transaction, opened])
def test_what_makes_a_context_manager_is_refused_and_told_of_the_block(name: str, function: Any) -> None:
    with pytest.raises(TypeError, match=r"makes a context manager.*write `async with aidem\.idempotency\(key\)`"):
        getattr(aidem, name)(function)
    with pytest.raises(TypeError, match=r"makes a context manager.*write `with aidem\.sync\.idempotency\(key\)`"):
        getattr(sync, name)(function)


def test_a_function_that_a_decorator_makes_of_a_generator_may_be_decorated() -> None:
    def listed(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return list(function(*args))

        return wrapper

    charge = sync.idempotent_function(persistence_store=MemoryPersistenceLayer(), key_prefix="charge")(
        listed(lambda order: (yield order))
    )
    assert charge(1) == charge(1) == [1]


@opened(1, 2)
async def opened_around_its_making() -> int:
    return 1


async def test_an_async_function_that_a_context_manager_is_put_around_is_refused() -> None:
    """Such a manager is left before the coroutine runs: contextlib has made a plain function of it."""
    with pytest.raises(TypeError, match="a decorator below has made a plain one of it"):
        idempotent_function(opened_around_its_making)


@pytest.mark.parametrize("decorator", [idempotent, idempotent_function])
@pytest.mark.parametrize("function", [generator, async_generator, AsyncIterated()])
def test_a_generator_is_refused(decorator: Any, function: Any) -> None:
    with pytest.raises(TypeError, match="cannot replay a generator"):
        decorator(key_prefix="generator")(function)


@pytest.mark.parametrize("decorator", [idempotent, idempotent_function])
@pytest.mark.parametrize("thing", [Shop, MemoryPersistenceLayer(), "order", 3])
def test_what_is_no_function_is_refused_by_name(decorator: Any, thing: Any) -> None:
    with pytest.raises(TypeError, match=f"{decorator.__name__} decorates functions"):
        decorator(thing)


@pytest.mark.parametrize("handler", [of_one, Shop().__call__])
def test_a_handler_without_event_and_context_is_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"\(event, context\).*idempotent_function"):
        idempotent(handler)


@dataclass
class TenantHandler:
    """A method under `idempotent` would take the object for the event, and a dataclass is a payload."""

    tenant: str

    async def handle(self, event: Any, context: Any) -> Any:
        return event

    def handle_plainly(self, event: Any, context: Any) -> Any:
        return event


def test_a_method_is_refused_as_a_handler_since_its_first_argument_is_not_the_event() -> None:
    for decorator, method in ((idempotent, TenantHandler.handle), (sync.idempotent, TenantHandler.handle_plainly)):
        with pytest.raises(TypeError, match=r"is a method.*idempotent_function\(data_keyword_argument='event'\)"):
            decorator(method)


async def test_a_bound_method_is_a_handler() -> None:
    handle = idempotent(TenantHandler("a").handle)
    assert [await handle({"id": number}, None) for number in (1, 2)] == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize("decorator", [idempotent, idempotent_function])
def test_an_unknown_option_is_a_type_error(decorator: Any) -> None:
    with pytest.raises(TypeError, match="event_key_jmespath"):
        decorator(event_key_jmespath="id")


@dataclass
class UnhashableLayer(MemoryPersistenceLayer):
    number: int = 0


class UnreferencedLayer:
    """Has every operation of a layer, and slots."""

    __slots__ = ()
    acquire = complete = renew = release = get = forget = print
    open = aclose = __aenter__ = __aexit__ = print


class HalfALayer:
    """Has a number in the place of an operation, and lacks two."""

    acquire = complete = release = get = open = aclose = __aenter__ = print
    renew = 3


def test_the_operations_that_are_asked_for_are_those_of_the_contract() -> None:
    contract = {name for name, member in vars(PersistenceLayer).items() if inspect.isfunction(member)}
    assert set(_checks._OPERATIONS) == contract - {"__init__", "__subclasshook__"}


@pytest.mark.parametrize("decorator", [idempotent, idempotent_function])
@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("persistence_store", "sqlite:///orders.db", r"persistence layer.*pass open_persistence_layer\(url\)"),
        ("persistence_store", MemoryPersistenceLayer, "persistence layer.*make an instance of the class"),
        (
            "persistence_store",
            HalfALayer(),
            "persistence layer.*this one lacks renew, forget, __aexit__, see",
        ),
        ("persistence_store", object(), "persistence layer.*this one lacks acquire, complete, .*, __aexit__, see"),
        ("persistence_store", UnhashableLayer(), "hashed"),
        ("persistence_store", UnreferencedLayer(), "weakly referenced"),
        ("config", {"expires_after_seconds": 5}, "IdempotencyConfig"),
        ("config", IdempotencyConfig, "IdempotencyConfig"),
        ("key_prefix", 7, "string"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed_before_anything_is_decorated(
    decorator: Any, option: str, value: Any, allowed: str
) -> None:
    with pytest.raises(IdempotencyConfigError, match=f"{option}=.*{allowed}"):
        decorator(**{option: value})


@pytest.mark.parametrize("serializer", ["pydantic", BaseModel, object()])
def test_a_wrong_output_serializer_is_refused_before_anything_is_decorated(serializer: Any) -> None:
    with pytest.raises(IdempotencyUsageError, match="output_serializer"):
        idempotent_function(output_serializer=serializer)


async def test_a_layer_that_looks_empty_is_used() -> None:
    class Countable(MemoryPersistenceLayer):
        def __len__(self) -> int:
            return len(self.records())

    mine = Countable()

    @idempotent_function(persistence_store=mine)
    async def charge(order: int) -> None: ...

    await charge(1)
    assert len(mine) == 1


# --- What survives ----------------------------------------------------------------------------------------------------


def test_name_docstring_module_signature_and_kind_survive() -> None:
    assert Shop.method.__name__ == "method"
    assert Shop.method.__qualname__ == "Shop.method"
    assert Shop.method.__doc__ == "Charge."
    assert Shop.method.__module__ == __name__
    assert str(inspect.signature(Shop.method)) == "(self, order: 'int') -> 'list[int]'"
    assert inspect.iscoroutinefunction(Shop.method)
    assert inspect.iscoroutinefunction(Shop.class_above)

    @idempotent
    async def handler(event: int, context: object, *, tenant: str) -> str:
        """Handle."""
        return tenant

    assert handler.__doc__ == "Handle."
    assert list(inspect.signature(handler).parameters) == ["event", "context", "tenant"]
    assert inspect.iscoroutinefunction(handler)


class Order(BaseModel):
    id: int
    amount: int


class Receipt(BaseModel):
    order_id: int
    number: int
    secret: str = "hidden"


class PublicReceipt(BaseModel):
    order_id: int
    number: int


async def customer(x_customer: Annotated[str, Header()]) -> str:
    return x_customer


async def test_fastapi_sees_the_parameters_and_a_replay_goes_through_the_response_model() -> None:
    app = FastAPI()
    charged: list[Order] = []

    @app.post("/charges/{shop}", response_model=PublicReceipt, status_code=201)
    @idempotent_function(data_keyword_argument="order")
    async def charge(shop: int, order: Order, buyer: Annotated[str, Depends(customer)], pages: int = 1) -> Receipt:
        charged.append(order)
        return Receipt(order_id=order.id, number=len(charged))

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        sent: dict[str, Any] = {"json": {"id": 7, "amount": 5}, "headers": {"x-customer": "ann"}}
        answers = [await client.post("/charges/1", **sent) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert [answer.json() for answer in answers] == [{"order_id": 7, "number": 1}] * 2
        assert charged == [Order(id=7, amount=5)]
        refused = await client.post("/charges/one", json={"id": "seven"})
        assert {tuple(fault["loc"]) for fault in refused.json()["detail"]} == {
            ("path", "shop"),
            ("header", "x-customer"),
            ("body", "id"),
            ("body", "amount"),
        }
    assert list(app.openapi()["paths"]) == ["/charges/{shop}"]


# --- What a call runs -------------------------------------------------------------------------------------------------


async def test_a_call_with_wrong_arguments_is_a_type_error_and_takes_no_key(layer: MemoryPersistenceLayer) -> None:
    @idempotent_function
    async def everything(order: int) -> None: ...

    @idempotent_function(data_keyword_argument="order")
    async def named(order: int, shop: int) -> None: ...

    @idempotent_function(key=lambda order: order)
    async def computed(order: int) -> None: ...

    for call, arguments in ((everything, {}), (named, {"shop": 1}), (named, {"order": 1}), (computed, {"orders": 1})):
        with pytest.raises(TypeError, match="argument"):
            await call(**arguments)
    assert stored(layer) == []


async def test_a_failing_body_gives_the_key_back_and_its_exception_is_the_same_object() -> None:
    errors = [LookupError("declined"), None]

    @idempotent_function
    async def charge(order: int) -> str:
        if (error := errors.pop(0)) is not None:
            raise error
        return "charged"

    first = errors[0]
    with pytest.raises(LookupError) as caught:
        await charge(1)
    assert caught.value is first
    assert await charge(1) == "charged"


@pytest.mark.parametrize("error", [None, LookupError("declined")], ids=["result", "stored exception"])
async def test_a_call_that_lost_its_claim_hands_out_the_winners_outcome(
    error: Exception | None, layer: MemoryPersistenceLayer
) -> None:
    @idempotent_function(config=IdempotencyConfig(stored_exceptions=(LookupError,)))
    async def charge(order: int) -> str:
        (record,) = stored(layer)
        winner = record.replace(owner="winner", status=RecordStatus.COMPLETED, response_data='"the winner\'s"')
        put(layer, winner)
        if error is not None:
            raise error
        return "the loser's"

    assert await charge(1) == await charge(1) == "the winner's"


async def test_nested_idempotent_functions_on_one_layer_keep_their_own_results(layer: MemoryPersistenceLayer) -> None:
    runs: list[str] = []

    @idempotent_function
    async def inner(order: int) -> str:
        runs.append("inner")
        return "inner result"

    @idempotent_function
    async def outer(order: int) -> list[str]:
        runs.append("outer")
        return [await inner(order), await inner(order), "outer result"]

    expected = ["inner result", "inner result", "outer result"]
    assert await outer(1) == expected
    assert await outer(1) == expected
    assert await inner(1) == "inner result"
    assert runs == ["outer", "inner"]
    assert sorted(record.response_data or "" for record in stored(layer)) == [
        '"inner result"',
        '["inner result", "inner result", "outer result"]',
    ]


async def test_functions_that_share_a_layer_keep_their_own_configs(
    layer: MemoryPersistenceLayer, clock: FakeClock
) -> None:
    @idempotent_function(data_keyword_argument="order", config=IdempotencyConfig(expires_after_seconds=10))
    async def short(order: dict[str, int]) -> str:
        return "short"

    @idempotent_function(
        data_keyword_argument="order",
        config=IdempotencyConfig(
            expires_after_seconds=1000,
            event_key_jmespath="id",
            payload_validation_jmespath="amount",
            hash_function="md5",
        ),
    )
    async def long(order: dict[str, int]) -> str:
        return "long"

    for function in (short, long, short):
        await function({"id": 1, "amount": 1})
    await short({"id": 1, "amount": 2})
    with pytest.raises(IdempotencyValidationError):
        await long({"id": 1, "amount": 2})
    by_function = {record.idempotency_key.split(".")[-1].split("#")[0]: record for record in stored(layer)}
    assert by_function["short"].expiry_timestamp == int(clock() + 10)
    assert by_function["long"].expiry_timestamp == int(clock() + 1000)
    assert len(by_function["long"].idempotency_key.split("#")[1]) == 32
    assert len(stored(layer)) == 3


async def test_concurrent_calls_on_one_layer_do_not_mix_their_results() -> None:
    @idempotent_function
    async def echo(number: int) -> int:
        await asyncio.sleep(0)
        return number

    assert await asyncio.gather(*map(echo, range(20))) == list(range(20))
    assert await asyncio.gather(*map(echo, range(20))) == list(range(20))


async def test_one_function_decorated_twice_with_other_prefixes_has_two_keys() -> None:
    runs: list[int] = []

    async def charge(order: int) -> int:
        runs.append(order)
        return len(runs)

    one, two = (idempotent_function(key_prefix=prefix)(charge) for prefix in ("one", "two"))
    assert [await one(1), await two(1), await one(1)] == [1, 2, 1]


async def test_the_key_prefix_is_read_at_the_first_call_and_kept(
    layer: MemoryPersistenceLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    @idempotent_function
    async def charge(order: int) -> None: ...

    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "billing")
    await charge(1)
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "renamed")
    configure(persistence_store=MemoryPersistenceLayer())
    await charge(1)
    configure(persistence_store=layer)
    await charge(1)
    (record,) = stored(layer)
    expected = f"billing.{__name__}.test_the_key_prefix_is_read_at_the_first_call_and_kept.<locals>.charge#"
    assert record.idempotency_key.startswith(expected)


async def test_what_configure_says_later_is_used_by_functions_that_were_called_before(clock: FakeClock) -> None:
    other = MemoryPersistenceLayer(clock=clock)

    @idempotent_function
    async def charge(order: int) -> None: ...

    await charge(1)
    configure(persistence_store=other)
    await charge(1)
    assert len(stored(other)) == 1
    configure(persistence_store=other, config=IdempotencyConfig(expires_after_seconds=5))
    await charge(2)
    assert stored(other)[1].expiry_timestamp == int(clock() + 5)


# --- current_execution ------------------------------------------------------------------------------------------------


async def test_the_body_sees_its_execution(layer: MemoryPersistenceLayer) -> None:
    @idempotent_function
    async def charge(order: int) -> None:
        execution = current_execution()
        (record,) = stored(layer)
        assert execution.key == record.idempotency_key
        assert execution.record == record
        assert execution.fence == record.fence > 0
        assert not execution.replayed
        await execution.ensure_owned()

    await charge(1)


async def test_outside_of_a_body_there_is_no_current_execution() -> None:
    @idempotent_function
    async def charge(order: int) -> None: ...

    await charge(1)
    with pytest.raises(IdempotencyUsageError, match="none is running here"):
        current_execution()


async def test_a_nested_body_sees_its_own_execution_and_the_outer_one_is_restored() -> None:
    @idempotent_function
    async def inner() -> str:
        return current_execution().key

    @idempotent_function
    async def outer() -> list[str]:
        before = current_execution().key
        async with idempotency("block") as execution:
            assert not execution.replayed
            execution.result = current_execution().key
        with pytest.raises(ZeroDivisionError):
            await broken()
        return [before, await inner(), execution.result, current_execution().key]

    @idempotent_function
    async def broken() -> float:
        return 1 / 0

    before, inside, block, after = await outer()
    assert before == after
    assert len({before, inside, block}) == 3


# --- Without asyncio --------------------------------------------------------------------------------------------------


def test_without_an_asyncio_loop_one_sentence_says_so_and_nothing_runs(layer: MemoryPersistenceLayer) -> None:
    runs: list[int] = []

    @idempotent_function
    async def charge(order: int) -> None:
        runs.append(order)

    @idempotent
    async def handler(event: Any, context: object) -> None:
        runs.append(event)

    async def block() -> None:
        async with idempotency("key") as execution:
            await execution.run(charge, 1)

    for coroutine in (charge(1), handler(1, None), block()):
        with pytest.raises(IdempotencyUsageError, match=r"aidem needs asyncio.*trio") as caught:
            coroutine.send(None)
        assert isinstance(caught.value, IdempotencyError)
    assert runs == []
    assert stored(layer) == []
