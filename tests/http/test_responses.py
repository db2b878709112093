"""What is recorded of a response, when, and what a replay is."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import tracemalloc
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from aidem import RecordStatus
from aidem._http.response import RESPONSES, StoredResponse, text_of
from aidem.asgi import IdempotencyMiddleware
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.hooks import EventKind
from tests.support.asgi import JSON, Connection, Front, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer
from tests.support.records import put

NOT_KEPT = "The request was processed, but its response was not stored"
COOKIE = (b"set-cookie", b"session=1")


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def records_of(front: Front) -> list[Any]:
    return list(front.layer.inner.records().values())


# --- What is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"\0\xff\x80", "Grüße".encode(), bytes(range(256)), b'"\\ \x7f\x00'],
    ids=["empty", "json", "binary", "utf-8", "every byte", "awkward ASCII"],
)
async def test_a_body_is_replayed_as_it_was(body: bytes) -> None:
    shop = Shop(body=[body], headers=[(b"content-type", b"application/octet-stream")])
    front = front_of(shop)
    first, second = await request(front), await request(front)
    assert second.is_replay
    assert first.body == second.body == body


@pytest.mark.parametrize("status", [200, 201, 202, 204, 205, 206, 301, 303, 304])
async def test_every_kind_of_success_is_replayed(status: int) -> None:
    shop = Shop(status=status, headers=[(b"location", b"/1")], body=[b""])
    front = front_of(shop)
    await request(front)
    again = await request(front)
    assert (again.status, again.body, again.is_replay) == (status, b"", True)


async def test_headers_are_replayed_in_their_order_and_several_of_a_name_stay_several() -> None:
    headers = [(b"X-Late", b"\xe9"), (b"link", b"<a>"), (b"content-type", b"text/plain"), (b"link", b"<b>")]
    shop = Shop(headers=headers)
    front = front_of(shop)
    first, second = await request(front), await request(front)
    assert first.headers == headers
    assert second.headers == [*headers, (b"idempotent-replayed", b"true")]


async def test_a_replay_is_otherwise_the_same() -> None:
    front = front_of(Shop())
    first, second = await request(front), await request(front)
    second.start["headers"].remove((b"idempotent-replayed", b"true"))
    assert (first.status, first.headers, first.body) == (second.status, second.headers, second.body)


async def test_what_belongs_to_one_connection_and_the_date_are_not_replayed() -> None:
    dropped = [
        (b"Connection", b"close, X-Hop"),
        (b"x-hop", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"proxy-authenticate", b"Basic"),
        (b"te", b"trailers"),
        (b"trailer", b"x"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"DATE", b"Sun, 22 Nov 2026 00:00:00 GMT"),
    ]
    front = front_of(Shop(headers=[JSON, *dropped]))
    first, second = await request(front), await request(front)
    assert first.headers == [JSON, *dropped]
    assert second.headers == [JSON, (b"idempotent-replayed", b"true")]


async def test_an_inner_layers_mark_of_a_replay_is_not_recorded() -> None:
    front = front_of(Shop(headers=[JSON, (b"idempotent-replayed", b"true")]))
    await request(front)
    assert (await request(front)).headers == [JSON, (b"idempotent-replayed", b"true")]


async def test_cookies_are_not_replayed_unless_asked_for() -> None:
    shop = Shop(headers=[COOKIE, JSON, (b"Set-Cookie", b"b=2")])
    front, keeping = front_of(shop), front_of(shop, store_set_cookie=True)
    assert COOKIE in (await request(front)).headers
    assert (await request(front)).headers == [JSON, (b"idempotent-replayed", b"true")]
    await request(keeping)
    assert (await request(keeping)).headers == [*shop.headers, (b"idempotent-replayed", b"true")]


async def test_a_response_without_headers_or_body_is_one_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    front = front_of(app)
    await request(front)
    again = await request(front)
    assert again.headers == [(b"idempotent-replayed", b"true")]
    assert again.body == b""


async def test_headers_may_be_an_iterator() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": iter([JSON])})
        await send({"type": "http.response.body"})

    front = front_of(app)
    assert (await request(front)).headers == [JSON]
    assert (await request(front)).headers == [JSON, (b"idempotent-replayed", b"true")]


async def test_what_an_app_sends_may_be_any_bytes_like_object() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [[b"x-a", b"b"]]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": memoryview(b"one"), "more_body": True})
        await send({"type": "http.response.body", "body": bytearray(b"two")})

    front = front_of(app)
    await request(front)
    again = await request(front)
    assert again.headers == [(b"x-a", b"b"), (b"idempotent-replayed", b"true")]
    assert again.body == b"onetwo"


# --- The stored form --------------------------------------------------------------------------------------------------


async def test_a_record_is_json_with_ascii_text_as_it_is() -> None:
    front = front_of(Shop(headers=[JSON]))
    await request(front)
    [record] = records_of(front)
    assert record.status is RecordStatus.COMPLETED
    assert record.response_data == (
        '{"body": "{\\"paid\\": 42}", "headers": [["content-type", "application/json"]], "status": 201}'
    )


async def test_a_record_keeps_every_other_body_as_base64() -> None:
    front = front_of(Shop(headers=[], body=[b"\xff\x00"]))
    await request(front)
    [record] = records_of(front)
    assert json.loads(record.response_data) == {"base64": "/wA=", "headers": [], "status": 201}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "body"),
        (b'{"paid": 42}', "body"),
        (b'""""""', "base64"),
        (b"\0" * 999, "base64"),
        (b"~" * 999, "body"),
        (b"\x7f" * 999, "base64"),
        (b"\n" * 999, "base64"),
        (b"a\n" * 999, "base64"),
        (b"abc\n" * 999, "body"),
    ],
)
def test_a_body_is_stored_as_what_is_shorter_of_text_and_base64(body: bytes, kind: str) -> None:
    text = text_of(StoredResponse(200, [], body))
    stored = json.loads(text)
    assert [name for name in stored if name in {"body", "base64"}] == [kind]
    assert len(json.dumps(stored[kind])) <= len(base64.b64encode(body)) + 2
    assert RESPONSES.from_dict(stored).body == body


TOKEN = st.from_regex(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", fullmatch=True)
VALUE = st.from_regex(rb"[\t -~\x80-\xff]*", fullmatch=True)
HOP_BY_HOP = ("connection", "Keep-Alive", "proxy-authenticate", "te", "trailer", "Transfer-Encoding", "upgrade")


@given(
    status=st.integers(200, 599),
    headers=st.lists(st.tuples(TOKEN.map(lambda name: b"x-" + name), VALUE)),
    body=st.binary() | st.text().map(str.encode),
)
def test_every_response_comes_back_from_its_text(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    response = StoredResponse(status, headers, b"" if status in {204, 205, 304} else body)
    assert RESPONSES.from_dict(json.loads(text_of(response))) == response
    assert RESPONSES.from_dict(RESPONSES.to_dict(response)) == response


def stored(**parts: Any) -> str:
    return json.dumps({"body": "paid", "headers": [["x-a", "b"]], "status": 201} | parts)


NO_STATUSES: tuple[Any, ...] = (0, 99, 100, 101, 199, 600, 2**70, -200, 200.5, "200", True, None, [])
UNSENDABLE = [
    *[stored(status=status) for status in NO_STATUSES],
    *[stored(status=status) for status in (204, 205, 304)],  # they have no body
    *[stored(headers=[[name, "close"]]) for name in HOP_BY_HOP],
    *[stored(headers=[[name, "b"]]) for name in ("", "x a", "x:a", "x\na", "x\0a", "\xe9", "\u20ac", 7, None)],
    *[stored(headers=[["x-a", value]]) for value in ("b\r\nx-b: c", "b\n", "\r", "\0", "\x7f", "\u20ac", 7, None)],
    *[stored(headers=headers) for headers in (None, 7, "x", {"x-a": "b"}, [["x-a"]], [["x-a", "b", "c"]], ["xy", "z"])],
    stored(headers=[["x-a", "b\nset-cookie\nc"]]),
    stored(headers=[["x-a\nb", "c"], ["d", "e\nf"]]),
    *[stored(headers=[["Content-Length", value]]) for value in ("3", "5", "-4", "+4", "", "four", "4,4", "9" * 30)],
    stored(headers=[["content-length", "4"], ["content-length", "4"]]),
    *[stored(body=body) for body in ("\xe9", 7, None, ["paid"])],
]


@pytest.mark.parametrize("text", UNSENDABLE)
async def test_a_record_that_cannot_be_sent_is_done_and_not_run_again(text: str) -> None:
    shop = Shop()
    front = front_of(shop)
    await request(front)
    [record] = records_of(front)
    put(front.layer.inner, record.replace(response_data=text))
    response = await request(front)
    assert (response.status, response.problem["title"]) == (409, NOT_KEPT)
    assert shop.runs == 1


@pytest.mark.parametrize(
    "text",
    [
        stored(status=200),
        stored(status=599),
        stored(headers=[["content-length", "4"]]),
        stored(headers=[["Content-Length", "100"]], status=304, body=""),  # of what a GET would have got
        stored(headers=[["x-a", "\t\xe9~"], ["x-b", ""]]),
    ],
)
async def test_a_record_that_can_be_sent_is_whatever_has_written_it(text: str) -> None:
    front = front_of(Shop())
    await request(front)
    [record] = records_of(front)
    put(front.layer.inner, record.replace(response_data=text))
    response = await request(front)
    parts = json.loads(text)
    expected = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in parts["headers"]]
    assert (response.status, response.body) == (parts["status"], parts["body"].encode())
    assert response.headers == [*expected, (b"idempotent-replayed", b"true")]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    data=JSON_VALUES
    | st.fixed_dictionaries(
        {"status": st.integers(100, 700) | JSON_VALUES, "headers": st.lists(st.lists(st.text())) | JSON_VALUES},
        optional={"body": st.text() | JSON_VALUES, "base64": st.text() | JSON_VALUES},
    )
)
async def test_no_record_is_an_exception(data: Any) -> None:
    front = front_of(Shop())
    await request(front)
    [record] = records_of(front)
    put(front.layer.inner, record.replace(response_data=json.dumps(data)))
    response = await request(front)
    assert response.is_complete
    assert response.is_replay or response.problem["title"] == NOT_KEPT


@pytest.mark.parametrize("body", [b"pai", b"paids"])
async def test_a_response_of_another_length_than_it_declares_is_not_kept(body: bytes) -> None:
    shop = Shop(headers=[(b"content-length", b"4")], body=[body])
    front = front_of(shop)
    await request(front)
    assert (await request(front)).status == 409
    assert shop.runs == 1


@pytest.mark.parametrize(
    "text", ["null", "[]", "{}", "7", "no JSON", '{"status": 200, "headers": [], "base64": "?"}', '{"body": ""}', None]
)
async def test_a_record_that_is_no_response_is_done_and_not_run_again(text: str | None) -> None:
    shop = Shop()
    front = front_of(shop)
    await request(front)
    [record] = records_of(front)
    put(front.layer.inner, record.replace(response_data=text))
    response = await request(front)
    assert response.status == 409
    assert response.header(b"retry-after") is None
    assert response.problem["title"] == NOT_KEPT
    assert shop.runs == 1


# --- Which responses are recorded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 402, 404, 405, 406, 409, 410, 412, 418, 451])
async def test_a_final_refusal_is_recorded(status: int) -> None:
    shop = Shop(status=status)
    front = front_of(shop)
    await request(front)
    again = await request(front)
    assert (again.status, again.is_replay, shop.runs) == (status, True, 1)


def sites() -> list[Any]:
    """Return apps with a payment that is not found by itself, within routers, mounts and middleware."""

    async def missing() -> Response:
        return Response(b"no such order", status_code=404)

    async def payments(request: Request) -> Response:
        return await missing()

    async def plain_app(scope: Any, receive: Any, send: Any) -> None:
        await Shop(status=404)(scope, receive, send)

    routes = [Route("/payments", payments, methods=["POST"]), Mount("/plain", plain_app)]
    fast = FastAPI()
    fast.post("/payments")(missing)
    fast.mount("/plain", plain_app)
    router = APIRouter()
    router.post("/payments")(missing)
    including = FastAPI()
    including.include_router(router)
    including.mount("/plain", plain_app)

    @including.exception_handler(HTTPException)
    async def without_headers(request: Request, error: HTTPException) -> Response:
        return JSONResponse({}, status_code=error.status_code)

    return [Router(routes), Starlette(routes=routes), GZipMiddleware(Starlette(routes=routes)), fast, including]


def arranged(site: Any, arrangement: str) -> tuple[Any, Front, str]:
    """Return the outermost app, the front, and where the site is."""
    if arrangement == "around":
        front = front_of(site)
        return front, front, ""
    front = front_of(site if arrangement == "within a mount" else Starlette(routes=[Mount("/in", site)]))
    return Starlette(routes=[Mount("/out", front)]), front, "/out" if arrangement == "within a mount" else "/out/in"


ARRANGEMENTS = ["around", "within a mount", "around a mount"]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/nowhere", 404), ("PATCH", "/payments", 405)])
async def test_a_path_or_method_that_no_route_has_is_not_recorded(
    number: int, arrangement: str, method: str, path: str, status: int
) -> None:
    app, front, root = arranged(sites()[number], arrangement)
    for _ in range(2):
        response = await request(app, method, root + path)
        assert (response.status, response.is_replay) == (status, False)
    assert records_of(front) == []


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("path", ["/payments", "/plain/1"])
async def test_what_a_route_does_not_find_is_recorded(number: int, arrangement: str, path: str) -> None:
    app, _, root = arranged(sites()[number], arrangement)
    assert not (await request(app, path=root + path)).is_replay
    again = await request(app, path=root + path)
    assert (again.status, again.is_replay) == (404, True)


async def test_the_middleware_of_a_route_records_what_that_does_not_find() -> None:
    async def payments(request: Request) -> Response:
        return Response(b"no such order", status_code=404)

    layer = PlannedLayer()
    middleware = Middleware(IdempotencyMiddleware, persistence_store=layer, key_prefix="shop", scope=None)
    app = Starlette(routes=[Route("/payments", payments, methods=["POST"], middleware=[middleware])])
    await request(app)
    assert (await request(app)).is_replay


@pytest.mark.parametrize(
    ("allowed", "is_recorded"),
    [
        ([b"GET, HEAD"], False),
        ([b"GET,HEAD"], False),
        ([b"GET", b"HEAD"], False),
        ([b"GET, POST"], True),
        ([b"GET", b"POST"], True),
        ([b"POST"], True),
        ([b""], True),
        ([], True),
    ],
)
async def test_a_method_that_is_not_allowed_is_not_recorded_whatever_the_framework(
    allowed: list[bytes], is_recorded: bool
) -> None:
    front = front_of(Shop(status=405, headers=[(b"Allow", value) for value in allowed]))
    await request(front)
    assert (await request(front)).is_replay is is_recorded


@pytest.mark.parametrize(("method", "path"), [("POST", "/nowhere"), ("PATCH", "/payments")])
async def test_a_store_if_decides_about_what_no_route_has_too(method: str, path: str) -> None:
    front = front_of(sites()[1], store_if=lambda status, headers: True)
    await request(front, method, path)
    assert (await request(front, method, path)).is_replay


@pytest.mark.parametrize("status", [307, 308, 401, 403, 408, 421, 422, 423, 425, 426, 428, 429, 500, 502, 503, 504])
async def test_what_may_be_another_the_next_time_is_not_recorded(status: int) -> None:
    shop = Shop(status=status)
    front = front_of(shop)
    for _ in range(2):
        response = await request(front)
        assert (response.status, response.is_replay, response.body) == (status, False, b'{"paid": 42}')
    assert shop.runs == 2
    assert records_of(front) == []
    assert front.listener.kinds == [EventKind.CLAIMED, EventKind.RELEASED] * 2


@pytest.mark.parametrize("status", [202, 303, 409])
async def test_what_says_to_come_back_later_is_not_recorded(status: int) -> None:
    shop = Shop(status=status, headers=[JSON, (b"Retry-After", b"3")])
    front = front_of(shop)
    for _ in range(2):
        assert not (await request(front)).is_replay
    assert shop.runs == 2
    assert records_of(front) == []


async def test_whether_to_record_may_be_said_by_status_and_headers() -> None:
    asked: list[Any] = []

    def store_if(status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        asked.append((status, headers))
        return status == 503

    shop = Shop(headers=[JSON])
    front = front_of(shop, store_if=store_if)
    await request(front)
    shop.status = 503
    await request(front)
    assert (await request(front)).is_replay
    assert asked == [(201, [JSON]), (503, [JSON])]


async def test_a_store_if_that_fails_records(caplog: pytest.LogCaptureFixture) -> None:
    def store_if(status: int, headers: Any) -> bool:
        raise KeyError("secret")

    shop = Shop()
    front = front_of(shop, store_if=store_if)
    assert (await request(front)).status == 201
    assert (await request(front)).is_replay
    assert "store_if of the HTTP layer 'shop' raised KeyError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_response_that_is_not_recorded_gives_the_key_back_before_it_goes_out() -> None:
    shop = Shop(status=503, body=[b"one", b"two"])
    front = front_of(shop)
    connection = Connection([b"{}"])
    seen: list[Any] = []

    async def look(message: Any) -> None:
        seen.append((message["type"], records_of(front)))

    connection.on_send = look
    await front(scope_of(), connection.receive, connection.send)
    assert seen == [("http.response.start", []), ("http.response.body", []), ("http.response.body", [])]


async def test_a_response_that_is_not_recorded_goes_out_though_the_key_cannot_be_given_back() -> None:
    layer = PlannedLayer().plan("release", *[Fault(IdempotencyPersistenceConnectionError("down"))] * 50)
    front = front_of(Shop(status=503), layer=layer)
    response = await request(front)
    assert (response.status, response.body) == (503, b'{"paid": 42}')
    assert EventKind.PERSISTENCE_ERROR in front.listener.kinds


# --- When it is recorded ----------------------------------------------------------------------------------------------


async def statuses_when_sent(front: Front) -> list[tuple[bytes, str]]:
    """Return every piece of the body as it goes out, with the status of the record at that time."""
    connection = Connection([b"{}"])
    seen: list[tuple[bytes, str]] = []

    async def look(message: Any) -> None:
        if message["type"] == "http.response.body":
            [record] = records_of(front)
            seen.append((message.get("body", b""), str(record.status)))

    connection.on_send = look
    await front(scope_of(), connection.receive, connection.send)
    return seen


async def test_a_response_is_recorded_before_the_last_of_it_goes_out() -> None:
    front = front_of(Shop(headers=[JSON], body=[b"one", b"two", b""]))
    assert await statuses_when_sent(front) == [(b"one", "INPROGRESS"), (b"two", "INPROGRESS"), (b"", "COMPLETED")]


async def test_a_response_with_a_length_is_recorded_before_the_last_byte_of_it_goes_out() -> None:
    """Whoever has as many bytes as were promised does not wait for the message that ends them."""
    front = front_of(Shop(headers=[(b"content-length", b"6")], body=[b"one", b"two", b""]))
    assert await statuses_when_sent(front) == [(b"one", "INPROGRESS"), (b"two", "COMPLETED"), (b"", "COMPLETED")]
    assert (await request(front)).body == b"onetwo"


async def test_a_response_that_says_that_it_is_too_large_is_recorded_before_anything_of_it_goes_out() -> None:
    headers = [(b"content-length", b"6")]
    front = front_of(Shop(headers=headers, body=[b"12", b"3456"]), max_response_bytes=5)
    assert await statuses_when_sent(front) == [(b"12", "COMPLETED"), (b"3456", "COMPLETED")]


async def test_a_response_without_a_body_is_recorded_before_its_head_goes_out() -> None:
    front = front_of(Shop(status=204, headers=[], body=[b""]))
    connection = Connection([b"{}"])
    seen: list[str] = []

    async def look(message: Any) -> None:
        seen.extend(str(record.status) for record in records_of(front))

    connection.on_send = look
    await front(scope_of(), connection.receive, connection.send)
    assert seen == ["COMPLETED", "COMPLETED"]


async def test_whoever_has_the_response_can_retry_at_once() -> None:
    shop = Shop(headers=[JSON], body=[b"one", b"two"])
    front = front_of(shop)
    retries: list[Any] = []

    async def retry(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            retries.append(await request(front))

    connection = Connection([b"{}"], on_send=retry)
    await front(scope_of(), connection.receive, connection.send)
    assert [retry.is_replay for retry in retries] == [True]


# --- After it is recorded ---------------------------------------------------------------------------------------------


async def test_a_background_task_that_fails_does_not_give_the_key_back() -> None:
    async def fail() -> None:
        await asyncio.sleep(100)
        raise ValueError("mail server")

    shop = Shop(background=fail)
    front = front_of(shop)
    connection = Connection([b"{}"])
    with pytest.raises(ValueError, match="mail server"):
        await front(scope_of(), connection.receive, connection.send)
    assert connection.response.is_complete
    assert (await request(front)).is_replay
    assert shop.runs == 1


async def test_a_replay_starts_no_background_task() -> None:
    started: list[int] = []

    async def background() -> None:
        started.append(1)

    front = front_of(Shop(background=background))
    await request(front)
    await request(front)
    assert started == [1]


async def test_a_background_task_is_outside_the_claim() -> None:
    renewed: list[int] = []

    async def background() -> None:
        await asyncio.sleep(1000)
        renewed.append(front.layer.calls.count("renew"))

    front = front_of(Shop(background=background))
    await request(front)
    assert renewed == [0]


async def test_what_is_sent_after_the_response_goes_where_it_went_before() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Shop()(scope, receive, send)
        await send({"type": "http.response.trailers", "headers": []})

    response = await request(front_of(app))
    assert response.messages[-1]["type"] == "http.response.trailers"


async def memory_of(front: Front) -> tuple[int, int]:
    """Serve a request; return how much memory is held in the app's background task, and how much was at most."""
    held: list[int] = []

    async def note() -> None:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])

    front.app.background = note
    connection = Connection([b"{}"], is_gone=True)
    tracemalloc.start()
    try:
        await front(scope_of(), connection.receive, connection.send)
        return held[0], tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_a_copy_is_not_kept_longer_than_it_takes_to_record_it() -> None:
    front = front_of(Shop(headers=[JSON], body=[b"x" * 1_000_000]), max_response_bytes=1_000_000)
    held, _ = await memory_of(front)
    [record] = records_of(front)
    assert len(record.response_data) < held < 2 * len(record.response_data)


