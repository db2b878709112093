"""What type checkers make of the options of the HTTP layer; mypy and pyright read it, nothing runs it."""

from __future__ import annotations

from typing import assert_type

from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware

from aidem.asgi import IdempotencyMiddleware, IdempotencyOptions, Problem, RequestParts, by_header
from aidem.fastapi import IdempotentRoute


def problem_body(problem: Problem, scope: object) -> tuple[bytes, str]:
    assert_type(problem.status, int)
    assert_type(problem.retry_after_seconds, int | None)
    return problem.title.encode(), "text/plain"


def fingerprint(request: RequestParts) -> bytes | None:
    assert_type(request.body, bytes)
    assert_type(request.content_type, str)
    return request.body or None


async def caller(scope: object) -> str | None:
    return None


options: IdempotencyOptions = {"key_prefix": "shop", "scope": by_header("authorization", "x-tenant")}

app = Starlette()
IdempotencyMiddleware(app, **options)
IdempotencyMiddleware(app, key_prefix="shop", scope=None, problem_body=problem_body, fingerprint=fingerprint)
IdempotencyMiddleware(app, key_prefix="shop")  # type: ignore[call-arg]
IdempotencyMiddleware(app, key_prefix="shop", scope=None, metods=["PUT"])  # type: ignore[call-arg]
IdempotencyMiddleware(app, key_prefix="shop", scope="authorization")  # type: ignore[arg-type]
IdempotencyMiddleware(app, key_prefix="shop", scope=None, problem_body=fingerprint)  # type: ignore[arg-type]

Middleware(IdempotencyMiddleware, key_prefix="shop", scope=caller, required=True)
Middleware(IdempotencyMiddleware, key_prefix="shop")  # type: ignore[call-arg]
app.add_middleware(IdempotencyMiddleware, key_prefix="shop", scope=caller)
app.add_middleware(IdempotencyMiddleware, key_prefix="shop", scope=caller, required="yes")  # type: ignore[arg-type]
FastAPI().add_middleware(IdempotencyMiddleware, **options)

assert_type(IdempotentRoute.configure(key_prefix="shop", scope=None, required=True), type[IdempotentRoute])
IdempotentRoute.configure(scope=None)  # type: ignore[call-arg]
APIRouter(route_class=IdempotentRoute.configure(**options))
by_header()  # type: ignore[call-arg]
