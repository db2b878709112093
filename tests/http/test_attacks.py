"""What a hostile reader would try: cancellation at every step, servers and middleware that behave oddly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response as StarletteResponse
from starlette.responses import StreamingResponse

from aidem.exceptions import IdempotencyConfigError, IdempotencyPersistenceConnectionError
from tests.support.asgi import Connection, Front, Response, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer, SettlingLayer, VirtualTimeLoop

DOWN = IdempotencyPersistenceConnectionError("down")
STREAM = [(b"content-type", b"text/plain")]


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


# --- Broken off at every step -----------------------------------------------------------------------------------------


class Endpoint:
    """An endpoint of Starlette that takes its time; what it answers is whole, a stream, or an error."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.runs = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        await asyncio.sleep(0.1)
        if self.kind != "unread":
            await Request(scope, receive).body()
        await self._answer()(scope, receive, send)

    def _answer(self) -> Any:
        if self.kind == "stream":
            return StreamingResponse(self._pieces())
        return StarletteResponse(b"paid", 500 if self.kind == "error" else 201)

    async def _pieces(self) -> AsyncIterator[bytes]:
        for piece in (b"pa", b"i", b"d"):
            await asyncio.sleep(0.1)
            yield piece


async def pass_on(request: Any, call_next: Any) -> Any:
    return await call_next(request)


def bare(app: Any, front: Callable[[Any], Front]) -> tuple[Any, Front]:
    made = front(app)
    return made, made


def middleware_outside(app: Any, front: Callable[[Any], Front]) -> tuple[Any, Front]:
    made = front(app)
    return BaseHTTPMiddleware(made, dispatch=pass_on), made


def middleware_inside(app: Any, front: Callable[[Any], Front]) -> tuple[Any, Front]:
    made = front(BaseHTTPMiddleware(app, dispatch=pass_on))
    return made, made


ARRANGEMENTS = [bare, middleware_outside, middleware_inside]


async def broken_off_at(step: int, kind: str, arrange: Any, layer: PlannedLayer) -> tuple[bool, str]:
    """Cancel a request after so many cycles of the loop, and retry; return whether it was over, and what happened."""
    app = Endpoint(kind)
    outermost, front = arrange(app, partial(front_of, layer=layer))
    connection = Connection([b"{", b"}"])
    running = asyncio.create_task(outermost(scope_of(), connection.receive, connection.send))
    for _ in range(step):
        await asyncio.sleep(0)
    is_over = running.done()
    running.cancel()
    await asyncio.wait([running])
    has_started, runs_before = bool(connection.messages), app.runs
    again = await request(front)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=60)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left"
    return is_over, _what_happened(again, has_started=has_started, runs=(runs_before, app.runs), kind=kind)


def _what_happened(again: Response, *, has_started: bool, runs: tuple[int, int], kind: str) -> str:
    before, after = runs
    if kind == "error":
        assert (again.status, after) == (500, before + 1)
        return "it ran again"
    if after == before + 1:
        assert not has_started, "it ran again although its response had begun to go out"
        assert (again.status, again.body, again.is_replay) == (201 if kind != "stream" else 200, b"paid", False)
        return "it ran again"
    if again.is_replay:
        assert again.body == b"paid"
        return "it was recorded"
    assert again.problem["title"] == "The request was processed, but its response was not stored"
    return "it was not kept"


@pytest.mark.parametrize("layer_class", [PlannedLayer, SettlingLayer])
@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("whole", {"it ran again", "it was recorded"}),
        ("unread", {"it ran again", "it was recorded"}),
        ("stream", {"it ran again", "it was not kept", "it was recorded"}),
        ("error", {"it ran again"}),
    ],
)
def test_cancelled_at_any_step_a_request_is_free_or_recorded_or_done(
    kind: str, expected: set[str], arrange: Any, layer_class: type[PlannedLayer]
) -> None:
    seen: set[str] = set()
    is_over, step = False, 0
    while not is_over:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, VirtualTimeLoop)
            loop.pass_time_in_every_cycle(0.02)
            layer = layer_class(latency_seconds=0.05)
            is_over, happened = runner.run(broken_off_at(step, kind, arrange, layer))
        seen.add(happened)
        step += 1
    assert seen == expected


