from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.persistence.redis._deployment import servers_of_url
from aidem.persistence.redis._line import COLLECTED_AT_MOST, IDLE_SECONDS
from aidem.persistence.redis._listener import Listener
from aidem.testing import claim_of
from tests.support.listening import listening
from tests.support.proxy import Proxy
from tests.support.redis import (
    FORKING,
    FakeServer,
    acquired,
    claimed,
    client_of,
    completed,
    fake_server,
    no_complaints,
    until,
)
from tests.support.redis_clusters import told
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[3]
IMPATIENT_SECONDS = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with started("valkey") as server:
        yield server


@pytest.fixture
async def client(server: RedisServer) -> AsyncGenerator[Any]:
    async with client_of(server) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def proxy(server: RedisServer, client: Any) -> AsyncGenerator[Proxy]:
    async with Proxy.to(server.port) as proxy:
        yield proxy


@pytest.fixture
async def layer(proxy: Proxy) -> AsyncGenerator[RedisPersistenceLayer]:
    """A layer that is connected, through the proxy, and whose scripts the server knows."""
    with no_complaints():
        layer = RedisPersistenceLayer(f"redis://127.0.0.1:{proxy.port}", timeout_seconds=10)
        claim = await claimed(layer, "warm")
        await layer.renew(claim, now=time.time())
        await completed(layer, claim)
        await layer.release(claim)
        proxy.requests.clear()
        yield layer
        proxy.heal()
        await layer.aclose()
        await asyncio.sleep(0)
        gc.collect()


def replies_are_dropped(proxy: Proxy) -> Callable[[], Awaitable[bool]]:
    async def has_happened() -> bool:
        return proxy.dropped.replies > 0

    return has_happened


def impatient(proxy: Proxy) -> RedisPersistenceLayer:
    return RedisPersistenceLayer(f"redis://127.0.0.1:{proxy.port}", timeout_seconds=IMPATIENT_SECONDS)


# --- Sharing one connection -----------------------------------------------------------------------------------------


async def test_a_call_takes_one_round_trip_to_claim_one_to_complete_and_one_to_replay(
    layer: RedisPersistenceLayer, proxy: Proxy
) -> None:
    sent = list[int]()

    @idempotent_function(persistence_store=layer, data_keyword_argument="order")
    async def pay(order: int) -> int:
        sent.append(len(proxy.requests))
        return order

    await pay(order=1)
    sent.append(len(proxy.requests))
    await pay(order=1)
    sent.append(len(proxy.requests))
    assert sent == [1, 2, 3]
    assert all(request.count(b"EVALSHA") == 1 and request.startswith(b"*") for request in proxy.requests)
    assert proxy.connections == 1


def shake_hands(listener: socket.socket) -> socket.socket:
    """Accept a connection, and answer all that comes up to the first GET."""
    connection, _ = listener.accept()
    while b"GET" not in (received := connection.recv(65536)):
        connection.sendall(b"+OK\r\n" * received.count(b"SETINFO"))
    connection.sendall(b"+OK\r\n" * received.count(b"SETINFO") + b"$-1\r\n")
    connection.settimeout(20)
    return connection


