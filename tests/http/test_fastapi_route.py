"""`IdempotentRoute`: every route of a router runs once per key, whatever FastAPI does around it."""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from aidem import AbandonedExecution, DidNotHappen, Happened, IdempotencyConfig, Verdict, current_execution
from aidem.exceptions import IdempotencyConfigError
from aidem.fastapi import IdempotentRoute, by_header
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from tests.support.fastapi import ORDER, ORJSON, UJSON, Bank, Order, PublicReceipt, same, served

KEY = {"Idempotency-Key": '"k-1"'}
REPLAYED = "Idempotent-Replayed"


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture
def layer() -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer()


@pytest.fixture
def route_class(layer: MemoryPersistenceLayer) -> type[IdempotentRoute]:
    return IdempotentRoute.configure(key_prefix="shop", scope=None, persistence_store=layer)


@pytest.fixture
def app(route_class: type[IdempotentRoute]) -> FastAPI:
    app = FastAPI()
    app.router.route_class = route_class
    return app


async def twice(app: FastAPI, path: str = "/payments", **request: Any) -> tuple[httpx.Response, httpx.Response]:
    """Send a request with a key, and repeat it."""
    async with served(app, raises=False) as client:
        request = {"json": ORDER, "headers": KEY} | request
        first = await client.post(path, **request)
        return first, await client.post(path, **request)


def is_replay(first: httpx.Response, second: httpx.Response) -> bool:
    """Whether the second is the first again, and is marked as such."""
    marked = second.headers.pop(REPLAYED, "") == "true"
    return marked and REPLAYED not in first.headers and same(first, second)


# --- One run for each key -------------------------------------------------------------------------------------------


async def test_a_retry_gets_the_recorded_response(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments", status_code=201, response_model=PublicReceipt)
    async def create_payment(order: Order, response: Response) -> Any:
        response.headers["Location"] = "/payments/1"
        return bank.charge(order)

    first, second = await twice(app)
    assert (first.status_code, first.headers["Location"]) == (201, "/payments/1")
    assert first.json() == {"order": {**ORDER, "note": None}, "number": 1}
    assert is_replay(first, second)
    assert bank.charges == ["o-1"]


async def test_without_a_key_a_request_runs_each_time(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    first, second = await twice(app, headers={})
    assert [first.json()["number"], second.json()["number"]] == [1, 2]


async def test_another_body_under_the_key_is_refused(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    async with served(app) as client:
        await client.post("/payments", json=ORDER, headers=KEY)
        refused = await client.post("/payments", json={**ORDER, "amount": "99"}, headers=KEY)
    assert (refused.status_code, refused.headers["Content-Type"]) == (422, "application/problem+json")
    assert bank.charges == ["o-1"]


async def test_only_the_methods_of_the_class_are_touched(layer: MemoryPersistenceLayer) -> None:
    app, runs = FastAPI(), list[str]()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="shop", scope=None, persistence_store=layer, methods={"put"}
    )

    @app.api_route("/payments", methods=["GET", "PUT", "POST"])
    async def payments(request: Request) -> str:
        runs.append(request.method)
        return request.method

    async with served(app) as client:
        for method in ("GET", "PUT", "POST"):
            for _ in range(2):
                assert (await client.request(method, "/payments", headers=KEY)).json() == method
    assert runs == ["GET", "GET", "PUT", "POST", "POST"]


async def test_a_method_that_a_route_does_not_have_is_refused_as_ever(layer: MemoryPersistenceLayer) -> None:
    app = FastAPI()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="shop", scope=None, persistence_store=layer, required=True
    )
    app.post("/payments")(lambda: None)
    async with served(app) as client:
        missing = await client.post("/payments")
        wrong = await client.patch("/payments")
        in_lower_case = httpx.Request("POST", "http://shop/payments")
        in_lower_case.method = "post"  # httpx would send it in upper case
        lower = await client.send(in_lower_case)
    assert missing.status_code == 400
    assert lower.status_code == 405
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")


async def test_callers_are_told_apart_by_their_scope(bank: Bank, layer: MemoryPersistenceLayer) -> None:
    app = FastAPI()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="shop", scope=by_header("Authorization"), persistence_store=layer
    )

    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    async with served(app) as client:
        numbers = [
            (await client.post("/payments", json=ORDER, headers={**KEY, "Authorization": user})).json()["number"]
            for user in ("ann", "bob", "ann")
        ]
    assert numbers == [1, 2, 1]


