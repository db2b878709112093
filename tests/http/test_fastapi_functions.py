"""Route functions under `@idempotent_function`: FastAPI still injects, validates and shapes, on a replay too."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pathlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Body, Depends, FastAPI, Header, HTTPException, Path, Request, Response, status
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, computed_field
from pydantic.alias_generators import to_camel

from aidem import IdempotencyConfig, current_execution, idempotent_function
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyKeyError,
    IdempotencyResultUnavailableError,
    IdempotencyWarning,
)
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.serialization import PydanticSerializer
from tests.support.fastapi import ORDER, Bank, Order, PublicReceipt, Receipt, same, served


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    order_id: str
    receipt_number: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def download_url(self) -> str:
        return f"/receipts/{self.receipt_number}"


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture
def app() -> FastAPI:
    return FastAPI()


@pytest.fixture
def layer() -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer()


async def twice(app: FastAPI, **request: Any) -> tuple[httpx.Response, httpx.Response]:
    """Send a request and repeat it."""
    async with served(app) as client:
        first = await client.post("/payments", **request)
        second = await client.post("/payments", **request)
    return first, second


async def test_a_retry_gets_the_same_answer_and_the_body_runs_once(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments", status_code=status.HTTP_201_CREATED)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    first, second = await twice(app, json=ORDER)
    assert first.status_code == 201
    assert first.json() == {"order": {**ORDER, "note": None}, "number": 1}
    assert same(first, second)
    assert bank.charges == ["o-1"]


async def test_another_payload_is_another_call(app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer) -> None:
    @app.post("/payments")
    @idempotent_function(persistence_store=layer)
    async def create_payment(order: Order) -> Receipt:
        return bank.charge(order)

    async with served(app) as client:
        for order_id in ("o-1", "o-2", "o-1"):
            assert (await client.post("/payments", json={**ORDER, "id": order_id})).status_code == 200
    assert bank.charges == ["o-1", "o-2"]


async def test_what_fastapi_refuses_makes_no_record(app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer) -> None:
    @app.post("/payments")
    @idempotent_function(key=lambda order, key: key, persistence_store=layer)
    async def create_payment(order: Order, key: Annotated[str, Header(alias="Idempotency-Key")]) -> Receipt:
        return bank.charge(order)

    async with served(app) as client:
        headers = {"Idempotency-Key": "k-1"}
        refused = await client.post("/payments", json={**ORDER, "amount": "-1"}, headers=headers)
        keyless = await client.post("/payments", json=ORDER)
        accepted = [await client.post("/payments", json=ORDER, headers=headers) for _ in range(2)]
    assert [response.status_code for response in (refused, keyless, *accepted)] == [422, 422, 200, 200]
    assert bank.charges == ["o-1"]


def returns_a_subclass(bank: Bank, order: Order) -> Any:
    return bank.charge(order)


def returns_a_dict(bank: Bank, order: Order) -> Any:
    return bank.charge(order).model_dump(mode="json")


@pytest.mark.parametrize("make", [returns_a_subclass, returns_a_dict])
async def test_a_response_model_filters_a_replay_too(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer, make: Callable[[Bank, Order], Any]
) -> None:
    @app.post("/payments", response_model=PublicReceipt)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Any:
        return make(bank, order)

    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == {"order": {**ORDER, "note": None}, "number": 1}
    assert bank.charges == ["o-1"]


async def test_a_return_annotation_filters_what_is_stored(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    keys = list[str]()

    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> PublicReceipt:
        keys.append(current_execution().key)
        return bank.charge(order)

    first, second = await twice(app, json=ORDER)
    assert "secret" not in first.text + second.text
    record = await layer.get(keys[0])
    assert record is not None
    assert record.response_data is not None
    assert "o-1" in record.response_data
    assert "secret" not in record.response_data


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"response_model_exclude": {"card_token"}}, {"order": {**ORDER, "note": None}, "number": 1}),
        ({"response_model_include": {"number"}}, {"number": 1}),
        ({"response_model_exclude_none": True}, {"order": ORDER, "number": 1, "card_token": "secret"}),
        ({"response_model_exclude_defaults": True}, {"order": ORDER, "number": 1, "card_token": "secret"}),
    ],
    ids=lambda value: next(iter(value)),
)
async def test_the_options_of_a_response_model_hold_for_a_replay_too(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    @app.post("/payments", **options)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Receipt:
        return bank.charge(order)

    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == expected
    assert bank.charges == ["o-1"]


async def test_every_field_of_a_result_counts_as_set(app: FastAPI, layer: MemoryPersistenceLayer) -> None:
    @app.post("/payments", response_model_exclude_unset=True)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Order:
        assert "note" not in order.model_fields_set
        return order

    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == {**ORDER, "note": None}


async def test_a_response_object_is_sent_once_and_cannot_be_replayed(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Any:
        return JSONResponse(bank.charge(order).number, 202)

    async with served(app) as client:
        first = await client.post("/payments", json=ORDER)
        with pytest.raises(IdempotencyResultUnavailableError):
            await client.post("/payments", json=ORDER)
    assert (first.status_code, first.json()) == (202, 1)
    assert bank.charges == ["o-1"]


class Row:
    """Stands for an object of an ORM, which no serializer knows."""

    def __init__(self, number: int) -> None:
        self.number = number


class FromRow(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    number: int


@pytest.mark.parametrize("says", ["return annotation", "output_serializer"])
async def test_an_object_of_an_orm_is_stored_as_the_model_that_the_decorator_knows(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer, says: str
) -> None:
    async def annotated(order: Order) -> FromRow:
        return Row(bank.charge(order).number)  # type: ignore[return-value]

    async def bare(order: Order) -> Any:
        return Row(bank.charge(order).number)

    function = annotated if says == "return annotation" else bare
    serializer = None if says == "return annotation" else PydanticSerializer(FromRow)
    decorate = idempotent_function(persistence_store=layer, key_prefix="orm", output_serializer=serializer)
    app.post("/payments", response_model=FromRow)(decorate(function))

    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == {"number": 1}
    assert bank.charges == ["o-1"]


async def test_a_response_model_alone_does_not_say_how_to_store_an_object_of_an_orm(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments", response_model=FromRow)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Any:
        return Row(bank.charge(order).number)

    async with served(app) as client:
        with pytest.warns(IdempotencyWarning, match="could not be stored"):
            first = await client.post("/payments", json=ORDER)
        with pytest.raises(IdempotencyResultUnavailableError):
            await client.post("/payments", json=ORDER)
    assert first.json() == {"number": 1}
    assert bank.charges == ["o-1"]


async def test_aliases_and_computed_fields_survive_a_replay(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Camel:
        return Camel(order_id=order.id, receipt_number=bank.charge(order).number)

    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == {"orderId": "o-1", "receiptNumber": 1, "downloadUrl": "/receipts/1"}


async def test_lists_and_optional_models_are_answered_as_such(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(persistence_store=layer)
    async def create_payments(orders: list[Order]) -> list[PublicReceipt | None]:
        return [bank.charge(order) if order.amount < 100 else None for order in orders]

    first, second = await twice(app, json=[ORDER, {**ORDER, "amount": "100"}])
    assert first.json() == second.json() == [{"order": {**ORDER, "note": None}, "number": 1}, None]
    assert bank.charges == ["o-1"]


async def test_an_answer_without_a_body_is_replayed_without_one(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments", status_code=status.HTTP_204_NO_CONTENT)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> None:
        bank.charge(order)

    first, second = await twice(app, json=ORDER)
    assert (first.status_code, first.content) == (204, b"")
    assert same(first, second)
    assert bank.charges == ["o-1"]


# --- Dependencies ---------------------------------------------------------------------------------------------------


def sync_user(authorization: Annotated[str, Header()]) -> str:
    return authorization.removeprefix("Bearer ")


async def async_user(authorization: Annotated[str, Header()]) -> str:
    return authorization.removeprefix("Bearer ")


def yielded_user(authorization: Annotated[str, Header()]) -> Iterator[str]:
    yield authorization.removeprefix("Bearer ")


@pytest.mark.parametrize("user_of", [sync_user, async_user, yielded_user])
async def test_a_dependency_runs_on_a_replay_too_and_may_be_the_key(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer, user_of: Callable[..., Any]
) -> None:
    def user_seen(user: str = Depends(user_of)) -> str:
        bank.users.append(user)
        return user

    @app.post("/payments")
    @idempotent_function(key=lambda order, user: [user, order.id], persistence_store=layer)
    async def create_payment(order: Order, user: str = Depends(user_seen)) -> Receipt:  # noqa: FAST002 - a local name
        return bank.charge(order)

    async with served(app) as client:
        for user in ("ann", "ann", "bob"):
            response = await client.post("/payments", json=ORDER, headers={"Authorization": f"Bearer {user}"})
            assert response.status_code == 200
        refused = await client.post("/payments", json=ORDER)
    assert refused.status_code == 422
    assert bank.users == ["ann", "ann", "bob"]
    assert bank.charges == ["o-1", "o-1"]  # one of each user


def refuse_strangers(authorization: Annotated[str, Header()]) -> None:
    if authorization != "Bearer ann":
        raise HTTPException(status.HTTP_403_FORBIDDEN)


async def test_a_stranger_is_refused_a_replay(app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer) -> None:
    @app.post("/payments", dependencies=[Depends(refuse_strangers)])
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Receipt:
        return bank.charge(order)

    async with served(app) as client:
        ann = await client.post("/payments", json=ORDER, headers={"Authorization": "Bearer ann"})
        bob = await client.post("/payments", json=ORDER, headers={"Authorization": "Bearer bob"})
        again = await client.post("/payments", json=ORDER, headers={"Authorization": "Bearer ann"})
    assert [response.status_code for response in (ann, bob, again)] == [200, 403, 200]
    assert bank.charges == ["o-1"]


async def test_overridden_dependencies_are_the_ones_that_count(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(key=lambda order, user: [user, order.id], persistence_store=layer)
    async def create_payment(order: Order, user: Annotated[str, Depends(sync_user)]) -> str:
        bank.charge(order)
        return user

    app.dependency_overrides[sync_user] = lambda: "test user"
    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == "test user"
    assert bank.charges == ["o-1"]


async def test_every_kind_of_parameter_is_injected(app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer) -> None:
    @app.post("/shops/{shop}/payments")
    @idempotent_function(persistence_store=layer)
    async def create_payment(
        shop: Annotated[int, Path(ge=1)],
        order: Annotated[Order, Body(embed=True)],
        currency: str = "EUR",
        *,
        trace: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        bank.charge(order)
        return {"shop": shop, "order": order, "currency": currency, "trace": trace}

    async with served(app) as client:
        url, body = "/shops/7/payments", {"order": ORDER}
        first = await client.post(url, json=body, headers={"Trace": "t-1"})
        second = await client.post(url, json=body, headers={"Trace": "t-1"}, params={"currency": "EUR"})
        other = await client.post(url, json=body, headers={"Trace": "t-1"}, params={"currency": "CHF"})
    assert first.json() == {"shop": 7, "order": {**ORDER, "note": None}, "currency": "EUR", "trace": "t-1"}
    assert second.json() == first.json()
    assert other.json()["currency"] == "CHF"
    assert len(bank.charges) == 2


async def test_what_fastapi_injects_cannot_be_part_of_a_key_by_itself(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(persistence_store=layer)
    async def create_payment(order: Order, request: Request) -> Receipt:
        return bank.charge(order)

    with pytest.raises(IdempotencyKeyError, match=r"\$\.request is of type Request"):
        await twice(app, json=ORDER)
    assert bank.charges == []


async def test_a_named_payload_lets_fastapi_inject_whatever_it_can(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(
        order: Order, request: Request, response: Response, background_tasks: BackgroundTasks
    ) -> Receipt:
        assert request.url.path == "/payments"
        background_tasks.add_task(bank.users.append, "notified")
        response.headers["Location"] = "/payments/1"
        return bank.charge(order)

    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json()
    assert first.headers["Location"] == "/payments/1"
    assert "Location" not in second.headers  # set by a body that does not run again
    assert bank.users == ["notified"]
    assert bank.charges == ["o-1"]


async def test_a_background_task_that_fails_leaves_the_answer_as_it_is(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    def fail() -> None:
        raise ConnectionError("the mail server is down")

    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order, background_tasks: BackgroundTasks) -> Receipt:
        background_tasks.add_task(fail)
        return bank.charge(order)

    async with served(app, raises=False) as client:
        first = await client.post("/payments", json=ORDER)
        second = await client.post("/payments", json=ORDER)
    assert same(first, second)
    assert bank.charges == ["o-1"]


async def test_what_a_dependency_does_after_the_body_is_outside_of_the_claim(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    async def transaction() -> AsyncGenerator[None]:
        yield
        raise ConnectionError("the database is down, so nothing is committed")

    @app.post("/payments", dependencies=[Depends(transaction, scope="function")])
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Receipt:
        return bank.charge(order)

    async with served(app, raises=False) as client:
        answers = [(await client.post("/payments", json=ORDER)).status_code for _ in range(2)]
    assert answers == [500, 500]
    assert bank.charges == ["o-1"]  # the body was done, so it does not run again


# --- Failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "answer"), [(HTTPException(402, "no funds"), 402), (ConnectionError("the bank is down"), 500)], ids=repr
)
async def test_a_body_that_fails_gives_its_key_back(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer, error: Exception, answer: int
) -> None:
    errors = [error]

    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Receipt:
        if errors:
            raise errors.pop()
        return bank.charge(order)

    async with served(app, raises=False) as client:
        answers = [(await client.post("/payments", json=ORDER)).status_code for _ in range(3)]
    assert answers == [answer, 200, 200]
    assert bank.charges == ["o-1"]


async def test_an_http_exception_may_be_the_outcome(app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer) -> None:
    @app.post("/payments")
    @idempotent_function(
        data_keyword_argument="order",
        persistence_store=layer,
        config=IdempotencyConfig(stored_exceptions=(HTTPException,)),
    )
    async def create_payment(order: Order) -> Receipt:
        bank.charge(order)
        raise HTTPException(402, f"no funds, attempt {len(bank.charges)}")

    first, second = await twice(app, json=ORDER)
    assert (first.status_code, first.json()) == (402, {"detail": "no funds, attempt 1"})
    assert same(first, second)
    assert bank.charges == ["o-1"]


async def test_errors_of_aidem_become_answers_by_an_exception_handler(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    @app.exception_handler(IdempotencyAlreadyInProgressError)
    async def answer_conflict(request: Request, error: IdempotencyError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409, {"Retry-After": "1"})

    @app.post("/payments")
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def create_payment(order: Order) -> Receipt:
        entered.set()
        await leave.wait()
        return bank.charge(order)

    async with served(app) as client:
        first = asyncio.create_task(client.post("/payments", json=ORDER))
        await entered.wait()
        refused = await client.post("/payments", json=ORDER)
        leave.set()
        assert (await first).status_code == 200
    assert (refused.status_code, refused.headers["Retry-After"]) == (409, "1")
    assert bank.charges == ["o-1"]


async def test_callers_that_wait_get_the_answer_of_the_first(
    app: FastAPI, bank: Bank, layer: MemoryPersistenceLayer
) -> None:
    @app.post("/payments")
    @idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=IdempotencyConfig(wait_timeout_seconds=30)
    )
    async def create_payment(order: Order) -> Receipt:
        await asyncio.sleep(0.01)
        return bank.charge(order)

    async with served(app) as client:
        responses = await asyncio.gather(*(client.post("/payments", json=ORDER) for _ in range(20)))
    assert {response.content for response in responses} == {responses[0].content}
    assert responses[0].json()["number"] == 1
    assert bank.charges == ["o-1"]


# --- Around the function --------------------------------------------------------------------------------------------


def service(path: pathlib.Path, bank: Bank) -> FastAPI:
    """Return a service as a process makes it when it starts."""
    layer = SQLitePersistenceLayer(path)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with layer:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/payments", status_code=201)
    @idempotent_function(data_keyword_argument="order", persistence_store=layer, key_prefix="payments")
    async def create_payment(order: Order) -> Receipt:
        return bank.charge(order)

    return app


async def test_a_retry_after_a_restart_gets_the_same_answer(tmp_path: pathlib.Path, bank: Bank) -> None:
    answers = list[httpx.Response]()
    for _ in range(2):
        app = service(tmp_path / "aidem.sqlite3", bank)
        async with app.router.lifespan_context(app), served(app) as client:
            answers.append(await client.post("/payments", json=ORDER))
    assert same(*answers)
    assert answers[0].status_code == 201
    assert bank.charges == ["o-1"]


async def test_the_openapi_document_is_that_of_the_bare_function(layer: MemoryPersistenceLayer) -> None:
    def document(decorate: Callable[[Any], Any]) -> dict[str, Any]:
        app = FastAPI()

        @app.post("/payments/{shop}", status_code=201)
        @decorate
        async def create_payment(
            shop: int,
            order: Order,
            key: Annotated[str, Header(alias="Idempotency-Key")],
            user: Annotated[str, Depends(sync_user)],
        ) -> Receipt:
            """Take money."""
            raise NotImplementedError

        return app.openapi()

    bare = document(lambda function: function)
    assert "Take money." in str(bare)
    assert document(idempotent_function(key=lambda key, **_: key, persistence_store=layer)) == bare


async def test_a_method_of_an_object_may_be_a_route(app: FastAPI, layer: MemoryPersistenceLayer) -> None:
    numbers = itertools.count(1)

    class Till:
        @idempotent_function(data_keyword_argument="order", persistence_store=layer)
        async def create_payment(self, order: Order) -> int:
            return next(numbers)

    app.post("/payments")(Till().create_payment)
    first, second = await twice(app, json=ORDER)
    assert first.json() == second.json() == 1
