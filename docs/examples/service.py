"""A payment service on FastAPI: whoever retries a POST with the same `Idempotency-Key` is charged once.

    uvicorn service:app --workers 4

Records are kept where AIDEM_PERSISTENCE says, such as redis://localhost:6379/0, else in an SQLite file that all workers
of this machine share.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from aidem import IdempotencyConfig, current_execution
from aidem.fastapi import IdempotentRoute
from aidem.persistence import open_persistence_layer

CUSTOMERS = {"Bearer token-of-ann": "ann", "Bearer token-of-bob": "bob"}  # stands for your identity provider
bank_log = Path(os.environ.get("BANK_LOG", "bank.log"))
layer = open_persistence_layer(os.environ.get("AIDEM_PERSISTENCE", "sqlite:///payments.sqlite3"))


class Authentication:
    """Finds out who sends a request, before the idempotency layer asks whose key it carries."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            token = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            scope["customer"] = CUSTOMERS.get(token)
        await self.app(scope, receive, send)


def customer_of(scope: MutableMapping[str, Any]) -> str:
    """Return the customer, who stays the same when the token is renewed; the idempotency layer asks first."""
    customer: str | None = scope["customer"]
    if customer is None:
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})
    return customer


def authenticated(request: Request) -> str:
    """Return the customer to a route."""
    return customer_of(request.scope)


class Payment(BaseModel):
    order_id: str
    cents: int = Field(gt=0)


class Receipt(BaseModel):
    order_id: str
    cents: int
    bank_reference: str


async def take_money(customer: str, payment: Payment, reference: str) -> None:
    """Stand for the bank: every line in its log is a charge."""
    await asyncio.sleep(0.05)  # the bank takes its time
    line = f"{customer} paid {payment.cents} for {payment.order_id} under {reference}\n"
    await asyncio.to_thread(append, line)


def append(line: str) -> None:
    with bank_log.open("a", encoding="utf-8") as log:
        log.write(line)


payments = APIRouter(
    route_class=IdempotentRoute.configure(
        key_prefix="payments",
        scope=customer_of,
        persistence_store=layer,
        config=IdempotencyConfig(
            expires_after_seconds=24 * 3600,
            wait_timeout_seconds=10,
        ),
        required=True,
    )
)


@payments.post("/payments", status_code=201, responses={401: {"description": "Nobody we know"}})
async def create_payment(payment: Payment, customer: Annotated[str, Depends(authenticated)]) -> Receipt:
    """Charge a customer for an order."""
    reference = current_execution().key_for("bank")  # the same on every attempt: the bank can tell, too
    await take_money(customer, payment, reference)
    return Receipt(order_id=payment.order_id, cents=payment.cents, bank_reference=reference)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with layer:
        yield


app = FastAPI(title="Payments", lifespan=lifespan)
app.add_middleware(Authentication)
app.include_router(payments)
