"""What the OpenAPI document says holds for requests that are made from it: valid ones, and others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
import schemathesis
from fastapi import Body, FastAPI, HTTPException, Path
from hypothesis import HealthCheck, settings
from pydantic import BaseModel, ConfigDict, Field
from schemathesis.config import SchemathesisConfig

from aidem.fastapi import IdempotentRoute, by_header
from aidem.persistence.memory import MemoryPersistenceLayer

pytestmark = pytest.mark.timeout(180)
EXAMPLES = 30
CALLER = "X-Caller"


# Only strings: pydantic takes "1" for an integer, and JSON Schema takes 1.0 for one.
Amount = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}$")]


class Payment(BaseModel):
    model_config = ConfigDict(extra="forbid")

    order_id: Annotated[str, Field(min_length=1, max_length=20)]
    cents: Amount
    currency: Literal["EUR", "CHF"] = "EUR"


class Receipt(Payment):
    number: int


PaymentId = Annotated[str, Path(pattern=r"^p-[0-9]{1,3}$")]
# What FastAPI answers to a body that is no text, and does not tell in its document.
UNREADABLE: dict[str, Any] = {"description": "Unreadable", "content": {"application/json": {}}}
numbers = itertools.count(1)


def shop(*, required: bool, strict: bool) -> FastAPI:
    """Return an app whose every caller has a space of keys to itself."""
    app = FastAPI()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="shop",
        scope=by_header(CALLER),
        persistence_store=MemoryPersistenceLayer(),
        required=required,
        strict=strict,
    )

    @app.post("/payments", status_code=201, responses={400: UNREADABLE})
    async def create_payment(payment: Payment) -> Receipt:
        return Receipt(**payment.model_dump(), number=next(numbers))

    @app.patch("/payments/{payment_id}", responses={400: UNREADABLE, 404: {"description": "No such payment"}})
    async def change_payment(payment_id: PaymentId, cents: Annotated[Amount, Body(embed=True)]) -> Receipt:
        if payment_id.endswith("0"):
            raise HTTPException(404, f"no payment {payment_id}, attempt {next(numbers)}")
        return Receipt(order_id="o", cents=cents, number=next(numbers))

    @app.get("/count")
    async def count() -> int:
        return next(numbers)

    return app


def schema_of(app: FastAPI) -> Any:
    config = SchemathesisConfig.from_dict({"seed": 1, "generation": {"deterministic": True, "max-examples": EXAMPLES}})
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config)


callers = itertools.count(1)
seen = set[int]()
bounded = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
# Only of a test with a parameter does pytest put the operation into the id; xdist drops tests that have the same.
named = pytest.mark.parametrize("calls", [2], ids=["twice"])
lenient = schema_of(shop(required=False, strict=False))
strict = schema_of(shop(required=True, strict=True))


def call_again(case: schemathesis.Case, calls: int) -> None:
    """Send a request and repeat it: all answers are as the document says, and a final one is replayed."""
    caller = {CALLER: str(next(callers))}
    first, second = (case.call(headers=caller) for _ in range(calls))
    for response in (first, second):
        case.validate_response(response, headers=caller)
    has_key = "idempotency-key" in {name.lower() for name in case.headers}
    is_of_the_app = first.headers["content-type"] == ["application/json"] and first.status_code not in {405, 422}
    if has_key and is_of_the_app and case.method in {"POST", "PATCH"}:
        seen.add(first.status_code)
        assert second.headers.get("idempotent-replayed") == ["true"]
        assert (second.status_code, second.content) == (first.status_code, first.content)
    else:
        assert "idempotent-replayed" not in second.headers


@pytest.fixture(scope="module", autouse=True)
def not_in_vain() -> Iterator[None]:
    """Make sure that, among all requests, there were such as could be replayed."""
    yield
    assert seen


@lenient.parametrize()
@named
@bounded
def test_a_service_is_as_its_document_says(case: schemathesis.Case, calls: int) -> None:
    call_again(case, calls)


@strict.parametrize()
@named
@bounded
def test_a_service_that_demands_quoted_keys_is_as_its_document_says(case: schemathesis.Case, calls: int) -> None:
    call_again(case, calls)