async def test_the_body_finds_its_execution(app: FastAPI) -> None:
    @app.post("/payments")
    async def create_payment() -> list[str]:
        execution = current_execution()
        return [execution.key, execution.key_for("bank")]

    first, second = await twice(app)
    assert first.json()[0].startswith("shop#")
    assert first.json() == second.json()


async def test_a_retry_after_a_restart_gets_the_recorded_response(tmp_path: pathlib.Path, bank: Bank) -> None:
    answers = list[httpx.Response]()
    for _ in range(2):
        layer = SQLitePersistenceLayer(tmp_path / "aidem.sqlite3")
        app = FastAPI()
        app.router.route_class = IdempotentRoute.configure(key_prefix="shop", scope=None, persistence_store=layer)

        @app.post("/payments")
        async def create_payment(order: Order) -> PublicReceipt:
            return bank.charge(order)

        async with layer, served(app) as client:
            answers.append(await client.post("/payments", json=ORDER, headers=KEY))
    assert is_replay(*answers)
    assert bank.charges == ["o-1"]


# --- Failures -------------------------------------------------------------------------------------------------------


async def test_an_http_exception_is_a_response_like_any_other(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        bank.charge(order)
        raise HTTPException(402, "no funds", {"X-Attempt": str(len(bank.charges))})

    first, second = await twice(app)
    assert (first.status_code, first.json(), first.headers["X-Attempt"]) == (402, {"detail": "no funds"}, "1")
    assert is_replay(first, second)
    assert bank.charges == ["o-1"]


class DeclinedError(Exception):
    """The bank said no."""


async def test_what_an_exception_handler_answers_is_recorded(app: FastAPI, bank: Bank) -> None:
    @app.exception_handler(DeclinedError)
    async def answer(request: Request, error: Exception) -> Response:
        return Response("declined", 409)

    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        bank.charge(order)
        raise DeclinedError

    first, second = await twice(app)
    assert (first.status_code, first.text) == (409, "declined")
    assert is_replay(first, second)
    assert bank.charges == ["o-1"]


@pytest.mark.parametrize(
    ("error", "answer"), [(HTTPException(503), 503), (HTTPException(429), 429), (ConnectionError(), 500)], ids=repr
)
async def test_a_failure_that_may_pass_gives_the_key_back(
    app: FastAPI, bank: Bank, error: Exception, answer: int
) -> None:
    errors = [error]

    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        if errors:
            raise errors.pop()
        return bank.charge(order)

    first, second = await twice(app)
    assert [first.status_code, second.status_code] == [answer, 200]
    assert REPLAYED not in second.headers
    assert bank.charges == ["o-1"]


async def test_a_request_that_fastapi_refuses_leaves_the_key_free(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    async with served(app) as client:
        refused = await client.post("/payments", json={**ORDER, "amount": "-1"}, headers=KEY)
        accepted = await client.post("/payments", json=ORDER, headers=KEY)
    assert (refused.status_code, refused.headers["Content-Type"]) == (422, "application/json")
    assert (accepted.status_code, bank.charges) == (200, ["o-1"])


# --- What FastAPI does around a route -------------------------------------------------------------------------------


async def test_a_replay_runs_no_dependency(app: FastAPI, bank: Bank) -> None:
    def count() -> None:
        bank.users.append("asked")

    @app.post("/payments", dependencies=[Depends(count)])
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    assert is_replay(*await twice(app))
    assert bank.users == ["asked"]


def current_user(authorization: Annotated[str, Header()]) -> str:
    return authorization


async def test_overridden_dependencies_are_the_ones_that_count(app: FastAPI) -> None:
    @app.post("/payments")
    async def create_payment(user: Annotated[str, Depends(current_user)]) -> str:
        return user

    app.dependency_overrides[current_user] = lambda: "test user"
    first, second = await twice(app)
    assert first.json() == second.json() == "test user"


async def test_a_transaction_that_ends_before_the_response_may_still_fail(app: FastAPI, bank: Bank) -> None:
    failures = [ConnectionError("the database is down")]

    async def transaction() -> AsyncGenerator[None]:
        yield
        if failures:
            bank.charges.clear()  # rolled back
            raise failures.pop()

    @app.post("/payments", dependencies=[Depends(transaction, scope="function")])
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    first, second = await twice(app)
    assert [first.status_code, second.status_code] == [500, 200]
    assert REPLAYED not in second.headers
    assert bank.charges == ["o-1"]


async def test_what_a_dependency_does_after_the_response_is_outside_of_the_claim(app: FastAPI, bank: Bank) -> None:
    async def session() -> AsyncGenerator[None]:
        yield
        raise ConnectionError("too late")

    @app.post("/payments", dependencies=[Depends(session)])
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    assert is_replay(*await twice(app))
    assert bank.charges == ["o-1"]


async def test_background_tasks_run_once_and_may_fail(app: FastAPI, bank: Bank) -> None:
    def fail() -> None:
        bank.users.append("notified")
        raise ConnectionError("the mail server is down")

    @app.post("/payments")
    async def create_payment(order: Order, background_tasks: BackgroundTasks) -> PublicReceipt:
        background_tasks.add_task(fail)
        return bank.charge(order)

    assert is_replay(*await twice(app))
    assert (bank.charges, bank.users) == (["o-1"], ["notified"])


async def test_a_route_function_may_be_synchronous_and_may_stream(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments")
    def create_payment(order: Order) -> StreamingResponse:
        number = bank.charge(order).number
        return StreamingResponse(iter(["number ", str(number)]), media_type="text/plain")

    first, second = await twice(app)
    assert second.headers.pop(REPLAYED) == "true"
    assert first.text == second.text == "number 1"


class AnyArguments(JSONResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class NoStatus(Response):
    media_type = "application/json"

    def __init__(self, content: Any, **others: Any) -> None:
        super().__init__(json.dumps(content).encode(), **others)


class StatusWithoutDefault(JSONResponse):
    def __init__(self, content: Any, status_code: int | None = None, **others: Any) -> None:
        super().__init__(content, status_code or 200, **others)


class RequiredStatus(JSONResponse):
    def __init__(self, content: Any, *, status_code: int, **others: Any) -> None:
        super().__init__(content, status_code, **others)


@pytest.mark.filterwarnings("ignore:.*JSONResponse is deprecated")
@pytest.mark.parametrize(
    "response_class",
    [ORJSON, UJSON, AnyArguments, NoStatus, StatusWithoutDefault, RequiredStatus],
)
async def test_a_response_class_may_have_any_signature(
    route_class: type[IdempotentRoute], bank: Bank, response_class: type[Response]
) -> None:
    app = FastAPI(default_response_class=response_class)
    app.router.route_class = route_class

    @app.post("/payments", status_code=201 if response_class is RequiredStatus else None)
    async def create_payment(order: dict[str, str]) -> Any:
        bank.charges.append(order["id"])
        return {"number": len(bank.charges)}

    assert is_replay(*await twice(app))
    assert bank.charges == ["o-1"]


async def test_a_router_may_be_nested_and_included_more_than_once(
    route_class: type[IdempotentRoute], bank: Bank
) -> None:
    inner, outer, app = APIRouter(prefix="/payments", route_class=route_class), APIRouter(prefix="/shop"), FastAPI()

    @inner.post("")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    @outer.post("/counted")
    async def count() -> int:
        bank.users.append("counted")
        return len(bank.users)

    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")
    app.include_router(inner, prefix="/v2")
    async with served(app) as client:
        for key, path in (("a", "/v1/shop/payments"), ("b", "/v2/payments")):
            headers = {"Idempotency-Key": key}
            assert is_replay(*[await client.post(path, json=ORDER, headers=headers) for _ in range(2)])
        # Another route under the same key is another request.
        assert (await client.post("/v2/payments", json=ORDER, headers={"Idempotency-Key": "a"})).status_code == 422
        # The router around it has routes of the usual class.
        assert [(await client.post("/v1/shop/counted", headers=KEY)).json() for _ in range(2)] == [1, 2]
    assert bank.charges == ["o-1", "o-1"]


async def test_mounted_apps_are_told_apart(app: FastAPI, bank: Bank) -> None:
    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    root = FastAPI()
    root.mount("/eu", app)
    root.mount("/us", app)
    assert is_replay(*await twice(root, "/eu/payments"))
    refused, _ = await twice(root, "/us/payments")
    assert refused.status_code == 422
    assert bank.charges == ["o-1"]


async def test_a_prefix_of_the_server_is_part_of_the_path_whether_it_is_taken_off_or_not(
    app: FastAPI, bank: Bank
) -> None:
    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    transport = httpx.ASGITransport(app, root_path="/api")
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        assert is_replay(
            await client.post("/payments", json=ORDER, headers=KEY),
            await client.post("/api/payments", json=ORDER, headers=KEY),
        )
    refused, _ = await twice(app)  # without the prefix
    assert refused.status_code == 422
    assert bank.charges == ["o-1"]


async def test_a_route_class_of_ones_own_may_build_on_it(
    route_class: type[IdempotentRoute], bank: Bank, app: FastAPI
) -> None:
    class Counted(route_class):  # type: ignore[valid-type, misc]
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def counted(request: Request) -> Response:
                bank.users.append(request.url.path)
                return await handler(request)

            return counted

    app.router.route_class = Counted

    @app.post("/payments")
    async def create_payment(order: Order) -> PublicReceipt:
        return bank.charge(order)

    assert is_replay(*await twice(app))
    assert (bank.charges, bank.users) == (["o-1"], ["/payments"])


# --- Configuring ----------------------------------------------------------------------------------------------------


class Traced(IdempotentRoute):
    """A class to be configured."""


def test_configuring_makes_a_class_and_changes_none(layer: MemoryPersistenceLayer) -> None:
    classes = (IdempotentRoute, Traced, APIRoute)
    before = [dict(vars(each)) for each in classes]
    one = Traced.configure(key_prefix="one", scope=None, persistence_store=layer, required=True)
    two = one.configure(key_prefix="two", scope=None, persistence_store=layer)
    assert issubclass(one, Traced)
    assert issubclass(two, one)
    assert (one.__name__, one.__doc__, one.__module__) == ("Traced", Traced.__doc__, Traced.__module__)
    assert [dict(vars(each)) for each in classes] == before


async def test_each_configured_class_keeps_to_its_own_options(layer: MemoryPersistenceLayer) -> None:
    app = FastAPI()
    for prefix, is_required in (("/strict", True), ("/free", False)):
        route_class = IdempotentRoute.configure(
            key_prefix="shop", scope=None, persistence_store=layer, required=is_required
        )
        router = APIRouter(prefix=prefix, route_class=route_class)
        router.post("/payments")(lambda: None)
        app.include_router(router)
    async with served(app) as client:
        answers = [(await client.post(f"{prefix}/payments")).status_code for prefix in ("/strict", "/free")]
    assert answers == [400, 200]


def test_a_class_that_was_not_configured_is_refused_at_once() -> None:
    router = APIRouter(route_class=IdempotentRoute)
    with pytest.raises(IdempotencyConfigError, match=r"IdempotentRoute\.configure"):
        router.post("/payments")(lambda: None)


@pytest.mark.parametrize(
    "options",
    [
        {"key_prefix": ""},
        {"scope": "authorization"},
        {"methods": ["GET"]},
        {"required": "yes"},
        {"config": IdempotencyConfig(event_key_jmespath="id")},
    ],
    ids=str,
)
def test_options_are_checked_when_the_class_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(IdempotencyConfigError, match=r"event_key_jmespath|" + next(iter(options))):
        IdempotentRoute.configure(**{"key_prefix": "shop", "scope": None} | options)


def test_without_fastapi_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aidem.fastapi")
    monkeypatch.setitem(sys.modules, "fastapi.routing", None)
    with pytest.raises(ImportError, match=r"needs FastAPI: install aidem-idempotency\[fastapi\],"):
        import aidem.fastapi  # noqa: F401


# --- A check ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_happened", [True, False])
async def test_a_check_is_told_the_path_parameters_and_says_what_the_route_would_have_answered(
    layer: MemoryPersistenceLayer, bank: Bank, has_happened: bool
) -> None:
    told: list[Any] = []

    def was_charged(abandoned: AbandonedExecution) -> Verdict:
        told.append(abandoned.payload["path_params"])
        return Happened(JSONResponse({"number": 9}, 201)) if has_happened else DidNotHappen()

    app = FastAPI()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="shop", scope=None, persistence_store=layer, config=IdempotencyConfig(on_abandoned=was_charged)
    )

    @app.post("/shops/{shop}/payments", status_code=201)
    async def pay(shop: str, order: Order) -> PublicReceipt:
        if not told:
            raise asyncio.CancelledError(shop)
        return bank.charge(order)

    async with served(app) as client:
        with pytest.raises(asyncio.CancelledError):
            await client.post("/shops/a/payments", json=ORDER, headers=KEY)
        first, second = [await client.post("/shops/a/payments", json=ORDER, headers=KEY) for _ in range(2)]
    assert told == [{"shop": "a"}]
    assert (first.status_code, first.json()["number"]) == (201, 9 if has_happened else 1)
    assert (first.headers.get(REPLAYED), second.headers[REPLAYED]) == ("true" if has_happened else None, "true")
    assert (second.status_code, second.content) == (first.status_code, first.content)
    assert len(bank.charges) == (not has_happened)
