"""The public API as type checkers see it: checked by mypy and pyright, never run.

Wrong use is an error there: every `ignore` below is one, and both checkers report an `ignore` that nothing needs.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, assert_type

from prometheus_client import CollectorRegistry

from aidem import (
    AbandonedExecution,
    BlockExecution,
    DataRecord,
    DidNotHappen,
    Execution,
    Happened,
    IdempotencyConfig,
    RecordStatus,
    StillUnknown,
    Verdict,
    configure,
    current_execution,
    idempotency,
    idempotent,
    idempotent_function,
    register_lambda_context,
)
from aidem.hooks import IdempotencyEvent
from aidem.opentelemetry import OpenTelemetryHook
from aidem.persistence import PersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.prometheus import PrometheusHook
from aidem.serialization import (
    CustomDictSerializer,
    DataclassSerializer,
    NoOpSerializer,
    OutputSerializer,
    PydanticSerializer,
)

Event = dict[str, str]


class LambdaContext:
    def get_remaining_time_in_millis(self) -> int:
        return 0


# --- idempotent -------------------------------------------------------------------------------------------------------


@idempotent
async def bare_handler(event: Event, context: LambdaContext) -> int:
    return 1


@idempotent(config=IdempotencyConfig(), persistence_store=MemoryPersistenceLayer(), key_prefix="handler")
async def handler(event: Event, context: LambdaContext, *, tenant: str = "") -> list[str]:
    return [tenant]


async def call_handlers() -> None:
    assert_type(await bare_handler({}, LambdaContext()), int)
    assert_type(await handler({}, LambdaContext(), tenant="a"), list[str])
    await handler({}, LambdaContext(), shop="a")  # type: ignore[call-arg]
    await handler({}, 3)  # type: ignore[arg-type]
    await handler({})  # type: ignore[call-arg]


async def handler_of_one(event: Event) -> None: ...
def plain_handler(event: Event, context: LambdaContext) -> None: ...


idempotent(handler_of_one)  # type: ignore[arg-type]
idempotent(plain_handler)  # type: ignore[arg-type]
idempotent(output_serializer=NoOpSerializer())  # type: ignore[call-overload]


# --- idempotent_function ----------------------------------------------------------------------------------------------


@idempotent_function
async def bare(order: int, /, shop: str, *more: int, note: str = "", **rest: bool) -> tuple[int, str]:
    return order, shop


@idempotent_function(
    data_keyword_argument="order",
    persistence_store=SQLitePersistenceLayer("orders.db"),
    config=IdempotencyConfig(),
    output_serializer=PydanticSerializer,
    key_prefix="charge",
)
async def charge(order: int) -> str | None:
    return None


def key_of(*, order: int, **_: Any) -> int:
    return order


@idempotent_function(key=key_of, output_serializer=DataclassSerializer(int))
async def keyed(order: int, shop: int) -> None: ...


async def call_functions() -> None:
    assert_type(await bare(1, "shop", 2, note="", gift=True), tuple[int, str])
    assert_type(await charge(order=1), str | None)
    coroutine: Coroutine[Any, Any, str | None] = charge(1)
    await coroutine
    assert_type(await keyed(1, shop=2), None)
    await bare(order=1, shop="shop")  # type: ignore[call-arg, arg-type]
    await charge("1")  # type: ignore[arg-type]
    await charge(orders=1)  # type: ignore[call-arg]
    charged: int = await charge(1)  # type: ignore[assignment]
    assert charged


def plain(order: int) -> int:
    return order


async def generator() -> AsyncIterator[int]:
    yield 1


idempotent_function(plain)  # type: ignore[arg-type]
idempotent_function(generator)  # type: ignore[arg-type]


# The call form, for functions that are defined elsewhere.
async def charged(order: int) -> str:
    return str(order)


by_call = idempotent_function(charged, persistence_store=MemoryPersistenceLayer())
_ = assert_type(by_call(1), Coroutine[Any, Any, str])
as_charged: Callable[[str], Any] = by_call  # type: ignore[assignment]
idempotent_function(charged, event_key="id")  # type: ignore[call-overload]
idempotent_function(event_key="id")  # type: ignore[call-overload]
idempotent_function(key="order")  # type: ignore[call-overload]
idempotent_function(key_prefix=3)  # type: ignore[call-overload]
idempotent_function(output_serializer=int)  # type: ignore[arg-type]
idempotent_function(persistence_store="sqlite:///a.db")  # type: ignore[call-overload]
idempotent_function(persistence_store=MemoryPersistenceLayer)  # type: ignore[call-overload]


class Shop:
    @idempotent_function
    async def method(self, order: int) -> str:
        return ""

    @idempotent_function(data_keyword_argument="order")
    async def named(self, order: int) -> str:
        return ""

    @classmethod
    @idempotent_function
    async def class_below(cls, order: int) -> str:
        return ""

    @staticmethod
    @idempotent_function(key_prefix="static")
    async def static_below(order: int) -> str:
        return ""

    @idempotent_function
    @classmethod
    async def class_above(cls, order: int) -> str:
        return ""

    @idempotent_function(key_prefix="class")
    @classmethod
    async def class_above_with_options(cls, order: int) -> str:
        return ""

    @idempotent_function
    @staticmethod
    async def static_above(order: int) -> str:
        return ""

    @idempotent_function(key_prefix="static")
    @staticmethod
    async def static_above_with_options(order: int) -> str:
        return ""

    async def __call__(self, order: int) -> str:
        return ""


async def call_methods(shop: Shop) -> None:
    assert_type(await shop.method(1), str)
    assert_type(await shop.method(order=1), str)
    assert_type(await shop.named(1), str)
    assert_type(await Shop.class_below(1), str)
    assert_type(await shop.class_below(order=1), str)
    assert_type(await Shop.static_below(1), str)
    assert_type(await shop.static_below(order=1), str)
    assert_type(await Shop.class_above(1), str)
    assert_type(await shop.class_above(order=1), str)
    assert_type(await Shop.class_above_with_options(1), str)
    assert_type(await Shop.static_above(1), str)
    assert_type(await shop.static_above(order=1), str)
    assert_type(await Shop.static_above_with_options(1), str)
    assert_type(await idempotent_function(shop)(order=1), str)
    assert_type(await idempotent_function(key_prefix="shop")(shop.__call__)(1), str)
    await shop.method("1")  # type: ignore[arg-type]
    await shop.method(shop, 1)  # type: ignore[call-arg, arg-type]
    await Shop.class_below("1")  # type: ignore[arg-type]
    await Shop.class_above("1")  # type: ignore[arg-type]
    await Shop.static_above("1")  # type: ignore[arg-type]


# --- idempotency ------------------------------------------------------------------------------------------------------


async def blocks(shop: Shop) -> int:
    assert_type(idempotency("key"), AbstractAsyncContextManager[BlockExecution])
    async with idempotency(7, payload=[1], config=IdempotencyConfig(), key_prefix="orders") as execution:
        assert_type(execution, BlockExecution)
        assert_type(execution.replayed, bool)
        assert_type(execution.key, str)
        assert_type(execution.fence, int)
        assert_type(execution.record, DataRecord | None)
        assert_type(execution.key_for("charge"), str)
        assert_type(await execution.ensure_owned(), None)
        assert_type(await execution.complete(1, transaction=object()), int)
        assert_type(await execution.completion_item(1), dict[str, Any] | None)
        await execution.complete(1)  # type: ignore[call-arg]
        assert_type(await execution.run(shop.method, order=1), str)
        execution.result = 1
        await execution.run(shop.method, "1")  # type: ignore[arg-type]
        await execution.run(plain, 1)  # type: ignore[arg-type]
        execution.replayed = True  # type: ignore[misc]
    idempotency("key", output_serializer=PydanticSerializer)  # type: ignore[arg-type]
    idempotency()  # type: ignore[call-arg]
    async with idempotency("key") as execution:
        return await execution.run(bare_handler, {}, LambdaContext())


# --- The rest ---------------------------------------------------------------------------------------------------------


class Metrics:
    def on_event(self, event: IdempotencyEvent) -> None: ...


def hook(response: Any, record: DataRecord) -> str:
    assert_type(record.status, RecordStatus)
    return str(response)


async def async_hook(response: Any, record: DataRecord) -> str:
    return str(response)


IdempotencyConfig(hooks=(Metrics(),), response_hook=hook, lambda_context=LambdaContext(), stored_exceptions=(OSError,))
IdempotencyConfig(hooks=(PrometheusHook(registry=CollectorRegistry()), OpenTelemetryHook()))
IdempotencyConfig(response_hook=async_hook, on_abandoned="raise", lease_seconds=None)


async def was_charged(abandoned: AbandonedExecution) -> Verdict:
    return Happened(abandoned.payload) if abandoned.key_for("charge") else StillUnknown()


def was_not_charged(_: AbandonedExecution) -> DidNotHappen:
    return DidNotHappen()


def answers_nothing(_: AbandonedExecution) -> None: ...


IdempotencyConfig(on_abandoned=was_charged, doubt_kept_seconds=86_400)
IdempotencyConfig(on_abandoned=was_not_charged)
IdempotencyConfig(on_abandoned=answers_nothing)  # type: ignore[arg-type]
IdempotencyConfig("id")  # type: ignore[call-arg]
IdempotencyConfig(hooks=(Metrics,))  # type: ignore[arg-type]
IdempotencyConfig(on_abandoned="ignore")  # type: ignore[arg-type]
IdempotencyConfig(stored_exceptions=(KeyboardInterrupt,))  # type: ignore[arg-type]
IdempotencyConfig(response_hook=plain)  # type: ignore[arg-type]
IdempotencyConfig().hash_function = "md5"  # type: ignore[misc]

configure(persistence_store=MemoryPersistenceLayer(), config=IdempotencyConfig())
configure(persistence_store="sqlite:///a.db")  # type: ignore[arg-type]
register_lambda_context(LambdaContext())
register_lambda_context(object())  # type: ignore[arg-type]

assert_type(current_execution(), Execution)
layers: list[PersistenceLayer] = [MemoryPersistenceLayer(), SQLitePersistenceLayer("orders.db")]
serializers: list[OutputSerializer] = [
    NoOpSerializer(),
    CustomDictSerializer(to_dict=str, from_dict=str),
    PydanticSerializer(int),
    DataclassSerializer(int),
]
handler_type: Callable[[Event, LambdaContext], Coroutine[Any, Any, int]] = bare_handler