class Bystander:
    """A server whose replies are sent when the test says so."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def received(self, at_least: int = 0) -> int:
        """Wait for so many GETs and return how many are there, without giving the loop a turn."""
        count = 0
        while select.select([self._connection], [], [], 20 if count < at_least else 0)[0]:
            count += self._connection.recv(65536).count(b"GET")
        return count

    def reply(self, count: int) -> None:
        self._connection.sendall(b"$-1\r\n" * count)


@asynccontextmanager
async def bystander() -> AsyncGenerator[tuple[Bystander, RedisPersistenceLayer]]:
    """Give a server and a layer that is connected to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        layer = RedisPersistenceLayer(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        connecting = asyncio.ensure_future(asyncio.to_thread(shake_hands, listener))
        await layer.get("first")
        with await connecting as connection:
            await asyncio.sleep(0)  # the turn in which the first reply came is over
            yield Bystander(connection), layer


async def test_an_idle_connection_is_written_to_at_once_and_a_busy_one_when_the_next_replies_have_come() -> None:
    async with bystander() as (server, layer):
        operations = [layer.get(f"key {number}") for number in range(10)]
        assert server.received(1) == 1  # the loop has not had a turn yet
        for _ in range(5):
            await asyncio.sleep(0)
        assert server.received() == 0
        server.reply(1)
        assert await operations[0] is None
        await asyncio.sleep(0)
        assert server.received(9) == 9
        server.reply(9)
        assert await asyncio.gather(*operations) == [None] * 10


async def test_a_busy_connection_is_written_to_when_enough_has_collected() -> None:
    async with bystander() as (server, layer):
        operations = [layer.get(f"key {number}") for number in range(1 + 2 * COLLECTED_AT_MOST + 5)]
        assert server.received(1 + 2 * COLLECTED_AT_MOST) == 1 + 2 * COLLECTED_AT_MOST
        server.reply(1 + 2 * COLLECTED_AT_MOST)
        await operations[0]
        await asyncio.sleep(0)
        assert server.received(5) == 5
        server.reply(5)
        await asyncio.gather(*operations)


async def test_who_asks_again_on_a_reply_goes_out_together_with_the_others() -> None:
    async def ask_twice(layer: RedisPersistenceLayer) -> None:
        await layer.get("key")
        await layer.get("again")

    async with bystander() as (server, layer):
        asking = asyncio.gather(*(ask_twice(layer) for _ in range(10)))
        for expected in (1, 10, 9):  # one at once; the other nine, and what the first asks then; what the nine ask

            async def has_arrived(expected: int = expected) -> bool:
                count = server.received()
                assert count in {0, expected}
                return count == expected

            await until(has_arrived)
            server.reply(expected)
        await asking


async def test_a_thousand_tasks_share_one_connection_and_all_have_their_turn(
    layer: RedisPersistenceLayer, proxy: Proxy
) -> None:
    turns = list[int]()

    async def call(task: int) -> None:
        for turn in range(5):
            record = await claimed(layer, f"{task}-{turn}", f"owner {task}")
            assert record.owner == f"owner {task}"
            assert await completed(layer, record, f'"{task}"')
            turns.append(turn)

    await asyncio.gather(*(call(task) for task in range(1000)))
    assert proxy.connections == 1
    assert turns == sorted(turns)  # nobody is a turn ahead
    assert len(proxy.requests) < 1000


async def test_a_command_that_fails_fails_alone(layer: RedisPersistenceLayer, client: Any) -> None:
    await client.rpush("key 7", "no record")
    answers = await asyncio.gather(*(acquired(layer, f"key {n}") for n in range(32)), return_exceptions=True)
    assert [type(answer) for answer in answers[:7] + answers[8:]] == [Claimed] * 31
    assert isinstance(answers[7], IdempotencyPersistenceConfigError)


async def test_a_caller_that_is_cancelled_takes_no_reply_from_another(
    layer: RedisPersistenceLayer, proxy: Proxy
) -> None:
    proxy.hold()
    tasks = [asyncio.ensure_future(claimed(layer, f"key {n}", f"owner {n}")) for n in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.sleep(0)
    proxy.heal()
    await asyncio.wait(tasks)
    assert [task.result().owner for task in tasks[1::2]] == [f"owner {n}" for n in range(1, 40, 2)]
    assert all(task.cancelled() for task in tasks[::2])
    assert (await claimed(layer, "key 0", "owner 0")).owner == "owner 0"
    assert proxy.connections == 1


async def test_what_was_given_up_before_it_was_sent_is_never_sent(layer: RedisPersistenceLayer, client: Any) -> None:
    first = layer.get("key")
    now = time.time()
    given_up = layer.acquire(claim_of("key", now=now), now=now)
    given_up.fail(TimeoutError())
    assert given_up.exception() is not None
    await asyncio.gather(first, layer.get("key"))
    assert await client.exists("key") == 0


async def test_nothing_is_sent_where_everybody_has_given_up(layer: RedisPersistenceLayer, proxy: Proxy) -> None:
    operations = [layer.get("first"), layer.get("second")]
    operations[1].fail(TimeoutError())
    assert operations[1].exception() is not None
    await operations[0]
    await asyncio.sleep(0)
    assert proxy.requests == [b"*2\r\n$3\r\nGET\r\n$5\r\nfirst\r\n"]


async def test_a_script_that_the_server_has_forgotten_is_sent_again(
    layer: RedisPersistenceLayer, client: Any, proxy: Proxy
) -> None:
    await client.script_flush()
    records = await asyncio.gather(*(claimed(layer, f"key {n}", f"owner {n}") for n in range(5)))
    assert [record.owner for record in records] == [f"owner {n}" for n in range(5)]
    sent = b"".join(proxy.requests)
    assert (sent.count(b"EVALSHA"), sent.count(b"EVAL\r\n")) == (5, 5)
    await claimed(layer, "key")
    assert b"".join(proxy.requests).count(b"EVAL\r\n") == 5


async def test_a_forgotten_script_is_not_sent_again_for_a_caller_that_has_gone(
    layer: RedisPersistenceLayer, client: Any, proxy: Proxy
) -> None:
    await client.script_flush()
    now = time.time()
    given_up = layer.acquire(claim_of("key", now=now), now=now)
    given_up.fail(TimeoutError())
    assert given_up.exception() is not None
    await layer.get("key")
    await layer.get("key")
    assert b"EVAL\r\n" not in b"".join(proxy.requests)


# --- Losing it ------------------------------------------------------------------------------------------------------


async def test_a_broken_connection_fails_what_was_on_it_and_the_rest_goes_out_on_the_next(
    layer: RedisPersistenceLayer, proxy: Proxy
) -> None:
    proxy.drop(replies=True)
    first = asyncio.ensure_future(claimed(layer, "first"))
    await until(replies_are_dropped(proxy))
    others = [asyncio.ensure_future(claimed(layer, f"other {n}")) for n in range(10)]
    await asyncio.sleep(0)
    proxy.heal()
    proxy.cut()
    with pytest.raises(IdempotencyPersistenceConnectionError, match=r"lost; the operation may have been applied"):
        await first
    assert [record.owner for record in await asyncio.gather(*others)] == ["ours"] * 10
    assert (await claimed(layer, "first")).owner == "ours"  # applied, its reply lost: found again by its token
    assert proxy.connections == 2


async def test_each_caller_gets_an_error_of_its_own(fake: FakeServer, fake_layer: RedisPersistenceLayer) -> None:
    fake.answer = lambda command: b"$-1\r\n" if command[1] == b"first" else fake.hang_up()
    with no_complaints():
        asked = [fake_layer.get(key) for key in ("first", "second", "third")]
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in errors] == [type(None)] + [IdempotencyPersistenceConnectionError] * 2
    assert errors[1] is not errors[2]


class Request:
    """Something large that a caller has in its context."""


REQUEST: ContextVar[Request] = ContextVar("request")


@pytest.mark.parametrize("operation", ["get", "wait_for_change"])
async def test_a_connection_does_not_keep_alive_what_its_first_caller_has_in_its_context(
    fake: FakeServer, fake_layer: RedisPersistenceLayer, operation: str
) -> None:
    async def first() -> weakref.ref[Request]:
        request = Request()
        REQUEST.set(request)
        if operation == "get":
            await fake_layer.get("key")
        else:
            await fake_layer.wait_for_change("key", 1)
        return weakref.ref(request)

    kept = await asyncio.create_task(first())
    await asyncio.sleep(0)  # for the loop still holds the task, in this turn
    gc.collect()
    assert fake.open_connections == 1
    assert kept() is None


async def test_an_operation_that_nobody_waits_for_may_fail_in_silence(
    fake: FakeServer, fake_layer: RedisPersistenceLayer
) -> None:
    fake.answer = lambda _command: b"-OOM command not allowed\r\n"
    with no_complaints():
        fake_layer.get("key")  # type: ignore[unused-awaitable]
        with pytest.raises(IdempotencyPersistenceConnectionError):
            await fake_layer.get("key")
        gc.collect()


async def test_a_server_that_does_not_answer_is_given_up_in_time(proxy: Proxy, client: Any) -> None:
    layer = impatient(proxy)
    async with layer:
        await claimed(layer, "warm")
        proxy.drop(replies=True)
        started_at = time.monotonic()
        with no_complaints():
            errors = await asyncio.gather(*(claimed(layer, f"key {n}") for n in range(20)), return_exceptions=True)
        assert time.monotonic() - started_at < 10 * IMPATIENT_SECONDS  # those that waited for the first one, too
        assert str(errors[0]) == (
            "Redis did not answer within 1 s, which timeout_seconds allows; the operation may have been applied"
        )
        assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 20
        assert proxy.dropped.replies
        assert await client.exists("key 0") == 1
        proxy.heal()
        with contextlib.suppress(IdempotencyPersistenceConnectionError):
            await claimed(layer, "key 0")  # may share an attempt to connect whose handshake was dropped before
        assert (await claimed(layer, "key 0")).owner == "ours"


async def test_a_connection_that_took_long_to_make_has_its_time_from_then_on(proxy: Proxy) -> None:
    layer = RedisPersistenceLayer(f"redis://127.0.0.1:{proxy.port}", timeout_seconds=4 * IMPATIENT_SECONDS)
    proxy.delay(0.3 * 4 * IMPATIENT_SECONDS)  # each way: for the handshake, and then for the command
    started_at = time.monotonic()
    assert await layer.get("key") is None
    assert time.monotonic() - started_at > 4 * IMPATIENT_SECONDS
    assert proxy.connections == 1
    await layer.aclose()


async def test_answers_that_come_in_time_do_not_end_a_connection_that_is_used_for_long(
    server: RedisServer, client: Any
) -> None:
    async with RedisPersistenceLayer(f"{server.url}?client_name=long", timeout_seconds=IMPATIENT_SECONDS) as layer:
        await layer.get("key")
        before = [entry["id"] for entry in await client.client_list() if entry["name"] == "long"]
        deadline = time.monotonic() + 2 * IMPATIENT_SECONDS
        while time.monotonic() < deadline:
            await layer.get("key")
            await asyncio.sleep(0.01)
        assert [entry["id"] for entry in await client.client_list() if entry["name"] == "long"] == before
        assert len(before) == 1


async def test_a_server_that_does_not_shake_hands_is_given_up_in_time(proxy: Proxy) -> None:
    layer = impatient(proxy)
    proxy.hold()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="no answer within 1 s"):
        await layer.get("key")
    proxy.heal()
    assert await layer.get("key") is None
    await layer.aclose()


