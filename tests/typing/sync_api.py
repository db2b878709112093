"""`aidem.sync` as type checkers see it: checked by mypy and pyright, never run.

Wrong use is an error there: every `ignore` below is one, and both checkers report an `ignore` that nothing needs.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, assert_type

from aidem import DataRecord, IdempotencyConfig, sync
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.serialization import DataclassSerializer, NoOpSerializer, PydanticSerializer

Event = dict[str, str]


class LambdaContext:
    def get_remaining_time_in_millis(self) -> int:
        return 0


# --- idempotent -------------------------------------------------------------------------------------------------------


@sync.idempotent
def bare_handler(event: Event, context: LambdaContext) -> int:
    return 1


@sync.idempotent(config=IdempotencyConfig(), persistence_store=MemoryPersistenceLayer(), key_prefix="handler")
def handler(event: Event, context: LambdaContext, *, tenant: str = "") -> list[str]:
    return [tenant]


assert_type(bare_handler({}, LambdaContext()), int)
assert_type(handler({}, LambdaContext(), tenant="a"), list[str])
handler({}, LambdaContext(), shop="a")  # type: ignore[call-arg]
handler({}, 3)  # type: ignore[arg-type]
handler({})  # type: ignore[call-arg]
sync.idempotent(output_serializer=NoOpSerializer())  # type: ignore[call-overload]
handler_type: Callable[[Event, LambdaContext], int] = bare_handler


sync.warm(MemoryPersistenceLayer(), MemoryPersistenceLayer())
sync.warm("redis://localhost")  # type: ignore[arg-type]


# --- idempotent_function ----------------------------------------------------------------------------------------------


@sync.idempotent_function
def bare(order: int, /, shop: str, *more: int, note: str = "", **rest: bool) -> tuple[int, str]:
    return order, shop


def key_of(*, order: int, **_: Any) -> int:
    return order


@sync.idempotent_function(
    data_keyword_argument="order", config=IdempotencyConfig(), output_serializer=PydanticSerializer, key_prefix="charge"
)
def charge(order: int) -> str | None:
    return None


@sync.idempotent_function(key=key_of, output_serializer=DataclassSerializer(int))
def keyed(order: int, shop: int) -> None: ...


assert_type(bare(1, "shop", 2, note="", gift=True), tuple[int, str])
assert_type(charge(order=1), str | None)
assert_type(keyed(1, shop=2), None)
bare(order=1, shop="shop")  # type: ignore[call-arg, arg-type]
charge("1")  # type: ignore[arg-type]
charge(orders=1)  # type: ignore[call-arg]


# The call form, for functions that are defined elsewhere.
def charged(order: int) -> str:
    return str(order)


assert_type(sync.idempotent_function(charged, persistence_store=MemoryPersistenceLayer())(1), str)
sync.idempotent_function(charged, key_prefix="charged")("a")  # type: ignore[arg-type]
sync.idempotent_function(charged, event_key="id")  # type: ignore[call-overload]
sync.idempotent_function(event_key="id")  # type: ignore[call-overload]
sync.idempotent_function(key="order")  # type: ignore[call-overload]
sync.idempotent_function(persistence_store="sqlite:///a.db")  # type: ignore[call-overload]


class Shop:
    @sync.idempotent_function
    def method(self, order: int) -> str:
        return ""

    @classmethod
    @sync.idempotent_function
    def class_below(cls, order: int) -> str:
        return ""

    @staticmethod
    @sync.idempotent_function(key_prefix="static")
    def static_below(order: int) -> str:
        return ""

    @sync.idempotent_function
    @classmethod
    def class_above(cls, order: int) -> str:
        return ""

    @sync.idempotent_function(key_prefix="static")
    @staticmethod
    def static_above(order: int) -> str:
        return ""

    def __call__(self, order: int) -> str:
        return ""


def call_methods(shop: Shop) -> None:
    assert_type(shop.method(1), str)
    assert_type(shop.method(order=1), str)
    assert_type(Shop.class_below(1), str)
    assert_type(shop.static_below(order=1), str)
    assert_type(Shop.class_above(1), str)
    assert_type(shop.static_above(order=1), str)
    assert_type(sync.idempotent_function(shop)(order=1), str)
    shop.method("1")  # type: ignore[arg-type]
    Shop.class_below("1")  # type: ignore[arg-type]
    Shop.static_above("1")  # type: ignore[arg-type]


# --- idempotency ------------------------------------------------------------------------------------------------------


def plain(order: int) -> int:
    return order


def blocks(shop: Shop) -> int:
    assert_type(sync.idempotency("key"), AbstractContextManager[sync.BlockExecution])
    with sync.idempotency(7, payload=[1], config=IdempotencyConfig(), key_prefix="orders") as execution:
        assert_type(execution, sync.BlockExecution)
        assert_type(execution.replayed, bool)
        assert_type(execution.key, str)
        assert_type(execution.fence, int)
        assert_type(execution.record, DataRecord | None)
        assert_type(execution.key_for("charge"), str)
        assert_type(execution.run(shop.method, order=1), str)
        execution.ensure_owned()
        assert_type(execution.complete(1, transaction=object()), int)
        assert_type(execution.completion_item(1), dict[str, Any] | None)
        execution.complete(1)  # type: ignore[call-arg]
        execution.result = 1
        execution.run(shop.method, "1")  # type: ignore[arg-type]
        execution.replayed = True  # type: ignore[misc]
    sync.idempotency("key", output_serializer=PydanticSerializer)  # type: ignore[arg-type]
    sync.idempotency()  # type: ignore[call-arg]
    with sync.idempotency("key") as execution:
        return execution.run(plain, 1)


sync.close()
