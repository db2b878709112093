"""What nodes of a cluster may answer, and what then becomes of a command; the nodes are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.persistence.redis._cluster import PAUSE_SECONDS
from aidem.persistence.redis._errors import ReplyError
from tests.support.listening import listening
from tests.support.proxy import Proxy
from tests.support.redis import FakeServer, claimed, fake_server, no_complaints, until

pytestmark = pytest.mark.server

NOTHING = b"$-1\r\n"
KEYS = ("key 2", "key")
"""One in the first half of the slots, and one in the other."""
Node = tuple[str | None, int]


def slots(*shards: tuple[int, int, Node]) -> bytes:
    """Return what CLUSTER SLOTS replies."""
    reply = f"*{len(shards)}\r\n"
    for first, last, (host, port) in shards:
        name = "$-1" if host is None else f"${len(host)}\r\n{host}"
        reply += f"*3\r\n:{first}\r\n:{last}\r\n*3\r\n{name}\r\n:{port}\r\n$2\r\nid\r\n"
    return reply.encode()


class FakeNode:
    """A node that has all slots, or says who else has them.

    Attributes:
        answer: What it answers to anything but the question who has which slots.
        shards: What it answers to that one.
    """

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.answer: Callable[[list[bytes]], bytes | None] = lambda _command: NOTHING
        self.shards: bytes | None = slots((0, 16383, ("127.0.0.1", server.port)))
        server.answer = lambda command: self.shards if command[0] == b"CLUSTER" else self.answer(command)

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.server.port}"

    def sent(self) -> list[bytes]:
        """Return the names of the commands it got, but for handshakes and questions for slots."""
        return [command[0] for command in self.server.commands if command[0] not in {b"CLIENT", b"CLUSTER"}]

    def refers_to(self, other: FakeNode, how: str) -> None:
        """Answer everything with a reference to another node."""
        self.answer = lambda _command: f"-{how} 1 127.0.0.1:{other.server.port}\r\n".encode()


@asynccontextmanager
async def fake_nodes() -> AsyncGenerator[tuple[FakeNode, FakeNode]]:
    async with fake_server(lambda _command: NOTHING) as first, fake_server(lambda _command: NOTHING) as second:
        yield FakeNode(first), FakeNode(second)


@pytest.fixture
async def nodes() -> AsyncGenerator[tuple[FakeNode, FakeNode]]:
    async with fake_nodes() as nodes:
        yield nodes


@pytest.fixture
async def layer(nodes: tuple[FakeNode, FakeNode]) -> AsyncGenerator[RedisPersistenceLayer]:
    """A layer that knows one of the nodes."""
    with no_complaints():
        layer = RedisPersistenceLayer(nodes[0].url, timeout_seconds=20)
        yield layer
        await layer.aclose()


# --- Who has which slots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [None, "", "?"])
async def test_a_node_without_a_name_is_where_the_one_is_that_says_so(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer, host: str | None
) -> None:
    first, second = nodes
    first.shards = slots((0, 16383, (host, second.server.port)))
    assert await layer.get("key") is None
    assert second.sent() == [b"GET"]


@pytest.mark.parametrize("host", ["127.0.0.1", "", "?"])
async def test_a_command_follows_where_it_is_sent_and_later_ones_go_there_at_once(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer, host: str
) -> None:
    first, second = nodes
    await layer.get("key")
    first.answer = lambda _command: f"-MOVED 1 {host}:{second.server.port}\r\n".encode()
    first.shards = slots((0, 16383, ("127.0.0.1", second.server.port)))
    await layer.get("key")
    await layer.get("key")
    assert (first.sent(), second.sent()) == ([b"GET"] * 2, [b"GET"] * 2)
    places: Any = layer._connections.here().line
    assert set(places._lines) == {("127.0.0.1", node.server.port) for node in nodes}


def test_what_a_node_refers_to_is_read_as_servers_write_it() -> None:
    assert ReplyError("MOVED 3999 10.0.0.1:6381").address == ("10.0.0.1", 6381)
    assert ReplyError("ASK 3999 ::1:6381").address == ("::1", 6381)
    assert ReplyError("MOVED 3999 ?:6381").address == ("", 6381)
    assert ReplyError("MOVED somewhere").address is None


async def test_nodes_that_refer_to_each_other_are_not_followed_for_ever(nodes: tuple[FakeNode, FakeNode]) -> None:
    first, second = nodes
    first.refers_to(second, "MOVED")
    second.refers_to(first, "MOVED")
    layer = RedisPersistenceLayer(first.url, timeout_seconds=2)
    errors = await asyncio.gather(layer.get("key"), layer.get("key"), return_exceptions=True)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 2
    assert errors[0] is not errors[1]
    assert "MOVED" in str(errors[0])
    assert len(first.sent() + second.sent()) < 2 * (10 + 2 / PAUSE_SECONDS)
    await layer.aclose()


async def test_a_node_that_hangs_leaves_time_to_ask_another(nodes: tuple[FakeNode, FakeNode]) -> None:
    first, second = nodes
    first.shards = None
    url = f"redis+cluster://127.0.0.1:{first.server.port},127.0.0.1:{second.server.port}"
    layer = RedisPersistenceLayer(url, timeout_seconds=2)
    assert await layer.get("key") is None
    assert first.server.commands[-1][0] == b"CLUSTER"
    await layer.aclose()


async def test_each_of_many_nodes_that_are_far_away_has_time_to_answer(nodes: tuple[FakeNode, FakeNode]) -> None:
    async with Proxy.to(nodes[0].server.port) as far_away:
        far_away.delay(0.1)
        places = ",".join([f"127.0.0.1:{far_away.port}"] * 60)
        layer = RedisPersistenceLayer(f"redis+cluster://{places}", timeout_seconds=6)
        assert await layer.get("key") is None
        await layer.aclose()


async def test_where_no_node_can_be_reached_that_is_said_at_once_to_everyone(vacant_port: int) -> None:
    layer = RedisPersistenceLayer(f"redis+cluster://127.0.0.1:{vacant_port}", timeout_seconds=50)
    with no_complaints():
        asked = asyncio.gather(layer.get("a"), layer.get("b"), layer.open(), return_exceptions=True)
        errors = await asyncio.wait_for(asked, 20)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 3
    assert errors[0] is not errors[1]
    assert f"127.0.0.1:{vacant_port} cannot be reached" in str(errors[0])
    with pytest.raises(IdempotencyPersistenceConnectionError, match="cannot be reached"):
        await layer.wait_for_change("key", 20)
    await layer.aclose()


async def test_opening_fails_at_once_where_a_node_is_gone(nodes: tuple[FakeNode, FakeNode], vacant_port: int) -> None:
    first, _ = nodes
    first.answer = lambda command: b"-NOPERM no\r\n" if command[0] in {b"INFO", b"CONFIG"} else NOTHING
    first.shards = slots((0, 8191, ("127.0.0.1", first.server.port)), (8192, 16383, ("127.0.0.1", vacant_port)))
    layer = RedisPersistenceLayer(first.url, timeout_seconds=50)
    with no_complaints(), pytest.raises(IdempotencyPersistenceConnectionError, match=f"{vacant_port} cannot be"):
        await asyncio.wait_for(layer.open(), 20)
    assert await layer.get(KEYS[0]) is None
    await layer.aclose()


async def test_what_a_node_is_asked_of_itself_is_asked_of_no_other(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    nodes[0].refers_to(nodes[1], "MOVED")
    with pytest.raises(IdempotencyPersistenceConnectionError, match="MOVED"):
        await layer.open()
    assert (nodes[0].sent(), nodes[1].sent()) == ([b"INFO"], [])


async def test_a_node_that_is_gone_is_waited_for_and_then_said_to_be_gone(
    nodes: tuple[FakeNode, FakeNode], vacant_port: int
) -> None:
    nodes[0].shards = slots((0, 16383, ("127.0.0.1", vacant_port)))
    layer = RedisPersistenceLayer(nodes[0].url, timeout_seconds=2)
    with no_complaints():
        errors = await asyncio.gather(layer.get("a"), layer.get("b"), return_exceptions=True)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConnectionError] * 2
    assert errors[0] is not errors[1]
    assert f"127.0.0.1:{vacant_port} cannot be reached" in str(errors[0])
    await layer.aclose()


async def test_a_user_who_may_not_ask_for_the_slots_is_told_so(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    nodes[0].shards = b"-NOPERM this user has no permissions to run the 'cluster|slots' command\r\n"
    with pytest.raises(IdempotencyPersistenceConfigError, match="NOPERM"):
        await layer.get("key")


async def test_a_node_that_refuses_the_password_is_not_waited_for(nodes: tuple[FakeNode, FakeNode]) -> None:
    first, second = nodes
    first.shards = slots((0, 16383, ("127.0.0.1", second.server.port)))
    first.answer = lambda _command: b"+OK\r\n"
    second.answer = lambda _command: b"-WRONGPASS invalid username-password pair\r\n"
    layer = RedisPersistenceLayer(f"redis+cluster://:word@127.0.0.1:{first.server.port}", timeout_seconds=50)
    with pytest.raises(IdempotencyPersistenceConfigError, match="does not accept the username or the password"):
        await asyncio.wait_for(layer.get("key"), 20)
    assert second.sent() == [b"AUTH"]  # nor was anything asked anew before
    await layer.aclose()


async def test_where_all_nodes_are_gone_those_that_the_user_named_are_asked_again(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer, vacant_port: int
) -> None:
    first, _ = nodes
    own, first.shards = first.shards, slots((0, 16383, ("127.0.0.1", vacant_port)))
    asking = layer.get("key")
    await until_asked_for_slots(first)
    first.shards = own
    assert await asking is None


# --- Commands that are not served -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["TRYAGAIN", "CLUSTERDOWN"])
async def test_what_a_node_does_not_serve_just_now_is_asked_again(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer, code: str
) -> None:
    replies = [f"-{code} not now\r\n".encode(), f"-{code} not now\r\n".encode(), NOTHING]
    nodes[0].answer = lambda _command: replies.pop(0)
    assert await layer.get("key") is None
    assert replies == []


async def test_other_errors_are_those_of_the_caller(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    nodes[0].answer = lambda _command: b"-OOM command not allowed\r\n"
    with pytest.raises(IdempotencyPersistenceConnectionError, match="OOM"):
        await layer.get("key")
    assert nodes[0].sent() == [b"GET"]


async def test_each_command_for_a_slot_on_its_way_follows_its_leave_to_enter_and_no_other_does(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    first, second = nodes
    first.refers_to(second, "ASK")
    second.answer = lambda command: b"+OK\r\n" if command[0] == b"ASKING" else NOTHING
    assert await asyncio.gather(*(layer.get(f"key {number}") for number in range(40))) == [None] * 40
    assert second.sent() == [b"ASKING", b"GET"] * 40
    assert first.sent() == [b"GET"] * 40  # it is not over: the next one asks there first, too


async def test_who_may_not_enter_is_told_so(nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer) -> None:
    first, second = nodes
    first.refers_to(second, "ASK")
    second.answer = lambda command: b"-NOPERM no\r\n" if command[0] == b"ASKING" else NOTHING
    with pytest.raises(IdempotencyPersistenceConfigError, match="NOPERM"):
        await layer.get("key")
    second.answer = lambda command: b"+OK\r\n" if command[0] == b"ASKING" else NOTHING
    assert await layer.get("key") is None


async def test_what_cannot_get_to_where_its_slot_goes_is_asked_for_where_it_came_from(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer, vacant_port: int
) -> None:
    replies = [f"-ASK 1 127.0.0.1:{vacant_port}\r\n".encode(), NOTHING]
    nodes[0].answer = lambda _command: replies.pop(0)
    assert await layer.get("key") is None
    assert replies == []


async def test_a_node_that_hangs_up_fails_what_it_got_and_the_rest_goes_where_the_slots_are_then(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    first, second = nodes
    await layer.get("key")
    await asyncio.sleep(0)  # the turn in which the reply came is over
    first.shards = slots((0, 16383, ("127.0.0.1", second.server.port)))
    first.answer = lambda _command: None
    sent, *waiting = [layer.get("key") for _ in range(10)]

    async def has_arrived() -> bool:
        return len(first.sent()) == 2

    await until(has_arrived)
    first.server.hang_up()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="lost; the operation may have been applied"):
        await sent
    waiting.append(layer.get("key"))  # nor does what is asked from now on go where nobody may be
    assert await asyncio.gather(*waiting) == [None] * 10
    assert (len(first.sent()), second.sent()) == (2, [b"GET"] * 10)


async def test_what_waited_for_a_node_that_hangs_has_its_time_where_the_slot_is_then(
    nodes: tuple[FakeNode, FakeNode],
) -> None:
    first, second = nodes
    own = [("127.0.0.1", node.server.port) for node in nodes]
    first.shards = second.shards = slots((0, 8191, own[0]), (8192, 16383, own[1]))
    layer = RedisPersistenceLayer(first.url, timeout_seconds=1)
    await asyncio.gather(*(layer.get(key) for key in KEYS))
    await asyncio.sleep(0)  # the turn in which the replies came is over
    first.answer = lambda _command: None
    sent, *waiting = [layer.get(KEYS[0]) for _ in range(4)]
    first.shards = second.shards = slots((0, 16383, own[1]))
    with pytest.raises(IdempotencyPersistenceConnectionError, match="did not answer within 1 s"):
        await sent
    assert await asyncio.gather(*waiting) == [None] * 3
    assert second.sent() == [b"GET"] * 4
    await layer.aclose()


async def test_who_gave_up_a_slot_that_nobody_serves_is_not_asked_for_any_more(
    nodes: tuple[FakeNode, FakeNode],
) -> None:
    first, _ = nodes
    first.shards = slots((0, 8191, ("127.0.0.1", first.server.port)))
    layer = RedisPersistenceLayer(first.url, timeout_seconds=2)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="no node of the Redis cluster serves the slot"):
        await layer.get(KEYS[1])
    lines: Any = layer._connections.here().line

    async def is_at_rest() -> bool:
        return lines._looking is None

    await until(is_at_rest)
    assert lines._held == []
    await layer.aclose()


async def test_a_script_is_sent_in_full_where_a_node_does_not_know_it(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    nodes[0].answer = lambda _command: b"-NOSCRIPT No matching script.\r\n"
    with pytest.raises(IdempotencyPersistenceLayerError, match="NOSCRIPT"):
        await claimed(layer)
    assert nodes[0].sent() == [b"EVALSHA", b"EVAL"]


async def test_a_command_that_was_given_up_by_its_caller_is_not_sent_again(
    nodes: tuple[FakeNode, FakeNode], layer: RedisPersistenceLayer
) -> None:
    nodes[0].answer = lambda _command: b"-TRYAGAIN not now\r\n"
    given_up = layer.get("key")

    async def was_tried() -> bool:
        return bool(nodes[0].sent())

    await until(was_tried)
    given_up.fail(TimeoutError())
    assert given_up.exception() is not None
    nodes[0].answer = lambda _command: NOTHING
    count = len(nodes[0].sent())
    assert await layer.get("other") is None
    assert len(nodes[0].sent()) == count + 1


# --- Ends -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def hung(nodes: tuple[FakeNode, FakeNode]) -> AsyncGenerator[None]:
    """Let all slots be at a node that accepts connections and says nothing."""

    async def say_nothing(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with listening(say_nothing) as port:
        nodes[0].shards = slots((0, 16383, ("127.0.0.1", port)))
        yield


async def until_asked_for_slots(node: FakeNode) -> None:
    async def has_been_asked() -> bool:
        return any(command[0] == b"CLUSTER" for command in node.server.commands)

    await until(has_been_asked)


async def until_looked(layer: RedisPersistenceLayer) -> None:
    lines: Any = layer._connections.here().line

    async def has_looked() -> bool:
        return lines._line_of_slot[0] is not None

    await until(has_looked)


async def test_closing_does_not_wait_for_connections_that_nobody_waits_for(
    nodes: tuple[FakeNode, FakeNode], hung: None
) -> None:
    layer = RedisPersistenceLayer(nodes[0].url, timeout_seconds=50)
    given_up = layer.get("key")
    await until_looked(layer)
    given_up.fail(TimeoutError())
    assert given_up.exception() is not None
    await asyncio.wait_for(layer.aclose(), 20)


@pytest.mark.parametrize("state", ["looking", "connecting"])
async def test_what_waits_when_all_is_closed_at_once_is_told_so_and_nothing_is_asked_any_more(
    nodes: tuple[FakeNode, FakeNode], hung: None, state: str
) -> None:
    layer = RedisPersistenceLayer(nodes[0].url, timeout_seconds=50)
    if state == "looking":
        nodes[0].shards = None
    operation = layer.get("key")
    lines: Any = layer._connections.here().line
    if state == "connecting":
        await until_looked(layer)
    else:
        await until_asked_for_slots(nodes[0])
    before = len(nodes[0].server.commands)
    await asyncio.wait_for(layer._connections.here().abort(), 20)
    await asyncio.sleep(2 * PAUSE_SECONDS)
    assert operation.done()
    assert "closed" in str(operation.exception())
    assert len(nodes[0].server.commands) == before
    assert lines._looking is None
    await layer.aclose()


def test_what_was_asked_when_its_loop_ends_is_answered_with_that() -> None:
    operations = list[Any]()

    async def use() -> None:
        async with fake_nodes() as (first, _):
            layer = RedisPersistenceLayer(first.url)
            first.answer = lambda _command: b"-CLUSTERDOWN not now\r\n"
            operations.append(layer.get("key"))
            operations.append(layer)  # it outlives its loop

            async def was_refused() -> bool:
                return bool(first.sent())

            await until(was_refused)

    asyncio.run(use())
    assert isinstance(operations[0].exception(), IdempotencyPersistenceConnectionError)
