"""How the payload is found among the arguments of a call, and which options do not suit a signature."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem._api.signature import Target
from aidem.exceptions import IdempotencyConfigError, IdempotencyKeyError, IdempotencyWarning
from aidem.persistence.memory import MemoryPersistenceLayer


class Keys:
    """Decorates functions and answers the keys under which their calls are recorded."""

    def __init__(self) -> None:
        self.layer = MemoryPersistenceLayer()

    def decorate(self, function: Any, **options: Any) -> Any:
        return idempotent_function(persistence_store=self.layer, key_prefix="f", **options)(function)

    def __len__(self) -> int:
        return len(self.layer.records())


@pytest.fixture
def keys() -> Keys:
    return Keys()


# --- data_keyword_argument --------------------------------------------------------------------------------------------


async def test_a_named_payload_is_found_by_keyword_by_position_and_at_its_default(keys: Keys) -> None:
    async def charge(shop: int, order: str = "standard", *, note: str = "") -> str:
        return note

    charge = keys.decorate(charge, data_keyword_argument="order")
    assert await charge(1, "standard", note="a") == "a"
    assert await charge(2, order="standard", note="b") == "a"
    assert await charge(3, note="c") == "a"
    assert len(keys) == 1
    assert await charge(1, "express", note="d") == "d"


async def test_a_named_payload_may_be_positional_only_keyword_only_or_a_collection(keys: Keys) -> None:
    async def positional_only(order: int, /, **order_options: Any) -> Any:
        return [order, order_options]

    async def with_default(order: int = 5, /, **order_options: Any) -> Any:
        return [order, *order_options.values()]

    async def keyword_only(*, order: int) -> Any:
        return order

    async def collected(*orders: int, **options: Any) -> Any:
        return [list(orders), options]

    charge = keys.decorate(positional_only, data_keyword_argument="order")
    assert await charge(1) == await charge(1, order=2) == [1, {}]
    charge = keys.decorate(with_default, data_keyword_argument="order")
    assert await charge(order=8) == await charge(5) == [5, 8]
    charge = keys.decorate(keyword_only, data_keyword_argument="order")
    assert await charge(order=3) == 3
    charge = keys.decorate(collected, data_keyword_argument="orders")
    assert await charge(1, 2, a=1) == await charge(1, 2, a=2) == [[1, 2], {"a": 1}]
    charge = keys.decorate(collected, data_keyword_argument="options")
    assert await charge(1, a=5) == await charge(2, a=5) == [[1], {"a": 5}]


async def test_a_named_payload_of_a_partial_is_found_among_the_rest(keys: Keys) -> None:
    async def charge(shop: int, order: int) -> list[int]:
        return [shop, order]

    partial = keys.decorate(functools.partial(charge, 1), data_keyword_argument="order")
    assert await partial(7) == await partial(order=7) == [1, 7]
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["orders", "", "self"])
def test_a_name_that_is_not_in_the_signature_is_refused_when_the_decorator_is_applied(name: str, keys: Keys) -> None:
    async def charge(order: int, *, shop: int) -> None: ...

    with pytest.raises(IdempotencyConfigError, match=f"data_keyword_argument='{name}'.*'order', 'shop'"):
        keys.decorate(charge, data_keyword_argument=name)


def test_a_name_for_a_function_without_parameters_is_refused(keys: Keys) -> None:
    async def charge() -> None: ...

    with pytest.raises(IdempotencyConfigError, match="its parameters are: none"):
        keys.decorate(charge, data_keyword_argument="order")


async def fetch_key(**_: Any) -> str:
    return "key"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("data_keyword_argument", 3, "name of a parameter"),
        ("key", "order.id", "callable"),
        ("key", fetch_key, "not async"),
    ],
)
def test_a_payload_option_of_another_type_is_refused(option: str, value: Any, allowed: str) -> None:
    options: Any = {option: value}
    with pytest.raises(IdempotencyConfigError, match=f"{option}=.*{allowed}"):
        idempotent_function(**options)


def test_two_ways_to_say_what_the_payload_is_are_one_too_many(keys: Keys) -> None:
    async def charge(order: int) -> None: ...

    with pytest.raises(IdempotencyConfigError, match="data_keyword_argument and key"):
        keys.decorate(charge, data_keyword_argument="order", key=lambda order: order)


async def test_a_named_payload_may_be_one_of_any_keyword_arguments(keys: Keys) -> None:
    async def charge(shop: int, **details: Any) -> None: ...

    charge = keys.decorate(charge, data_keyword_argument="order")
    await charge(1, order=7, note="first")
    await charge(2, order=7)
    assert len(keys) == 1
    with pytest.warns(IdempotencyWarning, match="no idempotency key was found for .*charge"):
        await charge(3, note="without")
    assert len(keys) == 1


async def test_a_named_payload_that_is_missing_runs_without_idempotency_and_warns(keys: Keys) -> None:
    runs: list[Any] = []

    async def charge(order: Any = None) -> int:
        runs.append(order)
        return len(runs)

    charge = keys.decorate(charge, data_keyword_argument="order")
    for expected in (1, 2):
        with pytest.warns(IdempotencyWarning, match="no idempotency key was found for .*charge"):
            assert await charge() == expected
    assert len(keys) == 0


def test_where_ordinary_functions_are_decorated_an_async_one_is_refused() -> None:
    async def charge() -> None: ...

    with pytest.raises(TypeError, match=r"charge is an async function; .*aidem\.idempotent_function"):
        Target(charge, decorator="idempotent_function", key_prefix=None, is_async=False)
    assert Target(print, decorator="idempotent_function", key_prefix=None, is_async=False).name == "builtins.print"


# --- key= -------------------------------------------------------------------------------------------------------------


async def test_key_gets_the_bound_arguments_by_name_with_defaults(keys: Keys) -> None:
    seen: list[Any] = []

    async def charge(order: int, /, shop: int = 2, *more: int, note: str = "none", **rest: Any) -> None: ...

    def key(**arguments: Any) -> Any:
        seen.append(arguments)
        return arguments["order"]

    charge = keys.decorate(charge, key=key)
    await charge(1)
    await charge(1, 3, 4, note="x", gift=True)
    assert seen == [
        {"order": 1, "shop": 2, "more": (), "note": "none", "rest": {}},
        {"order": 1, "shop": 3, "more": (4,), "note": "x", "rest": {"gift": True}},
    ]
    assert len(keys) == 1


async def test_key_may_take_some_of_the_arguments_and_ignore_the_rest(keys: Keys) -> None:
    async def charge(order: dict[str, int], shop: int) -> int:
        return shop

    charge = keys.decorate(charge, key=lambda order, **_: order["id"])
    assert await charge({"id": 1, "at": 1}, 1) == await charge(shop=2, order={"id": 1, "at": 2}) == 1


@pytest.mark.parametrize(
    "key",
    [lambda: 1, lambda order: 1, lambda order, shop, more: 1, lambda orders, **_: 1],
    ids=["none", "too few", "too many", "another name"],
)
def test_a_key_that_does_not_take_the_arguments_is_refused_when_the_decorator_is_applied(key: Any, keys: Keys) -> None:
    async def charge(order: int, shop: int) -> None: ...

    with pytest.raises(
        IdempotencyConfigError, match=r"key= must take the arguments of .*charge by name \(order, shop\)"
    ):
        keys.decorate(charge, key=key)


def test_a_key_that_takes_arguments_a_function_without_parameters_has_not_is_refused(keys: Keys) -> None:
    async def charge() -> None: ...

    with pytest.raises(IdempotencyConfigError, match=r"by name \(none\)"):
        keys.decorate(charge, key=lambda order: order)


async def test_a_built_in_may_be_the_key(keys: Keys) -> None:
    async def charge(order: int, shop: int) -> int:
        return order

    charge = keys.decorate(charge, key=dict)
    assert [await charge(1, 2), await charge(order=1, shop=2), await charge(2, 2)] == [1, 1, 2]


async def test_what_key_returns_is_selected_from_and_may_be_missing(keys: Keys) -> None:
    async def charge(order: dict[str, Any]) -> Any:
        return order["at"]

    config = IdempotencyConfig(event_key_jmespath="id")
    charge = keys.decorate(charge, key=lambda order: order, config=config)
    assert await charge({"id": 1, "at": 1}) == await charge({"id": 1, "at": 2}) == 1
    with pytest.warns(IdempotencyWarning, match="event_key_jmespath='id'"):
        assert await charge({"at": 3}) == 3


async def test_an_error_in_key_propagates_and_nothing_runs(keys: Keys) -> None:
    async def charge(order: dict[str, Any]) -> None:
        pytest.fail("the function ran")

    with pytest.raises(KeyError, match="id"):
        await keys.decorate(charge, key=lambda order: order["id"])({})
    assert len(keys) == 0


# --- All arguments ----------------------------------------------------------------------------------------------------


async def test_without_options_all_arguments_by_name_are_the_payload(keys: Keys) -> None:
    async def charge(order: int, shop: int = 2, *, note: str = "") -> None: ...

    charge = keys.decorate(charge)
    await charge(1)
    await charge(1, 2)
    await charge(shop=2, order=1, note="")
    assert len(keys) == 1
    await charge(2, 1)
    await charge(1, 2, note="gift")
    assert len(keys) == 3


async def test_collected_arguments_are_part_of_the_payload(keys: Keys) -> None:
    async def charge(*orders: int, **options: Any) -> None: ...

    charge = keys.decorate(charge)
    for args, kwargs in (((1,), {}), ((1, 2), {}), ((1,), {"a": 1}), ((1,), {"a": 1})):
        await charge(*args, **kwargs)
    assert len(keys) == 3


@pytest.mark.parametrize("argument", [None, "", [], {}, 0, False])
async def test_all_arguments_always_are_a_key(argument: Any, keys: Keys) -> None:
    runs: list[int] = []

    async def charge(order: Any) -> int:
        runs.append(1)
        return len(runs)

    charge = keys.decorate(charge, config=IdempotencyConfig(raise_on_no_idempotency_key=True))
    assert [await charge(argument), await charge(order=argument)] == [1, 1]


async def test_a_function_without_arguments_has_a_key(keys: Keys) -> None:
    runs: list[int] = []

    async def close_the_books() -> int:
        runs.append(1)
        return len(runs)

    charge = keys.decorate(close_the_books, config=IdempotencyConfig(raise_on_no_idempotency_key=True))
    assert [await charge(), await charge()] == [1, 1]


async def test_an_expression_selects_from_all_arguments_and_its_key_may_be_missing(keys: Keys) -> None:
    async def charge(order: dict[str, Any], shop: int) -> int:
        return shop

    charge = keys.decorate(charge, config=IdempotencyConfig(event_key_jmespath="order.id"))
    assert await charge({"id": 7}, 1) == await charge({"id": 7}, shop=2) == 1
    with pytest.warns(IdempotencyWarning, match=r"event_key_jmespath='order\.id'"):
        assert await charge({}, 3) == 3


async def test_an_expression_reaches_into_arguments_that_are_dataclasses_or_models(keys: Keys) -> None:
    @dataclass
    class Order:
        id: int
        at: int

    async def charge(order: Order) -> int:
        return order.at

    charge = keys.decorate(charge, config=IdempotencyConfig(event_key_jmespath="order.id"))
    assert await charge(Order(id=7, at=1)) == await charge(order=Order(id=7, at=2)) == 1


async def test_an_argument_that_cannot_be_hashed_is_refused_with_its_name(keys: Keys) -> None:
    async def charge(order: Any) -> None:
        pytest.fail("the function ran")

    with pytest.raises(IdempotencyKeyError, match=r"\$\.order\.items\[1\] is of type set"):
        await keys.decorate(charge)({"items": [1, {2}]})


async def test_self_and_cls_are_left_out_only_where_they_come_first(keys: Keys) -> None:
    async def charge(order: int, self: int = 0) -> None: ...

    charge = keys.decorate(charge)
    await charge(1, 1)
    await charge(1, 2)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((), "missing a required argument: 'order'"), ((1, 2), "too many positional arguments")],
)
@pytest.mark.parametrize("options", [{}, {"key": lambda order: order}])
async def test_a_call_that_does_not_suit_the_signature_is_refused_with_the_name_of_the_function(
    arguments: Any, reason: str, options: Any, keys: Keys
) -> None:
    async def charge(order: int) -> None:
        pytest.fail("the function ran")

    with pytest.raises(TypeError, match=f"charge\\(\\): {reason}$"):
        await keys.decorate(charge, **options)(*arguments)
