"""Two uvicorn workers and real clients: every execution is counted in a log outside of the processes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served import (
    DEADLINE_SECONDS,
    LEASE_SECONDS,
    Service,
    is_replay,
    is_running,
    is_stopped,
    post,
    raw,
    raw_request,
    serving,
)
from tests.support.served import until as wait_until
from tests.support.servers import started
from tests.support.service_data import BINARY, DOCUMENT, Arrivals

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["redis", "sqlite"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        store = f"sqlite:///{directory / 'records.sqlite3'}"
        with serving(store, directory, "--http", "h11", "--loop", "asyncio") as service:
            yield service
    else:
        fast = ("--http", "httptools", "--loop", "uvloop")
        with started("redis") as redis, serving(redis.url, directory, *fast) as service:
            yield service


@pytest.fixture
def name() -> str:
    return f"request-{uuid.uuid4().hex}"


# --- Once, whoever asks -----------------------------------------------------------------------------------------------


async def test_two_hundred_requests_with_one_key_are_one_execution(service: Service, name: str) -> None:
    async with service.client() as client:
        responses = await asyncio.gather(*(post(client, "/charge?seconds=0.3", name) for _ in range(200)))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len({response.headers["x-pid"] for response in responses}) < 2:  # one has taken all connections
                responses += await asyncio.gather(*(post(client, "/charge?seconds=0.3", name) for _ in range(20)))
    assert service.kinds(name) == ["start", "end"]
    assert {response.status_code for response in responses} == {201}
    assert {response.json()["effect"] for response in responses} == set(service.effects(name))
    assert Counter(map(is_replay, responses)) == {True: len(responses) - 1, False: 1}


async def test_forty_requests_at_once_with_each_of_many_keys_are_one_execution_of_each(
    service: Service, name: str
) -> None:
    names = [f"{name}-{number}" for number in range(24)]
    async with service.client() as client:
        responses: list[httpx.Response] = []
        for first in range(0, 24, 6):  # as many connections at a time as the machine bears
            some = [name for name in names[first : first + 6] for _ in range(40)]
            responses += await asyncio.gather(*(post(client, "/charge?seconds=0.1", name) for name in some))
    assert len(responses) == 960
    answered = {(answer["name"], answer["effect"]) for answer in (response.json() for response in responses)}
    assert sorted(answered) == sorted((one, effect) for one in names for effect in service.effects(one))


async def test_a_handler_longer_than_its_lease_runs_once(service: Service, name: str) -> None:
    async with service.client() as client:
        path = f"/charge?seconds={1.2 * LEASE_SECONDS}"
        running = asyncio.create_task(post(client, path, name))
        await service.wait_until(name, "start")
        again = await asyncio.gather(*(post(client, path, name) for _ in range(8)))
        first = await running
    start, end = service.events(name)
    assert end["at"] - start["at"] > LEASE_SECONDS
    assert {response.content for response in again} == {first.content}
    assert all(map(is_replay, again))


# --- Faults -----------------------------------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_is_taken_over_when_its_lease_has_passed(service: Service, name: str) -> None:
    async with service.client() as client:
        running = asyncio.create_task(post(client, "/charge", name, headers={"x-seconds": "3600"}))
        await service.wait_until(name, "start")
        victim = service.pid_of(name)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await running
        response = await post(client, "/charge", name)
    assert not is_running(victim)
    assert service.kinds(name) == ["start", "start", "end"]  # the first one never ended
    assert response.json()["effect"] == service.effects(name)[1]
    assert not is_replay(response)
    service.wait_for_workers()


async def test_a_worker_that_is_stopped_past_its_lease_hands_out_its_successors_response(
    service: Service, name: str
) -> None:
    async with service.client() as client:
        late = asyncio.create_task(post(client, "/charge", name, headers={"x-seconds": f"{LEASE_SECONDS}"}))
        await service.wait_until(name, "start")
        victim = service.pid_of(name)
        os.kill(victim, signal.SIGSTOP)
        try:
            await wait_until(lambda: is_stopped(victim), "the worker is stopped")
            assert service.kinds(name) == ["start"]
            successor = await post(client, "/charge", name)
            assert is_stopped(victim)
        finally:
            os.kill(victim, signal.SIGCONT)
        loser = await late
    await service.wait_until(name, "end", times=2)
    assert service.kinds(name) == ["start", "start", "end", "end"]
    assert int(successor.headers["x-pid"]) != victim == int(loser.headers["x-pid"])
    assert successor.json()["effect"] == loser.json()["effect"] == service.effects(name)[1]
    assert is_replay(loser)


async def test_a_client_that_goes_in_the_middle_finds_its_response_later(service: Service, name: str) -> None:
    lines = [f"idempotency-key: {name}", "content-length: 2", "x-seconds: 2"]
    head = raw_request("/charge", name, *lines, close=False)
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(head)
    await service.wait_until(name, "start")
    writer.close()
    await writer.wait_closed()
    assert service.kinds(name) == ["start"]
    await service.wait_until(name, "end")
    async with service.client() as client:
        response = await post(client, "/charge", name, content=b"{}", json=None, headers=JSON)
    assert is_replay(response)
    assert [response.json()["effect"]] == service.effects(name)


async def test_a_client_that_goes_in_the_middle_of_a_stream_finds_all_of_it_later(
    service: Service, name: str, tmp_path: Path
) -> None:
    arrivals = Arrivals(str(tmp_path / "arrived"))
    headers = {"x-arrivals": arrivals.path}
    async with service.client() as client:
        async with client.stream("POST", "/stream", headers=keyed(name) | headers, json={}) as response:
            async for line in response.aiter_lines():
                assert '"number": 0' in line
                break
        assert "streamed" not in service.kinds(name)
        for number in range(3):
            arrivals.note(number)
        await service.wait_until(name, "streamed")
        again = await post(client, "/stream", name, json={}, headers=headers)
    assert is_replay(again)
    assert again.text.count("data: ") == 3
    assert len(service.effects(name)) == 1


async def test_a_task_that_is_cancelled_gives_its_key_back(service: Service, name: str) -> None:
    async with service.client() as client:
        first = await post(client, "/cancelled", name)
        second = await post(client, "/cancelled", name)
    assert (first.status_code, second.status_code) == (500, 500)
    assert service.kinds(name) == ["start", "end", "cancelled"] * 2


async def test_a_response_that_breaks_off_is_never_run_again(service: Service, name: str) -> None:
    async with service.client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await post(client, "/cut", name)
        again = await post(client, "/cut", name)
    assert again.status_code == 409
    assert "retry-after" not in again.headers
    assert service.kinds(name) == ["start", "end", "broken"]


async def test_a_background_task_that_fails_after_the_response_runs_nothing_again(service: Service, name: str) -> None:
    async with service.client() as client:
        first = await post(client, "/background", name)
        again = await post(client, "/background", name)
    await service.wait_until(name, "mail")
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert is_replay(again)
    assert sorted(service.kinds(name)) == ["end", "mail", "start"]
    await wait_until(lambda: "no mail server" in service.output, "the background task failed")


# --- Streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_keyed", [True, False])
async def test_every_event_of_a_stream_arrives_before_the_next_is_made(
    service: Service, name: str, tmp_path: Path, is_keyed: bool
) -> None:
    """The service makes an event when the one before has arrived: were any of them held back, it would never end."""
    arrivals = Arrivals(str(tmp_path / "arrived"))
    headers = (keyed(name) if is_keyed else {"x-name": name}) | {"x-arrivals": arrivals.path}
    number = 0
    async with service.client() as client, client.stream("POST", "/stream?chunks=20", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/plain")
        async for line in response.aiter_lines():
            if line:
                assert f'"number": {number}' in line
                arrivals.note(number)
                number += 1
    assert number == 20


async def test_a_stream_longer_than_the_copy_arrives_whole_and_is_not_run_again(service: Service, name: str) -> None:
    chunks = 20_000
    async with service.client() as client:
        async with client.stream("POST", f"/stream?chunks={chunks}", headers=keyed(name)) as response:
            received = b"".join([piece async for piece in response.aiter_raw()])
        again = await post(client, f"/stream?chunks={chunks}", name, json=None)
    assert received.count(b"data: ") == chunks
    assert len(received) > 1024 * 1024
    assert again.status_code == 409
    assert len(service.effects(name)) == 1


async def test_a_file_is_compressed_for_each_client_as_it_likes_on_a_replay_too(service: Service, name: str) -> None:
    async with service.client() as client:
        encodings = ("gzip", "identity", "gzip")
        responses = [await post(client, "/document", name, headers={"accept-encoding": each}) for each in encodings]
    assert {response.content for response in responses} == {DOCUMENT}
    assert [response.headers.get("content-encoding", "identity") for response in responses] == list(encodings)
    assert all(response.headers["vary"].startswith("cookie") for response in responses)
    assert [is_replay(response) for response in responses] == [False, True, True]
    assert len(service.effects(name)) == 1


async def test_a_response_larger_than_the_copy_arrives_whole_and_is_not_run_again(service: Service, name: str) -> None:
    async with service.client() as client:
        first = await post(client, "/large", name)
        again = await post(client, "/large", name)
    assert len(first.json()["padding"]) == 1024 * 1024
    assert again.status_code == 409
    assert len(service.effects(name)) == 1


# --- Bodies and headers -----------------------------------------------------------------------------------------------


async def test_204_binary_and_several_cookies_and_links_are_replayed_rightly(service: Service, name: str) -> None:
    async with service.client() as client:
        for path in ("/empty", "/binary", "/cookies"):
            first, again = await post(client, path, name + path), await post(client, path, name + path)
            assert first.content == again.content
            assert first.status_code == again.status_code
            assert is_replay(again)
            assert not is_replay(first)
            assert len(service.effects(name + path)) == 1
            kept = [pair for pair in first.headers.multi_items() if pair[0] not in {"date", "x-pid", "set-cookie"}]
            dropped = {"date", "x-pid", "idempotent-replayed"}
            assert [pair for pair in again.headers.multi_items() if pair[0] not in dropped] == kept
            if path == "/empty":
                assert (again.status_code, again.content) == (204, b"")
            elif path == "/binary":
                assert again.content == BINARY
            else:
                assert len(first.headers.get_list("set-cookie")) == 3
                assert again.headers.get_list("set-cookie") == []
                assert again.headers.get_list("link") == ["<one>", "<two>"]


async def test_ten_megabytes_go_up_once(service: Service, name: str) -> None:
    body = os.urandom(1024) * 10 * 1024
    async with service.client() as client:
        first = await post(client, "/upload", name, content=body, json=None)
        again = await post(client, "/upload", name, content=body, json=None)
        other = await post(client, "/upload", name, content=body[:-1] + bytes([body[-1] ^ 1]), json=None)
    assert first.json()["sha256"] == hashlib.sha256(body).hexdigest()
    assert first.json()["bytes"] == len(body) == 10 * 1024 * 1024
    assert first.content == again.content
    assert is_replay(again)
    assert other.status_code == 422
    assert len(service.effects(name)) == 1


async def test_a_body_larger_than_allowed_is_413_and_nothing_is_run(service: Service, name: str) -> None:
    async with service.client() as client:
        response = await post(client, "/upload", name, content=b"x" * (16 * 1024 * 1024 + 1), json=None)
    assert response.status_code == 413
    assert service.effects(name) == []


async def test_a_multipart_retry_has_another_boundary_and_is_a_replay(service: Service, name: str) -> None:
    async with service.client() as client:
        files = {"file": ("receipt.txt", b"paid")}
        responses = [await post(client, "/upload", name, files=files, json=None) for _ in range(2)]
    assert responses[0].request.headers["content-type"] != responses[1].request.headers["content-type"]
    assert is_replay(responses[1])
    assert len(service.effects(name)) == 1


async def test_another_user_with_the_same_key_is_another_request(service: Service, name: str) -> None:
    async with service.client() as client:
        users = [await post(client, "/charge", name, headers={"authorization": user}) for user in ("a", "b", "a")]
    assert [is_replay(response) for response in users] == [False, False, True]
    assert len(service.effects(name)) == 2


async def test_another_body_query_or_route_is_422(service: Service, name: str) -> None:
    async with service.client() as client:
        assert (await post(client, "/charge", name)).status_code == 201
        others = [
            await post(client, "/charge", name, json={"amount": 43}),
            await post(client, "/charge?seconds=0", name),
            await post(client, "/empty", name),
        ]
    assert [response.status_code for response in others] == [422, 422, 422]
    assert {response.headers["content-type"] for response in others} == {"application/problem+json"}
    assert len(service.effects(name)) == 1


# --- Raw sockets ------------------------------------------------------------------------------------------------------

JSON = {"content-type": "application/json"}


def keyed(name: str) -> dict[str, str]:
    return {"idempotency-key": f'"{name}"', "x-name": name}


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "lines",
    [
        ["idempotency-key:"],
        ['idempotency-key: ""'],
        ["idempotency-key: a, b"],
        ['idempotency-key: "a";p=1'],
        ["idempotency-key: " + "k" * 256],
        ["idempotency-key: caf\xe9"],
        ['idempotency-key: "a', "x: y"],
        ["idempotency-key: a", "idempotency-key: b"],
        ["Idempotency-Key: a", "idempotency-key: a"],
    ],
)
async def test_a_malformed_key_or_a_header_that_comes_twice_is_400(
    service: Service, name: str, lines: list[str]
) -> None:
    answer = await raw(service, raw_request("/charge", name, *lines, "content-length: 2"))
    assert status_of(answer) == 400
    assert b"application/problem+json" in answer
    assert service.effects(name) == []


async def test_chunked_bodies_are_the_same_however_they_are_cut(service: Service, name: str) -> None:
    head = raw_request("/upload", name, f"idempotency-key: {name}", "transfer-encoding: chunked", body=b"")
    first = await raw(service, head, b'4\r\n{"a"\r\n', b"3\r\n: 1\r\n", b"1\r\n}\r\n0\r\n\r\n")
    again = await raw(service, head, b'8\r\n{"a": 1}\r\n0\r\n\r\n')
    declared = await raw(
        service, raw_request("/upload", name, f"idempotency-key: {name}", "content-length: 8", body=b'{"a": 1}')
    )
    assert [status_of(answer) for answer in (first, again, declared)] == [200, 200, 200]
    assert [b"idempotent-replayed: true" in answer for answer in (first, again, declared)] == [False, True, True]
    assert len(service.effects(name)) == 1


async def test_half_a_chunked_body_runs_nothing(service: Service, name: str) -> None:
    head = raw_request("/upload", name, f"idempotency-key: {name}", "transfer-encoding: chunked", body=b"")
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(head + b'4\r\n{"a"\r\n')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    whole = await raw(service, head, b'8\r\n{"a": 1}\r\n0\r\n\r\n')
    assert b"idempotent-replayed" not in whole
    assert len(service.effects(name)) == 1


async def test_a_client_that_waits_for_100_is_told_to_go_on(service: Service, name: str) -> None:
    head = raw_request(
        "/upload", name, f"idempotency-key: {name}", "content-length: 8", "expect: 100-continue", body=b""
    )
    for is_again in (False, True):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b'{"a": 1}')
        answer = await reader.read(-1)
        assert status_of(answer) == 200
        assert (b"idempotent-replayed" in answer) is is_again
        writer.close()
        await writer.wait_closed()
    assert len(service.effects(name)) == 1


async def test_a_client_that_waits_for_100_with_too_much_is_refused_at_once(service: Service, name: str) -> None:
    length = f"content-length: {17 * 1024 * 1024}"
    head = raw_request("/upload", name, f"idempotency-key: {name}", length, "expect: 100-continue", body=b"")
    assert status_of(await raw(service, head, until_seen=b"\r\n\r\n")) == 413


async def test_a_key_that_is_refused_leaves_the_connection_usable(service: Service, name: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    for line, status in (("idempotency-key: a,b", 400), (f"idempotency-key: {name}", 201)):
        writer.write(raw_request("/charge", name, line, "content-length: 2", close=False))
        head = await reader.readuntil(b"\r\n\r\n")
        assert status_of(head) == status
        length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
    writer.close()
    await writer.wait_closed()


async def test_requests_without_a_key_are_never_deduplicated(service: Service, name: str) -> None:
    async with service.client() as client:
        responses: Any = [await client.post("/charge", headers={"x-name": name}, json={}) for _ in range(2)]
    assert {response.status_code for response in responses} == {201}
    assert len(service.effects(name)) == 2