async def test_a_server_that_cannot_be_reached_says_what_to_look_at(proxy: Proxy) -> None:
    layer = impatient(proxy)
    proxy.refuse()
    with no_complaints():
        errors = await asyncio.gather(layer.get("a"), layer.get("b"), return_exceptions=True)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 2
    assert errors[0] is not errors[1]
    assert f"Redis at 127.0.0.1:{proxy.port} cannot be reached" in str(errors[0])
    proxy.heal()
    assert await layer.get("key") is None
    await layer.aclose()


@pytest.mark.parametrize("count", [1, 2 * COLLECTED_AT_MOST])
async def test_a_connection_that_was_closed_while_the_process_slept_is_not_used(
    server: RedisServer, count: int
) -> None:
    layer = RedisPersistenceLayer(server.url)
    await layer.get("key")
    time.sleep(IDLE_SECONDS)  # noqa: ASYNC251 - the process is frozen
    assert told(server, "CLIENT", "KILL", "TYPE", "normal") >= 1
    records = await asyncio.gather(*(claimed(layer, f"{count} after the kill, {n}") for n in range(count)))
    assert [record.owner for record in records] == ["ours"] * count
    await layer.aclose()


# --- A server that says other things --------------------------------------------------------------------------------


@pytest.fixture
async def fake() -> AsyncGenerator[FakeServer]:
    async with fake_server(lambda _command: b"$-1\r\n") as fake:
        yield fake


