"""Streaming: without delay, with a bounded copy; and what the app hears of a client that goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from aidem._http.exchange import LINGER_SECONDS
from aidem.exceptions import IdempotencySerializationError
from aidem.hooks import EventKind
from tests.support.asgi import JSON, Connection, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def streaming(*chunks: bytes, seconds: float = 1.0, headers: Any = ((b"content-type", b"text/plain"),)) -> Any:
    """Return an app that sends a chunk every so many seconds, and remembers its runs."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        app.runs += 1  # type: ignore[attr-defined]
        await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        for chunk in chunks:
            await asyncio.sleep(seconds)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await asyncio.sleep(seconds)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    app.runs = 0  # type: ignore[attr-defined]
    return app


def timed(connection: Connection) -> list[tuple[float, bytes | None]]:
    """Note when what goes out: the head as None."""
    started = asyncio.get_running_loop().time()
    times: list[tuple[float, bytes | None]] = []

    async def note(message: Any) -> None:
        times.append((round(asyncio.get_running_loop().time() - started, 3), message.get("body")))

    connection.on_send = note
    return times


# --- Without delay ----------------------------------------------------------------------------------------------------


async def test_a_stream_goes_out_chunk_by_chunk_without_delay_and_is_replayed_whole() -> None:
    app = streaming(b"one", b"two", b"three")
    front = front_of(app)
    connection = Connection([b"{}"])
    times = timed(connection)
    await front(scope_of(), connection.receive, connection.send)
    assert times == [(0, None), (1, b"one"), (2, b"two"), (3, b"three"), (4, b"")]
    replay = await request(front)
    assert replay.is_replay
    assert replay.body == b"onetwothree"


async def test_a_stream_that_declares_its_length_goes_out_with_its_first_chunk() -> None:
    app = streaming(b"one", b"two", headers=[(b"content-length", b"6")])
    connection = Connection([b"{}"])
    times = timed(connection)
    await front_of(app)(scope_of(), connection.receive, connection.send)
    assert times == [(1, None), (1, b"one"), (2, b"two"), (3, b"")]


async def test_the_claim_is_renewed_as_long_as_the_stream_lasts() -> None:
    app = streaming(b"one", b"two", seconds=100)
    front = front_of(app)
    running = asyncio.create_task(request(front))
    await asyncio.sleep(250)
    assert (await request(front)).status == 409
    assert (await running).is_complete
    assert app.runs == 1


async def test_other_messages_of_the_response_go_out_as_they_come() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.early_hint", "links": []})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.push", "path": "/", "headers": []})
        await send({"type": "http.response.body", "body": b"one"})

    response = await request(front_of(app))
    assert [message["type"].rpartition(".")[2] for message in response.messages] == [
        "early_hint",
        "start",
        "push",
        "body",
    ]


# --- A bounded copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[b"12345"], [b"12", b"34", b"5"]])
async def test_a_response_of_the_largest_size_is_kept(chunks: list[bytes]) -> None:
    front = front_of(Shop(headers=[JSON], body=chunks), max_response_bytes=5)
    await request(front)
    assert (await request(front)).body == b"12345"


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [
        ([b"123456"], [JSON]),
        ([b"123", b"456"], [JSON]),
        ([b"123", b"456", b"789"], [JSON]),
        ([b"123456"], [(b"content-length", b"6")]),
        ([b"123", b"456"], [(b"content-length", b"6")]),
    ],
)
async def test_a_larger_response_goes_out_and_is_done_and_not_kept(chunks: list[bytes], headers: Any) -> None:
    shop = Shop(headers=headers, body=chunks)
    front = front_of(shop, max_response_bytes=5)
    first = await request(front)
    assert first.status == 201
    assert first.body == b"".join(chunks)
    for _ in range(2):
        again = await request(front)
        assert again.status == 409
        assert again.header(b"retry-after") is None
        assert again.problem["title"] == "The request was processed, but its response was not stored"
    assert shop.runs == 1
    assert front.listener.kinds[:3] == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.RESULT_UNAVAILABLE]


async def test_an_endless_response_is_done_when_it_has_outgrown_the_copy() -> None:
    app = streaming(*[b"123"] * 1000)
    front = front_of(app, max_response_bytes=5)
    running = asyncio.create_task(request(front))
    await asyncio.sleep(10)
    assert (await request(front)).problem["title"] == "The request was processed, but its response was not stored"
    await running
    assert app.runs == 1


async def test_what_the_layer_itself_finds_too_large_goes_out_and_is_done_and_not_kept() -> None:
    shop = Shop()
    layer = PlannedLayer().plan("complete", Fault(IdempotencySerializationError("too large")))
    front = front_of(shop, layer=layer)
    assert (await request(front)).body == b'{"paid": 42}'
    assert (await request(front)).status == 409
    assert shop.runs == 1
    assert EventKind.RESULT_UNAVAILABLE in front.listener.kinds


