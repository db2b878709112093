"""The OpenAPI document of a service with `IdempotentRoute`: it says what the HTTP layer does, and no more."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from hypothesis import example, given
from hypothesis import strategies as st
from openapi_spec_validator import validate
from pydantic import BaseModel, Field

from aidem._http import answers
from aidem._http.answers import RefusedError
from aidem._http.openapi import key_pattern
from aidem._http.request import parse_key
from aidem.fastapi import IdempotentRoute, Problem
from tests.support.fastapi import ORJSON, UJSON, Order, PublicReceipt, served

PROBLEM = "application/problem+json"
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/IdempotencyKeyProblem"}
PROBLEM_MEMBERS = {"type": "", "title": "", "status": 0, "detail": ""}.keys()


def route_class(**options: Any) -> type[IdempotentRoute]:
    return IdempotentRoute.configure(**{"key_prefix": "shop", "scope": None} | options)


def app_of(**options: Any) -> FastAPI:
    app = FastAPI()
    app.router.route_class = route_class(**options)
    return app


def document_of(app: FastAPI) -> dict[str, Any]:
    """Return the document of an app, which must be a valid one."""
    document = app.openapi()
    validate(document)
    return document


def operation_of(app: FastAPI, path: str = "/payments", method: str = "post") -> dict[str, Any]:
    operation: dict[str, Any] = document_of(app)["paths"][path][method]
    return operation


def key_parameters(operation: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in operation.get("parameters", ()) if each["name"].lower() == "idempotency-key"]


def create_payment(order: Order) -> PublicReceipt:
    """Take money."""
    raise NotImplementedError


def test_the_header_and_the_answers_of_the_layer_are_added_and_nothing_else_changes() -> None:
    bare, app = FastAPI(), app_of()
    for each in (bare, app):
        each.post("/payments", status_code=201)(create_payment)
        each.get("/payments")(lambda: None)
    expected, document = document_of(bare), document_of(app)
    operation = document["paths"]["/payments"]["post"]
    [header] = operation.pop("parameters")
    assert (header["name"], header["in"], header.get("required", False)) == ("Idempotency-Key", "header", False)

    responses = operation["responses"]
    for status in ("400", "409", "413", "503"):
        assert list(responses.pop(status)["content"]) == [PROBLEM]
    assert responses["201"].pop("headers").keys() == {"Idempotent-Replayed"}
    assert responses["422"]["content"].pop(PROBLEM) == {"schema": PROBLEM_SCHEMA}
    errors = responses["422"]["content"]["application/json"]["schema"]
    assert errors.pop("anyOf") == [PROBLEM_SCHEMA, {"$ref": "#/components/schemas/HTTPValidationError"}]
    assert errors.pop("title").startswith("Response 422")
    responses["422"] = expected["paths"]["/payments"]["post"]["responses"]["422"]
    assert document["components"]["schemas"].pop("IdempotencyKeyProblem")["required"] == [*PROBLEM_MEMBERS]
    assert document == expected


def test_all_answers_of_the_layer_have_one_schema() -> None:
    app = app_of(required=True)
    app.post("/payments", responses={409: {"model": PublicReceipt}})(create_payment)
    app.post("/pings")(lambda: None)
    app.post("/pages", response_class=HTMLResponse)(create_payment)
    document = document_of(app)
    assert sum("Problem" in name for name in document["components"]["schemas"]) == 1
    contents = [
        response["content"][PROBLEM]
        for path in document["paths"].values()
        for response in path["post"]["responses"].values()
        if PROBLEM in response.get("content", {})
    ]
    assert contents == [{"schema": PROBLEM_SCHEMA}] * 3 * len({"400", "409", "413", "422", "503"})


async def test_an_answer_of_the_layer_fits_its_schema() -> None:
    app = app_of(required=True)
    app.post("/payments")(create_payment)
    async with served(app) as client:
        response = await client.post("/payments", json={})
    assert response.status_code == 400
    schema = document_of(app)["components"]["schemas"]["IdempotencyKeyProblem"]
    assert response.json().keys() == schema["properties"].keys() == PROBLEM_MEMBERS


def test_both_bodies_of_a_status_are_named_where_a_generated_client_looks_first() -> None:
    app = app_of()
    declared: dict[int | str, dict[str, Any]] = {
        409: {"model": PublicReceipt},
        "422": {"model": PublicReceipt},
        404: {"model": PublicReceipt},
    }
    app.post("/payments", responses=declared)(create_payment)
    responses = operation_of(app)["responses"]
    receipt = {"$ref": "#/components/schemas/PublicReceipt"}
    for status in ("409", "422"):
        assert list(responses[status]["content"]) == ["application/json", PROBLEM]
        assert responses[status]["content"]["application/json"]["schema"]["anyOf"] == [receipt, PROBLEM_SCHEMA]
    assert responses["404"]["content"] == {"application/json": {"schema": receipt}}
    assert declared[409] == {"model": PublicReceipt}


@pytest.mark.parametrize("status", ["4XX", "default"])
def test_a_route_that_describes_its_validation_errors_by_a_range_has_none_of_fastapi(status: str) -> None:
    app = app_of()
    app.post("/payments", responses={status: {"model": PublicReceipt}})(create_payment)
    document = document_of(app)
    assert list(document["paths"]["/payments"]["post"]["responses"]["422"]["content"]) == [PROBLEM]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_validation_errors_are_json_also_where_responses_are_not() -> None:
    app = app_of()
    app.post("/payments", response_class=HTMLResponse)(create_payment)
    assert list(operation_of(app)["responses"]["422"]["content"]) == ["application/json", PROBLEM]


def test_a_problem_that_a_route_specifies_itself_stays() -> None:
    app = app_of()
    own = {PROBLEM: {"schema": {"type": "object", "required": ["code"]}}}
    app.post("/payments", responses={409: {"content": own}})(create_payment)
    assert operation_of(app)["responses"]["409"]["content"] == own


def test_where_a_service_has_a_format_of_its_own_nothing_is_said_of_it() -> None:
    app = app_of(problem_body=lambda problem, _scope: (b"", "application/vnd.api+json"))
    app.post("/payments")(create_payment)
    document = document_of(app)
    responses = document["paths"]["/payments"]["post"]["responses"]
    assert list(responses["422"]["content"]) == ["application/json"]
    assert "content" not in responses["409"]
    assert "in progress" in responses["409"]["description"]
    assert "IdempotencyKeyProblem" not in document["components"]["schemas"]


def test_headers_have_the_names_that_were_chosen() -> None:
    app = app_of(header_name="X-Request-Key", replayed_header="X-Replayed", required=True)
    app.post("/payments", status_code=201)(create_payment)
    app.post("/orders")(with_other_header)
    document = document_of(app)
    operation = document["paths"]["/payments"]["post"]
    assert [each["name"] for each in operation["parameters"]] == ["X-Request-Key"]
    assert operation["responses"]["201"]["headers"].keys() == {"X-Replayed"}
    assert "X-Request-Key is missing" in operation["responses"]["400"]["description"]
    assert "Idempotency-Key" not in json.dumps(operation)
    assert len(document["paths"]["/orders"]["post"]["parameters"]) == 1


def test_a_document_that_is_made_twice_is_the_same() -> None:
    app = app_of()
    app.post("/payments", responses={409: {"model": PublicReceipt}})(create_payment)
    app.post("/pings")(lambda: None)
    first = copy.deepcopy(document_of(app))
    app.openapi_schema = None
    assert document_of(app) == first


def test_every_answer_of_the_layer_is_described_by_what_it_means() -> None:
    problems = [each for each in vars(answers).values() if isinstance(each, Problem)]
    assert len(problems) == 13
    app = app_of(required=True)
    app.post("/payments")(create_payment)
    responses = operation_of(app)["responses"]
    assert {status for status, response in responses.items() if PROBLEM in response["content"]} == {
        str(problem.status) for problem in problems
    }
    for problem in problems:
        response = responses[str(problem.status)]
        assert problem.title in response["description"]
        if problem.retry_after_seconds is not None:
            assert response["headers"]["Retry-After"]["schema"]["type"] == "integer"


@pytest.mark.parametrize("is_required", [True, False])
def test_a_required_key_is_said_to_be_required(is_required: bool) -> None:
    app = app_of(required=is_required)
    app.post("/payments")(create_payment)
    operation = operation_of(app)
    assert [each["required"] for each in key_parameters(operation)] == [is_required]
    assert ("is missing" in operation["responses"]["400"]["description"]) is is_required


class Created(JSONResponse):
    def __init__(self, content: Any, status_code: int = 201, **others: Any) -> None:
        super().__init__(content, status_code, **others)


class AnyArguments(JSONResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*JSONResponse is deprecated")
@pytest.mark.parametrize(("response_class", "status"), [(Created, "201"), (ORJSON, "200"), (UJSON, "200")])
def test_the_mark_of_a_replay_is_at_the_status_that_the_response_class_has_by_itself(
    response_class: type[Response], status: str
) -> None:
    app = app_of()
    app.post("/payments", response_class=response_class)(create_payment)
    responses = operation_of(app)["responses"]
    assert [each for each in responses if "Idempotent-Replayed" in responses[each].get("headers", {})] == [status]


def test_a_response_class_that_does_not_say_its_status_leaves_the_documents_of_other_statuses_alone() -> None:
    app = app_of()
    app.post("/payments", response_class=AnyArguments, status_code=202)(create_payment)
    app.post("/refunds", response_class=AnyArguments, include_in_schema=False)(create_payment)
    responses = operation_of(app)["responses"]
    assert [each for each in responses if "Idempotent-Replayed" in responses[each].get("headers", {})] == ["202"]


def test_only_routes_with_a_method_of_the_class_are_described() -> None:
    bare, app = FastAPI(), app_of(methods={"PUT"})
    for each in (bare, app):
        each.get("/payments")(lambda: None)
        each.post("/payments")(create_payment)
    assert document_of(app) == document_of(bare)


def test_a_route_with_other_methods_too_does_not_demand_the_key_of_them() -> None:
    app = app_of(required=True)
    app.api_route("/payments", methods=["PUT", "POST"], operation_id="payments")(create_payment)
    with pytest.warns(UserWarning, match="Duplicate Operation ID"):
        document = app.openapi()
    assert [key_parameters(each)[0]["required"] for each in document["paths"]["/payments"].values()] == [False] * 2


class KeyHeaders(BaseModel):
    idempotency_key: str


class AliasedHeaders(BaseModel):
    key: str = Field(alias="Idempotency-Key")


def with_header(idempotency_key: Annotated[str, Header()]) -> None:
    """Declare it as a parameter."""


def with_other_header(x_request_key: Annotated[str, Header()]) -> None:
    """Declare a header of another name."""


def with_alias(key: Annotated[str, Header(alias="IDEMPOTENCY-KEY")]) -> None:
    """Declare it by another name."""


def with_model(headers: Annotated[KeyHeaders, Header()]) -> None:
    """Declare it in a model."""


def with_aliased_model(headers: Annotated[AliasedHeaders, Header()]) -> None:
    """Declare it in a model by another name."""


def with_dependency(_: Annotated[None, Depends(with_header)]) -> None:
    """Declare it further away."""


@pytest.mark.parametrize("function", [with_header, with_alias, with_model, with_aliased_model, with_dependency])
def test_a_header_that_the_route_declares_itself_is_not_declared_again(function: Callable[..., None]) -> None:
    app = app_of()
    app.post("/payments")(function)
    assert len(key_parameters(operation_of(app))) == 1


class KeyQuery(BaseModel):
    idempotency_key: str


def with_query(idempotency_key: str) -> None:
    """Declare a parameter of that name which is no header."""


def with_query_model(query: Annotated[KeyQuery, Query()]) -> None:
    """Declare it in a model."""


@pytest.mark.parametrize("function", [with_query, with_query_model])
def test_a_parameter_of_that_name_elsewhere_is_not_the_header(function: Callable[..., None]) -> None:
    app = app_of()
    app.post("/payments")(function)
    assert [each["in"] for each in key_parameters(operation_of(app))] == ["header"]


def test_what_a_route_says_of_itself_stays() -> None:
    app = app_of()
    extra = {
        "parameters": [{"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "format": "uuid"}}],
        "responses": {"400": {"description": "You did it wrong"}},
        "x-owner": "payments",
    }
    before = copy.deepcopy(extra)
    responses: dict[int | str, dict[str, Any]] = {
        409: {"description": "Already paid"},
        "422": {"description": "Not payable"},
        "5XX": {"description": "Try later"},
    }
    app.post("/payments", openapi_extra=extra, responses=responses)(create_payment)
    operation = operation_of(app)
    assert extra == before
    assert operation["x-owner"] == "payments"
    assert [each["schema"].get("format") for each in key_parameters(operation)] == ["uuid"]
    described = {status: response["description"] for status, response in operation["responses"].items()}
    assert described["400"] == "You did it wrong"
    assert described["409"] == "Already paid"
    assert described["422"] == "Not payable"
    assert described["5XX"] == "Try later"
    assert operation["responses"]["409"].keys() == {"description", "headers", "content"}
    assert operation["responses"]["409"]["headers"].keys() == {"Idempotent-Replayed", "Retry-After"}
    assert "headers" not in operation["responses"]["5XX"]


def test_a_route_that_validates_nothing_promises_no_validation_error() -> None:
    app = app_of()
    app.post("/payments")(lambda: None)
    response = operation_of(app)["responses"]["422"]
    assert (response["description"], list(response["content"])) == (answers.KEY_REUSED.title, [PROBLEM])
    assert document_of(app)["components"]["schemas"].keys() == {"IdempotencyKeyProblem"}


def test_the_mark_of_a_replay_is_at_the_status_that_a_response_class_has() -> None:
    app = app_of()
    app.post("/payments", response_class=RedirectResponse)(lambda: "/")
    responses = operation_of(app)["responses"]
    assert "Idempotent-Replayed" in responses["307"]["headers"]
    assert "200" not in responses


def test_routers_that_are_included_describe_their_routes_once() -> None:
    inner = APIRouter(prefix="/payments", route_class=route_class(required=True))
    inner.post("", status_code=201)(create_payment)
    outer, app = APIRouter(prefix="/shop"), FastAPI()
    outer.include_router(inner)
    app.include_router(outer, prefix="/v1", responses={409: {"description": "Shop is closed"}})
    app.include_router(inner, prefix="/v2")
    paths = document_of(app)["paths"]
    assert list(paths) == ["/v1/shop/payments", "/v2/payments"]
    for path in paths.values():
        operation = path["post"]
        assert len(key_parameters(operation)) == 1
        assert operation["responses"].keys() == {"201", "400", "409", "413", "422", "503"}
        assert "Idempotent-Replayed" in operation["responses"]["201"]["headers"]


def is_key(value: str, *, strict: bool) -> bool:
    try:
        parse_key([value.encode("latin-1")], strict=strict)
    except RefusedError:
        return False
    return True


KEYS = (
    st.text(st.characters(max_codepoint=255), max_size=300)
    | st.text('"\\,; ab', max_size=12)
    | st.from_regex(key_pattern(strict=False), fullmatch=True)
    | st.integers(250, 260).map(lambda length: "k" * length)
    | st.integers(250, 260).map(lambda length: f'"{chr(92) * 2 * length}"')
)


@pytest.mark.parametrize("strict", [True, False])
@given(value=KEYS)
@example(value="")
@example(value='""')
@example(value="k\n")
def test_the_pattern_of_the_header_is_what_the_layer_understands(strict: bool, value: str) -> None:
    if value == value.strip(" \t"):  # servers strip it before the layer sees it
        # ECMAScript's `$` is the end of the text, Python's also stands before a last line break.
        pattern = key_pattern(strict=strict).replace("$", r"\Z")
        assert bool(re.search(pattern, value)) is is_key(value, strict=strict)