@pytest.fixture
async def fake_layer(fake: FakeServer) -> AsyncGenerator[RedisPersistenceLayer]:
    layer = RedisPersistenceLayer(fake.url)
    with no_complaints():
        yield layer
        await layer.aclose()


async def test_what_is_no_reply_ends_the_connection(fake: FakeServer, fake_layer: RedisPersistenceLayer) -> None:
    fake.answer = lambda _command: b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with pytest.raises(IdempotencyPersistenceConnectionError, match="what answers is not Redis"):
        await fake_layer.get("key")
    fake.answer = lambda _command: b"$-1\r\n"
    assert await fake_layer.get("key") is None


async def test_a_reply_that_nobody_asked_for_ends_the_connection(
    fake: FakeServer, fake_layer: RedisPersistenceLayer
) -> None:
    assert await fake_layer.get("key") is None
    fake.answer = lambda _command: b"$-1\r\n+unasked\r\n"
    assert await fake_layer.get("key") is None
    fake.answer = lambda _command: b"$-1\r\n"
    handshakes = len(fake.commands)
    assert await fake_layer.get("key") is None
    assert len(fake.commands) > handshakes + 1


@pytest.mark.parametrize("code", ["READONLY", "MASTERDOWN"])
async def test_a_replica_is_left_once_all_its_replies_are_there(
    fake: FakeServer, fake_layer: RedisPersistenceLayer, code: str
) -> None:
    await fake_layer.get("key")
    replies = {b"alone": b"$-1\r\n", b"first": f"-{code} it is\r\n".encode()}
    fake.answer = lambda command: replies.get(command[1])
    alone, first, *others = [fake_layer.get(key) for key in ("alone", "first", "second", "third")]
    assert await alone is None
    with pytest.raises(IdempotencyPersistenceConnectionError, match=code):
        await first  # it went out together with the others
    fake.say(b"$-1\r\n" * 2)
    assert await asyncio.gather(*others) == [None] * 2
    fake.answer = lambda _command: b"$-1\r\n"

    async def was_left() -> bool:
        return fake.open_connections == 0

    await until(was_left)
    before = len(fake.commands)
    await fake_layer.get("key")
    assert fake.commands[before][0] == b"CLIENT"  # it shook hands anew


