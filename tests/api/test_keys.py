from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, cast

import pytest

import aidem
from aidem import IdempotencyConfig, block_key, idempotency_key, idempotent, idempotent_function, sync
from aidem.asgi import IdempotencyMiddleware, request_key
from aidem.awslambda import lambda_handler
from aidem.exceptions import (
    IdempotencyConfigError,
    IdempotencyKeyError,
    IdempotencyUsageError,
)
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.asgi import JSON, Connection, scope_of
from tests.support.records import clear

BY_ID = IdempotencyConfig(event_key_jmespath="id")


async def keys_in(layer: MemoryPersistenceLayer) -> list[str]:
    return [record.idempotency_key async for record in layer.scan()]


async def test_the_key_of_a_call_is_the_one_that_it_is_stored_under() -> None:
    layer = MemoryPersistenceLayer()

    @idempotent_function(persistence_store=layer)
    async def charge(order_id: str, amount: int = 1) -> None: ...

    key = idempotency_key(charge, "o-1")
    assert await keys_in(layer) == []
    await charge(order_id="o-1", amount=1)
    assert await keys_in(layer) == [key] == [idempotency_key(charge, order_id="o-1", amount=1)]
    assert idempotency_key(charge, "o-2") != key


class Service:
    layer = MemoryPersistenceLayer()

    @idempotent_function(persistence_store=layer, data_keyword_argument="order_id", key_prefix="method")
    async def charge(self, order_id: str) -> None: ...

    @classmethod
    @idempotent_function(persistence_store=layer, key_prefix="class")
    async def refund(cls, order_id: str) -> None: ...

    @staticmethod
    @idempotent_function(persistence_store=layer, key=lambda order_id: order_id, key_prefix="static")
    async def ship(order_id: str) -> None: ...


@pytest.mark.parametrize("method", ["charge", "refund", "ship"])
async def test_methods_have_keys(method: str) -> None:
    service = Service()
    bound: Callable[..., Any] = getattr(service, method)
    clear(service.layer)
    await bound("o-1")
    assert await keys_in(service.layer) == [idempotency_key(bound, "o-1")]
    assert idempotency_key(Service.charge, service, "o-1") == idempotency_key(service.charge, "o-1")


def test_blocking_functions_have_the_keys_of_async_ones() -> None:
    layer = MemoryPersistenceLayer()

    @sync.idempotent_function(persistence_store=layer, key_prefix="charge")
    def charge(order_id: str) -> None: ...

    @idempotent_function(persistence_store=layer, key_prefix="charge")
    async def charge_async(order_id: str) -> None: ...

    charge("o-1")
    assert [*layer.records()] == [idempotency_key(charge, "o-1")] == [idempotency_key(charge_async, order_id="o-1")]


def test_handlers_have_keys_also_below_other_decorators() -> None:
    layer = MemoryPersistenceLayer()

    @lambda_handler
    @idempotent(persistence_store=layer, config=BY_ID, key_prefix="pay")
    async def handler(event: dict[str, str], context: object) -> None: ...

    @sync.idempotent(persistence_store=layer, config=BY_ID, key_prefix="pay")
    def blocking(event: dict[str, str], context: object) -> None: ...

    @functools.wraps(blocking)
    def traced(*args: Any) -> Any:
        return blocking(*args)

    handler({"id": "7"}, None)
    (key,) = layer.records()
    for each in (handler, blocking, traced):
        assert idempotency_key(each, {"id": "7"}) == idempotency_key(each, {"id": "7", "more": 1}, None) == key


def test_asking_runs_and_opens_nothing_and_switches_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "true")
    monkeypatch.setenv("AIDEM_PERSISTENCE", "no://layer")
    notes = list[object]()

    @idempotent_function(key_prefix="charge", config=IdempotencyConfig(note=notes.append))
    async def charge(order_id: str) -> None:
        raise AssertionError

    assert idempotency_key(charge, "o-1").startswith("charge#")
    assert block_key("o-1").startswith("aidem#")
    assert notes == []


async def test_asking_does_not_fix_the_prefix_and_a_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MemoryPersistenceLayer()

    @idempotent_function(persistence_store=layer)
    async def charge(order_id: str) -> None: ...

    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "first")
    assert idempotency_key(charge, "o-1").startswith("first.")
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "second")
    assert idempotency_key(charge, "o-1").startswith("second.")
    await charge("o-1")
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "third")
    assert idempotency_key(charge, "o-1").startswith("second.")
    await charge("o-1")
    assert await keys_in(layer) == [idempotency_key(charge, "o-1")]


def test_where_there_is_no_key_that_is_an_error() -> None:
    @idempotent_function(config=BY_ID, data_keyword_argument="order")
    async def charge(order: dict[str, str]) -> None: ...

    with pytest.raises(IdempotencyKeyError, match="no idempotency key was found by event_key_jmespath='id'"):
        idempotency_key(charge, {"ID": "7"})
    with pytest.raises(IdempotencyKeyError):
        block_key("")
    with pytest.raises(TypeError, match="charge"):
        idempotency_key(charge)


def test_a_function_that_is_not_decorated_has_no_key() -> None:
    async def charge(order_id: str) -> None: ...

    with pytest.raises(IdempotencyUsageError, match=r"charge is not decorated .* aidem\.block_key"):
        idempotency_key(charge, "o-1")
    with pytest.raises(IdempotencyUsageError, match="partial is not decorated"):
        idempotency_key(functools.partial(charge, "o-1"))


