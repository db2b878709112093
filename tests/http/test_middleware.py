"""Middleware around the layer and within it that edits what passes: recorded is what the app sent, nothing else."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.asgi import JSON, Connection, Front, Shop, front_of, scope_of
from tests.support.asgi import request as request_to

WHOLE = (b"content-length", b"9")
MARK = (b"idempotent-replayed", b"true")
TEXT = b"a line of text\n" * 10_000  # more than one message of a file


class Editor:
    """Edits each message of the response in place, whatever it is."""

    def __init__(self, app: Any, edit: Callable[[Any], Any]) -> None:
        self.app = app
        self.edit = edit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def edited(message: Any) -> None:
            self.edit(message)
            await send(message)

        await self.app(scope, receive, edited)


def append(message: Any) -> None:
    if message["type"] == "http.response.start":
        message["headers"].append((b"x-outside", b"1"))


def remove(message: Any) -> None:
    if message["type"] == "http.response.start":
        del message["headers"][0]


def replace(message: Any) -> None:
    if message["type"] == "http.response.start":
        message["headers"][0] = (b"x-outside", b"1")


def clear(message: Any) -> None:
    if message["type"] == "http.response.start":
        message["headers"].clear()
        message["status"] = 299


def rewrite(message: Any) -> None:
    if message["type"] == "http.response.body":
        message["body"] = b"outside"
        message["x-outside"] = True


EDITS = [append, remove, replace, clear, rewrite]


@pytest.mark.parametrize("use_local_cache", [False, True])
@pytest.mark.parametrize("headers", [[JSON], [JSON, WHOLE]], ids=["a stream", "a length"])
@pytest.mark.parametrize("edit", EDITS)
async def test_what_is_edited_further_out_is_not_recorded(edit: Any, headers: Any, use_local_cache: bool) -> None:
    shop = Shop(headers=[*headers], body=[b"one", b"two", b"six"])
    front = front_of(shop, settings={"use_local_cache": use_local_cache})
    outermost = Editor(front, edit)
    for _ in range(3):  # replays are edited, too
        await request_to(outermost)
        assert shop.headers == headers
    replay = await request_to(front)
    assert (replay.status, replay.headers, replay.body) == (201, [*headers, MARK], b"onetwosix")
    assert shop.runs == 1


@pytest.mark.parametrize("edit", EDITS)
async def test_what_is_edited_further_in_is_recorded_as_it_went_out(edit: Any) -> None:
    front = front_of(Editor(Shop(headers=[JSON], body=[b"one", b"two", b"six"]), edit))
    first, replay = await request_to(front), await request_to(front)
    assert replay.headers == [*first.headers, MARK]
    assert (replay.status, replay.body) == (first.status, first.body)


async def test_an_app_may_use_one_message_for_all_and_change_it_after_it_was_sent() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [JSON, WHOLE]
        message = {"type": "http.response.start", "status": 201, "headers": headers}
        await send(message)
        headers.clear()
        message["status"] = 299
        chunk = bytearray(3)
        message = {"type": "http.response.body", "body": chunk, "more_body": True}
        for text in (b"one", b"two"):
            chunk[:] = text
            await send(message)
        await send(message | {"body": b"six", "more_body": False})

    front = front_of(app)
    first = await request_to(front)
    assert (first.status, first.headers) == (201, [JSON, WHOLE])
    replay = await request_to(Editor(front, rewrite))
    assert (replay.status, replay.headers) == (201, [JSON, WHOLE, MARK])
    assert (await request_to(front)).body == b"onetwosix"


async def test_what_an_app_reuses_is_not_edited_further_out() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": [JSON]})
        message = {"type": "http.response.body", "body": b"one", "more_body": True}
        for _ in range(3):
            await send(message)
        await send({"type": "http.response.body", "body": b""})

    front = front_of(app)
    await request_to(Editor(front, rewrite))
    assert (await request_to(front)).body == b"oneoneone"


async def test_header_names_and_values_may_be_buffers_that_change() -> None:
    name, value = bytearray(b"x-a"), bytearray(b"1")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": [(name, value)]})
        name[:], value[:] = b"x-b", b"2"
        await send({"type": "http.response.body", "body": b"paid"})

    front = front_of(app)
    await request_to(front)
    assert (await request_to(front)).headers == [(b"x-a", b"1"), MARK]


async def test_a_store_if_cannot_change_what_is_recorded() -> None:
    def store_if(status: int, headers: Any) -> bool:
        headers.clear()
        return True

    front = front_of(Shop(headers=[JSON]), store_if=store_if)
    first, replay = await request_to(front), await request_to(front)
    assert (first.headers, replay.headers) == ([JSON], [JSON, MARK])


# --- Starlette's ------------------------------------------------------------------------------------------------------


def site(path: Path) -> tuple[Starlette, list[str]]:
    """Return an app with a file that varies, a stream and a plain response, and what it served."""
    path.write_bytes(TEXT)
    served: list[str] = []

    async def document(request: Request) -> Response:
        served.append("document")
        return FileResponse(path, headers={"vary": "cookie"})

    async def stream(request: Request) -> Response:
        async def lines() -> Any:
            for line in (TEXT[:1000], TEXT[1000:]):
                yield line

        served.append("stream")
        return StreamingResponse(lines(), headers={"vary": "cookie"})

    async def plain(request: Request) -> Response:
        served.append("plain")
        return Response(TEXT, headers={"vary": "cookie"})

    return Starlette(
        routes=[Route(f"/{each.__name__}", each, methods=["POST"]) for each in (document, stream, plain)]
    ), served


async def seen(app: Any, path: str, encoding: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    headers = {"idempotency-key": '"k"', "accept-encoding": encoding}
    async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
        return await client.post(path, headers=headers)


PATHS = pytest.mark.parametrize("path", ["/document", "/stream", "/plain"])


@PATHS
async def test_a_replay_is_compressed_for_each_client_as_it_likes(tmp_path: Path, path: str) -> None:
    app, served = site(tmp_path / "text")
    outermost = GZipMiddleware(front_of(app))
    first = await seen(outermost, path, "gzip")
    for encoding in ("gzip", "identity", "gzip"):
        replay = await seen(outermost, path, encoding)
        assert replay.content == first.content == TEXT
        assert replay.headers.get("content-encoding", "identity") == encoding
        assert replay.headers["vary"].startswith("cookie")
        assert replay.headers["idempotent-replayed"] == "true"
    assert first.headers["content-encoding"] == "gzip"
    assert served == [path.removeprefix("/")]


@PATHS
async def test_what_is_compressed_further_in_is_replayed_byte_by_byte(tmp_path: Path, path: str) -> None:
    app, served = site(tmp_path / "text")
    front = front_of(GZipMiddleware(app))
    connections = [Connection([b""]) for _ in range(2)]
    for connection in connections:
        scope = scope_of(path=path, headers=[(b"accept-encoding", b"gzip")])
        await front(scope, connection.receive, connection.send)
    first, replay = (connection.response for connection in connections)
    assert first.header(b"content-encoding") == b"gzip"
    assert gzip.decompress(first.body) == TEXT
    assert (replay.headers, replay.body) == ([*first.headers, MARK], first.body)
    assert served == [path.removeprefix("/")]


async def edit_headers(request: Request, call_next: Any) -> Any:
    response = await call_next(request)
    response.headers["x-outside"] = "1"
    del response.headers["vary"]
    return response


def outside(app: Any) -> tuple[Any, Front]:
    front = front_of(app)
    return BaseHTTPMiddleware(front, dispatch=edit_headers), front


def inside(app: Any) -> tuple[Any, Front]:
    front = front_of(BaseHTTPMiddleware(app, dispatch=edit_headers))
    return front, front


@PATHS
@pytest.mark.parametrize(("order", "is_recorded"), [(outside, False), (inside, True)])
async def test_headers_may_be_edited_by_function_middleware(
    tmp_path: Path, path: str, order: Any, is_recorded: bool
) -> None:
    app, served = site(tmp_path / "text")
    outermost, front = order(app)
    for _ in range(2):
        response = await seen(outermost, path, "identity")
        assert (response.content, response.headers["x-outside"]) == (TEXT, "1")
        assert "vary" not in response.headers
    record = await seen(front, path, "identity")
    assert record.content == TEXT
    assert ("x-outside" in record.headers, "vary" in record.headers) == (is_recorded, not is_recorded)
    assert served == [path.removeprefix("/")]
