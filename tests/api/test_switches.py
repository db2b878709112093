"""The switches that turn idempotency off in tests."""

# ruff: noqa: PT031 - a block under test belongs to what is to warn

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from aidem import IdempotencyConfig, configure, current_execution, idempotency, idempotent, idempotent_function
from aidem.exceptions import IdempotencyConfigError, IdempotencyKeyError, IdempotencyWarning
from aidem.persistence.memory import MemoryPersistenceLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

SWITCHES = ["AIDEM_IDEMPOTENCY_DISABLED", "POWERTOOLS_IDEMPOTENCY_DISABLED"]


class Untouched(MemoryPersistenceLayer):
    """A layer that nobody may ask."""

    def acquire(self, *_: Any, **__: Any) -> Any:
        pytest.fail("the layer was asked")


@pytest.fixture(autouse=True)
def defaults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for switch in SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    configure(persistence_store=Untouched())
    yield
    configure()


@pytest.fixture(params=SWITCHES)
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(request.param, "true")
    return str(request.param)


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "t", "yes", "y", "on", " On "])
@pytest.mark.parametrize("name", SWITCHES)
async def test_a_truthy_switch_runs_every_call_without_a_store_and_warns(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    runs = 0

    @idempotent_function
    async def charge(order: int) -> object:
        nonlocal runs
        runs += 1
        return charge

    for _ in range(2):
        with pytest.warns(IdempotencyWarning, match=f"{name} is set: .*charge runs without idempotency"):
            assert await charge(1) is charge  # also a result that could not be stored
    assert runs == 2


@pytest.mark.parametrize("value", ["", " ", "0", "false", "False", "f", "no", "n", "off"])
@pytest.mark.parametrize("name", SWITCHES)
async def test_an_empty_or_falsy_switch_means_enabled(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    layer = MemoryPersistenceLayer()

    @idempotent_function(persistence_store=layer)
    async def charge(order: int) -> None: ...

    await charge(1)
    assert len(layer.records()) == 1


@pytest.mark.parametrize("name", SWITCHES)
async def test_a_switch_that_is_neither_is_refused_and_nothing_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @idempotent_function
    async def charge(order: int) -> None:
        pytest.fail("the function ran")

    monkeypatch.setenv(name, "maybe")
    with pytest.raises(IdempotencyConfigError, match=f"{name}='maybe'.*true.*false"):
        await charge(1)


async def test_the_switch_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    @idempotent_function(persistence_store=MemoryPersistenceLayer())
    async def charge(order: int) -> int:
        runs.append(order)
        return len(runs)

    assert [await charge(1), await charge(1)] == [1, 1]
    monkeypatch.setenv(SWITCHES[0], "1")
    with pytest.warns(IdempotencyWarning):
        assert await charge(1) == 2
    monkeypatch.delenv(SWITCHES[0])
    assert await charge(1) == 1


async def test_a_handler_runs_too(switch: str) -> None:
    @idempotent
    async def handler(event: Any, context: object, *, tenant: str) -> list[Any]:
        return [event, tenant]

    with pytest.warns(IdempotencyWarning, match=switch):
        assert await handler({"id": 1}, None, tenant="a") == [{"id": 1}, "a"]


async def test_a_block_runs_too(switch: str) -> None:
    thing = object()

    async def charge() -> object:
        return thing

    with pytest.warns(IdempotencyWarning, match=f"{switch} is set: the block 'aidem'"):
        async with idempotency("key") as execution:
            assert await execution.run(charge) is thing
    assert execution.result is thing
    with pytest.warns(IdempotencyWarning, match=switch):
        async with idempotency("key") as execution:
            assert not execution.replayed
            execution.result = thing
    assert execution.result is thing


@dataclass
class Cat:
    name: str


@dataclass
class Dog:
    name: str


async def adopt() -> Cat | Dog:
    return Dog(name="Rex")


async def test_a_result_that_no_serializer_could_rebuild_is_no_fault_while_it_is_off(switch: str) -> None:
    with pytest.warns(IdempotencyWarning, match=switch):
        assert await idempotent_function(adopt)() == Dog(name="Rex")
    with pytest.warns(IdempotencyWarning, match=switch):
        async with idempotency("key") as execution:
            assert await execution.run(adopt) == Dog(name="Rex")


async def test_the_body_sees_an_execution_without_a_claim_that_still_derives_keys(switch: str) -> None:
    async def derived() -> str:
        execution = current_execution()
        await execution.ensure_owned()
        assert (execution.record, execution.fence, execution.replayed) == (None, 0, False)
        return execution.key_for("charge")

    with pytest.warns(IdempotencyWarning, match=switch):
        off = await idempotent_function(derived)()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(switch)
        on = await idempotent_function(persistence_store=MemoryPersistenceLayer(), key_prefix=prefix_of(derived))(
            without_claim
        )()
    assert off == on


def prefix_of(function: Any) -> str:
    return f"test-func.{function.__module__}.{function.__qualname__}"


async def without_claim() -> str:
    return current_execution().key_for("charge")


def raise_lookup_error(order: Any) -> Any:
    raise LookupError


@pytest.mark.parametrize(
    "options",
    [
        {"config": IdempotencyConfig(event_key_jmespath="id", raise_on_no_idempotency_key=True)},
        {"config": IdempotencyConfig(event_key_jmespath="abs(id)")},
        {"key": raise_lookup_error},
        {"data_keyword_argument": "order"},
    ],
)
async def test_a_payload_that_could_not_be_a_key_is_no_fault_while_it_is_off(switch: str, options: Any) -> None:
    @idempotent_function(**options)
    async def charge(order: Any) -> str:
        with pytest.raises(IdempotencyKeyError):
            current_execution().key_for("charge")
        return "charged"

    with pytest.warns(IdempotencyWarning, match=switch) as warned:
        assert await charge({"id": {1, 2}}) == "charged"
    assert len(warned) == 1


async def test_a_missing_key_warns_of_nothing_more_while_it_is_off(switch: str) -> None:
    with pytest.warns(IdempotencyWarning) as warned:
        async with idempotency(None) as execution:
            assert not execution.replayed
    assert [switch in str(warning.message) for warning in warned] == [True]


async def test_an_exception_of_the_body_propagates(switch: str) -> None:
    error = LookupError()

    @idempotent_function(config=IdempotencyConfig(stored_exceptions=(LookupError,)))
    async def charge() -> None:
        raise error

    with pytest.warns(IdempotencyWarning, match=switch), pytest.raises(LookupError) as caught:
        await charge()
    assert caught.value is error


@pytest.mark.parametrize("name", SWITCHES)
async def test_a_switch_works_in_an_environment_that_somebody_has_replaced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {name: "1"})

    @idempotent_function
    async def charge(order: int) -> int:
        return order

    with pytest.warns(IdempotencyWarning, match=f"{name} is set"):
        assert await charge(1) == 1
