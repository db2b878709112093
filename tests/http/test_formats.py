"""What a service may have its own way: names of headers, the format of problems, and what makes two requests one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from aidem.asgi import Problem, RequestParts
from aidem.exceptions import IdempotencyPersistenceConnectionError, IdempotencyUsageError
from tests.support.asgi import JSON, Connection, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer

DOWN = IdempotencyPersistenceConnectionError("down")


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


# --- The names of headers ---------------------------------------------------------------------------------------------


async def test_the_key_may_be_in_a_header_of_another_name() -> None:
    shop = Shop()
    front = front_of(shop, header_name="X-Idempotency-Key", required=True)
    for key, runs in ((b"a", 1), (b"a", 1), (b"b", 2)):
        response = await request(front, key=None, headers=[JSON, (b"x-idempotency-key", key)])
        assert (response.status, shop.runs) == (201, runs)
    assert (await request(front, key=b"a")).status == 400


async def test_answers_name_the_header_as_clients_know_it() -> None:
    front = front_of(Shop(), header_name="X-Request-Key", required=True)
    missing = await request(front, key=None)
    malformed = await request(front, key=None, headers=[(b"x-request-key", b"a,b")])
    assert missing.problem["title"] == "X-Request-Key is missing"
    assert "requires an X-Request-Key header" in missing.problem["detail"]
    assert malformed.problem["title"] == "X-Request-Key is malformed"
    assert b"Idempotency-Key" not in missing.body + malformed.body


async def test_a_replay_may_be_marked_by_a_header_of_another_name() -> None:
    front = front_of(Shop(headers=[JSON, (b"X-Replayed", b"false")]), replayed_header="X-Replayed")
    first, again = await request(front), await request(front)
    assert first.headers == [JSON, (b"X-Replayed", b"false")]
    assert again.headers == [JSON, (b"x-replayed", b"true")]


# --- The format of problems -------------------------------------------------------------------------------------------


def in_own_format(problem: Problem, scope: Any) -> tuple[bytes, str]:
    error = {"code": problem.name, "message": problem.detail, "url": problem.type, "path": scope["path"]}
    return json.dumps({"error": error}).encode(), "application/vnd.shop+json"


async def test_every_answer_of_the_layer_has_the_format_of_the_service() -> None:
    shop = Shop(seconds=5)
    layer = PlannedLayer()
    options: dict[str, Any] = {"max_request_bytes": 9, "max_response_bytes": 3, "required": True}
    front = front_of(
        shop, layer=layer, problem_body=in_own_format, documentation_url="https://shop.example/errors", **options
    )
    running = asyncio.create_task(request(front))
    await asyncio.sleep(1)
    answers = [
        await request(front),
        await request(front, body=b"another"),
        await request(front, body=b"more than nine"),
        await request(front, key=b""),
        await request(front, key=None),
    ]
    await running
    answers.append(await request(front))
    layer.plan("acquire", Fault(DOWN))
    answers.append(await request(front, key=b"k-2"))
    assert {answer.header(b"content-type") for answer in answers} == {b"application/vnd.shop+json"}
    assert [answer.header(b"content-length") for answer in answers] == [b"%d" % len(each.body) for each in answers]
    assert [answer.header(b"retry-after") for answer in answers] == [b"1", None, None, None, None, None, b"1"]
    errors = [json.loads(answer.body)["error"] for answer in answers]
    assert [(answer.status, error["code"]) for answer, error in zip(answers, errors, strict=True)] == [
        (409, "in-progress"),
        (422, "key-reused"),
        (413, "body-too-large"),
        (400, "key-malformed"),
        (400, "key-missing"),
        (409, "response-not-kept"),
        (503, "store-down"),
    ]
    assert errors[0]["url"] == "https://shop.example/errors#in-progress"
    assert errors[3]["message"].startswith("The key is empty. ")
    assert {error["path"] for error in errors} == {"/payments"}


async def test_a_response_that_could_not_be_recorded_has_the_format_of_the_service() -> None:
    front = front_of(Shop(), layer=PlannedLayer().plan("complete", *[Fault(DOWN)] * 99), problem_body=in_own_format)
    response = await request(front)
    assert (response.status, json.loads(response.body)["error"]["code"]) == (503, "not-recorded")


def failing(problem: Problem, scope: Any) -> Any:
    raise KeyError("secret")


WRONG: dict[str, Any] = {
    "nothing": None,
    "text": ("text", "text/plain"),
    "no type": b"no type",
    "number": (b"", 7),
    "not latin-1": (b"", "text/€"),
}


@pytest.mark.parametrize("wrong", ["fails", *WRONG])
async def test_a_problem_body_that_fails_leaves_the_format_as_it_is(
    wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem_body = failing if wrong == "fails" else lambda problem, scope: WRONG[wrong]
    response = await request(front_of(Shop(), problem_body=problem_body), key=b"a,b")
    assert response.status == 400
    assert response.problem["title"] == "Idempotency-Key is malformed"
    assert "problem_body of the HTTP layer 'shop' failed" in caplog.text
    assert "secret" not in caplog.text


# --- What makes two requests one --------------------------------------------------------------------------------------


def canonical(parts: RequestParts) -> bytes | None:
    """Let members of JSON come in any order."""
    if parts.content_type.partition(";")[0] != "application/json":
        return None
    return json.dumps(json.loads(parts.body), sort_keys=True).encode()


async def statuses(front: Any, *requests: dict[str, Any]) -> list[tuple[int, bool]]:
    responses = [await request(front, **each) for each in requests]
    return [(response.status, response.is_replay) for response in responses]


async def test_a_retry_may_be_serialised_differently_where_a_fingerprint_says_what_counts() -> None:
    shop = Shop()
    front = front_of(shop, fingerprint=canonical)
    one, other = b'{"id": 1, "cents": 2}', b'{"cents":2,"id":1}'
    charset = [(b"content-type", b"application/json; charset=utf-8")]
    assert await statuses(
        front,
        {"body": one},
        {"body": other},
        {"body": [other[:5], other[5:]], "query": b"utm=1", "headers": charset},
        {"body": b'{"id": 1, "cents": 3}'},
    ) == [(201, False), (201, True), (201, True), (422, False)]
    assert shop.bodies == [one]


@pytest.mark.parametrize("other", [{"method": "PATCH"}, {"path": "/refunds"}, {"root_path": "/v2"}])
async def test_method_and_path_count_whatever_a_fingerprint_says(other: dict[str, Any]) -> None:
    front = front_of(Shop(), fingerprint=lambda _parts: b"always the same")
    assert await statuses(front, {"body": b"a"}, {"body": b"b"}, other) == [(201, False), (201, True), (422, False)]


@pytest.mark.parametrize("fingerprint", [lambda _parts: None, canonical])
async def test_none_is_the_default_byte_for_byte(fingerprint: Any) -> None:
    layer, text = PlannedLayer(), [(b"content-type", b"text/plain")]
    before, front = front_of(Shop(), layer=layer), front_of(Shop(), layer=layer, fingerprint=fingerprint)
    await request(before, body=b"{}", headers=text)
    assert await statuses(front, {"body": b"{}", "headers": text}, {"body": b"{ }", "headers": text}) == [
        (201, True),
        (422, False),
    ]


async def test_bytes_that_look_like_the_default_are_not_the_default() -> None:
    layer = PlannedLayer()
    await request(front_of(Shop(), layer=layer), body=b"{}")
    assert await statuses(front_of(Shop(), layer=layer, fingerprint=lambda parts: parts.body), {"body": b"{}"}) == [
        (422, False)
    ]


async def test_a_fingerprint_gets_the_request_as_the_client_sees_it() -> None:
    seen: list[RequestParts] = []

    def take(parts: RequestParts) -> bytes:
        seen.append(parts)
        return b""

    headers = [JSON, (b"x-tenant", b"acme")]
    await request(
        front_of(Shop(), fingerprint=take, header_name="key"),
        key=None,
        path="/payments",
        root_path="/v1",
        query=b"a=1",
        headers=[*headers, (b"key", b"k")],
        body=[b"one", b"two"],
    )
    assert seen == [
        RequestParts(
            method="POST",
            path="/v1/payments",
            query=b"a=1",
            headers=(*headers, (b"key", b"k")),
            content_type="application/json",
            body=b"onetwo",
        )
    ]


async def test_a_server_that_has_no_query_to_tell_and_a_request_without_a_content_type_are_understood() -> None:
    seen: list[RequestParts] = []
    scope, connection = scope_of(headers=()), Connection([b"{}"])
    del scope["query_string"]
    await front_of(Shop(), fingerprint=seen.append)(scope, connection.receive, connection.send)
    assert [(parts.query, parts.content_type) for parts in seen] == [(b"", "")]


async def test_a_fingerprint_that_fails_leaves_the_default(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    front = front_of(shop, fingerprint=canonical)
    assert await statuses(front, {"body": b"secret"}, {"body": b"secret"}, {"body": b"secret "}) == [
        (201, False),
        (201, True),
        (422, False),
    ]
    assert "fingerprint of the HTTP layer 'shop' raised JSONDecodeError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_fingerprint_that_is_no_bytes_is_a_mistake_that_is_named() -> None:
    shop = Shop()
    front = front_of(shop, fingerprint=lambda _parts: "text")
    with pytest.raises(IdempotencyUsageError, match=r"fingerprint\(request\) must return bytes"):
        await request(front)
    assert (shop.runs, front.layer.calls) == (0, [])
