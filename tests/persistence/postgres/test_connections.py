"""Connections of our own: how many, how long, on which event loop, in which process; and through PgBouncer."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import subprocess
import sys
import time
import weakref
from typing import Any

import asyncpg
import psycopg
import pytest

from aidem import idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.postgres import PostgresPersistenceLayer, _connections, _questions
from tests.support.postgres import PgBouncer, PostgresServer, acquired, claimed, completed, connected, until
from tests.support.proxy import Proxy

pytestmark = pytest.mark.server

CLOSE_WAIT = 8  # of a TCP connection that the other side has closed: linux/include/net/tcp_states.h
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'aidem' AND application_name = $1"


def named(url: str, name: str) -> str:
    """Return the URL of sessions that can be told from others."""
    return f"{url}&application_name={name}"


async def test_connections_are_made_as_they_are_needed_and_no_more_than_that(
    server: PostgresServer, client: Any
) -> None:
    layer = PostgresPersistenceLayer(named(server.url, "few"), max_connections=3)
    await claimed(layer)
    await layer.aclose()
    await layer.get("key")
    assert await client.fetchval(SESSIONS, "few") == 1
    await asyncio.gather(*(claimed(layer, f"key {number}") for number in range(50)))
    source: Any = layer._sources.here()
    while source._tasks:  # one may still be connecting, for a question that another has answered
        await asyncio.wait(source._tasks)
    assert await client.fetchval(SESSIONS, "few") == 3
    await layer.aclose()

    async def are_gone() -> bool:
        return bool(await client.fetchval(SESSIONS, "few") == 0)

    await until(are_gone)


async def test_what_is_asked_of_a_few_connections_is_answered_in_its_turn(server: PostgresServer, client: Any) -> None:
    layer = PostgresPersistenceLayer(server.url, max_connections=1)
    order = list[int]()

    async def ask(number: int) -> None:
        await claimed(layer, f"{number}")
        order.append(number)

    await asyncio.gather(*(ask(number) for number in range(30)))
    assert order == list(range(30))
    await layer.aclose()


async def test_a_connection_that_is_idle_for_long_is_closed_and_another_is_made(
    server: PostgresServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PostgresPersistenceLayer(named(server.url, "idle"))
    layer._next_purge_at = math.inf
    await asyncio.gather(*(claimed(layer, f"{number}") for number in range(3)))
    source: Any = layer._sources.here()
    while source._tasks:  # one may still be connecting, for a question that another has answered
        await asyncio.wait(source._tasks)
    assert await client.fetchval(SESSIONS, "idle") >= 3
    for connection in source._idle:
        connection.idle_since -= _connections.KEPT_IDLE_SECONDS
    source._idle[-1].idle_since += 1  # this one is young enough
    source._sweep_timer.cancel()
    source._sweep()

    async def is_alone() -> bool:
        return bool(await client.fetchval(SESSIONS, "idle") == 1)

    await until(is_alone)
    source._idle[-1].idle_since -= 2
    too_old = source._idle[-1]
    await layer.get("key")
    assert source._idle[-1] is not too_old
    assert too_old.driver.is_closed()
    await until(is_alone)
    source._sweep_timer.cancel()
    for connection in source._idle:
        connection.idle_since -= _connections.KEPT_IDLE_SECONDS
    source._sweep()
    assert source._sweep_timer is None
    await layer.aclose()


@pytest.mark.parametrize("idle_seconds", [0.0, 2.0])
async def test_sessions_that_the_server_has_ended_meanwhile_are_noticed_before_they_are_used(
    server: PostgresServer, client: Any, idle_seconds: float
) -> None:
    layer = PostgresPersistenceLayer(named(server.url, "ended"))
    await asyncio.gather(*(claimed(layer, f"{number}") for number in range(10)))
    source: Any = layer._sources.here()
    while source._tasks:  # one may still be connecting, for a question that another has answered
        await asyncio.wait(source._tasks)
    statement = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'ended'"
    with psycopg.connect(server.url, autocommit=True) as blocking:  # meanwhile the loop hears of nothing
        ended = blocking.execute(statement).fetchall()
        assert len(ended) >= 2
        for connection in source._idle:
            connection.idle_since -= idle_seconds
            sent_by_server = connection.driver._transport.get_extra_info("socket")
            while sent_by_server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != CLOSE_WAIT:
                time.sleep(0.01)  # noqa: ASYNC251 - a session is counted no more before its end has come here
    if idle_seconds == 0:

        async def is_heard_of() -> bool:  # a loop that runs hears of it by itself
            return all(connection.driver.is_closed() for connection in source._idle)

        await until(is_heard_of)
    for number in range(20):
        assert isinstance(await acquired(layer, f"{number % 10}", "another"), Blocked)
    await layer.aclose()


async def test_a_statement_that_asyncpg_does_not_send_is_sent_on_another_connection(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PostgresPersistenceLayer(server.url)
    claim = await claimed(layer)
    fetch, refused = _connections.OwnConnection.fetch, list[Any]()

    async def fetch_after_a_refusal(connection: Any, *arguments: Any, **options: Any) -> Any:
        if not refused:  # as it does when it has heard that the server ends the session
            refused.append(connection)
            raise asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")
        return await fetch(connection, *arguments, **options)

    monkeypatch.setattr(_connections.OwnConnection, "fetch", fetch_after_a_refusal)
    assert await layer.get(claim.idempotency_key) == claim
    source: Any = layer._sources.here()
    assert len(refused) == 1
    assert refused[0] not in source._open
    await layer.aclose()


async def test_a_server_without_a_connection_to_spare_is_used_with_those_there_are(
    server: PostgresServer, client: Any
) -> None:
    await client.execute("DROP ROLE IF EXISTS modest")
    await client.execute("CREATE ROLE modest LOGIN CONNECTION LIMIT 2")
    await client.execute("GRANT ALL ON aidem_records TO modest")
    url = server.url.replace("aidem@", "modest@")
    layer = PostgresPersistenceLayer(url)
    await asyncio.gather(*(claimed(layer, f"{number}") for number in range(100)))
    source: Any = layer._sources.here()
    assert len(source._open) == 2
    assert source._next_try_at > 0, "no connection was refused"
    other = PostgresPersistenceLayer(url)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="no connection to spare") as failed:
        await acquired(other)
    assert not failed.value.may_be_applied
    await layer.aclose()
    await claimed(other, "other")
    await other.aclose()
    await client.execute("DROP OWNED BY modest; DROP ROLE modest")


async def test_a_statement_that_takes_too_long_is_cancelled_and_its_connection_replaced(
    server: PostgresServer, client: Any
) -> None:
    async with Proxy.to(server.port) as proxy:
        layer = PostgresPersistenceLayer(
            server.url.replace(f":{server.port}", f":{proxy.port}"), max_connections=1, timeout_seconds=2.0
        )
        layer._next_purge_at = math.inf
        await claimed(layer)
        proxy.drop(replies=True)
        with pytest.raises(IdempotencyPersistenceConnectionError, match="did not answer within 2 s") as failed:
            await acquired(layer, "other")
        assert proxy.dropped.replies
        assert failed.value.may_be_applied
        queued = [asyncio.ensure_future(acquired(layer, f"{number}")) for number in range(3)]
        answers = await asyncio.gather(*queued, return_exceptions=True)
        assert {type(answer) for answer in answers} == {IdempotencyPersistenceConnectionError}
        proxy.heal()
        assert (await acquired(layer, "other")).record.owner == "ours"
        await layer.aclose()


async def test_a_question_whose_turn_comes_too_late_is_not_sent(server: PostgresServer, client: Any) -> None:
    layer = PostgresPersistenceLayer(server.url, max_connections=1, timeout_seconds=2.0)
    await claimed(layer, "held")
    async with connected(server.url) as holder, holder.transaction():
        await holder.execute("SELECT FROM aidem_records WHERE id = 'held' FOR UPDATE")
        given_up: Any
        blocking, given_up = layer.forget("held"), layer.get("late")
        late = asyncio.ensure_future(acquired(layer, "late"))
        given_up.fail(ZeroDivisionError())
        with pytest.raises(IdempotencyPersistenceConnectionError, match="did not answer"):
            await blocking
        with pytest.raises(IdempotencyPersistenceConnectionError, match="no connection was free within 2 s") as failed:
            await late
        assert not failed.value.may_be_applied
    assert await client.fetchval("SELECT count(*) FROM aidem_records WHERE id = 'late'") == 0
    await layer.aclose()


# --- Event loops and processes ----------------------------------------------------------------------------------------


async def test_the_connections_of_a_layer_that_is_dropped_are_closed(server: PostgresServer, client: Any) -> None:
    layer = PostgresPersistenceLayer(named(server.url, "dropped"))
    await claimed(layer)
    source = weakref.ref(layer._sources.here())
    del layer
    gc.collect()

    async def are_gone() -> bool:
        return bool(await client.fetchval(SESSIONS, "dropped") == 0)

    await until(are_gone)
    gc.collect()
    assert source() is None


async def test_to_close_a_layer_finishes_what_was_asked(server: PostgresServer, client: Any) -> None:
    layer = PostgresPersistenceLayer(server.url, max_connections=2)
    asked = [asyncio.ensure_future(acquired(layer, f"{number}")) for number in range(50)]
    await asyncio.sleep(0)
    await layer.aclose()
    assert all(question.done() for question in asked)
    assert [type(question.result()) for question in asked] == [Claimed] * 50


async def test_what_is_asked_when_all_tasks_are_cancelled_is_answered(server: PostgresServer, client: Any) -> None:
    """Also where the task that was to ask had not begun; the connection it was given is kept."""
    layer = PostgresPersistenceLayer(server.url, max_connections=1)
    layer._next_purge_at = math.inf
    await claimed(layer, "warm")
    source: Any = layer._sources.here()
    [connection] = source._idle
    asked = asyncio.ensure_future(acquired(layer))
    await asyncio.sleep(0)
    [task] = source._tasks
    task.cancel()
    assert isinstance(await asked, Claimed)
    assert task.cancelled()
    await layer.aclose()
    assert connection.driver.is_closed()


async def test_a_layer_that_is_closed_by_its_loop_asks_nothing_again(
    server: PostgresServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_questions, "PAUSES_SECONDS", (0.01,) * 1000)  # not until it counts as held
    layer = PostgresPersistenceLayer(server.url)
    claim = await claimed(layer)
    async with connected(server.url) as holder, holder.transaction():
        await holder.execute("SELECT FROM aidem_records FOR UPDATE")
        released = asyncio.ensure_future(layer.release(claim))
        source: Any = layer._sources.here()

        async def is_paused() -> bool:
            return bool(source._paused)

        await until(is_paused)
        await source.abort()
        with pytest.raises(IdempotencyPersistenceConnectionError, match="the persistence layer was closed"):
            await released
        await asyncio.sleep(0.1)
        assert not source._open
        assert not source._paused
    await layer.aclose()


async def test_to_close_a_layer_waits_for_what_is_asked_again(
    server: PostgresServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_questions, "PAUSES_SECONDS", (0.01,) * 1000)  # not until it counts as held
    layer = PostgresPersistenceLayer(server.url)
    claim = await claimed(layer)
    async with connected(server.url) as holder, holder.transaction():
        await holder.execute("SELECT FROM aidem_records FOR UPDATE")
        released = asyncio.ensure_future(layer.release(claim))
        source: Any = layer._sources.here()

        async def is_paused() -> bool:
            return bool(source._paused)

        await until(is_paused)
        closed = asyncio.ensure_future(layer.aclose())
        await asyncio.sleep(0)
    assert await released
    await closed


def test_a_loop_that_ends_while_questions_are_under_way_leaves_nothing_behind(server: PostgresServer) -> None:
    layer = PostgresPersistenceLayer(named(server.url, "loop"))

    async def ask_and_leave() -> None:
        await layer.get("key")
        questions = [layer.get(f"{number}") for number in range(50)]
        await asyncio.sleep(0)
        assert not any(question.done() for question in questions)  # type: ignore[attr-defined]

    async def sessions() -> int:
        async with connected(server.url) as client:
            return int(await client.fetchval(SESSIONS, "loop"))

    async def all_have_left() -> bool:
        return await sessions() == 0

    asyncio.run(ask_and_leave())
    asyncio.run(until(all_have_left))


def test_an_outcome_is_stored_though_the_loop_ends_meanwhile(server: PostgresServer) -> None:
    """`asyncio.run` cancels every task, the one that speaks to the server too; the caller then asks again."""
    layer = PostgresPersistenceLayer(server.url)
    results = list[Any]()

    @idempotent_function(persistence_store=layer, key_prefix="ends")
    async def effect(number: int) -> int:
        reached.set()
        return number

    async def call() -> None:
        results.append(await effect(1))

    reached = asyncio.Event()

    async def leave() -> None:
        await layer.open()
        calls.append(asyncio.ensure_future(call()))
        await reached.wait()
        for _ in range(2):  # the completion has been asked for, and is under way
            await asyncio.sleep(0)

    calls = list[asyncio.Future[None]]()
    asyncio.run(leave())
    assert calls[0].cancelled()
    assert results == []

    async def statuses() -> list[str]:
        async with connected(server.url) as client:
            return [row[0] for row in await client.fetch("SELECT status FROM aidem_records WHERE id LIKE 'ends%'")]

    assert asyncio.run(statuses()) == ["COMPLETED"]


FORKING = """
import asyncio, os, sys
from aidem.persistence.postgres import PostgresPersistenceLayer
from tests.support.postgres import acquired