async def test_files_pass_as_bytes(tmp_path: Any) -> None:
    path = tmp_path / "receipt.txt"
    path.write_bytes(b"paid")
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(dict(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": path.read_bytes()})

    extensions: dict[str, Any] = {
        "http.response.pathsend": {},
        "http.response.zerocopysend": {},
        "http.response.trailers": {},
        "http.response.push": {},
    }
    front = front_of(app)
    given = scope_of(extensions=extensions)
    connection = Connection([b"{}"])
    await front(given, connection.receive, connection.send)
    assert scopes[0]["extensions"] == {"http.response.push": {}}
    assert given["extensions"] is extensions
    assert len(extensions) == 4
    assert (await request(front)).body == b"paid"


async def test_a_scope_without_such_extensions_is_the_original() -> None:
    shop = Shop()
    connection = Connection([b"{}"])
    for scope in (scope_of(), scope_of(key=b"k", extensions={"http.response.push": {}})):
        await front_of(shop)(scope, Connection([b"{}"]).receive, connection.send)
        assert shop.scopes[-1] is scope


# --- A client that goes -----------------------------------------------------------------------------------------------


def starlette_stream(*chunks: bytes, seconds: float = 1.0) -> Any:
    """Return an app whose stream Starlette breaks off as soon as it hears of a disconnect."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            app.runs += 1  # type: ignore[attr-defined]
            for chunk in chunks:
                await asyncio.sleep(seconds)
                yield chunk
            app.ends += 1  # type: ignore[attr-defined]

        await receive()
        await StreamingResponse(pieces())(scope, receive, send)

    app.runs = app.ends = 0  # type: ignore[attr-defined]
    return app


async def test_starlette_breaks_off_a_stream_when_the_client_goes() -> None:
    """The fact that the next tests depend on."""
    app = starlette_stream(b"one", b"two", b"three")
    connection = Connection([b"{}"])
    running = asyncio.create_task(app(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(1.5)
    connection.disconnect()
    await running
    assert (app.runs, app.ends) == (1, 0)


async def test_a_stream_whose_client_goes_runs_to_its_end_and_is_recorded() -> None:
    app = starlette_stream(b"one", b"two", b"three")
    front = front_of(app)
    connection = Connection([b"{}"])
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(1.5)
    connection.disconnect()
    await running
    assert connection.response.body == b"one"
    assert (app.runs, app.ends) == (1, 1)
    replay = await request(front)
    assert (replay.is_replay, replay.body) == (True, b"onetwothree")


async def test_a_stream_that_is_complete_is_recorded_though_recording_takes_its_time() -> None:
    app = starlette_stream(b"one")
    layer = PlannedLayer().plan("complete", Fault(before_seconds=3))
    front = front_of(app, layer=layer)
    assert (await request(front)).body == b"one"
    assert (await request(front)).is_replay
    assert app.runs == 1


async def test_a_stream_that_has_outgrown_the_copy_is_broken_off_when_the_client_goes() -> None:
    app = starlette_stream(*[b"123"] * 1000)
    front = front_of(app, max_response_bytes=5)
    connection = Connection([b"{}"])
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(5.5)
    connection.disconnect()
    await running
    assert (app.runs, app.ends) == (1, 0)
    assert (await request(front)).status == 409


async def test_a_stream_that_is_not_recorded_is_broken_off_when_the_client_goes() -> None:
    app = starlette_stream(*[b"123"] * 1000)
    front = front_of(app, store_if=lambda status, headers: False)
    connection = Connection([b"{}"])
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(1.5)
    connection.disconnect()
    await running
    assert (app.runs, app.ends) == (1, 0)


async def test_a_stream_that_goes_on_for_long_without_its_client_is_broken_off_and_done() -> None:
    app = starlette_stream(*[b"1"] * 1000, seconds=100)
    front = front_of(app)
    connection = Connection([b"{}"])
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(5000)  # as long as the client is there, it may last
    connection.disconnect()
    await asyncio.sleep(LINGER_SECONDS - 1)
    assert (await request(front)).problem["title"] == "A request with this Idempotency-Key is in progress"
    await asyncio.sleep(2)
    assert running.done()
    assert (await request(front)).problem["title"] == "The request was processed, but its response was not stored"
    renewals = front.layer.calls.count("renew")
    await asyncio.sleep(5000)
    assert front.layer.calls.count("renew") == renewals > 0
    assert (app.runs, app.ends) == (1, 0)


async def test_a_stream_that_hears_nothing_of_its_client_is_done_when_it_has_gone_on_for_long_without() -> None:
    """A server may also say it by an error when something is sent, and an app may not care."""

    async def refuse(message: Any) -> None:
        if asyncio.get_running_loop().time() >= gone_at:
            refused.append(message)
            raise OSError("the client is gone")

    app = streaming(*[b"1"] * 1000, seconds=100)
    front = front_of(app)
    connection = Connection([b"{}"], on_send=refuse)
    refused: list[Any] = []
    gone_at = asyncio.get_running_loop().time() + 5050
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(5100 + LINGER_SECONDS - 1)
    assert len(refused) == LINGER_SECONDS / 100
    assert (await request(front)).problem["title"] == "A request with this Idempotency-Key is in progress"
    await asyncio.sleep(2)
    with pytest.raises(OSError, match="the client is gone"):
        await running
    assert (await request(front)).problem["title"] == "The request was processed, but its response was not stored"
    assert app.runs == 1


async def test_a_stream_that_begins_long_after_its_client_has_gone_has_as_much_time_as_every_other() -> None:
    heard: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

        async def listen() -> None:
            await receive()
            heard.append(asyncio.get_running_loop().time() - started)

        started = asyncio.get_running_loop().time()
        listening = asyncio.create_task(listen())
        await asyncio.sleep(10 * LINGER_SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await asyncio.sleep(LINGER_SECONDS * 0.4)
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
        if scope["path"] == "/endless":
            await listening
        else:
            await send({"type": "http.response.body", "body": b"2"})
            await listening

    front = front_of(app)
    for path, seconds in (("/payments", 10.8 * LINGER_SECONDS), ("/endless", 11 * LINGER_SECONDS)):
        connection = Connection([b"{}"])
        connection.disconnect()
        await front(scope_of(path=path, key=path.encode()), connection.receive, connection.send)
        assert heard.pop() == pytest.approx(seconds)
    assert (await request(front, key=b"/payments")).body == b"112"
    assert (await request(front, path="/endless", key=b"/endless")).status == 409


async def test_a_disconnect_that_the_app_stopped_waiting_for_is_there_when_it_asks_again() -> None:
    """Though the server, like those with a queue of messages, says it once."""
    asked: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    asked.append(await receive())
        await Response(b"paid")(scope, receive, send)
        asked.append((await receive())["type"])

    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    front = front_of(app)
    await front(scope_of(), receive, Connection([]).send)
    assert asked == ["http.disconnect"]
    assert (await request(front)).body == b"paid"


# --- Streams of events ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"text/event-stream", b"Text/Event-Stream; charset=utf-8"])
async def test_a_stream_of_events_is_not_stored_unless_asked_for(value: bytes) -> None:
    app = streaming(b"data: 1\n\n", headers=[(b"Content-Type", value)])
    front = front_of(app)
    connection = Connection([b"{}"])
    records: list[int] = []

    async def look(message: Any) -> None:
        records.append(len(front.layer.inner.records()))

    connection.on_send = look
    await front(scope_of(), connection.receive, connection.send)
    assert records == [0, 0, 0]  # the key is given back before anything goes out
    assert not (await request(front)).is_replay
    keeping = front_of(app, store_if=lambda status, headers: True)
    await request(keeping)
    assert (await request(keeping)).body == b"data: 1\n\n"
    assert app.runs == 3


async def test_a_stream_of_events_hears_at_once_that_its_client_is_gone() -> None:
    async def events() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(1)
            yield b": still there\n\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    connection = Connection([b"{}"])
    running = asyncio.create_task(front_of(app)(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(5.5)
    connection.disconnect()
    async with asyncio.timeout(1):
        await running


async def test_a_disconnect_is_kept_until_the_response_is_recorded_and_never_invented() -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

        async def listen() -> None:
            heard.append((await receive())["type"])

        listening = asyncio.create_task(listen())
        await asyncio.sleep(10)
        heard.append("nothing yet")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        await asyncio.sleep(1)
        heard.append("done")
        await listening

    connection = Connection([b"{}"])
    connection.disconnect()
    connection.is_gone = True
    await front_of(app)(scope_of(), connection.receive, connection.send)
    assert heard == ["nothing yet", "http.disconnect", "done"]


async def test_whether_the_client_is_there_can_be_asked_without_waiting() -> None:
    asked: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        starlette_request = Request(scope, receive)
        await starlette_request.body()
        asked.append(await starlette_request.is_disconnected())
        await Response(b"paid")(scope, receive, send)

    front = front_of(app)
    connection = Connection([b"{}"])
    connection.disconnect()
    await front(scope_of(), connection.receive, connection.send)
    assert asked == [False]
    assert (await request(front)).body == b"paid"