# --- Loops, processes, ends -----------------------------------------------------------------------------------------


async def connections_of(client: Any, name: str) -> int:
    return sum(entry["name"] == name for entry in await client.client_list())


async def until_connections(client: Any, name: str, count: int) -> None:
    async def has_happened() -> bool:
        return await connections_of(client, name) == count

    await until(has_happened)


async def until_subscribed(client: Any) -> None:
    async def has_happened() -> bool:
        return any(name.startswith("aidem:changed:") for name in await client.pubsub_channels())

    await until(has_happened)


async def test_closing_waits_for_what_was_asked_and_later_use_opens_anew(
    layer: RedisPersistenceLayer, proxy: Proxy
) -> None:
    now = time.time()
    operations = [layer.acquire(claim_of(f"key {n}", now=now), now=now) for n in range(10)]
    await layer.aclose()
    assert [type(operation.result()) for operation in operations] == [Claimed] * 10
    await layer.aclose()
    assert isinstance(await acquired(layer, "key 0", "theirs"), Blocked)


async def test_closing_does_not_wait_for_a_connection_that_nobody_waits_for(proxy: Proxy) -> None:
    layer = RedisPersistenceLayer(f"redis://127.0.0.1:{proxy.port}", timeout_seconds=50)
    proxy.hold()
    given_up = layer.get("key")
    listening = asyncio.ensure_future(layer.wait_for_change("key", 50))
    await asyncio.sleep(0)
    given_up.fail(TimeoutError())
    assert given_up.exception() is not None
    await asyncio.wait_for(layer.aclose(), 20)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="closed"):
        await listening


