"""A client that openapi-python-client generates from the document reads every answer that it gets."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from aidem.fastapi import IdempotentRoute
from aidem.persistence.memory import MemoryPersistenceLayer

ORDER = {"id": "o-1", "cents": 4200}


class Order(BaseModel):
    id: str
    cents: int = Field(gt=0)


class Receipt(BaseModel):
    number: int


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="shop", scope=None, persistence_store=MemoryPersistenceLayer(), required=True
    )

    @app.post("/payments", status_code=201, operation_id="pay", responses={409: {"model": Receipt}})
    async def pay(order: Order) -> Receipt:
        return Receipt(number=1)

    return app


@pytest.fixture(scope="module")
def generated(app: FastAPI, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("generated")
    (directory / "document.json").write_text(json.dumps(app.openapi()))
    (directory / "config.json").write_text(json.dumps({"post_hooks": []}))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta=none", "--fail-on-warning"]
    paths = ["--path=document.json", "--config=config.json", f"--output-path={directory / 'shop_client'}"]
    done = subprocess.run([*command, *paths], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield importlib.import_module("shop_client")


async def answer_to(app: FastAPI, generated: Any, order: dict[str, Any], key: str) -> tuple[int, Any]:
    pay = importlib.import_module("shop_client.api.default.pay")
    models = importlib.import_module("shop_client.models")
    async with generated.Client("http://shop", httpx_args={"transport": httpx.ASGITransport(app)}) as client:
        response = await pay.asyncio_detailed(client=client, body=models.Order.from_dict(order), idempotency_key=key)
    return response.status_code, response.parsed


async def test_a_generated_client_tells_both_bodies_of_422_apart(app: FastAPI, generated: Any) -> None:
    status, receipt = await answer_to(app, generated, ORDER, "k-1")
    assert (status, receipt.number) == (201, 1)
    status, problem = await answer_to(app, generated, ORDER | {"id": "o-2"}, "k-1")
    assert (status, type(problem).__name__) == (422, "IdempotencyKeyProblem")
    assert problem.title == "Idempotency-Key was used for a different request"
    status, errors = await answer_to(app, generated, ORDER | {"cents": -1}, "k-2")
    assert (status, type(errors).__name__) == (422, "HTTPValidationError")
    assert errors.detail[0].loc == ["body", "cents"]


async def test_a_generated_client_reads_a_problem_where_the_route_has_a_model_of_its_own(
    app: FastAPI, generated: Any
) -> None:
    pay = importlib.import_module("shop_client.api.default.pay")

    def parsed(**body: Any) -> Any:
        return pay._parse_response(client=None, response=httpx.Response(409, json=body))

    assert parsed(type="about:blank", title="in progress", status=409, detail="later").title == "in progress"
    assert parsed(number=7).number == 7


async def test_a_generated_client_reads_that_a_key_is_malformed(app: FastAPI, generated: Any) -> None:
    status, problem = await answer_to(app, generated, ORDER, "a,b")
    assert (status, problem.title) == (400, "Idempotency-Key is malformed")
