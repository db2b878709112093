"""Responses that do not come to their end, and recordings that fail."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import Any

import pytest

from aidem.exceptions import (
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
)
from aidem.hooks import EventKind
from tests.support.asgi import JSON, Connection, Front, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer
from tests.support.records import put

DENIED = IdempotencyPersistenceConfigError("denied")
DOWN = IdempotencyPersistenceConnectionError("down")
NOT_KEPT = "The request was processed, but its response was not stored"
STREAM = [(b"content-type", b"text/plain")]
WHOLE = [(b"content-length", b"6")]


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


class Breaking:
    """An app that sends so many messages, then does what it is told to."""

    def __init__(self, messages: int, then: Any, headers: Any = STREAM, status: int = 200) -> None:
        self.runs = 0
        self._messages = messages
        self._then = then
        self._headers = headers
        self._status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        messages = [
            {"type": "http.response.start", "status": self._status, "headers": self._headers},
            {"type": "http.response.body", "body": b"one", "more_body": True},
        ]
        for message in messages[: self._messages]:
            await send(message)
        await self._then()


async def fail() -> None:
    raise ValueError("no")


async def hang() -> None:
    await asyncio.sleep(10_000)


async def end() -> None: ...


async def cancelled_after(seconds: float, front: Front) -> Connection:
    connection = Connection([b"{}"])
    running = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(seconds)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    return connection


# --- Before the start has gone out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "headers"), [(0, STREAM), (1, WHOLE)])
async def test_an_exception_before_the_start_has_gone_out_gives_the_key_back(messages: int, headers: Any) -> None:
    app = Breaking(messages, fail, headers)
    front = front_of(app)
    for _ in range(2):
        connection = Connection([b"{}"])
        with pytest.raises(ValueError, match="no") as caught:
            await front(scope_of(), connection.receive, connection.send)
        assert connection.messages == []
        assert not hasattr(caught.value, "__notes__")
    assert app.runs == 2
    assert front.listener.kinds == [EventKind.CLAIMED, EventKind.RELEASED] * 2


async def test_a_cancellation_before_the_start_has_gone_out_gives_the_key_back() -> None:
    app = Breaking(0, hang)
    front = front_of(app)
    await cancelled_after(1, front)
    await cancelled_after(1, front)
    assert app.runs == 2


@pytest.mark.parametrize(("messages", "headers"), [(0, STREAM), (1, WHOLE)])
async def test_an_app_that_answers_nothing_gives_the_key_back(messages: int, headers: Any) -> None:
    app = Breaking(messages, end, headers)
    front = front_of(app)
    for _ in range(2):
        connection = Connection([b"{}"])
        await front(scope_of(), connection.receive, connection.send)
        assert connection.messages == []  # so the server answers
    assert app.runs == 2


async def test_a_key_that_cannot_be_given_back_is_noted_on_the_exception() -> None:
    front = front_of(Breaking(0, fail), layer=PlannedLayer().plan("release", Fault(DENIED)))
    with pytest.raises(ValueError, match="no") as caught:
        await request(front)
    assert "could not release the claim" in caught.value.__notes__[0]


async def test_a_coroutine_that_is_closed_before_the_start_has_gone_out_gives_the_key_back() -> None:
    app = Breaking(0, hang)
    front = front_of(app, layer=PlannedLayer())
    coroutine = await suspended(front)
    coroutine.close()
    await asyncio.sleep(1)
    assert front.layer.inner.records() == {}


async def test_a_coroutine_may_be_closed_from_another_context() -> None:
    front = front_of(Breaking(0, hang), layer=PlannedLayer())
    coroutine = await suspended(front)
    contextvars.Context().run(coroutine.close)
    await asyncio.sleep(1)
    assert front.layer.inner.records() == {}


# --- After it has gone out --------------------------------------------------------------------------------------------


async def suspended(front: Front) -> Any:
    """Return a coroutine of a request that waits in its app, run by hand in this task's loop."""
    connection = Connection([b"{}"])
    coroutine = front(scope_of(), connection.receive, connection.send)
    future: Any = coroutine.send(None)
    while front.app.runs == 0 or front.layer.calls != ["acquire"]:
        future._asyncio_future_blocking = False
        await asyncio.wait([future])
        future = coroutine.send(None)
    future._asyncio_future_blocking = False
    return coroutine