async def test_a_connection_that_ended_with_its_handshake_is_not_used() -> None:
    async def shake_hands_and_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = await reader.read(65536)
        writer.write(b"+OK\r\n" * greeting.count(b"SETINFO"))
        writer.close()

    async with listening(shake_hands_and_hang_up) as port:
        layer = RedisPersistenceLayer(f"redis://127.0.0.1:{port}")
        with pytest.raises(IdempotencyPersistenceConnectionError, match="cannot be reached") as failed:
            await layer.get("key")
        assert failed.value.may_be_applied is False  # the command was not sent
        await layer.aclose()


async def test_closing_waits_for_a_connection_that_is_being_made(server: RedisServer) -> None:
    layer = RedisPersistenceLayer(server.url)
    operation = layer.get("never stored")
    await layer.aclose()
    assert operation.result() is None


@pytest.mark.parametrize("state", ["idle", "connecting", "asking", "listening"])
def test_a_loop_that_ends_closes_its_connections_without_complaint(server: RedisServer, state: str) -> None:
    layer = RedisPersistenceLayer(f"{server.url}?client_name={state}")

    async def use() -> None:
        if state != "connecting":
            await layer.get("key")
        if state != "idle":
            layer.get("key")  # type: ignore[unused-awaitable]
        if state == "listening":
            await layer.wait_for_change("key", 0.05)

    async def check() -> None:
        async with client_of(server) as client:
            await until_connections(client, state, 0)

    for _ in range(2):
        asyncio.run(use())
        gc.collect()
        asyncio.run(check())


async def test_a_layer_that_is_dropped_closes_its_connection(server: RedisServer, client: Any) -> None:
    layer = RedisPersistenceLayer(f"{server.url}?client_name=dropped")
    await layer.get("key")
    assert await connections_of(client, "dropped") == 1
    del layer
    gc.collect()
    await until_connections(client, "dropped", 0)


async def test_a_layer_that_nobody_holds_finishes_what_it_was_asked(server: RedisServer, client: Any) -> None:
    await client.set("key", "stuck")
    await RedisPersistenceLayer(server.url).forget("key")
    assert await client.exists("key") == 0
    assert await RedisPersistenceLayer(server.url).get("key") is None


async def test_loops_of_other_threads_have_connections_of_their_own(server: RedisServer, client: Any) -> None:
    layer = RedisPersistenceLayer(f"{server.url}?client_name=threads")
    seen = list[int]()

    async def use() -> None:
        await layer.get("key")
        async with client_of(server) as own:
            seen.append(await connections_of(own, "threads"))

    await layer.get("key")
    await asyncio.to_thread(asyncio.run, use())
    assert seen == [2]
    await until_connections(client, "threads", 1)
    await layer.aclose()


def test_a_forked_child_uses_a_connection_of_its_own(server: RedisServer) -> None:
    worker = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORKING, server.url],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert worker.stdout.split() == ["Claimed", "0", "Blocked"] * 3, worker.stderr
    assert worker.stderr == ""


def test_what_is_missing_is_said_in_one_sentence() -> None:
    code = """if True:
        import sys
        sys.modules["hiredis"] = None
        try:
            import aidem.persistence.redis
        except ImportError as error:
            print(error)
    """
    worker = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    [sentence] = worker.stdout.splitlines()
    assert sentence.startswith("RedisPersistenceLayer needs redis-py and hiredis: install aidem-idempotency[redis],")


# --- Being told of changes ------------------------------------------------------------------------------------------


async def test_a_waiter_in_another_process_is_woken_when_the_owner_completes(
    layer: RedisPersistenceLayer, server: RedisServer
) -> None:
    async with RedisPersistenceLayer(server.url) as waiting:
        for end in (completed, lambda layer, record: layer.release(record)):
            record = await claimed(layer, f"key {end}")
            task = asyncio.ensure_future(waiting.wait_for_change(f"key {end}", 50))
            async with client_of(server) as client:
                await until_subscribed(client)
                assert not task.done()
                assert await end(layer, record)
            await asyncio.wait_for(task, 20)
            await asyncio.sleep(0)


