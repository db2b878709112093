"""Which requests are touched, what is read of them, whose key it is, and what is refused."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

import aidem
from aidem import IdempotencyConfig, current_execution
from aidem._http.request import PIECE_BYTES
from aidem.asgi import IdempotencyMiddleware, by_header
from aidem.exceptions import IdempotencyPersistenceConnectionError, IdempotencyUsageError, IdempotencyWarning
from aidem.hooks import EventKind
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.asgi import JSON, KEY, Connection, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer

DOWN = IdempotencyPersistenceConnectionError("down")


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


# --- What is touched --------------------------------------------------------------------------------------------------


async def test_a_request_with_a_key_runs_once_and_its_response_is_replayed() -> None:
    shop = Shop()
    front = front_of(shop)
    first = await request(front, body=b'{"amount": 42}')
    second = await request(front, body=b'{"amount": 42}')
    assert shop.bodies == [b'{"amount": 42}']
    assert not first.is_replay
    assert second.is_replay
    assert first.status == second.status == 201
    assert first.body == second.body == b'{"paid": 42}'
    assert front.listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
async def test_other_methods_stream_through_untouched(method: str) -> None:
    shop = Shop()
    front = front_of(shop)
    connection, scope = Connection([b"{}"]), scope_of(method)
    receive, send = connection.receive, connection.send
    await front(scope, receive, send)
    assert (shop.scopes[0], shop.receive, shop.send) == (scope, receive, send)
    assert shop.scopes[0] is scope
    assert front.layer.calls == []


async def test_a_request_without_a_key_streams_through_untouched() -> None:
    shop = Shop()
    front = front_of(shop)
    connection, scope = Connection([b"{}"]), scope_of(key=None)
    receive, send = connection.receive, connection.send
    await front(scope, receive, send)
    assert shop.scopes[0] is scope
    assert (shop.receive, shop.send) == (receive, send)
    assert front.layer.calls == []


@pytest.mark.parametrize("kind", ["websocket", "another"])
async def test_what_is_not_http_streams_through_untouched(kind: str) -> None:
    seen: list[Any] = []

    async def app(*given: Any) -> None:
        seen.extend(given)

    scope = {"type": kind, "headers": [(b"idempotency-key", KEY)]}
    connection = Connection([])
    receive, send = connection.receive, connection.send
    await front_of(app, required=True)(scope, receive, send)
    assert seen == [scope, receive, send]


async def test_the_methods_are_those_that_were_chosen() -> None:
    shop = Shop()
    front = front_of(shop, methods=["delete"])
    for method in ("DELETE", "DELETE", "POST", "POST"):
        await request(front, method)
    assert [scope["method"] for scope in shop.scopes] == ["DELETE", "POST", "POST"]


@pytest.mark.parametrize("method", ["post", "Patch"])
async def test_a_method_counts_however_it_is_written_as_some_servers_and_frameworks_let_it(method: str) -> None:
    shop = Shop()
    front = front_of(shop, required=True)
    assert (await request(front, method, key=None)).problem["title"] == "Idempotency-Key is missing"
    assert not (await request(front, method)).is_replay
    assert (await request(front, method)).is_replay
    assert [scope["method"] for scope in shop.scopes] == [method]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_by_default_the_methods_are_post_and_patch(method: str) -> None:
    shop = Shop()
    front = front_of(shop)
    await request(front, method)
    assert (await request(front, method)).is_replay


# --- The key ----------------------------------------------------------------------------------------------------------


async def test_a_missing_key_is_refused_where_it_is_required() -> None:
    shop = Shop()
    front = front_of(shop, required=True)
    response = await request(front, key=None)
    assert response.status == 400
    assert response.problem["title"] == "Idempotency-Key is missing"
    assert (await request(front, "GET", key=None)).status == 201
    assert (await request(front)).status == 201
    assert shop.runs == 2


@pytest.mark.parametrize("key", [b"", b'""', b"a,b", b'"a";p', b"k" * 256, b"\xff", b'"\0"'])
async def test_a_malformed_key_is_refused_before_anything_is_read_or_stored(key: bytes) -> None:
    shop = Shop()
    front = front_of(shop)
    connection = Connection([b"{}"])
    await front(scope_of(key=key), connection.receive, connection.send)
    assert connection.response.status == 400
    assert connection.response.problem["title"] == "Idempotency-Key is malformed"
    assert (shop.runs, front.layer.calls, connection.received) == (0, [], 0)


async def test_two_keys_are_refused() -> None:
    shop = Shop()
    response = await request(front_of(shop), headers=[JSON, (b"idempotency-key", KEY)])
    assert response.status == 400
    assert "more than once" in response.problem["detail"]
    assert shop.runs == 0


async def test_a_bare_key_is_the_same_as_a_quoted_one_unless_the_layer_is_strict() -> None:
    shop = Shop()
    front, strict = front_of(shop), front_of(shop, strict=True)
    await request(front, key=b'"order-7"')
    assert (await request(front, key=b"order-7")).is_replay
    assert (await request(strict, key=b"order-7")).status == 400
    assert (await request(strict, key=b'"order-7"')).status == 201


def test_another_event_loop_than_asyncios_is_refused() -> None:
    connection = Connection([b"{}"])
    coroutine = front_of(Shop())(scope_of(), connection.receive, connection.send)
    with pytest.raises(IdempotencyUsageError, match="aidem needs asyncio"):
        coroutine.send(None)


# --- Whose key it is --------------------------------------------------------------------------------------------------


async def test_another_caller_with_the_same_key_is_another_request() -> None:
    shop = Shop()
    front = front_of(shop, scope=by_header("authorization"))
    for caller in (b"ann", b"bob", b"ann"):
        await request(front, headers=[JSON, (b"authorization", caller)])
    assert shop.runs == 2


async def test_a_scope_function_may_be_async_and_gets_the_scope_of_the_request() -> None:
    seen: list[Any] = []

    async def tenant(scope: Any) -> str:
        await asyncio.sleep(1)
        seen.append(scope)
        return str(scope["state"]["tenant"])

    shop = Shop()
    front = front_of(shop, scope=tenant)
    for name in ("a", "b", "a"):
        await request(front, state={"tenant": name})
    assert shop.runs == 2
    assert seen[0]["path"] == "/payments"


async def test_the_shared_space_is_nobody_elses() -> None:
    shop = Shop()
    layer = PlannedLayer()
    await request(front_of(shop, layer=layer, scope=None))
    await request(front_of(shop, layer=layer, scope=lambda _scope: "None"))
    assert shop.runs == 2


async def test_a_scope_that_is_no_text_is_a_mistake_that_is_named() -> None:
    shop = Shop()
    with pytest.raises(IdempotencyUsageError, match="must return a string"):
        await request(front_of(shop, scope=lambda _scope: 7))
    assert shop.runs == 0


async def test_two_services_with_one_store_do_not_meet() -> None:
    shop, layer = Shop(), PlannedLayer()
    for prefix in ("shop", "bank", "shop"):
        await request(front_of(shop, layer=layer, key_prefix=prefix))
    assert shop.runs == 2
    assert sorted(key.partition("#")[0] for key in layer.inner.records()) == ["bank", "shop"]


# --- What must not change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"body": b'{"amount": 43}'},
        {"query": b"dry_run=1"},
        {"path": "/refunds"},
        {"method": "PATCH"},
        {"headers": [(b"content-type", b"text/plain")]},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_another_request_under_the_same_key_is_refused(other: dict[str, Any]) -> None:
    shop = Shop()
    front = front_of(shop)
    await request(front, body=b'{"amount": 42}')
    response = await request(front, **{"body": b'{"amount": 42}'} | other)
    assert response.status == 422
    assert response.problem["title"] == "Idempotency-Key was used for a different request"
    assert response.header(b"retry-after") is None
    assert shop.runs == 1


async def test_another_request_is_refused_also_while_the_first_one_runs() -> None:
    shop = Shop(seconds=5)
    front = front_of(shop)
    running = asyncio.create_task(request(front))
    await asyncio.sleep(1)
    assert (await request(front, body=b"another")).status == 422
    assert (await running).status == 201


async def test_a_multipart_request_is_replayed_under_another_boundary() -> None:
    shop = Shop()
    front = front_of(shop)
    for boundary in (b"aaa", b"bbbb"):
        body = b"--%b\r\n\r\nfile\r\n--%b--\r\n" % (boundary, boundary)
        last = await request(
            front, body=body, headers=[(b"content-type", b"multipart/form-data; boundary=" + boundary)]
        )
    assert shop.runs == 1
    assert last.is_replay


# --- The body ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks",
    [
        [b""],
        [b"one", b"", b"two"],
        [b"x"] * 10_000,
        [b"a" * 70_000, b"b", b"c" * 70_000, b"d" * 70_000, b""],
    ],
    ids=["empty", "three", "bytes", "large"],
)
async def test_the_body_is_handed_on_unchanged_in_no_more_messages_than_needed(chunks: list[bytes]) -> None:
    shop = Shop()
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not messages or messages[-1]["more_body"]:
            messages.append(await receive())
        await shop(scope, Connection([b""]).receive, send)

    body = b"".join(chunks)
    await request(front_of(app), body=chunks.copy())
    assert b"".join(message["body"] for message in messages) == body
    assert {message["type"] for message in messages} == {"http.request"}
    assert [message["more_body"] for message in messages] == [True] * (len(messages) - 1) + [False]
    assert len(messages) <= 1 + len(body) // PIECE_BYTES


async def test_a_message_without_body_or_more_body_is_an_empty_last_one() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    shop = Shop()
    connection = Connection([])
    await front_of(shop)(scope_of(), receive, connection.send)
    assert shop.bodies == [b""]
    assert connection.response.status == 201


@pytest.mark.parametrize("body", [[b"12345", b"6"], [b"123456"]])
async def test_a_body_that_is_too_large_is_refused_before_anything_is_stored(body: list[bytes]) -> None:
    shop = Shop()
    front = front_of(shop, max_request_bytes=5)
    response = await request(front, body=body)
    assert response.status == 413
    assert response.problem["title"] == "The body is too large for a request with an Idempotency-Key"
    assert (shop.runs, front.layer.calls) == (0, [])
    assert (await request(front, body=b"12345")).status == 201


async def test_a_length_that_is_too_large_is_refused_before_the_client_is_told_to_go_on() -> None:
    shop = Shop()
    front = front_of(shop, max_request_bytes=5)
    connection = Connection([b"123456"])
    await front(scope_of(headers=[(b"content-length", b"6")]), connection.receive, connection.send)
    assert connection.response.status == 413
    assert connection.received == 0


@pytest.mark.parametrize("length", [b"x", b"-1", b"9" * 5000])
async def test_a_length_that_is_none_is_not_believed(length: bytes) -> None:
    shop = Shop()
    assert (await request(front_of(shop), headers=[(b"content-length", length)])).status == 201


async def test_a_request_without_a_key_may_be_of_any_size() -> None:
    shop = Shop()
    assert (await request(front_of(shop, max_request_bytes=5), key=None, body=b"123456")).status == 201


def breaking_off(*chunks: bytes) -> Any:
    """Return the `receive` of a request whose client goes in the middle of its body."""
    left = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else {"type": "http.disconnect"}

    return receive


@pytest.mark.parametrize("chunks", [(), (b"{",)])
async def test_half_a_request_does_not_run_and_is_answered(chunks: tuple[bytes, ...]) -> None:
    shop = Shop()
    front = front_of(shop)
    connection = Connection([])
    await front(scope_of(), breaking_off(*chunks), connection.send)
    assert (shop.runs, front.layer.calls, connection.response.status) == (0, [], 400)
    assert connection.response.problem["title"] == "The request body is incomplete"


async def test_half_a_request_is_no_fault_where_a_server_says_that_nobody_is_there_for_its_answer() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        raise OSError("the client is gone")

    front = front_of(Shop())
    await front(scope_of(), breaking_off(b"{"), send)
    assert (len(sent), front.layer.calls) == (1, [])


async def test_a_server_that_cannot_send_another_refusal_hears_of_its_own_error() -> None:
    async def send(message: Any) -> None:
        raise OSError("the client is gone")

    front = front_of(Shop())
    with pytest.raises(OSError, match="the client is gone"):
        await front(scope_of(key=b'""'), Connection([b"{}"]).receive, send)
    assert front.layer.calls == []


async def test_half_a_request_does_not_make_middleware_further_out_fail() -> None:
    async def pass_on(incoming: Request, call_next: Any) -> Response:
        response: Response = await call_next(incoming)
        return response

    front = front_of(Shop())
    connection = Connection([])
    outer: Any = BaseHTTPMiddleware(front, pass_on)
    await outer(scope_of(), breaking_off(b"{"), connection.send)
    assert connection.response.status == 400
    assert front.layer.calls == []


# --- While another one runs -------------------------------------------------------------------------------------------


async def test_a_request_that_still_runs_is_a_conflict_with_retry_after() -> None:
    shop = Shop(seconds=50)
    front = front_of(shop)
    running = asyncio.create_task(request(front))
    await asyncio.sleep(40)  # longer than its lease, which is renewed
    response = await request(front)
    assert response.status == 409
    assert response.header(b"retry-after") == b"1"
    assert response.problem["title"] == "A request with this Idempotency-Key is in progress"
    assert (await running).status == 201
    assert shop.runs == 1


async def test_whoever_waits_gets_the_response() -> None:
    shop = Shop(seconds=50)
    front = front_of(shop, settings={"wait_timeout_seconds": 60})
    responses = await asyncio.gather(*(request(front) for _ in range(5)))
    assert shop.runs == 1
    assert [response.is_replay for response in responses] == [False, True, True, True, True]
    assert {response.body for response in responses} == {b'{"paid": 42}'}


async def test_whoever_waits_takes_over_from_one_that_failed() -> None:
    shop = Shop(seconds=5, error=ValueError("no"))
    front = front_of(shop, settings={"wait_timeout_seconds": 60})
    failing = asyncio.create_task(request(front))
    await asyncio.sleep(1)
    waiting = asyncio.create_task(request(front))
    with pytest.raises(ValueError, match="no"):
        await failing
    shop.error = None
    assert (await waiting).status == 201
    assert shop.runs == 2


async def test_a_request_in_doubt_is_a_conflict_without_retry_after() -> None:
    shop = Shop()
    front = front_of(shop, settings={"on_abandoned": "raise"})
    shop.error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await request(front)
    response = await request(front)
    assert response.status == 409
    assert response.header(b"retry-after") is None
    assert response.problem["title"] == "It is not known whether the request was processed"


# --- When the store is down -------------------------------------------------------------------------------------------


async def test_when_the_store_is_down_nothing_runs(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    front = front_of(shop, layer=PlannedLayer().plan("acquire", Fault(DOWN)))
    response = await request(front, body=b"secret")
    assert response.status == 503
    assert response.header(b"retry-after") == b"1"
    assert response.problem["title"] == "Idempotency cannot be guaranteed at the moment"
    assert shop.runs == 0
    assert EventKind.PERSISTENCE_ERROR in front.listener.kinds
    assert "the HTTP layer 'shop' refuses a request" in caplog.text
    assert "secret" not in caplog.text
    assert KEY.decode().strip('"') not in caplog.text


async def test_by_option_a_request_runs_unprotected_when_the_store_is_down() -> None:
    shop = Shop()
    layer = PlannedLayer().plan("acquire", Fault(DOWN))
    front = front_of(shop, layer=layer, settings={"on_persistence_error": "run"})
    connection, scope = Connection([b"{}"]), scope_of(extensions={"http.response.pathsend": {}})
    send = connection.send
    await front(scope, connection.receive, send)
    assert connection.response.status == 201
    assert shop.scopes[0] is scope
    assert shop.send == send
    assert shop.bodies == [b"{}"]
    assert (await shop.receive())["type"] == "http.disconnect"
    assert front.listener.kinds == [EventKind.PERSISTENCE_ERROR, EventKind.BYPASSED]


async def test_cancelled_while_it_claims_a_request_leaves_the_key_free() -> None:
    shop = Shop()
    front = front_of(shop, layer=PlannedLayer().plan("acquire", Fault(before_seconds=1)))
    claiming = asyncio.create_task(request(front))
    await asyncio.sleep(0.5)
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert shop.runs == 0
    assert (await request(front)).status == 201


class Interrupting:
    """An observer that is hit by Ctrl-C."""

    def on_event(self, event: Any) -> None:
        if event.kind is EventKind.WAITED:
            raise KeyboardInterrupt


async def test_a_claim_whose_observer_is_interrupted_is_given_back() -> None:
    shop = Shop()
    layer = PlannedLayer()
    config = IdempotencyConfig(hooks=(Interrupting(),), wait_timeout_seconds=60)
    front = IdempotencyMiddleware(shop, persistence_store=layer, config=config, key_prefix="shop", scope=None)
    shop.seconds, shop.error = 5, ValueError("no")
    failing = asyncio.create_task(request(front))
    await asyncio.sleep(1)
    with pytest.raises(KeyboardInterrupt):
        await request(front)
    with pytest.raises(ValueError, match="no"):
        await failing
    assert layer.inner.records() == {}


# --- In the handler, and around it ------------------------------------------------------------------------------------


async def test_the_handler_has_the_execution_and_keys_for_downstream_services() -> None:
    keys: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        keys.append(current_execution().key_for("bank"))
        await Shop()(scope, receive, send)

    async def unfinished(scope: Any, receive: Any, send: Any) -> None:
        keys.append(current_execution().key_for("bank"))

    layer = PlannedLayer()
    await request(front_of(unfinished, layer=layer))
    await request(front_of(app, layer=layer))
    layer.plan("acquire", Fault(DOWN))
    await request(front_of(app, layer=layer, settings={"on_persistence_error": "run"}))
    assert len(keys) == 3
    assert len(set(keys)) == 1


async def test_two_layers_of_one_prefix_around_one_request_are_one() -> None:
    shop, layer = Shop(), PlannedLayer()
    front = front_of(front_of(shop, layer=layer), layer=layer)
    first, second = await request(front), await request(front)
    assert (first.status, second.status, second.is_replay) == (201, 201, True)
    assert shop.bodies == [b"{}"]


async def test_two_layers_of_two_prefixes_around_one_request_both_record_it() -> None:
    layer = PlannedLayer()
    await request(front_of(front_of(Shop(), layer=layer, key_prefix="inner"), layer=layer, key_prefix="outer"))
    assert sorted(key.partition("#")[0] for key in layer.inner.records()) == ["inner", "outer"]


async def test_another_request_under_the_same_key_is_refused_also_from_within() -> None:
    inner: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        inner.append(await request(front, body=b"another"))
        await Shop()(scope, receive, send)

    front = front_of(app)
    await request(front)
    assert [response.status for response in inner] == [422]


async def test_it_can_be_around_one_route_of_starlette_mounted_anywhere() -> None:
    runs: list[str] = []

    async def pay(incoming: Request) -> Response:
        runs.append(incoming.url.path)
        return JSONResponse({"paid": (await incoming.json())["amount"]}, status_code=201)

    once = Middleware(IdempotencyMiddleware, persistence_store=PlannedLayer(), key_prefix="shop", scope=None)
    routes = [Route("/pay", pay, methods=["POST"], middleware=[once]), Route("/free", pay, methods=["POST"])]
    app = Starlette(routes=[Mount("/v1", routes=routes), Mount("/v2", Starlette(routes=routes))])
    body = b'{"amount": 42}'
    first, again = await request(app, path="/v1/pay", body=body), await request(app, path="/v1/pay", body=body)
    assert (first.status, first.body, again.body, again.is_replay) == (201, b'{"paid":42}', b'{"paid":42}', True)
    assert (await request(app, path="/v2/pay", body=body)).status == 422
    for _ in range(2):
        await request(app, path="/v1/free", body=body)
    assert runs == ["/v1/pay", "/v1/free", "/v1/free"]


async def test_a_switch_for_tests_lets_every_request_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "1")
    shop = Shop()
    front = front_of(shop, required=True)
    with pytest.warns(IdempotencyWarning, match="the HTTP layer 'shop' runs without idempotency"):
        await asyncio.gather(request(front), request(front), request(front, key=None))
    assert shop.runs == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await request(front, "GET")


@pytest.mark.parametrize("nobody", [False, True])
async def test_under_the_switch_a_handler_has_its_execution_and_the_same_keys(
    monkeypatch: pytest.MonkeyPatch, nobody: bool
) -> None:
    keys: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        keys.append(current_execution().key)
        await Shop()(scope, receive, send)

    front = front_of(app, scope=lambda scope: None if nobody and len(keys) == 1 else "ann", required=True)
    await request(front)
    monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "1")
    for key in (KEY, None, b'"malformed'):
        with pytest.warns(IdempotencyWarning):
            await request(front, key=key)
    assert keys == [keys[0], "" if nobody else keys[0], "", ""]
    assert keys[0]


async def test_without_a_layer_that_of_configure_is_used_as_it_is_at_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop = Shop()
    front = IdempotencyMiddleware(shop, key_prefix="shop", scope=None)
    for layer in (MemoryPersistenceLayer(), MemoryPersistenceLayer()):
        aidem.configure(persistence_store=layer)
        try:
            await request(front)
            assert (await request(front)).is_replay
        finally:
            aidem.configure()
    assert shop.runs == 2


async def test_the_local_cache_replays_without_the_store() -> None:
    shop = Shop()
    front = front_of(shop, settings={"use_local_cache": True})
    await request(front)
    calls = list(front.layer.calls)
    assert (await request(front)).is_replay
    assert front.layer.calls == calls