async def test_what_is_too_large_is_not_copied() -> None:
    front = front_of(Shop(headers=[JSON], body=[b"x" * 1_000_000]), max_response_bytes=1000)
    _, most = await memory_of(front)
    assert most < 500_000


# --- The layer's own answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, "about:blank"),
        ("https://shop.example/errors", "https://shop.example/errors#key-missing"),
        ("https://shop.example/errors/", "https://shop.example/errors/key-missing"),
        ("https://shop.example/errors#", "https://shop.example/errors#key-missing"),
    ],
)
async def test_the_type_of_an_answer_is_under_the_documentation_url(url: str | None, expected: str) -> None:
    response = await request(front_of(Shop(), required=True, documentation_url=url), key=None)
    assert response.problem["type"] == expected
    assert response.header(b"content-length") == str(len(response.body)).encode()


async def test_every_answer_has_the_url() -> None:
    url = "https://shop.example/errors"
    shop = Shop(seconds=5)
    front = front_of(shop, documentation_url=url, max_request_bytes=9, max_response_bytes=3)
    running = asyncio.create_task(request(front))
    await asyncio.sleep(1)
    answers = [
        await request(front),
        await request(front, body=b"another"),
        await request(front, body=b"more than nine"),
        await request(front, key=b""),
    ]
    await running
    answers.append(await request(front))
    assert [(answer.status, answer.problem["type"].removeprefix(url)) for answer in answers] == [
        (409, "#in-progress"),
        (422, "#key-reused"),
        (413, "#body-too-large"),
        (400, "#key-malformed"),
        (409, "#response-not-kept"),
    ]