async def test_a_call_that_waits_is_woken_by_the_owner_and_does_not_poll(
    layer: RedisPersistenceLayer, server: RedisServer, client: Any
) -> None:
    config = IdempotencyConfig(wait_timeout_seconds=20)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def pay(order: int) -> int:
        entered.set()
        await leave.wait()
        return order

    async with RedisPersistenceLayer(server.url) as elsewhere:
        options: dict[str, Any] = {"data_keyword_argument": "order", "config": config, "key_prefix": "pay"}
        decorate: Any = idempotent_function
        here = decorate(persistence_store=layer, **options)(pay)
        there = decorate(persistence_store=elsewhere, **options)(pay)
        owner = asyncio.ensure_future(here(order=1))
        await entered.wait()
        waiter = asyncio.ensure_future(there(order=1))
        await until_subscribed(client)
        leave.set()
        assert list(await asyncio.wait_for(asyncio.gather(owner, waiter), 20)) == [1, 1]


async def test_waiting_ends_after_its_time_and_listens_on_for_a_while(
    layer: RedisPersistenceLayer, server: RedisServer, client: Any
) -> None:
    record = await claimed(layer)
    await layer.wait_for_change("key", 1)
    await until_subscribed(client)
    await completed(layer, record)  # nobody waits just now
    await asyncio.wait_for(layer.wait_for_change("key", 50), 20)
    started_at = time.monotonic()
    await layer.wait_for_change("key", 0.2)  # what was told is told once
    assert time.monotonic() - started_at > 0.15


async def test_none_of_many_waiters_misses_the_end_of_its_call(
    layer: RedisPersistenceLayer, server: RedisServer, client: Any
) -> None:
    async with RedisPersistenceLayer(f"{server.url}?client_name=waiters") as elsewhere:
        for turn in range(4):
            records = [await claimed(layer, f"key {turn} {number}") for number in range(100)]
            names = [f"aidem:changed:{record.idempotency_key}" for record in records]
            waiters = [asyncio.ensure_future(elsewhere.wait_for_change(r.idempotency_key, 50)) for r in records]

            async def are_subscribed(names: list[str] = names) -> bool:
                return set(names) <= set(await client.pubsub_channels())

            await until(are_subscribed)
            assert not any(waiter.done() for waiter in waiters)
            await asyncio.gather(*(completed(layer, record) for record in records))
            await asyncio.wait_for(asyncio.gather(*waiters), 20)
        assert await connections_of(client, "waiters") == 2


async def test_who_listens_again_after_the_connection_was_lost_is_told(server: RedisServer, client: Any) -> None:
    listener = listener_of(f"{server.url}?client_name=lost", linger_seconds=10)
    waiting = [asyncio.ensure_future(listener.wait(name, timeout_seconds=50)) for name in ("first", "second")]
    await until_channels(client, "first", "second")
    await client.client_kill_filter(_type="pubsub")
    errors = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 2
    assert errors[0] is not errors[1]
    assert str(errors[0]) == "the connection to Redis was lost"
    again = asyncio.ensure_future(listener.wait("second", timeout_seconds=50))
    await until_channels(client, "second")
    await client.publish("second", "")
    await asyncio.wait_for(again, 20)
    await listener.abort()


FORKING_WHILE_LISTENING = """
import asyncio, os, sys
from redis import Redis
from aidem.persistence.redis import RedisPersistenceLayer

url = sys.argv[1]
layer = RedisPersistenceLayer(url)
loop = asyncio.new_event_loop()
waiting = loop.create_task(layer.wait_for_change("key", 30))
with Redis.from_url(url) as client:
    while not client.pubsub_channels():
        loop.run_until_complete(asyncio.sleep(0.01))
child = os.fork()
if child == 0:
    asyncio.run(layer.wait_for_change("key", 0.1))
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(waiting.done())
with Redis.from_url(url) as client:
    print(client.publish("aidem:changed:key", ""))
loop.run_until_complete(asyncio.wait_for(waiting, 20))
loop.run_until_complete(layer.aclose())
loop.close()
"""


