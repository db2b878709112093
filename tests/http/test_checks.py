"""A check over HTTP: what happened is a response, and who asks gets it as a replay."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from aidem import DidNotHappen, Happened, RecordStatus, StillUnknown, current_execution
from aidem.asgi import StoredResponse
from aidem.exceptions import IdempotencyInDoubtError, IdempotencyUsageError
from aidem.hooks import EventKind
from tests.support.asgi import JSON, Connection, Front, Shop, front_of, request, scope_of
from tests.support.planned import VIRTUAL_TIME, Bank, PlannedLayer, closed_when, is_same_doubt, only_record

LENGTH = (b"content-length", b"12")
PAID = StoredResponse(201, [JSON, LENGTH], b'{"paid": 42}')


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


async def left_in_doubt(**scope: Any) -> PlannedLayer:
    """Return a layer with the claim of a request whose handler was cancelled."""
    layer = PlannedLayer()
    front = front_of(Shop(error=asyncio.CancelledError()), layer=layer, settings={"on_abandoned": "raise"})
    with pytest.raises(asyncio.CancelledError):
        await request(front, **scope)
    await asyncio.sleep(1)
    return layer


def front_with(bank: Bank, layer: PlannedLayer, app: Any = None, **options: Any) -> Front:
    settings = {"on_abandoned": bank.was_charged, "wait_timeout_seconds": 60, **options.pop("settings", {})}
    return front_of(app or Shop(), layer=layer, settings=settings, **options)


# --- What happened ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [PAID, JSONResponse({"paid": 42}, 201), Response(memoryview(b"\xff\0"), 200), StoredResponse(204, [], b"")],
)
async def test_the_response_of_a_check_is_recorded_and_replayed_to_the_asker_and_to_later_callers(
    response: Any,
) -> None:
    shop, bank = Shop(), Bank(Happened(response))
    front = front_with(bank, await left_in_doubt(), shop)
    asker, later = await request(front), await request(front)
    status, headers, body = (
        response
        if isinstance(response, StoredResponse)
        else (response.status_code, response.raw_headers, bytes(response.body))
    )
    for each in (asker, later):
        assert (each.status, each.body) == (status, body)
        assert each.headers == [*headers, (b"idempotent-replayed", b"true")]
        assert each.is_complete
    assert (shop.runs, len(bank.asked)) == (0, 1)
    assert only_record(front.layer).status is RecordStatus.COMPLETED


async def test_it_is_recorded_as_if_the_app_had_sent_it() -> None:
    sent = StoredResponse(
        201,
        [
            (b"connection", b"x-hop"),
            (b"x-hop", b"1"),
            (b"date", b"today"),
            (b"Idempotent-Replayed", b"true"),
            (b"set-cookie", b"a=1"),
            (b"x-kept", b"1"),
            (b"x-kept", b"2"),
        ],
        b"paid",
    )
    for store_set_cookie in (False, True):
        shop, layer = Shop(headers=list(sent.headers), body=[sent.body]), PlannedLayer()
        await request(front_of(shop, layer=layer, store_set_cookie=store_set_cookie))
        front = front_with(Bank(Happened(sent)), await left_in_doubt(), store_set_cookie=store_set_cookie)
        response = await request(front)
        assert only_record(front.layer).response_data == only_record(layer).response_data
        assert [value for name, value in response.headers if name == b"x-kept"] == [b"1", b"2"]
        assert (response.header(b"set-cookie") == b"a=1") is store_set_cookie


@pytest.mark.parametrize("excess", [0, 1])
async def test_a_body_above_the_limit_is_done_but_not_kept(excess: int, caplog: pytest.LogCaptureFixture) -> None:
    shop, bank = Shop(), Bank(Happened(Response(b"x" * (10 + excess))))
    front = front_with(bank, await left_in_doubt(), shop, max_response_bytes=10)
    for _ in range(2):
        response = await request(front)
        assert response.status == (409 if excess else 200)
        if excess:
            assert response.problem["title"] == "The request was processed, but its response was not stored"
            assert response.header(b"retry-after") is None
    assert (shop.runs, len(bank.asked)) == (0, 1)
    assert ("larger than max_response_bytes" in caplog.text) is bool(excess)


async def test_store_if_is_not_asked_about_what_happened() -> None:
    front = front_with(Bank(Happened(Response(status_code=503))), await left_in_doubt(), store_if=lambda *_: False)
    assert (await request(front)).status == (await request(front)).status == 503
    assert front.listener.kinds[-1] is EventKind.REPLAYED


async def stream() -> Any:
    yield b"paid"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"Happened\(NoneType\).*Response of Starlette"),
        ({"paid": 42}, r"Happened\(dict\)"),
        (b"paid", r"Happened\(bytes\)"),
        ((201, [], b"paid"), r"Happened\(tuple\)"),
        (StreamingResponse(stream()), r"Happened\(StreamingResponse\)"),
        (FileResponse(__file__), r"Happened\(FileResponse\)"),
        (JSONResponse({}, background=BackgroundTask(print)), "background task"),
        (StoredResponse(99, [], b""), "cannot be sent"),
        (StoredResponse(None, [], b""), "cannot be sent"),  # type: ignore[arg-type]
        (StoredResponse(200, [(b"x", b"a\r\nb")], b""), "cannot be sent"),
        (StoredResponse(200, [("x", "y")], b""), "cannot be sent"),  # type: ignore[list-item]
        (StoredResponse(200, [(b"x",)], b""), "cannot be sent"),  # type: ignore[list-item]
        (StoredResponse(200, [LENGTH], b"less"), "cannot be sent"),
        (StoredResponse(204, [], b"body"), "cannot be sent"),
        (StoredResponse(200, [], "text"), "cannot be sent"),  # type: ignore[arg-type]
        (StoredResponse(200, [], None), "cannot be sent"),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_such_response_is_a_failed_check(
    result: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer, shop = await left_in_doubt(), Shop()
    found = only_record(layer)
    front = front_with(Bank(Happened(result)), layer, shop)
    response = await request(front)
    assert (response.status, response.header(b"retry-after")) == (409, b"10")
    assert response.problem["title"] == "It is not known whether the request was processed"
    assert is_same_doubt(only_record(layer), found)
    error = front.listener.events[-1].error
    assert isinstance(error, IdempotencyInDoubtError)
    with pytest.raises(IdempotencyUsageError, match=message):
        raise error.__cause__ or error
    assert "the check of the HTTP layer 'shop' failed: Happened(" in caplog.text
    assert shop.runs == 0


# --- What did not happen, and what nobody knows -------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"amount=42", [b"amount", b"=", b"42"]])
async def test_what_did_not_happen_runs_under_the_claim_of_the_check_with_its_whole_body(body: Any) -> None:
    executions: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        executions.append((current_execution().fence, current_execution().key_for("bank")))
        await shop(scope, receive, send)

    whole = body if isinstance(body, bytes) else b"".join(body)
    shop, bank = Shop(), Bank(DidNotHappen())
    layer = await left_in_doubt(body=whole)
    front = front_with(bank, layer, app)
    first, again = (
        await request(front, body=body if isinstance(body, bytes) else list(body)),
        await request(front, body=whole),
    )
    assert shop.bodies == [whole]
    assert (first.is_replay, again.is_replay) == (False, True)
    assert (first.status, first.body) == (again.status, again.body) == (201, b'{"paid": 42}')
    [abandoned] = bank.asked
    assert executions == [(abandoned.fence, abandoned.key_for("bank"))]


@pytest.mark.parametrize("answer", [StillUnknown(), None, ValueError("of ann"), "yes"])
async def test_what_is_still_unknown_may_be_asked_again(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    layer, shop = await left_in_doubt(), Shop()
    found = only_record(layer)
    bank = Bank(answer, Happened(PAID))
    front = front_with(bank, layer, shop)
    response = await request(front)
    assert (response.status, response.header(b"retry-after")) == (409, b"10")
    assert "could not be found out yet" in response.problem["detail"]
    assert is_same_doubt(only_record(layer), found)
    assert "ann" not in caplog.text + response.body.decode()
    assert (await request(front)).status == 201
    assert (shop.runs, len(bank.asked)) == (0, 2)


async def test_a_plain_check_may_answer_at_once() -> None:
    front = front_of(Shop(), layer=await left_in_doubt(), settings={"on_abandoned": lambda _: Happened(PAID)})
    assert (await request(front)).is_replay


# --- What a check is told -----------------------------------------------------------------------------------------


async def test_a_check_is_told_the_scope_of_the_request() -> None:
    bank = Bank(DidNotHappen())
    layer = await left_in_doubt(path="/payments/7", headers=[(b"x-order", b"o-1")])
    found = only_record(layer)
    front = front_with(bank, layer, settings={"note": lambda scope: scope["path"]})
    await request(front, path="/payments/7", headers=[(b"x-order", b"o-1")])
    [abandoned] = bank.asked
    assert (abandoned.key, abandoned.record) == (found.idempotency_key, found)
    assert (abandoned.payload["type"], abandoned.payload["path"]) == ("http", "/payments/7")
    assert (b"x-order", b"o-1") in abandoned.payload["headers"]


async def test_another_request_under_the_key_is_refused_and_nobody_is_asked() -> None:
    bank = Bank()
    front = front_with(bank, await left_in_doubt())
    assert (await request(front, body=b"other")).status == 422
    assert not bank.asked


async def test_of_two_layers_with_one_prefix_the_outer_one_asks() -> None:
    layer, shop, bank = await left_in_doubt(), Shop(), Bank(DidNotHappen())
    inner = front_with(Bank(), layer, shop)
    assert (await request(front_with(bank, layer, inner))).status == 201
    assert (shop.runs, len(bank.asked)) == (1, 1)


# --- Several at once, and who is late -------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Happened(PAID), DidNotHappen(), StillUnknown(), Happened("no response")])
async def test_five_callers_at_once_share_one_verdict(verdict: Any) -> None:
    shop, bank = Shop(seconds=1), Bank(verdict, seconds=20)
    front = front_with(bank, await left_in_doubt(), shop)
    responses = await asyncio.gather(*(request(front) for _ in range(5)))
    assert len(bank.asked) == 1
    assert shop.runs == isinstance(verdict, DidNotHappen)
    if verdict in (Happened(PAID), DidNotHappen()):
        assert {(each.status, each.body) for each in responses} == {(201, b'{"paid": 42}')}
        assert sum(not each.is_replay for each in responses) == shop.runs
    else:
        assert {(each.status, each.header(b"retry-after")) for each in responses} == {(409, b"10")}


async def test_a_caller_that_does_not_wait_for_the_check_is_told_to_retry() -> None:
    bank = Bank(Happened(PAID), seconds=20)
    front = front_with(bank, await left_in_doubt(), settings={"wait_timeout_seconds": 0})
    asking = asyncio.create_task(request(front))
    await asyncio.sleep(1)
    beside = await request(front)
    assert (beside.status, beside.header(b"retry-after")) == (409, b"1")
    assert beside.problem["title"] == "A request with this Idempotency-Key is in progress"
    assert (await asking).status == 201
    assert len(bank.asked) == 1


async def test_of_two_processes_one_asks_and_both_get_the_response() -> None:
    layer = await left_in_doubt()
    bank = Bank(Happened(PAID), seconds=5)
    fronts = [front_with(bank, PlannedLayer(inner=layer.inner, latency_seconds=0.01)) for _ in range(2)]
    responses = await asyncio.gather(*map(request, fronts))
    assert [(each.status, each.is_replay) for each in responses] == [(201, True)] * 2
    assert len(bank.asked) == 1


async def test_the_late_owner_sends_what_the_check_has_found() -> None:
    layer, late = PlannedLayer(), Shop(status=202, seconds=60)
    owner = front_of(late, layer=layer, settings={"on_abandoned": "raise", "renew_lease": False})
    running = asyncio.create_task(request(owner))
    await asyncio.sleep(40)
    asker = await request(front_with(Bank(Happened(PAID)), PlannedLayer(inner=layer.inner)))
    assert asker.status == 201
    response = await running
    assert (late.runs, response.status, response.is_replay) == (1, 201, True)
    assert EventKind.LEASE_LOST in owner.listener.kinds


# --- Who goes away --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Happened(PAID), DidNotHappen(), StillUnknown()])
async def test_a_client_that_goes_while_the_check_is_asked_finds_its_verdict_on_a_retry(verdict: Any) -> None:
    shop, bank = Shop(), Bank(verdict, Happened(PAID), seconds=20)
    front = front_with(bank, await left_in_doubt(), shop)
    connection = Connection([b"{}"])
    asking = asyncio.create_task(front(scope_of(), connection.receive, connection.send))
    await asyncio.sleep(10)
    assert len(bank.asked) == 1
    connection.disconnect()
    await asking
    assert connection.messages == []
    again = await request(front)
    assert (again.status, again.is_replay) == (201, True)
    assert len(bank.asked) == (2 if verdict == StillUnknown() else 1)
    assert shop.runs == isinstance(verdict, DidNotHappen)


async def test_a_request_that_is_cancelled_while_the_check_is_asked_stays_in_doubt_as_it_was() -> None:
    layer = await left_in_doubt()
    found = only_record(layer)
    bank = Bank(Happened(PAID), seconds=20)
    asking = asyncio.create_task(request(front_with(bank, layer)))
    await asyncio.sleep(10)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert is_same_doubt(only_record(layer), found)
    assert len(bank.asked) == 1


async def test_a_request_that_is_closed_while_the_check_is_asked_is_put_back_in_the_background() -> None:
    layer = await left_in_doubt()
    found = only_record(layer)
    bank = Bank(Happened(PAID), seconds=20)
    coroutine: Any = request(front_with(bank, layer))
    await closed_when(coroutine, lambda: bank.asked)
    await asyncio.sleep(5)
    assert is_same_doubt(only_record(layer), found, within_seconds=5)
    assert only_record(layer).owner != found.owner


async def test_without_a_check_a_request_in_doubt_has_no_retry_after() -> None:
    front = front_of(Shop(), layer=await left_in_doubt(), settings={"on_abandoned": "raise"})
    response = await request(front)
    assert (response.status, response.header(b"retry-after")) == (409, None)


async def test_starlette_is_not_needed_for_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "starlette.responses")
    front = front_with(Bank(Happened({"paid": 42}), Happened(PAID)), await left_in_doubt())
    assert (await request(front)).status == 409
    assert (await request(front)).status == 201