layer = PostgresPersistenceLayer(sys.argv[1])
layer._next_purge_at = float("inf")  # nothing is under way during a fork
loop = asyncio.new_event_loop()
loop.run_until_complete(acquired(layer, "parent"))
source = layer._sources._by_loop[loop][0]
before = set(source._open)
for number in range(3):
    child = os.fork()
    if child == 0:
        for connection in source._open:
            connection.driver.__del__()  # as the end of an interpreter may do
        answers = asyncio.run(asyncio.wait_for(acquired(layer, f"child {number}", "child"), 20))
        print(type(answers).__name__, flush=True)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print(type(loop.run_until_complete(acquired(layer, f"child {number}", "parent"))).__name__, flush=True)
assert before <= source._open, "the parent has lost one"
loop.run_until_complete(layer.aclose())
loop.close()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_forked_child_connects_by_itself_and_the_parent_keeps_its_connection(
    server: PostgresServer, client: Any, loop: str
) -> None:
    code = (
        FORKING
        if loop == "asyncio"
        else f"import asyncio, uvloop\nasyncio.set_event_loop_policy(uvloop.EventLoopPolicy())\n{FORKING}"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, server.url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=50)
    assert (done.stdout.split(), done.stderr) == (["Claimed", "0", "Blocked"] * 3, "")