def test_a_parent_goes_on_listening_when_its_forked_child_has_ended() -> None:
    with started("valkey") as server:
        worker = subprocess.run(
            [sys.executable, "-W", "error", "-Wignore::DeprecationWarning", "-c", FORKING_WHILE_LISTENING, server.url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert worker.stdout.split() == ["0", "False", "1"], worker.stderr
    assert worker.stderr == ""


def listener_of(url: str, *, linger_seconds: float) -> Listener:
    (server,) = servers_of_url(url)
    return Listener(server, timeout_seconds=10, linger_seconds=linger_seconds)


async def until_channels(client: Any, *names: str) -> None:
    async def has_happened() -> bool:
        return sorted(await client.pubsub_channels()) == sorted(names)

    await until(has_happened)


async def test_a_subscription_that_nobody_listens_to_ends_and_with_the_last_one_the_connection(
    server: RedisServer, client: Any
) -> None:
    listener = listener_of(f"{server.url}?client_name=lingering", linger_seconds=0.01)
    await listener.wait("long", timeout_seconds=0)
    long = asyncio.ensure_future(listener.wait("long", timeout_seconds=50))
    await until_channels(client, "long")
    await listener.wait("short", timeout_seconds=0.01)
    await until_channels(client, "long")  # it has outlived the end that the first wait set it
    assert await connections_of(client, "lingering") == 1
    await client.publish("long", "")
    await asyncio.wait_for(long, 20)
    await until_channels(client)
    await until_connections(client, "lingering", 0)
    again = asyncio.ensure_future(listener.wait("long", timeout_seconds=50))
    await until_channels(client, "long")
    await client.publish("long", "")
    await asyncio.wait_for(again, 20)
    await listener.abort()


async def test_who_comes_while_the_connection_is_being_ended_gets_another(server: RedisServer, client: Any) -> None:
    listener = listener_of(server.url, linger_seconds=0)
    first = asyncio.ensure_future(listener.wait("first", timeout_seconds=50))
    await until_channels(client, "first")
    await client.publish("first", "")
    await first
    async with asyncio.timeout(20):
        while listener._channels:  # noqa: ASYNC110 - its end is decided in one turn of the loop, and done in the next
            await asyncio.sleep(0)
    second = asyncio.ensure_future(listener.wait("second", timeout_seconds=50))
    await until_channels(client, "second")
    await client.publish("second", "")
    await asyncio.wait_for(second, 20)
    await listener.abort()


async def test_a_connection_that_comes_too_late_for_all_listeners_is_closed(proxy: Proxy, client: Any) -> None:
    listener = listener_of(f"redis://127.0.0.1:{proxy.port}?client_name=late", linger_seconds=0)
    proxy.hold()
    await listener.wait("key", timeout_seconds=0.01)
    await asyncio.sleep(0.01)
    proxy.heal()

    async def has_connected() -> bool:
        return b"late" in b"".join(proxy.requests)

    await until(has_connected)
    await until_connections(client, "late", 0)
    assert b"SUBSCRIBE" not in b"".join(proxy.requests)
    await listener.abort()


async def test_a_listener_hears_only_of_what_it_asked_for_and_of_nothing_in_nonsense(fake: FakeServer) -> None:
    listener = listener_of(fake.url, linger_seconds=10)
    waiting = asyncio.ensure_future(listener.wait("key", timeout_seconds=50))
    fake.answer = lambda _command: b"*3\r\n$9\r\nsubscribe\r\n$3\r\nkey\r\n:1\r\n"

    async def is_subscribed() -> bool:
        return any(command[0] == b"SUBSCRIBE" for command in fake.commands)

    await until(is_subscribed)
    fake.say(b"*3\r\n$7\r\nmessage\r\n$5\r\nother\r\n$0\r\n\r\n")
    await asyncio.sleep(0.05)
    assert not waiting.done()
    fake.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(IdempotencyPersistenceLayerError):
        await asyncio.wait_for(waiting, 20)
    await listener.abort()
