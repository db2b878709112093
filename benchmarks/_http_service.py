"""The services that are compared: one route, bare or made idempotent in one of the ways; `SIDE` says which.

SIDE=bare REDIS_URL=redis://… uvicorn benchmarks._http_service:app
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Header
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem.persistence import PersistenceLayer

REDIS_URL = os.environ.get("REDIS_URL", "")


class Payment(BaseModel):
    order_id: str
    cents: int
    currency: str


class Receipt(BaseModel):
    payment: Payment
    paid: bool


async def create_payment(payment: Payment) -> Receipt:
    return Receipt(payment=payment, paid=True)


async def cpu_seconds() -> float:
    """Return the CPU time that this process has taken so far."""
    return time.process_time()


def bare() -> FastAPI:
    app = FastAPI()
    app.get("/cpu")(cpu_seconds)
    app.post("/payments", status_code=201)(create_payment)
    return app


def route(layer: PersistenceLayer | None = None) -> FastAPI:
    """Return the service with `IdempotentRoute`; its layer is Redis unless one is given."""
    from aidem.fastapi import IdempotentRoute, by_header

    if layer is None:
        from aidem.persistence.redis import RedisPersistenceLayer

        layer = RedisPersistenceLayer(REDIS_URL)
    app = FastAPI()
    app.get("/cpu")(cpu_seconds)
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="payments", scope=by_header("authorization"), persistence_store=layer
    )
    app.post("/payments", status_code=201)(create_payment)
    return app


def function() -> FastAPI:
    from aidem import idempotent_function
    from aidem.persistence.redis import RedisPersistenceLayer

    app = FastAPI()
    app.get("/cpu")(cpu_seconds)

    @app.post("/payments", status_code=201)
    @idempotent_function(
        key=lambda payment, authorization, idempotency_key: [authorization, idempotency_key],  # noqa: ARG005 - by name
        persistence_store=RedisPersistenceLayer(REDIS_URL),
    )
    async def create_payment(
        payment: Payment,
        authorization: Annotated[str, Header()],  # noqa: ARG001 - part of the key
        idempotency_key: Annotated[str, Header()],  # noqa: ARG001 - part of the key
    ) -> Receipt:
        return Receipt(payment=payment, paid=True)

    return app


def idemkit() -> Any:
    from idemkit import HttpConfig, IdempotencyMiddleware, RedisBackend

    config = HttpConfig(scope=lambda request: request.headers["authorization"])
    return IdempotencyMiddleware(bare(), backend=RedisBackend.from_url(REDIS_URL), config=config)


SIDES: dict[str, Callable[[], Any]] = {"bare": bare, "route": route, "function": function, "idemkit": idemkit}
app = SIDES[os.environ.get("SIDE", "bare")]()