async def is_done_and_not_kept(front: Front) -> bool:
    response = await request(front)
    return response.status == 409 and response.problem["title"] == NOT_KEPT


@pytest.mark.parametrize(("messages", "headers"), [(1, STREAM), (2, STREAM), (2, WHOLE)])
async def test_an_exception_after_the_start_has_gone_out_never_gives_the_key_back(messages: int, headers: Any) -> None:
    app = Breaking(messages, fail, headers)
    front = front_of(app)
    with pytest.raises(ValueError, match="no"):
        await request(front)
    assert await is_done_and_not_kept(front)
    assert app.runs == 1
    assert front.listener.kinds[:3] == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.RESULT_UNAVAILABLE]


async def test_a_cancellation_after_the_start_has_gone_out_never_gives_the_key_back() -> None:
    app = Breaking(2, hang)
    front = front_of(app)
    connection = await cancelled_after(1, front)
    assert connection.response.body == b"one"
    assert await is_done_and_not_kept(front)


async def test_a_return_without_the_last_of_the_body_never_gives_the_key_back() -> None:
    front = front_of(Breaking(2, end))
    connection = Connection([b"{}"])
    await front(scope_of(), connection.receive, connection.send)
    assert not connection.response.is_complete
    assert await is_done_and_not_kept(front)


async def test_a_start_that_may_have_gone_out_counts_as_gone_out() -> None:
    async def refuse(message: Any) -> None:
        raise RuntimeError("broken pipe")

    app = Breaking(1, end)
    front = front_of(app)
    connection = Connection([b"{}"], on_send=refuse)
    with pytest.raises(RuntimeError, match="broken pipe"):
        await front(scope_of(), connection.receive, connection.send)
    assert await is_done_and_not_kept(front)


async def test_an_app_cannot_take_a_start_back_that_has_gone_out() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await send({"type": "http.response.start", "status": 500, "headers": STREAM})
        await send({"type": "http.response.body", "body": b""})

    front = front_of(app)
    first = await request(front)
    assert [message.get("status") for message in first.messages] == [200, 500, None]  # a fault for the server to name
    assert (await request(front)).is_replay


async def test_a_body_without_a_start_is_a_fault_for_the_server_to_name() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.body", "body": b"one"})

    front = front_of(app)
    assert (await request(front)).messages == [{"type": "http.response.body", "body": b"one"}]
    assert front.layer.inner.records() == {}


async def test_a_failure_to_record_does_not_replace_the_apps_exception(caplog: pytest.LogCaptureFixture) -> None:
    front = front_of(Breaking(2, fail), layer=PlannedLayer().plan("complete", Fault(DENIED)))
    with pytest.raises(ValueError, match="no"):
        await request(front)
    assert "was not recorded: denied" in caplog.text


async def test_a_lost_lease_does_not_replace_the_apps_exception() -> None:
    front = front_of(Breaking(2, fail))
    connection = Connection([b"{}"])

    async def lose(message: Any) -> None:
        for record in front.layer.inner.records().values():
            put(front.layer.inner, record.replace(owner="another"))

    connection.on_send = lose
    with pytest.raises(ValueError, match="no"):
        await front(scope_of(), connection.receive, connection.send)


async def test_a_coroutine_that_is_closed_after_the_start_has_gone_out_is_done() -> None:
    app = Breaking(2, hang)
    front = front_of(app, layer=PlannedLayer())
    coroutine = await suspended(front)
    coroutine.close()
    await asyncio.sleep(1)
    assert await is_done_and_not_kept(front)
    assert app.runs == 1


async def test_what_waits_for_a_disconnect_hears_of_it_when_the_app_has_ended() -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

        async def listen() -> None:
            heard.append((await receive())["type"])

        app.listening = asyncio.create_task(listen())  # type: ignore[attr-defined]

    connection = Connection([b"{}"])
    await front_of(app)(scope_of(), connection.receive, connection.send)
    connection.disconnect()
    await app.listening  # type: ignore[attr-defined]
    assert heard == ["http.disconnect"]