async def test_the_key_of_a_block_is_the_one_that_it_is_stored_under() -> None:
    layer = MemoryPersistenceLayer()
    config = IdempotencyConfig(hash_function="md5", event_key_jmespath="id")
    async with aidem.idempotency({"id": 7}, persistence_store=layer, config=config, key_prefix="pay") as execution:
        assert not execution.replayed
    assert await keys_in(layer) == [block_key({"id": 7}, key_prefix="pay", config=config)]
    with pytest.raises(IdempotencyConfigError, match="key_prefix"):
        block_key(7, key_prefix=7)  # type: ignore[arg-type]


# --- Notes ------------------------------------------------------------------------------------------------------------


async def test_a_note_is_made_of_the_payload_and_stored_with_claim_and_outcome() -> None:
    layer = MemoryPersistenceLayer()
    seen = list[str | None]()

    @idempotent_function(
        persistence_store=layer,
        data_keyword_argument="order",
        config=IdempotencyConfig(note=lambda order: f"order {order['id']}, {'x' * 300}"),
    )
    async def charge(order: dict[str, int]) -> None:
        seen.append(next(iter(layer.records().values())).note)

    await charge({"id": 7})
    note = f"order 7, {'x' * 247}"
    assert len(note) == 256
    assert seen == [note] == [record.note async for record in layer.scan()]


@pytest.mark.parametrize(("payload", "note"), [(..., "key 7"), ({"id": 8}, "payload 8")])
async def test_the_note_of_a_block_is_made_of_its_payload_or_else_of_its_key(payload: Any, note: str) -> None:
    layer = MemoryPersistenceLayer()
    config = IdempotencyConfig(note=lambda each: f"payload {each['id']}" if isinstance(each, dict) else f"key {each}")
    async with aidem.idempotency(7, payload=payload, persistence_store=layer, config=config) as execution:
        assert not execution.replayed
    assert [record.note async for record in layer.scan()] == [note]


@pytest.mark.parametrize(
    ("note", "said"),
    [
        (lambda _payload: 1 / 0, "note of .*charge raised ZeroDivisionError; the claim has none"),
        (lambda _payload: 7, "note of .*charge returned no string but int; the claim has none"),
        (lambda _payload: None, ""),
        (lambda _payload: "", ""),
    ],
    ids=["fails", "no string", "none", "empty"],
)
async def test_a_note_that_cannot_be_made_stops_no_call(
    note: Callable[[Any], Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = MemoryPersistenceLayer()

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(note=note))
    async def charge(order_id: str) -> int:
        return 42

    assert await charge("o-1") == 42
    assert [record.note async for record in layer.scan()] == [None]
    assert len(caplog.messages) == bool(said)
    assert re.search(said, "".join(caplog.messages))


async def test_a_note_that_no_store_could_encode_is_stored_all_the_same() -> None:
    layer = MemoryPersistenceLayer()

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(note=lambda _payload: "\ud800 7"))
    async def charge(order_id: str) -> None: ...

    await charge("o-1")
    assert [record.note async for record in layer.scan()] == ["? 7"]


def test_a_note_is_made_by_a_plain_function() -> None:
    async def note(payload: object) -> str:
        return ""

    for wrong in (note, "order", 7):
        with pytest.raises(IdempotencyConfigError, match=r"note=.* must be a callable that is not async"):
            IdempotencyConfig(note=wrong)  # type: ignore[arg-type]


# --- HTTP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [None, "client 7"])
@pytest.mark.parametrize("header", ['"a-1"', "a-1"])
async def test_the_key_of_a_request_is_the_one_that_it_is_stored_under(caller: str | None, header: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [JSON]})
        await send({"type": "http.response.body", "body": b"{}"})

    layer = MemoryPersistenceLayer()
    config = IdempotencyConfig(hash_function="md5", note=lambda scope: scope["path"])
    middleware = IdempotencyMiddleware(
        app,
        key_prefix="shop",
        scope=None if caller is None else lambda _scope: caller,
        persistence_store=layer,
        config=config,
    )
    connection = Connection([b""])
    await middleware(scope_of(key=header.encode()), connection.receive, cast("Any", connection.send))
    assert await keys_in(layer) == [request_key(header, key_prefix="shop", scope=caller, config=config)]
    assert [record.note async for record in layer.scan()] == ["/payments"]


async def test_layers_with_other_notes_serve_a_request_once() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [JSON]})
        await send({"type": "http.response.body", "body": b"{}"})

    layer = MemoryPersistenceLayer()
    wrapped: Any = app
    for note in ("inner", "outer"):
        config = IdempotencyConfig(note=lambda _scope, note=note: note)  # type: ignore[misc]
        wrapped = IdempotencyMiddleware(wrapped, key_prefix="shop", scope=None, persistence_store=layer, config=config)
    connection = Connection([b""])
    await wrapped(scope_of(), connection.receive, cast("Any", connection.send))
    assert connection.response.status == 200
    assert [record.note async for record in layer.scan()] == ["outer"]


def test_a_header_that_names_no_key_has_none() -> None:
    for header in ("", '"', "a b", "x" * 256, "ü"):
        with pytest.raises(IdempotencyKeyError, match="this header names no idempotency key"):
            request_key(header, key_prefix="shop")
    with pytest.raises(IdempotencyConfigError, match="scope"):
        request_key("a", key_prefix="shop", scope=len)  # type: ignore[arg-type]