# --- PgBouncer --------------------------------------------------------------------------------------------------------


async def test_prepared_statements_are_used_unless_a_pooler_stands_before_the_server(
    server: PostgresServer, pgbouncer: PgBouncer, client: Any
) -> None:
    for url, option, is_used in (
        (server.url, None, True),
        (server.url, False, False),
        (pgbouncer.url, None, False),
        (pgbouncer.url, True, True),
    ):
        layer = PostgresPersistenceLayer(url, prepared_statements=option, max_connections=1)
        await layer.forget("key")
        [connection] = layer._sources.here()._open  # type: ignore[attr-defined]
        assert bool(connection._prepared) is is_used
        await layer.aclose()


async def test_many_callers_share_the_few_connections_of_a_pooler(pgbouncer: PgBouncer, client: Any) -> None:
    layers = [PostgresPersistenceLayer(pgbouncer.url) for _ in range(3)]

    async def call(number: int) -> type:
        layer = layers[number % 3]
        answer = await acquired(layer, f"{number % 50}", f"{number}")
        if isinstance(answer, Claimed):
            assert await completed(layer, answer.record)
        return type(answer)

    answers = await asyncio.gather(*(call(number) for number in range(300)))
    assert answers.count(Claimed) == 50
    for layer in layers:
        await layer.aclose()