# --- Recordings that fail ---------------------------------------------------------------------------------------------


async def test_a_failure_to_record_before_the_start_went_out_is_503_done_not_recorded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop = Shop()
    front = front_of(shop, layer=PlannedLayer().plan("complete", Fault(DENIED)))
    response = await request(front)
    assert response.status == 503
    assert response.problem["title"] == "The request was processed, but this could not be recorded"
    assert response.header(b"retry-after") is None  # it may run again
    assert response.is_complete
    assert front.listener.kinds == [EventKind.CLAIMED, EventKind.ABANDONED, EventKind.PERSISTENCE_ERROR]
    assert "a response of the HTTP layer 'shop' was not recorded: denied" in caplog.text
    assert "paid" not in caplog.text


async def test_what_an_app_sends_after_the_503_goes_nowhere() -> None:
    shop = Shop(body=[b'{"paid"', b": 42}"])
    shop.headers = [(b"content-length", b"3")]
    response = await request(front_of(shop, layer=PlannedLayer().plan("complete", Fault(DENIED))))
    assert response.status == 503
    assert response.problem


async def test_a_failure_to_record_after_the_start_went_out_lets_the_rest_go_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop = Shop(headers=[JSON], body=[b"one", b"two"])
    front = front_of(shop, layer=PlannedLayer().plan("complete", Fault(DENIED)))
    response = await request(front)
    assert (response.status, response.body, response.is_complete) == (201, b"onetwo", True)
    assert front.listener.kinds == [EventKind.CLAIMED, EventKind.ABANDONED, EventKind.PERSISTENCE_ERROR]
    assert "was not recorded: denied" in caplog.text