async def test_cancelled_while_the_store_is_away_a_response_that_has_begun_ends_soon(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await asyncio.sleep(10_000)

    layer = PlannedLayer().plan("complete", *[Fault(DOWN)] * 1000)
    front = front_of(app, layer=layer, settings={"lease_seconds": 600})
    connection = Connection([b"{}"])
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(1)
    running.cancel()
    await asyncio.wait([running], timeout=15)
    assert running.cancelled()
    assert "could not be recorded in time" in caplog.text


@pytest.mark.parametrize("messages", [[], [{"type": "http.response.start", "headers": [(b"content-length", b"4")]}]])
async def test_an_app_that_answers_nothing_is_in_doubt_where_it_must_not_run_again(messages: list[Any]) -> None:
    runs: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        for message in messages:
            await send(message | {"status": 201})

    front = front_of(app, settings={"on_abandoned": "raise"})
    assert (await request(front)).messages == []
    assert (await request(front)).problem["title"] == "It is not known whether the request was processed"
    assert len(runs) == 1


# --- Servers that say by an error that the client is gone -------------------------------------------------------------


class Gone(Connection):
    """A server as ASGI 2.4 describes it: sending to a client that is gone raises an OSError."""

    after_messages = 0

    async def send(self, message: dict[str, Any]) -> None:
        if len(self.messages) >= self.after_messages:
            raise OSError("the client is gone")
        await super().send(message)


def starlette_stream(*pieces: bytes) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def body() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece
                app.yielded += 1  # type: ignore[attr-defined]

        await StreamingResponse(body())(scope, receive, send)

    app.yielded = 0  # type: ignore[attr-defined]
    return app


@pytest.mark.parametrize("after_messages", [0, 1, 2, 3])
async def test_a_stream_runs_to_its_end_and_is_recorded_though_sending_fails(after_messages: int) -> None:
    app = starlette_stream(b"one", b"two", b"three")
    front = front_of(app)
    connection = Gone([b"{}"])
    connection.after_messages = after_messages
    asgi = {"version": "3.0", "spec_version": "2.4"}
    with pytest.raises(ClientDisconnect):  # of the last message, which comes after the recording
        await front(scope_of(asgi=asgi), connection.receive, connection.send)
    assert app.yielded == 3
    again = await request(front)
    assert (again.is_replay, again.body) == (True, b"onetwothree")


async def test_a_stream_that_has_outgrown_the_copy_ends_when_sending_fails() -> None:
    app = starlette_stream(*[b"123"] * 1000)
    front = front_of(app, max_response_bytes=5)
    connection = Gone([b"{}"])
    connection.after_messages = 4
    with pytest.raises(ClientDisconnect):
        await front(scope_of(asgi={"version": "3.0", "spec_version": "2.4"}), connection.receive, connection.send)
    assert app.yielded < 10
    assert (await request(front)).status == 409


# --- Middleware and layers further out --------------------------------------------------------------------------------


async def test_a_retry_by_middleware_further_out_is_claimed_and_recorded_like_every_other() -> None:
    class Flaky(Shop):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            self.error = None if self.runs else ValueError("once")
            await super().__call__(scope, receive, send)

    front, scope = front_of(Flaky()), scope_of()
    with pytest.raises(ValueError, match="once"):
        await front(scope, Connection([b"{}"]).receive, Connection([]).send)
    connection = Connection([b"{}"])
    await front(scope, connection.receive, connection.send)
    assert connection.response.status == 201
    assert (await request(front)).is_replay
    assert front.app.runs == 2


async def test_middleware_further_out_that_sends_one_scope_twice_at_once_runs_the_request_once() -> None:
    front, scope = front_of(Shop(seconds=1)), scope_of()
    hedged = [Connection([b"{}"]), Connection([b"{}"])]
    await asyncio.gather(*(front(scope, each.receive, each.send) for each in hedged))
    assert (front.app.runs, sorted(each.response.status for each in hedged)) == (1, [201, 409])
    assert (await request(front)).is_replay


async def test_layers_of_one_prefix_are_one_though_another_lies_between() -> None:
    shop, layer = Shop(), PlannedLayer()
    front = front_of(front_of(front_of(shop, layer=layer), layer=layer, key_prefix="between"), layer=layer)
    first, second = await request(front), await request(front)
    assert (first.status, second.status, second.is_replay, shop.runs) == (201, 201, True, 1)


async def test_who_is_further_out_sees_what_the_app_has_written_into_the_scope() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["extensions"] == {}
        scope["route"] = "/payments"
        await Shop()(scope, receive, send)

    scope = scope_of(extensions={"http.response.pathsend": {}})
    await front_of(app)(scope, Connection([b"{}"]).receive, Connection([]).send)
    assert scope["route"] == "/payments"
    assert scope["extensions"] == {"http.response.pathsend": {}}


# --- Options that would do something else than they say ---------------------------------------------------------------


async def store_nothing(status: int, headers: Any) -> bool:
    return False


class StoreNothing:
    async def __call__(self, status: int, headers: Any) -> bool:
        return False


@pytest.mark.parametrize("store_if", [store_nothing, StoreNothing(), partial(store_nothing)])
def test_a_store_if_that_is_async_is_refused_because_its_answer_would_always_be_yes(store_if: Any) -> None:
    with pytest.raises(IdempotencyConfigError, match=r"^store_if=.* not async"):
        front_of(Shop(), store_if=store_if)
