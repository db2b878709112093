"""Whose key it is: scopes of headers and of tokens, requests of nobody, and what a scope function raises."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import jwt
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aidem.asgi import IdempotencyMiddleware, by_header
from aidem.exceptions import IdempotencyConfigError, IdempotencyWarning
from aidem.fastapi import IdempotentRoute
from aidem.hooks import EventKind
from tests.support.asgi import JSON, Connection, Shop, front_of, request, scope_of
from tests.support.fastapi import served
from tests.support.planned import VIRTUAL_TIME, PlannedLayer

AUTHORIZATION, TENANT = b"authorization", b"x-tenant"
SECRET = "a secret of at least thirty-two bytes"


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


# --- by_header --------------------------------------------------------------------------------------------------------


def space(*names: str, **headers: bytes | list[bytes]) -> Any:
    """Return what the scope of some headers says of a request with these."""
    pairs = [
        (name.replace("_", "-").encode(), value)
        for name, values in headers.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    return by_header(*names)(scope_of(headers=pairs))


def test_the_scope_of_one_header_is_what_it_always_was() -> None:
    written = (10).to_bytes(8, "big") + b"Bearer ann"
    assert space("authorization", authorization=b"Bearer ann") == hashlib.sha256(written).hexdigest()


def test_every_header_of_a_scope_counts() -> None:
    both = ("authorization", "X-Tenant")
    spaces = [
        space("authorization", authorization=b"ann", x_tenant=b"acme"),
        space(*both, authorization=b"ann", x_tenant=b"acme"),
        space(*both, authorization=b"bob", x_tenant=b"acme"),
        space(*both, authorization=b"ann", x_tenant=b"corp"),
        space(*both, authorization=b"acme", x_tenant=b"ann"),
        space(*both, authorization=b"an", x_tenant=b"nacme"),
        space(*both, authorization=[b"ann", b"acme"], x_tenant=b"acme"),
        space(*both, authorization=b"ann", x_tenant=[b"acme", b"acme"]),
    ]
    assert None not in spaces
    assert len(set(spaces)) == len(spaces)


@pytest.mark.parametrize(
    "headers", [{"authorization": b"ann"}, {"x_tenant": b"acme"}, {"authorization": b"", "x_tenant": b"a"}]
)
def test_a_request_without_one_of_the_headers_has_no_scope(headers: dict[str, bytes]) -> None:
    assert space("authorization", "x-tenant", **headers) is None


@pytest.mark.parametrize("name", ["", "Authorization:", "x tenant", 7, None, "é"])
def test_what_cannot_be_the_name_of_a_header_is_refused(name: Any) -> None:
    for names in ((name,), ("authorization", name)):
        with pytest.raises(IdempotencyConfigError, match="by_header"):
            by_header(*names)


# --- Requests of nobody -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nobody", [None, ""])
async def test_a_key_of_nobody_is_refused_where_keys_are_required(nobody: str | None) -> None:
    shop = Shop()
    front = front_of(shop, scope=lambda _scope: nobody, required=True)
    connection = Connection([b"{}"])
    await front(scope_of(), connection.receive, connection.send)
    response = connection.response
    assert response.status == 400
    assert response.problem["title"] == "The caller of a request with an Idempotency-Key is unknown"
    assert (shop.runs, front.layer.calls, connection.received) == (0, [], 0)


@pytest.mark.parametrize("nobody", [None, ""])
async def test_a_key_of_nobody_runs_unprotected_elsewhere_and_that_is_told(
    nobody: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()
    front = front_of(shop, scope=lambda _scope: nobody)
    for _ in range(3):
        connection, scope = Connection([b"{}"]), scope_of()
        receive, send = connection.receive, connection.send
        await front(scope, receive, send)
        assert shop.scopes[-1] is scope
        assert (shop.receive, shop.send) == (receive, send)
    assert (shop.runs, front.layer.calls) == (3, [])
    assert front.listener.kinds == [EventKind.BYPASSED] * 3
    assert {(event.key, event.function) for event in front.listener.events} == {("", "the HTTP layer 'shop'")}
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "the HTTP layer 'shop' runs a request without idempotency" in record.getMessage()


# --- What a scope function raises -------------------------------------------------------------------------------------

UNAUTHORIZED = HTTPException(401, "Who are you?", {"WWW-Authenticate": "Bearer"})


def refusing(error: Exception) -> Any:
    async def scope(_scope: Any) -> str:
        raise error

    return scope


async def test_an_http_exception_of_a_scope_function_is_the_answer() -> None:
    shop = Shop()
    front = front_of(shop, scope=refusing(UNAUTHORIZED), documentation_url="https://shop.example/errors")
    response = await request(front)
    assert response.status == 401
    assert response.header(b"www-authenticate") == b"Bearer"
    assert response.problem == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "Who are you?",
    }
    assert (shop.runs, front.layer.calls) == (0, [])


@pytest.mark.parametrize(("detail", "status"), [({"code": 7}, 403), ("So it is", 599)])
async def test_the_detail_of_an_http_exception_may_be_anything_and_its_status_too(detail: Any, status: int) -> None:
    response = await request(front_of(Shop(), scope=refusing(HTTPException(status, detail))))
    assert (response.status, response.problem["detail"]) == (status, detail)


async def test_another_exception_of_a_scope_function_goes_on() -> None:
    with pytest.raises(LookupError, match="no such user"):
        await request(front_of(Shop(), scope=refusing(LookupError("no such user"))))


async def test_without_starlette_there_is_no_http_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "starlette.exceptions")
    with pytest.raises(HTTPException):
        await request(front_of(Shop(), scope=refusing(UNAUTHORIZED)))


async def test_an_exception_of_the_app_is_no_answer_of_the_layer() -> None:
    shop = Shop(error=UNAUTHORIZED)
    with pytest.raises(HTTPException):
        await request(front_of(shop))
    assert shop.runs == 1


async def test_a_switch_for_tests_does_not_switch_off_what_a_scope_function_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "1")
    shop = Shop()
    with pytest.warns(IdempotencyWarning):
        response = await request(front_of(shop, scope=refusing(UNAUTHORIZED)))
    assert (response.status, shop.runs) == (401, 0)
    with pytest.warns(IdempotencyWarning):
        response = await request(front_of(shop, scope=refusing(LookupError("no such user"))))
    assert (response.status, shop.runs) == (201, 1)


def in_format_of_app(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def pay(_request: Request) -> Response:
    raise AssertionError("nobody may pay")


def options() -> dict[str, Any]:
    return {"persistence_store": PlannedLayer(), "key_prefix": "shop", "scope": refusing(UNAUTHORIZED)}


async def test_around_an_app_of_starlette_the_layer_answers() -> None:
    app = Starlette(routes=[Route("/payments", pay, methods=["POST"])])
    app.add_middleware(IdempotencyMiddleware, **options())
    response = await request(app)
    assert (response.status, response.problem["detail"]) == (401, "Who are you?")


async def test_around_a_route_of_starlette_the_app_answers_in_its_format() -> None:
    once = Middleware(IdempotencyMiddleware, **options())
    route = Route("/payments", pay, methods=["POST"], middleware=[once])
    response = await request(Starlette(routes=[route], exception_handlers={HTTPException: in_format_of_app}))
    assert (response.status, json.loads(response.body)) == (401, {"error": "Who are you?"})
    assert response.header(b"www-authenticate") == b"Bearer"


@pytest.mark.parametrize("handlers", [{}, {HTTPException: in_format_of_app}], ids=["fastapi's", "own"])
async def test_in_a_route_of_fastapi_the_app_answers_in_its_format(handlers: dict[Any, Any]) -> None:
    app = FastAPI(exception_handlers=handlers)
    app.router.route_class = IdempotentRoute.configure(**options())
    app.post("/payments")(lambda: None)
    async with served(app) as client:
        response = await client.post("/payments", headers={"Idempotency-Key": "k-1"})
    assert response.status_code == 401
    assert response.json() == {"error" if handlers else "detail": "Who are you?"}
    assert response.headers["WWW-Authenticate"] == "Bearer"


# --- Tokens -----------------------------------------------------------------------------------------------------------


def tenant_and_subject(scope: Any) -> str | None:
    authorization = dict(scope["headers"]).get(AUTHORIZATION, b"").decode("latin-1")
    try:
        claims = jwt.decode(authorization.removeprefix("Bearer "), SECRET, algorithms=["HS256"])
        return json.dumps([claims["tenant"], claims["sub"]])
    except (jwt.InvalidTokenError, KeyError) as error:
        raise HTTPException(401, "Invalid token", {"WWW-Authenticate": "Bearer"}) from error


def bearer(secret: str = SECRET, **claims: Any) -> list[tuple[bytes, bytes]]:
    token = jwt.encode({"exp": 4_000_000_000, "tenant": "acme", "sub": "ann"} | claims, secret, algorithm="HS256")
    return [JSON, (AUTHORIZATION, f"Bearer {token}".encode())]


async def test_a_scope_of_a_token_survives_that_the_token_is_renewed_and_one_of_its_header_does_not() -> None:
    for scope, runs in ((tenant_and_subject, 1), (by_header("authorization"), 2)):
        shop = Shop()
        front = front_of(shop, scope=scope, required=True)
        for expiry in (4_000_000_000, 4_000_000_001):
            response = await request(front, headers=bearer(exp=expiry))
            assert response.status == 201
        assert (shop.runs, response.is_replay) == (runs, runs == 1)


async def test_another_tenant_or_subject_is_another_caller_and_a_forged_token_is_nobody() -> None:
    shop = Shop()
    front = front_of(shop, scope=tenant_and_subject)
    for claims in ({}, {"sub": "bob"}, {"tenant": "corp"}, {"tenant": 'acme", "ann', "sub": ""}):
        assert not (await request(front, headers=bearer(**claims))).is_replay
    assert shop.runs == 4
    for forged in (bearer("another secret of at least thirty-two bytes"), bearer(exp=1), [JSON]):
        assert (await request(front, headers=forged)).status == 401
    assert shop.runs == 4


async def test_a_scope_may_be_what_authentication_further_out_has_found() -> None:
    shop = Shop()
    inner = front_of(shop, scope=lambda scope: scope["user"])

    async def authenticated(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope | {"user": dict(scope["headers"])[AUTHORIZATION].decode()}, receive, send)

    for name in (b"ann", b"bob", b"ann"):
        last = await request(authenticated, headers=[JSON, (AUTHORIZATION, name)])
    assert (shop.runs, last.is_replay) == (2, True)