def streaming(*steps: bytes | float) -> Any:
    """Return an app that sends chunks and waits in between, and goes on whatever happens when it sends."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        app.runs += 1  # type: ignore[attr-defined]
        await send({"type": "http.response.start", "status": 200, "headers": app.headers})  # type: ignore[attr-defined]
        for step in steps:
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                with contextlib.suppress(Exception):
                    await send({"type": "http.response.body", "body": step, "more_body": True})
        with contextlib.suppress(Exception):
            await send({"type": "http.response.body", "body": b""})

    app.runs = 0  # type: ignore[attr-defined]
    app.headers = STREAM  # type: ignore[attr-defined]
    return app


async def cut_off(front: Front) -> bytes:
    """Send a request whose response must not come to its end; return what came of it."""
    connection = Connection([b"{}"])
    with pytest.raises(IdempotencyLeaseLostError, match="a retry may get another one"):
        await front(scope_of(), connection.receive, connection.send)
    assert not connection.response.is_complete
    return connection.response.body


async def test_a_stream_that_could_not_be_recorded_in_its_lease_has_no_end_for_a_retry_runs_again() -> None:
    app = streaming(b"one", b"two")
    front = front_of(app, layer=PlannedLayer().plan("complete", *[Fault(DOWN)] * 500))
    started = asyncio.get_running_loop().time()
    assert await cut_off(front) == b"onetwo"
    assert 28 < asyncio.get_running_loop().time() - started <= 30  # it was tried as long as the lease was held
    assert front.layer.calls.count("complete") > 10
    assert EventKind.PERSISTENCE_ERROR in front.listener.kinds
    await asyncio.sleep(2)
    front.layer.faults.clear()
    again = await request(front)
    assert (again.body, again.is_complete, again.is_replay, app.runs) == (b"onetwo", True, False, 2)
    assert (await request(front)).is_replay


async def test_a_declared_stream_that_could_not_be_recorded_in_its_lease_has_no_last_byte() -> None:
    app = streaming(b"one", b"two")
    app.headers = WHOLE
    assert await cut_off(front_of(app, layer=PlannedLayer().plan("complete", *[Fault(DOWN)] * 500))) == b"one"


async def test_a_stream_that_could_not_be_marked_as_too_large_has_no_end_once_its_lease_has_passed() -> None:
    app = streaming(b"123456", b"7", 20.0, b"8", 20.0, b"9")
    front = front_of(app, layer=PlannedLayer().plan("complete", Fault(DENIED)), max_response_bytes=5)
    assert await cut_off(front) == b"12345678"
    assert front.layer.calls.count("complete") == 1


async def test_a_stream_that_could_not_be_recorded_ends_while_no_other_call_can_take_over() -> None:
    """Without a lease, nothing runs again until the record of the claim expires."""
    app = streaming(b"one")
    faults = [Fault(DOWN)] * 500
    front = front_of(app, layer=PlannedLayer().plan("complete", *faults), settings={"lease_seconds": None})
    response = await request(front)
    assert (response.body, response.is_complete) == (b"one", True)
    assert (await request(front)).problem["title"] == "A request with this Idempotency-Key is in progress"


async def test_a_recording_is_tried_again_while_the_lease_is_held() -> None:
    shop = Shop()
    front = front_of(shop, layer=PlannedLayer().plan("complete", Fault(DOWN), Fault(DOWN), Fault(DOWN)))
    assert (await request(front)).status == 201
    assert (await request(front)).is_replay


async def test_a_cancellation_while_recording_comes_after_it() -> None:
    shop = Shop()
    front = front_of(shop, layer=PlannedLayer().plan("complete", Fault(before_seconds=2)))
    connection = await cancelled_after(1, front)
    assert connection.messages == []
    assert (await request(front)).is_replay


# --- Leases that were lost --------------------------------------------------------------------------------------------


def lease_loser(layer: PlannedLayer, **options: Any) -> Front:
    """Return a front whose renewals do not get through."""
    deaf = PlannedLayer(inner=layer.inner).plan("renew", *[Fault(DENIED)] * 50)
    return front_of(layer=deaf, **options)


async def test_a_loser_hands_out_the_winners_response() -> None:
    layer = PlannedLayer()
    loser = Shop(seconds=40, body=[b'{"paid":  1}'])
    winner = Shop(body=[b'{"paid":  2}'])
    late = asyncio.create_task(request(lease_loser(layer, app=loser)))
    await asyncio.sleep(35)
    assert (await request(front_of(winner, layer=layer))).body == b'{"paid":  2}'
    response = await late
    assert (response.body, response.is_replay) == (b'{"paid":  2}', True)
    assert (loser.runs, winner.runs) == (1, 1)


async def test_a_loser_of_unknown_outcome_answers_503() -> None:
    layer = PlannedLayer()
    loser, winner = Shop(seconds=40), Shop(seconds=40, error=ValueError("no"))
    late = asyncio.create_task(request(lease_loser(layer, app=loser)))
    await asyncio.sleep(35)
    with pytest.raises(ValueError, match="no"):
        await request(front_of(winner, layer=layer))
    response = await late
    assert response.status == 503
    assert response.header(b"retry-after") == b"1"
    assert response.problem["title"] == "The outcome of the request is not known"


async def test_a_loser_whose_start_has_gone_out_is_cut_off_so_that_its_client_asks_again() -> None:
    layer = PlannedLayer()

    class Slow(Shop):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await asyncio.sleep(40)
            await send({"type": "http.response.body", "body": b"two"})

    front = lease_loser(layer, app=Slow())
    connection = Connection([b"{}"])
    late = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(35)
    await request(front_of(Shop(), layer=layer))
    with pytest.raises(IdempotencyLeaseLostError, match="a retry will get"):
        await late
    assert (connection.response.body, connection.response.is_complete) == (b"one", False)
    assert (await request(front)).body == b'{"paid": 42}'


async def test_a_loser_that_goes_on_sending_is_cut_off_all_the_same() -> None:
    layer = PlannedLayer()
    front = lease_loser(layer, app=streaming(b"one", 40.0, b"two"))
    connection = Connection([b"{}"])
    late = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(35)
    await request(front_of(Shop(), layer=layer))
    with pytest.raises(IdempotencyLeaseLostError, match="a retry will get"):
        await late
    assert not connection.response.is_complete


# --- Renewal ----------------------------------------------------------------------------------------------------------


async def test_a_handler_longer_than_its_lease_runs_once() -> None:
    shop = Shop(seconds=1000)
    front = front_of(shop, settings={"wait_timeout_seconds": 2000})
    responses = await asyncio.gather(request(front), request(front))
    assert shop.runs == 1
    assert {response.status for response in responses} == {201}
